from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xtuner_add.demo.language_model import (
    BEGIN,
    END_TURN,
    LanguageModelSizes,
    encode_chat,
    make_tokenizer,
    train,
)
from xtuner_add.demo.pallava.dataset import text_corpus

CORPUS = text_corpus(400, np.random.default_rng(0))
TEXTS = ["\n".join(map("\n".join, turns)) for turns in CORPUS]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return make_tokenizer(TEXTS, 384)


def test_texts_survive_the_tokenizer(tokenizer: object) -> None:
    for text in [*TEXTS[:20], "Größe: 3 µm\n\nétat"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text


def test_words_of_the_corpus_are_single_tokens(tokenizer: object) -> None:
    for word in (" vesicular", " glands", "yes", "no"):
        assert len(tokenizer.encode(word, add_special_tokens=False)) == 1


def test_chat_template_and_training_encode_alike(tokenizer: object) -> None:
    turns = [("Are the nuclei vesicular?", "yes"), ("Does the image show fat?", "no")]
    messages = [
        {"role": role, "content": content}
        for question, answer in turns
        for role, content in (("user", question), ("assistant", answer))
    ]
    ids, is_answer = encode_chat(tokenizer, turns)
    assert ids == tokenizer.apply_chat_template(messages, tokenize=True)
    assert tokenizer.decode(ids[:1]) == BEGIN
    learned = [index for index, learn in zip(ids, is_answer, strict=True) if learn]
    assert tokenizer.decode(learned) == f"yes{END_TURN}no{END_TURN}"


def test_template_is_that_of_xtuner(tokenizer: object) -> None:
    from pallava.engine.runtime import prepare_host

    prepare_host()
    from xtuner.utils import PROMPT_TEMPLATE

    template = PROMPT_TEMPLATE.llama3_chat
    ours = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], tokenize=False, add_generation_prompt=True
    )
    assert ours == BEGIN + template["INSTRUCTION"].format(input="Q")


def test_training_lowers_the_loss_and_saves_a_folder_that_loads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sizes = LanguageModelSizes(hidden_size=32, intermediate_size=64, num_layers=1, steps=120)
    history = train(CORPUS, tmp_path, sizes, seed=0)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert 0 <= history[-1]["answer_accuracy"] <= 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.vocab_size == len(loaded)
    assert loaded.eos_token == END_TURN


def test_stopped_training_continues_to_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    from xtuner_add.demo import language_model

    sizes = LanguageModelSizes(hidden_size=32, intermediate_size=64, num_layers=1, steps=60)
    monkeypatch.setattr(language_model, "_SAVE_EVERY", 20)
    whole = train(CORPUS, tmp_path / "whole", sizes, seed=0)
    collate, calls = language_model.collate, []

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 50:
            raise KeyboardInterrupt
        return collate(*args)

    monkeypatch.setattr(language_model, "collate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(CORPUS, tmp_path / "stopped", sizes, seed=0)
    torch.rand(3)  # whatever happens in between
    assert train(CORPUS, tmp_path / "stopped", sizes, seed=0) == whole
    weights = [load_file(tmp_path / run / "model.safetensors") for run in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
