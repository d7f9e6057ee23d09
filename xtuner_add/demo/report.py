"""`report.html`: what the demo's model answers, beside what it would answer without looking."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pallava.anyres import AnyRes, choose_grid, fit_to_canvas
from pathcore.files import write_text
from xtuner_add.demo import answers, dataset, wording

BLUE, GREY, ORANGE, GREEN = "#2b5c8a", "#9aa5b1", "#c8722a", "#4a8c5f"
_SHOWN_WIDTH_PX = 320


def write_report(work_dir: Path, summary: Mapping[str, Any]) -> Path:
    """Writes a page that needs no other file.

    Args:
        work_dir: The demo's folder, all stages done.
        summary: Content of `summary.json`.

    Returns:
        The page.
    """
    from jinja2 import Environment, StrictUndefined

    source = files("xtuner_add.demo").joinpath("report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    page = template.render(
        css=stylesheet(),
        summary=summary,
        bars=svg_figure(_draw_bars(summary)),
        curves=svg_figure(_draw_curves(work_dir)),
        slides=_slides(work_dir),
        detail_kinds=answers.DETAIL_KINDS,
    )
    target = work_dir / "report.html"
    write_text(target, page)
    return target


def read_losses(work_dir: Path) -> list[tuple[float, float]]:
    """`(step, loss)` of a run of MMEngine, its parts after a resume put together."""
    losses: dict[float, float] = {}
    for file in sorted(work_dir.glob("*/vis_data/scalars.json")):
        for row in dataset.read_jsonl(file):
            if "loss" in row:
                losses[row["step"]] = row["loss"]
    return sorted(losses.items())


def stylesheet() -> str:
    """The look of the demos' pages."""
    return files("xtuner_add.demo").joinpath("report.css").read_text(encoding="utf-8")


def svg_figure(figure: Any) -> str:
    """A figure of matplotlib as SVG text; the same figure gives the same text."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo"}):
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def data_url(image: Image.Image, kind: str = "PNG", **options: Any) -> str:
    """An image as an address that holds it."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{encoded}"


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
        error = None
        if interval is not None:
            error = np.clip([[value - interval[0]], [interval[1] - value]], 0, None)
        axes.barh(-place, value, xerr=error, color=colour, height=0.7, ecolor="#333333")
        axes.text(0.012, -place, f"{name}  {value:.2f}", va="center", color="white", fontsize=9)
    axes.axvline(0.5, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1)
    axes.set_yticks([-1, -4.5], ["yes/no questions", "detail lost in\nthe thumbnail"])
    axes.set_xlabel("accuracy on held-out slides, 95 % intervals")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def _draw_curves(work_dir: Path) -> Any:
    from matplotlib.figure import Figure

    history = json.loads((work_dir / "llm" / "history.json").read_text(encoding="utf-8"))
    panels: list[tuple[str, list[tuple[str, list[tuple[float, float]], str]]]] = [
        ("language model", [("", [(row["step"], row["loss"]) for row in history], BLUE)]),
        ("PLIP", [("", read_losses(work_dir / "plip"), BLUE)]),
    ]
    for step in ("domain_alignment", "instruction_tuning"):
        lines = [
            (mode.replace("_", "-"), read_losses(work_dir / mode / step), colour)
            for mode, colour in (("scale_invariant", GREEN), ("released", ORANGE))
        ]
        panels.append((step.replace("_", " "), lines))
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for label, points, colour in lines:
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if any(label for label, _, _ in lines):
            axes.legend(fontsize=8, frameon=False)
    return figure


def _slides(work_dir: Path) -> list[dict[str, Any]]:
    """The shown slides with their tiles and their questions."""
    rows = dataset.read_jsonl(work_dir / "answers.jsonl")
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
    """The sub-images as the model sees them, brighter where the connector looks."""
    columns, rows = choose_grid(*image.size, tile_px)
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
