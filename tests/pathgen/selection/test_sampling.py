"""Selection of representative patches, on features with a known structure."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pathgen.selection.sampling import (
    Texts,
    cluster_count,
    find_clusters,
    load_classes,
    select,
    split_report,
)

DIM = 16


def unit(features: NDArray[np.float64]) -> NDArray[np.float32]:
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def groups(sizes: list[int], noise: float = 0.05) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Patches around as many directions as there are sizes."""
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    features = np.eye(DIM)[labels] + noise * draw.normal(size=(len(labels), DIM))
    return unit(features), labels


def texts(*directions: int) -> Texts:
    names = [f"direction {number}" for number in directions]
    return Texts(names, [name[-1] for name in names], unit(np.eye(DIM)[list(directions)]))


def test_clusters_take_their_turns() -> None:
    features, labels = groups([200, 40, 10, 3])
    choices, found = select(features, 40, clusters="4", max_similarity=1)
    assert len({(int(a), int(b)) for a, b in zip(labels, found, strict=True)}) == 4
    counts = Counter(int(labels[choice.index]) for choice in choices)
    assert counts[3] == 3, "all of the smallest"
    assert counts[2] == 10, "all of the next"
    assert abs(counts[0] - counts[1]) <= 1 and sum(counts.values()) == 40
    assert len({choice.index for choice in choices}) == 40
    assert {choice.source for choice in choices} == {"cluster"}


def test_prompts_and_report_find_what_is_rare() -> None:
    features, labels = groups([300, 300, 6, 6])
    fractions = {"prompt": 0.25, "report": 0.25, "cluster": 0.5}
    choices, _ = select(
        features, 20, prompts=texts(2, 9), report=texts(3), fractions=fractions, clusters="2",
        max_similarity=1,
    )  # fmt: skip
    by_source = {name: [c for c in choices if c.source == name] for name in fractions}
    assert {name: len(found) for name, found in by_source.items()} == {
        "prompt": 5, "report": 5, "cluster": 10,
    }  # fmt: skip
    assert {int(labels[c.index]) for c in by_source["prompt"]} == {2}
    assert {(c.text, c.label) for c in by_source["prompt"]} == {("direction 2", "2")}
    assert {int(labels[c.index]) for c in by_source["report"]} == {3}
    scores = [c.score for c in by_source["prompt"]]
    assert scores == sorted(scores, reverse=True)


def test_report_counts_the_sum_over_its_sentences() -> None:
    base = np.zeros((3, DIM))
    base[0, 0] = 1  # fits one sentence wholly
    base[1, [0, 1]] = 1  # fits both by 0.71: the larger sum
    base[2, 5] = 1
    fractions = {"prompt": 1.0, "report": 1.0}
    by_sum, _ = select(unit(base), 2, report=texts(0, 1), fractions=fractions, clusters="1")
    assert (by_sum[0].index, by_sum[0].source) == (1, "report")
    by_best, _ = select(unit(base), 2, prompts=texts(0, 1), fractions=fractions, clusters="1")
    assert (by_best[0].index, by_best[0].source) == (0, "prompt")


def test_near_duplicates_are_passed_over() -> None:
    features, _ = groups([30, 30], noise=0.0)
    choices, _ = select(features, 20, prompts=texts(0), max_similarity=0.99, clusters="2")
    assert len(choices) == 2, "all patches of a group are the same"
    spread, _ = groups([60, 60], noise=0.3)
    choices, _ = select(spread, 30, prompts=texts(0), max_similarity=0.8)
    chosen = spread[[choice.index for choice in choices]]
    similarities = chosen @ chosen.T - 2 * np.eye(len(chosen))
    assert similarities.max() <= 0.8 + 1e-6


@settings(max_examples=25, deadline=None)
@given(
    num_patches=st.integers(1, 60),
    quota=st.integers(1, 80),
    seed=st.integers(0, 5),
    limit=st.floats(0.3, 1.0),
)
def test_invariants(num_patches: int, quota: int, seed: int, limit: float) -> None:
    draw = np.random.default_rng(seed)
    features = unit(draw.normal(size=(num_patches, DIM)))
    options = dict(prompts=texts(1, 2), report=texts(3), max_similarity=limit, seed=seed)
    choices, labels = select(features, quota, **options)  # type: ignore[arg-type]
    assert 1 <= len(choices) <= min(quota, num_patches)
    assert len({choice.index for choice in choices}) == len(choices)
    assert labels.shape == (num_patches,)
    again, _ = select(features, quota, **options)  # type: ignore[arg-type]
    assert again == choices
    left = set(range(num_patches)) - {choice.index for choice in choices}
    if len(choices) < quota:  # who was not taken is too near to somebody who was
        chosen = features[[choice.index for choice in choices]]
        assert all((chosen @ features[index]).max() > limit - 1e-6 for index in left)


def test_number_of_clusters_does_not_depend_on_a_batch_unless_asked() -> None:
    assert cluster_count("sqrt", 2) == 1
    assert cluster_count("sqrt", 20_000) == 100
    assert cluster_count("7", 5) == 5
    assert cluster_count("published:1", 1000) == 40
    assert cluster_count("published:256", 1000) == 3
    for rule in ("0", "-3", "published", "published:0", "published:x", "elbow", ""):
        with pytest.raises(ValueError, match="a number, sqrt or published:BATCH"):
            cluster_count(rule, 100)


def test_many_patches_are_clustered_in_batches() -> None:
    features, labels = groups([9000, 9000, 4000])
    found = find_clusters(features, 3, seed=0)
    assert len({(int(a), int(b)) for a, b in zip(labels, found, strict=True)}) == 3


def test_class_descriptions(tmp_path: Path) -> None:
    general = load_classes()
    breast = load_classes("BRCA")
    assert breast[: len(general)] == general
    assert {"invasive lobular carcinoma", "necrosis"} <= {label for label, _ in breast}
    assert len({text for _, text in breast}) == len(breast)
    with pytest.raises(ValueError, match="one of BLCA, BRCA"):
        load_classes("XYZ")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"LIVER": {"fat": ["vacuoles"]}}))
    assert load_classes("LIVER", file) == [("fat", "vacuoles")]
    for text in ("[]", "{", '{"any": []}', '{"any": {"x": [1]}}', '{"any": {"x": 1}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="classes"):
            load_classes(None, file)


def test_reports_are_cut_into_sentences() -> None:
    text = "Specimen: colon.\nAdenocarcinoma, 3.5 cm, grade 2. Margins are free; Nodes 0/12.\n\nOK."
    assert split_report(text) == [
        "Specimen: colon.", "Adenocarcinoma, 3.5 cm, grade 2.", "Margins are free;", "Nodes 0/12.",
    ][:3]  # fmt: skip
    assert split_report("") == []


def test_settings_that_make_no_sense_are_refused() -> None:
    features, _ = groups([5])
    for options in ({"quota": 0}, {"quota": 3, "max_similarity": 0.0}):
        with pytest.raises(ValueError, match="quota of at least 1"):
            select(features, **options)  # type: ignore[arg-type]
    for fractions in ({"song": 1.0}, {"prompt": -1.0}, {"prompt": 0.0}):
        with pytest.raises(ValueError, match="weights for"):
            select(features, 3, fractions=fractions)  # type: ignore[arg-type]
