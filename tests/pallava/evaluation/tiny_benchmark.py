"""A few questions about the recorded images, as PathVQA files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.pallava import goldens

PICTURES = ("sq_big.png", "tall_3.png", "strip_8.png", "small_sq.png")
TEXTS = (
    ("Is fibrosis shown?", "yes", "yes/no"),
    ("What?", "liver", "other"),
    ("How many nuclei are in this field of view?", "3", "number"),
)


def make_data(root: Path, num_questions: int = 11) -> Path:
    """Writes `test.json` and `images/`; returns the file."""
    (root / "images").mkdir(parents=True)
    for name in PICTURES:
        shutil.copy(goldens.GOLDEN / "anyres" / name, root / "images" / name)
    rows = {}
    for number in range(num_questions):
        text, answer, kind = TEXTS[number % len(TEXTS)]
        rows[f"q{number}"] = {
            "question": text,
            "image": PICTURES[number % len(PICTURES)],
            "answer": answer,
            "answer_type": kind,
            "question_type": text.split()[0].lower(),
        }
    path = root / "test.json"
    path.write_text(json.dumps(rows))
    return path
