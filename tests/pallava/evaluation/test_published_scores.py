"""The published tools' scores, against their recorded output."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.metrics import accuracy_score

from pallava.evaluation.metrics import published
from tests.pallava import goldens


def answers(name: str) -> dict[str, str]:
    return {row["question_id"]: row["answer"] for row in goldens.read_json(name)}


@pytest.mark.parametrize("name", ["mixed", "no_number_type"])
def test_exact_scores_are_the_recorded_ones(name: str) -> None:
    expected = goldens.read_json(f"eval/{name}_expected_exact.json")
    found = published.score_vqa(
        goldens.read_json(f"eval/{name}_gt.json"), answers(f"eval/{name}_pred.json")
    )
    assert found == {key: expected[key] for key in ("accuracy", "per_question")}


def test_recall_scores_are_the_recorded_ones() -> None:
    expected = goldens.read_json("eval/mixed_expected_recall.json")
    found = published.score_vqa(
        goldens.read_json("eval/mixed_gt.json"),
        answers("eval/mixed_pred.json"),
        goldens.tokenizer(),
    )
    assert found == {key: expected[key] for key in ("accuracy", "per_question")}


def test_open_score_vanishes_without_numbers() -> None:
    found = published.score_vqa(
        goldens.read_json("eval/no_number_type_gt.json"), answers("eval/no_number_type_pred.json")
    )
    assert set(found["accuracy"]["perAnswerType"]) == {"yes/no"}


def test_normalisation_is_the_recorded_one() -> None:
    table: dict[str, str] = goldens.read_json("eval/normalisation.json")
    assert {text: published.normalise(text) for text in table} == table


def test_letters_are_read_as_recorded() -> None:
    labels: dict[str, Any] = goldens.read_json("eval/pmc_labels.json")
    expected = goldens.read_json("eval/pmc_expected.json")
    given = answers("eval/pmc_pred.json")
    found = published.score_choices(
        "pa-llava",
        {key: dict.fromkeys("ABCDE", "") for key in labels},
        {key: row["answer"] for key, row in labels.items()},
        given,
    )
    assert {key: published.parse_choice(text) for key, text in given.items()} == expected["parsed"]
    assert f"correct: {found['correct']}, wrong: {found['wrong']}" in expected["stdout"]
    assert f"acc: {found['accuracy']:.2f}" in expected["stdout"]


def test_pathmmu_is_scored_as_its_own_tool_scores() -> None:
    recorded = goldens.read_json("eval/pathmmu.json")
    options, labels, replies = {}, {}, {}
    for number, row in enumerate(recorded["rows"]):
        key = str(number)
        options[key] = {text[0]: text[3:] for text in row["options"]}
        labels[key], replies[key] = row["answer"][0], row["reply"]
    found = published.score_choices("pathmmu", options, labels, replies)
    assert found["correct"] == sum(recorded["right"])
    assert found["filled in at random"] == recorded["filled"] > 5
    # One at a time, replies that need no random letter are right or wrong as recorded.
    for key, right in zip(replies, recorded["right"], strict=True):
        one = published.score_choices(
            "pathmmu", {key: options[key]}, {key: labels[key]}, {key: replies[key]}
        )
        assert one["filled in at random"] or one["correct"] == right


def test_quilt_vqa_is_scored_as_its_own_tool_scores() -> None:
    recorded = goldens.read_json("eval/quilt_vqa.json")
    questions, replies = {}, {}
    for number, row in enumerate(recorded["rows"]):
        closed = row["answer_type"] == "CLOSED"
        questions[str(number)] = {
            "answer": row["yes_no_answer"] if closed else row["answer"],
            "answer_type": "yes/no" if closed else "other",
        }
        replies[str(number)] = row["reply"]
        assert published.normalise_quilt(row["reply"]) == recorded["normalised"][row["reply"]]
    found = published.score_quilt(questions, replies)
    assert found.pop("closed answers that are empty, so yes") == 1
    assert found == recorded["scores"]


def test_pmc_vqa_takes_the_choice_like_the_last_character() -> None:
    options = {"q": {"A": "fat", "B": "liver", "C": "bone"}}
    for reply, correct in (("B", 1), ("Is it B", 1), ("liver", 1), ("B.", 0), ("", 0)):
        found = published.score_choices("pmc-vqa", options, {"q": "B"}, {"q": reply})
        assert found["correct"] == correct, reply


def f1_files() -> tuple[dict[str, int], dict[str, str]]:
    import json

    lines = (goldens.GOLDEN / "eval" / "f1_pred.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return goldens.read_json("eval/f1_labels.json"), {
        row["question_id"]: row["answer"] for row in rows
    }


OSCC = {"normal oral epithelium": 0, "oral squamous cell carcinoma": 1}


def test_class_report_is_the_recorded_one() -> None:
    found = published.score_classes(*f1_files(), OSCC)
    printed = (
        f"measure_result = \n {found['report']}\n"
        f"micro-f1 =  {found['micro_f1']}\nmacro-f1 =  {found['macro_f1']}\n"
    )
    assert printed == goldens.read_json("eval/f1_expected.json")["stdout"]


def test_another_wording_of_a_class_is_refused() -> None:
    labels, found = f1_files()
    with pytest.raises(ValueError, match=r"s2.*'carcinoma'.*accepts only"):
        published.score_classes(labels, found | {"s2": "carcinoma"}, OSCC)


def test_overall_accuracy_agrees_with_scikit_learn() -> None:
    truth, found = goldens.read_json("eval/mixed_gt.json"), answers("eval/mixed_pred.json")
    score = published.score_vqa(truth, found)["accuracy"]["overall"]
    theirs = accuracy_score(
        [published.normalise(truth[key]["answer"]) for key in found],
        [published.normalise(found[key]) for key in found],
    )
    assert score == round(100 * theirs, 2)


def test_answers_to_other_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="'zz'"):
        published.score_vqa(goldens.read_json("eval/mixed_gt.json"), {"zz": "yes"})
    with pytest.raises(ValueError, match="no answers"):
        published.score_choices("pa-llava", {}, {"1": "A"}, {})
