"""Report of the PA-LLaVA demo: its answers compared with those that ignore the image."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pallava.anyres import TRAINING_TIES, AnyRes, choose_grid, fit_to_canvas
from pathcore.images import data_url
from xtuner_add.demo.pallava import answers, wording
from xtuner_add.demo.report import (
    BLUE,
    GREEN,
    GREY,
    MIDDLE,
    ORANGE,
    Panel,
    Points,
    draw_bar,
    draw_losses,
    write_page,
)
from xtuner_add.demo.stages import read_jsonl

_SHOWN_WIDTH_PX = 320


def write_report(work_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Writes `report.html` of a finished demo, whose `summary.json` has the content `summary`."""
    return write_page(
        work_dir,
        "pallava/report.html.j2",
        summary=summary,
        bars=_draw_bars(summary),
        curves=_draw_curves(work_dir),
        slides=_slides(work_dir),
        detail_kinds=answers.DETAIL_KINDS,
    )


def read_losses(work_dir: Path) -> Points:
    """Returns `(step, loss)` of a run of MMEngine, joined over resumed runs."""
    losses: dict[float, float] = {}
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        losses |= {row["step"]: row["loss"] for row in read_jsonl(file) if "loss" in row}
    return sorted(losses.items())


def _draw_bars(summary: Mapping[str, Any]) -> Any:
    from matplotlib.figure import Figure

    intervals = summary["intervals_95"]
    sub, sub_intervals = summary["subimage_accuracy"], intervals["subimage_accuracy"]
    rows: list[Any] = [
        ("model", summary["closed_accuracy"], intervals["closed_accuracy"], BLUE),
        ("images exchanged", summary["shuffled_accuracy"], intervals["shuffled_accuracy"], GREY),
        ("majority answer", summary["majority_accuracy"], None, GREY),
        (),
        ("scale-invariant", sub["scale_invariant"], sub_intervals["scale_invariant"], GREEN),
        ("released mode", sub["released"], sub_intervals["released"], ORANGE),
    ]
    figure = Figure(figsize=(7.2, 2.9))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        if not row:
            continue
        name, value, interval, colour = row
        draw_bar(axes, place, value, interval, colour, 0.7)
        axes.text(0.012, -place, f"{name}  {value:.2f}", va="center", color="white", fontsize=9)
    axes.axvline(0.5, color=MIDDLE, linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_yticks([-1, -4.5], ["yes/no questions", "detail lost in\nthe thumbnail"])
    axes.set_xlabel("accuracy on held-out slides, 95 % intervals")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _draw_curves(work_dir: Path) -> Any:
    history = json.loads((work_dir / "llm" / "history.json").read_text(encoding="utf-8"))
    panels: list[Panel] = [
        ("language model", "step", [("", [(row["step"], row["loss"]) for row in history], BLUE)]),
        ("PLIP", "step", [("", read_losses(work_dir / "plip"), BLUE)]),
    ]
    for step in ("domain_alignment", "instruction_tuning"):
        lines = [
            (mode.replace("_", "-"), read_losses(work_dir / mode / step), colour)
            for mode, colour in (("scale_invariant", GREEN), ("released", ORANGE))
        ]
        panels.append((step.replace("_", " "), "step", lines))
    return draw_losses(panels, (11, 2.4))


def _slides(work_dir: Path) -> list[dict[str, Any]]:
    """Returns the shown slides with their tiles and questions."""
    rows = read_jsonl(work_dir / "answers.jsonl")
    shown = json.loads((work_dir / "shown.json").read_text(encoding="utf-8"))
    config = json.loads(
        (work_dir / "plip" / "plip_encoder" / "preprocessor_config.json").read_text()
    )
    tile_px = AnyRes(tile_px=int(config["crop_size"]["height"])).tile_px
    slides = []
    for entry in shown:
        image = Image.open(work_dir / "data" / entry["image"]).convert("RGB")
        questions = [
            {
                **row,
                "right": answers.is_right(row),
                "closed": row["kind"] in wording.CLOSED,
                "released_right": row["prediction_released"] is not None
                and answers.is_right(row, "prediction_released"),
            }
            for row in rows
            if row["image"] == entry["image"]
        ]
        slides.append(
            {
                "name": Path(entry["image"]).stem,
                "size_px": image.size,
                "image": data_url(_enlarged(image)),
                "thumbnail": data_url(_enlarged(image.resize((tile_px, tile_px)))),
                "tiles": data_url(_tiles(image, tile_px, entry["attention"])),
                "questions": questions,
            }
        )
    return slides


def _tiles(image: Image.Image, tile_px: int, attention: Sequence[Any] | None) -> Image.Image:
    """Returns the sub-images as the model sees them, brighter where attention is higher."""
    columns, rows = choose_grid(*image.size, tile_px, TRAINING_TIES)
    canvas = fit_to_canvas(image, (columns * tile_px, rows * tile_px))
    scale = max(1, round(_SHOWN_WIDTH_PX / canvas.width))
    large = canvas.resize((canvas.width * scale, canvas.height * scale), Image.Resampling.NEAREST)
    pixels = np.asarray(large).astype(np.float32)
    if attention is not None:
        maps = np.asarray(attention, dtype=np.float32)
        side = maps.shape[-1]
        grid = maps.reshape(rows, columns, side, side).transpose(0, 2, 1, 3)
        weights = grid.reshape(rows * side, columns * side)
        weights = weights / np.quantile(weights, 0.98)
        veil = np.asarray(
            Image.fromarray((weights.clip(0, 1) * 255).astype(np.uint8)).resize(large.size)
        )
        pixels *= 0.35 + 0.65 * (veil[..., None] / 255)
    for column in range(1, columns):
        pixels[:, column * tile_px * scale - 1 : column * tile_px * scale + 1] = 255
    for row in range(1, rows):
        pixels[row * tile_px * scale - 1 : row * tile_px * scale + 1] = 255
    return Image.fromarray(pixels.astype(np.uint8))


def _enlarged(image: Image.Image) -> Image.Image:
    scale = max(1, round(_SHOWN_WIDTH_PX / max(image.size)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
