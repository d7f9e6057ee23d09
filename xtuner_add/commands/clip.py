"""`xtuner-add train-clip`, `clip-zero-shot`, `clip-zero-shot-slides` and `clip-retrieval`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import click

from pathcore.exit_codes import EXIT_SKIPPED
from pathgen.clip.recipe import read_recipe
from xtuner_add.commands.options import (
    COUNT,
    COUNT_OR_0,
    FILE,
    FILE_OR_FOLDER,
    FOLDER,
    OUT_FOLDER,
    add_options,
    counted,
    device_option,
    example,
    image_workers_option,
    name_values,
    user_errors,
    yaml_values,
)
from xtuner_add.launch import LaunchError, Processes, child_environ, run_child, torchrun_command
from xtuner_add.paths import find_yaml

_k_option = partial(click.option, "--k", "ks", multiple=True, type=COUNT, show_default=True)
_image_folder = click.option(
    "--image-folder",
    "images",
    type=FOLDER,
    help="Folder of the images. [default: that of the pairs]",
)


@click.command(
    "train-clip",
    epilog=example("train-clip", "pathgen_clip --output runs/clip --data pathgen=shards/"),
)
@click.argument("recipe")
@click.option(
    "--output", required=True, type=OUT_FOLDER, help="Output folder; one subfolder per stage."
)
@click.option(
    "--data",
    "data",
    multiple=True,
    metavar="STAGE=PATH",
    help="Shards or pairs.jsonl of a stage, instead of the recipe's; may be repeated.",
)
@_image_folder
@click.option("--model", help="Model instead of the recipe's: a name of open_clip, or a JSON file.")
@click.option(
    "--pretrained",
    help="Weights instead of the recipe's: a tag, a checkpoint, a folder that train-clip wrote, "
    "or '' for random weights.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Option of open_clip's trainer, for all stages; may be repeated.",
)
@device_option
@click.option(
    "--workers",
    type=COUNT,
    default=1,
    show_default=True,
    help="Processes that pack pairs.jsonl into shards.",
)
@click.pass_context
def train_clip(
    ctx: click.Context,
    recipe: str,
    output: Path,
    data: tuple[str, ...],
    options: tuple[str, ...],
    device: str | None,
    workers: int,
    **changes: Any,
) -> None:
    """Train a CLIP according to RECIPE: a YAML file, or one of our names, such as `pathgen_clip`.

    To use several processes, set NPROC_PER_NODE; on several machines with a shared file system also
    NNODES, NODE_RANK, ADDR and PORT. An interrupted run continues from the last complete epoch when
    the same command is run again. Skipped pairs are listed in skipped.jsonl of each stage, and the
    exit code is 3.
    """
    from pathgen.clip.training import TrainingError
    from pathgen.clip.training import train_clip as train

    try:
        processes = Processes.from_environ(os.environ)
    except LaunchError as error:
        raise click.UsageError(str(error), ctx) from error
    if "RANK" in os.environ:
        raise click.UsageError(
            "train-clip starts its own processes: set NPROC_PER_NODE instead of using torchrun", ctx
        )
    with user_errors():
        read = read_recipe(
            find_recipe(recipe),
            data={name: Path(value) for name, value in name_values("--data", data).items()},
            options=yaml_values(options),
            **changes,
        )
        files = [stage.data for stage in read.stages if stage.data.is_file()]
        if processes.nnodes > 1 and files:
            raise ValueError(
                f"{files[0]}: several machines need shards; pack the pairs on one machine first"
            )
        try:
            results = train(
                read,
                output,
                start=_start_processes,
                num_processes=processes.nnodes * processes.nproc_per_node,
                num_packers=workers,
                device=device,
                is_first_machine=processes.node_rank == 0,
            )
        except TrainingError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.code)
    for result in results:
        click.echo(f"{result.name}: {counted(result.num_pairs, 'pair')} -> {result.open_clip}")
        click.echo(f"  for transformers: {result.hugging_face or result.note}")
    _end_with_skipped(ctx, {r.open_clip.parent / "skipped.jsonl": r.num_skipped for r in results})


_ENCODING = (
    click.option("--output", required=True, type=OUT_FOLDER, help="Output folder for the scores."),
    click.option(
        "--cache",
        "cache_dir",
        type=OUT_FOLDER,
        help="Folder of image features. [default: --output]",
    ),
    device_option,
    click.option(
        "--batch-size", type=COUNT, default=64, show_default=True, help="Images per batch."
    ),
    image_workers_option,
    click.option(
        "--seed", type=COUNT_OR_0, default=0, show_default=True, help="Seed of the bootstrap."
    ),
)


def encodes_images(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the argument and options of every command that encodes images."""
    return add_options(command, (click.argument("model"), *_ENCODING))


