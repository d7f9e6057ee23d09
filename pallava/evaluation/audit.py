"""Audits a score: what the image, the text, the options, their order and the wording contribute.

Every question is asked again in several arms, which differ from the benchmark in one respect each:

| arm | the question is asked |
|---|---|
| `true` | as in the benchmark |
| `exchanged` | with the image of another question, one with the same wording if there is any |
| `none` | without an image: the prompt holds no image tokens |
| `blank` | with an image of empty glass of the same size (not for tile features of slides) |
| `again` | as in the benchmark, a second time |
| `reworded_1` ... | as in the benchmark, in another prompt |
| `rotated_1` ... | with its options rotated by one position, two, ... (multiple choice) |
| `no_options` | without its options (multiple choice) |
| `options_only` | as its options only, without question and image (multiple choice) |

All comparisons are paired by question, and intervals resample whole images, slides or patients
(`Question.cluster`), because questions about one image are not independent.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pallava.evaluation.benchmarks import Benchmark
from pallava.evaluation.scoring import percent
from pallava.records.prompts import Prompt
from pallava.records.questions import ImageSource, Question, SlideFeatures
from pallava.text.words import words
from pathcore import stats
from pathcore.files import write_json, write_text
from pathcore.images import ImageError, data_url
from pathcore.rows import write_rows

if TYPE_CHECKING:
    from pallava.evaluation.generation import Outcome  # imports torch

TRUE, EXCHANGED, NONE, BLANK, AGAIN = "true", "exchanged", "none", "blank", "again"
NO_OPTIONS, OPTIONS_ONLY = "no_options", "options_only"
ROTATED, REWORDED = "rotated_", "reworded_"

IMAGE_MARGIN = 5.0
"""Points that the image must contribute; an interval entirely below this is a fault."""
TEXT_MARGIN = 5.0
"""Points above chance that text alone may give."""
LETTER_MARGIN = 10.0
"""Points by which a letter may be chosen more often than the rotated options justify."""
REPEAT_MARGIN = 5.0
"""Percent of answers that may change when the same item is asked twice."""
ORDER_MARGIN = 25.0
"""Percent of answers that may change with the order of the options, beyond those of a repeat.

