"""Token ids against the goldens, and error messages for unusable rows."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.utils import PROMPT_TEMPLATE

from pallava.text.encoding import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    IMAGE_TOKEN_INDEX,
    ConversationError,
    check_row,
    count_images,
    encode_conversation,
    encode_prompt,
    image_files,
    interleaved_map_fn,
    literal,
)
from tests.pallava import goldens

RECORDED = goldens.read_json("text/train_encoding.json")


def row(*turns: tuple[str, object], image: object = None, **more: object) -> dict[str, Any]:
    conversations = [{"from": role, "value": value} for role, value in turns]
    return {"id": "7", "image": image, "conversations": conversations, **more}


@pytest.mark.parametrize("index", range(len(RECORDED)))
def test_ids_and_labels_are_the_published_ones(index: int) -> None:
    case = RECORDED[index]
    found = encode_conversation(
        goldens.tokenizer(), case["conversation_after_template"], case["max_length"]
    )
    assert found["input_ids"] == case["input_ids"]
    assert found["labels"] == case["labels"]


@pytest.mark.parametrize("index", range(len(RECORDED)))
def test_the_hosts_map_functions_lead_to_the_same_conversation(index: int) -> None:
    case = RECORDED[index]
    example = {
        **case["example"],
        "conversations": [dict(turn) for turn in case["example"]["conversations"]],
    }
    conversation = llava_map_fn(example)
    template_map_fn_factory(PROMPT_TEMPLATE.llama3_chat)(conversation)
    assert conversation["conversation"] == case["conversation_after_template"]


def test_truncation_is_in_the_record() -> None:
    assert {case["max_length"] for case in RECORDED} == {12, 1852}
    assert any(len(case["input_ids"]) == 12 for case in RECORDED)


def test_an_end_token_is_added_where_the_template_has_none() -> None:
    tokenizer = goldens.tokenizer()
    pair = {"input": "grade?", "output": "2", "need_eos_token": True, "sep": "\n"}
    found = encode_conversation(tokenizer, [pair, pair], 100)
    question = tokenizer.encode("grade?", add_special_tokens=False)
    answer = [*tokenizer.encode("2", add_special_tokens=False), tokenizer.eos_token_id]
    separator = tokenizer.encode("\n", add_special_tokens=False)
    one = [tokenizer.bos_token_id, *question, *answer, *separator]
    assert found["input_ids"] == one * 2
    silent = [IGNORE_INDEX] * (1 + len(question)), [IGNORE_INDEX] * len(separator)
    assert found["labels"] == [*silent[0], *answer, *silent[1]] * 2


def test_an_answer_without_loss_is_not_learned() -> None:
    pair = {"input": "a", "output": "b", "output_with_loss": False}
    labels = encode_conversation(goldens.tokenizer(), [pair], 100)["labels"]
    assert set(labels) == {IGNORE_INDEX}


def test_prompts_begin_with_one_bos_or_the_published_two() -> None:
    tokenizer, text = goldens.tokenizer(), f"see {IMAGE_TOKEN}?"
    single = encode_prompt(tokenizer, text)
    assert single.count(tokenizer.bos_token_id) == 1
    assert single.count(IMAGE_TOKEN_INDEX) == 1
    assert encode_prompt(tokenizer, text, "double") == [tokenizer.bos_token_id, *single]


def test_interleaving_keeps_images_where_they_are() -> None:
    found = interleaved_map_fn(
        row(
            ("gpt", "dropped"),
            ("human", f"left {IMAGE_TOKEN} right {IMAGE_TOKEN}"),
            ("human", " same?"),
            ("gpt", "no"),
        )
    )
    question = f"left {IMAGE_TOKEN} right {IMAGE_TOKEN} same?"
    assert found["conversation"] == [{"input": question, "output": "no"}]


def test_interleaving_names_a_strange_role() -> None:
    with pytest.raises(ConversationError, match=r"row '7': conversations\[1\]\.from is 'system'"):
        interleaved_map_fn(row(("human", "a"), ("system", "b")))


GOOD = [
    row(("human", "a"), ("gpt", "b")),
    row(("human", f"{IMAGE_TOKEN}\na"), ("gpt", "b"), image="a.png"),
    row(("human", f"{IMAGE_TOKEN}{IMAGE_TOKEN}"), ("gpt", "b"), image=["a.png", "b.png"]),
    row(("gpt", ""), ("human", "a"), ("gpt", "b"), image=""),
]


@pytest.mark.parametrize("index", range(len(GOOD)))
def test_a_good_row_has_no_fault(index: int) -> None:
    assert check_row(GOOD[index]) is None


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        (row(("human", "a"), ("gpt", "")), "an empty answer"),
        (row(("human", "a"), ("gpt", "\n\t ")), "an empty answer"),
        (row(("human", "a"), ("gpt", None)), "an empty answer"),
        (row(("human", " "), ("gpt", "b")), "an empty question"),
        (row(("human", "a")), "no question with an answer"),
        (row(("gpt", "b")), "no question with an answer"),
        (row(), "expected a list of {from, value}"),
        ({"id": 1}, "expected a list of {from, value}"),
        ({"id": 1, "conversations": "a"}, "expected a list of {from, value}"),
        ({"id": 1, "conversations": {"from": "human"}}, "expected a list of {from, value}"),
        ({"id": 1, "conversations": ["a", "b"]}, "expected a list of {from, value}"),
        (row(("human", "a"), ("gpt", 2)), "expected text, found int"),
        (row(("human", ["a"]), ("gpt", "b")), "expected text, found list"),
        (row(("human", "a"), ("gpt", "\ud800")), "no valid Unicode"),
        (row(("user", "a"), ("assistant", "b")), r"found ['assistant', 'user']"),
        (row((["human"], "a"), ("gpt", "b")), "expected roles 'human' and 'gpt'"),
        ({"id": 1, "conversations": [{"value": "a"}]}, "expected roles 'human' and 'gpt'"),
        (row(("human", "a"), ("gpt", "b"), image="a.png"), "1 image file(s) but 0 <image> mark(s)"),
        (row(("human", IMAGE_TOKEN), ("gpt", "b")), "0 image file(s) but 1 <image> mark(s)"),
        (
            row(("human", IMAGE_TOKEN * 2), ("gpt", "b"), image=["a.png"]),
            "1 image file(s) but 2 <image> mark(s)",
        ),
        (
            row(("human", IMAGE_TOKEN), ("gpt", "b"), image=3),
            "image: expected a file name or a list",
        ),
        (
            row(("human", IMAGE_TOKEN), ("gpt", "b"), image=[None]),
            "image: expected a file name or a list",
        ),
        (
            row(("human", IMAGE_TOKEN), ("gpt", "b"), image={"a.png": 1}),
            "image: expected a file name or a list",
        ),
    ],
)
def test_a_bad_row_has_its_fault_named(bad: dict[str, Any], fault: str) -> None:
    found = check_row(bad)
    assert found is not None
    assert fault in found


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["from", "value", "id", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "from": st.sampled_from(["human", "gpt", "system", None]) | json_values,
        "value": st.sampled_from(["a", "", f"b {IMAGE_TOKEN}", None]) | json_values,
    },
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "id": json_values,
            "image": json_values,
            "conversations": json_values | st.lists(turns, max_size=4),
        },
    )
)
def test_any_row_is_checked_and_a_passed_one_can_be_mapped(data: dict[str, Any]) -> None:
    fault = check_row(data)
    assert fault is None or isinstance(fault, str)
    if fault is None:
        assert len(image_files(data)) >= 0
        for pair in interleaved_map_fn(data)["conversation"]:
            assert isinstance(pair["input"], str)
            assert isinstance(pair["output"], str)


def test_images_and_marks_are_counted() -> None:
    assert image_files(row()) == []
    assert image_files(row(image="a.png")) == ["a.png"]
    assert image_files(row(image=["a.png", "b.png"])) == ["a.png", "b.png"]
    marked = row(("human", IMAGE_TOKEN * 2), ("gpt", IMAGE_TOKEN), ("human", IMAGE_TOKEN))
    assert count_images(marked) == 3


def test_special_tokens_are_found_without_a_walk_through_the_vocabulary() -> None:
    core = Tokenizer(models.WordLevel({"?": 0}, "?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?", eos_token="<end>")
    with patch.object(PreTrainedTokenizerFast, "__len__", side_effect=AssertionError):  # slow
        marked = literal(tokenizer, "a <end> b <more>")
        assert marked.count("\ufdd0") == 2 and marked.split("\ufdd0")[1] == "<end>"
        tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]})
        assert literal(tokenizer, "a <end> b <more>").split("\ufdd0")[1::2] == ["<end>", "<more>"]
