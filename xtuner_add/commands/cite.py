"""`xtuner-add cite-splits`, `cite-texts`, `cite-features` and the other commands of CITE."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cite.splits import (
    PUBLISHED_NUM_SLIDES,
    PUBLISHED_VAL,
    Split,
    choose_slides,
    published_names,
    read_captions,
    slide_id,
    split_slides,
    write_patches,
)
from pathcore.exit_codes import EXIT_SKIPPED
from pathcore.files import read_json, sha256_of, write_text
from pathcore.rows import source_and_target
from xtuner_add.commands.options import (
    ANY_PATH,
    COUNT,
    FRACTION,
    counted,
    device_option,
    end_of_job,
    example,
    image_workers_option,
    map_format_option,
    name_values,
    retry_option,
    user_errors,
)

if TYPE_CHECKING:
    from wsi.heat_map import MapFormat

_LOOKED_AT = 20
"""Number of names to test for being folders. Testing all of some 10**5 is slow on network disks."""


def _list_names(folder: Path, order: str) -> list[str]:
    """Returns the names of patches: sorted, as the file system lists them, or from a file.

    Raises:
        FileNotFoundError: If the folder, or the file of names, is missing.
        ValueError: If a file of names is not UTF-8 text.
    """
    if order not in ("sorted", "os"):
        file = Path(order)
        if not file.is_file():
            raise FileNotFoundError(
                f"--listing-order {order}: no such file; expected sorted, os, or a file of names"
            )
        return [line for line in file.read_text(encoding="utf-8").splitlines() if line]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; unzip patches_captions.zip there, or give "
            "the folder with --patches"
        )
    names = os.listdir(folder)
    if names and all((folder / name).is_dir() for name in names[:_LOOKED_AT]):
        raise ValueError(
            f"{folder}: contains folders ({min(names)}, ...) instead of patches; move the "
            "patches up, or give one folder with --patches"
        )
    return sorted(names) if order == "sorted" else names


def _report(split: Split) -> None:
    """Prints how many slides and patches were found and skipped."""
    click.echo(f"Slides by class: {split.num_slides}")
    train, val = split.count(split.train), split.count(split.val)
    click.echo(f"Patches by class: {train} to train, {val} to validate")
    if split.unknown:
        patches = sum(split.unknown.values())
        click.echo(
            f"Skipped {counted(patches, 'patch')} of {counted(len(split.unknown), 'slide')} "
            f"without a class, for instance {next(iter(split.unknown))}"
        )
    if split.without_slide_id:
        click.echo(
            f"Skipped {counted(len(split.without_slide_id), 'name')} without a slide id, for "
            f"instance {split.without_slide_id[0]}"
        )
    if split.no_images:
        click.echo(
            f"Skipped {counted(len(split.no_images), 'file')} that "
            f"{'is not an image' if len(split.no_images) == 1 else 'are not images'}, for instance "
            f"{split.no_images[0]}"
        )
    if split.without_patches:
        click.echo(
            f"{counted(len(split.without_patches), 'slide')} "
            f"{'has' if len(split.without_patches) == 1 else 'have'} no patches, for instance "
            f"{split.without_patches[0]}"
        )


@click.command("cite-splits", epilog=example("cite-splits", "--data data --listing-order os"))
@click.option(
    "--data", type=ANY_PATH, default="data", show_default=True, help="Root of the dataset."
)
@click.option("--captions", type=ANY_PATH, help="[default: DATA/captions.csv]")
@click.option("--patches", type=ANY_PATH, help="[default: DATA/patches_captions]")
@click.option("--output", type=ANY_PATH, help="[default: DATA/gastric_cls3_ann]")
@click.option(
    "--val",
    type=FRACTION,
    default=PUBLISHED_VAL,
    show_default=True,
    help="Fraction of slides for validation.",
)
@click.option("--seed", default=0, show_default=True, help="Seed for validation slides and order.")
@click.option(
    "--num-slides",
    type=COUNT,
    multiple=True,
    default=PUBLISHED_NUM_SLIDES,
    show_default=True,
    help="Training slides per class; may be repeated.",
)
@click.option(
    "--sort/--no-sort",
    default=True,
    show_default=True,
    help="Train on the slides with the most patches, or on random slides.",
)
@click.option(
    "--train-seed",
    type=int,
    help="Seed for training slides, added to the file names. [default: --seed]",
)
@click.option(
    "--listing-order",
    default="sorted",
    show_default=True,
    help="sorted; os for the order of the file system, like the original; or a FILE of names.",
)
def splits(
    data: Path,
    captions: Path | None,
    patches: Path | None,
    output: Path | None,
    val: float,
    seed: int,
    num_slides: tuple[int, ...],
    sort: bool,
    train_seed: int | None,
    listing_order: str,
) -> None:
    """Write the annotation files of PatchGastric, with one `filename label` per line.

    Reads DATA/captions.csv and the names in DATA/patches_captions, and writes the published splits.
    Slides with equally many patches are ordered by name. The original used the order of the file
    system, which --listing-order reproduces.
    """
    folder = output or data / "gastric_cls3_ann"
    suffix = "" if sort else "_sortFalse"
    if train_seed is not None:
        suffix += f"_seed{train_seed}"
    with user_errors():
        names = _list_names(patches or data / "patches_captions", listing_order)
        labels = read_captions(captions or data / "captions.csv")
        split = split_slides(labels, names, val=val, seed=seed)
        few = {
            number: choose_slides(
                split.train,
                number,
                seed=seed if train_seed is None else train_seed,
                most_patches=sort,
            )
            for number in num_slides
        }
        write_patches(folder / published_names(val), split.val)
        write_patches(folder / published_names(val, "all"), split.train)
        for number, chosen in few.items():
            file = folder / published_names(val, number, suffix)
            write_patches(file, chosen, final_newline=False)
    _report(split)
    classes = range(len(split.num_slides))
    slides = [len({slide_id(name) for name, c in split.train if c == label}) for label in classes]
    for number in num_slides:
        if short := [label for label in classes if slides[label] < number]:
            click.echo(
                f"train_{number}: class {short[0]} has only {slides[short[0]]} training slides, "
                "all of which are used"
            )
    click.echo(f"Wrote {2 + len(few)} files to {folder}")


@click.command(
    "cite-texts",
    epilog=example(
        "cite-texts",
        "texts.safetensors --classes classes.json --model michiyasunaga/BioLinkBERT-large",
    ),
)
@click.argument("out", type=click.Path(dir_okay=False))
@click.option(
    "--classes", required=True, type=click.Path(dir_okay=False), help='JSON: {"class": "text"}.'
)
@click.option(
    "--encoder",
    default="bert",
    show_default=True,
    help="bert, sentence, or an encoder with a text tower, as in docs/encoders.md.",
)
@click.option("--model", help="Text model of bert and sentence: folder or hub name.")
@click.option("--pooling", type=click.Choice(["pooler", "cls", "mean"]), help="Pooling of a BERT.")
@click.option("--template", multiple=True, help="Text with one {}; may be repeated.")
def texts(
    out: str,
    classes: str,
    encoder: str,
    model: str | None,
    pooling: str | None,
    template: tuple[str, ...],
) -> None:
    """Write the embeddings of the classes' descriptions to the safetensors file OUT."""
    from cite.text_embeddings import encode_texts, write_text_embeddings
    from cite.text_encoder import build_text_encoder

    arguments: dict[str, Any] = {"type": encoder, "model": model}
    if encoder not in ("bert", "sentence"):
        if model is not None or pooling is not None:
            raise click.UsageError(
                f"--model and --pooling are for bert and sentence, not for --encoder {encoder}"
            )
        arguments = {"type": "encoder", "encoder": encoder}
    elif model is None:
        raise click.UsageError(f"--encoder {encoder} requires --model")
    elif pooling is not None:
        arguments["pooling"] = pooling
    with user_errors():
        source_and_target(classes, out)
        descriptions = read_json(classes, what="classes")
        text_encoder = build_text_encoder(**arguments)
        content = encode_texts(text_encoder, descriptions, template or ("{}",))
        write_text_embeddings(out, content)
    click.echo(
        f"Wrote {out}: {counted(len(content.texts), 'text')} of "
        f"{counted(len(descriptions), 'class')}, "
        f"width {content.width}"
    )


