"""``xtuner-add clean-pairs``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from xtuner_add.dataset_commands import FILE, IMAGES, MAX_SKIPPED, OUT, end, progress_bar
from xtuner_add.release_commands import user_errors

if TYPE_CHECKING:
    from pallava.converters.cleaning.steps import Step

STEPS = ("words", "pathology", "human", "size", "classifier", "clip-classes", "clip-score")
_DEFAULT = "words,pathology,human,size"


@click.command("clean-pairs")
@click.argument("rows", type=FILE)
@click.argument("out", type=OUT)
@IMAGES
@click.option("--steps", help=f"Of {', '.join(STEPS)}; in order. [default: {_DEFAULT}; with "
              "--index none]")  # fmt: skip
@click.option("--index", type=FILE, help="Keep only what this published list names.")
@click.option("--min-words", default=20, show_default=True)
@click.option("--max-area-px", default=4096 * 4096, show_default=True)
@click.option("--min-side-px", default=1, show_default=True)
@click.option("--pathology-words", default="pathology", help="Word lists of your own, JSON.")
@click.option("--human-words", default="human", help="Word lists of your own, JSON.")
@click.option("--classifier", help="Image classifier of transformers, folder or name.")
@click.option("--label", "labels", multiple=True, help="Of --classifier, to keep; again for more.")
@click.option("--clip", help="Model of open_clip, or hf:FOLDER of transformers.")
@click.option("--clip-weights", help="Of open_clip: a file, or a name it knows.")
@click.option("--clip-classes", type=FILE, help="Descriptions to keep and to drop, JSON.")
@click.option("--min-probability", default=0.5, show_default=True,
              help="Of classifier and clip-classes.")  # fmt: skip
@click.option("--min-score", type=float, help="Of clip-score: cosine of image and caption.")
@click.option("--device", help="[default: the GPU, or the CPU]")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--shard", metavar="INDEX/COUNT", help="Do a share; a last run without it joins.")
@click.option("--samples", default=10, show_default=True, help="Dropped rows shown of each step.")
@MAX_SKIPPED
def clean_pairs(
    rows: Path,
    out: Path,
    image_folder: Path | None,
    index: Path | None,
    shard: str | None,
    samples: int,
    max_skipped: float,
    **options: Any,
) -> None:
    """Copy the rows of ROWS that pass every step to the folder OUT.

    ROWS is pairs.jsonl or conversations.jsonl. OUT receives the rows that are kept, dropped.jsonl
    with reasons, and a report as JSON, Markdown and HTML with samples of what was dropped. Run the
    same command again after a stop: it continues. Rows that could not be read are in
    OUT/skipped_samples.jsonl, and the exit code is then 3.
    """
    from pallava.converters.cleaning.run import TABLES_NAME, clean
    from pallava.converters.cleaning.steps import read_index
    from pallava.converters.parts import Shard

    with user_errors(), progress_bar("clean-pairs") as advance:
        report = clean(
            rows,
            out,
            _steps(options, default="" if index else _DEFAULT),
            image_folder=image_folder,
            index=read_index(index) if index else None,
            num_samples=samples,
            max_skipped_share=max_skipped,
            shard=Shard.parse(shard) if shard else None,
            progress=advance,
        )
    if report is None:
        click.echo(f"Shard {shard} is done; when all are, run without --shard")
        return
    for step in report["steps"]:
        click.echo(f"{step['name']:>12}: {step['dropped']:,} of {step['seen']:,} dropped")
    if missing := report.get("index", {}).get("num_missing"):
        click.echo(f"{missing:,} entries of {index} name no row of {rows}")
    click.echo(f"Wrote {out}: {report['num_kept']:,} rows; see {out / TABLES_NAME}")
    end(report["num_skipped"], out)


def _steps(options: dict[str, Any], default: str) -> list[Step]:
    from pallava.converters.cleaning import steps

    text = default if options["steps"] is None else options["steps"]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if unknown := [name for name in names if name not in STEPS]:
        raise click.UsageError(f"--steps {', '.join(unknown)}: {', '.join(STEPS)} expected")
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
    from pallava.converters.cleaning.keywords import load_rule
    from pallava.converters.cleaning.steps import keyword_step

    return keyword_step(name, load_rule(rule))


def _classifier(options: dict[str, Any]) -> Step:
    from pallava.converters.cleaning.scores import HFClassifier
    from pallava.converters.cleaning.steps import classifier_step

    if not options["classifier"] or not options["labels"]:
        raise click.UsageError("the step classifier needs --classifier and --label")
    model = HFClassifier(
        options["classifier"], device=options["device"], batch_size=options["batch_size"]
    )
    return classifier_step(model, options["labels"], options["min_probability"])


def _clip(options: dict[str, Any]) -> Any:
    from pallava.converters.cleaning.scores import load_clip

    if not options["clip"]:
        raise click.UsageError("the steps clip-classes and clip-score need --clip")
    return load_clip(
        options["clip"],
        weights=options["clip_weights"],
        device=options["device"],
        batch_size=options["batch_size"],
    )


def _clip_step(name: str, clip: Any, options: dict[str, Any]) -> Step:
    from pallava.converters.cleaning.scores import load_clip_classes
    from pallava.converters.cleaning.steps import clip_classes_step, clip_score_step

    if name == "clip-classes":
        keep, drop = load_clip_classes(options["clip_classes"])
        return clip_classes_step(clip, keep, drop, options["min_probability"])
    if options["min_score"] is None:
        raise click.UsageError(
            "the step clip-score needs --min-score; what is high depends on the model"
        )
    return clip_score_step(clip, options["min_score"])
