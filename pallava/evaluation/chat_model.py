"""Endpoints and Hugging Face models under evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from pallava.evaluation.models import NoAnswer
from pallava.records.questions import FileImage, ImageSource
from pathcore.chat_asking import Asker, Task, settle_from_cache
from pathcore.chat_backends import Backend, Request
from pathcore.chat_budget import Budget
from pathcore.chat_cache import ReplyCache
from pathcore.files import StrPath


class ChatModel:
    """A chat model of `pathcore.chat_backends` under evaluation: an endpoint, or one run here.

    Args:
        backend: Endpoint (`OpenAIBackend`) or Hugging Face model (`pathcore.chat_local`), with
            `Sampling.cut_is_fault` false: an answer that is too long is still an answer.
        cache_path: SQLite file of the replies of an endpoint, so that a killed run pays nothing
            twice. Required for endpoints.
        budget: Limits on cost and tokens of an endpoint, earlier runs included.

    Raises:
        ValueError: If an endpoint has no cache.
    """

    reads_slides = False
    tokenizer: Any = None

    def __init__(
        self, backend: Backend, cache_path: StrPath | None = None, budget: Budget | None = None
    ) -> None:
        self.backend = backend
        self.budget = budget or Budget()
        self.is_local = backend.kind == "local"
        if cache_path is None and not self.is_local:
            raise ValueError("an endpoint requires a cache_path for its replies")
        self._cache_path = cache_path
        self._silent = 0  # counted on from batch to batch, which are smaller than the limit

    @property
    def settings(self) -> dict[str, Any]:
        """See `Model.settings`."""
        parameters = self.backend.sampling.parameters()
        del parameters["max_tokens"]  # an argument of every question
        model = {"model": self.backend.model, "endpoint": self.backend.endpoint}
        if dtype := getattr(self.backend, "dtype", None):  # an endpoint states none
            model["dtype"] = dtype
        generation = getattr(self.backend, "generation", {})
        return {**model, **parameters, **({"generation": dict(generation)} if generation else {})}

    @property
    def batch_matters(self) -> bool:
        """See `Model.batch_matters`; the requests of an endpoint are independent."""
        return self.is_local

    def prepare(self, image: ImageSource) -> Any:
        """Decodes an image; an endpoint gets the file as it is, if there is one."""
        decoded = image.load()  # raises ImageError for what no model could read
        return image.path if isinstance(image, FileImage) and not self.is_local else decoded

    def answer_prepared(
        self,
        questions: Sequence[str],
        images: Sequence[Any],
        *,
        max_new_tokens: int,
        keys: Sequence[str] = (),
    ) -> list[str | NoAnswer]:
        """See `Model.answer_prepared`.

        Raises:
            AgentError: If the endpoint cannot be used at all.
        """
        sampling = replace(self.backend.sampling, max_tokens=max_new_tokens)
        self.backend.sampling = sampling
        requests = [Request("", text, image) for text, image in zip(questions, images, strict=True)]
        if self.is_local:
            return [
                reply.text if reply.fault is None else NoAnswer(reply.fault)
                for reply in self.backend.ask(requests)
            ]
        tasks = [
            Task(number, str(number), {}, "", request, key)
            for number, (request, key) in enumerate(zip(requests, keys, strict=True))
        ]
        assert self._cache_path is not None
        with closing(ReplyCache(self._cache_path)) as cache:
            self._ask(tasks, cache)
            return [self._outcome(task, cache) for task in tasks]

    def _ask(self, tasks: Sequence[Task], cache: ReplyCache) -> None:
        def read(task: Task, text: str) -> str:
            return text

        settle_from_cache(tasks, cache, read)
        with Asker(self.backend, cache, self.budget, 1, read, silent=self._silent) as asker:
            for task in tasks:
                asker.add(task)
            asker.finish()
        self._silent = asker.silent

    def _outcome(self, task: Task, cache: ReplyCache) -> str | NoAnswer:
        if task.state == "done":
            return str(task.value)
        return NoAnswer(task.reason, is_refusal=cache.verdict(task.digest) is not None)


def is_hugging_face_model(name: str) -> bool:
    """Returns whether a folder or Hub name is a model that `AutoModelForImageTextToText` loads.

    False for PA-LLaVA in any form, which `pallava.load_model` loads.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        if PretrainedConfig.get_config_dict(name)[0].get("model_type") == "pallava":
            return False
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return False  # load_model reports what is wrong with it
    return type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
