"""Loads exported folders and prints the answers of each: run by tests in environments of any kind.

Usage: python exported.py IMAGES_JSON FOLDER...

Each folder is loaded in a fork of its own, off a process that has imported torch and transformers.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module

QUESTIONS = ["Is it red?", "What is shown in this image of tissue?", "Why?"]


def answer(folder: str, images: list[str], mode: str) -> list[list[int]]:
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    trust = {}
    if mode == "remote":
        for package in ("pallava", "pathcore"):
            sys.modules[package] = None  # type: ignore[assignment]
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
    for package in ("torch", "transformers.models.llama.modeling_llama"):
        import_module(package)
    images, *folders = json.loads(sys.argv[1]), *sys.argv[2:]
    for folder in folders:
        sys.stdout.flush()
        if not (child := os.fork()):
            print("ANSWERS", json.dumps([folder, answer(folder, images, "remote")]), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(f"{folder}: failed")
