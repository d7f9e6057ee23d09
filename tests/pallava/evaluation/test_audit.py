"""The audit on planted models, whose faults are known, and on figures computed by hand."""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pallava.evaluation.audit import (
    AGAIN,
    BLANK,
    EXCHANGED,
    NO_OPTIONS,
    NONE,
    OPTIONS_ONLY,
    TRUE,
    AuditRow,
    audit,
    exchange_images,
    make_arms,
    summarise,
    table,
    verdict,
)
from pallava.evaluation.benchmarks import Benchmark, pathvqa, pmc_vqa
from pallava.evaluation.generation import Outcome
from pallava.records.questions import Question
from tests.pallava.browser import chromium

TISSUES = ("fat", "mucin", "cartilage", "necrosis", "smooth muscle", "squamous epithelium")
STEMS = ("Which tissue is shown?", "What fills most of this field?")
NUM_ITEMS = 120
COLOURS = {name: (30 * number + 20, 200 - 25 * number, 90) for number, name in enumerate(TISSUES)}

Reply = Callable[[str, str | None, dict[str, str]], str]
"""Maps prompt, tissue in the image (None without one) and options by letter to a reply."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(NUM_ITEMS):
        colour = COLOURS[TISSUES[number % len(TISSUES)]]
        Image.new("RGB", (12 + number, 10), colour).save(folder / f"{number}.png")
    return folder


def choices(images: Path, folder: Path, *, leaks: bool = False) -> Benchmark:
    """Writes and reads PMC-VQA's CSV; if it leaks, the right option is always the longest."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(NUM_ITEMS):
        right = TISSUES[number % len(TISSUES)]
        others = rng.permutation([name for name in TISSUES if name != right])[:3].tolist()
        options = rng.permutation([right, *others]).tolist()
        if leaks:
            options = [
                f"{name} of the kind seen here" if name == right else name for name in options
            ]
        letters = dict(zip("ABCD", options, strict=True))
        answer = next(letter for letter, text in letters.items() if text.startswith(right))
        rows.append(
            {
                "Figure_path": f"{number}.png",
                "Question": STEMS[number % 2],
                **{f"Choice {letter}": f" {letter}: {text}" for letter, text in letters.items()},
                "Answer_label": answer,
            }
        )
    with (folder / "test.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return pmc_vqa(folder / "test.csv", images)


def closed(images: Path, folder: Path) -> Benchmark:
    """Two yes/no questions about each of 120 images; yes as often as no for each wording."""
    records = {}
    for number in range(NUM_ITEMS):
        tissue = TISSUES[number % len(TISSUES)]
        absent = TISSUES[(number + 1 + number // 6 % 5) % len(TISSUES)]
        for asked in (tissue, absent):
            records[f"{number}-{asked}"] = {
                "question": f"Does the image show {asked}?",
                "image": f"{number}.png",
                "answer": "yes" if asked == tissue else "no",
            }
    path = folder / "test.json"
    path.write_text(json.dumps(records))
    return pathvqa(path, images)


def run(benchmark: Benchmark, reply: Reply, work_dir: Path) -> dict[str, Any]:
    """Audits a planted model, which sees the prompt and the image and nothing else."""
    by_colour = {colour: name for name, colour in COLOURS.items()}

    def ask(questions: Sequence[Question]) -> Outcome:
        answers = {}
        for question in questions:
            tissue = None
            if question.image is not None:
                tissue = by_colour.get(question.image.load().getpixel((0, 0)))  # type: ignore[call-overload]
            options = dict(re.findall(r"^\(?([A-D])[).:] (.*)$", question.text, re.M))
            answers[question.id] = reply(question.text, tissue, options)
        return Outcome(answers)

    content = audit(benchmark, ask, work_dir)
    assert content is not None
    assert content == json.loads((work_dir / "audit.json").read_text())
    return content


def drawn(text: str, names: Sequence[str]) -> str:
    """Draws a name by the text alone: the same for the same text."""
    ordered = sorted(names)
    return ordered[zlib.crc32(text.encode()) % len(ordered)]


def by_image(text: str, tissue: str | None, options: dict[str, str]) -> str:
    for letter, option in options.items():
        if tissue is not None and option.startswith(tissue):
            return f"{letter}: {option}"
    if not options:
        return tissue or "unsure"
    # Wrong in the same way wherever the options stand.
    option = drawn(" ".join(sorted(options.values())), list(options.values()))
    return next(letter for letter, text in options.items() if text == option)


def by_options(text: str, tissue: str | None, options: dict[str, str]) -> str:
    return max(options, key=lambda letter: len(options[letter])) if options else "unsure"


def by_text(text: str, tissue: str | None, options: dict[str, str]) -> str:
    return by_image(text, None, options)


def always_b(text: str, tissue: str | None, options: dict[str, str]) -> str:
    return "B"


def faults(content: Mapping[str, Any], form: str = "choice") -> set[str]:
    return set(content["parts"][form]["verdict"]["faults"])


def test_a_sound_model_has_no_fault(images: Path, tmp_path: Path) -> None:
    for leaks in (False, True):
        benchmark = choices(images, tmp_path, leaks=leaks)
        content = run(benchmark, by_image, tmp_path / f"audit_{leaks}")
        part = content["parts"]["choice"]
        assert part["verdict"]["faults"] == {}
        assert part["verdict"]["undecided"] == []
        assert part["verdict"]["sentence"].startswith("No fault found. 100.0 % (")
        assert part["accuracy"][TRUE]["value"] == 100
        assert part["image"]["worth"]["low"] > 40
        assert part["position"]["right at every position"]["value"] == 100
        if not leaks:
            assert part["accuracy"][NO_OPTIONS]["value"] == 100  # says the tissue
        assert part["text"]["longest option"]["value"] == pytest.approx(
            100 if leaks else 25, abs=10
        )


def test_a_model_that_ignores_images_is_named(images: Path, tmp_path: Path) -> None:
    content = run(choices(images, tmp_path), by_text, tmp_path / "audit")
    part = content["parts"]["choice"]
    assert faults(content) == {"ignores the image"}
    assert part["image"]["worth"]["value"] == part["image"]["answers that change"]["value"] == 0
    assert part["image"]["worth"]["high"] < 5  # although no answer of 120 changed, not 0
    assert "Faults: ignores the image" in part["verdict"]["sentence"]


def test_a_model_that_always_answers_b_is_named(images: Path, tmp_path: Path) -> None:
    content = run(choices(images, tmp_path), always_b, tmp_path / "audit")
    assert faults(content) == {"ignores the image", "position bias", "inconsistent"}
    position = content["parts"]["choice"]["position"]
    assert position["chosen too often"]["B"]["value"] == 75
    assert position["chosen too often"]["A"]["value"] == -25
    assert position["accuracy over all positions"]["value"] == 25
    assert position["right at every position"]["value"] == 0
    by_answer = position["accuracy by position of the answer"]
    assert {letter: score["value"] for letter, score in by_answer.items()} == {
        **dict.fromkeys("ACD", 0),
        "B": 100,
    }
    evidence = content["parts"]["choice"]["verdict"]["faults"]["position bias"]
    assert evidence.startswith("chooses B 75.0 points (")


def test_a_model_that_reads_only_the_options_is_named(images: Path, tmp_path: Path) -> None:
    content = run(choices(images, tmp_path, leaks=True), by_options, tmp_path / "audit")
    assert faults(content) == {"ignores the image", "answers from the options alone"}
    accuracy = content["parts"]["choice"]["accuracy"]
    assert accuracy[TRUE]["value"] == accuracy[OPTIONS_ONLY]["value"] == 100
    assert accuracy[NO_OPTIONS]["value"] == 0


def test_a_model_that_knows_the_answers_to_the_wordings_is_named(
    images: Path, tmp_path: Path
) -> None:
    def knows(text: str, tissue: str | None, options: dict[str, str]) -> str:
        return "yes" if any(name in text for name in TISSUES[:3]) else "no"

    records = {}
    for number in range(NUM_ITEMS):
        asked = TISSUES[number * 5 % 6]
        likely = TISSUES.index(asked) < 3
        records[str(number)] = {
            "question": f"Does the image show {asked}?",
            "image": f"{number}.png",
            "answer": "yes" if likely == (number % 10 > 1) else "no",
        }
    path = tmp_path / "prior.json"
    path.write_text(json.dumps(records))
    content = run(pathvqa(path, images), knows, tmp_path / "audit")
    assert faults(content, "yes/no") == {"ignores the image", "answers from the text alone"}
    accuracy = content["parts"]["yes/no"]["accuracy"]
    assert [accuracy[arm]["value"] for arm in (TRUE, EXCHANGED, NONE, BLANK)] == [80] * 4


def test_a_model_that_changes_its_mind_is_named(images: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def wavers(text: str, tissue: str | None, options: dict[str, str]) -> str:
        return by_image(text, tissue if rng.random() < 0.7 else None, options)

    content = run(choices(images, tmp_path), wavers, tmp_path / "audit")
    assert faults(content) == {"inconsistent"}
    changed = content["parts"]["choice"]["repeat"]["answers that change"]
    assert 15 < changed["value"] < 50


def test_yes_no_questions_share_their_images(images: Path, tmp_path: Path) -> None:
    def looks(text: str, tissue: str | None, options: dict[str, str]) -> str:
        return "yes" if tissue and tissue in text else "no"

    content = run(closed(images, tmp_path), looks, tmp_path / "audit")
    part = content["parts"]["yes/no"]
    assert faults(content, "yes/no") == set()
    assert (part["num_items"], part["num_clusters"]) == (240, 120)
    assert part["accuracy"][TRUE]["value"] == 100
    assert part["accuracy"][NONE]["value"] == part["text"]["chance"] == 50
    assert part["image"]["right to wrong"] > 60
    assert part["image"]["wrong to right"] == 0
    assert part["position"] == {}
    assert content["exchanged images"] == {"same wording": 240}


# --- figures by hand ----------------------------------------------------------------------------


def row(item: str, arm: str, said: str | None, answer: str = "yes", **changes: Any) -> AuditRow:
    base = AuditRow(item, arm, item, "yes/no", answer, str(said), said, float(said == answer), 0.5)
    return replace(base, **changes)


def test_figures_are_those_computed_by_hand() -> None:
    rows = [
        row("1", TRUE, "yes"), row("1", EXCHANGED, "no"), row("1", NONE, "no"),
        row("2", TRUE, "yes"), row("2", EXCHANGED, "yes"), row("2", NONE, "no"),
        row("3", TRUE, "no"), row("3", EXCHANGED, "yes"), row("3", NONE, None),
        row("4", TRUE, "no", "no"), row("4", EXCHANGED, "yes", "no"), row("4", NONE, "no", "no"),
        row("5", TRUE, "no", "no"),  # no image to exchange
    ]  # fmt: skip
    found = summarise(rows)
    value = {
        name: score["value"] for name, score in found["image"].items() if isinstance(score, dict)
    }
    # Accuracy 3/4 against 2/4; three of four answers change; against no image 3/4 - 1/4.
    assert value == {"worth": 25.0, "over no image": 50.0, "answers that change": 75.0}
    assert (found["image"]["right to wrong"], found["image"]["wrong to right"]) == (2, 1)
    assert found["accuracy"][TRUE] == {"value": 80.0, "low": 40.0, "high": 100.0, "count": 5}
    assert found["accuracy"][EXCHANGED]["count"] == 4
    assert found["text"]["above chance"]["value"] == -25.0
    # Beyond half: mean of (none - .5) - (true - .5) / 2 = (-.5-.25, -.5-.25, -.5+.25, .5-.25) / 4.
    assert found["text"]["beyond half of the accuracy"]["value"] == -37.5
    assert found["text"]["most frequent answer"] == 60.0


def test_questions_about_one_image_count_as_one() -> None:
    def rows(per_image: int) -> list[AuditRow]:
        return [
            row(f"{image}-{question}", arm, said, cluster=str(image))
            for image in range(30)
            for question in range(per_image)
            for arm, said in ((TRUE, "yes"), (EXCHANGED, "no" if image % 3 else "yes"))
        ]

    one, many = (summarise(rows(number))["image"]["worth"] for number in (1, 20))
    assert one["value"] == many["value"] == pytest.approx(66.67, abs=0.01)
    assert (one["low"], one["high"]) == (many["low"], many["high"])


def test_few_questions_decide_nothing() -> None:
    rows = [
        row(str(item), arm, "yes", "yes" if item % 2 else "no")
        for item in range(12)
        for arm in (TRUE, EXCHANGED, NONE, AGAIN)
    ]
    found = verdict(summarise(rows))
    assert found["faults"] == {}
    assert set(found["undecided"]) >= {"ignores the image", "inconsistent"}
    assert found["sentence"].startswith("No fault shown. Undecided with 12 questions: ")


def test_spread_is_that_of_the_worst_and_best_prompt() -> None:
    right = {TRUE: 8, "reworded_1": 6, "reworded_2": 9, "reworded_3": 1}
    rows = [
        row(str(item), arm, "yes" if item < count else "no")
        for arm, count in right.items()
        for item in range(10)
    ]
    found = summarise(rows)["wording"]
    values = {name: score["value"] for name, score in found.items()}
    assert values == {"worst": 10, "mean": 60, "best": 90, "spread": 80}
    assert found["spread"]["low"] < 80 <= found["spread"]["high"]


# --- arms ---------------------------------------------------------------------------------------


def test_exchanged_images_are_others_of_the_same_wording() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        wordings = rng.integers(4, size=60).tolist()
        pictures = rng.integers(8, size=60).tolist()
        givers = exchange_images(wordings, pictures, rng)
        for taker, giver in enumerate(givers):
            if giver is not None:
                assert wordings[giver] == wordings[taker]
                assert pictures[giver] != pictures[taker]
        for wording in set(wordings):
            own = [i for i in range(60) if wordings[i] == wording]
            most = max(Counter(pictures[i] for i in own).values())
            if 2 * most <= len(own):
                assert sorted(givers[i] for i in own) == own  # each image is dealt once


def test_every_option_stands_at_every_position(images: Path, tmp_path: Path) -> None:
    benchmark = choices(images, tmp_path)
    arms = make_arms(benchmark.questions.questions)
    first = benchmark.questions.questions[0]
    turned = [first, *(arms.questions[f"rotated_{shift}"][0] for shift in (1, 2, 3))]
    assert {question.answer for question in turned} == set("ABCD")
    assert len({question.options[str(question.answer)] for question in turned}) == 1
    for letter in "ABCD":
        assert {question.options[letter] for question in turned} == set(first.options.values())
    for question in turned[1:]:
        assert f"\nB: {question.options['B']}\n" in question.text
    assert arms.questions[NONE][0].image is None
    assert arms.questions[NO_OPTIONS][0].text == STEMS[0]
    assert STEMS[0] not in arms.questions[OPTIONS_ONLY][0].text
    blank = arms.questions[BLANK][5].image
    assert blank is not None and blank.load().size == (17, 10)
    assert blank.load().getextrema() == ((243, 243),) * 3
    again = [question.id for question in arms.questions[AGAIN]]
    assert again == [f"{q.id} [again]" for q in reversed(benchmark.questions.questions)]


def test_images_of_another_question_are_the_fallback(images: Path, tmp_path: Path) -> None:
    records = {
        "a": ("Is fat shown?", "0.png"),
        "b": ("Is fat shown?", "1.png"),
        "c": ("Is there any mucin?", "2.png"),
        "d": ("Name the tissue", "2.png"),
    }
    path = tmp_path / "few.json"
    path.write_text(
        json.dumps(
            {k: {"question": q, "image": i, "answer": "yes"} for k, (q, i) in records.items()}
        )
    )
    arms = make_arms(pathvqa(path, images).questions.questions)
    assert arms.matches == {"same wording": 2, "same type of question": 1, "any": 1}
    assert arms.donors["a"] == "b" and arms.donors["b"] == "a"
    assert arms.donors["c"] in "ab" and arms.donors["d"] in "ab"


# --- output -------------------------------------------------------------------------------------


def test_rows_tell_what_was_asked_and_read(images: Path, tmp_path: Path) -> None:
    benchmark = choices(images, tmp_path)
    content = run(benchmark, by_image, tmp_path / "audit")
    rows = [json.loads(line) for line in (tmp_path / "audit" / "audit.jsonl").open()]
    arms = Counter(row["arm"] for row in rows)
    assert set(arms.values()) == {NUM_ITEMS}
    assert len(arms) == 13
    turned = next(row for row in rows if row["arm"] == "rotated_1")
    assert turned["options"][turned["said"]].startswith(TISSUES[0])
    assert turned["answer"] == turned["said"] and f"{turned['said']}: " in turned["prompt"]
    shown = table(content)
    assert "| image: worth | " in shown
    assert content["parts"]["choice"]["verdict"]["sentence"] in shown


def test_the_page_fits_desktop_and_phone(images: Path, tmp_path: Path) -> None:
    run(choices(images, tmp_path), always_b, tmp_path / "audit")
    page = (tmp_path / "audit" / "audit.html").resolve()
    problems: list[str] = []
    with chromium() as browser:
        for width in (1440, 390):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            tab.on("console", lambda message: problems.append(message.text))
            tab.goto(page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            assert tab.locator("article").count() == 12
            assert "position bias" in tab.locator(".verdict").inner_text()
            assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
            tab.close()
    assert problems == []