@click.command(
    "clip-zero-shot",
    epilog=example(
        "clip-zero-shot",
        "runs/clip/pathgen/open_clip --benchmark bach --data-path BACH/ --output scores/",
    ),
)
@encodes_images
@click.option(
    "--benchmark",
    required=True,
    help="A config file, or one of our names: "
    "bach, crc100k, lc25000, mhist, osteo, patch_camelyon, sicapv2, skin_cancer, "
    "wsss4luad.",
)
@click.option(
    "--data-path", required=True, type=FOLDER, help="Folder of the dataset, as published."
)
@click.pass_context
def clip_zero_shot(
    ctx: click.Context,
    model: str,
    benchmark: str,
    data_path: Path,
    output: Path,
    device: str | None,
    **options: Any,
) -> None:
    """Classify images with MODEL and prompts; report balanced accuracy, weighted F1 and accuracy.

    MODEL is a folder that train-clip wrote, a folder of open_clip or transformers, a preset, or
    open_clip:ARCH@WEIGHTS. Scores come with confidence intervals, and with their mean, best and
    worst over single templates and over single wordings of the classes. Features are cached, so
    that an interrupted run continues. Images that cannot be read are listed in skipped.jsonl, and
    the exit code is 3.
    """
    from pathcore.encoders import create_encoder
    from pathcore.image_sets import load_image_set
    from pathgen.clip.zero_shot import zero_shot

    with user_errors():
        found = load_image_set(benchmark, "prompts")
        encoder = create_encoder(model, device=device)
        metrics = zero_shot(encoder, found, data_path, output, **options)
    _show(ctx, output, metrics)


@click.command(
    "clip-zero-shot-slides",
    epilog=example(
        "clip-zero-shot-slides",
        "conch features/ --benchmark subtypes.json --labels labels.csv --output scores/",
        "plip coords/ --slides slides/ --benchmark subtypes.json --map-format png --output scores/",
    ),
)
@click.argument("model")
@click.argument("features", type=FOLDER)
@click.option("--output", required=True, type=OUT_FOLDER, help="Output folder for the scores.")
@click.option(
    "--benchmark",
    required=True,
    help="A config file with classes and prompts, or one of our names.",
)
@click.option("--labels", type=FILE, help="CSV with slide_id and label, the name of the class.")
@click.option(
    "--slides",
    type=FILE_OR_FOLDER,
    help="Slides, or a CSV of slides, whose features are computed first: FEATURES then holds "
    "coordinates.",
)
@_k_option(
    default=(1, 5, 10, 50, 100),
    help="Number of patches whose scores are averaged; may be repeated.",
)
@click.option(
    "--map-format",
    "map_formats",
    type=click.Choice(["png", "geojson", "ome-tiff"]),
    multiple=True,
    help="Draw the scores over each slide; may be repeated. geojson and ome-tiff are for QuPath.",
)
@click.option("--batch-size", type=COUNT, default=64, show_default=True, help="Patches per batch.")
@device_option
@click.option(
    "--seed", type=COUNT_OR_0, default=0, show_default=True, help="Seed of the bootstrap."
)
@click.pass_context
def clip_zero_shot_slides(
    ctx: click.Context,
    model: str,
    features: Path,
    benchmark: str,
    labels: Path | None,
    output: Path,
    device: str | None,
    **options: Any,
) -> None:
    """Classify slides with MODEL and prompts, as MI-Zero does: the mean of the top k patches.

    FEATURES holds SLIDE.h5 with features of MODEL's image tower in the space of its texts, as
    select-patches writes them. Writes the score of every class for each slide and k, accuracies
    with intervals over slides if there are labels, and maps. Slides that cannot be used are listed
    in skipped.jsonl, and the exit code is 3.
    """
    from pathcore.encoders import create_encoder
    from pathcore.image_sets import load_image_set
    from pathgen.clip.slide_zero_shot import slide_zero_shot

    with user_errors():
        found = load_image_set(benchmark, "prompts")
        encoder = create_encoder(model, device=device)
        metrics = slide_zero_shot(encoder, found, features, output, labels=labels, **options)
    _show(ctx, output, metrics)


