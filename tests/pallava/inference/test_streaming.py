"""Streamed answers equal the full answers, however they end."""

from __future__ import annotations

import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from pallava import load_model
from pallava.inference.answer_text import _settled
from pallava.inference.assistant import Assistant
from pallava.inference.streaming import Completion, ContextError, Sampling, converse
from pallava.modeling.hf import (
    PALLaVAConfig,
    PALLaVAForConditionalGeneration,
    PALLaVAProcessor,
)
from pallava.text.turns import Turn
from tests.pallava import goldens
from tests.pallava.tiny_folders import make_folders

QUESTIONS = ["Is fibrosis shown?", "What?", "Describe the nuclei and the stroma in this image."]
IMAGES = ["sq_big.png", "tall_3.png", "strip_8.png"]


def picture(name: str) -> Path:
    return goldens.GOLDEN / "anyres" / name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    root = make_folders(tmp_path_factory.mktemp("streaming"), goldens.CROSSATTN_STATE)
    return load_model(root / "llama", root / "llava", root / "plip", device="cpu")


def ask(model: Assistant, turns: list[Turn], **sampling: Any) -> tuple[Completion, list[str]]:
    pieces: list[str] = []
    fields = {"max_new_tokens": 24, **sampling}
    return converse(model, turns, Sampling(**fields), on_text=pieces.append), pieces


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_streamed_pieces_are_the_answer(model: Assistant, name: str, question: str) -> None:
    expected = model.answer(picture(name), question, max_new_tokens=24)
    found, pieces = ask(model, [Turn("user", question, (picture(name),))])
    assert found.text == "".join(pieces) == expected
    assert all(pieces)
    assert found.completion_tokens <= 24


def test_pieces_come_while_the_answer_is_made(model: Assistant) -> None:
    _, pieces = ask(model, [Turn("user", "What?", (picture("sq_big.png"),))], max_new_tokens=60)
    assert len(pieces) > 3


def test_a_second_turn_depends_on_the_first(model: Assistant) -> None:
    def follow_up(answer: str) -> str:
        turns = [
            Turn("user", "What?", (picture("sq_big.png"), picture("tall_3.png"))),
            Turn("assistant", answer),
            Turn("user", "Why?"),
        ]
        return ask(model, turns)[0].text

    assert follow_up("Fibrosis.") == follow_up("Fibrosis.")
    assert follow_up("Fibrosis.") != follow_up("A red gland, and another one.")


def test_tokens_are_counted_with_the_visual_ones(model: Assistant) -> None:
    image = Turn("user", "What?", (picture("sq_big.png"),))
    visual = len(model.model.encode_images([model.pixel_values(picture("sq_big.png"))])[0])
    found, _ = ask(model, [image], max_new_tokens=3)
    assert found.prompt_tokens == len(model.encode_turns([image])) - 1 + visual
    assert (found.completion_tokens, found.finish_reason) == (3, "length")


