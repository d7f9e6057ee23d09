"""Compares ratios of quick benchmarks with committed ones: python -m benchmarks.check [--update].

Times depend on the machine, ratios of processor time between two sides that ran in turn much less.
A ratio that falls short is measured again, since other load moves it; the best run counts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from tabulate import tabulate

from benchmarks._processor import describe

RATIOS = Path(__file__).with_name("ratios.json")

GUARDED: dict[str, tuple[list[str], list[str]]] = {
    "cite_step": (["--rounds", "3"], ["CITE, fp32"]),
    "gigapath_embedding": (["--side", "4096", "--ways", "images", "ours"], ["ours"]),
    "gigapath_slide_encoder": (
        ["--layers", "1", "--tiles", "1024", "--curve", "256"],
        ["ours, 1024 tiles"],
    ),
    "image_input": (["--rounds", "10"], ["500 x 400", "1024 x 768", "1600 x 1200"]),
    "merge": (["--layers", "2", "--rounds", "1"], ["wall time", "memory"]),
    "pallava_training_step": (
        ["--rounds=1", "--no-memory", "--case=vision-bound", "--case=vision-bound, stored"],
        ["vision-bound, stored"],
    ),
    "startup": (["--rounds", "3"], ["train to its first step", "answer"]),
}
"""By benchmark, arguments of its quick form and the cases that are compared. Cases in bf16 do not
belong here: their ratios depend on the processor's instructions."""

LOSS = 0.15
"""Fraction of a committed ratio that may be lost."""

Ratios = dict[str, float]


def measure(name: str) -> Ratios:
    """Runs the quick form of a benchmark, and returns the ratio of each compared case.

    Raises:
        click.ClickException: If the benchmark fails or does not report a case.
    """
    arguments, cases = GUARDED[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json", str(file)]
        result = subprocess.run(
            command, cwd=RATIOS.parents[1], text=True, capture_output=True, check=False
        )
        if result.returncode:
            raise click.ClickException(f"{' '.join(command[1:])} failed:\n{result.stderr[-2000:]}")
        rows = json.loads(file.read_text())
    found = {
        f"{row['name']}, {row['num_tiles']} tiles" if "num_tiles" in row else row["name"]: row
        for row in rows
    }
    if missing := [case for case in cases if case not in found]:
        raise click.ClickException(
            f"{name} does not report {missing}, but {list(found)}; correct GUARDED in {__file__}"
        )
    return {case: found[case]["ratio"] for case in cases}


def best_of(name: str, committed: Ratios, repeats: int) -> Ratios:
    """Measures until no ratio is short of the committed one, at most `repeats` times."""
    best = measure(name)
    for _ in range(repeats - 1):
        if not any(is_lost(best[case], committed[case]) for case in best):
            break
        best = {case: max(best[case], ratio) for case, ratio in measure(name).items()}
    return best


def is_lost(now: float, committed: float) -> bool:
    """Tells whether more than `LOSS` of the committed ratio is gone."""
    return now < (1 - LOSS) * committed


def read_committed(file: Path, names: tuple[str, ...]) -> dict[str, Ratios]:
    """Reads the committed ratios of the benchmarks.

    Raises:
        click.UsageError: If the file, a benchmark or a case is missing.
    """
    if not file.is_file():
        raise click.UsageError(f"{file} does not exist; --update writes it")
    document = json.loads(file.read_text())
    committed = {}
    for name in names:
        cases, expected = document.get(name, {}), GUARDED[name][1]
        if sorted(cases) != sorted(expected):
            raise click.UsageError(
                f"{file}: {name} has {sorted(cases)}, expected {sorted(expected)}; "
                f"--update {name} writes them"
            )
        committed[name] = {case: figures["ratio"] for case, figures in cases.items()}
    return committed


def processors(file: Path, names: tuple[str, ...]) -> set[str]:
    """Returns the processors on which the committed ratios were measured."""
    document = json.loads(file.read_text())
    return {case.get("processor", "unknown") for name in names for case in document[name].values()}


def update(file: Path, names: tuple[str, ...], repeats: int) -> None:
    """Measures the benchmarks, and writes medians and ranges over the repeats."""
    document = json.loads(file.read_text()) if file.is_file() else {}
    for name in names:
        runs = [measure(name) for _ in range(repeats)]
        document[name] = {}
        for case in GUARDED[name][1]:
            ratios = [round(run[case], 3) for run in runs]
            middle, limits = statistics.median(ratios), [min(ratios), max(ratios)]
            document[name][case] = {"ratio": middle, "range": limits, "processor": describe()}
            click.echo(f"{name}: {case}: {middle} ({limits[0]} to {limits[1]})")
    file.write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(sorted(GUARDED)))
@click.option("--update", "write", is_flag=True, help="Write the ratios instead of comparing them.")
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(1))
@click.option(
    "--ratios", "file", default=RATIOS, type=click.Path(path_type=Path), help="To compare with."
)
def main(names: tuple[str, ...], write: bool, repeats: int, file: Path) -> None:
    """Compare ratios of the given benchmarks, by default of all, with committed ones."""
    names = names or tuple(GUARDED)
    if write:
        update(file, names, repeats)
        return
    rows, lost = [], []
    for name, committed in read_committed(file, names).items():
        for case, now in best_of(name, committed, repeats).items():
            change = now / committed[case] - 1
            rows.append([name, case, committed[case], now, f"{change:+.0%}"])
            if is_lost(now, committed[case]):
                lost.append(f"{name}: {case}")
    headers = ["benchmark", "case", "committed", "now", "change"]
    click.echo(tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))
    if lost:
        message = f"more than {LOSS:.0%} is lost: {', '.join(lost)}"
        if others := processors(file, names) - {describe()}:
            message += (
                f"\nThe committed ratios are of another processor ({'; '.join(sorted(others))}; "
                f"this one is {describe()}): on the last release, write this one's by --update"
            )
        raise click.ClickException(message)


if __name__ == "__main__":
    main()
