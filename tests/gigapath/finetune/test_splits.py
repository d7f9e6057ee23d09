from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gigapath.finetune.splits import make_splits, published_split, read_splits, write_splits
from gigapath.finetune.tasks import LabelledSlides, SlideTask, read_labels, read_task
from tests.gigapath.slide_cohort import write_published_split, write_table, write_task
from xtuner_add.paths import configs_dir

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden/gigapath/finetune/finetune.json").read_text()
)
TASK = SlideTask("made_up", "multi_class", ("0", "1", "2"))
REAL = os.environ.get("XTUNER_ADD_TEST_DATA")


def labelled(count: int, patients: int = 0, classes: int = 3) -> LabelledSlides:
    slides = [f"s{number:03d}" for number in range(count)]
    labels = {slide: np.array(number % classes) for number, slide in enumerate(slides)}
    names = {s: f"p{n % patients}" for n, s in enumerate(slides)} if patients else {}
    return LabelledSlides(labels, names, ())


@pytest.mark.parametrize("case", GOLDEN["splits"])
def test_published_draws(case: str) -> None:
    fold, val_r = int(case[4]), float(case.split("val")[1])
    slides = [f"s{number:03d}" for number in range(50)]
    parts = published_split(slides, fold, val_r)
    assert dict(zip(("train", "val", "test"), parts, strict=True)) == GOLDEN["splits"][case]
    made = make_splits(labelled(50), method="published", folds=2, val_r=val_r)
    assert list(made[fold].train) == parts[0]


@given(
    count=st.integers(12, 60),
    patients=st.sampled_from([0, 9, 12]),
    folds=st.integers(3, 4),
    with_val=st.booleans(),
)
def test_k_fold_tests_every_slide_once_and_keeps_patients_together(
    count: int, patients: int, folds: int, with_val: bool
) -> None:
    known = labelled(count, patients)
    made = make_splits(known, folds=folds, val_r=0.1 * with_val)
    tested = [slide for split in made.values() for slide in split.test]
    assert sorted(tested) == sorted(known.labels)
    for split in made.values():
        assert bool(split.val) == with_val
        parts = [set(split.train), set(split.val), set(split.test)]
        assert sum(map(len, parts)) == len(set.union(*parts)) == count
        if patients:
            owners = [{known.patients[slide] for slide in part} for part in parts]
            assert sum(map(len, owners)) == len(set.union(*owners))


def test_too_few_for_k_fold() -> None:
    with pytest.raises(ValueError, match="3 folds"):
        make_splits(labelled(9), folds=2)
    with pytest.raises(ValueError, match="1 slides or patients in 3 folds"):
        make_splits(labelled(1), folds=3)
    with pytest.raises(ValueError, match="without patient"):
        make_splits(labelled(9), folds=3, split_key="pat_id")


def test_given_tables(tmp_path: Path) -> None:
    rows = [{"slide_id": f"s{n:03d}", "label": n % 3} for n in range(20)]
    table = write_table(tmp_path / "labels.csv", rows)
    folder = write_published_split(tmp_path / "splits", table)
    known = read_labels(table, TASK)
    splits, unknown = read_splits(folder, known)
    assert list(splits) == [0] and not unknown
    assert splits[0].test == tuple(f"s{n:03d}" for n in range(5))
    write_splits(tmp_path / "written", splits)
    assert read_splits(tmp_path / "written", known)[0] == splits
    more = (folder / "test_0.csv").read_text() + "5,s999,1\n"
    (folder / "test_0.csv").write_text(more)
    splits, unknown = read_splits(folder, known)
    assert [row["id"] for row in unknown] == ["s999"] and len(splits[0].test) == 5
    (folder / "val_0.csv").unlink()
    assert read_splits(folder, known)[0][0].val == ()
    with pytest.raises(FileNotFoundError, match="2 folds"):
        read_splits(folder, known, folds=2)
    (folder / "test_0.csv").write_text(more + "6,s012,1\n")
    with pytest.raises(ValueError, match="s012 in train and test"):
        read_splits(folder, known)
    with pytest.raises(FileNotFoundError, match="train_0"):
        read_splits(tmp_path, known)


def test_given_tables_that_part_a_patient(tmp_path: Path) -> None:
    rows = [{"slide_id": f"s{n:03d}", "label": n % 3, "pat_id": f"p{n % 7}"} for n in range(20)]
    table = write_table(tmp_path / "labels.csv", rows)
    folder = write_published_split(tmp_path / "splits", table)
    known = read_labels(table, TASK)
    with pytest.raises(ValueError, match=r"p\d in train and (val|test)"):
        read_splits(folder, known)
    assert read_splits(folder, known, split_key="slide_id")[0][0].test
    for part in ("train", "val", "test"):  # without the column it is still known
        lines = (folder / f"{part}_0.csv").read_text().splitlines()
        kept = "\n".join(",".join(line.split(",")[:3]) for line in lines)
        (folder / f"{part}_0.csv").write_text(kept)
    with pytest.raises(ValueError, match="slide_id"):
        read_splits(folder, known)


