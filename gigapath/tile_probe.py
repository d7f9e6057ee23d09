"""Classifiers of tile embeddings: the linear probe, and comparisons on the same tiles."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from gigapath.baselines import METHODS, VectorSplit, check_methods
from gigapath.embedding_zip import EmbeddingData, EmbeddingSplit, read_embeddings
from gigapath.linear_probe import LINEAR_PROBE, ProbeRun, ProbeSettings, score_split
from gigapath.result_files import (
    RESULTS_NAME,
    TABLE_NAME,
    results_table,
    write_predictions,
    write_skipped,
)
from pathcore.files import folder_lock, remove_partials, write_json, write_text


def probe_tiles(
    embeddings: str | os.PathLike[str],
    table: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    settings: ProbeSettings | None = None,
    methods: Sequence[str] = (LINEAR_PROBE,),
    embed_dim: int | None = None,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains and tests classifiers of tile embeddings.

    Args:
        embeddings: Zip as published, or a folder of `.pt`.
        table: csv with `input`, `label`, `split`; by default the one among the embeddings.
        out: Output folder; the same call continues a run that was killed.
        settings: Of the linear probe.
        methods: `linear_probe`, `knn`, `logistic`.
        embed_dim: Width; by default that of most embeddings.
        device: `cuda` or `cpu`; by default a GPU where there is one.
        progress: Show progress bars.

    Returns:
        What `results.json` holds.

    Raises:
        FileNotFoundError: No embeddings or no table.
        ValueError: A table that cannot be used, or a folder of another run.
    """
    settings, out = settings or ProbeSettings(), Path(out)
    methods = check_methods(methods, (LINEAR_PROBE,))
    data = read_embeddings(embeddings, table, embed_dim=embed_dim, progress=progress)
    if settings.z_score:
        data = standardised(data)
    setting = "binary" if len(data.classes) == 2 else "multi_class"
    out.mkdir(parents=True, exist_ok=True)
    with folder_lock(out / ".lock"):
        remove_partials(out)
        found = {}
        for method in methods:
            folder = out / method
            folder.mkdir(exist_ok=True)
            if method == LINEAR_PROBE:
                run = ProbeRun(data, settings, folder, device=device, progress=progress)
                found[method] = run.finish(setting)
            else:
                found[method] = _compare(method, data, settings, folder, setting)
        results = {
            "embeddings": str(embeddings),
            "settings": asdict(settings),
            "classes": list(data.classes),
            "setting": setting,
            "num_tiles": {name: len(split.ids) for name, split in data.splits.items()},
            "num_skipped": len(data.skipped),
            "num_without_row": data.num_without_row,
            "methods": found,
        }
        write_skipped(out, data.skipped)
        write_text(out / TABLE_NAME, _table(results))
        write_json(out / RESULTS_NAME, results)
    return results


def _compare(
    method: str, data: EmbeddingData, settings: ProbeSettings, folder: Path, setting: str
) -> dict[str, Any]:
    parts = {n: VectorSplit(s.ids, s.features.numpy(), s.labels) for n, s in data.splits.items()}
    predict = METHODS[method](parts["train"], parts["val"], len(data.classes))
    found = {}
    for name in ("val", "test"):
        split, probabilities = data.splits[name], predict(parts[name].vectors)
        found[name] = score_split(split, probabilities, data.classes, settings, setting)
        write_predictions(
            folder / f"predictions_{name}.csv", split.ids, split.labels, probabilities, data.classes
        )
    return found


def standardised(data: EmbeddingData) -> EmbeddingData:
    """Embeddings with mean 0 and deviation 1, each by itself."""

    def standardise(x: Tensor) -> Tensor:
        return (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)

    splits = {
        name: EmbeddingSplit(split.ids, standardise(split.features), split.labels)
        for name, split in data.splits.items()
    }
    return EmbeddingData(data.classes, splits, data.skipped, data.num_without_row)


def _table(results: Mapping[str, Any]) -> str:
    rows = [((name,), found["test"]) for name, found in results["methods"].items()]
    notes = []
    if results["num_skipped"]:
        notes.append(f"{results['num_skipped']} rows left out: see skipped.jsonl.")
    title = f"Tiles of {results['embeddings']}"
    return results_table(title, results["setting"], rows, ("method",), notes)
