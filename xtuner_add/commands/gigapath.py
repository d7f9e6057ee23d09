"""`xtuner-add embed`, `probe-tiles`, `finetune-slides` and `train-mil`."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gigapath.finetune.recipes import REPLACED, make_settings, read_settings, read_yaml
from xtuner_add.commands.options import (
    ANY_PATH,
    COUNT,
    COUNT_OR_0,
    FILE,
    FILE_OR_FOLDER,
    FOLDER,
    FRACTION,
    OUT_FOLDER,
    POSITIVE,
    POSITIVE_OR_0,
    RelaunchedCommand,
    address_option,
    device_option,
    end,
    end_of_job,
    engine_option,
    example,
    image_workers_option,
    map_format_option,
    num_read_workers,
    output_folder,
    pictures_option,
    quiet_option,
    read_workers_option,
    refuse_unused,
    relaunch,
    retry_option,
    shows_results,
    user_errors,
    yaml_values,
)
from xtuner_add.paths import find_yaml

if TYPE_CHECKING:
    from gigapath.embed.slide_encoders import NamedSlideEncoder
    from gigapath.embed.slide_vectors import SlideEncoderSpec
    from pathcore.pool import Engine

_HUB = "hf_hub:prov-gigapath/prov-gigapath"
_PRESETS = ("mean", "pipeline", "trident", "lazyslide")
"""Keys of `gigapath.embed.slide_vectors.PRESETS`, which needs torch."""

_preset_option = partial(
    click.option, "--preset", type=click.Choice(_PRESETS), default="mean", show_default=True
)
_list_option = partial(click.option, "--list", is_flag=True, expose_value=False, is_eager=True)


class _GridSize(click.ParamType):
    name = "PX|tile"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Returns a number of pixels, or `tile`."""
        if value == "tile" or isinstance(value, int):
            return value
        return COUNT.convert(value, param, ctx)


