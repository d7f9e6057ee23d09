"""`xtuner-add demo` and `demo-pathgen`."""

from __future__ import annotations

from pathlib import Path

import click

from xtuner_add.commands.options import example


@click.command("demo", epilog=example("demo", "--quick"))
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("work_dirs/demo"),
    show_default=True,
    help="Folder for data, checkpoints, summary.json and report.html.",
)
@click.option("--seed", default=1024, show_default=True, help="Seed of the data and the training.")
@click.option("--quick", is_flag=True, help="Tiny amounts: runs for a minute and learns nothing.")
def demo(work_dir: Path, seed: int, quick: bool) -> None:
    """Train a small PA-LLaVA from scratch and question it on images it has not seen.

    Makes histology-like slides from real pixels, pretrains a language model and PLIP, trains both
    stages, exports, merges and answers. About ten minutes on two CPU cores; nothing is downloaded.
    An interrupted run continues.
    """
    from xtuner_add.demo.pallava.pipeline import run
    from xtuner_add.demo.stages import StageError

    try:
        run(work_dir=work_dir, seed=seed, quick=quick)
    except StageError as error:
        raise click.ClickException(str(error)) from error


@click.command("demo-pathgen", epilog=example("demo-pathgen", "--quick"))
@click.option(
    "--work-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("work_dirs/demo_pathgen"),
    show_default=True,
    help="Folder for slides, captions, models, summary.json and report.html.",
)
@click.option(
    "--seed", default=1024, show_default=True, help="Seed of slides, trainings and draws."
)
@click.option("--quick", is_flag=True, help="Tiny amounts: runs for a minute and learns little.")
def demo_pathgen(work_dir: Path, seed: int, quick: bool) -> None:
    """Go from made-up slides to captions, and from captions to a CLIP, and score it.

    Paints slides, finds their patches, chooses some, has them described, checked and summarised by
    a small model trained here, trains a CLIP on these captions by open_clip's own trainer, and
    classifies patches of held-out slides. A few minutes on two CPU cores; nothing is downloaded.
    An interrupted run continues.
    """
    from xtuner_add.demo.pathgen.pipeline import run
    from xtuner_add.demo.stages import StageError

    try:
        run(work_dir=work_dir, seed=seed, quick=quick)
    except StageError as error:
        raise click.ClickException(str(error)) from error
