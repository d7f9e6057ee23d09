"""Reports of a cleaning job: a Markdown table, and an HTML page with samples of dropped rows."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from pathcore.images import ImageError, data_url, load_image, path_inside

_THUMBNAIL_PX = 160
_CELL_CHARACTERS = 160


def write_tables(path: Path, report: Mapping[str, Any]) -> None:
    """Writes counts and samples as Markdown."""
    lines = [
        f"# Cleaning of {report['rows_file']}",
        "",
        f"{report['num_kept']:,} of {report['num_rows']:,} rows kept, "
        f"{report['num_skipped']:,} could not be read.",
        "",
        "| step | seen | dropped | fraction | unreadable |",
        "|---|--:|--:|--:|--:|",
    ]
    for step in report["steps"]:
        lines.append(
            f"| {step['name']} | {step['seen']:,} | {step['dropped']:,} | {_fraction(step)} | "
            f"{step['unusable']:,} |"
        )
    if index := report.get("index"):
        lines += ["", f"{index['num_missing']:,} of {index['num_entries']:,} entries of the index "
                  "name no row of this file (index_missing.txt)."]  # fmt: skip
    for step in report["steps"]:
        if step["samples"]:
            lines += [
                "",
                f"## Dropped by {step['name']}",
                "",
                "| id | reason | text |",
                "|---|---|---|",
            ]
            for sample in step["samples"]:
                cells = (sample["id"], sample["reason"], sample["text"])
                lines.append(f"| {' | '.join(map(_cell, cells))} |")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_page(path: Path, report: Mapping[str, Any], image_folder: Path) -> None:
    """Writes a self-contained HTML file with counts and samples, images included."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("pallava.converters.cleaning") / "page.html.j2"
    template = environment.from_string(source.read_text(encoding="utf-8"))
    steps = [
        {
            **step,
            "fraction": _fraction(step),
            "samples": [
                {
                    **sample,
                    "pictures": [_thumbnail(image_folder, name) for name in sample["images"]],
                }
                for sample in step["samples"]
            ],
        }
        for step in report["steps"]
    ]
    path.write_text(template.render(report=report, steps=steps) + "\n", encoding="utf-8")


def _fraction(step: Mapping[str, Any]) -> str:
    return f"{step['dropped'] / step['seen']:.1%}" if step["seen"] else "-"


def _cell(text: str) -> str:
    short = text if len(text) <= _CELL_CHARACTERS else f"{text[:_CELL_CHARACTERS]}..."
    short = " ".join(short.split())
    for mark in "\\`*_<>|[]":
        short = short.replace(mark, f"\\{mark}")
    return short


def _thumbnail(folder: Path, name: str) -> str:
    """Returns a small JPEG as a data URL; empty if the image cannot be read."""
    try:
        image = load_image(path_inside(folder, name))
    except ImageError:
        return ""  # the step that read the image has already reported it
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return data_url(image, "JPEG", quality=80)