def test_a_stop_text_ends_the_answer_before_it(model: Assistant) -> None:
    turns = [Turn("user", "What?", (picture("sq_big.png"),))]
    whole = ask(model, turns)[0].text
    middle = whole[len(whole) // 3 : len(whole) // 3 + 5]
    found, pieces = ask(model, turns, stop=("never there", middle))
    assert found.text == "".join(pieces) == whole[: whole.index(middle)]
    assert found.finish_reason == "stop"
    assert found.completion_tokens < 24


def test_the_end_of_sequence_is_a_stop(model: Assistant) -> None:
    turns = [Turn("user", "What?", (picture("sq_big.png"),))]
    prompt = torch.tensor([model.encode_turns(turns)])
    first = model.model.generate_answer(
        prompt, [model.pixel_values(picture("sq_big.png"))], max_new_tokens=1, do_sample=False
    )[0].tolist()
    model.stop_ids.add(first[0])
    try:
        found, pieces = ask(model, turns)
    finally:
        model.stop_ids.remove(first[0])
    assert (found.text, found.finish_reason, pieces) == ("", "stop", [])


def test_a_seed_repeats_the_choices_and_leaves_other_chances_alone(model: Assistant) -> None:
    turns = [Turn("user", "What?", (picture("sq_big.png"),))]
    state = torch.get_rng_state()
    first = ask(model, turns, temperature=1.5, seed=7)[0].text
    assert torch.equal(torch.get_rng_state(), state)
    assert ask(model, turns, temperature=1.5, seed=7)[0].text == first
    others = {ask(model, turns, temperature=1.5, seed=seed)[0].text for seed in range(4)}
    assert len(others) > 1
    assert len({ask(model, turns, temperature=1.5)[0].text for _ in range(4)}) > 1
    narrow = ask(model, turns, temperature=1.5, top_p=1e-6, seed=3)[0].text
    assert narrow == ask(model, turns)[0].text


def test_a_cancelled_answer_ends_at_the_next_token(model: Assistant) -> None:
    steps: list[int] = []

    def cancelled() -> bool:
        steps.append(1)
        return len(steps) == 4

    turns = [Turn("user", "What?", (picture("sq_big.png"),))]
    found = converse(model, turns, Sampling(max_new_tokens=50), cancelled=cancelled)
    assert (found.finish_reason, found.completion_tokens) == ("cancelled", 4)


def test_a_conversation_beyond_the_context_is_refused(model: Assistant) -> None:
    longest = model.model.llm.config.max_position_embeddings
    with pytest.raises(ContextError, match=f"reads {longest}"):
        converse(model, [Turn("user", "nuclei " * longest)])
    found = converse(model, [Turn("user", "What?")], Sampling(max_new_tokens=10 * longest))
    assert found.prompt_tokens + found.completion_tokens <= longest


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Sampling(**fields)


@given(
    st.text(alphabet="ab \ufffd細胞", max_size=20),
    st.lists(st.text(alphabet="ab 細", min_size=1, max_size=4), max_size=2),
)
@example("\ufffd ", [" a"])
def test_what_is_settled_survives_any_continuation(text: str, stop: list[str]) -> None:
    settled = _settled(text, stop)
    assert text.startswith(settled)
    assert "\ufffd" not in settled[-1:]
    cut = text.strip("\ufffd")
    if not any(word in cut for word in stop):
        for word in stop:
            for length in range(1, len(word) + 1):
                if text.endswith(word[:length]):
                    assert len(settled) <= len(text) - length


def test_nothing_is_given_that_decoding_takes_back() -> None:
    assert _settled("I do n", (" n't",)) == "I do"
    assert _settled("I do not", (" n't",)) == "I do "


def test_images_in_memory_are_taken_too(model: Assistant) -> None:
    with Image.open(picture("tall_3.png")) as image:
        found, _ = ask(model, [Turn("user", "What?", (image,))])
    assert found.text == model.answer(picture("tall_3.png"), "What?", max_new_tokens=24)


def test_an_exported_folder_streams_too(model: Assistant, tmp_path: Path) -> None:
    llm = copy.deepcopy(model.model.llm).merge_and_unload()  # type: ignore[operator]
    connector = model.model.projector
    config = PALLaVAConfig(llm.config, model.model.visual_encoder.config, asdict(connector.config))
    whole = PALLaVAForConditionalGeneration(config)
    whole.llm.load_state_dict(llm.state_dict())
    whole.projector.load_state_dict(connector.state_dict())
    whole.visual_encoder.load_state_dict(model.model.visual_encoder.state_dict())
    whole.save_pretrained(tmp_path)
    PALLaVAProcessor(goldens.tokenizer(), tile_px=32).save_pretrained(tmp_path)
    turns = [
        Turn("user", "What?", (picture("sq_big.png"),)),
        Turn("assistant", "A gland."),
        Turn("user", "Why?"),
    ]
    exported = load_model(tmp_path, device="cpu")
    assert ask(exported, turns) == ask(model, turns)
