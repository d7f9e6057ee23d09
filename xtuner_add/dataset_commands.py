"""``xtuner-add convert-dataset`` and ``dataformat``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from xtuner_add.launch import EXIT_SAMPLES_SKIPPED
from xtuner_add.release_commands import user_errors

_PATH = click.Path(exists=True, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
OUT = click.Path(file_okay=False, path_type=Path)
IMAGES = click.option(
    "--image-folder", type=_FOLDER, help="What the images' names are relative to."
)
MAX_SKIPPED = click.option(
    "--max-skipped", default=0.1, show_default=True, help="Unusable share that is an error."
)


@click.command("convert-dataset")
@click.argument("name")
@click.argument("data_path", type=_PATH)
@click.argument("out", type=OUT)
@IMAGES
@click.option(
    "--option",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Of the dataset, as split=train; may be given again.",
)
@click.option("--licence", help="Written into the rows instead of the one known here.")
@click.option(
    "--check-images/--no-check-images",
    default=True,
    show_default=True,
    help="Leave out rows whose image file is not there.",
)
@MAX_SKIPPED
@click.option(
    "--link",
    type=click.Choice(["hard", "symbolic", "copy"]),
    default="hard",
    show_default=True,
    help="How folders of classes hold their images.",
)
def convert_dataset(
    name: str,
    data_path: Path,
    out: Path,
    image_folder: Path | None,
    settings: tuple[str, ...],
    licence: str | None,
    check_images: bool,
    max_skipped: float,
    link: Any,
) -> None:
    """Turn the public dataset NAME, as published, into training files in the folder OUT.

    `xtuner-add plugins` lists the names, those of other packages included. DATA_PATH is the data
    file or the dataset's folder. OUT receives pairs.jsonl, conversations.jsonl or one folder per
    class. Run the same command again after a stop: it continues. Rows that could not be used are
    in OUT/skipped_samples.jsonl, and the exit code is then 3.
    """
    from dataclasses import replace

    from pallava.converters.class_sets import ClassConversion, write_class_folders
    from pallava.converters.conversion import convert
    from pallava.registry import CONVERTERS

    options = _settings(settings)
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
            report = write_class_folders(conversion, out, link=link, progress=advance)
        else:
            report = convert(
                conversion,
                out,
                check_images=check_images,
                max_skipped_share=max_skipped,
                progress=advance,
            )
    click.echo(f"Wrote {out}: {_amount(report)}")
    if report.get("num_left_out"):
        click.echo(f"{report['num_left_out']:,} records were left out by the options")
    end(report["num_skipped"], out)


def _amount(report: dict[str, Any]) -> str:
    if "num_by_class" in report:
        return f"{report['num_rows']:,} images of {len(report['num_by_class'])} classes"
    return f"{report['num_rows']:,} {report['kind']}"


def _settings(texts: Sequence[str]) -> dict[str, str]:
    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise click.UsageError(f"--option {text}: KEY=VALUE expected")
        options[key] = value
    return options


@contextmanager
def progress_bar(what: str) -> Iterator[Any]:
    """Gives a function that adds to the number of rows done."""
    from tqdm import tqdm

    with tqdm(desc=what, unit=" rows", disable=None) as bar:
        yield bar.update


def end(num_skipped: int, out: Path) -> None:
    """Says how many rows were skipped, and ends with exit code 3 if any were."""
    if num_skipped:
        from pallava.skipping import SKIP_LOG_NAME

        noun = "row was" if num_skipped == 1 else "rows were"
        click.echo(
            f"Finished, but {num_skipped:,} {noun} skipped: see {out / SKIP_LOG_NAME}", err=True
        )
        raise SystemExit(EXIT_SAMPLES_SKIPPED)


@click.command("dataformat")
@click.argument("pairs", type=FILE)
@click.argument("out", type=OUT)
@IMAGES
@click.option("--seed", default=0, show_default=True, help="Of the choice of requests.")
@click.option("--instructions", type=FILE, help="Requests of your own: JSON list or text lines.")
@click.option(
    "--image-place", type=click.Choice(["front", "random"]), default="front", show_default=True
)
@click.option(
    "--max-area-px",
    default=4096 * 4096,
    show_default=True,
    help="Leave larger images out; 0 opens no image.",
)
@MAX_SKIPPED
def dataformat(
    pairs: Path,
    out: Path,
    image_folder: Path | None,
    seed: int,
    instructions: Path | None,
    image_place: Any,
    max_area_px: int,
    max_skipped: float,
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
            image_folder=image_folder,
            seed=seed,
            instructions=load_instructions(instructions),
            image_place=image_place,
            max_area_px=max_area_px or None,
            max_skipped_share=max_skipped,
            progress=advance,
        )
    click.echo(f"Wrote {out}: {_amount(report)}")
    if report["num_left_out"]:
        click.echo(f"{report['num_left_out']:,} images are too large and were left out")
    end(report["num_skipped"], out)
