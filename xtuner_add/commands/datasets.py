"""`xtuner-add convert-dataset`, `join-datasets`, `dataformat`, `clean-pairs` and `tokenise`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pallava.converters.cleaning.keywords import load_rule
from pallava.converters.parts import Shard
from pallava.registry import CONVERTERS
from pallava.skipping import SKIP_LOG_NAME
from xtuner_add.commands.options import (
    COUNT,
    COUNT_OR_0,
    FILE,
    FILE_OR_FOLDER,
    FOLDER,
    FRACTION,
    OUT_FOLDER,
    Number,
    counted,
    end,
    example,
    keyword_values,
    progress_bar,
    refuse_options_of_other_steps,
    refuse_unused,
    samples_option,
    user_errors,
)
from xtuner_add.paths import find_config

if TYPE_CHECKING:
    from pallava.converters.cleaning.steps import Step

_IMAGES = click.option(
    "--image-folder", type=FOLDER, help="Folder that image names are relative to."
)
_CHECK_IMAGES = click.option(
    "--check-images/--no-check-images",
    default=True,
    show_default=True,
    help="Skip rows whose image file is missing.",
)
_MAX_SKIPPED = click.option(
    "--max-skipped",
    "max_skipped_fraction",
    type=FRACTION,
    default=0.1,
    show_default=True,
    help="Fraction of unusable rows above which the run fails.",
)


@click.command("convert-dataset", epilog=example("convert-dataset", "quilt-1m quilt/ out/quilt"))
@click.argument("name")
@click.argument("data_path", type=FILE_OR_FOLDER)
@click.argument("out", type=OUT_FOLDER)
@_IMAGES
@click.option(
    "--option",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Option of the dataset, such as split=train; may be repeated.",
)
@click.option("--licence", help="Licence to write into the rows, instead of the one on record.")
@_CHECK_IMAGES
@_MAX_SKIPPED
@click.option(
    "--link",
    type=click.Choice(["hard", "symbolic", "copy"]),
    default="hard",
    show_default=True,
    help="How class folders refer to their images.",
)
@click.pass_context
def convert_dataset(
    ctx: click.Context,
    name: str,
    data_path: Path,
    out: Path,
    image_folder: Path | None,
    settings: tuple[str, ...],
    licence: str | None,
    check_images: bool,
    max_skipped_fraction: float,
    link: Any,
) -> None:
    """Convert the public dataset NAME, as published, to training files in the folder OUT.

    `xtuner-add plugins` lists the names, including those of other packages. DATA_PATH is the data
    file or the folder of the dataset. OUT contains pairs.jsonl, conversations.jsonl or one folder
    per class. An interrupted run continues when the same command is run again. Unusable rows are
    listed in OUT/skipped_samples.jsonl, and the exit code is 3.
    """
    from pallava.converters.class_sets import ClassConversion, write_class_folders
    from pallava.converters.conversion import convert

    options = keyword_values(settings)
    with user_errors(), progress_bar(name) as advance:
        try:
            conversion = CONVERTERS.get(name)(data_path, image_folder, **options)
        except TypeError as error:
            if "unexpected keyword" not in str(error):
                raise
            raise click.ClickException(str(error)) from error
        if licence:
            conversion = replace(conversion, licence=licence)
        if isinstance(conversion, ClassConversion):
            why = f"for {name}, which is converted to folders of images"
            refuse_unused(ctx, ("check_images", "max_skipped_fraction"), why)
            report = write_class_folders(conversion, out, link=link, progress=advance)
        else:
            refuse_unused(ctx, ("link",), f"for {name}, which is converted to rows")
            report = convert(
                conversion,
                out,
                check_images=check_images,
                max_skipped_fraction=max_skipped_fraction,
                progress=advance,
            )
    click.echo(f"Wrote {out}: {_amount(report)}")
    if report.get("num_excluded"):
        click.echo(f"{report['num_excluded']:,} records were excluded by the options")
    end(report["num_skipped"], out / SKIP_LOG_NAME)


def _amount(report: dict[str, Any]) -> str:
    if "num_by_class" in report:
        return f"{counted(report['num_rows'], 'image')} of {len(report['num_by_class'])} classes"
    return f"{report['num_rows']:,} {report['kind']}"


@click.command(
    "join-datasets",
    epilog=example("join-datasets", "out/stage2 out/pathvqa out/pmc_vqa"),
)
@click.argument("out", type=OUT_FOLDER)
@click.argument("sets", nargs=-1, required=True, metavar="SET...")
@click.option(
    "--image-root",
    type=FOLDER,
    help="Folder that contains all image folders. [default: the deepest one that does]",
)
@_CHECK_IMAGES
@_MAX_SKIPPED
def join_datasets(
    out: Path,
    sets: tuple[str, ...],
    image_root: Path | None,
    check_images: bool,
    max_skipped_fraction: float,
) -> None:
    """Join converted datasets with separate image folders to one set in the folder OUT.

    Each SET is a folder that convert-dataset wrote, or ROWS=IMAGE_FOLDER, such as the output of
    clean-pairs with the images of its input. Image names in OUT are relative to the folder that
    contains all of them, which is printed and recorded in OUT/conversion.json: name it as
    `image_folder` in the training config.
    """
    from pallava.converters.conversion import convert
    from pallava.converters.joining import join_sets

    with user_errors(), progress_bar("joined") as advance:
        report = convert(
            join_sets(sets, image_root),
            out,
            check_images=check_images,
            max_skipped_fraction=max_skipped_fraction,
            progress=advance,
        )
    click.echo(f"Wrote {out}: {_amount(report)}; image folder: {report['image_folder']}")
    end(report["num_skipped"], out / SKIP_LOG_NAME)


@click.command(
    "dataformat", epilog=example("dataformat", "pairs.jsonl conversations/ --image-folder images/")
)
@click.argument("pairs", type=FILE)
@click.argument("out", type=OUT_FOLDER)
@_IMAGES
@click.option("--seed", default=0, show_default=True, help="Seed for the choice of requests.")
@click.option("--instructions", type=FILE, help="Custom requests: a JSON list, or one per line.")
@click.option(
    "--image-position", type=click.Choice(["front", "random"]), default="front", show_default=True
)
@click.option(
    "--max-area-px",
    type=COUNT_OR_0,
    default=4096 * 4096,
    show_default=True,
    help="Skip larger images; with 0 images are not opened.",
)
@_MAX_SKIPPED
def dataformat(
    pairs: Path,
    out: Path,
    instructions: Path | None,
    max_area_px: int,
    **options: Any,
) -> None:
    """Turn image-caption PAIRS into OUT/conversations.jsonl for training.

    PAIRS is pairs.jsonl, or a JSON array of {"image", "caption"}. Each caption answers a request
    to describe the image, chosen by the seed and the pair's id.
    """
    from pallava.converters.dataformat import dataformat as write_conversations
    from pallava.converters.dataformat import load_instructions

    with user_errors(), progress_bar("dataformat") as advance:
        report = write_conversations(
            pairs,
            out,
            instructions=load_instructions(instructions),
            max_area_px=max_area_px or None,
            progress=advance,
            **options,
        )
    click.echo(f"Wrote {out}: {_amount(report)}")
    if report["num_excluded"]:
        click.echo(f"{report['num_excluded']:,} images are too large and were skipped")
    end(report["num_skipped"], out / SKIP_LOG_NAME)


_STEPS = ("words", "pathology", "human", "size", "classifier", "clip-classes", "clip-score")
_DEFAULT = "words,pathology,human,size"
_STEPS_OF_OPTION = {
    "min_words": ("words",),
    "pathology_words": ("pathology",),
    "human_words": ("human",),
    "max_area_px": ("size",),
    "min_side_px": ("size",),
    "classifier": ("classifier",),
    "labels": ("classifier",),
    "clip": ("clip-classes", "clip-score"),
    "clip_classes": ("clip-classes",),
    "min_probability": ("classifier", "clip-classes"),
    "min_score": ("clip-score",),
}
"""Steps that read an option, by parameter."""


@click.command(
    "clean-pairs",
    epilog=example(
        "clean-pairs",
        "pairs.jsonl cleaned/ --image-folder images/ --steps words,pathology,human,size",
    ),
)
@click.argument("rows", type=FILE)
@click.argument("out", type=OUT_FOLDER)
@_IMAGES
@click.option("--steps", help=f"Comma-separated, in order: {', '.join(_STEPS)}. "
              f"[default: {_DEFAULT}; "
              "with --index none]")  # fmt: skip
@click.option("--index", type=FILE, help="Keep only the rows that this published list names.")
@click.option("--min-words", type=COUNT_OR_0, default=20, show_default=True)
@click.option("--max-area-px", type=COUNT, default=4096 * 4096, show_default=True)
@click.option("--min-side-px", type=COUNT, default=1, show_default=True)
@click.option("--pathology-words", default="pathology", help="Custom word lists, JSON.")
@click.option("--human-words", default="human", help="Custom word lists, JSON.")
@click.option("--classifier", help="transformers image classifier: folder or name.")
@click.option(
    "--label", "labels", multiple=True, help="Label of --classifier to keep; may be repeated."
)
@click.option("--clip", help="A preset, hf:MODEL, open_clip:ARCH@WEIGHTS or a folder.")
@click.option("--clip-classes", type=FILE, help="Descriptions to keep and to drop, JSON.")
@click.option("--min-probability", type=FRACTION, default=0.5, show_default=True,
              help="For classifier and clip-classes.")  # fmt: skip
@click.option(
    "--min-score",
    type=Number(),
    help="Minimum cosine similarity of image and caption, for clip-score.",
)
@click.option("--device", help="Device. [default: a GPU if there is one]")
@click.option("--batch-size", type=COUNT, default=32, show_default=True)
@click.option(
    "--shard",
    metavar="INDEX/COUNT",
    help="Process one of COUNT parts; a final run without --shard joins them.",
)
@samples_option
@_MAX_SKIPPED
@click.pass_context
def clean_pairs(
    ctx: click.Context,
    rows: Path,
    out: Path,
    image_folder: Path | None,
    index: Path | None,
    shard: str | None,
    samples: int,
    max_skipped_fraction: float,
    **options: Any,
) -> None:
    """Copy the rows of ROWS that pass every step to the folder OUT.

    ROWS is pairs.jsonl or conversations.jsonl. OUT contains the rows that are kept, dropped.jsonl
    with reasons, and a report as JSON, Markdown and HTML with samples of dropped rows. An
    interrupted run continues when the same command is run again. Unreadable rows are listed in
    OUT/skipped_samples.jsonl, and the exit code is 3.
    """
    from pallava.converters.cleaning.run import TABLES_NAME, clean
    from pallava.converters.cleaning.steps import read_index

    with user_errors(), progress_bar("clean-pairs") as advance:
        report = clean(
            rows,
            out,
            _steps(ctx, options, default="" if index else _DEFAULT),
            image_folder=image_folder,
            index=read_index(index) if index else None,
            num_samples=samples,
            max_skipped_fraction=max_skipped_fraction,
            shard=Shard.parse(shard) if shard else None,
            progress=advance,
        )
    if report is None:
        click.echo(f"Shard {shard} is done; when all shards are, run without --shard")
        return
    for step in report["steps"]:
        click.echo(f"{step['name']:>12}: {step['dropped']:,} of {step['seen']:,} dropped")
    if missing := report.get("index", {}).get("num_missing"):
        click.echo(f"{missing:,} entries of {index} are not in {rows}")
    click.echo(f"Wrote {out}: {counted(report['num_kept'], 'row')}; see {out / TABLES_NAME}")
    end(report["num_skipped"], out / SKIP_LOG_NAME)


def _steps(ctx: click.Context, options: dict[str, Any], default: str) -> list[Step]:
    from pallava.converters.cleaning import steps

    text = default if options["steps"] is None else options["steps"]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in _STEPS]:
        raise click.UsageError(f"--steps {', '.join(unknown)}: expected {', '.join(_STEPS)}")
    refuse_options_of_other_steps(ctx, names, _STEPS_OF_OPTION)
    clip = _clip(options) if {"clip-classes", "clip-score"} & set(names) else None
    made: list[Step] = []
    for name in names:
        if name == "words":
            made.append(steps.words_step(options["min_words"]))
        elif name in ("pathology", "human"):
            made.append(_keywords(name, options[f"{name}_words"]))
        elif name == "size":
            made.append(steps.size_step(options["max_area_px"], options["min_side_px"]))
        elif name == "classifier":
            made.append(_classifier(options))
        else:
            made.append(_clip_step(name, clip, options))
    return made


def _keywords(name: str, rule: str) -> Step:
    from pallava.converters.cleaning.steps import keyword_step

    return keyword_step(name, load_rule(rule))


def _classifier(options: dict[str, Any]) -> Step:
    from pallava.converters.cleaning.scores import HFClassifier
    from pallava.converters.cleaning.steps import classifier_step

    if not options["classifier"] or not options["labels"]:
        raise click.UsageError("the step classifier requires --classifier and --label")
    model = HFClassifier(
        options["classifier"], device=options["device"], batch_size=options["batch_size"]
    )
    return classifier_step(model, options["labels"], options["min_probability"])


def _clip(options: dict[str, Any]) -> Any:
    from pallava.converters.cleaning.scores import ClipScorer
    from pathcore.encoders import create_encoder

    if not options["clip"]:
        raise click.UsageError("the steps clip-classes and clip-score require --clip")
    encoder = create_encoder(options["clip"], device=options["device"])
    return ClipScorer(encoder, batch_size=options["batch_size"])


def _clip_step(name: str, clip: Any, options: dict[str, Any]) -> Step:
    from pallava.converters.cleaning.scores import load_clip_classes
    from pallava.converters.cleaning.steps import clip_classes_step, clip_score_step

    if name == "clip-classes":
        keep, drop = load_clip_classes(options["clip_classes"])
        return clip_classes_step(clip, keep, drop, options["min_probability"])
    if options["min_score"] is None:
        raise click.UsageError(
            "the step clip-score requires --min-score; which scores are high depends on the model"
        )
    return clip_score_step(clip, options["min_score"])


@click.command(
    "tokenise",
    epilog=example("tokenise", "conversations.jsonl tokenised/ --config pallava_domain_alignment"),
)
@click.argument("conversations", type=FILE)
@click.argument("out", type=OUT_FOLDER)
@click.option("--config", help="Training config that sets tokenizer, template and length.")
@click.option("--tokenizer", help="Tokenizer instead of --config: folder or hub name.")
@click.option("--prompt-template", help="Template for --tokenizer. [default: llama3_chat]")
@click.option(
    "--map-fn",
    type=click.Choice(["llava", "interleaved"]),
    help="Mapping for --tokenizer; llava moves the image to the front, as the published code does. "
    "[default: llava]",
)
@click.option("--max-length", type=COUNT, help="Length for --tokenizer. [default: 1852]")
@click.option(
    "--workers", type=COUNT, help="Number of processes. [default: depends on the number of rows]"
)
def tokenise(
    conversations: Path,
    out: Path,
    config: str | None,
    tokenizer: str | None,
    workers: int | None,
    **options: Any,
) -> None:
    """Tokenise CONVERSATIONS once and write the folder OUT.

    Training reads it as `offline_processed_text_folder` and starts without tokenising. Unusable
    rows are listed in OUT/skipped_samples.jsonl, and the exit code is 3.
    """
    if (config is None) == (tokenizer is None):
        raise click.UsageError("give either --config or --tokenizer")
    given = {name: value for name, value in options.items() if value is not None}
    if config is not None and given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"--config sets these too: omit {names}, or change the config")
    from pallava.engine.tokenised import settings_from_config, settings_from_names
    from pallava.engine.tokenised import tokenise as write_folder

    with user_errors():
        if config is not None:
            settings = settings_from_config(find_config(config))
        else:
            assert tokenizer is not None
            settings = settings_from_names(tokenizer, **given)
        report = write_folder(conversations, out, settings, num_proc=workers)
    click.echo(f"Wrote {out}: {report['num_rows']:,} rows, {report['num_tokens']:,} tokens")
    end(report["num_skipped"], out / SKIP_LOG_NAME)
