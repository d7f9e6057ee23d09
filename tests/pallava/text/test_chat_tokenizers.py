"""Conversations in the chat templates of today's models: training, questions and export agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Tokenizer

from pallava.default_collate_fn import default_collate_fn
from pallava.engine.conversations import TokenizerTemplate
from pallava.release.pth_to_hf import with_chat_template
from pallava.text.chat_template import pinned, template_of_tokenizer
from pallava.text.encoding import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    encode_conversation,
    encode_prompt,
    encode_text,
    literal,
)
from pallava.text.turns import Turn, encode_turns
from tests.pallava.text.chat_tokenizers import FAMILIES, chat_tokenizer

QUESTIONS = ("Is fibrosis shown?", "Where, on the left?")
ANSWERS = ("Yes, a little.", "In the stroma.")
THINKING = ("qwen3", "smollm3")


def messages(number: int, system: str = "") -> list[dict[str, str]]:
    rows = [{"role": "system", "content": system}] if system else []
    for question, answer in list(zip(QUESTIONS, ANSWERS, strict=True))[:number]:
        rows.append({"role": "user", "content": question})
        rows.append({"role": "assistant", "content": answer})
    return rows


def trained(family: str, number: int, image: str = "") -> dict[str, list[int]]:
    pairs = [
        {"input": (image if index == 0 else "") + question, "output": answer}
        for index, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True))
    ]
    rendered = TokenizerTemplate(chat_tokenizer(family))({"conversation": pairs[:number]})
    return encode_conversation(chat_tokenizer(family), rendered["conversation"], 1 << 20)


def theirs(family: str, rows: list[dict[str, str]], **options: Any) -> list[int]:
    """What transformers makes of it, without thinking, on the date of the template."""
    return list(
        chat_tokenizer(family).apply_chat_template(
            rows,
            enable_thinking=False,
            strftime_now=lambda form: {"%d %b %Y": "26 Jul 2024"}.get(form, "26 July 2024"),
            **options,
        )
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [1, 2])
def test_training_sees_the_ids_of_apply_chat_template(family: str, number: int) -> None:
    assert trained(family, number)["input_ids"] == theirs(family, messages(number))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("system", ["", "You are a pathologist."])
def test_questions_have_the_ids_of_apply_chat_template(
    family: str, number: int, system: str
) -> None:
    rows = messages(number, system)[:-1]
    turns = [Turn(row["role"], row["content"]) for row in rows]  # type: ignore[arg-type]
    tokenizer = chat_tokenizer(family)
    expected = theirs(family, rows, add_generation_prompt=True)
    assert encode_turns(tokenizer, template_of_tokenizer(tokenizer), turns) == expected
    if not system and family != "mistral_plain":  # there, the answer is joined to the text before
        assert expected == trained(family, number)["input_ids"][: len(expected)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_answers_and_their_ends_are_learned_and_nothing_else(family: str) -> None:
    tokenizer, encoded = chat_tokenizer(family), trained(family, 2)
    learned = [label for label in encoded["labels"] if label != IGNORE_INDEX]
    (end,) = template_of_tokenizer(tokenizer).stop_words
    text = tokenizer.decode(learned).replace(" ", "")
    assert text == f"{ANSWERS[0]}{end}{ANSWERS[1]}{end}".replace(" ", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_in_a_text_are_letters(family: str) -> None:
    tokenizer = chat_tokenizer(family)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    forged = "".join(FAMILIES[family][1])
    pairs = [{"input": f"a{forged}b", "output": f"a{forged}b"}]
    plain = [{"input": "ab", "output": "ab"}]
    encoded = []
    for texts in (pairs, plain):
        marked = [{key: literal(tokenizer, text) for key, text in pair.items()} for pair in texts]
        rendered = TokenizerTemplate(tokenizer)({"conversation": marked})["conversation"]
        encoded.append(encode_conversation(tokenizer, rendered, 1 << 20))
    found, expected = encoded
    assert [i for i in found["input_ids"] if i in special] == [
        i for i in expected["input_ids"] if i in special
    ]
    turns = [Turn("user", f"a{forged}b")]
    prompt = encode_turns(tokenizer, template_of_tokenizer(tokenizer), turns)
    shared = len(prompt) - (family == "mistral_plain")
    assert prompt[:shared] == found["input_ids"][:shared]
    learned = tokenizer.decode([label for label in found["labels"] if label != IGNORE_INDEX])
    assert learned.replace(" ", "").startswith(f"a{forged}b")


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_takes_the_place_of_its_mark(family: str) -> None:
    ids = trained(family, 1, "<image>\n")["input_ids"]
    tokenizer = chat_tokenizer(family)
    turns = [Turn("user", QUESTIONS[0], ("a.png",))]
    prompt = encode_turns(tokenizer, template_of_tokenizer(tokenizer), turns)
    assert prompt.count(IMAGE_TOKEN_INDEX) == ids.count(IMAGE_TOKEN_INDEX) == 1
    shared = len(prompt) - (family == "mistral_plain")
    assert prompt[:shared] == ids[:shared]


def test_a_plain_space_belongs_to_the_word_after_it() -> None:
    """The reason to encode whole texts: SentencePiece would write the space twice."""
    tokenizer = chat_tokenizer("mistral_plain")
    pieces = [tokenizer.encode(text, add_special_tokens=False) for text in ("[/INST]", " Yes")]
    assert pieces[0] + pieces[1] == encode_text(tokenizer, "[/INST]") + encode_text(
        tokenizer, " Yes"
    )
    assert trained("mistral_plain", 1)["input_ids"] == theirs("mistral_plain", messages(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_begins_with_two_bos(family: str) -> None:
    bos, ids = chat_tokenizer(family).bos_token_id, trained(family, 1)["input_ids"]
    assert ids[:2].count(bos) == (bos is not None and family != "phi4")


@pytest.mark.parametrize("family", THINKING)
def test_thoughts_are_empty_and_not_learned(family: str) -> None:
    tokenizer, encoded = chat_tokenizer(family), trained(family, 1)
    text = tokenizer.decode(encoded["input_ids"])
    assert "<think>\n\n</think>\n" in text
    learned = [label for label in encoded["labels"] if label != IGNORE_INDEX]
    assert "think" not in tokenizer.decode(learned)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pinned_template_needs_no_clock_and_no_arguments(family: str, tmp_path: Path) -> None:
    """What is exported renders the same in any server, on any day."""
    tokenizer = chat_tokenizer(family)
    template = template_of_tokenizer(tokenizer)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with_chat_template(tmp_path, template.fields())
    exported = json.loads((tmp_path / "tokenizer_config.json").read_bytes())["chat_template"]
    assert pinned(exported) == exported and "strftime_now(" not in exported
    rows = messages(1)[:-1]
    alone = tokenizer.apply_chat_template(rows, chat_template=exported, add_generation_prompt=True)
    assert alone == theirs(family, rows, add_generation_prompt=True)


def test_an_answer_that_the_template_would_cut_is_dropped() -> None:
    template = TokenizerTemplate(chat_tokenizer("qwen3"))
    pair = {"input": "Why?", "output": "Perhaps.</think>Because."}
    assert template({"conversation": [pair]}) == {"conversation": []}


def test_a_template_without_an_end_of_answers_is_refused() -> None:
    tokenizer = type(chat_tokenizer("qwen3"))(
        tokenizer_object=chat_tokenizer("qwen3").backend_tokenizer,
        chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    with pytest.raises(ValueError, match="would not learn to stop"):
        TokenizerTemplate(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="carries no chat template"):
        TokenizerTemplate(tokenizer)


def test_a_refusal_of_the_template_names_itself() -> None:
    """Gemma 2 has no system turn, and its template raises."""
    tokenizer = type(chat_tokenizer("gemma3"))(
        tokenizer_object=chat_tokenizer("gemma3").backend_tokenizer,
        chat_template="{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        + FAMILIES["gemma3"][0].replace("{{ bos_token }}", "<bos>"),
    )
    turns = [Turn("system", "Be short."), Turn("user", "Why?")]
    with pytest.raises(ValueError, match="refuses the conversation: System role not supported"):
        encode_turns(tokenizer, template_of_tokenizer(tokenizer), turns)


def test_a_slow_tokenizer_without_bos_trains_in_xtuners_templates(tmp_path: Path) -> None:
    """XTuner adds None to a list of ids for the slow tokenizer of Qwen2."""
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate("abQ ")}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    slow = Qwen2Tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt", unk_token="a")
    slow.chat_template = FAMILIES["qwen25"][0]
    assert slow.bos_token_id is None
    pairs = [{"input": "Q", "output": "ab", "need_eos_token": False}]
    assert len(encode_conversation(slow, pairs, 10)["input_ids"]) == 3
    assert encode_prompt(slow, "Q") == slow.encode("Q")
    slow.add_tokens(["<|im_end|>"])
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        TokenizerTemplate(slow)


def test_the_end_of_an_answer_is_learned_though_it_is_the_padding_token() -> None:
    tokenizer = chat_tokenizer("phi4")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [trained("phi4", 1), trained("phi4", 2)]
    data = default_collate_fn(rows, pad_index=tokenizer.pad_token_id)["data"]
    ends = data["labels"] == tokenizer.eos_token_id
    assert ends.sum(dim=1).tolist() == [1, 2]
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    assert torch.equal(data["attention_mask"].sum(dim=1), lengths)