Published models change 24 to 50 % of their answers, the best 13 % (arXiv:2606.26079).
"""

_CLOSED = ("yes/no", "choice", "class")

Score = dict[str, float]


@dataclass(frozen=True)
class AuditRow:
    """One question in one arm.

    Attributes:
        item: Id of the question in the benchmark.
        arm: Arm.
        cluster: Image, slide or patient, which intervals resample as a whole.
        form: `yes/no`, `choice`, `class` or another answer type.
        answer: Reference; for multiple choice the letter in this arm's order of options.
        given: Reply of the model.
        said: The answer parsed from it: a letter, yes or no, a class, or the text of an open
            answer; None if it could not be parsed.
        correct: Score of the answer, 0 or 1.
        chance: Probability that a guess is right; 0 for open questions.
        options: Option text by letter, in this arm's order.
    """

    item: str
    arm: str
    cluster: str
    form: str
    answer: str
    given: str
    said: str | None
    correct: float
    chance: float
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def content(self) -> str | None:
        """The parsed answer, independent of the order of the options."""
        return self.options.get(self.said, self.said) if self.said is not None else None


# --- arms ---------------------------------------------------------------------------------------

REWORDINGS = (
    Prompt(
        f"{REWORDED}1",
        choice="{question}\n{options}\n\nAnswer with the option's letter from the given choices.",
        option="({letter}) {text}",
        open="{question}\nAnswer briefly.",
        closed="{question}\nAnswer with yes or no.",
    ),
    Prompt(
        f"{REWORDED}2",
        choice="Question: {question}\nOptions:\n{options}\nAnswer:",
        option="{letter}) {text}",
        open="Question: {question}\nAnswer:",
        closed="Question: {question}\nAnswer (yes or no):",
    ),
    Prompt(
        f"{REWORDED}3",
        choice="Look at the image and choose the correct option. {question}\n{options}",
        option="{letter}. {text}",
        open="Look at the image and answer the question. {question}",
        closed="Look at the image and decide, yes or no: {question}",
    ),
)
_BARE_STEM = "Which option is correct?"

_GLASS = (243, 243, 243)
"""Grey level of empty glass under the usual white balance of slide scanners."""


@dataclass(frozen=True)
class BlankImage:
    """Picture of empty glass, of the same size as another image.

    Attributes:
        image: Image that determines the size.
    """

    image: ImageSource

    @property
    def name(self) -> str:
        """See `ImageSource.name`."""
        return f"blank, for {self.image.name}"

    def load(self) -> Image.Image:
        """See `ImageSource.load`."""
        return Image.new("RGB", self.image.load().size, _GLASS)

    def identity(self, digest: Callable[[Path], str]) -> str:
        """See `ImageSource.identity`."""
        return f"blank: {self.image.identity(digest)}"


@dataclass(frozen=True)
class Arms:
    """The questions of all arms.

    Attributes:
        questions: Questions by arm; those of `true` are the benchmark's own.
        items: Id of the benchmark's question by id of an arm's question.
        donors: Id of the question whose image replaces that of each question in `exchanged`.
        matches: Number of exchanged images by what the two questions have in common.
    """

    questions: dict[str, list[Question]]
    items: dict[str, str]
    donors: dict[str, str]
    matches: dict[str, int]


def make_arms(questions: Sequence[Question], *, seed: int = 0) -> Arms:
    """Makes the questions of all arms that the benchmark permits.

    Options can be rotated or removed only if the data separates them from the question's text.

    Args:
        questions: Questions of a benchmark; those without a reference are skipped.
        seed: Seed of the exchange of images.
    """
    asked = [question for question in questions if question.answer is not None]
    by_arm: dict[str, list[Question]] = {TRUE: asked}
    items = {question.id: question.id for question in asked}
    donors, matches = _exchange(asked, np.random.default_rng(seed))

    def add(arm: str, question: Question, **changes: Any) -> None:
        variant = question.variant(arm, **changes)
        by_arm.setdefault(arm, []).append(variant)
        items[variant.id] = question.id

    by_id = {question.id: question for question in asked}
    for question in asked:
        if question.image is not None:
            if question.id in donors:
                add(EXCHANGED, question, image=by_id[donors[question.id]].image)
            add(NONE, question, image=None)
            if not isinstance(question.image, SlideFeatures):
                add(BLANK, question, image=BlankImage(question.image))
        is_choice = question.answer_type == "choice"
        if question.prompt is not None or not is_choice:
            for prompt in REWORDINGS:
                add(prompt.name, question, prompt=prompt)
        if question.prompt is not None and is_choice:
            for shift in range(1, len(question.options)):
                add(f"{ROTATED}{shift}", question, **_rotated(question, shift))
            add(OPTIONS_ONLY, question, image=None, stem=_BARE_STEM)
            add(NO_OPTIONS, question)
            bare = question.prompt.render(question.stem, {}, "other")
            by_arm[NO_OPTIONS][-1] = replace(by_arm[NO_OPTIONS][-1], text=bare)
    # In reverse order, so that a question shares its batch with other questions than before.
    for question in reversed(asked):
        add(AGAIN, question)
    return Arms(by_arm, items, donors, matches)


def exchange_images(
    wordings: Sequence[Hashable], images: Sequence[Hashable], rng: np.random.Generator
) -> list[int | None]:
    """Permutes the images among the questions of each wording, so that none keeps its own.

    The permutation preserves how frequent each right answer to a wording is. A model that answers
    from the text alone therefore keeps its accuracy, and one that answers from the image falls to
    that of chance agreement.

    Args:
        wordings: Wording of each question.
        images: Image of each question; several questions may share one.
        rng: Generator of the permutations.

    Returns:
        Index of the question whose image each question gets; None if that would be its own image,
        which happens only if more than half of the questions of a wording share an image.

    Example:
        >>> exchange_images(["mucin?"] * 3 + ["fat?"], list("abca"), np.random.default_rng(0))
        [1, 2, 0, None]
    """
    by_wording: dict[Hashable, list[int]] = defaultdict(list)
    for index, wording in enumerate(wordings):
        by_wording[wording].append(index)
    givers: list[int | None] = [None] * len(wordings)
    for indices in by_wording.values():
        by_image: dict[Hashable, list[int]] = defaultdict(list)
        for index in rng.permutation(indices).tolist():
            by_image[images[index]].append(index)
        # Equal images form runs; a shift by the longest run moves each question out of its own.
        order = [index for run in by_image.values() for index in run]
        offset = max(map(len, by_image.values()))
        for giver, taker in zip(order, np.roll(order, offset).tolist(), strict=True):
            if images[giver] != images[taker]:
                givers[taker] = giver
    return givers


def _exchange(
    questions: Sequence[Question], rng: np.random.Generator
) -> tuple[dict[str, str], dict[str, int]]:
    """Chooses donors of images: same wording if possible, else same type of question, else any."""
    shown = [question for question in questions if question.image is not None]
    clusters = [question.cluster for question in shown]
    kinds: dict[str, list[Hashable]] = {
        "same wording": [(" ".join(words(q.stem)), q.answer_type) for q in shown],
        "same type of question": [(q.question_type, q.answer_type) for q in shown],
        "any": [None] * len(shown),
    }
    givers = exchange_images(kinds["same wording"], clusters, rng)
    matches = {"same wording": sum(giver is not None for giver in givers)}
    for kind in ("same type of question", "any"):
        members: dict[Hashable, list[int]] = defaultdict(list)
        for index, key in enumerate(kinds[kind]):
            members[key].append(index)
        matches[kind] = 0
        for taker, giver in enumerate(givers):
            if giver is None:
                others = members[kinds[kind][taker]]
                start = int(rng.integers(len(others)))
                turned = (others[(start + step) % len(others)] for step in range(len(others)))
                givers[taker] = next((o for o in turned if clusters[o] != clusters[taker]), None)
                matches[kind] += givers[taker] is not None
    donors = {
        shown[taker].id: shown[giver].id for taker, giver in enumerate(givers) if giver is not None
    }
    return donors, {kind: count for kind, count in matches.items() if count}


def _rotated(question: Question, shift: int) -> dict[str, Any]:
    letters, texts = list(question.options), list(question.options.values())
    number = len(letters)
    options = {letter: texts[(place - shift) % number] for place, letter in enumerate(letters)}
    place = letters.index(str(question.answer))
    return {"options": options, "answer": letters[(place + shift) % number]}


def read_rows(
    benchmark: Benchmark, arms: Arms, answers: Mapping[str, Mapping[str, str]]
) -> list[AuditRow]:
    """Parses and scores the answers of all arms by the rules of the benchmark.

    Args:
        benchmark: Benchmark with a scorer.
        arms: Questions by arm.
        answers: Answers by arm and question id; questions without an answer are skipped.
    """
    assert benchmark.score is not None
    num_classes = len({q.answer for q in arms.questions[TRUE] if q.answer_type == "class"})
    rows = []
    for arm, questions in arms.questions.items():
        given = answers.get(arm) or {}
        if not given:
            continue
        details = benchmark.score(questions, given, None)["details"]
        for question in questions:
            if question.id not in details:
                continue
            read = details[question.id]
            options = question.options
            form = question.answer_type if question.answer_type in _CLOSED else "open"
            chance = {"yes/no": 0.5, "choice": 1 / max(len(options), 1), "open": 0.0}
            rows.append(
                AuditRow(
                    item=arms.items[question.id],
                    arm=arm,
                    cluster=question.cluster,
                    form=form,
                    answer=str(question.answer),
                    given=given[question.id],
                    said=read.get("said", " ".join(words(given[question.id])))
                    if form == "open"
                    else read["said"],
                    correct=read["correct"],
                    chance=chance.get(form, 1 / max(num_classes, 1)),
                    options=options,
                )
            )
    return rows


# --- statistics ---------------------------------------------------------------------------------


def summarise(
    rows: Iterable[AuditRow], *, seed: int = 0, num_resamples: int = stats.NUM_RESAMPLES
) -> dict[str, Any]:
    """Computes the scores of each arm with 95 % intervals, in percent.

    Args:
        rows: Rows of all arms, including `true`.
        seed: Seed of the bootstrap.
        num_resamples: Number of bootstrap draws.

    Returns:
        Sections `accuracy`, `image`, `text`, `position`, `wording` and `repeat`. A score has
        `value`, `low`, `high` and `count`, the number of questions that it compares; a score is
        omitted if no question has all of its arms.

    Raises:
        ValueError: If no row belongs to the arm `true`.
    """
    items: dict[str, dict[str, AuditRow]] = {}
    for row in rows:
        items.setdefault(row.item, {})[row.arm] = row
    items = {item: arms for item, arms in items.items() if TRUE in arms}
    if not items:
        raise ValueError(f"expected rows of the arm {TRUE!r}, found none")
    table = _Table(list(items.values()), {"seed": seed, "num_resamples": num_resamples})
    references = [arms[TRUE] for arms in items.values()]
    arms = sorted({arm for found in items.values() for arm in found}, key=_arm_order)
    summary: dict[str, Any] = {
        "num_items": len(items),
        "num_clusters": len({row.cluster for row in references}),
        "accuracy": _without_none({arm: table.score(_accuracy(arm)) for arm in arms}),
        "image": _image_section(table),
        "text": _text_section(table, references),
        "position": _position_section(table, references, arms),
        "wording": _wording_section(table, [arm for arm in arms if arm.startswith(REWORDED)]),
        "repeat": _without_none({"answers that change": table.score(_changes(AGAIN))}),
    }
    return summary


Value = tuple[tuple[str, ...], Callable[[Mapping[str, AuditRow]], float], float]
"""Arms that a question must have, function of its value, and the least possible value."""


class _Table:
    """The questions of a summary, and means over them with intervals that resample clusters."""

    def __init__(
        self, items: Sequence[Mapping[str, AuditRow]], bootstrap: Mapping[str, int]
    ) -> None:
        self.items = items
        self.bootstrap = bootstrap

    def columns(self, *values: Value) -> tuple[NDArray[np.float64], list[str]]:
        """Returns values `(N, len(values))` of the questions that have all arms, and clusters."""
        rows, clusters = [], []
        for arms in self.items:
            if all(arm in arms for needed, _, _ in values for arm in needed):
                row = [of_item(arms) for _, of_item, _ in values]
                if not np.isnan(row).any():
                    rows.append(row)
                    clusters.append(arms[TRUE].cluster)
        return np.array(rows, dtype=np.float64), clusters

    def score(self, value: Value) -> Score | None:
        """Returns the mean with its interval; None if no question has the arms."""
        columns, clusters = self.columns(value)
        if not clusters:
            return None
        column, mean = columns[:, 0], float(columns.mean())
        if np.ptp(column) > 0:
            low, high = stats.mean_interval(column, clusters, **self.bootstrap)
        else:
            # A bootstrap of equal values has zero width, however few they are. An event that none
            # of n clusters shows may still have a positive rate: Wilson's bound for 0 of n.
            unseen = stats.wilson_interval(0, len(set(clusters)))[1]
            low = mean - unseen * (mean - value[2])
            high = mean + unseen * (1 - mean)
        return {**percent(mean, (low, high)), "count": len(column)}


def _accuracy(arm: str) -> Value:
    return (arm,), lambda arms: arms[arm].correct, 0.0


def _difference(first: str, second: str) -> Value:
    return (first, second), lambda arms: arms[first].correct - arms[second].correct, -1.0


def _changes(arm: str) -> Value:
    return (TRUE, arm), lambda arms: float(arms[TRUE].content != arms[arm].content), 0.0


def _above_chance(arm: str) -> Value:
    return (arm,), lambda arms: arms[arm].correct - arms[TRUE].chance, -1.0


def _beyond_half(arm: str) -> Value:
    """Returns the margin by which an arm keeps more than half of the accuracy above chance.

    It is a difference, because the ratio of the two can have a denominator near zero and then has
    no usable bootstrap interval.
    """

    def value(arms: Mapping[str, AuditRow]) -> float:
        chance = arms[TRUE].chance
        return (arms[arm].correct - chance) - (arms[TRUE].correct - chance) / 2

    return (TRUE, arm), value, -1.0


def _image_section(table: _Table) -> dict[str, Any]:
    section = _without_none(
        {
            "worth": table.score(_difference(TRUE, EXCHANGED)),
            "over no image": table.score(_difference(TRUE, NONE)),
            "over a blank image": table.score(_difference(TRUE, BLANK)),
            "answers that change": table.score(_changes(EXCHANGED)),
        }
    )
    pairs = [
        (arms[TRUE].correct, arms[EXCHANGED].correct) for arms in table.items if EXCHANGED in arms
    ]
    if pairs:
        section["right to wrong"] = sum(before > after for before, after in pairs)
        section["wrong to right"] = sum(before < after for before, after in pairs)
    return section


def _text_section(table: _Table, references: Sequence[AuditRow]) -> dict[str, Any]:
    return {
        "chance": round(100 * float(np.mean([row.chance for row in references])), 4),
        "most frequent answer": round(100 * _majority(references), 4),
        **_without_none(
            {
                "longest option": table.score(((TRUE,), _longest, 0.0))
                if any(row.options for row in references)
                else None,
                "above chance": table.score(_above_chance(NONE)),
                "beyond half of the accuracy": table.score(_beyond_half(NONE)),
                "options above chance": table.score(_above_chance(OPTIONS_ONLY)),
                "options beyond half of the accuracy": table.score(_beyond_half(OPTIONS_ONLY)),
                "question beside the options": table.score(_difference(NONE, OPTIONS_ONLY)),
            }
        ),
    }


def _longest(arms: Mapping[str, AuditRow]) -> float:
    row = arms[TRUE]
    if not row.options:
        return float("nan")
    longest = max(map(len, row.options.values()))
    tied = [letter for letter, text in row.options.items() if len(text) == longest]
    return (row.answer in tied) / len(tied)


def _majority(references: Sequence[AuditRow]) -> float:
    counts = Counter(row.answer for row in references)
    return max(counts.values()) / len(references)


def _position_section(
    table: _Table, references: Sequence[AuditRow], arms: Sequence[str]
) -> dict[str, Any]:
    letters = sorted({letter for row in references for letter in row.options})
    if not letters or not any(arm.startswith(ROTATED) for arm in arms):
        return {}

    def rotations(found: Mapping[str, AuditRow]) -> list[AuditRow] | None:
        """Returns the rows of all positions; None if one of them is missing."""
        number = len(found[TRUE].options)
        names = [TRUE, *(f"{ROTATED}{shift}" for shift in range(1, number))]
        return [found[name] for name in names] if number and set(names) <= set(found) else None

    def over(value: Callable[[list[AuditRow]], float], least: float = 0.0) -> Value:
        """Returns a value over all rotations of an item; NaN for items that lack one."""

        def of_item(found: Mapping[str, AuditRow]) -> float:
            turned = rotations(found)
            return float("nan") if turned is None else value(turned)

        return (TRUE,), of_item, least

    def excess(letter: str) -> Value:
        """Returns how much more often a letter is chosen than its share of the rotations."""
        # The right answer is at each position once, so that even a model that is always right
        # chooses every letter equally often.
        return over(
            lambda turned: (
                float(np.mean([row.said == letter for row in turned]))
                - (letter in turned[0].options) / len(turned)
            ),
            -1.0,
        )

    def flips(turned: list[AuditRow]) -> float:
        return float(np.mean([row.content != turned[0].content for row in turned[1:]]))

    def flips_beyond_repeat(found: Mapping[str, AuditRow]) -> float:
        turned = rotations(found)
        if turned is None:
            return float("nan")
        return flips(turned) - float(found[TRUE].content != found[AGAIN].content)

    by_letter = {letter: table.score(excess(letter)) for letter in letters}
    by_answer = {
        letter: table.score(
            over(lambda turned, at=letter: _mean(r.correct for r in turned if r.answer == at))  # type: ignore[misc]
        )
        for letter in letters
    }
    return _without_none(
        {
            "accuracy over all positions": table.score(over(lambda t: _mean(r.correct for r in t))),
            "right at every position": table.score(over(lambda t: min(r.correct for r in t))),
            "answers that change": table.score(over(flips)),
            "beyond those of a repeat": table.score(((TRUE, AGAIN), flips_beyond_repeat, -1.0)),
            "chosen too often": _without_none(by_letter),
            "accuracy by position of the answer": _without_none(by_answer),
        }
    )


def _wording_section(table: _Table, reworded: Sequence[str]) -> dict[str, Any]:
    columns, clusters = table.columns(*map(_accuracy, (TRUE, *reworded)))
    if not reworded or not clusters:
        return {}
    cases = np.column_stack([columns, np.ones(len(columns))])
    statistics: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
        "worst": lambda means: means.min(axis=1),
        "mean": lambda means: means.mean(axis=1),
        "best": lambda means: means.max(axis=1),
        "spread": lambda means: np.ptp(means, axis=1),
    }

    def of_sums(of_means: Callable[[NDArray[Any]], NDArray[Any]]) -> Any:
        return lambda sums: of_means(sums[:, :-1] / sums[:, -1:])

    section = {}
    for name, of_means in statistics.items():
        value = float(of_means(columns.mean(axis=0)[None])[0])
        interval = stats.cluster_interval(cases, clusters, of_sums(of_means), **table.bootstrap)
        section[name] = {**percent(value, interval), "count": len(columns)}
    return section


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return float(np.mean(found)) if found else float("nan")


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _arm_order(arm: str) -> tuple[int, str]:
    order = (TRUE, EXCHANGED, BLANK, NONE, OPTIONS_ONLY, NO_OPTIONS, AGAIN)
    return (order.index(arm) if arm in order else len(order)), arm


# --- verdict ------------------------------------------------------------------------------------


def verdict(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Names the faults that a summary shows.

    A fault is named if the whole 95 % interval lies on the wrong side of its threshold. A check
    whose interval contains the threshold is undecided, which calls for more questions.

    Args:
        summary: Result of `summarise`.

    Returns:
        `faults` (name -> evidence), `undecided` (names of checks) and `sentence`, which a reviewer
        can quote.
    """
    faults: dict[str, str] = {}
    undecided: list[str] = []

    def check(name: str, is_fault: bool, is_sound: bool, evidence: str) -> None:
        if is_fault:
            faults[name] = evidence
        elif not is_sound:
            undecided.append(name)

    image, text, position = summary["image"], summary["text"], summary["position"]
    accuracy = summary["accuracy"]
    if worth := image.get("worth"):
        check(
            "hardly uses the image" if worth["low"] > 0 else "ignores the image",
            worth["high"] < IMAGE_MARGIN,
            worth["low"] > 0,
            f"its own images are worth {_points(worth)} over exchanged ones, and "
            f"{_rate(image['answers that change'])} of the answers change with the image",
        )
    alone = []
    for name, section in (("options", "options "), ("text", "")):
        above = text.get(f"{section}above chance")
        beyond = text.get(f"{section}beyond half of the accuracy")
        if not above or not beyond:
            continue
        fault = f"answers from the {name} alone"
        if name == "text" and "answers from the options alone" in faults:
            beside = text.get("question beside the options")
            if beside and beside["low"] < TEXT_MARGIN:
                continue  # the options explain what the text gives
        arm = OPTIONS_ONLY if name == "options" else NONE
        check(
            fault,
            above["low"] > TEXT_MARGIN and beyond["low"] > 0,
            above["high"] < TEXT_MARGIN or beyond["high"] <= 0,
            f"{_rate(accuracy[arm])} right from the {name} alone, {_points(above)} above chance",
        )
        alone.append(fault)
    if too_often := position.get("chosen too often"):
        letter, excess = max(too_often.items(), key=lambda pair: pair[1]["value"])
        check(
            "position bias",
            excess["low"] > LETTER_MARGIN,
            excess["high"] < LETTER_MARGIN,
            f"chooses {letter} {_points(excess)} too often, wherever the right answer stands",
        )
    repeat = summary["repeat"].get("answers that change")
    order = position.get("beyond those of a repeat")
    if repeat:
        noisy, turned = repeat["low"] > REPEAT_MARGIN, False
        quiet = repeat["high"] < REPEAT_MARGIN
        evidence = f"{_rate(repeat)} of the answers change when the same item is asked again"
        if order:
            turned = order["low"] > ORDER_MARGIN
            quiet = quiet and order["high"] < ORDER_MARGIN
        if turned and order:
            moved = (
                f"{_rate(position['answers that change'])} of the answers change with the order of "
                f"the options, {_points(order)} more than when the same item is asked again"
            )
            evidence = f"{evidence}; {moved}" if noisy else moved
        check("inconsistent", noisy or turned, quiet, evidence)
    return {
        "faults": faults,
        "undecided": undecided,
        "sentence": _sentence(summary, faults, undecided),
    }


