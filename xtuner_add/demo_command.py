"""``xtuner-add demo``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("demo")
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("work_dirs/demo"),
    show_default=True,
    help="Folder for data, checkpoints, summary.json and report.html.",
)
@click.option("--seed", default=1024, show_default=True, help="Seed of the data and the training.")
@click.option("--quick", is_flag=True, help="Tiny amounts: a minute's run that learns nothing.")
def command(work_dir: Path, seed: int, quick: bool) -> None:
    """Train a small PA-LLaVA from scratch and question it on images it has not seen.

    Makes histology-like slides from real pixels, pretrains a language model and PLIP, trains both
    stages, exports, merges and answers. About ten minutes on two CPU cores; nothing is downloaded.
    A run that was stopped goes on where it was.
    """
    from xtuner_add.demo.pipeline import run
    from xtuner_add.demo.stages import StageError

    try:
        run(work_dir=work_dir, seed=seed, quick=quick)
    except StageError as error:
        raise click.ClickException(str(error)) from error
