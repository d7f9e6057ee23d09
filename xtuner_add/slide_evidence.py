"""Writes the tiles that answers about slides depend on as GeoJSON for QuPath."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pallava.inference.assistant import Assistant
    from pallava.inference.evidence import Evidence
    from pallava.slide_bags import SlideBag
    from wsi.geojson import Colour

SUFFIX = ".geojson"

_COLOURS: tuple[Colour, ...] = (
    (214, 40, 57), (36, 99, 180), (229, 140, 0), (20, 130, 90), (130, 70, 160), (90, 90, 90),
)  # fmt: skip


class EvidenceFiles:
    """Answers questions about slides, and writes a file of evidence per slide.

    Args:
        path: A `.geojson` file for one slide, or a folder for `SLIDE.geojson`.
        slides: The slides or features files, for their number and names.

    Raises:
        ValueError: If `path` is a file and there are several slides, or if two slides of a folder
            have the same name.
    """

    def __init__(self, path: Path, slides: Sequence[Path]) -> None:
        self.path = path
        self.is_file = path.suffix == SUFFIX
        if self.is_file and len(slides) > 1:
            raise ValueError(f"--evidence {path}: one file for {len(slides)} slides; name a folder")
        twice = [name for name, count in Counter(s.stem for s in slides).items() if count > 1]
        if twice:
            raise ValueError(
                f"--evidence {path}: several slides are called {twice[0]}, and so would be their "
                "files; ask about them one by one"
            )

    def answer(
        self,
        model: Assistant,
        slide: Path,
        bag: SlideBag,
        questions: Sequence[str],
        max_new_tokens: int,
    ) -> list[dict[str, Any]]:
        """Answers the questions about a slide, prints and writes; returns the rows of answers."""
        from pallava.inference.evidence import SlideAnswer, find_evidence
        from wsi.geojson import write_geojson

        rows: list[dict[str, Any]] = []
        squares: list[dict[str, Any]] = []
        for number, question in enumerate(questions, 1):
            answer = SlideAnswer(model, bag, question, max_new_tokens)
            evidence = find_evidence(answer)
            click.echo(f"{slide}\n  {question}\n  {answer.text}\n  evidence: {evidence}")
            label = f"{question} {answer.text}"
            squares += evidence_squares(
                model.anyres.features_file(slide), slide.stem, evidence, label, number
            )
            rows.append(
                {
                    "image": str(slide),
                    "question": question,
                    "answer": answer.text,
                    "evidence": evidence.fields(),
                }
            )
        target = self.path if self.is_file else self.path / f"{slide.stem}{SUFFIX}"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_geojson(target, squares)
        return rows


def evidence_squares(
    features_file: Path, name: str, evidence: Evidence, label: str, number: int = 1
) -> Iterator[dict[str, Any]]:
    """Yields the cited tiles as GeoJSON squares, with rank and score.

    Args:
        features_file: Features of the slide, with the positions of the tiles.
        name: Id of the slide.
        evidence: Evidence of one answer.
        label: Question and answer, shown by QuPath.
        number: Number of the question, which decides class and colour.
    """
    import numpy as np

    from pallava.slide_bags import read_squares
    from wsi.geojson import square_features

    if not evidence.is_told:
        return
    coords, side = read_squares(features_file)
    cited = evidence.cited.numpy()
    kind = f"Evidence {number}"
    yield from square_features(
        coords[cited],
        side,
        f"{name}/evidence/{number}",
        classes=[kind] * len(cited),
        colours={kind: _COLOURS[(number - 1) % len(_COLOURS)]},
        measurements={
            "evidence score": evidence.scores.numpy()[cited],
            "evidence rank": np.arange(1, len(cited) + 1),
        },
        labels=[label] * len(cited),
    )
