"""Loads an exported folder and prints the answers: run by tests in environments of any kind.

Usage: python exported.py FOLDER IMAGES_JSON {package,remote}
"""

from __future__ import annotations

import json
import sys

QUESTIONS = ["Is it red?", "What is shown in this image of tissue?", "Why?"]


def answer(folder: str, images: list[str], mode: str) -> list[list[int]]:
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    trust = {}
    if mode == "remote":
        sys.modules["pallava"] = None  # type: ignore[assignment]
        trust = {"trust_remote_code": True}
    else:
        import pallava.modeling.hf  # noqa: F401
    model = AutoModelForImageTextToText.from_pretrained(folder, torch_dtype=torch.float32, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    assert type(processor).__name__ == "PALLaVAProcessor"
    prompts = []
    for question in QUESTIONS[: len(images)]:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(messages, tokenize=False))
    opened = [Image.open(path) for path in images]
    inputs = processor(images=opened, text=prompts, return_tensors="pt")
    ids = model.eval().generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert len(processor.batch_decode(ids, skip_special_tokens=True)) == len(images)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


if __name__ == "__main__":
    print("ANSWERS", json.dumps(answer(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3])))
