from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xtuner_add.demo.pallava import wording
from xtuner_add.demo.pallava.answers import exchanged_images
from xtuner_add.demo.pallava.dataset import (
    DataSizes,
    build,
    majority_share,
    text_corpus,
)
from xtuner_add.demo.pallava.slides import SlidePlan
from xtuner_add.demo.stages import read_jsonl
from xtuner_add.demo.tissue import PATTERNS

SIZES = DataSizes(num_train=40, num_held_out=20, fields_per_slide=2, questions_per_tissue=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("data")
    build(target, SIZES, seed=3)
    return target


def plans_of(folder: Path) -> dict[str, SlidePlan]:
    plans = {}
    for row in read_jsonl(folder / "plans.jsonl"):
        name = row.pop("id")
        plans[name] = SlidePlan(**(row | {"tissues": tuple(row["tissues"])}))
    return plans


def test_same_seed_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    build(tmp_path, SIZES, seed=3, workers=1)
    for file in sorted(folder.rglob("*.*")):
        assert (tmp_path / file.relative_to(folder)).read_bytes() == file.read_bytes(), file


def test_pairs_name_images_of_training_slides(folder: Path) -> None:
    pairs = read_jsonl(folder / "pairs.jsonl")
    assert len(pairs) == SIZES.num_train * (1 + SIZES.fields_per_slide)
    assert len({pair["id"] for pair in pairs}) == len(pairs)
    for pair in pairs:
        assert "held_out" not in pair["image"]
        assert pair["caption"].strip()
        with Image.open(folder / pair["image"]) as image:
            assert image.mode == "RGB"
            if pair["image"].startswith("fields/"):
                assert image.size == (SIZES.tile_px, SIZES.tile_px)


@pytest.mark.parametrize("table", ["captions", "conversations"])
def test_conversations_follow_the_llava_schema(folder: Path, table: str) -> None:
    from pallava.text.encoding import check_row

    rows = read_jsonl(folder / f"{table}.jsonl")
    assert {row["id"] for row in rows} == {n for n in plans_of(folder) if n.startswith("train")}
    assert [check_row(row) for row in rows] == [None] * len(rows)


def test_held_out_answers_are_right_and_no_text_is_worth_more_than_chance(folder: Path) -> None:
    plans, rows = plans_of(folder), read_jsonl(folder / "held_out.jsonl")
    for row in rows:
        plan = plans[Path(row["image"]).stem]
        assert plan.part == "held_out"
        if row["kind"] == "tissue":
            named = [name for name in PATTERNS if name in row["question"]]
            assert len(named) == 1
            assert (row["answer"] == "yes") == (named[0] in plan.tissues)
        elif row["kind"] == "nuclei":
            assert (row["answer"] == "yes") == plan.vesicular
        elif row["kind"] == "list":
            assert row["answer"] == wording.listed(plan.tissues)
    closed = [row for row in rows if row["kind"] in wording.CLOSED]
    assert majority_share(closed) == 0.5


def test_training_answers_are_balanced_for_every_closed_question(folder: Path) -> None:
    answers: dict[str, Counter[str]] = {}
    for row in read_jsonl(folder / "conversations.jsonl"):
        turns = row["conversations"]
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            question = human["value"].removeprefix("<image>\n")
            if gpt["value"] in ("yes", "no"):
                answers.setdefault(question, Counter())[gpt["value"]] += 1
    assert answers
    for counter in answers.values():
        assert counter["yes"] == counter["no"]


def test_exchanged_images_are_other_images_of_the_same_question(folder: Path) -> None:
    rows = read_jsonl(folder / "held_out.jsonl")
    images = exchanged_images(rows, np.random.default_rng(0))
    assert all(image != row["image"] for image, row in zip(images, rows, strict=True))
    for text in {row["question"] for row in rows}:
        indices = [index for index, row in enumerate(rows) if row["question"] == text]
        before = Counter(rows[index]["image"] for index in indices)
        assert Counter(images[index] for index in indices) == before


def test_text_corpus_answers_from_its_own_report() -> None:
    for turns in text_corpus(200, np.random.default_rng(1)):
        first = turns[0][0]
        if "\n" not in first:
            assert first in wording.CAPTION_REQUESTS
            continue
        report, question = first.split("\n")
        for asked, answer in [(question, turns[0][1]), *turns[1:]]:
            if asked.startswith("Does the image show "):
                tissue = asked.removeprefix("Does the image show ").rstrip("?")
                assert (answer == "yes") == (tissue in report)
            elif asked.startswith("Are the nuclei"):
                assert (answer == "yes") == ("vesicular" in report)


def test_unknown_tissue_is_refused() -> None:
    with pytest.raises(ValueError, match="bone"):
        wording.tissue_question("bone", ["fat"])


def test_thumbnails_do_not_tell_the_look_of_the_nuclei(tmp_path: Path) -> None:
    """A linear classifier on the thumbnails' pixels stays at chance, on full resolution not."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    build(tmp_path, DataSizes(num_train=160, num_held_out=120, fields_per_slide=0), seed=0)
    thumbnails, roughness, look, train = [], [], [], []
    for name, plan in plans_of(tmp_path).items():
        image = Image.open(tmp_path / "slides" / f"{name}.png")
        small = image.resize((64, 64), Image.Resampling.BICUBIC)
        thumbnails.append(np.asarray(small, np.float32).ravel())
        grey = np.asarray(image, np.float32).mean(axis=-1)
        roughness.append(
            [np.abs(np.diff(grey, order, axis)).mean() for order in (1, 2) for axis in (0, 1)]
        )
        look.append(plan.vesicular)
        train.append(plan.part == "train")
    in_train, looks = np.array(train), np.array(look)

    def accuracy(features: list[object]) -> float:
        values = np.array(features)
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
        model.fit(values[in_train], looks[in_train])
        return float(model.score(values[~in_train], looks[~in_train]))

    assert accuracy(thumbnails) < 0.65  # chance is 0.5, its standard error 0.046
    assert accuracy(roughness) > 0.75


def test_tables_are_json_lines(folder: Path) -> None:
    for table in ("pairs", "captions", "conversations", "held_out", "plans"):
        for line in (folder / f"{table}.jsonl").read_text(encoding="utf-8").splitlines():
            assert isinstance(json.loads(line), dict)
