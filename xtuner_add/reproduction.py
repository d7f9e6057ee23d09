"""Reproduces a published figure, and attributes a difference to the choices behind it.

A card states a figure, where it was printed, and the protocol behind it as options of one of this
package's commands. `reproduce` runs the command; if the figure differs, it runs it again with one
choice changed at a time (prompt, scoring, decoding, resize, subset, template, ...) and names the
choices that account for the difference.

A card is YAML:

    title: PathGen-LLaVA on PathMMU, PubMed subset
    published: {value: 60.1, source: "arXiv:2407.00203"}   # no value: only measured
    tolerance: 1.0                       # of the figure, in its own unit
    command: [evaluate, pathmmu, "{model}", --data-path, "{data}", --work-dir, "{out}"]
    inputs: {model: the released weights, data: data.json}  # what users have to give
    digests: {data: sha256 of the file}  # optional
    figure: metrics.json:scores > overall > correct > value
    items: details.jsonl:question_id:correct                # optional, for paired intervals
    scale: 100                           # figure of an item that is fully right; 1 by default
    seeds: [0, 1, 2]                     # optional: replaces {seed} in the command; mean over runs
    choices:                             # the first value is the published one
      subset: {all: [--option, split=all], tiny: [--option, split=test_tiny]}
      scoring: {published: {figure: "metrics.json:published > accuracy"}, ours: []}
"""

from __future__ import annotations

import math
import os
import shlex
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

import click

from pathcore.chat_api import hide_secrets
from pathcore.exit_codes import EXIT_FAILED, EXIT_OK, EXIT_SKIPPED
from pathcore.files import (
    StrPath,
    file_identity,
    folder_lock,
    read_json,
    sha256_of,
    write_json,
    write_text,
)
from pathcore.names import did_you_mean
from pathcore.rows import read_csv, read_lines
from xtuner_add import cli

CARDS = Path(__file__).parent / "reproduction_cards"
RESULT_NAME, TABLE_NAME, _DONE_NAME = "reproduction.json", "reproduction.md", "arm.json"

_FIELDS = (
    "title", "published", "tolerance", "command", "inputs", "digests", "figure", "items", "scale",
    "seeds", "choices",
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """One value of a choice: what the command is given for it, and where its figure is read.

    Attributes:
        options: Options appended to the command.
        figure: File and path of the figure; None for the card's.
    """

    options: tuple[str, ...] = ()
    figure: str | None = None


@dataclass(frozen=True)
class Card:
    """A published figure and the protocol behind it; see the module for the fields of the file.

    Attributes:
        name: Name of the file, without its ending.
        published: Printed figure; None if it has to be given.
        choices: Values by choice and name; the first of each is the published one.
    """

    name: str
    title: str
    source: str
    published: float | None
    tolerance: float
    command: tuple[str, ...]
    inputs: Mapping[str, str]
    figure: str
    items: str | None = None
    scale: float = 1.0
    seeds: tuple[int, ...] = (0,)
    digests: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)

    def arm(self, changes: Mapping[str, str]) -> tuple[tuple[str, ...], str]:
        """Returns the options and the place of the figure, with some choices changed."""
        options: list[str] = []
        figure = self.figure
        for choice, values in self.choices.items():
            value = values[changes.get(choice, next(iter(values)))]
            options += value.options
            figure = value.figure or figure
        return tuple(options), figure

    def changes(self) -> Iterator[tuple[str, str]]:
        """Yields each choice with each value other than the published one."""
        for choice, values in self.choices.items():
            for value in list(values)[1:]:
                yield choice, value


def card_files() -> dict[str, Path]:
    """Returns the files of the shipped cards by name."""
    return {path.stem: path for path in sorted(CARDS.glob("*.yml"))}


