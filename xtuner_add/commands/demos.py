"""`xtuner-add demo` and `demo-pathgen`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from xtuner_add.commands.options import example


def _options(name: str, work_dir: str, seed: str, little: str) -> Callable[..., click.Command]:
    def decorate(function: Callable[..., Any]) -> click.Command:
        for option in (
            click.option(
                "--quick", is_flag=True, help=f"Tiny amounts: runs for a minute and {little}."
            ),
            click.option("--seed", default=1024, show_default=True, help=f"Seed of {seed}."),
            click.option(
                "--work-dir",
                type=click.Path(file_okay=False, path_type=Path),
                default=Path("work_dirs") / name.replace("-", "_"),
                show_default=True,
                help=f"Folder for {work_dir}, summary.json and report.html.",
            ),
        ):
            function = option(function)
        return click.command(name, epilog=example(name, "--quick"))(function)

    return decorate


def _run(run: Callable[..., Any], **options: Any) -> None:
    from xtuner_add.demo.stages import StageError

    try:
        run(**options)
    except StageError as error:
        raise click.ClickException(str(error)) from error


@_options("demo", "data, checkpoints", "the data and the training", "learns nothing")
def demo(**options: Any) -> None:
    """Train a small PA-LLaVA from scratch and question it on images it has not seen.

    Makes histology-like slides from real pixels, pretrains a language model and PLIP, trains both
    stages, exports, merges and answers. About ten minutes on two CPU cores; nothing is downloaded.
    An interrupted run continues.
    """
    from xtuner_add.demo.pallava.pipeline import run

    _run(run, **options)


@_options(
    "demo-pathgen", "slides, captions, models", "slides, trainings and draws", "learns little"
)
def demo_pathgen(**options: Any) -> None:
    """Go from made-up slides to captions, and from captions to a CLIP, and score it.

    Paints slides, finds their patches, chooses some, has them described, checked and summarised by
    a small model trained here, trains a CLIP on these captions by open_clip's own trainer, and
    classifies patches of held-out slides. A few minutes on two CPU cores; nothing is downloaded.
    An interrupted run continues.
    """
    from xtuner_add.demo.pathgen.pipeline import run

    _run(run, **options)
