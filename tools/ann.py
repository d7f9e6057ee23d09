#!/usr/bin/env python
"""Make the annotation files of PatchGastric: ``python tools/ann.py``.

Reads data/captions.csv and the names in data/patches_captions, and writes the published splits to
data/gastric_cls3_ann. Slides with equally many patches are told apart by the order of the names:
sorted here; the original took the file system's, which --listing-order gives back.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from cite.splits import (
    PUBLISHED_NUM_SLIDES,
    PUBLISHED_VAL,
    Split,
    choose_slides,
    published_names,
    read_captions,
    split_slides,
    write_patches,
)


def list_names(folder: Path, order: str) -> list[str]:
    """Return the names of patches: sorted, as the file system lists them, or from a file.

    Raises:
        FileNotFoundError: if the folder, or the file of names, is not there.
        ValueError: if a file of names is not UTF-8 text.
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
            f"{folder}: no such folder; unzip patches_captions.zip there, or name it by --patches"
        )
    names = os.listdir(folder)
    return sorted(names) if order == "sorted" else names


def report(split: Split) -> None:
    """Print what was found and what was left out."""
    click.echo(f"Slides by class: {split.num_slides}")
    train, val = split.count(split.train), split.count(split.val)
    click.echo(f"Patches by class: {train} to train, {val} to validate")
    if split.unknown:
        patches = sum(split.unknown.values())
        click.echo(
            f"Left out {patches} patches of {len(split.unknown)} slides that are of no class, for "
            f"instance {next(iter(split.unknown))}"
        )
    if split.without_slide_id:
        click.echo(
            f"Left out {len(split.without_slide_id)} names without a slide id, for instance "
            f"{split.without_slide_id[0]}"
        )
    if split.without_patches:
        click.echo(
            f"{len(split.without_patches)} slides have no patches, for instance "
            f"{split.without_patches[0]}"
        )


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path), default="data", show_default=True, help="Root."
)
@click.option("--captions", type=click.Path(path_type=Path), help="By default DATA/captions.csv.")
@click.option(
    "--patches", type=click.Path(path_type=Path), help="By default DATA/patches_captions."
)
@click.option("--out", type=click.Path(path_type=Path), help="By default DATA/gastric_cls3_ann.")
@click.option("--val", default=PUBLISHED_VAL, show_default=True, help="Share of validation slides.")
@click.option("--seed", default=0, show_default=True, help="Of the validation slides and orders.")
@click.option(
    "--num-slides",
    type=click.IntRange(min=1),
    multiple=True,
    default=PUBLISHED_NUM_SLIDES,
    show_default=True,
    help="Training slides a class; may be given several times.",
)
@click.option(
    "--sort/--no-sort",
    default=True,
    show_default=True,
    help="Train on the slides with most patches, or on those of patches drawn at random.",
)
@click.option(
    "--train-seed", type=int, help="Of the training slides, by default --seed; named in the files."
)
@click.option(
    "--listing-order",
    default="sorted",
    show_default=True,
    help="sorted; os: as the file system lists them, as the original; or a FILE of names.",
)
def main(
    data: Path,
    captions: Path | None,
    patches: Path | None,
    out: Path | None,
    val: float,
    seed: int,
    num_slides: tuple[int, ...],
    sort: bool,
    train_seed: int | None,
    listing_order: str,
) -> None:
    """Make the annotation files of PatchGastric, `filename label` a line."""
    folder = out or data / "gastric_cls3_ann"
    suffix = "" if sort else "_sortFalse"
    if train_seed is not None:
        suffix += f"_seed{train_seed}"
    try:
        names = list_names(patches or data / "patches_captions", listing_order)
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
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    report(split)
    click.echo(f"Wrote {2 + len(few)} files to {folder}")


if __name__ == "__main__":
    main()
