"""``xtuner-add embed``: from slides to tile embeddings and slide embeddings by Prov-GigaPath."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xtuner_add.caption_commands import INCOMPLETE
from xtuner_add.release_commands import user_errors

if TYPE_CHECKING:
    from gigapath.slide_vectors import SlideEncoderSpec
    from wsi.manifest import Report

_PATH = click.Path(path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_HUB = "hf_hub:prov-gigapath/prov-gigapath"
_PRESETS = {"mean": "mean", "pipeline": "gigapath", "trident": "trident", "lazyslide": "lazyslide"}


class _GridSize(click.ParamType):
    name = "PX|tile"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """A number of pixels, or `tile`."""
        if value == "tile" or isinstance(value, int):
            return value
        return click.IntRange(1).convert(value, param, ctx)


@click.command("embed")
@click.argument("slides", type=_PATH)
@click.option("--output", type=_PATH, required=True, help="Folder to write.")
@click.option(
    "--tile-encoder",
    default=_HUB,
    show_default=True,
    metavar="WEIGHTS",
    help="hf_hub:OWNER/NAME, a folder with config.json and weights, a file, or random.",
)
@click.option(
    "--tile-arch", metavar="NAME", help="Of the tile encoder; by default its config.json says it."
)
@click.option(
    "--slide-encoder",
    default=_HUB,
    show_default=True,
    metavar="WEIGHTS",
    help="hf_hub:OWNER/NAME, a file or folder, random, or none to stop at the tiles.",
)
@click.option(
    "--slide-arch", metavar="NAME", help="Of the slide encoder; by default the one for the tiles."
)
@click.option(
    "--preset",
    type=click.Choice(list(_PRESETS)),
    default="mean",
    show_default=True,
    help="Which vector: the mean of the tiles, or the one that the original's pipeline, TRIDENT "
    "or LazySlide makes.",
)
@click.option(
    "--grid-px",
    type=_GridSize(),
    help="Side of a cell of the position grid in level-0 pixels, or tile; by default the preset's.",
)
@click.option("--mpp", default=0.5, show_default=True, help="Micrometres per pixel of the tiles.")
@click.option("--tile-px", default=256, show_default=True, help="Side of a tile, at --mpp.")
@click.option(
    "--min-tissue", default=0.1, show_default=True, help="Smallest share of tissue in a tile."
)
@click.option(
    "--slide-mpp", type=float, help="Of the slides, in place of what they say about themselves."
)
@click.option("--masks", type=_FOLDER, help="Your own tissue: SLIDE.geojson or SLIDE.png.")
@click.option(
    "--coords", type=_FOLDER, help="Coordinates of `xtuner-add tile`, TRIDENT or CLAM: SLIDE.h5."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Precision; auto is fp16 on a GPU and fp32 without.",
)
@click.option("--device", help="By default the GPUs where there are some.")
@click.option("--batch-size", type=click.IntRange(1), help="By default 128 on a GPU, else 16.")
@click.option(
    "--workers", type=click.IntRange(1), help="Slides at a time; by default one per GPU, else one."
)
@click.option(
    "--read-workers",
    type=click.IntRange(0),
    help="Processes that read ahead for each slide; 0 is a thread. By default the cores that are "
    "left on a GPU machine.",
)
@click.option(
    "--engine", type=click.Choice(["process", "ray"]), default="process", show_default=True
)
@click.option("--address", help="Of a Ray cluster; by default Ray runs on this machine.")
@click.option("--seed", default=0, show_default=True, help="Of random weights.")
@click.option("--no-pictures", is_flag=True, help="Draw none.")
@click.option("--retry-skipped", is_flag=True, help="Try again what was left out before.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
def embed(slides: Path, output: Path, workers: int | None, quiet: bool, **options: Any) -> None:
    """Embed the tiles of SLIDES, and SLIDES as wholes.

    SLIDES is a slide, a folder of slides, or a folder with tiles named like 01581x_25327y.png (or
    with a folder of these for each slide). Writes coords/, features/ENCODER/SLIDE.h5,
    slide_features/, slide_embeddings.npz, and to look at thumbnails/, overlays/ and pictures/,
    which show what the tile encoder tells apart as colours. Run the same command again after a
    kill: it continues. Exit code 3 if a slide or a tile was left out; skipped.jsonl says why.
    """
    from gigapath.embedding_job import embed_slides

    with user_errors():
        import torch

        from gigapath.tile_inference import choose_device

        device = choose_device(options["device"])
        num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        workers = workers or (max(1, num_gpus) if device.index is None else 1)
        settings, placement = _settings(options, device, workers)
        report = embed_slides(
            slides,
            output,
            settings,
            placement,
            workers=workers,
            engine=options["engine"],
            address=options["address"],
            retry_skipped=options["retry_skipped"],
            progress=not quiet,
        )
    _tell(report, output)


def _settings(options: dict[str, Any], device: Any, workers: int) -> tuple[Any, Any]:
    """What to embed and where, from the command line."""
    from gigapath.embedding_job import EmbeddingSettings, Placement
    from gigapath.tile_inference import choose_precision, describe_encoder
    from wsi.tiling import PatchSpec

    on_gpu = device.type == "cuda"
    precision = choose_precision(options["dtype"], device)
    tile_encoder = describe_encoder(
        options["tile_encoder"],
        model_arch=options["tile_arch"],
        precision=precision,
        seed=options["seed"],
    )
    settings = EmbeddingSettings(
        tile_encoder,
        _slide_encoder(options, tile_encoder, precision),
        PatchSpec(options["tile_px"], options["mpp"], min_tissue=options["min_tissue"]),
        slide_mpp=options["slide_mpp"],
        masks=str(options["masks"].resolve()) if options["masks"] else None,
        coords=str(options["coords"].resolve()) if options["coords"] else None,
        batch_size=options["batch_size"] or (128 if on_gpu else 16),
        pictures=not options["no_pictures"],
    )
    read_workers = options["read_workers"]
    if read_workers is None:
        from xtuner_add.slide_commands import num_cores

        read_workers = max(1, num_cores() // workers - 1) if on_gpu else 0
    return settings, Placement(str(device), read_workers)


def _slide_encoder(
    options: dict[str, Any], tile_encoder: Any, precision: str
) -> SlideEncoderSpec | None:
    from gigapath.slide_vectors import describe_slide_encoder
    from gigapath.tile_inference import embedding_width

    if options["slide_encoder"] == "none":
        return None
    return describe_slide_encoder(
        options["slide_encoder"],
        embedding_width(tile_encoder),
        model_arch=options["slide_arch"],
        preset=_PRESETS[options["preset"]],
        grid_px=options["grid_px"],
        precision=precision,
        seed=options["seed"],
    )


def _tell(report: Report, output: Path) -> None:
    """Prints what became of the job; ends with exit code 3 if anything was left out."""
    click.echo(f"Wrote {report.written:,} slides to {output}")
    for note, count in report.notes.items():
        click.echo(f"  of which {count:,} with {note}", err=True)
    for reason, count in report.reasons.items():
        click.echo(f"Left out {count:,}: {reason}", err=True)
    if report.skipped:
        click.echo(
            f"{output / 'skipped.jsonl'} says which and why. Mend the cause and add "
            "--retry-skipped to try them again",
            err=True,
        )
    if report.skipped or report.notes:
        raise SystemExit(INCOMPLETE)