def _sentence(
    summary: Mapping[str, Any], faults: Mapping[str, str], undecided: Sequence[str]
) -> str:
    accuracy, image, text = summary["accuracy"], summary["image"], summary["text"]
    parts = []
    if faults:
        parts.append("Faults: " + "; ".join(f"{name} ({why})" for name, why in faults.items()))
    else:
        parts.append("No fault found" if not undecided else "No fault shown")
    if undecided:
        parts.append(f"Undecided with {summary['num_items']} questions: {', '.join(undecided)}")
    figures = [f"{_rate(accuracy[TRUE])} right"]
    if EXCHANGED in accuracy:
        figures.append(f"{_rate(accuracy[EXCHANGED])} with exchanged images")
    if NONE in accuracy:
        figures.append(f"{_rate(accuracy[NONE])} without an image")
    if text["chance"]:
        figures.append(f"{text['chance']:.1f} % by chance")
    parts.append(", ".join(figures))
    if "worth" in image:
        parts.append(f"the image is worth {_points(image['worth'])}")
    if wording := summary["wording"]:
        worst, best = wording["worst"]["value"], wording["best"]["value"]
        parts.append(f"other prompts give {worst:.1f} to {best:.1f} %")
    counted = f"{summary['num_items']:,} questions on {summary['num_clusters']:,} images"
    return ". ".join([f"{part[0].upper()}{part[1:]}" for part in parts]) + f" ({counted})."


