"""Report of the PathGen demo: every step from slides to a CLIP, with pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pathcore.images import data_url
from xtuner_add.demo.pathgen import dataset, scores, wording
from xtuner_add.demo.report import (
    BLUE,
    GREEN,
    GREY,
    MIDDLE,
    ORANGE,
    Panel,
    draw_bar,
    draw_losses,
    write_page,
)
from xtuner_add.demo.stages import read_jsonl

_SHOWN_SLIDES = 2
_SHOWN_CAPTIONS = 6
_SLIDE_WIDTH_PX = 1000
_PATCH_SIDE_PX = 150
_TOP_LOSS = 4.5  # just above the loss of random weights, the logarithm of the batch size
_MODEL_NAMES = {
    "clip": "describer's captions",
    "clip_exchanged": "the same, exchanged",
    "first_clip": "first CLIP (teacher)",
}
_COLOURS = {"clip": BLUE, "clip_exchanged": GREY, "first_clip": GREEN}


def write_report(work_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Writes `report.html` of a finished demo, whose `summary.json` has the content `summary`."""
    return write_page(
        work_dir,
        "pathgen/report.html.j2",
        summary=summary,
        tests=json.loads((work_dir / "tests" / "counts.json").read_text(encoding="utf-8")),
        bars=_draw_bars(summary),
        curves=_draw_curves(work_dir),
        confusion=_draw_confusion(summary["zero_shot"]["tissue"]["clip"]),
        recall=_draw_recall(summary),
        slides=_slides(work_dir),
        captions=_captions(work_dir),
        rejected=_rejected(work_dir),
    )


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _draw_bars(summary: Mapping[str, Any]) -> Any:
    figure = _figure(9.6, 2.3)
    titles = {"tissue": "kind of tissue", "look": "look of the nuclei"}
    for axes, task in zip(figure.subplots(1, 2), scores.TASKS, strict=True):
        found = summary["zero_shot"][task]
        for place, model in enumerate(scores.MODELS):
            score = found[model]["balanced_accuracy"]
            value, interval = score["value"], (score["low"], score["high"])
            draw_bar(axes, place, value, interval, _COLOURS[model], 0.66)
            wide = found[model]["over_classes"]
            axes.plot([wide["low"], wide["high"]], [-place - 0.22] * 2, color=ORANGE, linewidth=2)
            axes.text(1.02, -place, f"{value:.2f}", va="center", fontsize=9)
        chance = summary["chance"][task]
        axes.axvline(chance, color=MIDDLE, linewidth=0.9, linestyle=":")
        axes.text(chance, 0.52, "chance", fontsize=8, ha="center", va="bottom", color=MIDDLE)
        labels = [_MODEL_NAMES[model] for model in scores.MODELS]
        axes.set_yticks([-place for place in range(len(labels))], labels, fontsize=9)
        axes.set_xlim(0, 1)
        images, classes = found["clip"]["num_images"], len(found["clip"]["classes"])
        title = f"{titles[task]}: {classes} classes, {images} patches"
        axes.set_title(title, fontsize=10, pad=14)
        axes.set_xlabel("balanced accuracy, zero-shot", fontsize=9)
        axes.tick_params(labelsize=8.5, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


def _draw_curves(work_dir: Path) -> Any:
    history = json.loads((work_dir / "describer" / "history.json").read_text(encoding="utf-8"))
    by_task = {
        task: [(row["step"], row["loss"]) for row in history if row["task"] == task]
        for task in ("name", *scores.STEPS)
    }
    logs = {name: scores.read_losses(work_dir / name / "pairs" / "out.log") for name in _COLOURS}
    colours = {"name": GREY, "describe": BLUE, "revise": ORANGE, "summarise": GREEN}
    panels: list[Panel] = [
        ("first CLIP", "epoch", [("", logs["first_clip"], GREEN)]),
        ("describer", "step", [(task, by_task[task], colours[task]) for task in colours]),
        (
            "CLIP of the captions",
            "epoch",
            [("captions", logs["clip"], BLUE), ("exchanged", logs["clip_exchanged"], GREY)],
        ),
    ]
    return draw_losses(panels, (10.4, 2.4), _TOP_LOSS)


def _draw_confusion(found: Mapping[str, Any]) -> Any:
    matrix = np.array(found["confusion_matrix"], dtype=float)
    shares = matrix / matrix.sum(axis=1, keepdims=True)
    figure = _figure(4.9, 4.0)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(matrix > 0):
        axes.text(
            *(column, row, f"{int(matrix[row, column])}"),
            ha="center",
            va="center",
            fontsize=8,
            color="white" if shares[row, column] > 0.55 else "#1d2733",
        )
    places = range(len(matrix))
    axes.set_xticks(places, found["classes"], rotation=40, ha="right", fontsize=8.5)
    axes.set_yticks(places, found["classes"], fontsize=8.5)
    axes.set_xlabel("predicted", fontsize=9)
    axes.set_ylabel("true", fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _draw_recall(summary: Mapping[str, Any]) -> Any:
    figure = _figure(5.4, 4.0)
    ks = list(scores.KS)
    for axes, name in zip(figure.subplots(2, 1, sharex=True), scores.DIRECTIONS, strict=True):
        for model in scores.MODELS:
            rows = [summary["retrieval"][model][name][f"recall@{k}"] for k in ks]
            values = np.array([row["value"] for row in rows])
            error = np.clip(
                [values - [r["low"] for r in rows], [r["high"] for r in rows] - values], 0, None
            )
            label = _MODEL_NAMES[model]
            axes.errorbar(
                *(range(len(ks)), values, error),
                fmt="o-",
                color=_COLOURS[model],
                label=label,
                linewidth=1.2,
                markersize=3.5,
                capsize=2,
            )
        chance = [summary["retrieval_chance"][name][f"recall@{k}"] for k in ks]
        axes.plot(range(len(ks)), chance, ":", color=MIDDLE, linewidth=1, label="chance")
        axes.set_xticks(range(len(ks)), [f"@{k}" for k in ks])
        axes.set_ylim(0, 1)
        axes.set_title(f"{name.replace('_', ' ')}: recall", fontsize=9.5, loc="left")
        axes.tick_params(labelsize=8.5)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    return figure


def _slides(work_dir: Path) -> list[dict[str, str]]:
    """Returns slides of the archive with their tissue, patches, clusters and selection."""
    chosen = read_jsonl(work_dir / "selection" / "selection.jsonl")
    shown = []
    for name in list(dict.fromkeys(row["wsi_id"] for row in chosen))[:_SHOWN_SLIDES]:
        overlay = Image.open(work_dir / "tiles" / "archive" / "overlays" / f"{name}.jpg")
        picture = Image.open(work_dir / "selection" / "pictures" / f"{name}.jpg")
        count = sum(row["wsi_id"] == name for row in chosen)
        shown.append(
            {
                "name": name,
                "overlay": _photo(overlay, _SLIDE_WIDTH_PX // 2),
                "picture": _photo(picture, _SLIDE_WIDTH_PX),
                "note": f"{count} patches chosen",
            }
        )
    return shown


def _captions(work_dir: Path) -> list[dict[str, Any]]:
    """Returns patches with their captions from each step, corrected ones first."""
    rows = read_jsonl(work_dir / "captions" / "pairs.jsonl")
    corrected = [row for row in rows if row.get("problems")]
    half = _SHOWN_CAPTIONS // 2
    picked = _spread(corrected, half)
    ids = {row["id"] for row in picked}
    others = [row for row in rows if row["id"] not in ids and not row.get("problems")]
    shown = []
    for row in [*picked, *_spread(others, _SHOWN_CAPTIONS - len(picked))]:
        truth = dataset.patch_truth(work_dir, row["id"]).field
        versions = [
            {
                "step": step,
                "text": row["versions"][step],
                "right": _is_right(row["versions"][step], truth),
            }
            for step in scores.STEPS
        ]
        source = row["chosen_for"] + (f": {row['label']}" if row.get("label") else "")
        shown.append(
            {
                "id": row["id"],
                "image": _patch(work_dir, row["id"]),
                "chosen_for": source,
                "problems": row.get("problems") or [],
                "versions": versions,
                "truth": wording.summary(truth),
            }
        )
    return shown


def _rejected(work_dir: Path) -> list[dict[str, str]]:
    """Returns patches that the check rejected."""
    rows = read_jsonl(work_dir / "captions" / "revised.skipped.jsonl")
    rejected = [row for row in rows if row["kind"] == "rejected"]
    return [
        {"id": row["id"], "image": _patch(work_dir, row["id"]), "reason": row["reason"]}
        for row in _spread(rejected, _SHOWN_CAPTIONS)
    ]


def _is_right(caption: str, truth: wording.Field) -> bool:
    look = wording.named_look(caption)
    return wording.says(caption, truth) and look == truth.vesicular


def _patch(work_dir: Path, name: str) -> str:
    image = Image.open(work_dir / "patches" / "archive" / f"{name}.png").convert("RGB")
    large = image.resize((_PATCH_SIDE_PX, _PATCH_SIDE_PX), Image.Resampling.BICUBIC)
    return data_url(large, "JPEG", quality=88)


def _photo(image: Image.Image, width_px: int) -> str:
    height_px = round(image.height * width_px / image.width)
    small = image.convert("RGB").resize((width_px, height_px), Image.Resampling.LANCZOS)
    return data_url(small, "JPEG", quality=82)


def _spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Returns evenly spaced rows."""
    step = max(1, len(rows) // max(1, count))
    return list(rows[::step][:count])
