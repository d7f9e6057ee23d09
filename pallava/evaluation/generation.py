"""Generates answers to all questions of a benchmark: batched, distributed and resumable.

Batches are cut from the full list of questions, not from the remaining ones. Each question thus
always shares its batch with the same others, and neither an interruption nor the number of
processes changes an answer, even in half precision.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from tqdm import tqdm

from pallava.evaluation.answers import AnswerLog
from pallava.evaluation.image_digests import ImageDigests
from pallava.evaluation.models import Model, NoAnswer
from pallava.inference.assistant import MAX_NEW_TOKENS
from pallava.records.questions import Question
from pallava.skipping import SkippedSample
from pathcore.files import StrPath
from pathcore.images import ImageError
from pathcore.ranks import open_gloo_group

_FORMAT = 3  # version of the digests; increase it when answers depend on anything new
_WAIT = timedelta(days=7)  # processes finish at different times, hours apart on large benchmarks
_THREADS = 4

Batch = list[Question]


@dataclass
class Outcome:
    """Answers and skipped questions of a run.

    Attributes:
        answers: Answers by question id, in the order of the questions; empty for a refusal.
        refusals: Refusals of the model, by question id.
        skipped: Questions whose image could not be read, or that got neither answer nor refusal.
    """

    answers: dict[str, str] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    skipped: list[SkippedSample] = field(default_factory=list)


def generate_answers(
    model: Model,
    questions: Sequence[Question],
    folder: StrPath,
    *,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    digests_path: StrPath | None = None,
) -> Outcome | None:
    """Answers every question once, across all runs and processes that share a folder.

    Under torchrun (`RANK`, `WORLD_SIZE`), the questions are divided among the processes.

    Args:
        model: Model that answers.
        questions: Questions; the same list in every process. Variants of a question
            (`Question.variant`) may be among them.
        folder: Folder of answer files, one per process. Answers that earlier runs left there are
            reused.
        batch_size: Number of questions per batch.
        max_new_tokens: Maximum length of each answer in tokens.
        digests_path: JSON file that caches image digests between runs.

    Returns:
        The outcome of all processes on rank 0, None on other ranks.

    Raises:
        ValueError: If `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch size: expected at least 1, found {batch_size}")
    rank, world_size = _processes()
    images = _image_identities(questions, digests_path, rank, world_size)
    digests = answer_digests(model, questions, max_new_tokens, images)
    batches = make_batches(questions, batch_size)[rank::world_size]
    outcome = Outcome()
    with AnswerLog(folder, rank) as log:
        done, outcome.refusals = log.read(digests)
        own = [question.id for batch in batches for question in batch]
        finished = sum(_is_done(batch, done) * len(batch) for batch in batches)
        with tqdm(
            total=len(own), initial=finished, desc=f"answers, process {rank}", unit="question"
        ) as progress:
            for batch, prepared in _prepared(model, batches, done):
                replies = _answer(model, batch, prepared, max_new_tokens, digests, outcome.skipped)
                new = {key: reply for key, reply in replies.items() if key not in done}
                if new:
                    log.append({key: (digests[key], reply) for key, reply in new.items()})
                    for key, reply in new.items():
                        done[key] = reply if isinstance(reply, str) else ""
                        if isinstance(reply, NoAnswer):
                            outcome.refusals[key] = reply.reason
                progress.update(len(batch))
    outcome.answers = {key: done[key] for key in own if key in done}
    outcome.refusals = {key: outcome.refusals[key] for key in own if key in outcome.refusals}
    return _gather(outcome, questions, world_size)


def answer_digests(
    model: Model,
    questions: Sequence[Question],
    max_new_tokens: int,
    images: Mapping[str, str],
) -> dict[str, str]:
    """Returns a digest per question of everything that its answer depends on.

    Args:
        model: Model that answers.
        questions: Questions to be answered.
        max_new_tokens: Maximum length of each answer in tokens.
        images: Identity of each question's image, by question id.
    """
    common = [_FORMAT, dict(model.settings), max_new_tokens]
    digests = {}
    for question in questions:
        own = [question.id, question.text, images.get(question.id)]
        content = json.dumps([*common, *own], sort_keys=True)
        digests[question.id] = hashlib.sha256(content.encode()).hexdigest()
    return digests


def image_identities(
    questions: Sequence[Question], digest: Callable[[Path], str]
) -> dict[str, str]:
    """Returns the identity of each question's image by question id, text-only questions aside."""
    identities = {}
    for question in questions:
        if question.image is not None:
            try:
                identities[question.id] = question.image.identity(digest)
            except OSError as error:
                # Reported as a skipped question later, unless the file is readable again by then.
                identities[question.id] = f"unreadable: {error.strerror}"
    return identities


def _image_identities(
    questions: Sequence[Question],
    digests_path: StrPath | None,
    rank: int,
    world_size: int,
) -> dict[str, str]:
    # Every process needs all identities, but each file is read by only one of them.
    digests = ImageDigests(digests_path)
    identities = image_identities(questions[rank::world_size], digests)
    if world_size > 1:
        parts: list[Any] = [None] * world_size
        dist.all_gather_object(parts, (identities, digests.durable))
        identities = {key: value for part, _ in parts for key, value in part.items()}
        for _, durable in parts:
            digests.durable.update(durable)
    if rank == 0:
        digests.save()
    return identities


def make_batches(questions: Sequence[Question], batch_size: int) -> list[Batch]:
    """Groups questions of similar length, which minimises padding."""
    ordered = sorted(questions, key=lambda question: len(question.text))  # stable
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def _is_done(batch: Batch, done: Mapping[str, str]) -> bool:
    return all(question.id in done for question in batch)


def _prepared(
    model: Model, batches: Sequence[Batch], done: Mapping[str, str]
) -> Iterator[tuple[Batch, list[Any]]]:
    """Decodes the images of the next batch while the model answers the current one."""

    def load(question: Question) -> Any:
        if question.image is None:
            return None
        try:
            return model.prepare(question.image)
        except ImageError as error:
            return error

    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        waiting: list[tuple[Batch, list[Future[Any]]]] = []
        for whole in batches:
            if _is_done(whole, done):
                continue
            # Where neighbours matter, an incomplete batch is answered whole: see the module
            # docstring.
            batch = whole if model.batch_matters else [q for q in whole if q.id not in done]
            waiting.append((batch, [pool.submit(load, question) for question in batch]))
            if len(waiting) > 1:
                ready, images = waiting.pop(0)
                yield ready, [image.result() for image in images]
        for ready, images in waiting:
            yield ready, [image.result() for image in images]


def _answer(
    model: Model,
    batch: Batch,
    prepared: Sequence[Any],
    max_new_tokens: int,
    digests: Mapping[str, str],
    skipped: list[SkippedSample],
) -> dict[str, str | NoAnswer]:
    """Returns answers and refusals by question id; questions with neither go to `skipped`."""

    def skip(question: Question, reason: object) -> None:
        name = question.image.name if question.image is not None else ""
        skipped.append(SkippedSample(question.id, name, str(reason)))

    asked: list[Question] = []
    images: list[Any] = []
    for question, image in zip(batch, prepared, strict=True):
        if isinstance(image, ImageError):
            skip(question, image)
        else:
            asked.append(question)
            images.append(image)
    if not asked:
        return {}
    texts = [question.text for question in asked]
    keys = [digests[question.id] for question in asked]
    replies = model.answer_prepared(texts, images, max_new_tokens=max_new_tokens, keys=keys)
    found: dict[str, str | NoAnswer] = {}
    for question, reply in zip(asked, replies, strict=True):
        if isinstance(reply, NoAnswer) and not reply.is_refusal:
            skip(question, reply.reason)
        else:
            found[question.id] = reply
    return found


def _processes() -> tuple[int, int]:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return 0, 1
    if not dist.is_initialized():
        open_gloo_group(_WAIT)  # gloo suffices: only text is exchanged
    return dist.get_rank(), world_size


def _gather(outcome: Outcome, questions: Sequence[Question], world_size: int) -> Outcome | None:
    outcomes: list[Any] = [outcome]
    if world_size > 1:
        rank = dist.get_rank()
        outcomes = [None] * world_size
        dist.gather_object(outcome, outcomes if rank == 0 else None, dst=0)
        if rank:
            return None
    answers = {key: text for part in outcomes for key, text in part.answers.items()}
    refusals = {key: text for part in outcomes for key, text in part.refusals.items()}
    order = {question.id: number for number, question in enumerate(questions)}
    skipped = sorted(
        (item for part in outcomes for item in part.skipped), key=lambda i: order[i.id]
    )
    return Outcome(
        {key: answers[key] for key in order if key in answers},
        {key: refusals[key] for key in order if key in refusals},
        skipped,
    )


def default_device() -> torch.device:
    """Returns the GPU of this process (`LOCAL_RANK`), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