@click.command("embed", epilog=example("embed", "slides/ --output embeddings/"))
@click.argument("slides", type=ANY_PATH)
@output_folder
@click.option(
    "--tile-encoder",
    default=_HUB,
    show_default=True,
    metavar="WEIGHTS",
    help="An encoder of docs/encoders.md (uni2-h, timm:NAME@FILE, a folder, ...), "
    "hf_hub:OWNER/NAME, a weights file, or random.",
)
@click.option(
    "--tile-arch",
    metavar="NAME",
    help="timm architecture of the tile encoder. [default: from its config.json]",
)
@click.option(
    "--slide-encoder",
    metavar="WEIGHTS",
    help="A name that `xtuner-add encode-slides --list` shows (chief@FILE, mean, ...), "
    "hf_hub:OWNER/NAME, a file or folder, random, or none to embed tiles only. [default: the "
    "slide encoder that was trained on this tile encoder, if it is Prov-GigaPath's]",
)
@click.option(
    "--trust-remote-code", is_flag=True, help="Run the code of the slide encoder's authors."
)
@click.option(
    "--slide-arch",
    metavar="NAME",
    help="Architecture of the slide encoder. [default: the one that matches the tile embeddings]",
)
@_preset_option(
    help="Slide embedding: the mean over the tiles, or as in the original pipeline, TRIDENT or "
    "LazySlide.",
)
@click.option(
    "--grid-px",
    type=_GridSize(),
    help="Cell size of the position grid in level-0 pixels, or tile. [default: the preset's]",
)
@click.option(
    "--mpp",
    type=POSITIVE,
    help="Micrometres per pixel of the tiles. [default: that of the encoder, or 0.5]",
)
@click.option(
    "--patch-px",
    type=int,
    help="Side of a tile in pixels, at --mpp. [default: that of the encoder, or 256]",
)
@click.option(
    "--min-tissue",
    type=FRACTION,
    default=0.1,
    show_default=True,
    help="Minimum fraction of tissue in a tile.",
)
@click.option(
    "--slide-mpp",
    type=POSITIVE,
    help="Micrometres per pixel of the slides, instead of their metadata.",
)
@click.option(
    "--masks",
    type=FOLDER,
    help="Folder of tissue masks: SLIDE.geojson in level-0 pixels, or SLIDE.png.",
)
@click.option(
    "--coords",
    type=FOLDER,
    help="Folder of coordinates SLIDE.h5, from `xtuner-add tile`, TRIDENT or CLAM, instead of "
    "--mpp, --patch-px, --min-tissue and --masks.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Precision; auto is fp16 on a GPU and fp32 on a CPU.",
)
@click.option("--device", help="Device. [default: all GPUs, if any]")
@click.option("--batch-size", type=COUNT, help="Tiles per batch. [default: 128 on a GPU, else 16]")
@click.option(
    "--workers",
    type=COUNT,
    help="Number of slides in parallel. [default: one per GPU, else one]",
)
@read_workers_option
@engine_option
@address_option
@click.option("--seed", default=0, show_default=True, help="Seed of random weights.")
@pictures_option
@retry_option
@quiet_option
@click.pass_context
def embed(
    ctx: click.Context,
    slides: Path,
    output: Path,
    workers: int | None,
    engine: Engine,
    address: str | None,
    retry_skipped: bool,
    progress: bool,
    **options: Any,
) -> None:
    """Compute tile embeddings and slide embeddings of SLIDES.

    SLIDES is a slide, a folder or CSV file of slides, or a folder of tiles named like
    01581x_25327y.png (or with one such folder per slide). Writes coords/,
    features/ENCODER/SLIDE.h5, slide_features/, slide_embeddings.npz, and for inspection
    thumbnails/, overlays/ and pictures/, in which similar tile embeddings have similar colours. An
    interrupted run continues when the same command is run again. If a slide or a tile was skipped,
    skipped.jsonl gives the reason, and the exit code is 3.
    """
    from gigapath.embed.job import embed_slides

    if options["coords"]:
        placing = ("mpp", "patch_px", "min_tissue", "masks")
        refuse_unused(ctx, placing, "with --coords, whose files place the tiles")
    with user_errors():
        import torch

        from pathcore.device_claims import choose_device

        device = choose_device(options["device"])
        num_gpus = torch.cuda.device_count() if device.type == "cuda" else 0
        workers = workers or (max(1, num_gpus) if device.index is None else 1)
        settings, placement = _embedding_settings(ctx, options, device, workers)
        report = embed_slides(
            slides,
            output,
            settings,
            placement,
            workers=workers,
            engine=engine,
            address=address,
            retry_skipped=retry_skipped,
            progress=progress,
        )
    end_of_job(report, "slide", output)


def _embedding_settings(
    ctx: click.Context, options: dict[str, Any], device: Any, workers: int
) -> tuple[Any, Any]:
    """Returns the settings and the placement that the options describe."""
    from gigapath.embed.job import EmbeddingSettings, Placement
    from gigapath.embed.tile_inference import choose_precision, describe_encoder
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
        _slide_encoder(ctx, options, tile_encoder, precision),
        PatchSpec(
            tile_encoder.patch_px if options["patch_px"] is None else options["patch_px"],
            tile_encoder.mpp if options["mpp"] is None else options["mpp"],
            min_tissue=options["min_tissue"],
        ),
        slide_mpp=options["slide_mpp"],
        masks=str(options["masks"].resolve()) if options["masks"] else None,
        coords=str(options["coords"].resolve()) if options["coords"] else None,
        batch_size=options["batch_size"] or (128 if on_gpu else 16),
        pictures=options["pictures"],
        origin=_origin_of_tiles(tile_encoder, options),
    )
    read_workers = num_read_workers(options["read_workers"], workers, on_gpu=on_gpu)
    return settings, Placement(str(device), read_workers)


