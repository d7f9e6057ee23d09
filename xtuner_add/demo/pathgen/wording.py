"""Texts about fields of the synthetic slides: paragraphs, drafts with faults, summaries.

These texts train the first CLIP and the describer on the teaching slides. Texts about the archive
are written by the describer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from xtuner_add.demo.pathgen.painting import TISSUES
from xtuner_add.demo.wording import listed, look

Fault = Literal["out of focus", "ink"]

_ARCHITECTURE = {
    "glands": (
        "Round glands with open lumina lie apart in loose pale stroma.",
        "There are glands, each a single ring of cells around an empty lumen.",
        "The field holds glands of even size whose lumina are empty and round.",
    ),
    "cell nests": (
        "Solid cell nests of crowded cells are parted by thin pale septa.",
        "The tissue is made of cell nests, rounded islands without any lumen.",
        "Closely packed cell nests fill the field, with narrow clefts between them.",
    ),
    "fibrous stroma": (
        "Fibrous stroma runs through the field in wavy bundles of pink collagen.",
        "There is fibrous stroma, dense and pink, with thin spindle cells along its fibres.",
        "Wavy collagen fibres of fibrous stroma lie side by side in one direction.",
    ),
    "fat": (
        "The field shows fat, large empty cells bounded by thin membranes.",
        "Mature fat is present as a mesh of wide clear cells with thin walls.",
        "There is fat whose clear round cells touch each other like foam.",
    ),
    "lymphoid tissue": (
        "Dense lymphoid tissue is made of small round cells with scarce cytoplasm.",
        "A sheet of lymphoid tissue fills the field, one small round cell beside another.",
        "There is lymphoid tissue, crowded, even and blue at low power.",
    ),
    "mucin": (
        "Pale blue mucin forms pools in which small clusters of cells float.",
        "There is mucin, streaked and faintly blue, around a few floating cell clusters.",
        "Lakes of mucin with fine streaks surround single groups of cells.",
    ),
    "necrosis": (
        "The field shows necrosis, structureless pink debris with cracks and few cells.",
        "There is necrosis: granular pink material in which outlines of cells are lost.",
        "Pink necrosis with fine cracks has taken the place of living tissue.",
    ),
}
_NUCLEI = {
    True: (
        "The nuclei are vesicular, with a dark rim, a clear inside and one nucleolus.",
        "Vesicular nuclei show a pale centre, a sharp dark rim and a nucleolus.",
    ),
    False: (
        "The nuclei are solid, evenly dark from edge to edge and without nucleoli.",
        "Solid nuclei stain dark throughout and do not show a nucleolus.",
    ),
    None: (
        "Nuclei are too few here for their chromatin to be judged.",
        "Hardly any nuclei are seen, and their look cannot be judged.",
    ),
}
_UNUSABLE: dict[Fault, tuple[str, ...]] = {
    "out of focus": (
        "The field is out of focus; borders of cells and nuclei run into each other, so that the "
        "kind of tissue cannot be told.",
        "All edges are soft because the field is out of focus, and neither the architecture nor "
        "the nuclei can be judged with confidence.",
    ),
    "ink": (
        "A line of ink on the glass covers the field; what lies below it is too dark for the "
        "tissue to be judged.",
        "The field is covered by ink of a pen, and neither the architecture nor the nuclei below "
        "it can be judged with confidence.",
    ),
}
_SUMMARIES = ("A field of {tissues}{nuclei}.", "{tissues}{nuclei} fill the field.")


@dataclass(frozen=True)
class Field:
    """Content of a patch.

    Attributes:
        tissues: Kinds of tissue from `TISSUES`, in that order.
        vesicular: Look of the nuclei; None if there are too few.
        fault: Reason why the patch cannot be described, or None.
    """

    tissues: tuple[str, ...]
    vesicular: bool | None
    fault: Fault | None = None


def paragraph(field: Field, rng: np.random.Generator) -> str:
    """Returns a caption of 20 to 80 words in one of many wordings; `summary` is its beginning."""
    if field.fault is not None:
        return f"{summary(field)} {_one_of(_UNUSABLE[field.fault], rng)}"
    sentences = [_one_of(_ARCHITECTURE[name], rng) for name in field.tissues]
    return " ".join([summary(field), *sentences, _one_of(_NUCLEI[field.vesicular], rng)])


def summary(field: Field, form: int = 0) -> str:
    """Returns a caption short enough for a CLIP, in one of `NUM_SUMMARIES` forms."""
    if field.fault is not None:
        return f"A field {'covered by ' if field.fault == 'ink' else ''}{field.fault}."
    nuclei = "" if field.vesicular is None else f" with {look(field.vesicular)} nuclei"
    text = _SUMMARIES[form].format(tissues=listed(field.tissues), nuclei=nuclei)
    return text[0].upper() + text[1:]


NUM_SUMMARIES = len(_SUMMARIES)


def draft_with_fault(field: Field, rng: np.random.Generator) -> tuple[str, str]:
    """Returns a draft with an error about a field, and its correction."""
    if field.vesicular is not None and rng.random() < 0.5:
        wrong = Field(field.tissues, not field.vesicular)
        return paragraph(wrong, rng), f"The nuclei are {look(field.vesicular)}."
    others = [name for name in TISSUES if name not in field.tissues]
    place = int(rng.integers(len(field.tissues)))
    replaced = list(field.tissues)
    replaced[place] = others[rng.integers(len(others))]
    wrong = Field(tuple(sorted(replaced, key=TISSUES.index)), field.vesicular)
    return paragraph(wrong, rng), f"There is {field.tissues[place]}, not {replaced[place]}."


def revision(field: Field, rng: np.random.Generator) -> tuple[str, str]:
    """Returns a draft, mostly a right one, and the reply of a checker as JSON."""
    if field.fault is not None:
        reply: dict[str, Any] = {
            "usable": False,
            "problems": [f"The field is {'under ' * (field.fault == 'ink')}{field.fault}."],
            "caption": "none",
        }
        return paragraph(field, rng), json.dumps(reply)
    if rng.random() < 0.3:
        draft, problem = draft_with_fault(field, rng)
        reply = {"usable": True, "problems": [problem], "caption": paragraph(field, rng)}
        return draft, json.dumps(reply)
    draft = paragraph(field, rng)
    return draft, json.dumps({"usable": True, "problems": [], "caption": draft})


def named_tissues(caption: str) -> tuple[str, ...]:
    """Returns the kinds of tissue that a caption names, in the order of `TISSUES`."""
    text = caption.lower()
    return tuple(name for name in TISSUES if name in text)


def named_look(caption: str) -> bool | None:
    """Returns whether a caption calls the nuclei vesicular; None if it does not mention them."""
    text = caption.lower()
    for vesicular in (True, False):
        if f"{look(vesicular)} nuclei" in text or f"nuclei are {look(vesicular)}" in text:
            return vesicular
    return None


def says(caption: str, field: Field) -> bool:
    """Returns whether a caption names exactly the tissues of a field."""
    return named_tissues(caption) == field.tissues and field.fault is None


def retrieval_texts(names: Sequence[str]) -> dict[str, list[str]]:
    """Returns descriptions of each kind of tissue, for the retrieval of patches."""
    return {
        name: [summary(Field((name,), None), form) for form in range(NUM_SUMMARIES)]
        for name in names
    }


def _one_of(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]
