"""Our own scores, against scikit-learn and sacrebleu and by their invariants."""

from __future__ import annotations

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from pallava.evaluation.metrics import choices, classes, text
from pathcore import stats

OPTIONS = {"A": "lymphocytes", "B": "plasma cells", "C": "carcinoma", "D": "in situ carcinoma"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("D", "D"),
        ("d", "D"),
        ("D.", "D"),
        ("(b)", "B"),
        (" B: x", "B"),
        ("**C**", "C"),
        ("[a]", "A"),
        ("B) plasma cells", "B"),
        ("The answer is D", "D"),
        ("The answer is A: x", "A"),
        ("the correct answer is (b).", "B"),
        ("Answer: c", "C"),
        ("The correct option would be C", "C"),
        ("I choose B because of the nuclei", "B"),
        ("D is correct.", "D"),
        ("Plasma cells", "B"),
        ("These are plasma cells.", "B"),
        ("This shows an in situ carcinoma", "D"),
        ("The answer is a carcinoma", "C"),
        ("A carcinoma", "C"),
        ("The answer is A or the answer is B", None),
        ("lymphocytes and plasma cells", None),
        ("E", None),
        ("The answer is E", None),
        ("", None),
        ("I do not know", None),
        ("A biopsy was taken", None),
    ],
)
def test_letters_are_read(answer: str, letter: str | None) -> None:
    assert choices.parse_choice(answer, OPTIONS) == letter


FORMS = [
    "{}", "{}.", "({})", "({}) {t}", "{}: {t}", " {}: {t}", "{}) {t}", "{}. {t}", "**{}**",
    "The answer is {}", "The answer is {}.", "The answer is ({}).", "the correct answer is: {}",
    "Answer: {}", "Option {}", "The correct choice is {}: {t}", "{t}", "{t}.", "It is {t}.",
]  # fmt: skip


@given(st.sampled_from(sorted(OPTIONS)), st.sampled_from(FORMS))
def test_every_form_of_every_letter_is_read(letter: str, form: str) -> None:
    assert choices.parse_choice(form.format(letter, t=OPTIONS[letter]), OPTIONS) == letter


@given(st.text())
def test_any_text_is_a_letter_or_none(answer: str) -> None:
    assert choices.parse_choice(answer, OPTIONS) in {*OPTIONS, None}


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("no.", "no"),
        ("No, it is not.", "no"),
        ("Yes, there is no doubt", "yes"),
        ("The answer is yes", "yes"),
        ("There is no fibrosis", "no"),
        ("yes or no", "yes"),
        ("either yes or no", None),
        ("No idea.", None),
        ("I don't know, no idea", None),
        ("It is not a yes", None),
        ("fibrosis", None),
        ("normal", None),
        ("<think>Is it? No, wait.</think>Yes.", "yes"),
        ("<think>It could be yes", None),
        ("**Yes**, it is", "yes"),
    ],
)
def test_yes_and_no_are_read(answer: str, said: str | None) -> None:
    assert text.parse_yes_no(answer) == said


def test_words_ignore_what_does_not_matter() -> None:
    assert text.exact_match("The X-Ray, (H&E).", "x ray h&e")
    assert text.exact_match("Barrett\u2019s esophagus", "barretts esophagus")
    assert not text.exact_match("1.5", "15")
    assert text.exact_match("CD3 - positive", "cd3-positive")


def test_token_scores_count_repeated_words() -> None:
    scores = text.token_scores("liver liver cell", "liver cell cell cell")
    assert scores.precision == pytest.approx(2 / 3)
    assert scores.recall == pytest.approx(2 / 4)
    assert scores.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))


vocabulary = st.sampled_from(["liver", "cell", "fibrosis", "portal", "tract"])
sentences = st.lists(vocabulary, min_size=1, max_size=6)


@given(sentences, sentences)
def test_token_scores_agree_with_scikit_learn(found: list[str], expected: list[str]) -> None:
    """As a classification of each word in each of the two texts, counted as a multiset."""
    names = sorted({*found, *expected})
    true, predicted = [], []
    for name in names:
        a, b = found.count(name), expected.count(name)
        true += [1] * b + [0] * max(0, a - b)
        predicted += [1] * min(a, b) + [0] * max(0, b - a) + [1] * max(0, a - b)
    precision, recall, f1, _ = sk.precision_recall_fscore_support(
        true, predicted, average="binary", zero_division=0.0
    )
    scores = text.token_scores(" ".join(found), " ".join(expected))
    assert scores == pytest.approx((precision, recall, f1))