def _origin_of_tiles(tile_encoder: Any, options: dict[str, Any]) -> Any:
    """Returns the origin of tiles, from the tile encoder and the options."""
    from gigapath.tile_encoder import FLASH_HUB_NAME, HUB_NAME, slide_encoder_of
    from pathcore.encoders.origin import TileOrigin

    if tile_encoder.named:
        name = tile_encoder.pretrained.partition("@")[0]
    else:
        published = slide_encoder_of(options["tile_encoder"], options["tile_arch"])
        name = {HUB_NAME: "prov-gigapath", FLASH_HUB_NAME: "gigapath-flash"}.get(
            published or "", ""
        )
    return TileOrigin(name, options["patch_px"] or 0, options["mpp"] or 0.0, tile_encoder.digest)


def _slide_encoder(
    ctx: click.Context, options: dict[str, Any], tile_encoder: Any, precision: str
) -> SlideEncoderSpec | NamedSlideEncoder | None:
    from gigapath.embed.slide_encoders import describe_named_slide_encoder, list_slide_encoders
    from gigapath.embed.slide_vectors import describe_slide_encoder
    from gigapath.embed.tile_inference import embedding_width
    from gigapath.tile_encoder import slide_encoder_of

    weights = options["slide_encoder"]
    if weights is not None and weights.partition("@")[0] in list_slide_encoders():
        refuse_unused(ctx, ("slide_arch",), f"with --slide-encoder {weights}")
        _refuse_longnet_options(ctx, weights)
        return describe_named_slide_encoder(
            weights,
            trust_remote_code=options["trust_remote_code"],
            preset=options["preset"],
            grid_px=options["grid_px"],
            precision=precision,
        )
    if weights is None:
        weights = slide_encoder_of(
            options["tile_encoder"], options["tile_arch"], named=tile_encoder.named
        )
        if weights is None:
            click.echo(
                f"No slide encoder was trained on {options['tile_encoder']}: embedding tiles "
                "only. Give one with --slide-encoder",
                err=True,
            )
    if weights in (None, "none"):
        unused = ("slide_arch", "preset", "grid_px")
        refuse_unused(ctx, unused, "without a slide encoder")
        return None
    return describe_slide_encoder(
        weights,
        embedding_width(tile_encoder),
        model_arch=options["slide_arch"],
        preset=options["preset"],
        grid_px=options["grid_px"],
        precision=precision,
        seed=options["seed"],
    )


def _refuse_longnet_options(ctx: click.Context, slide_encoder: str) -> None:
    from gigapath.embed.slide_encoders import get_slide_preset

    if get_slide_preset(slide_encoder.partition("@")[0]).network != "longnet":
        why = f"with --slide-encoder {slide_encoder}: only those of Prov-GigaPath have presets"
        refuse_unused(ctx, ("preset", "grid_px"), why)