@click.command(
    "cite-features",
    epilog=example("cite-features", "my_config.py features.safetensors --split train"),
)
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--split", default="train", show_default=True, help="train, val or test.")
@click.option("--checkpoint", type=click.Path(exists=True), help="Checkpoint of a classifier.")
@click.option("--batch-size", type=COUNT, default=64, show_default=True)
@image_workers_option
@device_option
@click.option(
    "--cfg-options", multiple=True, metavar="KEY=VALUE", help="Override settings of the config."
)
def features(config: str, out: str, cfg_options: tuple[str, ...], **options: Any) -> None:
    """Write the features of every patch of a split of CONFIG to the safetensors file OUT.

    An interrupted run continues when the same command is run again. Images that cannot be read are
    skipped, and the exit code is 3.
    """
    from cite.mm.feature_extraction import extract_features

    with user_errors():
        source_and_target(config, out)
        changes = _config_changes(cfg_options)
        skipped = extract_features(config, out, cfg_options=changes, **options)
    click.echo(f"Wrote {out}")
    if skipped:
        click.echo(f"{len(skipped)} image(s) skipped, for instance {skipped[0]}", err=True)
        raise SystemExit(EXIT_SKIPPED)


@click.command(
    "cite-export", epilog=example("cite-export", "my_config.py iter_1000.pth classifier")
)
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.argument("checkpoint", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
def export(config: str, checkpoint: str, out: str) -> None:
    """Export the classifier of CONFIG with the weights CHECKPOINT to the folder OUT.

    `cite.load_classifier(OUT).predict(images)` then runs without MMEngine and its libraries.
    """
    from cite.mm.export import export_classifier

    with user_errors():
        classifier = export_classifier(config, checkpoint, out)
    click.echo(f"Wrote {out}: {len(classifier.classes)} classes")


@click.command(
    "cite-score-maps",
    epilog=example("cite-score-maps", "classifier data/patches_captions maps --patch-px 300"),
)
@click.argument("classifier", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("patches", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--coords",
    type=click.Path(exists=True, path_type=Path),
    help="CSV with name, x, y; or a folder of <slide>.h5.",
)
@click.option("--patch-px", type=COUNT, help="Side of a patch, in the pixels of the coordinates.")
@click.option("--slide", "only", multiple=True, help="Draw only this slide; may be repeated.")
@map_format_option
@retry_option
@click.option("--device", default="cpu", show_default=True)
def score_maps(
    classifier: Path,
    patches: Path,
    out: Path,
    coords: Path | None,
    patch_px: int | None,
    only: tuple[str, ...],
    map_formats: tuple[MapFormat, ...],
    retry_skipped: bool,
    device: str,
) -> None:
    """Draw score maps of the exported CLASSIFIER over the slides of the folder PATCHES.

    Writes a map in each format and a table of scores per slide. Positions come from --coords, or
    else from names SLIDE_X_Y; otherwise patches are arranged in rows. The same command continues
    where an earlier one stopped. Slides that fail are listed, and the exit code is 3.
    """
    from cite.classifier import CONFIG_NAME, WEIGHTS_NAME, load_classifier
    from cite.score_maps import find_patches, layout_from_h5, layout_from_names, layouts_from_csv
    from pathcore.jobs import JobFolder, UnitError
    from wsi.heat_map import MAP_SUFFIXES
    from wsi.slide_job import SlideUnit, process_units
    from wsi.store import read_attributes

    with user_errors():
        model = load_classifier(classifier, device)
        slides = find_patches(patches)
        if unknown := set(only) - set(slides):
            raise ValueError(f"{patches}: no patches of {sorted(unknown)[0]}")
        slides = {name: slides[name] for name in (only or slides)}
        side = patch_px or model.preprocessing.output_px
        if side is None:
            raise click.UsageError(
                "--patch-px is required: the classifier accepts patches of any size"
            )
        tables = layouts_from_csv(coords, slides, side) if coords and coords.is_file() else {}

    def draw(unit: SlideUnit) -> dict[str, Any]:
        slide, names = unit.slide_id, slides[unit.slide_id]
        attributes: dict[str, Any] = {}
        try:
            if coords is None:
                layout = layout_from_names(names, side)
            elif coords.is_dir():
                layout = layout_from_h5(coords / f"{slide}.h5", names, patch_px)
                attributes = read_attributes(coords / f"{slide}.h5")
            else:
                layout = tables[slide]
        except OSError as error:
            raise UnitError(str(error)) from error
        _draw_slide(model, patches, out, slide, layout, attributes, map_formats)
        return {"num_patches": len(names)}

    settings = {
        "operation": "cite-score-maps",
        "classifier": {name: sha256_of(classifier / name) for name in (CONFIG_NAME, WEIGHTS_NAME)},
        "patches": os.path.abspath(patches),
        "coords": coords and os.path.abspath(coords),
        "patch_px": side,
    }
    with user_errors(), JobFolder(out, settings, retry_skipped=retry_skipped) as job:
        units, done = [SlideUnit(slide, patches, job.out) for slide in slides], job.done()
        for unit in units:
            is_drawn = done.get(unit.record, {}).get("written")
            maps = (out / f"{unit.slide_id}{MAP_SUFFIXES[name]}" for name in map_formats)
            if is_drawn and not all(map(Path.is_file, maps)):  # drawn in other formats
                job.forget(unit.record)
        process_units(draw, units, job, num_inputs=len(units), engine="inline")
        report = job.finish()
    end_of_job(report, "slide", out)


def _draw_slide(  # type: ignore[no-untyped-def]
    model, patches: Path, out: Path, slide: str, layout, attributes, formats: Sequence[MapFormat]
) -> None:
    from cite.score_maps import draw_score_maps
    from pathcore.rows import write_csv
    from wsi.heat_map import PatchScores, write_score_map

    scores = model.predict(patches / name for name in layout.names).numpy()
    header = ["name", "x", "y", *(f"score_{index}" for index in range(len(model.classes)))]
    rows = [
        [name, *place, *map("{:.6f}".format, row)]
        for name, place, row in zip(layout.names, layout.coords_px, scores, strict=True)
    ]
    write_csv(out / f"{slide}.csv", header, rows)
    named = PatchScores.with_attributes(
        slide,
        layout.coords_px,
        layout.patch_px,
        dict(zip(model.classes, scores.T, strict=True)),
        attributes,
        classes=[model.classes[index] for index in scores.argmax(axis=1)],
    )
    for map_format in formats:
        if map_format == "png":
            draw_score_maps(out / f"{slide}.png", scores, layout, model.classes, title=slide)
        elif not layout.is_known:
            raise ValueError(f"positions unknown: --map-format {map_format} needs --coords")
        else:
            write_score_map(out, named, map_format)


# Copied from cite.conversions, which imports torch; a test compares them.
_SOURCES = ("timm", "moco-v3", "mm", "hf-vit", "hf-dinov2", "clip", "hf-clip")
_TARGETS = ("timm", "mm", "hf-vit", "hf-dinov2", "clip", "hf-clip")


@click.command(
    "cite-convert", epilog=example("cite-convert", "moco.pth.tar mm.pth --from moco-v3 --to mm")
)
@click.argument("source", type=click.Path())
@click.argument("out", type=click.Path(dir_okay=False))
@click.option("--from", "source_format", required=True, type=click.Choice(_SOURCES))
@click.option("--to", "target_format", required=True, type=click.Choice(_TARGETS))
def convert_weights(source: str, out: str, source_format: str, target_format: str) -> None:
    """Convert the weights SOURCE and write them to OUT, a .pth or .safetensors file.

    Converts ViTs from MoCo v3 to MMClassification and MMPreTrain, and between these, timm and
    Hugging Face; and CLIP between OpenAI and Hugging Face. If a tensor cannot be assigned, nothing
    is written.
    """
    from cite.conversions import convert
    from pathcore.weights import read_state_dict, write_state_dict

    with user_errors():
        if Path(source).is_file():
            source_and_target(source, out)
        converted = convert(read_state_dict(source), source_format, target_format)
        write_state_dict(out, converted)
    click.echo(f"Wrote {out}: {len(converted)} tensors")


def _named_configs(pairs: tuple[str, ...]) -> dict[str, str]:
    """Parses NAME=CONFIG arguments.

    Raises:
        click.UsageError: If an argument is malformed, a name occurs twice, or a file is missing.
    """
    configs: dict[str, str] = {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        if not file or not name or "/" in name or name in configs:
            raise click.UsageError(f"{pair!r}: expected NAME=CONFIG, each name once")
        if not Path(file).is_file():
            raise click.UsageError(f"{name}: {file}: no such config")
        configs[name] = file
    return configs


def _config_changes(texts: tuple[str, ...]) -> dict[str, Any]:
    """Parses KEY=VALUE like MMEngine's --cfg-options."""
    from mmengine.config import DictAction

    pairs = name_values("--cfg-options", texts)
    return {key: DictAction._parse_iterable(value) for key, value in pairs.items()}


@click.command(
    "cite-sweep",
    epilog=example(
        "cite-sweep", "cite=cite.py linear=linear.py --train-file train_all_0.2.txt --compare cite"
    ),
)
@click.argument("configs", nargs=-1, required=True, metavar="NAME=CONFIG...")
@click.option("--train-file", help="Annotation file from which each seed draws its own slides.")
@click.option(
    "--train-files",
    help="Files with {} for the number of slides, instead of --train-file; the same for all seeds.",
)
@click.option(
    "--num-slides", type=COUNT, multiple=True, default=(1, 2, 4, 8, 16), show_default=True
)
@click.option("--seeds", "num_seeds", default=5, show_default=True, type=COUNT)
@click.option("--metric", default="accuracy", show_default=True)
@click.option("--compare", help="Method to compare with each of the others in the table.")
@click.option("--work-dir", default="work_dirs/sweep", show_default=True)
@click.option("--jobs", default=1, show_default=True, type=COUNT)
@click.option("--cfg-options", multiple=True, metavar="KEY=VALUE")
def sweep_slides(
    configs: tuple[str, ...],
    num_seeds: int,
    compare: str | None,
    work_dir: str,
    jobs: int,
    cfg_options: tuple[str, ...],
    **options: Any,
) -> None:
    """Train and test each CONFIG for several numbers of slides and seeds.

    Finished cells are not run again. The exit code is 1 if cells failed; their folders contain
    error.txt.
    """
    named = _named_configs(configs)
    if compare is not None and compare not in named:
        raise click.UsageError(f"--compare {compare}: expected one of {', '.join(named)}")
    if (options["train_file"] is None) == (options["train_files"] is None):
        raise click.UsageError("expected either --train-file or --train-files")
    from cite.mm.sweep import SweepPlan, collect, run_sweep

    with user_errors():
        plan = SweepPlan(
            configs=named,
            seeds=range(num_seeds),
            work_dir=work_dir,
            options=_config_changes(cfg_options),
            **options,
        )
        failures = run_sweep(plan, jobs=jobs)
        sweep = collect(plan)
    if sweep.scores:
        table = sweep.table(compare)
        click.echo(table)
        write_text(Path(work_dir) / "table.md", table)
        sweep.draw(Path(work_dir) / "curve.png", plan.metric)
        click.echo(f"Wrote table.md and curve.png to {work_dir}")
    if failures:
        cell, message = next(iter(failures.items()))
        raise click.ClickException(
            f"{len(failures)} cells failed, for instance {plan.folder(cell)}: {message}"
        )