@given(sentences, sentences)
def test_token_scores_are_symmetric(found: list[str], expected: list[str]) -> None:
    one = text.token_scores(" ".join(found), " ".join(expected))
    other = text.token_scores(" ".join(expected), " ".join(found))
    assert (one.precision, one.recall) == (other.recall, other.precision)
    assert one.f1 == pytest.approx(other.f1)
    assert (one.f1 == 1.0) == (sorted(found) == sorted(expected))


def test_bleu_agrees_with_sacrebleu_where_spelling_is_plain() -> None:
    answers = ["chronic inflammation of liver tissue cells", "no tumour seen in this biopsy"]
    references = ["chronic inflammation of liver tissue today", "no tumour in this biopsy"]
    theirs = sacrebleu.corpus_bleu(answers, [references], smooth_method="none").score / 100
    assert 0 < theirs < 1
    assert text.corpus_bleu(answers, references) == pytest.approx(theirs)
    shouted = [answer.upper() + "!" for answer in answers]
    assert text.corpus_bleu(shouted, references) == pytest.approx(theirs)


labels = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "c", None])),
                  min_size=1, max_size=40)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(labels)
def test_class_scores_agree_with_scikit_learn(pairs: list[tuple[str, str | None]]) -> None:
    true, predicted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    counts = classes.confusion_matrix(true, predicted, "abc")
    scores = classes.class_scores(counts)
    theirs = [name or "none" for name in predicted]
    names = ["a", "b", "c"]
    settings_ = dict(labels=names, zero_division=0.0)
    assert scores["accuracy"] == pytest.approx(sk.accuracy_score(true, theirs))
    assert scores["macro_f1"] == pytest.approx(
        sk.f1_score(true, theirs, average="macro", **settings_)
    )
    assert scores["micro_f1"] == pytest.approx(
        sk.f1_score(true, theirs, average="micro", **settings_)
    )
    assert scores["recall"] == pytest.approx(
        sk.recall_score(true, theirs, average=None, **settings_)
    )
    present = [name for name in names if name in true]
    assert scores["balanced_accuracy"] == pytest.approx(
        sk.recall_score(true, theirs, average="macro", labels=present, zero_division=0.0)
    )
    matrix = sk.confusion_matrix(true, theirs, labels=[*names, "none"])
    assert counts.tolist() == matrix[:3].tolist()


WORDINGS = {
    "normal": ["normal", "normal epithelium"],
    "in situ": ["in situ carcinoma", "DCIS"],
    "invasive": ["invasive carcinoma", "carcinoma"],
    "clear": ["tissue without tumour"],
}


@pytest.mark.parametrize(
    ("answer", "name"),
    [
        ("normal", "normal"),
        ("This is a normal epithelium.", "normal"),
        ("The image shows in situ carcinoma", "in situ"),
        ("A carcinoma.", "invasive"),
        ("dcis", "in situ"),
        ("abnormal tissue", None),
        ("normal or carcinoma", None),
        ("not a carcinoma", None),
        ("I see tissue without tumour", "clear"),
        ("<think>Not normal? Or carcinoma?</think><answer>normal</answer>", "normal"),
        ("", None),
    ],
)
def test_classes_are_read(answer: str, name: str | None) -> None:
    assert classes.parse_class(answer, WORDINGS) == name


def test_confusion_refuses_unknown_labels() -> None:
    with pytest.raises(ValueError, match="'x' is none of the classes a, b"):
        classes.confusion_matrix(["x"], ["a"], ["a", "b"])


def test_interval_of_a_mean_is_that_of_plain_resampling() -> None:
    values = np.random.default_rng(3).random(80)
    generator = np.random.default_rng(7)
    means = values[generator.integers(0, 80, (4000, 80))].mean(axis=1)
    low, high = stats.mean_interval(values)
    assert (low, high) == pytest.approx(tuple(np.percentile(means, [2.5, 97.5])), abs=0.01)
    assert low < values.mean() < high


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_intervals_lie_within_the_values(values: list[float]) -> None:
    low, high = stats.mean_interval(values)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert stats.mean_interval(values) == (low, high)


def test_interval_of_macro_f1_holds_its_value() -> None:
    counts = classes.confusion_matrix(["a"] * 30 + ["b"] * 30, ["a"] * 40 + ["b"] * 20, "ab")
    low, high = stats.count_interval(counts, lambda draws: classes.class_scores(draws)["macro_f1"])
    assert low < classes.class_scores(counts)["macro_f1"] < high
