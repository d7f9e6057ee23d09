#!/usr/bin/env python
"""Train and test configs over numbers of slides and seeds; print the table, draw the curve.

Usage: ``python tools/analysis/sweep_slides.py --train-file data/.../train_all_0.2.txt
cite=CONFIG linear=CONFIG``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


def read_configs(pairs: tuple[str, ...]) -> dict[str, str]:
    """Read NAME=CONFIG arguments.

    Raises:
        ValueError: if one has another form, a name occurs twice, or a file is not there.
    """
    configs: dict[str, str] = {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        if not file or not name or "/" in name or name in configs:
            raise ValueError(f"{pair!r}: NAME=CONFIG expected, each name once")
        if not Path(file).is_file():
            raise ValueError(f"{name}: {file}: no such config")
        configs[name] = file
    return configs


def read_options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Read KEY=VALUE arguments as MMEngine's --cfg-options does."""
    from mmengine.config import DictAction

    return {
        key: DictAction._parse_iterable(value)
        for key, _, value in (pair.partition("=") for pair in pairs)
    }


@click.command()
@click.argument("configs", nargs=-1, required=True, metavar="NAME=CONFIG...")
@click.option("--train-file", help="Annotation file to draw slides from, others for each seed.")
@click.option(
    "--train-files", help="Instead: files with {} for the number, the same slides for each seed."
)
@click.option("--num-slides", type=int, multiple=True, default=(1, 2, 4, 8, 16), show_default=True)
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=1))
@click.option("--metric", default="accuracy", show_default=True)
@click.option("--compare", help="A method whose advantage over the others is added to the table.")
@click.option("--work-dir", default="work_dirs/sweep", show_default=True)
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(min=1))
@click.option("--cfg-option", "options", multiple=True, metavar="KEY=VALUE")
def main(
    configs: tuple[str, ...],
    train_file: str | None,
    train_files: str | None,
    num_slides: tuple[int, ...],
    seeds: int,
    metric: str,
    compare: str | None,
    work_dir: str,
    jobs: int,
    options: tuple[str, ...],
) -> None:
    """Train and test each CONFIG over numbers of slides and seeds.

    Cells that have their scores are not run again. Ends with exit code 1 if cells failed; their
    folders hold error.txt.
    """
    from cite.mm.sweep import SweepPlan, collect, run_sweep
    from pathcore.files import write_text

    try:
        plan = SweepPlan(
            configs=read_configs(configs),
            train_file=train_file,
            train_files=train_files,
            num_slides=num_slides,
            seeds=range(seeds),
            work_dir=work_dir,
            metric=metric,
            options=read_options(options),
        )
        if compare is not None and compare not in plan.configs:
            raise ValueError(f"--compare {compare}: none of {', '.join(plan.configs)}")
        failures = run_sweep(plan, jobs=jobs)
        sweep = collect(plan)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if sweep.scores:
        table = sweep.table(compare)
        click.echo(table)
        write_text(Path(work_dir) / "table.md", table)
        sweep.draw(Path(work_dir) / "curve.png", metric)
        click.echo(f"Wrote table.md and curve.png to {work_dir}")
    if failures:
        cell, message = next(iter(failures.items()))
        raise click.ClickException(
            f"{len(failures)} cells failed, for instance {plan.folder(cell)}: {message}"
        )


if __name__ == "__main__":
    main()