def load_card(name: StrPath) -> Card:
    """Reads a card by its name, or from a file.

    Raises:
        ValueError: If there is no such card, or the file is not one; the message names the field.
    """
    path = Path(name)
    if not path.is_file():
        known = card_files()
        if str(name) not in known:
            hint = did_you_mean(name, known)
            raise ValueError(f"{name}: neither a file nor a known card{hint}")
        path = known[str(name)]
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    try:
        return _card(path.stem, content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not a card: {what}") from error


def _card(name: str, content: Any) -> Card:
    unknown = set(content) - set(_FIELDS)
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}; expected {', '.join(_FIELDS)}")
    published = content["published"]
    choices: dict[str, dict[str, Value]] = {}
    for choice, values in content.get("choices", {}).items():
        choices[choice] = {
            str(label): Value(tuple(map(str, value.get("options", ()))), value.get("figure"))
            if isinstance(value, dict)
            else Value(tuple(map(str, value)))
            for label, value in values.items()
        }
        if len(choices[choice]) < 2:
            raise ValueError(f"choices/{choice}: expected the published value and another one")
    value = published.get("value")
    return Card(
        name=name,
        title=str(content["title"]),
        source=str(published["source"]),
        published=None if value is None else float(value),
        tolerance=float(content["tolerance"]),
        command=tuple(map(str, content["command"])),
        inputs=dict(content["inputs"]),
        figure=str(content["figure"]),
        items=content.get("items"),
        scale=float(content.get("scale", 1.0)),
        seeds=tuple(content.get("seeds", (0,))),
        digests=dict(content.get("digests", {})),
        choices=choices,
    )


@dataclass(frozen=True)
class Measured:
    """Figure of one arm.

    Attributes:
        value: The figure; with several seeds their mean.
        by_seed: Figure of each seed.
        items: Score by item id, averaged over seeds; None if the arm has no scores by item.
    """

    value: float
    by_seed: tuple[float, ...]
    items: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Difference:
    """What changing one choice does to the figure.

    Attributes:
        choice: Name of the choice.
        value: Its changed value.
        figure: Figure with this change.
        change: Figure minus that of the published protocol.
        low: Lower bound of the 95 % interval of `change`; None if it cannot be computed.
        high: Upper bound.
        remaining: Figure minus the published one.
        explains: Whether the published figure is met with this change, and not without.
    """

    choice: str
    value: str
    figure: float
    change: float
    low: float | None
    high: float | None
    remaining: float
    explains: bool


def attribute(
    published: float,
    tolerance: float,
    base: Measured,
    arms: Mapping[tuple[str, str], Measured],
    *,
    scale: float = 1.0,
    seed: int = 0,
) -> list[Difference]:
    """Compares each changed choice with the published figure, the nearest first.

    A change explains the difference if it brings the figure within `tolerance` of the published one
    and its own effect is not noise: its interval over items excludes 0. A figure without scores by
    item has no interval; its effect then has to exceed the tolerance.

    Args:
        published: Printed figure.
        tolerance: Largest difference that counts as reproduced.
        base: Figure of the published protocol.
        arms: Figure of each change, by choice and value.
        scale: Figure of an item that is fully right: 100 if the figure is in percent.
        seed: Seed of the bootstrap.
    """
    found = []
    for (choice, value), arm in arms.items():
        change = arm.value - base.value
        interval = _interval(base, arm, scale, seed)
        real = abs(change) > tolerance if interval is None else not interval[0] <= 0 <= interval[1]
        remaining = arm.value - published
        low, high = interval or (None, None)
        explains = real and abs(remaining) <= tolerance < abs(base.value - published)
        found.append(Difference(choice, value, arm.value, change, low, high, remaining, explains))
    return sorted(found, key=lambda row: (not row.explains, abs(row.remaining)))


def _interval(base: Measured, arm: Measured, scale: float, seed: int) -> tuple[float, float] | None:
    """Resamples items; those of both arms are paired, those of another subset are not."""
    if not base.items or not arm.items:
        return None
    from pathcore import stats

    def sums(items: Mapping[str, float], item: str) -> tuple[float, float]:
        return items.get(item, 0.0), float(item in items)

    cases = [(*sums(arm.items, i), *sums(base.items, i)) for i in {**base.items, **arm.items}]
    low, high = stats.cluster_interval(
        cases, None, lambda s: s[:, 0] / s[:, 1] - s[:, 2] / s[:, 3], seed=seed
    )
    return scale * low, scale * high