@click.command(
    "clip-retrieval",
    epilog=example(
        "clip-retrieval",
        "runs/clip/pathgen/open_clip --pairs pairs.jsonl --output scores/ --k 10",
        "uni2-h --benchmark crc100k --data-path CRC-VAL-HE-7K/ --output scores/",
        "none --labels slides.csv --data-path slide_features/titan/ --output scores/",
    ),
)
@encodes_images
@click.option(
    "--pairs",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON lines with image and caption: retrieves captions for images and the reverse.",
)
@_image_folder
@click.option(
    "--benchmark",
    help="Labelled image set, a config file or one of our names: retrieves images of the same "
    "class in --data-path.",
)
@click.option(
    "--labels",
    type=FILE,
    help="CSV with input, label and, optionally, group (slide or patient): retrieves images, or "
    "slides, of the same class but another group in --data-path.",
)
@click.option(
    "--data-path",
    type=FOLDER,
    help="Folder of the images; or, with --labels and the MODEL none, of SLIDE.h5.",
)
@_k_option(default=(1, 5, 10), help="Numbers k of nearest candidates; may be repeated.")
@click.pass_context
def clip_retrieval(
    ctx: click.Context,
    model: str,
    pairs: Path | None,
    images: Path | None,
    benchmark: str | None,
    labels: Path | None,
    data_path: Path | None,
    output: Path,
    device: str | None,
    cache_dir: Path | None,
    ks: tuple[int, ...],
    seed: int,
    **reading: Any,
) -> None:
    """Retrieve captions, images or slides with MODEL: recall and precision at k, with intervals.

    With --pairs, captions for images and images for captions. With --benchmark or --labels, images
    of the same class: recall, precision and majority vote at k, and mean average precision. MODEL
    is any encoder; it needs a text tower only for captions.
    """
    from pathcore.encoders import create_encoder
    from pathcore.image_sets import load_image_set
    from pathgen.clip.retrieval import (
        features_of_set,
        features_of_table,
        image_retrieval,
        retrieval,
    )

    if sum(source is not None for source in (pairs, benchmark, labels)) != 1:
        raise click.UsageError("expected one of --pairs, --benchmark and --labels")
    if pairs is not None and data_path is not None:
        raise click.UsageError("--data-path is for --benchmark and --labels, not for --pairs")
    if pairs is None and images is not None:
        raise click.UsageError("--image-folder is for --pairs; --data-path names the folder")
    if pairs is None and data_path is None:
        raise click.UsageError("--benchmark and --labels require --data-path")
    if model == "none" and labels is None:
        raise click.UsageError("the MODEL none is for --labels with a folder of features")
    cache = cache_dir or output / "features"
    with user_errors():
        encoder = None if model == "none" else create_encoder(model, device=device)
        if pairs is not None and encoder is not None:
            metrics = retrieval(
                encoder, pairs, output, image_folder=images, ks=ks, cache_dir=cache, seed=seed,
                **reading,
            )  # fmt: skip
        else:
            folder = cast(Path, data_path)
            if benchmark is not None and encoder is not None:
                found = load_image_set(benchmark, "labels")
                data = features_of_set(encoder, found, folder, cache, **reading)
            else:
                data = features_of_table(encoder, cast(Path, labels), folder, cache, **reading)
            metrics = image_retrieval(data, output, ks=ks, seed=seed)
    _show(ctx, output, metrics)


def find_recipe(name: str) -> Path:
    """Returns the file of a recipe, given as a path or as one of our names.

    Raises:
        FileNotFoundError: If the name is neither.
    """
    return find_yaml("recipe", name, "pathgen", "*clip*.yml")


def _start_processes(arguments: Sequence[str]) -> int:
    command = torchrun_command(arguments, os.environ) or [sys.executable, *arguments]
    return run_child(command, child_environ(os.environ))


def _show(ctx: click.Context, output: Path, metrics: dict[str, Any]) -> None:
    from pathgen.clip.reports import SKIPPED_NAME, TABLES_NAME

    click.echo((output / TABLES_NAME).read_text(encoding="utf-8"))
    _end_with_skipped(ctx, {output / SKIPPED_NAME: metrics["num_skipped"]})


def _end_with_skipped(ctx: click.Context, skipped: dict[Path, int]) -> None:
    for path, count in skipped.items():
        if count:
            click.echo(f"{count} skipped: see {path}", err=True)
    if any(skipped.values()):
        ctx.exit(EXIT_SKIPPED)