def test_labels_that_cannot_be_used_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(
        "\ufeffslide_id,label\n001,0\nb.svs,1.0\nc,7\n../d,1\n,1\ne,\n001,0\n", encoding="utf-8"
    )
    found = read_labels(tmp_path / "labels.csv", TASK)
    assert {slide: int(label) for slide, label in found.labels.items()} == {"001": 0, "b.svs": 1}
    assert [row["id"] for row in found.skipped] == ["c", "../d", "", "e"]
    assert "'7'" in found.skipped[0]["reason"] and "0, 1, 2" in found.skipped[0]["reason"]
    (tmp_path / "labels.csv").write_text("slide_id,label\na,0\na,1\n")
    with pytest.raises(ValueError, match="two labels"):
        read_labels(tmp_path / "labels.csv", TASK)
    (tmp_path / "labels.csv").write_text("slide_id,grade\na,0\n")
    with pytest.raises(ValueError, match="no columns"):
        read_labels(tmp_path / "labels.csv", TASK)


def test_one_slide_under_two_ids(tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("slide_id,label\na.svs,0\na,0\nb,1\nc,2\n")
    known = read_labels(table, TASK)
    assert list(known.labels) == ["a.svs", "b", "c"]
    (tmp_path / "splits_0.csv").write_text("train,val,test\na,b.svs,c\n")
    found = read_splits(tmp_path, known)[0][0]
    assert (found.train, found.val, found.test) == (("a.svs",), ("b",), ("c",))
    (tmp_path / "splits_0.csv").write_text("train,val,test\na,b,a.svs\n")
    with pytest.raises(ValueError, match=r"slide a\.svs in train and test"):
        read_splits(tmp_path, known)
    for part, slide in {"train": "a", "val": "b", "test": "a.svs"}.items():
        (tmp_path / f"{part}_0.csv").write_text(f"slide_id\n{slide}\n")
    with pytest.raises(ValueError, match=r"slide a\.svs in train and test"):
        read_splits(tmp_path, known)
    table.write_text("slide_id,label\na.svs,0\na,1\n")
    with pytest.raises(ValueError, match=r"slide a\.svs has two labels, 0 and 1"):
        read_labels(table, TASK)


@pytest.mark.parametrize("column", ["pat_id", "case_id"])
def test_one_slide_of_two_patients(column: str, tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text(f"slide_id,label,{column}\na,0,P\na,0,\na,0,P\n")
    assert read_labels(table, TASK).patients == {"a": "P"}
    table.write_text(f"slide_id,label,{column}\na,0,P\na,0,Q\n")
    with pytest.raises(ValueError, match="slide a has patients P and Q"):
        read_labels(table, TASK)


def test_several_labels(tmp_path: Path) -> None:
    task = read_task(configs_dir() / "gigapath/tasks/mutation_5_gene.yml")
    (tmp_path / "labels.csv").write_text(
        "slide_id,pat_id,TP53,EGFR,FAT1,KRAS,LRP1B\na,p,1,0,0,0,1\nb,q,1,0,,0,1\n"
    )
    found = read_labels(tmp_path / "labels.csv", task)
    assert found.labels["a"].tolist() == [0, 0, 0, 1, 1] and found.patients == {"a": "p"}
    assert "FAT1" in found.skipped[0]["reason"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"setting": "survival"}, "setting"),
        ({"label_dict": {}}, "label_dict"),
        ({"label_dict": {"a": 0, "b": 2}}, "0 to 1"),
        ({"setting": "binary"}, "2 labels"),
        ({"max_tile": 3}, "max_tile"),
        ({"max_tiles": "many"}, "max_tiles"),
    ],
)
def test_bad_tasks(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_task(write_task(tmp_path / "task.yml", **fields))


@pytest.mark.skipif(not REAL, reason="XTUNER_ADD_TEST_DATA is not set")
def test_published_tables_of_panda() -> None:
    folder = Path(str(REAL)) / "gigapath"
    task = read_task(configs_dir() / "gigapath/tasks/panda.yml")
    known = read_labels(folder / "PANDA.csv", task)
    assert len(known.labels) == 9555 and not known.skipped
    splits, unknown = read_splits(folder, known)
    assert not unknown
    assert [len(part) for part in (splits[0].train, splits[0].val, splits[0].test)] == [
        7647,
        954,
        954,
    ]
