"""Reimplements the scores of PA-LLaVA's own evaluation tools, digit for digit.

They follow `VQAEval.py`, `pmcvqa.py` and `f1.py` of github.com/ddw2AIGROUP2CQUPT/PA-LLaVA and serve
comparison with published tables; `text`, `choices` and `classes` contain the recommended metrics.
Percentages are rounded to two digits, as the tools print them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from pallava.text.encoding import Tokenizer

_DELETED = str.maketrans("", "", ",.'!?\"()*#:;~")
_DIGITS = 2


def normalise(answer: object) -> str:
    """Lowercases, removes `,.'!?"()*#:;~`, and unifies the spelling of x-ray and of hyphens."""
    text = str(answer).lower().translate(_DELETED).replace(" \t", " ")
    text = text.replace("x ray", "xray").replace("x-ray", "xray")
    return text.replace(" - ", "-")


def score_vqa(
    questions: Mapping[str, Mapping[str, Any]],
    answers: Mapping[str, str],
    recall_tokenizer: Tokenizer | None = None,
) -> dict[str, Any]:
    """Scores PathVQA answers by equality, or by recall of the language model's tokens.

    As in the original, `other` pools the types `other` and `number`, and is absent if the file
    lacks either type. The original calls it "open".

    Args:
        questions: `answer`, `answer_type` and `question_type` by question id.
        answers: Answers by question id; questions without one are not counted.
        recall_tokenizer: Tokenizer with which token recall is scored instead of equality.

    Returns:
        `accuracy` with `overall`, `perAnswerType` and `perQuestionType`, and `per_question`, in
        percent.

    Raises:
        ValueError: If there are no answers, or some belong to no question.
    """
    _check_ids(questions, answers)
    scores = {}
    for question_id, answer in answers.items():
        found, expected = normalise(answer), normalise(questions[question_id]["answer"])
        if recall_tokenizer is None:
            scores[question_id] = float(found == expected)
        else:
            scores[question_id] = token_recall(
                recall_tokenizer.encode(found, add_special_tokens=False),
                recall_tokenizer.encode(expected, add_special_tokens=False),
            )
    by_question_type, by_answer_type = defaultdict(list), defaultdict(list)
    for question_id, score in scores.items():
        by_question_type[str(questions[question_id]["question_type"])].append(score)
        by_answer_type[str(questions[question_id]["answer_type"])].append(score)
    per_answer_type = {}
    if by_answer_type["yes/no"]:
        per_answer_type["yes/no"] = _percent(by_answer_type["yes/no"])
    if by_answer_type["other"] and by_answer_type["number"]:
        per_answer_type["other"] = _percent(by_answer_type["other"] + by_answer_type["number"])
    return {
        "accuracy": {
            "overall": _percent(list(scores.values())),
            "perAnswerType": per_answer_type,
            "perQuestionType": {key: _percent(part) for key, part in by_question_type.items()},
        },
        "per_question": {key: _percent([score]) for key, score in scores.items()},
    }


def token_recall(found: Sequence[Any], expected: Sequence[Any]) -> float:
    """Returns the fraction of expected tokens that were found, counting repetitions."""
    if not expected:
        return 0.0
    return (Counter(found) & Counter(expected)).total() / len(expected)


def parse_choice(answer: str) -> str:
    """Returns the lowercased text before the first colon, or the whole text without one."""
    before, colon, _ = answer.partition(":")
    return (before if colon and before else answer).lower()


def score_choices(labels: Mapping[str, str], answers: Mapping[str, str]) -> dict[str, Any]:
    """Scores PMC-VQA answers: the result of `parse_choice` must equal the letter.

    Raises:
        ValueError: If there are no answers, or some belong to no question.
    """
    _check_ids(labels, answers)
    parsed = {question_id: parse_choice(answer) for question_id, answer in answers.items()}
    correct = sum(parsed[question_id] == labels[question_id].lower() for question_id in answers)
    return {
        "correct": correct,
        "wrong": len(parsed) - correct,
        "accuracy": round(100 * correct / len(parsed), _DIGITS),
        "parsed": parsed,
    }


def score_classes(
    labels: Mapping[str, int], answers: Mapping[str, str], class_texts: Mapping[str, int]
) -> dict[str, Any]:
    """Scores zero-shot classification: an answer must equal a class text exactly.

    Args:
        labels: Class index by id.
        answers: Answers by id.
        class_texts: Class index by class text.

    Returns:
        `report` (scikit-learn's table), `micro_f1` and `macro_f1`.

    Raises:
        ValueError: If an answer is not a class text; the original fails with a KeyError.
    """
    from sklearn.metrics import classification_report, f1_score

    _check_ids(labels, answers)
    for question_id, answer in answers.items():
        if answer not in class_texts:
            raise ValueError(
                f"answer of {question_id!r} is {answer!r}; the published scoring accepts only "
                f"{', '.join(map(repr, class_texts))}. Our own scoring reads other wordings"
            )
    true = [labels[question_id] for question_id in answers]
    predicted = [class_texts[answer] for answer in answers.values()]
    return {
        "report": classification_report(true, predicted, digits=4, zero_division=0.0),
        "micro_f1": float(f1_score(true, predicted, average="micro", zero_division=0.0)),
        "macro_f1": float(f1_score(true, predicted, average="macro", zero_division=0.0)),
    }


def _check_ids(known: Mapping[str, Any], answers: Mapping[str, str]) -> None:
    if not answers:
        raise ValueError("there are no answers to score")
    unknown = [question_id for question_id in answers if question_id not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} answer(s) belong to no question of the data file, the first: "
            f"{unknown[0]!r}; were they made for another file?"
        )


def _percent(scores: Sequence[float]) -> float:
    return round(100 * sum(scores) / len(scores), _DIGITS)
