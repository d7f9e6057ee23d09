"""Writes `report.html` of a demo, a self-contained page, and its figures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pathcore.files import write_text

BLUE, GREY, ORANGE, GREEN = "#2b5c8a", "#9aa5b1", "#c8722a", "#4a8c5f"
DARK, MIDDLE = "#333333", "#555555"

Points = list[tuple[float, float]]
Panel = tuple[str, str, Sequence[tuple[str, Points, str]]]
"""Title, unit of the steps, and curves: label, points and colour."""


def write_page(work_dir: Path, template: str, **content: Any) -> Path:
    """Fills a template of this folder and writes `report.html`.

    Args:
        work_dir: Folder of the demo.
        template: Path of the template, which extends `page.html.j2`.
        content: Variables of the template; figures of matplotlib become SVG.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from matplotlib.figure import Figure

    loader = PackageLoader("xtuner_add.demo", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    for name, value in content.items():
        if isinstance(value, Figure):
            content[name] = Markup(_svg(value))
    target = work_dir / "report.html"
    write_text(target, environment.get_template(template).render(content))
    return target


def _svg(figure: Any) -> str:
    """Returns a figure as SVG, the same text for the same figure."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo"}):
        figure.savefig(stream, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]


def draw_losses(
    panels: Sequence[Panel], size: tuple[float, float], top: float | None = None
) -> Any:
    """Draws the loss curves of several trainings side by side.

    Args:
        panels: One for each training.
        size: Width and height in inches.
        top: Upper limit of the loss axes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    for axes, (title, unit, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for label, points, colour in lines:
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(unit, fontsize=9)
        axes.set_ylim(0, top)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if any(label for label, _, _ in lines):
            axes.legend(fontsize=8, frameon=False)
    return figure


def draw_bar(
    axes: Any,
    place: int,
    value: float,
    interval: Sequence[float] | None,
    colour: str,
    height: float,
) -> None:
    """Draws one horizontal bar, with its interval as an error bar."""
    error = None
    if interval is not None:
        # A Wilson or bootstrap interval may end at the value, to the last digit beyond it.
        error = [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
    axes.barh(-place, value, xerr=error, color=colour, height=height, ecolor=DARK)
