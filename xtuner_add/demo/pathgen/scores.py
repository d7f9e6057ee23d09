"""Reads the demo's results from the files that its commands wrote: counts, captions, scores.

Only the agreement of captions with the ground truth and the chance level of each score are computed
here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pathcore.stats import wilson_interval
from xtuner_add.demo.pathgen import dataset, wording
from xtuner_add.demo.stages import read_jsonl

MODELS = ("clip", "clip_exchanged", "first_clip")
"""CLIPs trained on the describer's captions, on these exchanged, and on the teacher's."""
TASKS = ("tissue", "look")
DIRECTIONS = ("image_to_text", "text_to_image")
KS = (1, 5, 10)
STEPS = ("describe", "revise", "summarise")

_LENGTH = re.compile(r"\d+ (words|tokens)\b")
_LOSS = re.compile(r"Train Epoch: (\d+) \[\s*(\d+)/(\d+) .* Loss: ([\d.]+)")


def summarise(work_dir: Path) -> dict[str, Any]:
    """Returns all figures of the demo, for `summary.json`."""
    zero_shot = {
        task: {model: _zero_shot(work_dir, model, task) for model in MODELS} for task in TASKS
    }
    retrieval = {model: _retrieval(work_dir, model) for model in MODELS}
    return {
        "road": road(work_dir),
        "captions": judge_captions(work_dir),
        "zero_shot": zero_shot,
        "chance": {task: 1 / len(zero_shot[task]["clip"]["classes"]) for task in TASKS},
        "retrieval": retrieval,
        "retrieval_chance": retrieval_chance(work_dir / "tests" / "pairs.jsonl"),
    }


def road(work_dir: Path) -> list[dict[str, Any]]:
    """Returns the inputs and outputs of each step, and what it skipped and why."""
    tiles = _read(work_dir / "tiles" / "archive" / "report.json")
    rows: list[dict[str, Any]] = [
        _step("tile", "slides", tiles["written"] + tiles["skipped"], tiles["written"], tiles)
    ]
    choices = read_jsonl(work_dir / "selection" / "selection.jsonl")
    found = _num_patches(work_dir / "tiles" / "archive" / "coords")
    sources = Counter(row["chosen_for"] for row in choices)
    chosen = _step("select-patches", "patches", found, len(choices), {})
    chosen["note"] = ", ".join(f"{count} by {name}" for name, count in sorted(sources.items()))
    rows.append(chosen)
    captions = work_dir / "captions"
    before = len(choices)
    for command, name in (("describe", "long"), ("revise", "revised")):
        rows.append(_agent(command, captions / f"{name}.jsonl", before))
        before = rows[-1]["out"]
    filters = _read(captions / "clean.filters.json")
    dropped = {row["name"]: row["dropped"] for row in filters["steps"] if row["dropped"]}
    reasons = {"reasons": dropped}
    rows.append(_step("filter-captions", "captions", filters["rows"], filters["kept"], reasons))
    rows.append(_agent("summarise", captions / "pairs.jsonl", filters["kept"]))
    cut = _read(work_dir / "shards" / "clip" / "report.json")
    total = cut["written"] + cut["skipped"]
    rows.append(_step("extract", "pairs in shards", total, cut["written"], cut))
    return rows


def judge_captions(work_dir: Path) -> dict[str, Any]:
    """Counts the captions of each step that name the true tissues and look of the nuclei."""
    rows = read_jsonl(work_dir / "captions" / "long.jsonl")
    truths = {row["id"]: dataset.patch_truth(work_dir, row["id"]) for row in rows}
    last = read_jsonl(work_dir / "captions" / "pairs.jsonl")
    judged: dict[str, Any] = {"patches": len(rows)}
    for step in STEPS:
        # The same patches for all three: those on clean tissue whose captions passed every step.
        kept = [
            (row["versions"][step], truths[row["id"]].field)
            for row in last
            if truths[row["id"]].clean
        ]
        judged[step] = {
            "tissues": _share([wording.says(text, field) for text, field in kept]),
            "look": _share(
                [
                    wording.named_look(text) == field.vesicular
                    for text, field in kept
                    if field.vesicular is not None
                ]
            ),
        }
    revised = {row["id"] for row in read_jsonl(work_dir / "captions" / "revised.jsonl")}
    for name, faulty in (("spoilt", True), ("clean", False)):
        asked = [
            key
            for key, truth in truths.items()
            if (truth.field.fault is not None if faulty else truth.clean)
        ]
        judged[f"{name}_rejected"] = _share([key not in revised for key in asked])
    return judged


def retrieval_chance(pairs: Path) -> dict[str, dict[str, float]]:
    """Returns the expected recall at k of a random order.

    If m of n images are right, one of them is among the first k with probability
    1 - C(n - m, k) / C(n, k).
    """
    from scipy.special import gammaln

    captions = Counter(row["caption"] for row in read_jsonl(pairs))
    num_images, num_texts = sum(captions.values()), len(captions)
    chance: dict[str, dict[str, float]] = {name: {} for name in DIRECTIONS}
    for k in KS:
        chance["image_to_text"][f"recall@{k}"] = min(1.0, k / num_texts)
        found = []
        for right in captions.values():
            wrong = num_images - right
            if wrong < k:
                found.append(1.0)
                continue
            missed = gammaln(wrong + 1) - gammaln(wrong - k + 1)
            missed -= gammaln(num_images + 1) - gammaln(num_images - k + 1)
            found.append(1 - float(np.exp(missed)))
        chance["text_to_image"][f"recall@{k}"] = float(np.mean(found))
    return chance


def read_losses(log: Path) -> list[tuple[float, float]]:
    """Returns `(epoch, loss)` from the log of open_clip's trainer."""
    text = log.read_text(encoding="utf-8") if log.is_file() else ""
    return [
        (int(epoch) + int(done) / int(total), float(loss))
        for epoch, done, total, loss in _LOSS.findall(text)
    ]


