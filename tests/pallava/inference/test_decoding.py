"""Decoding by name: what it asks of `generate`, and that a seed repeats an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pallava import load_model
from pallava.inference.decoding import Decoding
from tests.pallava import goldens
from tests.pallava.tiny_folders import make_folders


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("greedy", Decoding()),
        ("temperature=0.9,num_beams=5", Decoding(temperature=0.9, num_beams=5)),
        ("top_p=0.5, temperature=1, seed=3", Decoding(1.0, 0.5, 1, 3)),
    ],
)
def test_parse(text: str, expected: Decoding) -> None:
    assert Decoding.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beam", "expected greedy, or NAME=VALUE of temperature, top_p, num_beams, seed"),
        ("num_beams=2.5", "num_beams: expected a number, found '2.5'"),
        ("num_beams=0", "num_beams: expected at least 1"),
        ("temperature=3", "expected 0 to 2"),
        ("top_p=0", "expected above 0"),
        ("top_p=0.9,num_beams=5", "no effect without a temperature above 0"),
    ],
)
def test_wrong_values(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Decoding.parse(text)


def test_answers_follow_the_decoding(tmp_path: Path) -> None:
    root = make_folders(tmp_path, goldens.CROSSATTN_STATE)
    model = load_model(root / "llama", root / "llava", root / "plip", device="cpu")
    image = goldens.GOLDEN / "anyres" / "sq_big.png"

    def answer(text: str) -> str:
        model.decoding = Decoding.parse(text)
        return model.answer(image, "What?", max_new_tokens=16)

    settings = model.settings
    greedy = answer("greedy")
    assert model.settings == settings
    state = torch.get_rng_state()
    sampled = answer("temperature=2,seed=1")
    assert sampled == answer("temperature=2,seed=1") != greedy
    assert answer("temperature=2,seed=2") != sampled
    assert torch.equal(torch.get_rng_state(), state)  # other random choices are left alone
    assert model.settings["decoding"]["seed"] == 2
    # A nucleus of nearly nothing holds the most likely token alone.
    assert answer("temperature=1,top_p=1e-6") == greedy