class Reproduction:
    """Runs the arms of a card in a folder; finished arms are not run again.

    Args:
        card: The card.
        inputs: Path or name for each of `card.inputs`.
        folder: Work folder; each arm has a sub-folder.
        extra: Options appended to every command, such as `--device cpu`.
        published: Figure instead of the card's.

    Raises:
        ValueError: If an input is missing or unknown, or a file has another digest.
    """

    def __init__(
        self,
        card: Card,
        inputs: Mapping[str, str],
        folder: StrPath,
        *,
        extra: Sequence[str] = (),
        published: float | None = None,
    ) -> None:
        self.card, self.inputs, self.folder = card, dict(inputs), Path(folder)
        self.extra = tuple(extra)
        self.incomplete: dict[str, str] = {}
        self.published = card.published if published is None else published
        missing = [f"{name} ({what})" for name, what in card.inputs.items() if name not in inputs]
        if missing:
            raise ValueError(f"{card.name}: data needed: {'; '.join(missing)}; give NAME=PATH")
        unknown = sorted(set(inputs) - set(card.inputs))
        if unknown:
            raise ValueError(
                f"{card.name}: no input {', '.join(unknown)}; expected {', '.join(card.inputs)}"
            )
        self.digests = {
            name: sha256_of(path) for name, path in self.inputs.items() if Path(path).is_file()
        }
        for name, digest in card.digests.items():
            if self.digests.get(name) != digest:
                raise ValueError(
                    f"{self.inputs[name]}: expected the published file with sha256 {digest}, "
                    f"found {self.digests.get(name, 'no file')}"
                )

    def run(self, *, all_arms: bool = False) -> dict[str, Any]:
        """Measures the figure, and what each choice does to it if it differs; writes the report.

        Args:
            all_arms: Whether to run the changed choices even if the figure is reproduced.

        Returns:
            The content of `reproduction.json`.

        Raises:
            ValueError: If the published protocol cannot be run; the message names its log.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.folder / ".lock"):
            base = self.measure({})
            differs = (
                self.published is not None
                and abs(base.value - self.published) > self.card.tolerance
            )
            arms: dict[tuple[str, str], Measured] = {}
            failed: dict[str, str] = {}
            if differs or all_arms:
                for choice, value in self.card.changes():
                    try:
                        arms[choice, value] = self.measure({choice: value})
                    except ValueError as error:  # one that cannot be run must not stop the others
                        failed[f"{choice}={value}"] = str(error)
            report = self._report(base, arms, failed, differs)
            write_json(self.folder / RESULT_NAME, report)
            write_text(self.folder / TABLE_NAME, table(report))
        return report

    def measure(self, changes: Mapping[str, str]) -> Measured:
        """Returns the figure with some choices changed; runs the commands that have not run yet."""
        options, figure = self.card.arm(changes)
        base_options, _ = self.card.arm({})
        # A choice that only reads another figure shares the runs of the published protocol.
        name = (
            "published"
            if options == base_options
            else "+".join(f"{choice}={value}" for choice, value in changes.items())
        )
        figures, items = [], []
        for seed in self.card.seeds:
            out = self.folder / name.replace(os.sep, "_")
            out = out / f"seed{seed}" if len(self.card.seeds) > 1 else out
            self._run_command(options, out, seed)
            figures.append(read_figure(out, figure))
            if self.card.items and figure == self.card.figure:
                items.append(read_items(out, self.card.items))
        scores = None
        if items:
            shared = set(items[0]).intersection(*items[1:])
            scores = {
                item: fmean(row[item] for row in items) for item in items[0] if item in shared
            }
        return Measured(fmean(figures), tuple(figures), scores)

    def command(self, options: Sequence[str], out: Path, seed: int) -> list[str]:
        """Returns the arguments of `xtuner-add` for one run."""
        values = {**self.inputs, "out": str(out), "seed": str(seed)}
        words = [word.format_map(values) for word in (*self.card.command, *options)]
        return [*words, *self.extra]

    def _run_command(self, options: Sequence[str], out: Path, seed: int) -> None:
        arguments = self.command(options, out, seed)
        shown = [hide_secrets(word) for word in arguments]
        identity = {
            "arguments": shown,
            "inputs": {
                name: file_identity(path)
                for name, path in self.inputs.items()
                if Path(path).is_file()
            },
        }
        log = out.with_name(f"{out.name}.log")
        if (out / _DONE_NAME).is_file():
            done = read_json(out / _DONE_NAME, what="a finished arm")
            code = done.pop("exit_code", EXIT_OK)
            if done == identity:
                self._note(code, out, log)
                return
            (out / _DONE_NAME).unlink()
        out.mkdir(parents=True, exist_ok=True)
        with open(log, "w", encoding="utf-8") as file:
            code, message = run_command(arguments, file)
        if code not in (EXIT_OK, EXIT_SKIPPED):
            raise ValueError(
                f"xtuner-add {shlex.join(shown)}: ended with {code}: {message} ({log})"
            )
        write_json(out / _DONE_NAME, {**identity, "exit_code": code})
        self._note(code, out, log)

    def _note(self, code: int, out: Path, log: Path) -> None:
        if code == EXIT_SKIPPED:
            name = str(out.relative_to(self.folder))
            self.incomplete[name] = (
                f"something was skipped, see {log}; to run it again, delete {out / _DONE_NAME}"
            )

    def _report(
        self,
        base: Measured,
        arms: Mapping[tuple[str, str], Measured],
        failed: Mapping[str, str],
        differs: bool,
    ) -> dict[str, Any]:
        card = self.card
        interval = None
        if base.items:
            from pathcore import stats

            mean = fmean(base.items.values())
            if math.isclose(card.scale * mean, base.value, rel_tol=1e-3):
                low, high = stats.mean_interval(list(base.items.values()))
                interval = [card.scale * low, card.scale * high]
        rows = []
        if self.published is not None:
            rows = attribute(self.published, card.tolerance, base, arms, scale=card.scale)
        return {
            "card": card.name,
            "title": card.title,
            "source": card.source,
            "published": self.published,
            "tolerance": card.tolerance,
            "measured": base.value,
            "interval": interval,
            "by_seed": list(base.by_seed),
            "num_items": len(base.items) if base.items else None,
            "difference": None if self.published is None else base.value - self.published,
            "state": "measured" if self.published is None
            else "differs" if differs else "reproduced",
            "explained_by": [f"{row.choice}={row.value}" for row in rows if row.explains],
            "choices": [vars(row) for row in rows],
            "failed": dict(failed),
            "incomplete": dict(self.incomplete),
            "protocol": {name: next(iter(values)) for name, values in card.choices.items()},
            "command": shlex.join(
                map(
                    hide_secrets,
                    ["xtuner-add", *self.command(card.arm({})[0], Path("OUT"), card.seeds[0])],
                )
            ),
            "inputs": {
                name: {"path": hide_secrets(path), "sha256": self.digests.get(name)}
                for name, path in self.inputs.items()
            },
        }  # fmt: skip


def run_command(arguments: Sequence[str], log: TextIO) -> tuple[int, str]:
    """Runs a command of `xtuner-add` in this process, which imports its libraries only once.

    Returns:
        Exit code, and the message of an error.
    """
    with redirect_stdout(log), redirect_stderr(log):
        try:
            code = cli.main.main(list(arguments), "xtuner-add", standalone_mode=False)
            return code or EXIT_OK, ""
        except click.ClickException as error:
            error.show(log)
            return error.exit_code, error.format_message()
        except SystemExit as error:
            return (error.code, "") if isinstance(error.code, int) else (1, str(error.code))
        except Exception as error:  # of one run among many; the log has the traceback
            traceback.print_exc(file=log)
            return EXIT_FAILED, f"{type(error).__name__}: {error}"


def read_figure(folder: Path, where: str) -> float:
    """Reads a figure given as `FILE:KEY > KEY > ...` from a JSON file.

    Raises:
        ValueError: If the file has no number there.
    """
    name, _, keys = where.partition(":")
    value: Any = read_json(folder / name, what="scores")
    for key in map(str.strip, keys.split(">")):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            found = ", ".join(value) if isinstance(value, dict) else repr(value)[:80]
            raise ValueError(f"{folder / name}: no {key!r} of {keys}; found {found}") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{folder / name}: {keys}: expected a number, found {value!r:.80}")
    return float(value)


def read_items(folder: Path, where: str) -> dict[str, float]:
    """Reads scores by item.

    Args:
        folder: Folder of the run.
        where: `FILE.jsonl:ID_FIELD:SCORE_FIELD`, or `FILE.csv:ID_COLUMN:COLUMN=COLUMN`, where an
            item is right if both columns are equal.

    Raises:
        ValueError: If a row lacks a field.
    """
    name, key, score = where.split(":")
    path = folder / name
    items = {}
    if path.suffix == ".csv":
        left, _, right = score.partition("=")
        for _, row in read_csv(path, columns=(key, left, right), what="items"):
            items[row[key]] = float(row[left] == row[right])
        return items
    for number, row in read_lines(path, strict=True):
        if key not in row or score not in row:
            raise ValueError(f"{path}, line {number}: expected {key} and {score}")
        items[str(row[key])] = float(row[score])
    return items


def table(report: Mapping[str, Any]) -> str:
    """Formats the content of `reproduction.json` as Markdown."""
    lines = [f"# {report['title']}", "", verdict(report), ""]
    measured = f"{report['measured']:.2f}"
    if report["interval"]:
        low, high = report["interval"]
        measured += f" ({low:.2f} to {high:.2f}, {report['num_items']:,} items)"
    if len(report["by_seed"]) > 1:
        measured += f"; by seed {', '.join(f'{value:.2f}' for value in report['by_seed'])}"
    lines += ["| | |", "|---|---|", f"| published | {_figure_text(report['published'])} |"]
    lines += [f"| source | {report['source']} |", f"| measured | {measured} |"]
    lines += [f"| protocol | {', '.join(f'{k}: {v}' for k, v in report['protocol'].items())} |"]
    lines += [f"| command | `{report['command']}` |", ""]
    if report["choices"]:
        lines += ["| changed | figure | change | 95 % interval | minus published |"]
        lines += ["|---|---|---|---|---|"]
        for row in report["choices"]:
            interval = "" if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"
            mark = " (explains)" if row["explains"] else ""
            lines.append(
                f"| {row['choice']}={row['value']}{mark} | {row['figure']:.2f} | "
                f"{row['change']:+.2f} | {interval} | {row['remaining']:+.2f} |"
            )
        lines.append("")
    lines += [f"Not run: {name}: {why}" for name, why in report["failed"].items()]
    lines += [f"Not complete: {name}: {why}" for name, why in report["incomplete"].items()]
    return "\n".join(lines).rstrip() + "\n"


def verdict(report: Mapping[str, Any]) -> str:
    """Returns the result in one sentence."""
    measured, published = report["measured"], report["published"]
    if report["state"] == "measured":
        return f"{measured:.2f}; the card has no published figure to compare with."
    within = f"{measured:.2f} measured, {published:.2f} published"
    if report["state"] == "reproduced":
        return f"Reproduced: {within}, within {report['tolerance']:g}."
    if report["explained_by"]:
        return f"Differs: {within}. Explained by {' or '.join(report['explained_by'])}."
    nearest = report["choices"][0] if report["choices"] else None
    if nearest is None or abs(nearest["remaining"]) >= abs(report["difference"]):
        return f"Differs: {within}. No choice of the card brings it nearer."
    return (
        f"Differs: {within}. No single choice explains it; {nearest['choice']}={nearest['value']} "
        f"comes nearest, with {nearest['remaining']:+.2f} left."
    )


def _figure_text(value: float | None) -> str:
    return "not given" if value is None else f"{value:g}"
