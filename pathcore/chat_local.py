"""Backend that runs a Hugging Face image-text-to-text model on this machine."""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathcore.chat_backends import Reply, Request, Sampling, open_image
from pathcore.device_claims import choose_device
from pathcore.extras import says_extra


@dataclass
class LocalBackend:
    """Any model that `AutoModelForImageTextToText` loads: LLaVA, an exported PA-LLaVA, others.

    Attributes:
        model: Folder, or name on the hub.
        sampling: Sampling parameters.
        batch_size: Number of requests per batch.
        device: `cpu`, `cuda`, ...; by default the GPU, if there is one.
        dtype: Data type of the weights: `float32`, `bfloat16`, ..., or `auto` for that of the
            checkpoint, which the attribute names after loading.
        generation: Keyword arguments of `generate` that override those of `sampling`, such as
            `num_beams`.
        trust_remote_code: Whether to run code that comes with the model, as an exported PA-LLaVA
            requires.

    Raises:
        OSError: If the model is neither a folder nor on the hub.
        ValueError: If the processor has no chat template, the weights do not fit the model, or
            `batch_size` is less than 1.
    """

    model: str
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 4
    device: str | None = None
    dtype: str = "auto"
    generation: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False
    kind: str = field(default="local", init=False)
    concurrency: int = field(default=1, init=False)
    endpoint: str = field(default="local", init=False)
    _model: Any = field(default=None, init=False, repr=False)
    _processor: Any = field(default=None, init=False, repr=False)

    @says_extra("a local model", "pathgen")
    def __post_init__(self) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from pathcore.weights import check_loading_report

        if self.batch_size < 1:
            raise ValueError(f"batch size: expected at least 1, found {self.batch_size}")
        if self.model[:1] in ("/", ".", "~") and not Path(self.model).is_dir():
            raise FileNotFoundError(f"model {self.model}: no such folder")
        trust = {"trust_remote_code": self.trust_remote_code}
        self.device = str(choose_device(self.device))
        self._processor = AutoProcessor.from_pretrained(self.model, **trust)
        if not getattr(self._processor, "chat_template", None):
            raise ValueError(f"model {self.model}: its processor has no chat template")
        model, report = AutoModelForImageTextToText.from_pretrained(
            self.model,
            torch_dtype=self.dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # lists them in the report instead of raising
            **trust,
        )
        check_loading_report(report, model, what="image-text-to-text model", source=self.model)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self._model = model.to(self.device).eval()
        tokenizer = self._processor.tokenizer
        tokenizer.padding_side = "left"  # generation continues from the last position
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.model = _model_identity(self.model)
        self._lock = threading.Lock()

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Returns one reply per request."""
        # Requests with and without an image form separate batches, since some processors (Mllama's)
        # reject a mix.
        replies: dict[int, Reply] = {}
        with self._lock:
            for with_image in (True, False):
                group, images = [], []
                for index, request in enumerate(requests):
                    if (request.image is not None) is not with_image:
                        continue
                    try:
                        if request.image is not None:
                            images.append(open_image(request.image))
                    except ValueError as error:
                        replies[index] = Reply("", 0, 0, fault=str(error), blame="image")
                        continue
                    group.append(index)
                if group:
                    found = self._generate([requests[index] for index in group], images)
                    replies.update(zip(group, found, strict=True))
        return [replies[index] for index in range(len(requests))]

    def close(self) -> None:
        """Releases the model."""
        self._model = None

    def _generate(self, requests: Sequence[Request], images: list[Any]) -> list[Reply]:
        import torch

        prompts = [
            self._processor.apply_chat_template(
                request.messages({"type": "image"} if request.image else None),
                tokenize=False,
                add_generation_prompt=True,
            )
            for request in requests
        ]
        given = {"images": [[image] for image in images]} if images else {}
        inputs = self._processor(text=prompts, padding=True, return_tensors="pt", **given)
        inputs = inputs.to(self.device)
        if "token_type_ids" not in inspect.signature(self._model.forward).parameters:
            inputs.pop(
                "token_type_ids", None
            )  # some tokenizers return them, and generate() rejects them
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self._model.dtype)
        if self.sampling.seed is not None:
            torch.manual_seed(self.sampling.seed)
        with torch.inference_mode():
            ids = self._model.generate(**inputs, **self._options())
        return self._read(inputs, ids)

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": self.sampling.max_tokens, "do_sample": False}
        if self.sampling.temperature:
            options |= {"do_sample": True, "temperature": self.sampling.temperature}
        options |= self.generation
        return {**options, "pad_token_id": self._processor.tokenizer.pad_token_id}

    def _read(self, inputs: Any, ids: Any) -> list[Reply]:
        width = inputs["input_ids"].shape[1]
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        replies = []
        for row, mask in zip(ids[:, width:].tolist(), inputs["attention_mask"], strict=True):
            stop = next((n for n, token in enumerate(row) if token in ends), None)
            text = self._processor.tokenizer.decode(row[:stop], skip_special_tokens=True)
            fault = None
            is_cut = stop is None and len(row) >= self.sampling.max_tokens
            if is_cut and self.sampling.cut_is_fault:
                fault = "the reply was cut off at the maximum number of tokens"
            length = len(row) if stop is None else stop + 1
            replies.append(Reply(text.strip(), int(mask.sum()), length, fault=fault))
        return replies


def _model_identity(model: str) -> str:
    """Returns a name for provenance and cache keys that changes with the files of a folder."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    rows = [
        [path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    return f"{folder.resolve().name}@{digest[:12]}"