def _points(score: Score) -> str:
    return f"{score['value']:.1f} points ({score['low']:.1f} to {score['high']:.1f})"


def _rate(score: Score) -> str:
    return f"{score['value']:.1f} % ({score['low']:.1f} to {score['high']:.1f})"


# --- a whole audit ------------------------------------------------------------------------------

AUDIT_NAME, ROWS_NAME, PAGE_NAME = "audit.json", "audit.jsonl", "audit.html"

_NUM_SHOWN = 12
_THUMBNAIL_PX = 220


def audit(
    benchmark: Benchmark,
    ask: Callable[[Sequence[Question]], Outcome | None],
    work_dir: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """Asks a benchmark's questions in all arms and writes the audit of its score.

    Writes `audit.json`, `audit.jsonl` with a line per question and arm, and `audit.html`.

    Args:
        benchmark: Benchmark with references.
        ask: Function that answers questions, such as `generate_answers` of a model and a folder;
            it returns None in processes other than the first.
        work_dir: Output folder.
        settings: Settings with which the answers were generated.
        seed: Seed of the exchange of images and of the bootstrap.

    Returns:
        The content of `audit.json`; None if `ask` returned None.

    Raises:
        ValueError: If the benchmark has no references.
    """
    if benchmark.score is None:
        raise ValueError(f"{benchmark.name}: an audit needs reference answers, the data has none")
    arms = make_arms(benchmark.questions.questions, seed=seed)
    outcomes = {arm: ask(questions) for arm, questions in arms.questions.items()}
    answers = {arm: outcome.answers for arm, outcome in outcomes.items() if outcome is not None}
    if not answers:
        return None
    rows = read_rows(benchmark, arms, answers)
    forms = dict.fromkeys(row.form for row in rows if row.arm == TRUE)
    parts = {}
    for form in forms:
        summary = summarise([row for row in rows if row.form == form], seed=seed)
        parts[form] = {**summary, "verdict": verdict(summary)}
    content = {
        "benchmark": benchmark.name,
        "settings": dict(settings or {}),
        "seed": seed,
        "exchanged images": arms.matches,
        "missing": {
            arm: missing
            for arm, questions in arms.questions.items()
            if (missing := len(questions) - len(answers.get(arm, {})))
        },
        "thresholds": {
            "image is worth": IMAGE_MARGIN,
            "text above chance": TEXT_MARGIN,
            "letter chosen too often": LETTER_MARGIN,
            "answers that change when asked again": REPEAT_MARGIN,
            "answers that change with the order": ORDER_MARGIN,
        },
        "parts": parts,
    }
    texts = {question.id: question for part in arms.questions.values() for question in part}
    work_dir.mkdir(parents=True, exist_ok=True)
    write_rows(work_dir / ROWS_NAME, (_record(row, texts) for row in rows))
    write_json(work_dir / AUDIT_NAME, content)
    write_text(work_dir / PAGE_NAME, page(content, rows, arms))
    return content


def _record(row: AuditRow, questions: Mapping[str, Question]) -> dict[str, Any]:
    question = questions[row.item if row.arm == TRUE else f"{row.item} [{row.arm}]"]
    image = None if question.image is None else question.image.name
    return {**asdict(row), "prompt": question.text, "image": image}


def table(content: Mapping[str, Any]) -> str:
    """Formats the content of `audit.json` as Markdown."""
    lines = [f"# Audit of {content['benchmark']}", ""]
    for form, part in content["parts"].items():
        lines += [f"**{form}**: {part['verdict']['sentence']}", ""]
        lines += ["| | percent or points | 95 % interval | questions |", "|---|---|---|---|"]
        for name, score in figures(part):
            lines.append(
                f"| {name} | {score['value']:.1f} | {score['low']:.1f} to {score['high']:.1f} | "
                f"{score['count']} |"
            )
        if "right to wrong" in part["image"]:
            worse, better = part["image"]["right to wrong"], part["image"]["wrong to right"]
            lines += [
                "",
                f"With exchanged images, {worse} answers become wrong and {better} right.",
            ]
        lines.append("")
    return "\n".join(lines)


def read_audits(metrics_files: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Reads the verdicts of audits for a model card.

    Args:
        metrics_files: `metrics.json` files of evaluations; those without an `audit.json` beside
            them are skipped.

    Returns:
        Sentence of the verdict by benchmark and form of questions.

    Raises:
        ValueError: If an `audit.json` has another format, or belongs to another model.
    """
    found: dict[str, dict[str, str]] = {}
    for file in metrics_files:
        path = file.with_name(AUDIT_NAME)
        if not path.is_file():
            continue
        try:
            content, metrics = json.loads(path.read_bytes()), json.loads(file.read_bytes())
            sentences = {
                form: str(part["verdict"]["sentence"]) for form, part in content["parts"].items()
            }
            is_current = content["settings"] == metrics["settings"]
            found.setdefault(str(content["benchmark"]), {}).update(sentences)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected the {AUDIT_NAME} of an evaluation with --audit: {error!r}"
            ) from error
        if not is_current:
            raise ValueError(
                f"{path}: expected the settings of {file.name}, found those of an earlier run; "
                "evaluate again with --audit"
            )
    return found


def figures(part: Mapping[str, Any]) -> list[tuple[str, Score]]:
    """Returns the scores of one part of an audit with their names, nested sections flattened."""
    rows: list[tuple[str, Score]] = []

    def add(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            label = f"{prefix}: {name.replace('_', ' ')}"
            if isinstance(value, Mapping) and "low" in value:
                rows.append((label, dict(value)))
            elif isinstance(value, Mapping):
                add(label, value)

    for section in ("accuracy", "image", "text", "position", "wording", "repeat"):
        add(section, part[section])
    return rows


def page(content: Mapping[str, Any], rows: Sequence[AuditRow], arms: Arms) -> str:
    """Renders `audit.html`: verdict, figures, and questions with their images."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    source = resources.files("pallava.evaluation") / "audit.html.j2"
    items: dict[str, dict[str, AuditRow]] = {}
    for row in rows:
        items.setdefault(row.item, {})[row.arm] = row
    parts = []
    for form, part in content["parts"].items():
        own = [found for found in items.values() if TRUE in found and found[TRUE].form == form]
        parts.append(
            {"form": form, **part, "figures": figures(part), "shown": _examples(own, arms)}
        )
    template = environment.from_string(source.read_text(encoding="utf-8"))
    return template.render(audit=content, parts=parts, true_arm=TRUE) + "\n"


def _examples(items: Sequence[Mapping[str, AuditRow]], arms: Arms) -> dict[str, Any]:
    """Selects questions for the page, evenly over the benchmark."""
    paired = [found for found in items if EXCHANGED in found]
    images = (EXCHANGED, BLANK, NONE)
    groups = {
        "The answer never changes with the image": [
            found
            for found in paired
            if all(found[arm].content == found[TRUE].content for arm in images if arm in found)
        ],
        "Right with its own image, wrong with another": [
            found for found in paired if found[TRUE].correct > found[EXCHANGED].correct
        ],
        "Wrong with its own image, right with another": [
            found for found in paired if found[TRUE].correct < found[EXCHANGED].correct
        ],
    }
    questions = {question.id: question for question in arms.questions[TRUE]}

    def entry(found: Mapping[str, AuditRow]) -> dict[str, Any]:
        item = found[TRUE].item
        pictures = [("its own", questions[item]), ("exchanged", questions[arms.donors[item]])]
        return {
            "id": item,
            "question": questions[item].text,
            "answer": found[TRUE].answer,
            "pictures": [(title, _thumbnail(question.image)) for title, question in pictures],
            "rows": [found[arm] for arm in sorted(found, key=_arm_order)],
        }

    return {
        title: {
            "count": len(found),
            "of": len(paired),
            "entries": [entry(one) for one in found[:: -(-len(found) // _NUM_SHOWN) or 1]],
        }
        for title, found in groups.items()
    }


def _thumbnail(image: ImageSource | None) -> str:
    """Returns a small JPEG as a data URL; empty if there is no picture to show."""
    try:
        picture = None if image is None else image.load()
    except ImageError:
        return ""  # features of a slide, or a file that was removed since
    if picture is None:
        return ""
    picture.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    return data_url(picture, "JPEG", quality=80)
