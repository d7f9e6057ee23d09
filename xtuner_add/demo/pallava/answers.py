"""Asks the trained model the held-out questions and scores its answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pallava.evaluation.audit import exchange_images
from pathcore.files import write_json
from pathcore.rows import write_rows
from pathcore.stats import wilson_interval
from xtuner_add.demo.pallava import dataset, wording
from xtuner_add.demo.stages import read_jsonl

MAX_NEW_TOKENS = 32
BATCH_SIZE = 32
DETAIL_KINDS = ("nuclei", "nuclear look")
"""Questions that the thumbnail cannot answer."""

_NUM_SHOWN = 6


def answer_all(work_dir: Path, seed: int) -> None:
    """Answers the held-out questions with both models, and with exchanged images.

    Writes `answers.jsonl`, with a line per question, and `shown.json`, with the slides for the
    report and the attention of the connector.
    """
    rows = read_jsonl(work_dir / "data" / "held_out.jsonl")
    exchanged = exchanged_images(rows, np.random.default_rng([seed, 5]))
    closed = [index for index, row in enumerate(rows) if row["kind"] in wording.CLOSED]
    detail = [index for index, row in enumerate(rows) if row["kind"] in DETAIL_KINDS]

    from pallava import load_model

    model = load_model(work_dir / "scale_invariant" / "model")
    everything = range(len(rows))
    given = ask(model, work_dir, rows, everything, [row["image"] for row in rows], "questions")
    shuffled = ask(model, work_dir, rows, closed, exchanged, "images exchanged")
    shown = _slides_shown(model, work_dir, rows)
    released = load_model(work_dir / "released" / "model")
    without = ask(released, work_dir, rows, detail, [row["image"] for row in rows], "released")

    for index, row in enumerate(rows):
        row["prediction"] = given[index]
        row["exchanged_image"] = exchanged[index]
        row["prediction_exchanged"] = shuffled.get(index)
        row["prediction_released"] = without.get(index)
    write_rows(work_dir / "answers.jsonl", rows)
    write_json(work_dir / "shown.json", shown)


def exchanged_images(
    rows: Sequence[Mapping[str, Any]], rng: np.random.Generator, field: str = "image"
) -> list[str]:
    """Returns for each question the image of another question with the same text.

    A question keeps its image if no other image has a question with this text.

    Args:
        rows: Questions, each with `question` and `field`.
        rng: Generator of the permutations.
        field: Field that names the image.
    """
    images = [str(row[field]) for row in rows]
    givers = exchange_images([row["question"] for row in rows], images, rng)
    return [images[taker if giver is None else giver] for taker, giver in enumerate(givers)]


def summarise(work_dir: Path) -> dict[str, Any]:
    """Computes accuracies with 95 % intervals from `answers.jsonl`."""
    rows = read_jsonl(work_dir / "answers.jsonl")
    closed = [row for row in rows if row["kind"] in wording.CLOSED]
    opened = [row for row in rows if row["kind"] not in wording.CLOSED]
    detail = [row for row in rows if row["kind"] in DETAIL_KINDS]
    summary: dict[str, Any] = {"majority_accuracy": round(dataset.majority_share(closed), 4)}
    counts: dict[str, Any] = {}
    for name, part, key in (
        ("closed_accuracy", closed, "prediction"),
        ("shuffled_accuracy", closed, "prediction_exchanged"),
        ("open_accuracy", opened, "prediction"),
    ):
        counts[name] = _accuracy(part, key)
        summary[name] = counts[name]["accuracy"]
    sub_images = {
        "scale_invariant": _accuracy(detail, "prediction"),
        "released": _accuracy(detail, "prediction_released"),
    }
    summary["subimage_accuracy"] = {name: row["accuracy"] for name, row in sub_images.items()}
    summary["intervals_95"] = {
        **{name: row["interval"] for name, row in counts.items()},
        "subimage_accuracy": {name: row["interval"] for name, row in sub_images.items()},
    }
    summary["n"] = {name: row["n"] for name, row in counts.items()} | {
        "subimage_accuracy": len(detail)
    }
    kinds = dict.fromkeys(row["kind"] for row in rows)
    summary["by_kind"] = {
        kind: _accuracy([row for row in rows if row["kind"] == kind], "prediction")
        for kind in kinds
    }
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """Formats a summary as a table for the terminal."""
    sub = summary["subimage_accuracy"]
    lines = [
        ("closed questions, held-out images", summary["closed_accuracy"]),
        ("  majority answer", summary["majority_accuracy"]),
        ("  images exchanged", summary["shuffled_accuracy"]),
        ("open questions, exact", summary["open_accuracy"]),
        ("detail lost in the thumbnail, scale-invariant", sub["scale_invariant"]),
        ("detail lost in the thumbnail, released mode", sub["released"]),
    ]
    return "\n".join(f"  {name:<48} {value:.3f}" for name, value in lines)


def is_right(row: Mapping[str, Any], key: str = "prediction") -> bool:
    """Returns whether an answer is correct, ignoring case and surrounding white space."""
    return str(row[key]).strip().lower() == row["answer"].lower()


def _accuracy(rows: Iterable[Mapping[str, Any]], key: str) -> dict[str, Any]:
    right = [is_right(row, key) for row in rows]
    low, high = wilson_interval(sum(right), len(right))
    return {
        "accuracy": round(float(np.mean(right)), 4),
        "interval": [round(low, 4), round(high, 4)],
        "n": len(right),
    }


def ask(
    model: Any,
    work_dir: Path,
    rows: Sequence[Mapping[str, Any]],
    indices: Iterable[int],
    images: Sequence[str],
    title: str,
) -> dict[int, str]:
    """Answers the questions at `indices` in batches; `images` has an entry for each question."""
    order = sorted(indices, key=lambda index: images[index])
    pixels: dict[str, Any] = {}
    given: dict[int, str] = {}
    for start in tqdm(range(0, len(order), BATCH_SIZE), title, leave=False):
        batch = order[start : start + BATCH_SIZE]
        for index in batch:
            if images[index] not in pixels:
                pixels[images[index]] = model.pixel_values(work_dir / "data" / images[index])
        texts = model.answer_encoded(
            [model.encode(rows[index]["question"], has_image=True) for index in batch],
            [pixels[images[index]] for index in batch],
            max_new_tokens=MAX_NEW_TOKENS,
        )
        given |= dict(zip(batch, texts, strict=True))
        pixels = {images[batch[-1]]: pixels[images[batch[-1]]]}
    return given


def _slides_shown(
    model: Any, work_dir: Path, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns evenly spaced held-out slides for the report, with attention per sub-image."""
    from pallava.modeling.attention_maps import sub_image_attention

    images = list(dict.fromkeys(row["image"] for row in rows))
    picked = images[:: max(1, len(images) // _NUM_SHOWN)][:_NUM_SHOWN]
    shown = []
    for image in picked:
        attention = sub_image_attention(model.model, model.pixel_values(work_dir / "data" / image))
        shown.append(
            {"image": image, "attention": None if attention is None else attention.tolist()}
        )
    return json.loads(json.dumps(shown))
