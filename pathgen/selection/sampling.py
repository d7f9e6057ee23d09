"""Representative patches of a slide: by prompts, by the report, and for diversity.

Follows PathGen-1.6M (arXiv:2407.00203): patches that match descriptions of findings, patches that
match sentences of the report, and patches drawn evenly from clusters of features. What the
published script does by mistake, a number of clusters that depends on the batch size, is there by
name.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Source = Literal["prompt", "report", "cluster"]
SOURCES: tuple[Source, ...] = ("prompt", "report", "cluster")
SHARES: Mapping[Source, float] = {"prompt": 0.25, "report": 0.25, "cluster": 0.5}

_PUBLISHED_FACTOR = 1.6
_MANY = 20_000
_SENTENCE = re.compile(r"(?<=[.!?;])\s+(?=[A-Z0-9(])|\n+")
_SHORTEST_SENTENCE = 12


@dataclass(frozen=True)
class Choice:
    """One chosen patch.

    Attributes:
        index: Into the slide's patches.
        source: What it was chosen for.
        text: The description or sentence it matches best; empty for clusters.
        label: The name of the description's class; empty otherwise.
        score: Cosine similarity to `text`, or to the centre of its cluster.
        cluster: Number of its cluster.
    """

    index: int
    source: Source
    text: str
    label: str
    score: float
    cluster: int


@dataclass(frozen=True)
class Texts:
    """Texts with their features and, for descriptions, the names of their classes."""

    texts: Sequence[str]
    labels: Sequence[str]
    features: NDArray[np.float32]


def load_classes(
    cancer_type: str | None = None, file: str | os.PathLike[str] | None = None
) -> list[tuple[str, str]]:
    """Class descriptions: those for any tissue, then those of a cancer type.

    Args:
        cancer_type: TCGA's code, `BRCA` for instance; None for those of any tissue alone.
        file: JSON in place of this package's: `{type or "any": {class: [descriptions]}}`.

    Returns:
        Pairs of class and description.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It has another form, or not this cancer type.
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
        raise ValueError(f"cancer type {cancer_type!r}: one of {known} expected")
    return [*pairs.get("any", []), *(pairs[cancer_type] if cancer_type else [])]


def split_report(text: str) -> list[str]:
    """Sentences of a report, without fragments.

    Example:
        >>> split_report("Ductal carcinoma, grade 2. pT2. Vascular invasion is seen.")
        ['Ductal carcinoma, grade 2. pT2.', 'Vascular invasion is seen.']
    """
    sentences = (part.strip() for part in _SENTENCE.split(text))
    return [part for part in sentences if len(part) >= _SHORTEST_SENTENCE]


def cluster_count(rule: str, num_patches: int) -> int:
    """The number of clusters.

    Args:
        rule: A number; `sqrt`: the root of half the patches (Mardia, Kent, Bibby: Multivariate
            Analysis, 1979, p. 365); or `published:BATCH`: `ceil(sqrt(1.6 * batches))`, as
            PathGen's script has it, for its batch size.
        num_patches: Of the slide.

    Raises:
        ValueError: Another rule.

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
        raise ValueError(f"clusters {rule!r}: a number, sqrt or published:BATCH expected")
    return max(1, min(count, num_patches))


def find_clusters(features: NDArray[np.float32], count: int, seed: int) -> NDArray[np.int64]:
    """K-means by scikit-learn: for each patch the number of its cluster."""
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
    shares: Mapping[Source, float] | None = None,
    clusters: str = "sqrt",
    max_similarity: float = 0.95,
    seed: int = 0,
) -> tuple[list[Choice], NDArray[np.int64]]:
    """Chooses at most `quota` patches, none of them nearly equal to another.

    Descriptions: the patch's best similarity to any of them counts. Report: the sum over its
    sentences counts. Clusters take their turns until the quota is full; what the other two sources
    leave free, because there is no report for instance, falls to them.

    Args:
        features: `(N, dim)`, of length 1.
        quota: Most patches of this slide.
        prompts: Class descriptions.
        report: Sentences of the report.
        shares: Of the quota by source.
        clusters: See `cluster_count`.
        max_similarity: A patch more similar than this to a chosen one is a near-duplicate.
        seed: Of k-means and of the draw within clusters.

    Returns:
        The choices, and the cluster of every patch.

    Raises:
        ValueError: A quota or shares that make no sense.
    """
    shares = dict(SHARES if shares is None else shares)
    if quota < 1 or not 0 < max_similarity <= 1:
        raise ValueError("selection: a quota of at least 1, a similarity up to 1 expected")
    if set(shares) - set(SOURCES) or min(shares.values()) < 0 or sum(shares.values()) <= 0:
        raise ValueError(f"shares: expected weights for {', '.join(SOURCES)}, found {shares}")
    labels = find_clusters(features, cluster_count(clusters, len(features)), seed)
    picker = _Picker(features, labels, max_similarity)
    total = sum(shares.values())
    for source, texts in (("prompt", prompts), ("report", report)):
        if texts is not None and len(texts.texts):
            most = round(quota * shares.get(source, 0.0) / total)  # type: ignore[call-overload]
            picker.take_best(source, texts, most)  # type: ignore[arg-type]
    picker.take_evenly(quota, np.random.default_rng(seed))
    return picker.choices, labels


class _Picker:
    """Takes patches one by one, passing over near-duplicates of those taken."""

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
        """The clusters take turns; within one the order is drawn."""
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
        self._nearest[index] = np.inf
        return True
