"""The demo's data on disk: slides, image-text pairs, conversations, held-out questions.

| file | content |
|---|---|
| `slides/*.png`, `fields/*.png` | whole slides; crops of training slides at full resolution |
| `pairs.jsonl` | `id`, `image`, `caption`: PLIP pretraining, slides and fields |
| `captions.jsonl` | LLaVA conversations that ask for a report: domain alignment |
| `conversations.jsonl` | LLaVA conversations of questions: instruction tuning |
| `held_out.jsonl` | one question per line, about slides that occur in none of the above |
| `plans.jsonl` | what every slide shows |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathcore.rows import write_rows
from xtuner_add.demo.pallava import wording
from xtuner_add.demo.pallava.slides import Slide, SlidePlan, draw_slide
from xtuner_add.demo.stages import draw_all
from xtuner_add.demo.tissue import CELLULAR, PATTERNS

SHAPES_PX: tuple[tuple[int, int, int], ...] = (
    *((256, 128, 3), (128, 256, 3), (252, 126, 2), (124, 248, 2)),
    *((192, 128, 2), (128, 192, 2), (188, 120, 2), (120, 186, 1)),
    *((128, 128, 2), (126, 122, 1)),
)
"""Width, height and number of tissues of the slides in turn: grids 4x2, 2x4, 3x2, 2x3, 2x2."""

_NAMED_FRACTION = 0.2
"""Minimum fraction of a field that a tissue must cover to be named in its caption."""

_JUDGED_FRACTION = 0.25
"""Minimum fraction of a field that tissue rich in nuclei must cover for their look to be named."""


@dataclass(frozen=True)
class DataSizes:
    """Amounts of data.

    Attributes:
        num_train: Training slides.
        num_held_out: Slides for questions.
        tile_px: Side of the encoder's input.
        fields_per_slide: Crops of each training slide for PLIP pretraining.
        questions_per_tissue: Held-out questions about each tissue, half of them with answer yes.
    """

    num_train: int = 600
    num_held_out: int = 160
    tile_px: int = 64
    fields_per_slide: int = 5
    questions_per_tissue: int = 48


def plan_slides(num_slides: int, part: str, rng: np.random.Generator) -> list[SlidePlan]:
    """Plans slides in which every shape, tissue and look of the nuclei is about equally frequent.

    Each slide has a tissue rich in nuclei, so that their look can be judged.
    """
    seeds = rng.integers(2**31, size=num_slides)
    looks = np.arange(num_slides) % 2 == 0
    rng.shuffle(looks)
    plans = []
    for index in range(num_slides):
        width, height, num_tissues = SHAPES_PX[index % len(SHAPES_PX)]
        cellular = CELLULAR[rng.integers(len(CELLULAR))]
        others = [name for name in PATTERNS if name != cellular]
        weights = np.array([0.45 if name in CELLULAR else 1.0 for name in others])
        picked = rng.choice(others, num_tissues - 1, replace=False, p=weights / weights.sum())
        tissues = [cellular, *map(str, picked)]
        rng.shuffle(tissues)
        plans.append(
            SlidePlan(width, height, tuple(tissues), bool(looks[index]), part, int(seeds[index]))
        )
    return plans


def build(folder: Path, sizes: DataSizes, seed: int, workers: int = 2) -> dict[str, int]:
    """Writes all data files of the demo to `folder`.

    Returns:
        Numbers of slides, pairs, conversations and held-out questions.
    """
    rng = np.random.default_rng([seed, 1])
    plans = plan_slides(sizes.num_train, "train", rng)
    plans += plan_slides(sizes.num_held_out, "held_out", rng)
    names = [f"{plan.part}_{index:04d}" for index, plan in enumerate(plans)]
    for sub in ("slides", "fields"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    jobs = [(folder, name, plan, sizes) for name, plan in zip(names, plans, strict=True)]
    pairs = [row for rows in draw_all(_draw_and_save, jobs, workers) for row in rows]
    by_name = dict(zip(names, plans, strict=True))
    train = {name: plan for name, plan in by_name.items() if plan.part == "train"}
    held_out = {name: plan for name, plan in by_name.items() if plan.part == "held_out"}
    questions = list(held_out_questions(held_out, sizes.questions_per_tissue, rng))
    tables: dict[str, Sequence[Mapping[str, Any]]] = {
        "pairs": pairs,
        "captions": list(caption_conversations(train, rng)),
        "conversations": list(question_conversations(train, rng)),
        "held_out": questions,
        "plans": [{"id": name, **asdict(plan)} for name, plan in by_name.items()],
    }
    for table, rows in tables.items():
        write_rows(folder / f"{table}.jsonl", rows)
    return {"slides": len(plans), **{table: len(rows) for table, rows in tables.items()}}


def caption_conversations(
    plans: Mapping[str, SlidePlan], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Yields one request for a report per slide."""
    for name, plan in plans.items():
        request = wording.CAPTION_REQUESTS[rng.integers(len(wording.CAPTION_REQUESTS))]
        report = wording.caption(plan.tissues, plan.vesicular, rng)
        yield _conversation(name, [(request, report)])


