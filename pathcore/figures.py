"""Figures that several packages draw with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pathcore.files import StrPath, atomic_file


def draw_maps(
    maps: Mapping[str, NDArray[np.floating[Any]]],
    *,
    limits: tuple[float, float],
    colours: str,
    title: str,
    width: float,
    num_spare: int = 0,
) -> tuple[Any, list[Any]]:
    """Draws maps side by side on one scale of colours.

    Args:
        maps: Maps `(rows, columns)` by the titles of their panels; NaN is not drawn.
        limits: Values of the first and the last colour.
        colours: Colour map of matplotlib.
        title: Title above all panels.
        width: Width of the figure in inches.
        num_spare: Number of empty panels after the maps.

    Returns:
        The figure and the spare panels.
    """
    from matplotlib.figure import Figure

    low, high = limits
    figure = Figure(figsize=(width, 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(maps) + num_spare, squeeze=False)[0].tolist()
    for axes, (name, values) in zip(panels, maps.items(), strict=False):
        drawn = axes.imshow(values, vmin=low, vmax=high, cmap=colours)
        axes.set_title(name, fontsize=7)
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    figure.colorbar(drawn, ax=panels[: len(maps)], shrink=0.7)
    figure.suptitle(title, fontsize=8)
    return figure, panels[len(maps) :]


def save_figure(figure: Any, path: StrPath, **options: Any) -> None:
    """Writes a figure of matplotlib as PNG, atomically; options are those of its `savefig`."""
    with atomic_file(path) as partial:
        figure.savefig(partial, format="png", **options)
