"""CPU time of `train` until its first step, and of `answer`, on tiny models.

    python -m benchmarks.startup [--rounds 5] [--json FILE]

Whole commands, with the imports of `pathcore.deferred_imports` deferred and as the hosts have them,
in turn. What is measured is the processor time of all processes, since others may use the machine.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import click
import psutil

from benchmarks._ratios import Ratio
from pathcore.deferred_imports import EAGER_VARIABLE
from tests.pallava.engine.tiny_run import STAGE1, make_folder

SIDES = {"deferred": {}, "as the hosts import": {EAGER_VARIABLE: "1"}}
PROGRAM = (sys.executable, "-m", "xtuner_add.cli")


def cpu_s(arguments: list[str], cwd: Path, variables: Mapping[str, str], until: str = "") -> float:
    """Runs a command and returns the CPU seconds of its processes.

    Args:
        arguments: Arguments of `xtuner-add`.
        cwd: Working directory.
        variables: Further environment variables.
        until: Text of a line of output at which the measurement ends.

    Raises:
        RuntimeError: If the command fails or does not print `until`.
    """
    command = subprocess.Popen(
        [*PROGRAM, *arguments], cwd=cwd, env={**os.environ, **variables}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert command.stdout is not None
    process, lines, seconds = psutil.Process(command.pid), [], None
    for line in command.stdout:
        lines.append(line)
        if until and until in line and seconds is None:
            running = [process, *process.children(recursive=True)]
            seconds = sum(sum(one.cpu_times()[:2]) for one in running)
    _, status, usage = os.wait4(command.pid, 0)
    command.returncode = os.waitstatus_to_exitcode(status)
    if command.returncode not in (0, 3) or (until and seconds is None):  # 3: the missing image
        raise RuntimeError(f"xtuner-add {' '.join(arguments)} failed:\n{''.join(lines[-20:])}")
    return usage.ru_utime + usage.ru_stime if seconds is None else seconds


def measure(folder: Path, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Measures both commands on both sides; returns CPU seconds by command and side."""
    train = ["train", str(STAGE1), "--work-dir", "run", "--cfg-options", "train_cfg.max_epochs=1"]
    answer = ["answer", "data/tiny/llama", "data/tiny/images/0.png", "--llava", "hf"]
    answer += ["-q", "Is it red?", "--max-new-tokens", "4"]
    cpu_s(train, folder, {})
    [checkpoint] = folder.glob("run/iter_*.pth")
    cpu_s(["pth-to-hf", str(STAGE1), str(checkpoint), "hf"], folder, {})
    cases = {"train to its first step": (train, "Iter(train)"), "answer": (answer, "")}
    found: dict[str, dict[str, list[float]]] = {
        name: {side: [] for side in SIDES} for name in cases
    }
    for _ in range(rounds):
        for name, (arguments, until) in cases.items():
            for side, variables in SIDES.items():
                found[name][side].append(cpu_s(arguments, folder, variables, until))
    return found


def table(found: Mapping[str, Mapping[str, list[float]]]) -> str:
    """Formats medians with ranges, and the ratio of each round."""
    lines = ["| command | deferred, CPU s | as the hosts import | ratio |", "|---|---|---|---|"]
    for name, sides in found.items():
        cells = [
            f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
            for values in sides.values()
        ]
        cells.append(str(_ratio(sides)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ratio(sides: Mapping[str, list[float]]) -> Ratio:
    deferred, eager = sides.values()
    return Ratio.of(eager, deferred)


@click.command()
@click.option("--rounds", default=5, show_default=True)
@click.option("--quick", is_flag=True, help="One round: shows that it runs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(rounds: int, quick: bool, json_file: Path | None) -> None:
    """Measure both sides in turn and print the table."""
    with tempfile.TemporaryDirectory() as name:
        found = measure(make_folder(Path(name)), 1 if quick else rounds)
    click.echo(table(found))
    click.echo(f"\nload {os.getloadavg()[0]:.1f}")
    if json_file is not None:
        rows = [
            {"name": name, "ratio": _ratio(sides).median, "cpu_s": sides}
            for name, sides in found.items()
        ]
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