def question_conversations(
    plans: Mapping[str, SlidePlan], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Yields two conversations of a few questions per slide.

    Yes and no are equally frequent for every closed question. The two questions about the look of
    the nuclei go to different conversations, so that neither gives the other away.
    """
    asked = balanced_tissue_questions(plans, len(plans), rng)
    for name, plan in plans.items():
        listing, count, nuclear_look = wording.open_questions(plan.tissues, plan.vesicular)
        tissue = asked[name]
        rng.shuffle(tissue)
        half = (len(tissue) + 1) // 2
        groups = [
            [wording.nuclei_question(plan.vesicular), *tissue[:half]],
            [nuclear_look, (listing, count)[rng.integers(2)], *tissue[half:]],
        ]
        for group in groups:
            rng.shuffle(group)
            yield _conversation(name, [(question.text, question.answer) for question in group])


def held_out_questions(
    plans: Mapping[str, SlidePlan], per_tissue: int, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Yields questions on held-out slides; each closed question has equally many yes and no."""
    asked = balanced_tissue_questions(plans, per_tissue, rng)
    for name, plan in plans.items():
        questions = [
            *asked[name],
            wording.nuclei_question(plan.vesicular),
            *wording.open_questions(plan.tissues, plan.vesicular),
        ]
        for index, question in enumerate(questions):
            yield {
                "id": f"{name}_{index}",
                "image": f"slides/{name}.png",
                "kind": question.kind,
                "question": question.text,
                "answer": question.answer,
            }


def balanced_tissue_questions(
    plans: Mapping[str, SlidePlan], at_most: int, rng: np.random.Generator
) -> dict[str, list[wording.Question]]:
    """Returns questions about the presence of tissues by slide, with as many yes as no per tissue.

    Args:
        plans: The slides.
        at_most: Maximum number of questions per tissue.
        rng: Generator that chooses the slides.
    """
    asked: dict[str, list[wording.Question]] = {name: [] for name in plans}
    for tissue in PATTERNS:
        groups: tuple[list[str], list[str]] = ([], [])
        for name, plan in plans.items():
            groups[tissue in plan.tissues].append(name)
        count = min(len(groups[0]), len(groups[1]), at_most // 2)
        for group in groups:
            for name in rng.permutation(group)[:count]:
                asked[name].append(wording.tissue_question(tissue, plans[name].tissues))
    return asked


def text_corpus(num_texts: int, rng: np.random.Generator) -> list[list[tuple[str, str]]]:
    """Returns texts for the base language model: reports, and questions about a given report.

    There are no images; the slides exist only as plans. Each text is a list of turns
    `(user, assistant)`.
    """
    names = list(PATTERNS)
    texts = []
    for _ in range(num_texts):
        count = int(rng.integers(1, 4))
        tissues = [str(name) for name in rng.choice(names, count, replace=False)]
        vesicular = bool(rng.integers(2))
        report = wording.caption(tissues, vesicular, rng)
        if rng.random() < 0.25:
            request = wording.CAPTION_REQUESTS[rng.integers(len(wording.CAPTION_REQUESTS))]
            texts.append([(request, report)])
            continue
        present, absent = tissues[rng.integers(count)], [n for n in names if n not in tissues]
        questions = [
            wording.tissue_question(present, tissues),
            wording.tissue_question(absent[rng.integers(len(absent))], tissues),
            wording.nuclei_question(vesicular),
            *wording.open_questions(tissues, vesicular),
        ]
        rng.shuffle(questions)
        turns = [(question.text, question.answer) for question in questions[:3]]
        texts.append([(f"{report}\n{turns[0][0]}", turns[0][1]), *turns[1:]])
    return texts


def majority_share(rows: Iterable[Mapping[str, Any]]) -> float:
    """Returns the accuracy if each question text gets its most frequent answer."""
    answers: dict[str, Counter[str]] = {}
    for row in rows:
        answers.setdefault(row["question"], Counter())[row["answer"]] += 1
    right = sum(max(counter.values()) for counter in answers.values())
    total = sum(sum(counter.values()) for counter in answers.values())
    return right / total


def _conversation(name: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    conversations = []
    for index, (question, answer) in enumerate(turns):
        mark = "<image>\n" if index == 0 else ""
        conversations.append({"from": "human", "value": mark + question})
        conversations.append({"from": "gpt", "value": answer})
    return {"id": name, "image": f"slides/{name}.png", "conversations": conversations}


def _draw_and_save(job: tuple[Path, str, SlidePlan, DataSizes]) -> list[dict[str, str]]:
    """Draws a slide, saves it with its fields, and returns their image-text pairs."""
    folder, name, plan, sizes = job
    slide = draw_slide(plan, sizes.tile_px)
    Image.fromarray(slide.image).save(folder / "slides" / f"{name}.png")
    if plan.part != "train":
        return []
    pairs = [
        {
            "id": name,
            "image": f"slides/{name}.png",
            "caption": wording.overview_caption(plan.tissues),
        }
    ]
    rng = np.random.default_rng([plan.seed, 2])
    for index in range(sizes.fields_per_slide):
        crop, caption = _field(plan, slide, sizes.tile_px, rng)
        file = f"fields/{name}_{index}.png"
        Image.fromarray(crop).save(folder / file)
        pairs.append({"id": f"{name}_{index}", "image": file, "caption": caption})
    return pairs


def _field(
    plan: SlidePlan, slide: Slide, side_px: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], str]:
    """Crops a field at full resolution around a point in a tissue; returns it with a caption."""
    rows, columns = np.nonzero(slide.regions == rng.integers(len(plan.tissues)))
    spot = rng.integers(len(rows))
    top, left = (
        int(np.clip(position - side_px // 2, 0, side - side_px))
        for position, side in zip((rows[spot], columns[spot]), slide.regions.shape, strict=True)
    )
    window = (slice(top, top + side_px), slice(left, left + side_px))
    regions = slide.regions[window]
    shares = {name: np.mean(regions == index) for index, name in enumerate(plan.tissues)}
    named = min(_NAMED_FRACTION, max(shares.values()))
    tissues = [name for name, share in shares.items() if share >= named]
    cellular = sum(share for name, share in shares.items() if name in CELLULAR)
    vesicular = plan.vesicular if cellular >= _JUDGED_FRACTION else None
    return slide.image[window], wording.field_caption(tissues, vesicular)
