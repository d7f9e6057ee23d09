"""Slides on disk with their ground truth, and the lessons and test classes derived from it.

| file | content |
|---|---|
| `slides/GROUP/*.tif` | input of the commands |
| `truth/*.png` | tissue and artefact of every painted pixel; only for teaching and scores |
| `slides/plans.json` | content of every slide |
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathcore.files import write_json
from pathcore.rows import write_rows
from xtuner_add.demo.pathgen import wording
from xtuner_add.demo.pathgen.painting import (
    BLUR,
    CLEAN,
    INK,
    SCALE,
    TISSUES,
    SlidePlan,
    paint_slide,
    plan_slides,
    write_slide,
)
from xtuner_add.demo.stages import draw_all, read_jsonl
from xtuner_add.demo.tissue import CELLULAR
from xtuner_add.demo.wording import look

GROUPS = ("teaching", "archive", "held_out")
PATCH_PX = 64
"""Side of a patch, at `painting.PAINTED_MPP`."""

_ARTEFACT_STEP = 16
_NAMED_FRACTION = 0.2
"""Minimum fraction of a patch's tissue for a kind of tissue to be named."""
_JUDGED_FRACTION = 0.25
"""Minimum fraction of a patch with tissue rich in nuclei for the look of its nuclei to be named."""
_PURE_FRACTION = 0.85
"""Minimum fraction of a patch for one kind of tissue to be its class."""
_FAULT_FRACTION = 0.35
"""Minimum fraction of a patch with ink or blur for the patch to count as spoilt."""
_DOUBTFUL_FRACTION = 0.03
"""Minimum fraction of a patch with ink or blur for the patch to be excluded from the test."""


@dataclass(frozen=True)
class Sizes:
    """Number of slides per group, and their painted size."""

    teaching: int = 12
    archive: int = 24
    held_out: int = 8
    width_px: int = 1024
    height_px: int = 768


@dataclass(frozen=True)
class PatchTruth:
    """Ground truth of a patch, from the painter.

    Attributes:
        field: Content that captions can describe.
        tissue: Its only kind of tissue, or None if it has several or much glass.
        clean: Whether it is free of ink and blur.
    """

    field: wording.Field
    tissue: str | None
    clean: bool


def plan_all(sizes: Sizes, seed: int) -> dict[str, list[SlidePlan]]:
    """Returns the plans of all groups; one archive slide does not state its resolution."""
    rng = np.random.default_rng([seed, 1])
    size_px = (sizes.width_px, sizes.height_px)
    plans = {
        group: plan_slides(
            group,
            getattr(sizes, group),
            size_px,
            "held_out" if group == "held_out" else "train",
            rng,
        )
        for group in GROUPS
    }
    plans["archive"][-1] = replace(plans["archive"][-1], has_mpp=False)
    return plans


def paint_all(folder: Path, sizes: Sizes, seed: int) -> None:
    """Paints every slide into `folder/slides` and its truth into `folder/truth`."""
    plans = plan_all(sizes, seed)
    jobs = [(folder, group, plan) for group in GROUPS for plan in plans[group]]
    for _ in draw_all(_paint, jobs):
        pass
    rows = [{"group": group, **asdict(plan)} for group in GROUPS for plan in plans[group]]
    write_json(folder / "slides" / "plans.json", rows)


def patch_truth(folder: Path, patch: str) -> PatchTruth:
    """Returns the ground truth of a patch.

    Args:
        folder: Folder of the demo.
        patch: Name given by `xtuner-add extract`: `SLIDE_X_Y`, left and top in level-0 pixels.
    """
    name, x, y = parse_patch_name(patch)
    regions, artefacts = _truth(folder / "truth" / f"{name}.png")
    left, top = x // SCALE, y // SCALE
    window = (slice(top, top + PATCH_PX), slice(left, left + PATCH_PX))
    tissue = regions[window]
    shares = {kind: float(np.mean(tissue == index)) for index, kind in enumerate(TISSUES)}
    whole = max(sum(shares.values()), 1e-9)
    named = tuple(kind for kind in TISSUES if shares[kind] >= _NAMED_FRACTION * whole)
    cellular = sum(shares[kind] for kind in CELLULAR)
    blur, ink = (float(np.mean(artefacts[window] == kind)) for kind in (BLUR, INK))
    fault: wording.Fault | None = None
    if max(blur, ink) >= _FAULT_FRACTION:
        fault = "ink" if ink >= blur else "out of focus"
    field = wording.Field(
        named, _looks(folder)[name] if cellular >= _JUDGED_FRACTION else None, fault
    )
    first = max(shares, key=lambda kind: shares[kind])
    return PatchTruth(
        field,
        tissue=first if shares[first] >= _PURE_FRACTION else None,
        clean=float(np.mean(artefacts[window] != CLEAN)) < _DOUBTFUL_FRACTION,
    )


def parse_patch_name(name: str) -> tuple[str, int, int]:
    """Returns slide, left and top of a patch."""
    slide, x, y = name.rsplit("_", 2)
    return slide, int(x), int(y)


