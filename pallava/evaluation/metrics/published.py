"""Reimplements the scores of published evaluation tools, digit for digit.

`score_vqa`, `score_choices` with the rule `pa-llava`, and `score_classes` follow `VQAEval.py`,
`pmcvqa.py` and `f1.py` of github.com/ddw2AIGROUP2CQUPT/PA-LLaVA; the other rules those of PMC-VQA,
PathMMU and Quilt-LLaVA. They serve comparison with published tables; `text`, `choices` and
`classes` contain the recommended metrics. Percentages are rounded to two digits, as the tools print
them.
"""

from __future__ import annotations

import difflib
import random
import re
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


def _read_pa_llava(answer: str, options: Mapping[str, str], fill: random.Random) -> str | None:
    del fill
    said = parse_choice(answer)
    return next((letter for letter in options if letter.lower() == said), None)


def _read_pmc_vqa(answer: str, options: Mapping[str, str], fill: random.Random) -> str | None:
    """Returns the choice that most resembles the last character of the answer."""
    del fill
    best, letter = 0.0, None
    for key, text in options.items():
        ratio = difflib.SequenceMatcher(None, f" {key}:{text} ", answer[-1:]).ratio()
        if ratio > best:
            best, letter = ratio, key
    return letter


def _read_pathmmu(answer: str, options: Mapping[str, str], fill: random.Random) -> str:
    """A bracketed letter, a letter between blanks, an option's text, or else a random letter.

    Letters and texts are searched anywhere, and the last occurrence counts; texts only in answers
    of more than five words.
    """
    for character in ",.!?;:'":
        answer = answer.strip(character)
    answer = f" {answer} "
    folded = answer.lower()
    found = {letter: answer.rfind(f"({letter})") for letter in options}
    if max(found.values()) < 0:
        found = {letter: answer.rfind(f" {letter} ") for letter in options}
    if max(found.values()) < 0 and len(answer.split()) > 5:
        found = {letter: folded.rfind(text.lower()) for letter, text in options.items()}
    if max(found.values()) < 0:
        return fill.choice(list(options))
    return max(found, key=lambda letter: found[letter])


_SEED = 42  # PathMMU's
CHOICE_RULES = {
    "pa-llava": _read_pa_llava,
    "pmc-vqa": _read_pmc_vqa,
    "pathmmu": _read_pathmmu,
}
"""Functions of an answer, the options and a random generator that return the letter, by name."""


def score_choices(
    rule: str,
    options: Mapping[str, Mapping[str, str]],
    labels: Mapping[str, str],
    answers: Mapping[str, str],
) -> dict[str, Any]:
    """Scores multiple choice by a published rule.

    `pathmmu` compares texts as well, cut at the first closing bracket as its tool cuts them, and
    fills in random letters from one generator in the order of the answers.

    Args:
        rule: One of `CHOICE_RULES`.
        options: Options by question id.
        labels: Letter of the right option by question id.
        answers: Answers by question id.

    Raises:
        ValueError: If there are no answers, or some belong to no question.
    """
    _check_ids(labels, answers)
    fill = _Counted(_SEED)
    correct = 0
    for question_id, answer in answers.items():
        texts, label = dict(options[question_id]), labels[question_id]
        if rule == "pathmmu":
            texts = {letter: text.split(")")[0].strip() for letter, text in texts.items()}
        said = CHOICE_RULES[rule](answer, texts, fill)
        right = said == label
        if rule == "pathmmu":
            # Its tool compares texts, and reads a letter (or draws one) even from an answer that
            # equals the right text.
            right = texts[str(said)].lower() == texts[label].lower() or answer == texts[label]
        correct += right
    return {
        "correct": correct,
        "wrong": len(answers) - correct,
        "accuracy": round(100 * correct / len(answers), _DIGITS),
        **({"filled in at random": fill.count} if rule == "pathmmu" else {}),
    }


class _Counted(random.Random):
    """Generator that counts its choices."""

    count = 0

    def choice(self, seq: Any) -> Any:
        self.count += 1
        return super().choice(seq)


# --- Quilt-VQA (quilt_eval.py, quilt_utils.py of github.com/aldraus/quilt-llava) -----------------

_QUILT_WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
]
_QUILT_NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(_QUILT_WORDS)}}
_QUILT_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_QUILT_NEGATED = re.compile(
    r"(ai|are|ca|could|did|does|do|had|has|have|is|might|must|need|ought|sha|should|was|were|wo|"
    r"would)nt"
)
_QUILT_PERIODS = 32  # its tool passes re.UNICODE, which is 32, as the number of replacements


def normalise_quilt(text: str) -> str:
    """Lowercases, removes punctuation and articles, writes small numbers as digits.

    The tool also restores the apostrophes of some contractions; here only those of negations.
    """
    text = text.lower()
    has_number = re.search(r"\d,\d", text) is not None
    out = text
    for mark in _QUILT_PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_blank or has_number else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=_QUILT_PERIODS)
    words = [_QUILT_NUMBERS.get(word, word) for word in out.split()]
    words = [_QUILT_NEGATED.sub(r"\1n't", word) for word in words if word not in ("a", "an", "the")]
    return " ".join(words).replace(",", "")


def score_quilt(
    questions: Mapping[str, Mapping[str, Any]], answers: Mapping[str, str]
) -> dict[str, Any]:
    """Scores Quilt-VQA: token overlap of open questions, yes or no of closed ones.

    An empty answer to a closed question counts as "yes" by the second closed rule.

    Args:
        questions: `answer` and `answer_type` (`yes/no` or open) by question id.
        answers: Answers by question id.

    Raises:
        ValueError: If there are no answers, or some belong to no question.
    """
    _check_ids(questions, answers)
    sums: defaultdict[str, list[float]] = defaultdict(list)
    num_empty = 0
    for question_id, answer in answers.items():
        said, question = normalise_quilt(answer), questions[question_id]
        if question["answer_type"] == "yes/no":
            words = set(said.split())
            no = bool(words & {"no", "not"})
            sums["closed, names the answer"].append(question["answer"] in words)
            sums["closed, no or not, otherwise yes"].append((question["answer"] == "no") == no)
            num_empty += not words
            continue
        found, expected = (
            Counter(said.split()),
            Counter(normalise_quilt(question["answer"]).split()),
        )
        # Its tool counts the answer's repetitions of a common word as hits.
        hits = sum(count for word, count in found.items() if word in expected)
        missed = sum(count for word, count in expected.items() if word not in found)
        precision = hits / found.total() if found else 0.0
        recall = hits / (hits + missed) if hits else 0.0
        common = sum(word in found for word in expected)
        sums["open exact match"].append(common / found.total() if found else 0.0)
        sums["open precision"].append(precision)
        sums["open recall"].append(recall)
        sums["open f1"].append(2 * precision * recall / (precision + recall) if hits else 0.0)
    scores: dict[str, Any] = {name: _percent(values) for name, values in sums.items()}
    return scores | {"closed answers that are empty, so yes": num_empty}


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
