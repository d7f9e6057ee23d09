"""Runs the benchmarks one after the other: python -m benchmarks [--quick] [NAME ...]."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

QUICK = {
    "cite_step": ["--quick"],
    "extraction": ["--quick"],
    "gigapath_embedding": ["--quick"],
    "gigapath_position": ["--quick"],
    "gigapath_slide_encoder": ["--quick"],
    "image_input": ["--quick"],
    "merge": ["--quick"],
    "pallava_batches": ["--quick"],
    "pallava_encoder_connector": ["--quick"],
    "pallava_training_step": ["--quick", "--rounds", "1", "--no-memory"],
    "serving": ["--quick"],
    "startup": ["--quick"],
}
"""Arguments with which a benchmark takes seconds; a quick run skips the others."""

HELPERS = {"check", "straightforward", "cite_histology", "slide_map"}


def names() -> list[str]:
    """Returns the names of the benchmarks, without helper modules."""
    modules = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return sorted(name for name in modules - HELPERS if not name.startswith("_"))


@click.command()
@click.argument("selected", nargs=-1, type=click.Choice(names()))
@click.option("--quick", is_flag=True, help="Tiny sizes: shows that it runs, measures nothing.")
def main(selected: tuple[str, ...], quick: bool) -> None:
    """Run the given benchmarks, or all of them."""
    failed = []
    for name in selected or names():
        if quick and name not in QUICK:
            continue
        click.echo(f"== {name}")
        command = [sys.executable, "-m", f"benchmarks.{name}", *(QUICK[name] if quick else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
