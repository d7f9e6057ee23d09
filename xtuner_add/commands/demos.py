"""`xtuner-add demo` and `demo-pathgen`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from xtuner_add.commands.options import OUT_FOLDER, add_options, example


def _demo_options(folder: str, content: str, seeded: str, learned: str) -> Callable[..., Any]:
    options = (
        click.option(
            "--work-dir",
            type=OUT_FOLDER,
            default=Path(folder),
            show_default=True,
            help=f"Folder for {content}, summary.json and report.html.",
        ),
        click.option("--seed", default=1024, show_default=True, help=f"Seed of {seeded}."),
        click.option(
            "--quick", is_flag=True, help=f"Tiny amounts: runs for a minute and learns {learned}."
        ),
    )
    return lambda command: add_options(command, options)


@click.command("demo", epilog=example("demo", "--quick"))
@_demo_options("work_dirs/demo", "data, checkpoints", "the data and the training", "nothing")
def demo(**options: Any) -> None:
    """Train a small PA-LLaVA from scratch and question it on images it has not seen.

    Makes histology-like slides from real pixels, pretrains a language model and PLIP, trains both
    stages, exports, merges and answers. About ten minutes on two CPU cores; nothing is downloaded.
    An interrupted run continues.
    """
    from xtuner_add.demo.pallava.pipeline import run

    _run_demo(run, options)


@click.command("demo-pathgen", epilog=example("demo-pathgen", "--quick"))
@_demo_options(
    "work_dirs/demo_pathgen", "slides, captions, models", "slides, trainings and draws", "little"
)
def demo_pathgen(**options: Any) -> None:
    """Go from made-up slides to captions, and from captions to a CLIP, and score it.

    Paints slides, finds their patches, chooses some, has them described, checked and summarised by
    a small model trained here, trains a CLIP on these captions by open_clip's own trainer, and
    classifies patches of held-out slides. A few minutes on two CPU cores; nothing is downloaded.
    An interrupted run continues.
    """
    from xtuner_add.demo.pathgen.pipeline import run

    _run_demo(run, options)


def _run_demo(run: Callable[..., Any], options: dict[str, Any]) -> None:
    from xtuner_add.demo.stages import StageError

    try:
        run(**options)
    except StageError as error:
        raise click.ClickException(str(error)) from error
