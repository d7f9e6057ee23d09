"""``xtuner-add train-mil``: slide classification by attention MIL over stored features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from xtuner_add.launch import EXIT_SAMPLES_SKIPPED
from xtuner_add.release_commands import user_errors

_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("train-mil")
@click.argument("features", type=_FOLDER)
@click.option(
    "--labels",
    required=True,
    type=_FILE,
    help="CSV with slide_id, a label and, for patients, case_id.",
)
@click.option(
    "--splits",
    required=True,
    type=_FOLDER,
    help="Folder of splits_0.csv ... with columns train, val, test, as CLAM's.",
)
@click.option("--output", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--label", default="label", show_default=True, help="Column of the labels.")
@click.option("--model", type=click.Choice(["abmil", "acmil"]), default="abmil", show_default=True)
@click.option("--fold", "folds", type=int, multiple=True, help="May be given again; default all.")
@click.option(
    "--seed",
    "seeds",
    type=int,
    multiple=True,
    default=(0,),
    show_default=True,
    help="May be given again.",
)
@click.option("--epochs", default=50, show_default=True)
@click.option("--lr", default=2e-4, show_default=True, help="Of AdamW, on a cosine to 0.")
@click.option("--weight-decay", default=1e-5, show_default=True)
@click.option("--embed-dim", default=512, show_default=True, help="After projection.")
@click.option("--hidden-dim", default=256, show_default=True, help="Of the attention.")
@click.option(
    "--bag-size",
    default=0,
    show_default=True,
    help="At most so many patches a training step; 0 takes all.",
)
@click.option("--heat-maps", is_flag=True, help="Draw the attention over each test slide.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="By default a GPU, if any.")
@click.pass_context
def train_mil(
    ctx: click.Context,
    features: Path,
    labels: Path,
    splits: Path,
    output: Path,
    label: str,
    folds: tuple[int, ...],
    seeds: tuple[int, ...],
    heat_maps: bool,
    device: str | None,
    **settings: Any,
) -> None:  # fmt: skip
    """Train attention MIL on FEATURES, a folder with SLIDE.h5 per slide, and test it.

    Writes AUROC, F1 and accuracies with intervals per fold and seed. Run again after a stop: it
    continues at the last whole epoch. Slides without usable features are listed in skipped.jsonl,
    and the exit code is 3.
    """
    from pathgen.mil import MILSettings
    from pathgen.mil import train_mil as train

    with user_errors():
        metrics = train(
            features,
            labels,
            splits,
            output,
            settings=MILSettings(**settings),
            label=label,
            folds=folds,
            seeds=seeds,
            heat_maps=heat_maps,
            device=device,
        )
    click.echo((output / "metrics.md").read_text(encoding="utf-8"))
    if metrics["num_skipped"]:
        click.echo(f"{metrics['num_skipped']} left out: see {output / 'skipped.jsonl'}", err=True)
        ctx.exit(EXIT_SAMPLES_SKIPPED)
