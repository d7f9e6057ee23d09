"""Selects representative patches of a slide: by prompts, by the report, and for diversity.

Follows PathGen-1.6M (arXiv:2407.00203): takes patches that match descriptions of findings, patches
that match sentences of the report, and patches drawn evenly from clusters of features. In the
published script the number of clusters depends on the batch size, probably by mistake; the rule
`published:BATCH` reproduces it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pathcore.files import StrPath

Source = Literal["prompt", "report", "cluster"]
SOURCES: tuple[Source, ...] = ("prompt", "report", "cluster")
FRACTIONS: Mapping[Source, float] = {"prompt": 0.25, "report": 0.25, "cluster": 0.5}

_PUBLISHED_FACTOR = 1.6
_MANY = 20_000  # patches from which k-means runs on mini-batches, to bound its time
_SENTENCE = re.compile(r"(?<=[.!?;])\s+(?=[A-Z0-9(])|\n+")
_SHORTEST_SENTENCE = 12  # characters; shorter pieces such as "pT2." say nothing visible


@dataclass(frozen=True)
class Choice:
    """One selected patch.

    Attributes:
        index: Index into the slide's patches.
        source: Why the patch was selected.
        text: Description or sentence that the patch matches best; empty for clusters.
        label: Class of the description; empty otherwise.
        score: Cosine similarity to `text`, or to the centre of the cluster.
        cluster: Index of the patch's cluster.
    """

    index: int
    source: Source
    text: str
    label: str
    score: float
    cluster: int


@dataclass(frozen=True)
class Texts:
    """Texts with L2-normalised features `(T, dim)` and, for descriptions, class names."""

    texts: Sequence[str]
    labels: Sequence[str]
    features: NDArray[np.float32]


def load_classes(
    cancer_type: str | None = None, file: StrPath | None = None
) -> list[tuple[str, str]]:
    """Reads class descriptions: those for any tissue, then those for a cancer type.

    Args:
        cancer_type: TCGA code such as `BRCA`; None for the descriptions for any tissue only.
        file: JSON file `{type or "any": {class: [descriptions]}}`; by default that of this package.

    Returns:
        Pairs of class and description.

    Raises:
        FileNotFoundError: If `file` is missing.
        ValueError: If `file` has another format, or lacks the cancer type.
    """
    if file is not None and not Path(file).is_file():
        raise FileNotFoundError(f"classes {file}: no such file")
    source = Path(file) if file is not None else files("pathgen.prompts") / "classes.json"
    try:
        table = json.loads(source.read_text(encoding="utf-8"))
        pairs = {
            kind: [(label, text) for label, texts in classes.items() for text in texts]
            for kind, classes in table.items()
        }
        if not all(isinstance(t, str) and t for rows in pairs.values() for _, t in rows):
            raise ValueError("descriptions must be texts")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"classes {source}: {{type: {{class: [texts]}}}}: {error}") from error
    if cancer_type is not None and cancer_type not in pairs:
        known = ", ".join(kind for kind in pairs if kind != "any")
        raise ValueError(f"cancer type {cancer_type!r}: expected one of {known}")
    return [*pairs.get("any", []), *(pairs[cancer_type] if cancer_type else [])]


def split_report(text: str) -> list[str]:
    """Splits a report into sentences; drops fragments.

    Example:
        >>> split_report("Ductal carcinoma, grade 2. pT2. Vascular invasion is seen.")
        ['Ductal carcinoma, grade 2. pT2.', 'Vascular invasion is seen.']
    """
    sentences = (part.strip() for part in _SENTENCE.split(text))
    return [part for part in sentences if len(part) >= _SHORTEST_SENTENCE]


def cluster_count(rule: str, num_patches: int) -> int:
    """Returns the number of clusters for a slide.

    Args:
        rule: A number; `sqrt` for `ceil(sqrt(num_patches / 2))` (Mardia, Kent, Bibby: Multivariate
            Analysis, 1979, p. 365); or `published:BATCH` for `ceil(sqrt(1.6 * num_batches))`, as
            PathGen's script computes it, where BATCH is its batch size.
        num_patches: Number of patches of the slide.

    Raises:
        ValueError: If the rule is none of these.

    Example:
        >>> cluster_count("sqrt", 5000), cluster_count("published:64", 5000)
        (50, 12)
    """
    name, _, number = rule.partition(":")
    if rule == "sqrt":
        count = math.ceil(math.sqrt(num_patches / 2))
    elif rule.isdecimal() and int(rule) > 0:
        count = int(rule)
    elif name == "published" and number.isdecimal() and int(number) > 0:
        count = math.ceil(math.sqrt(math.ceil(num_patches / int(number)) * _PUBLISHED_FACTOR))
    else:
        raise ValueError(f"clusters {rule!r}: expected a number, sqrt or published:BATCH")
    return max(1, min(count, num_patches))


def find_clusters(features: NDArray[np.float32], count: int, seed: int) -> NDArray[np.int64]:
    """Clusters patches by k-means; returns `(N,)` cluster indices."""
    from sklearn.cluster import KMeans, MiniBatchKMeans

    if count == 1:
        return np.zeros(len(features), np.int64)
    if len(features) > _MANY:
        model = MiniBatchKMeans(count, n_init=4, batch_size=4096, random_state=seed)
    else:
        model = KMeans(count, n_init=4, random_state=seed)
    labels: NDArray[Any] = model.fit_predict(features.astype(np.float64))
    return labels.astype(np.int64)


def select(
    features: NDArray[np.float32],
    quota: int,
    *,
    prompts: Texts | None = None,
    report: Texts | None = None,
    fractions: Mapping[Source, float] | None = None,
    clusters: str = "sqrt",
    max_similarity: float = 0.95,
    seed: int = 0,
) -> tuple[list[Choice], NDArray[np.int64]]:
    """Selects at most `quota` patches without near-duplicates.

    Patches are ranked by their highest similarity to any description, and by the sum of their
    similarities to the sentences of the report. The rest of the quota, which grows if there is no
    report for instance, is taken from the clusters in turn.

    Args:
        features: `(N, dim)`, L2-normalised.
        quota: Maximum number of patches.
        prompts: Class descriptions.
        report: Sentences of the report.
        fractions: Source -> fraction of the quota.
        clusters: Rule for the number of clusters, see `cluster_count`.
        max_similarity: Cosine similarity to a selected patch above which a patch is a
            near-duplicate.
        seed: Seed of k-means and of the draw within clusters.

    Returns:
        The selected patches, and the cluster of every patch.

    Raises:
        ValueError: If the settings are invalid, see `check_settings`.
    """
    fractions = dict(FRACTIONS if fractions is None else fractions)
    check_settings(quota, fractions, clusters, max_similarity)
    labels = find_clusters(features, cluster_count(clusters, len(features)), seed)
    picker = _Picker(features, labels, max_similarity)
    total = sum(fractions.values())
    for source, texts in (("prompt", prompts), ("report", report)):
        if texts is not None and len(texts.texts):
            most = round(quota * fractions.get(source, 0.0) / total)  # type: ignore[call-overload]
            picker.take_best(source, texts, most)  # type: ignore[arg-type]
    picker.take_evenly(quota, np.random.default_rng(seed))
    return picker.choices, labels


def check_settings(
    quota: int, fractions: Mapping[Source, float], clusters: str, max_similarity: float
) -> None:
    """Checks arguments of `select`, so that a job over many slides can refuse them at its start.

    Raises:
        ValueError: If `quota`, `max_similarity` or `fractions` is out of range, or `clusters` is
            not a rule.
    """
    if quota < 1 or not 0 < max_similarity <= 1:
        raise ValueError("selection: expected a quota of at least 1 and a similarity in (0, 1]")
    if set(fractions) - set(SOURCES) or min(fractions.values()) < 0 or sum(fractions.values()) <= 0:
        raise ValueError(f"fractions: expected weights for {', '.join(SOURCES)}, found {fractions}")
    cluster_count(clusters, num_patches=1)


class _Picker:
    """Selects patches one by one and skips near-duplicates of those already selected."""

    def __init__(
        self, features: NDArray[np.float32], labels: NDArray[np.int64], max_similarity: float
    ) -> None:
        self._features = features
        self._labels = labels
        self._limit = max_similarity
        self._nearest = np.full(len(features), -np.inf, np.float32)
        self.choices: list[Choice] = []

    def take_best(self, source: Source, texts: Texts, most: int) -> None:
        similarities = self._features @ texts.features.T
        scores = similarities.max(1) if source == "prompt" else similarities.sum(1)
        best = similarities.argmax(1)
        taken = 0
        for index in np.argsort(-scores, kind="stable").tolist():
            if taken >= most:
                return
            text = int(best[index])
            score = float(similarities[index, text])
            taken += self._take(index, source, texts.texts[text], texts.labels[text], score)

    def take_evenly(self, quota: int, draw: np.random.Generator) -> None:
        """Takes one patch of each cluster in turn, in random order within a cluster."""
        queues: list[Iterator[int]] = []
        centres = {}
        for label in np.unique(self._labels).tolist():
            members = np.flatnonzero(self._labels == label)
            centre = self._features[members].mean(0)
            centres[label] = centre / max(float(np.linalg.norm(centre)), 1e-12)
            queues.append(iter(draw.permutation(members).tolist()))
        while queues and len(self.choices) < quota:
            left = []
            for queue in queues:
                if len(self.choices) >= quota:
                    break
                for index in queue:
                    centre = centres[int(self._labels[index])]
                    score = float(self._features[index] @ centre)
                    if self._take(index, "cluster", "", "", score):
                        left.append(queue)
                        break
            queues = left

    def _take(self, index: int, source: Source, text: str, label: str, score: float) -> bool:
        if self._nearest[index] > self._limit:
            return False
        self.choices.append(Choice(index, source, text, label, score, int(self._labels[index])))
        similarities = self._features @ self._features[index]
        self._nearest = np.maximum(self._nearest, similarities)
        self._nearest[index] = np.inf  # also blocks the patch itself if `max_similarity` is 1
        return True
