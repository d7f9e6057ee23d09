"""Answers of a batch that requests join and leave are those of one request at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, CLIPVisionConfig

from pallava.anyres import AnyRes
from pallava.inference.answer_text import Completion
from pallava.inference.assistant import Assistant
from pallava.inference.batching import BatchedAnswers, ContextError, Request
from pallava.inference.key_values import SLACK
from pallava.inference.sampling import Sampling
from pallava.inference.streaming import converse
from pallava.modeling.llava import PALLaVA
from pallava.modeling.plip import PLIPVisionEncoder
from pallava.modeling.qformer import ConnectorConfig, ScaleInvariantConnector
from pallava.text.encoding import IMAGE_TOKEN_INDEX, ConversationError
from pallava.text.turns import Turn
from tests.pallava import goldens

WIDTH = 32
SIZES = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"head_dim": 8, "sliding_window": 12}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 64}},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "Mistral": WINDOW,
    "Gemma": {"head_dim": 8, "tie_word_embeddings": False},
    "Gemma2": WINDOW | ALTERNATING | {"attn_implementation": "eager", "query_pre_attn_scalar": 8},
    "Gemma3": WINDOW | ALTERNATING | {"query_pre_attn_scalar": 8},
    "Phi3": {"pad_token_id": 0},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
}  # fmt: skip
CONVERSATIONS = [
    [Turn("user", "Is fibrosis shown?", (goldens.GOLDEN / "anyres" / "sq_big.png",))],
    [Turn("user", "What?")],
    [
        Turn("system", "You are a pathologist."),
        Turn("user", "Describe the nuclei.", (goldens.GOLDEN / "anyres" / "tall_3.png",)),
        Turn("assistant", "They are round."),
        Turn("user", "And the stroma?", (goldens.GOLDEN / "anyres" / "strip_8.png",)),
    ],
    [Turn("user", "Describe the nuclei and the stroma in this image, and the glands, please.")],
    [Turn("user", "Why?", (goldens.GOLDEN / "anyres" / "sq_big.png",))],
]


@functools.cache
def make_model(family: str) -> Assistant:
    """A model with random weights whose answers differ from question to question."""
    tokenizer = goldens.tokenizer()
    suffix = "TextConfig" if family == "Gemma3" else "Config"
    sizes = SIZES | {"vocab_size": len(tokenizer)} | FAMILIES[family]
    attention = sizes.pop("attn_implementation", "sdpa")
    config = getattr(transformers, family + suffix)(**sizes)
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for tensor in llm.parameters():
        tensor.data += 0.1 * torch.randn_like(tensor)
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    encoder = PLIPVisionEncoder(
        CLIPVisionConfig(num_attention_heads=2, image_size=32, patch_size=16, **vision)
    )
    connector = ScaleInvariantConnector(
        ConnectorConfig(visual_hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        llm_hidden_size=WIDTH, intermediate_size=16)
    )  # fmt: skip
    return Assistant(PALLaVA(llm, encoder, connector), tokenizer, AnyRes(tile_px=32))


def answer_all(
    model: Assistant, jobs: list[tuple[list[Turn], Sampling]], arrive_every: int, **options: Any
) -> tuple[list[Completion | Exception], BatchedAnswers]:
    """Lets a request join every so many tokens, and generates until all have left."""
    batch = BatchedAnswers(model, **options)
    ends: dict[int, Completion | Exception] = {}
    waiting = list(enumerate(jobs))
    step = 0
    while waiting or batch.num_running:
        if waiting and step % arrive_every == 0:
            index, (turns, sampling) = waiting.pop(0)
            batch.start(Request(turns, sampling, functools.partial(ends.__setitem__, index)))
        batch.step()
        step += 1
    return [ends[index] for index in range(len(jobs))], batch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_answers_as_generate_does_one_by_one(family: str) -> None:
    model = make_model(family)
    lengths = [14, 4, 20, 16, 6, 9]
    jobs = [
        (CONVERSATIONS[number % 5], Sampling(max_new_tokens=length))
        for number, length in enumerate(lengths)
    ]
    found, _ = answer_all(model, jobs, arrive_every=3)
    for (turns, sampling), completion in zip(jobs, found, strict=True):
        images = [model.pixel_values(image) for turn in turns for image in turn.images]
        ids = model.model.generate_answer(
            torch.tensor([model.encode_turns(turns)]),
            images or None,
            **model.generation_kwargs(sampling.max_new_tokens),
        )[0].tolist()
        assert isinstance(completion, Completion), completion
        assert completion.text == model.decode(ids)
        assert completion.completion_tokens == len(ids)
    assert len({completion.text for completion in found[:5]}) == 5  # type: ignore[union-attr]


def test_a_seed_gives_the_same_answer_in_any_company() -> None:
    model = make_model("Qwen3")
    sampled = Sampling(20, temperature=1.3, top_p=0.9, seed=5)
    alone = converse(model, CONVERSATIONS[0], sampled)
    others = [
        (turns, Sampling(15, temperature=1.5, seed=number))
        for number, turns in enumerate(CONVERSATIONS)
    ]
    found, _ = answer_all(model, [*others[:2], (CONVERSATIONS[0], sampled), *others[2:]], 2)
    assert found[2] == alone
    assert alone.text != converse(model, CONVERSATIONS[0], Sampling(20)).text


def count_read(model: Assistant, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """Counts tokens that the language model reads, and images that are encoded."""
    tokens, images = [0], [0]
    forward, encode_images = model.model.llm.forward, model.model.encode_images

    @functools.wraps(forward)
    def counted(**kwargs: Any) -> Any:
        tokens[0] += kwargs.get("inputs_embeds", kwargs.get("input_ids")).shape[1]
        return forward(**kwargs)

    def encoded(stacks: Any) -> Any:
        images[0] += len(stacks)
        return encode_images(stacks)

    monkeypatch.setattr(model.model.llm, "forward", counted)
    monkeypatch.setattr(model.model, "encode_images", encoded)

    def taken() -> tuple[int, int]:
        found = tokens[0], images[0]
        tokens[0] = images[0] = 0
        return found

    return taken


def follow_up(first: Completion | Exception) -> list[Turn]:
    assert isinstance(first, Completion)
    return [*CONVERSATIONS[2], Turn("assistant", first.text), Turn("user", "Why?")]


@pytest.mark.parametrize("family", ["Llama", "Gemma3"])
def test_a_conversation_that_goes_on_is_not_read_again(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    ends: list[Any] = []

    def ask(batch: BatchedAnswers, turns: list[Turn]) -> Completion:
        batch.start(Request(turns, Sampling(12), ends.append))
        while batch.num_running:
            batch.step()
        return ends[-1]

    batch = BatchedAnswers(model)
    taken = count_read(model, monkeypatch)
    first = ask(batch, CONVERSATIONS[2])
    assert taken() == (first.prompt_tokens + first.completion_tokens - 1, 2)
    again = ask(batch, CONVERSATIONS[2])
    assert (again, taken()) == (first, (first.completion_tokens, 0))  # one token of the prompt
    second = ask(batch, follow_up(first))
    num_read, num_images = taken()
    assert num_images == 0
    assert num_read < second.prompt_tokens - first.prompt_tokens + second.completion_tokens
    assert second == converse(model, follow_up(first), Sampling(12))
    taken()
    nothing_kept = BatchedAnswers(model, cache_bytes=0)
    for _ in range(2):
        assert ask(nothing_kept, CONVERSATIONS[2]) == first
        assert taken() == (first.prompt_tokens + first.completion_tokens - 1, 2)


def test_the_image_of_another_question_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Llama")
    expected = converse(model, CONVERSATIONS[4], Sampling(6))
    taken = count_read(model, monkeypatch)
    jobs = [(CONVERSATIONS[0], Sampling(6)), (CONVERSATIONS[4], Sampling(6))]
    found, _ = answer_all(model, jobs, arrive_every=1)
    assert taken()[1] == 1
    assert found[1] == expected


def test_what_is_kept_stays_within_the_limit() -> None:
    model = make_model("Llama")
    limit = 250_000
    jobs = [([Turn("user", f"What is {number}?")], Sampling(10)) for number in range(40)]
    _, batch = answer_all(model, jobs, arrive_every=3, cache_bytes=limit)
    entries = batch._kept._entries
    sizes = [sum(part.untyped_storage().nbytes() for pair in entry.states for part in pair)
             for entry in entries]  # fmt: skip
    assert 1 < len(entries) < 40
    assert sum(sizes) <= limit
    assert batch._batch.num_bytes == 0


def test_a_request_that_does_not_fit_waits() -> None:
    model = make_model("Llama")
    first, second = (
        Request(CONVERSATIONS[number], Sampling(50), lambda end: None) for number in (0, 1)
    )
    batch = BatchedAnswers(model)
    batch.start(first)
    answer = batch._running[0]
    length = answer.prompt_tokens + answer.max_new_tokens + SLACK
    for limit, fits in ((2 * length, True), (2 * length - 1, False)):
        batch.cache_bytes = limit * batch._bytes_per_token
        assert batch.fits(second) is fits
    assert BatchedAnswers(model, cache_bytes=1).fits(first)  # alone, whatever its size


@pytest.mark.parametrize("culprit", [0, 2, 4])
def test_an_answer_that_breaks_the_batch_ends_alone(
    culprit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("Llama")
    jobs = [(turns, Sampling(10)) for turns in CONVERSATIONS]
    expected = [converse(model, turns, sampling) for turns, sampling in jobs]
    batch = BatchedAnswers(model)
    ends: dict[int, Any] = {}
    for index, (turns, sampling) in enumerate(jobs):
        batch.start(Request(turns, sampling, functools.partial(ends.__setitem__, index)))
    bad = batch._running[culprit]
    forward = model.model.llm.forward

    @functools.wraps(forward)
    def failing(**kwargs: Any) -> Any:
        if bad in batch._running and "input_ids" in kwargs and len(bad.text.ids) > 4:
            raise RuntimeError("out of memory")
        return forward(**kwargs)

    monkeypatch.setattr(model.model.llm, "forward", failing)
    while batch.num_running:
        batch.step()
    assert str(ends.pop(culprit)) == "out of memory"
    assert ends == {index: end for index, end in enumerate(expected) if index != culprit}


def test_nan_and_bad_requests_end_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("Llama")
    forward = model.model.llm.forward

    @functools.wraps(forward)
    def with_nan(**kwargs: Any) -> Any:
        found = forward(**kwargs)
        if len(found.logits) == 3:
            found.logits[1] = torch.nan
        return found

    expected = [converse(model, turns, Sampling(8)) for turns in CONVERSATIONS[:3]]
    monkeypatch.setattr(model.model.llm, "forward", with_nan)
    batch = BatchedAnswers(model)
    ends: list[Any] = [None] * 5
    bad_turns = [[Turn("user", "nuclei " * 600)], [Turn("assistant", "No.")]]
    sampled = Sampling(8, temperature=1.0)
    samplings = [Sampling(8), sampled, Sampling(8), Sampling(8), Sampling(8)]
    for index, turns in enumerate([*CONVERSATIONS[:3], *bad_turns]):
        batch.start(Request(turns, samplings[index], functools.partial(ends.__setitem__, index)))
    while batch.num_running:
        batch.step()
    assert [ends[0], ends[2]] == [expected[0], expected[2]]
    assert [type(ends[index]) for index in (1, 3, 4)] == [
        FloatingPointError, ContextError, ConversationError,
    ]  # fmt: skip


@pytest.mark.parametrize("num_marks", [0, 2])
def test_a_prompt_with_other_marks_than_images_is_refused(
    num_marks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("Llama")
    ids = [5, *[IMAGE_TOKEN_INDEX] * num_marks, 6]
    monkeypatch.setattr(type(model), "encode_turns", lambda self, turns: list(ids))
    with pytest.raises(ValueError, match=rf"{num_marks} image mark\(s\) for 1 image"):
        converse(model, CONVERSATIONS[-1], Sampling(2))


def test_a_long_prompt_joins_shorter_ones_and_all_outgrow_their_buffers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pallava.inference.key_values.SLACK", 5)
    model = make_model("Gemma2")
    jobs = [
        (CONVERSATIONS[1], Sampling(30)),
        (CONVERSATIONS[2], Sampling(25)),
        (CONVERSATIONS[1], Sampling(9)),
        (CONVERSATIONS[3], Sampling(20)),
    ]
    found, _ = answer_all(model, jobs, arrive_every=7)
    assert found == [converse(model, turns, sampling) for turns, sampling in jobs]