def table(summary: Mapping[str, Any]) -> str:
    """Formats the summary for a terminal."""
    lines = []
    for task, label in (("tissue", "zero-shot, tissue"), ("look", "zero-shot, look of nuclei")):
        scores = summary["zero_shot"][task]
        lines += [
            _line(f"{label}, balanced accuracy", scores["clip"]),
            _line("  captions exchanged among images", scores["clip_exchanged"]),
            f"  {'  chance':<52} {summary['chance'][task]:.3f}",
            _line("  first CLIP, of the teacher's captions", scores["first_clip"]),
        ]
    for name in DIRECTIONS:
        found = summary["retrieval"]["clip"][name]
        chance = summary["retrieval_chance"][name]
        for k in (1, 10):
            label = f"{name.replace('_', ' ')}, recall@{k} (chance {chance[f'recall@{k}']:.3f})"
            lines.append(_line(label, {"balanced_accuracy": found[f"recall@{k}"]}))
    return "\n".join(lines)


def _line(label: str, scores: Mapping[str, Any]) -> str:
    score = scores["balanced_accuracy"]
    line = f"  {label:<52} {score['value']:.3f}  ({score['low']:.3f} to {score['high']:.3f})"
    if wide := scores.get("over_classes"):
        line += f"  over classes ({wide['low']:.2f} to {wide['high']:.2f})"
    return line


def _zero_shot(work_dir: Path, model: str, task: str) -> dict[str, Any]:
    found = _read(work_dir / "scores" / model / task / "metrics.json")
    names = ("classes", "num_images", "balanced_accuracy", "weighted_f1", "accuracy")
    scores = {name: found[name] for name in (*names, "recall_per_class", "confusion_matrix")}
    return scores | {"over_classes": interval_over_classes(found["recall_per_class"])}


def interval_over_classes(recalls: Sequence[float]) -> dict[str, float]:
    """Returns a bootstrap 95 % interval of the balanced accuracy over classes.

    A CLIP whose captions do not tell which name belongs to which class still groups similar images
    and gets whole classes right by chance, which an interval over images does not account for.
    """
    from scipy.stats import bootstrap

    if len(set(recalls)) == 1:
        return {"low": recalls[0], "high": recalls[0]}
    found = bootstrap((recalls,), np.mean, method="percentile", rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return {"low": float(low), "high": float(high)}


def _retrieval(work_dir: Path, model: str) -> dict[str, Any]:
    found = _read(work_dir / "scores" / model / "retrieval" / "metrics.json")
    return {name: found[name] for name in ("num_images", "num_captions", *DIRECTIONS)}


def _agent(command: str, out: Path, before: int) -> dict[str, Any]:
    left = read_jsonl(out.with_name(f"{out.stem}.skipped.jsonl"))
    reasons = Counter(_short(row) for row in left)
    return _step(command, "captions", before, before - len(left), {"reasons": reasons})


def _short(row: Mapping[str, Any]) -> str:
    """Returns a reason without the parts that differ from row to row."""
    if row["kind"] == "rejected":
        return "rejected"
    reason = row["reason"].partition(";")[0]
    return "too short or too long" if _LENGTH.match(reason) else f"{row['kind']}: {reason:.60}"


def _step(
    command: str, unit: str, taken: int, given: int, report: Mapping[str, Any]
) -> dict[str, Any]:
    reasons = dict(sorted(report.get("reasons", {}).items(), key=lambda item: -item[1]))
    return {"command": command, "unit": unit, "in": taken, "out": given, "reasons": reasons}


def _share(hits: Sequence[bool]) -> dict[str, Any]:
    """Returns a fraction with its 95 % Wilson interval."""
    if not hits:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = wilson_interval(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "low": low, "high": high, "n": len(hits)}


def _num_patches(coords: Path) -> int:
    from wsi.store import read_coordinates

    return sum(len(read_coordinates(file).coords) for file in sorted(coords.glob("*.h5")))


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
