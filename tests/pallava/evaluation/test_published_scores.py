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
    found = published.score_choices(
        {key: row["answer"] for key, row in labels.items()}, answers("eval/pmc_pred.json")
    )
    assert found["parsed"] == expected["parsed"]
    assert f"correct: {found['correct']}, wrong: {found['wrong']}" in expected["stdout"]
    assert f"acc: {found['accuracy']:.2f}" in expected["stdout"]


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
        published.score_choices({"1": "A"}, {})
