"""``xtuner-add tile``, ``extract`` and ``gdc-manifest``: from slides to patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xtuner_add.release_commands import user_errors

if TYPE_CHECKING:
    from wsi.manifest import Report
    from wsi.request_table import PatchRequest, RejectedRow

_Function = TypeVar("_Function", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)


def _job_options(function: _Function) -> _Function:
    """Options of every command that works through many slides."""
    options = [
        click.option("--output", type=_PATH, required=True, help="Folder to write."),
        click.option(
            "--slide-mpp",
            type=float,
            help="Micrometres per pixel of the slides, in place of what they say.",
        ),
        click.option("--workers", type=click.IntRange(1), help="By default one per CPU core."),
        click.option(
            "--engine", type=click.Choice(["process", "ray"]), default="process", show_default=True
        ),
        click.option("--address", help="Of a Ray cluster; by default Ray runs on this machine."),
        click.option("--retry-skipped", is_flag=True, help="Try again what was left out before."),
        click.option("--quiet", is_flag=True, help="No progress bar."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command("tile")
@click.argument("slides", type=_PATH)
@_job_options
@click.option("--patch-px", default=256, show_default=True, help="Side of a patch, at --mpp.")
@click.option("--mpp", default=0.5, show_default=True, help="Micrometres per pixel of the patches.")
@click.option("--overlap-px", default=0, show_default=True, help="Between neighbours, at --mpp.")
@click.option(
    "--min-tissue", default=0.5, show_default=True, help="Smallest share of tissue in a patch."
)
@click.option("--over-edge", is_flag=True, help="Also patches over the edge, white outside.")
@click.option(
    "--masks",
    type=_PATH,
    help="Folder with tissue masks: SLIDE.geojson in level-0 pixels, or SLIDE.png; by default "
    "tissue is found by Otsu's threshold.",
)
@click.option("--whole-slide", is_flag=True, help="Every patch, tissue or not.")
@click.option(
    "--coords-style",
    type=click.Choice(["trident", "clam"]),
    default="trident",
    show_default=True,
    help="Whose readers the coordinate files are for.",
)
def tile(
    slides: Path,
    output: Path,
    slide_mpp: float | None,
    patch_px: int,
    mpp: float,
    overlap_px: int,
    min_tissue: float,
    over_edge: bool,
    masks: Path | None,
    whole_slide: bool,
    coords_style: str,
    workers: int | None,
    retry_skipped: bool,
    quiet: bool,
    **engine: Any,
) -> None:
    """Find the patches of the SLIDES in a folder, or of one slide.

    Writes coords/SLIDE.h5 (TRIDENT and CLAM read them), overlays/ and thumbnails/ to look at.
    Run the same command again after a kill: it continues. Exit code 1 if a slide was left out.
    """
    from wsi.tile_job import TileSettings, tile_slides
    from wsi.tiling import PatchSpec

    if masks and whole_slide:
        raise click.UsageError("--masks or --whole-slide, not both")
    with user_errors():
        settings = TileSettings(
            PatchSpec(patch_px, mpp, overlap_px, min_tissue, over_edge),
            masks=str(masks.resolve()) if masks else None,
            whole_slide=whole_slide,
            mpp=slide_mpp,
            style=coords_style,  # type: ignore[arg-type]
        )
        report = tile_slides(
            slides,
            output,
            settings,
            workers=workers or num_cores(),
            retry_skipped=retry_skipped,
            progress=not quiet,
            **engine,
        )
    _tell(report, "slides", output)


@click.command("extract")
@click.argument("annotations", type=_PATH)
@_job_options
@click.option("--slides", type=_PATH, required=True, help="Folder of the slides.")
@click.option(
    "--patch-px",
    type=click.IntRange(1, 65536),
    help="Side of the patches of annotations in level-0 pixels, by default 672. Coordinate files "
    "say it themselves.",
)
@click.option(
    "--format", "image_format", type=click.Choice(["png", "jpg", "webp"]), default="png",
    show_default=True,
)  # fmt: skip
@click.option("--quality", type=click.IntRange(1, 100), help="Of JPEG and WebP, by default 90.")
@click.option(
    "--layout",
    type=click.Choice(["files", "shards"]),
    default="files",
    show_default=True,
    help="files: SLIDE_X_Y.png and .txt, and pairs.jsonl; shards: WebDataset.",
)
@click.option("--shard-size", type=click.IntRange(1), default=1000, show_default=True)
def extract(
    annotations: Path,
    slides: Path,
    output: Path,
    slide_mpp: float | None,
    patch_px: int | None,
    image_format: str,
    quality: int | None,
    layout: str,
    shard_size: int,
    workers: int | None,
    retry_skipped: bool,
    quiet: bool,
    **engine: Any,
) -> None:
    """Cut the patches that ANNOTATIONS name out of slides, with their captions.

    ANNOTATIONS is PathGen's JSON (an array, or one object a line), or a folder of coordinate files
    that `xtuner-add tile`, TRIDENT or CLAM wrote. Run the same command again after a kill: it
    continues. Exit code 1 if anything was left out; skipped.jsonl says what and why.
    """
    from pathcore.files import sha256_of
    from wsi.extraction import extract as extract_patches
    from wsi.extraction_part import OutputSettings

    def rows() -> Iterable[PatchRequest | RejectedRow]:
        if annotations.is_dir():
            from wsi.coordinate_requests import read_coordinate_folder

            return read_coordinate_folder(annotations)
        from pathgen.annotations import PATCH_PX, read_annotations

        return read_annotations(annotations, patch_px=patch_px or PATCH_PX)

    if annotations.is_dir() and patch_px:
        raise click.UsageError("--patch-px: coordinate files say the size themselves")
    # Small parts make loose files appear soon, and cost nothing; shards are what the user asks for.
    part_size = shard_size if layout == "shards" else min(shard_size, 200)
    with user_errors():
        if not annotations.exists():
            raise FileNotFoundError(f"annotations {annotations}: no such file or folder")
        report = extract_patches(
            rows,
            slides,
            output,
            settings=OutputSettings(layout, image_format, quality, part_size),  # type: ignore[arg-type]
            source={"sha256": sha256_of(annotations), "patch_px": patch_px},
            mpp=slide_mpp,
            workers=workers or num_cores(),
            retry_skipped=retry_skipped,
            progress=not quiet,
            **engine,
        )
    _tell(report, "patches", output)


@click.command("gdc-manifest")
@click.argument("annotations", type=_PATH)
@click.argument("output", type=_PATH)
@click.option(
    "--listing", type=_PATH, help="A manifest of (more than) the slides, saved from the GDC portal."
)
@click.option("--online", is_flag=True, help="Ask the GDC for what it calls the slides.")
@click.option("--gdc-url", default="https://api.gdc.cancer.gov", show_default=True)
def gdc_manifest(
    annotations: Path, output: Path, listing: Path | None, online: bool, gdc_url: str
) -> None:
    """Write OUTPUT, the manifest with which gdc-client fetches the slides of ANNOTATIONS.

    The GDC knows slides by ids that annotations do not have: take them from a --listing, or
    --online from the GDC. Exit code 1 if a slide was not found.
    """
    from pathgen.gdc import ask_gdc, needed_slides, read_listing, write_manifest

    if (listing is None) == (not online):
        raise click.UsageError("one of --listing FILE and --online is needed")
    with user_errors():
        slide_ids = needed_slides(annotations)
        files = read_listing(listing) if listing else ask_gdc(slide_ids, url=gdc_url)
        missing = write_manifest(output, slide_ids, files)
    click.echo(f"Wrote {output}: {len(slide_ids) - len(missing)} of {len(slide_ids)} slides")
    if missing:
        raise click.ClickException(
            f"not found: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )


def num_cores() -> int:
    """CPU cores that this process may use."""
    import os

    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _tell(report: Report, things: str, output: Path) -> None:
    """Prints what became of a job; ends with exit code 1 if anything was left out."""
    click.echo(f"Wrote {report.written:,} {things} to {output}")
    for note, count in report.notes.items():
        click.echo(f"  of which {count:,}: {note}")
    if report.skipped:
        for reason, count in report.reasons.items():
            click.echo(f"Left out {count:,}: {reason}", err=True)
        raise click.ClickException(
            f"{report.skipped:,} {things} were left out; {output / 'skipped.jsonl'} says which and "
            "why. Mend the cause and add --retry-skipped to try them again"
        )
