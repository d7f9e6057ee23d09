"""Scores answers: selects the metrics for each kind of benchmark and adds intervals.

Every score is a percentage `{"value", "low", "high"}` with its 95 % bootstrap interval, or
`{"value"}` if an interval would be meaningless, as for questions about a single image. Intervals
resample images or slides rather than questions (`Question.cluster`), since the questions about one
image are not independent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from pallava.evaluation.metrics import choices, classes, published, text
from pallava.records.questions import Question
from pathcore import stats
from pathcore.image_sets import ImageSet

Score = dict[str, float]
Table = dict[str, Any]

_CLASS_SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "micro_f1")


def score_vqa(
    questions: Sequence[Question],
    answers: Mapping[str, str],
    tokenizer: Any = None,
    *,
    rules: Sequence[str] = ("pa-llava",),
) -> Table:
    """Scores open and yes/no questions.

    Args:
        questions: Questions with references; those without an answer are skipped.
        answers: Answers by question id.
        tokenizer: Tokenizer of the language model for the published token recall, which is skipped
            without one.
        rules: Published rules to score by as well: `pa-llava`, `quilt-vqa`.

    Returns:
        `scores` by group (`closed`, `open`, `overall`), `by_question_type`, `by_answer_type`,
        `published`, and `details` by question.
    """
    asked = _answered(questions, answers)
    details = {question.id: _score_one(question, answers[question.id]) for question in asked}
    closed = [question for question in asked if question.answer_type == "yes/no"]
    opened = [question for question in asked if question.answer_type != "yes/no"]
    scores: Table = {"overall": {"count": len(asked), "correct": _mean(details, asked, "correct")}}
    if closed:
        unread = sum(details[question.id]["said"] is None for question in closed)
        scores["closed (yes/no)"] = {
            "count": len(closed),
            "accuracy": _mean(details, closed, "correct"),
            "neither yes nor no": unread,
        }
    if opened:
        scores["open"] = {
            "count": len(opened),
            "exact match": _mean(details, opened, "correct"),
            **{
                f"token {name}": _mean(details, opened, name)
                for name in ("precision", "recall", "f1")
            },
            **_bleu(opened, answers),
            # Recall rewards long answers, so that their length belongs beside it.
            "words per answer": round(
                sum(len(answers[question.id].split()) for question in opened) / len(opened), 1
            ),
        }
    records = {
        question.id: {
            "answer": question.answer,
            "answer_type": question.answer_type,
            "question_type": question.question_type,
        }
        for question in asked
    }
    given = {question.id: answers[question.id] for question in asked}
    original: Table = {}
    if "pa-llava" in rules:
        original["exact"] = published.score_vqa(records, given)["accuracy"]
        if tokenizer is not None:
            original["token recall"] = published.score_vqa(records, given, tokenizer)["accuracy"]
    if "quilt-vqa" in rules:
        original["quilt-vqa"] = published.score_quilt(records, given)
    return {
        "scores": scores,
        "by_question_type": _by(asked, details, lambda question: question.question_type),
        "by_answer_type": _by(asked, details, lambda question: question.answer_type),
        **_by_groups(asked, details),
        "published": original,
        "details": details,
    }


def score_choices(
    questions: Sequence[Question],
    answers: Mapping[str, str],
    tokenizer: Any = None,
    *,
    rules: Sequence[str] = (),
) -> Table:
    """Scores multiple choice by the letter that each answer names.

    Args:
        questions: Questions with references; those without an answer are skipped.
        answers: Answers by question id.
        tokenizer: Not used.
        rules: Published rules to score by as well; see `metrics.published.CHOICE_RULES`.

    Returns:
        Tables like those of `score_vqa`, plus a confusion matrix of letters.
    """
    del tokenizer
    asked = _answered(questions, answers)
    details: dict[str, dict[str, Any]] = {}
    for question in asked:
        said = choices.parse_choice(answers[question.id], question.options)
        details[question.id] = {"said": said, "correct": float(said == question.answer)}
    letters = sorted({letter for question in asked for letter in question.options})
    table = _class_table(asked, [details[question.id]["said"] for question in asked], letters)
    labels = {question.id: str(question.answer) for question in asked}
    given = {key: answers[key] for key in labels}
    options = {question.id: question.options for question in asked}
    original = {rule: published.score_choices(rule, options, labels, given) for rule in rules}
    return {
        "scores": {"letters": table.pop("scores")},
        **table,
        "by_question_type": _by(asked, details, lambda question: question.question_type),
        **_by_groups(asked, details),
        "published": original,
        "details": details,
    }


def score_classes(
    questions: Sequence[Question],
    answers: Mapping[str, str],
    tokenizer: Any = None,
    *,
    class_set: ImageSet,
) -> Table:
    """Scores zero-shot classification; an answer that names no class or several is wrong.

    Returns:
        Tables like those of `score_vqa`, plus a confusion matrix and precision, recall and F1 by
        class.
    """
    del tokenizer
    asked = _answered(questions, answers)
    details: dict[str, dict[str, Any]] = {}
    for question in asked:
        said = classes.parse_class(answers[question.id], class_set.wordings)
        details[question.id] = {"said": said, "correct": float(said == question.answer)}
    predicted = [details[question.id]["said"] for question in asked]
    table = _class_table(asked, predicted, class_set.names)
    numbers = {name: number for number, name in enumerate(class_set.names)}
    labels = {question.id: numbers[str(question.answer)] for question in asked}
    try:
        original = published.score_classes(labels, {key: answers[key] for key in labels}, numbers)
    except ValueError as error:  # the published tool fails here as well
        original = {"error": str(error)}
    return {
        "scores": {"classes": table.pop("scores")},
        **table,
        "published": original,
        "details": details,
    }


def _answered(questions: Sequence[Question], answers: Mapping[str, str]) -> list[Question]:
    known = {question.id for question in questions}
    strangers = [key for key in answers if key not in known]
    if strangers:
        raise ValueError(
            f"{len(strangers)} answer(s) belong to no question of the data, the first: "
            f"{strangers[0]!r}; were they made for another file?"
        )
    asked = [item for item in questions if item.answer is not None and item.id in answers]
    if not asked:
        raise ValueError("no question has both an answer and a reference: nothing can be scored")
    return asked


def _score_one(question: Question, answer: str) -> dict[str, Any]:
    reference = str(question.answer)
    if question.answer_type == "yes/no":
        said = text.parse_yes_no(answer)
        is_correct = said is not None and said == text.parse_yes_no(reference)
        return {"said": said, "correct": float(is_correct)}
    scores = text.token_scores(answer, reference)
    return {"correct": float(text.exact_match(answer, reference)), **scores._asdict()}


def _bleu(questions: Sequence[Question], answers: Mapping[str, str]) -> dict[str, Score]:
    given = [answers[question.id] for question in questions]
    references = [str(question.answer) for question in questions]
    return {
        "BLEU-1": percent(text.corpus_bleu(given, references, max_ngram_order=1)),
        "BLEU-4": percent(text.corpus_bleu(given, references)),
    }


def _mean(details: Mapping[str, Any], questions: Sequence[Question], name: str) -> Score:
    values = [details[question.id][name] for question in questions]
    clusters = [question.cluster for question in questions]
    interval = stats.mean_interval(values, clusters) if len(set(clusters)) > 1 else None
    return percent(sum(values) / len(values), interval)


def percent(value: float, interval: stats.Interval | None = None) -> Score:
    """Returns a fraction and its interval in percent, as scores are written."""
    score = {"value": round(100 * float(value), 4)}
    if interval is not None:
        score |= {"low": round(100 * interval[0], 4), "high": round(100 * interval[1], 4)}
    return score


def _by(
    questions: Sequence[Question],
    details: Mapping[str, Any],
    key: Callable[[Question], str],
) -> Table:
    groups: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        groups[key(question)].append(question)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        name: {"count": len(part), "correct": _mean(details, part, "correct")}
        for name, part in ordered
    }


def _by_groups(questions: Sequence[Question], details: Mapping[str, Any]) -> Table:
    """Returns `groups`, the names of the groups that the data states, and `by_NAME` for each."""
    names = list(dict.fromkeys(name for question in questions for name in question.groups))
    tables: Table = {}
    for name in names:
        # _by calls the function at once, so the name in it is this one.
        tables[f"by_{name}"] = _by(questions, details, lambda q: q.groups.get(name, ""))  # noqa: B023
    return {"groups": names, **tables} if names else {}


def _class_table(
    questions: Sequence[Question], predicted: Sequence[str | None], names: Sequence[str]
) -> Table:
    true = [str(question.answer) for question in questions]
    clusters = [question.cluster for question in questions]
    counts = classes.confusion_matrix(true, predicted, names)
    values = classes.class_scores(counts)
    scores: Table = {"count": len(true), "unreadable": int(counts[:, -1].sum())}
    cells = np.zeros((len(true), *counts.shape), dtype=np.int8)
    columns: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    columns[None] = len(names)
    rows = [columns[label] for label in true]
    cells[np.arange(len(true)), rows, [columns[name] for name in predicted]] = 1
    for name in _CLASS_SCORES:
        interval = (
            stats.cluster_interval(cells, clusters, partial(_class_score, name))
            if len(set(clusters)) > 1
            else None
        )
        scores[name.replace("_", " ")] = percent(float(values[name]), interval)
    return {
        "scores": scores,
        "by_class": {
            name: {
                "count": int(counts[index].sum()),
                **{key: percent(values[key][index]) for key in ("precision", "recall", "f1")},
            }
            for index, name in enumerate(names)
        },
        "confusion": {
            "true": list(names),
            "predicted": [*names, "unreadable"],
            "counts": counts.tolist(),
        },
    }


def _class_score(name: str, counts: Any) -> Any:
    return classes.class_scores(counts)[name]
