"""Protocols by name that evaluate frozen features: linear probes, nearest neighbours, k shots.

A preset is one JSON file in `protocol_presets/`, with the published values and where they were
read. Differences from what was published are in its `note`.

Example:
    >>> protocol = get_protocol("uni-knn")
    >>> protocol.method, protocol.settings["num_neighbours"]
    ('knn', 20)
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gigapath.finetune.baselines import METHODS, Predict, VectorSplit
from pathcore import stats
from pathcore.encoders.presets import check_fields, find_presets, read_preset
from pathcore.names import UnknownNameError, did_you_mean

LINEAR_PROBE = "linear_probe"

SHOT_SCORES = {
    "balanced_accuracy": stats.balanced_accuracy,
    "accuracy": stats.accuracy,
    "weighted_f1": stats.weighted_f1,
    "macro_f1": stats.macro_f1,
}
"""Scores of k-shot runs: those of predicted classes, because most draws are too small for
probabilities that mean something."""


@dataclass(frozen=True)
class Protocol:
    """How frozen features are evaluated.

    Attributes:
        name: Name in reports.
        method: `linear_probe`, or one of `gigapath.finetune.baselines.METHODS`.
        settings: Arguments of the method; for `linear_probe`, fields of `ProbeSettings`.
        num_runs: Number of linear probes with consecutive seeds.
        shots: Numbers of training cases per class; empty for all training cases.
        repeats: Number of draws for each number of shots.
        source: Where the values were read; empty if they are ours.
        note: The protocol in words, and what differs here.
    """

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    num_runs: int = 1
    shots: tuple[int, ...] = ()
    repeats: int = 100
    source: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.method == LINEAR_PROBE:
            if self.shots:
                raise ValueError(
                    f"{self.name}: k shots are for {', '.join(METHODS)}; the {LINEAR_PROBE} needs "
                    "validation cases and thousands of steps for each draw"
                )
            return
        if self.method not in METHODS:
            hint = did_you_mean(self.method, (LINEAR_PROBE, *METHODS))
            raise ValueError(f"method {self.method!r}: unknown{hint}")
        if self.num_runs != 1:
            raise ValueError(f"{self.name}: num_runs {self.num_runs}: {self.method} has no seed")
        names = inspect.signature(METHODS[self.method]).parameters
        known = [n for n, p in names.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
        for name in self.settings:
            if name not in known:
                raise ValueError(f"{self.name}: no setting {name!r}{did_you_mean(name, known)}")
        if self.repeats < 1 or min(self.shots, default=1) < 1:
            raise ValueError(
                f"{self.name}: shots {list(self.shots)}, repeats {self.repeats}: expected 1 or more"
            )

    def fit(self, train: VectorSplit, val: VectorSplit | None, num_classes: int) -> Predict:
        """Fits the method to cases; not for `linear_probe`."""
        return METHODS[self.method](train, val, num_classes, **self.settings)

    def changed(
        self, settings: Mapping[str, Any], shots: Sequence[int], repeats: int | None
    ) -> Protocol:
        """Returns the protocol with changes of a user.

        Args:
            settings: Fields of `ProbeSettings` that a linear probe takes instead of its own.
            shots: Numbers of shots; empty keeps those of the protocol.
            repeats: Number of draws; None keeps that of the protocol.

        Raises:
            ValueError: If a linear probe is given shots.
        """
        own = {**self.settings, **settings} if self.method == LINEAR_PROBE else self.settings
        return replace(
            self, settings=own, shots=tuple(shots) or self.shots, repeats=repeats or self.repeats
        )


def list_protocols() -> list[str]:
    """Returns the names of all presets."""
    return sorted(_files())


def get_protocol(name: str) -> Protocol:
    """Returns a preset by name.

    Raises:
        UnknownNameError: If the name is unknown; the message suggests similar names.
    """
    files = _files()
    if name not in files:
        raise UnknownNameError(f"protocol {name!r}: unknown{did_you_mean(name, files)}")
    content = read_preset(name, files)
    check_fields(content, Protocol, files[name], {"method", "settings", "source", "note"})
    return Protocol(name, **{**content, "shots": tuple(content.get("shots", ()))})


@cache
def _files() -> dict[str, Path]:
    return find_presets([Path(__file__).with_name("protocol_presets")])


def score_shots(
    protocol: Protocol, train: VectorSplit, test: VectorSplit, num_classes: int, *, seed: int = 0
) -> dict[str, Any]:
    """Trains on a few cases of each class, many times, and scores all test cases.

    Args:
        protocol: A protocol with shots.
        train: Cases to draw from, without replacement within a draw.
        test: Test cases.
        num_classes: Number of classes.
        seed: Seed of the draws. The draw of a repeat with fewer shots is part of that with more,
            and the same for every protocol and encoder.

    Returns:
        `shots`: for each number, `num_repeats` and, of each of `SHOT_SCORES`, the mean over draws
        as `value`, its 95 % bootstrap interval over draws `low` and `high`, and `std`. The interval
        is the uncertainty of the mean over draws; the test cases are the same in all draws.
        `left_out`: numbers that are larger than the smallest class, with the reason.

    Raises:
        ValueError: If every number of shots is larger than the smallest class.
    """
    members = [np.flatnonzero(train.labels == index) for index in range(num_classes)]
    fewest = min(map(len, members))
    numbers = [number for number in protocol.shots if number <= fewest]
    reason = f"the smallest class has {fewest} training cases"
    if not numbers:
        raise ValueError(f"{protocol.name}: shots {list(protocol.shots)}: {reason}")
    counts: dict[int, list[Any]] = {number: [] for number in numbers}
    for repeat in range(protocol.repeats):
        generator = np.random.default_rng((seed, repeat))
        orders = [generator.permutation(own) for own in members]
        for number in numbers:
            rows = np.concatenate([order[:number] for order in orders])
            drawn = VectorSplit(
                tuple(train.ids[row] for row in rows), train.vectors[rows], train.labels[rows]
            )
            predicted = protocol.fit(drawn, None, num_classes)(test.vectors).argmax(axis=1)
            counts[number].append(stats.confusion(test.labels, predicted, num_classes))
    found: dict[str, Any] = {}
    for number, matrices in counts.items():
        found[str(number)] = {"num_repeats": protocol.repeats}
        for name, score in SHOT_SCORES.items():
            values = score(np.stack(matrices))
            low, high = stats.mean_interval(values, seed=seed)
            found[str(number)][name] = {
                "value": float(values.mean()),
                "low": low,
                "high": high,
                "std": float(values.std(ddof=1)) if len(values) > 1 else None,
            }
    left_out = {str(number): reason for number in protocol.shots if number not in numbers}
    return {"shots": found, "left_out": left_out}
