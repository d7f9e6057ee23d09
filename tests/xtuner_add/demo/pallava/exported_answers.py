"""Holds a demo's exported model to the training code, token for token.

Usage: python tests/xtuner_add/demo/pallava/exported_answers.py DEMO_FOLDER PYTHON [NUM_QUESTIONS]
PYTHON is the interpreter of an environment with transformers, without this package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pallava import load_model
from xtuner_add.demo.stages import read_jsonl

SCRIPT = Path(__file__).with_name("answers_alone.py")
MAX_NEW_TOKENS = 32


def rows_of(demo: Path, num_questions: int) -> list[dict[str, str]]:
    """Questions spread over the held-out slides."""
    rows = read_jsonl(demo / "data" / "held_out.jsonl")
    return rows[:: max(1, len(rows) // num_questions)][:num_questions]


def of_training_code(demo: Path, num_questions: int) -> list[list[int]]:
    """One question at a time, the adapter not merged."""
    model = load_model(demo / "llm", demo / "scale_invariant" / "hf", use_adapter=True)
    answers = []
    for row in rows_of(demo, num_questions):
        ids = torch.tensor([model.encode(row["question"], has_image=True)])
        pixels = [model.pixel_values(demo / "data" / row["image"])]
        options = model.generation_kwargs(MAX_NEW_TOKENS)
        answers.append(model.model.generate_answer(ids, pixels, **options)[0].tolist())
    return answers


def of_transformers(demo: Path, python: str, num_questions: int) -> list[list[int]]:
    """In batches, by the exported folder's own code."""
    names = ("PYTHON", "VIRTUAL_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(names)}
    with tempfile.TemporaryDirectory() as cache:
        questions = Path(cache) / "questions.jsonl"
        rows = rows_of(demo, num_questions)
        questions.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        folder = demo / "scale_invariant" / "model"
        result = subprocess.run(
            [python, str(SCRIPT), str(folder), str(demo / "data"), str(questions)],
            env=environment | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": cache},
            cwd=cache,
            capture_output=True,
            text=True,
            check=False,
        )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("ANSWERS ")]
    answers: list[list[int]] = json.loads(line.removeprefix("ANSWERS "))
    return answers


def differences(demo: Path, python: str, num_questions: int) -> list[int]:
    """Numbers of the questions with other ids; what follows an answer's end does not count."""
    ours = of_training_code(demo, num_questions)
    theirs = of_transformers(demo, python, num_questions)
    assert len(ours) == len(theirs) == num_questions
    return [
        number
        for number, (left, right) in enumerate(zip(ours, theirs, strict=True))
        # A batch is padded to its longest answer.
        if left != right[: len(left)] or len(set(right[len(left) :])) > 1
    ]


if __name__ == "__main__":
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 976
    wrong = differences(Path(sys.argv[1]), sys.argv[2], count)
    print(f"{count - len(wrong)} of {count} answers are equal token for token")
    sys.exit(bool(wrong))