def write_lessons(folder: Path, patches: Path, seed: int) -> dict[str, int]:
    """Writes the training data of the first CLIP and of the describer.

    Args:
        folder: Folder of the demo.
        patches: Patches of the teaching slides; `lessons.jsonl` and `pairs.jsonl` are added there.
        seed: Seed of the wordings.

    Returns:
        Numbers of patches.
    """
    rng = np.random.default_rng([seed, 2])
    lessons, pairs = [], []
    for name in _patch_names(patches):
        truth = patch_truth(folder, name)
        if not truth.field.tissues:
            continue
        image = f"{name}.png"
        lessons.append({"id": name, "image": image, "field": asdict(truth.field)})
        form = int(rng.integers(wording.NUM_SUMMARIES))
        pairs.append({"id": name, "image": image, "caption": wording.summary(truth.field, form)})
    write_rows(patches / "lessons.jsonl", lessons)
    write_rows(patches / "pairs.jsonl", pairs)
    return {"patches": len(lessons)}


def read_lessons(patches: Path) -> list[tuple[Path, wording.Field]]:
    """Returns image and ground truth of the teaching patches."""
    lessons = []
    for row in read_jsonl(patches / "lessons.jsonl"):
        field = row["field"] | {"tissues": tuple(row["field"]["tissues"])}
        lessons.append((patches / row["image"], wording.Field(**field)))
    return lessons


def exchange_captions(pairs: Path, out: Path) -> None:
    """Writes the same pairs with captions exchanged between images, as a control.

    Images with equal captions get all other captions equally often. A random permutation would
    leave some captions slightly more frequent for one kind of image, which a CLIP would learn.
    """
    rows = sorted(read_jsonl(pairs), key=lambda row: (row["caption"], row["id"]))
    captions = [row["caption"] for row in rows]
    step = _even_step(len(rows))
    dealt = [row | {"caption": captions[i * step % len(rows)]} for i, row in enumerate(rows)]
    write_rows(out, sorted(dealt, key=lambda row: row["id"]))


def _even_step(count: int) -> int:
    """Returns a step near the golden section that visits `count` places, neighbours far apart."""
    step = max(1, round(0.618034 * count))
    while math.gcd(step, count) != 1:
        step += 1
    return step


def write_tests(folder: Path, patches: Path, out: Path) -> dict[str, int]:
    """Sorts the held-out patches by their truth: class folders, and pairs for retrieval.

    Args:
        folder: Folder of the demo.
        patches: Patches of the held-out slides.
        out: Output folder for `tissue/CLASS/`, `look/CLASS/` and `pairs.jsonl` with `images/`.

    Returns:
        Number of patches by outcome.
    """
    counts: Counter[str] = Counter()
    shutil.rmtree(out, ignore_errors=True)
    pairs = []
    for name in _patch_names(patches):
        truth = patch_truth(folder, name)
        field, file = truth.field, patches / f"{name}.png"
        counts["patches"] += 1
        if not truth.clean or not field.tissues:
            counts["with ink or blur"] += 1
            continue
        _copy(file, out / "images" / file.name)
        image = f"images/{file.name}"
        pairs.append({"id": name, "image": image, "caption": wording.summary(field)})
        if truth.tissue is None:
            counts["of several tissues"] += 1
            continue
        counts["of one tissue"] += 1
        _copy(file, out / "tissue" / truth.tissue / file.name)
        if field.vesicular is not None:
            _copy(file, out / "look" / look(field.vesicular) / file.name)
    write_rows(out / "pairs.jsonl", pairs)
    return dict(counts)


def write_benchmarks(out: Path) -> None:
    """Writes both zero-shot tasks in the format of `clip-zero-shot --benchmark`."""
    tissue: dict[str, Any] = {
        "name": "tissue",
        "layout": {"kind": "folders"},
        "templates": ["{}.", "A field of {}.", "An area of {} in the section."],
        "classes": [{"name": n, "folders": [f"tissue/{n}"], "prompts": [n]} for n in TISSUES],
    }
    looks = [look(vesicular) for vesicular in (True, False)]
    nuclei: dict[str, Any] = {
        "name": "nuclear look",
        "layout": {"kind": "folders"},
        "templates": [f"A field of {kind} with {{}}." for kind in CELLULAR],
        "classes": [
            {"name": name, "folders": [f"look/{name}"], "prompts": [f"{name} nuclei"]}
            for name in looks
        ],
    }
    write_json(out / "tissue.json", tissue)
    write_json(out / "look.json", nuclei)


def _paint(job: tuple[Path, str, SlidePlan]) -> None:
    folder, group, plan = job
    slide = paint_slide(plan)
    write_slide(slide.image, folder / "slides" / group / f"{plan.name}.tif", has_mpp=plan.has_mpp)
    truth = (slide.regions + 1 + _ARTEFACT_STEP * slide.artefacts).astype(np.uint8)
    file = folder / "truth" / f"{plan.name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(truth).save(file)


@functools.lru_cache(maxsize=2)
def _truth(file: Path) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Reads the regions and artefacts of a slide."""
    values = np.asarray(Image.open(file))
    regions, artefacts = values % _ARTEFACT_STEP, values // _ARTEFACT_STEP
    return regions.astype(np.int8) - np.int8(1), artefacts.astype(np.int8)


@functools.lru_cache(maxsize=2)
def _looks(folder: Path) -> dict[str, bool]:
    rows = json.loads((folder / "slides" / "plans.json").read_text(encoding="utf-8"))
    return {row["name"]: row["vesicular"] for row in rows}


def _patch_names(patches: Path) -> Sequence[str]:
    return sorted(file.stem for file in patches.glob("*.png"))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
