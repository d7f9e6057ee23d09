"""Answers held-out questions with transformers alone: run in an environment without this package.

Usage: python answers_alone.py MODEL_FOLDER DATA_FOLDER QUESTIONS_JSONL. Prints the generated ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

BATCH_SIZE = 16
MAX_NEW_TOKENS = 32


def main(folder: str, data: Path, questions: Path) -> None:
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    answers = []
    for start in range(0, len(rows), BATCH_SIZE):
        batch = rows[start : start + BATCH_SIZE]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": f"<image>\n{row['question']}"}], tokenize=False
            )
            for row in batch
        ]
        inputs = processor(images=[Image.open(data / row["image"]) for row in batch], text=prompts)
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answers += ids[:, inputs["input_ids"].shape[1] :].tolist()
    print("ANSWERS", json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