def _list_slide_encoders(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from gigapath.embed.slide_encoders import get_slide_preset, list_slide_encoders

    for name in list_slide_encoders():
        preset = get_slide_preset(name)
        notes = [f"patients {preset.patients}", f"licence {preset.licence}"]
        notes += ["code of its authors, with --trust-remote-code"] if preset.authors_code else []
        click.echo(f"{name}: {preset.trained_on}; {'; '.join(notes)}")
    ctx.exit()


@click.command(
    "encode-slides",
    epilog=example(
        "encode-slides",
        "features/ --slide-encoder mean --output vectors/",
        "features/ --slide-encoder chief@CHIEF_pretraining.pth --output vectors/ "
        "--patients patients.csv",
    ),
)
@click.argument("features", type=FOLDER)
@click.option("--output", type=ANY_PATH, required=True, help="Folder to write.")
@click.option(
    "--slide-encoder",
    required=True,
    metavar="NAME[@FILE]",
    help="A name that --list shows, with @FILE_OR_FOLDER for weights on disk.",
)
@_list_option(
    callback=_list_slide_encoders,
    help="List the slide encoders, with what each was trained on, and exit.",
)
@click.option(
    "--patients", type=FILE, help="CSV with slide and patient: one vector for each patient."
)
@click.option(
    "--patch-encoder",
    metavar="NAME",
    help="Patch encoder of the features, if the files do not say it; recorded.",
)
@click.option(
    "--patch-px",
    type=COUNT,
    help="Size of their patches in pixels, if the files do not say it; recorded.",
)
@click.option(
    "--mpp",
    type=POSITIVE,
    help="Micrometres per pixel of their patches, if the files do not say it; recorded.",
)
@_preset_option(help="Which vector of prov-gigapath and gigapath-flash; see `xtuner-add embed`.")
@click.option("--trust-remote-code", is_flag=True, help="Run the code of the encoder's authors.")
@device_option
@retry_option
@quiet_option
@click.pass_context
def encode_slides(
    ctx: click.Context,
    features: Path,
    output: Path,
    slide_encoder: str,
    patch_encoder: str | None,
    patch_px: int | None,
    mpp: float | None,
    preset: str,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Embed slides or patients from FEATURES, a folder of SLIDE.h5.

    FEATURES are patch features of `xtuner-add embed`, TRIDENT, CLAM or STAMP. A slide encoder takes
    only features of the patch encoder, patch size and resolution that it was trained on. Writes
    slide_features/ENCODER/SLIDE.h5 and slide_embeddings.npz, or patient_features/ and
    patient_embeddings.npz. An interrupted run continues when the same command is run again. Exit
    code 3 if a slide was skipped; skipped.jsonl and manifest.jsonl say why.
    """
    from gigapath.embed.features_job import encode_slides as encode
    from gigapath.embed.slide_encoders import describe_named_slide_encoder
    from pathcore.encoders import get_preset
    from pathcore.encoders.origin import TileOrigin

    with user_errors():
        _refuse_longnet_options(ctx, slide_encoder)
        known = get_preset(patch_encoder).name if patch_encoder else ""
        encoder = describe_named_slide_encoder(
            slide_encoder, trust_remote_code=trust_remote_code, preset=preset
        )
        stated = TileOrigin(known, patch_px or 0, mpp or 0.0)
        report = encode(features, output, encoder, stated=stated, **options)
    end_of_job(report, "patient" if options["patients"] else "slide", output)


_OPTION = click.option(
    "--option",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Override a setting of the recipe, such as lr=0.01; may be repeated.",
)
_SEED_HELP = "Seed to train each fold with; may be repeated."
_seed_option = partial(click.option, "--seed", "seeds", type=int, multiple=True)
_FOLD = click.option(
    "--fold",
    "only_folds",
    type=COUNT_OR_0,
    multiple=True,
    help="Index of a fold to run; may be repeated. [default: all]",
)
_HEAT_MAPS = click.option(
    "--heat-maps",
    is_flag=True,
    help="For bag models with attention, draw it over each test slide.",
)
_PATHO_BENCH = click.option(
    "--patho-bench",
    type=FILE_OR_FOLDER,
    help="A task of Patho-Bench with its labels and folds, instead of --labels, --splits and the "
    "task: the folder with k=all.tsv and config.yaml, or another of its tables.",
)
_MIL_NAMES = ("abmil", "acmil", "clam-sb", "clam-mb", "dsmil", "transmil", "mean", "max")
"""Keys of `gigapath.finetune.mil.MODELS`, which needs torch."""


class SettingsCommand(RelaunchedCommand):
    """A command whose `--option` takes the fields of a settings class.

    The published scripts have one option per setting (`--lr 0.01`). The error about such an option
    shows how to write it here.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses the arguments."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-").replace("-", "_")
            if name not in _published_settings():
                raise
            raise click.UsageError(
                f"No such option {error.option_name}: write --option {name}=VALUE", ctx
            ) from error


def _published_settings() -> set[str]:
    from gigapath.finetune.probe import ProbeSettings
    from gigapath.finetune.settings import FinetuneSettings

    settings = (*fields(ProbeSettings), *fields(FinetuneSettings))
    return {*REPLACED, *(field.name for field in settings)}


def _list_protocols(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from gigapath.finetune.protocols import get_protocol, list_protocols

    for name in list_protocols():
        click.echo(f"{name}: {get_protocol(name).note}")
    ctx.exit()


@click.command(
    "probe-tiles",
    cls=SettingsCommand,
    epilog=example(
        "probe-tiles",
        "GigaPath_PCam_embeddings.zip --output runs/pcam --recipe pcam",
        "CRC-VAL-HE-7K/ --encoder uni2-h --image-set crc100k --train NCT-CRC-HE-100K/ "
        "--protocol uni-knn --protocol uni-few-shot --output runs/crc",
    ),
)
@click.argument("embeddings", type=FILE_OR_FOLDER)
@click.option("--output", required=True, type=OUT_FOLDER, help="Output folder.")
@click.option(
    "--labels",
    type=FILE,
    help="CSV with input, label, split (train, test and, optionally, val). [default: the CSV file "
    "among the embeddings]",
)
@click.option(
    "--encoder",
    metavar="NAME",
    help="Encoder of docs/encoders.md: EMBEDDINGS is then a folder of images, which it embeds.",
)
@click.option(
    "--image-set",
    metavar="NAME|FILE",
    help="Set whose test images EMBEDDINGS holds, instead of --labels: bach, crc100k, mhist, ..., "
    "or a config file.",
)
@click.option(
    "--train", type=FOLDER, help="Its training images. [default: those that the set names]"
)
@click.option(
    "--val", type=FOLDER, help="Its validation images. [default: those it names, or none]"
)
@click.option(
    "--cache", "cache_dir", type=OUT_FOLDER, help="Folder of image features. [default: --output]"
)
@click.option("--batch-size", type=COUNT, default=64, show_default=True, help="Images per batch.")
@image_workers_option
@click.option(
    "--protocol",
    "protocols",
    multiple=True,
    metavar="NAME",
    help="A protocol that --list shows; may be repeated.",
)
@_list_option(callback=_list_protocols, help="List the protocols and exit.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="linear_probe, knn, logistic or simpleshot; may be repeated. [default: linear_probe if "
    "there is no --protocol]",
)
@click.option(
    "--shots",
    type=COUNT,
    multiple=True,
    help="Train on so many cases of each class, in --repeats draws; may be repeated.",
)
@click.option("--repeats", type=COUNT, help="Draws. [default: the protocol's, or 100]")
@click.option("--recipe", help="A YAML file, or one of our names: pcam.")
@_OPTION
@click.option(
    "--embed-dim", type=COUNT, help="Length of an embedding. [default: the most frequent]"
)
@device_option
@click.pass_context
def probe_tiles(
    ctx: click.Context,
    embeddings: Path,
    output: Path,
    recipe: str | None,
    settings: tuple[str, ...],
    protocols: tuple[str, ...],
    methods: tuple[str, ...],
    shots: tuple[int, ...],
    repeats: int | None,
    device: str | None,
    **source: Any,
) -> None:
    """Train classifiers of EMBEDDINGS by a protocol, and test them.

    EMBEDDINGS is a zip or folder of one .pt per tile; a folder of SLIDE.h5, whose means are taken;
    or, with --encoder, a folder of images. A zip file is read without unpacking. The recipe by
    default is the linear probe published for PCam. An interrupted run continues when the same
    command is run again. What cannot be used is listed in skipped.jsonl, and the exit code is 3.
    """
    from gigapath.finetune.probe import ProbeSettings, plain_protocols, probe_vectors
    from gigapath.finetune.protocols import get_protocol

    if source["encoder"]:
        refuse_unused(ctx, ("embed_dim",), "with --encoder, whose embeddings have one length")
    with user_errors():
        found, options = recipe and find_recipe(recipe), yaml_values(settings)
        chosen = read_settings(ProbeSettings, found, options)
        plain = methods or (() if protocols else ("linear_probe",))
        wanted = [*map(get_protocol, dict.fromkeys(protocols)), *plain_protocols(plain)]
        changes = {option: getattr(chosen, option) for option in options}
        wanted = [protocol.changed(changes, shots, repeats) for protocol in wanted]
        if repeats and not any(protocol.shots for protocol in wanted):
            raise click.UsageError("--repeats requires --shots, or a protocol that has shots")
        data, name = _labelled_vectors(embeddings, output, device, **source)
        results = probe_vectors(data, name, output, wanted, settings=chosen, device=device)
    _end(output, results, "row")


def _labelled_vectors(
    embeddings: Path,
    output: Path,
    device: str | None,
    *,
    labels: Path | None,
    encoder: str | None,
    image_set: str | None,
    train: Path | None,
    val: Path | None,
    cache_dir: Path | None,
    embed_dim: int | None,
    **reading: Any,
) -> tuple[Any, str]:
    """Returns the vectors that the options of probe-tiles describe, and a name for the report."""
    from gigapath.finetune.labelled_vectors import embed_images, labelled_images, read_vectors
    from pathcore.encoders import create_encoder
    from pathcore.image_sets import load_image_set

    if encoder is None:
        if image_set or train or val:
            raise click.UsageError("--image-set, --train and --val require --encoder")
        return read_vectors(embeddings, labels, embed_dim=embed_dim), str(embeddings)
    if (labels is None) == (image_set is None):
        raise click.UsageError("--encoder requires either --labels or --image-set")
    if labels and (train or val):
        raise click.UsageError("--train and --val are for --image-set; the table has a split")
    found = load_image_set(image_set, "labels") if image_set else None
    classes, parts = labelled_images(
        embeddings, table=labels, image_set=found, train=train, val=val
    )
    opened = create_encoder(encoder, device=device)
    cache = cache_dir or output / "features"
    data = embed_images(opened, classes, parts, cache, **reading)
    return data, f"{opened.name} of {found.name if found else embeddings}"


@click.command(
    "finetune-slides",
    cls=SettingsCommand,
    epilog=example(
        "finetune-slides",
        "embeddings/features/ENCODER --labels cohort.csv --task task.yml --output runs/cohort",
    ),
)
@click.argument("features", type=FOLDER)
@_PATHO_BENCH
@click.option(
    "--labels",
    type=FILE,
    help="CSV with slide_id, label (or one column of 0 and 1 per class) and, optionally, patients "
    "in pat_id or case_id.",
)
@click.option("--output", required=True, type=OUT_FOLDER)
@click.option(
    "--splits",
    type=FOLDER,
    help="Folder of train_0.csv, val_0.csv, test_0.csv ..., or of CLAM's splits_0.csv .... "
    "[default: made from the labels]",
)
@click.option(
    "--recipe",
    default="cohort",
    show_default=True,
    help="A YAML file, or one of our names: cohort, panda, panda_flash, mutation_5_gene.",
)
@click.option("--task", help="A YAML file, or panda or mutation_5_gene, instead of the recipe's.")
@_OPTION
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("slide_encoder",),
    show_default=True,
    help=f"slide_encoder, {', '.join(_MIL_NAMES)}, knn or logistic, or cox "
    "for survival; may be repeated.",
)
@click.option(
    "--slide-embeddings",
    "vectors",
    type=FOLDER,
    help="Folder of SLIDE.h5 or .pt, for knn, logistic and cox. [default: the mean over the tiles]",
)
@_FOLD
@_seed_option(help=f"{_SEED_HELP} [default: the recipe's]")
@_HEAT_MAPS
@map_format_option
@device_option
@click.pass_context
def finetune_slides(
    ctx: click.Context,
    features: Path,
    patho_bench: Path | None,
    labels: Path | None,
    output: Path,
    recipe: str,
    task: str | None,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Fine-tune the slide encoder on FEATURES, a folder with SLIDE.h5 or SLIDE.pt, and test it.

    To use several processes, set NPROC_PER_NODE; on several machines also NNODES, NODE_RANK, ADDR
    and PORT. Effective batch size and results stay the same. An interrupted run continues when the
    same command is run again. Unusable slides are listed in skipped.jsonl, and the exit code is 3.
    """
    if relaunch(ctx):
        _end(output, json.loads((output / "results.json").read_text(encoding="utf-8")), "slide")
        return
    from gigapath.finetune.patho_bench import read_patho_bench
    from gigapath.finetune.run import finetune_slides as finetune
    from gigapath.finetune.settings import FinetuneSettings

    source = _source(patho_bench, labels, options["splits"] or task)
    _refuse_unused_maps(ctx, options)
    if not set(options["methods"]) & {"knn", "logistic", "cox"}:
        refuse_unused(ctx, ("vectors",), "without --method knn, logistic or cox")
    with user_errors():
        file = find_recipe(recipe)
        chosen = read_settings(FinetuneSettings, file, yaml_values(settings), others=("task",))
        results = finetune(
            features,
            read_patho_bench(source) if patho_bench else source,
            None if patho_bench else find_task(task, file),
            output,
            settings=chosen,
            **options,
        )
    if shows_results():
        _end(output, results, "slide")


def _source(patho_bench: Path | None, labels: Path | None, others: Any) -> Path:
    source = patho_bench or labels
    if source is None:
        raise click.UsageError("expected --labels or --patho-bench")
    if patho_bench and (labels or others):
        raise click.UsageError(
            "--patho-bench brings labels, folds and task: omit --labels, --splits and the task"
        )
    return source


def _refuse_unused_maps(ctx: click.Context, options: dict[str, Any]) -> None:
    if not options["heat_maps"]:
        refuse_unused(ctx, ("map_formats",), "without --heat-maps")


def find_recipe(name: str) -> Path:
    """Resolves a recipe, given as a path or as one of our names, to a file.

    Raises:
        FileNotFoundError: If the name is neither.
    """
    return find_yaml("recipe", name, "gigapath")


def find_task(name: str | None, recipe: Path) -> Path:
    """Returns the file of a task, given by name or by the recipe (relative to the recipe).

    Raises:
        FileNotFoundError: If there is no such task.
        ValueError: If neither names a task.
    """
    if name is not None:
        return find_yaml("task", name, "gigapath/tasks")
    own = read_yaml(recipe).get("task")
    if not own:
        raise ValueError(f"recipe {recipe}: has no task; give one with --task")
    return recipe.parent / str(own)


def _end(output: Path, results: dict[str, Any], noun: str) -> None:
    click.echo((output / "results.md").read_text(encoding="utf-8"))
    end(results["num_skipped"], output / "skipped.jsonl", noun)


@click.command(
    "train-mil",
    cls=SettingsCommand,
    epilog=example("train-mil", "features/ --labels labels.csv --splits splits/ --output runs/mil"),
)
@click.argument("features", type=FOLDER)
@_PATHO_BENCH
@click.option(
    "--labels",
    type=FILE,
    help="CSV with slide_id, a label and, optionally, patients in case_id or pat_id.",
)
@click.option(
    "--splits",
    type=FOLDER,
    help="Folder of CLAM's splits_0.csv ... with columns train, val, test; or of train_0.csv, "
    "val_0.csv, test_0.csv ...",
)
@click.option("--output", required=True, type=OUT_FOLDER)
@click.option("--label", default="label", show_default=True, help="Column of the labels.")
@click.option("--time", help="Column of times, for survival; needs --event.")
@click.option("--event", help="Column of 1 for an observed event and 0 for a censored slide.")
@click.option("--model", type=click.Choice(_MIL_NAMES), default="abmil", show_default=True)
@_FOLD
@_seed_option(default=(0,), show_default=True, help=_SEED_HELP)
@click.option("--epochs", type=COUNT, default=50, show_default=True)
@click.option("--lr", type=POSITIVE, default=2e-4, show_default=True,
              help="Peak learning rate of AdamW.")  # fmt: skip
@click.option("--weight-decay", type=POSITIVE_OR_0, default=1e-5, show_default=True)
@click.option("--embed-dim", type=COUNT, help="Width after the projection. [default: 512]")
@click.option(
    "--hidden-dim",
    type=COUNT,
    help="Width of the attention, if the model has it. [default: that of its authors]",
)
@click.option(
    "--bag-size",
    type=COUNT_OR_0,
    help="Maximum number of tiles per training slide, redrawn in each epoch; 0 for all. "
    "[default: 0; 8192 for survival, whose loss needs 32 slides at once]",
)
@_OPTION
@_HEAT_MAPS
@map_format_option
@device_option
@click.pass_context
def train_mil(
    ctx: click.Context,
    features: Path,
    patho_bench: Path | None,
    labels: Path | None,
    output: Path,
    label: str,
    time: str | None,
    event: str | None,
    model: str,
    epochs: int,
    lr: float,
    weight_decay: float,
    embed_dim: int | None,
    hidden_dim: int | None,
    bag_size: int | None,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Train a bag model on FEATURES, a folder with SLIDE.h5 or SLIDE.pt, and test it.

    Equivalent to finetune-slides --method MODEL, with the classes taken from the table. With --time
    and --event, the model predicts the risk of the event.
    An interrupted run continues from the last complete epoch when the same command is run again.
    Unusable slides are listed in skipped.jsonl, and the exit code is 3.
    """
    if relaunch(ctx):
        _end(output, json.loads((output / "results.json").read_text(encoding="utf-8")), "slide")
        return
    from gigapath.finetune.mil import MODELS
    from gigapath.finetune.patho_bench import read_patho_bench
    from gigapath.finetune.run import finetune_slides as finetune
    from gigapath.finetune.settings import FinetuneSettings
    from gigapath.finetune.tasks import survival_task, task_of_table

    if (time is None) != (event is None):
        raise click.UsageError("--time and --event: give both or neither")
    source = _source(patho_bench, labels, options["splits"] or time)
    if labels is not None and options["splits"] is None:
        raise click.UsageError("Missing option '--splits'.")
    if time or patho_bench:
        why = "with --patho-bench, whose task names it" if patho_bench else "with --time"
        refuse_unused(ctx, ("label",), why)
    _refuse_unused_maps(ctx, options)
    with user_errors():
        chosen = MODELS[model]
        widths = {"embed_dim": embed_dim, "hidden_dim": hidden_dim}
        given = {name: value for name, value in widths.items() if value is not None}
        if unknown := [name for name in given if not chosen.takes(name)]:
            option = unknown[0].replace("_", "-")
            raise click.UsageError(f"--{option}: {model} has no such width")
        chosen = replace(chosen, options={**chosen.options, **given})
        own = {"epochs": epochs, "lr": lr, "optim_wd": weight_decay}
        bench = read_patho_bench(source) if patho_bench else None
        if bench is not None:
            task = bench.task
        elif time and event:
            task = survival_task(event, time, event)
        else:
            task = task_of_table(source, label)
        if task.is_survival:
            own |= chosen.survival_settings
        if bag_size is not None:
            own["bag_size"] = bag_size
        own = {"input_dim": 0, **chosen.settings, **own, **yaml_values(settings)}
        results = finetune(
            features,
            bench or source,
            task,
            output,
            settings=make_settings(FinetuneSettings, own, "settings"),
            methods=(model,),
            models={model: replace(chosen, settings={}, survival_settings={})},
            **options,
        )
    if shows_results():
        _end(output, results, "slide")
