from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.registry import DATASETS
from PIL import Image

import cite.mm  # noqa: F401
from cite.mm.datasets import GASTRIC_CLASSES, PatchDataset, PatchGastric


def write(folder: Path, lines: list[str], *, images: bool = True) -> dict[str, Any]:
    """Writes an annotation file and its images; returns the dataset's arguments."""
    (folder / "patches").mkdir(exist_ok=True)
    (folder / "ann.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for line in lines:
        name = line.rpartition(" ")[0]
        if images and name and ".." not in name:
            path = folder / "patches" / name
            path.parent.mkdir(exist_ok=True, parents=True)
            Image.new("RGB", (8, 8)).save(path)
    return {"data_root": str(folder), "ann_file": "ann.txt", "data_prefix": "patches"}


def test_lines_become_samples(tmp_path: Path) -> None:
    lines = ["A 1_0.jpg 0", "sub dir/B_1.jpg 1", "", "C_2.png 2"]
    dataset = PatchGastric(**write(tmp_path, lines))
    assert dataset.metainfo["classes"] == dataset.CLASSES == GASTRIC_CLASSES
    assert dataset.get_gt_labels() == [0, 1, 2]
    first = dataset.get_data_info(0)
    assert first["img_path"] == str(tmp_path / "patches" / "A 1_0.jpg")
    assert first["slide"] == "A 1"
    assert [dataset.get_data_info(i)["ann_line"] for i in range(3)] == [1, 2, 4]
    assert dataset[1]["draw"] is None
    annotations = (tmp_path / "ann.txt").read_bytes()
    (tmp_path / "ann.txt").write_bytes(b"\xef\xbb\xbf" + annotations)  # as Notepad saves it
    again = PatchGastric(data_root=str(tmp_path), ann_file="ann.txt", data_prefix="patches")
    assert again.get_data_info(0)["img_path"] == first["img_path"]


def test_any_folder_of_patches_with_classes_of_its_own(tmp_path: Path) -> None:
    arguments = write(tmp_path, ["case7-x1.jpg 1", "case7-x2.jpg 1", "case8-x1.jpg 0"])
    arguments |= {"classes": ["normal", "tumour"]}
    dataset = DATASETS.build({"type": "PatchDataset", "slide_pattern": r"^(\w+)-", **arguments})
    assert [dataset.get_data_info(i)["slide"] for i in range(3)] == ["case7", "case7", "case8"]
    without = PatchDataset(slide_pattern=None, **arguments)
    assert "slide" not in without.get_data_info(0)
    with pytest.raises(ValueError, match="no classes"):
        PatchDataset(**{**arguments, "classes": None})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["A_0.jpg 0", "B_0.jpg 3"], r"ann.txt:2: label 3 of B_0.jpg; expected 0 to 2"),
        (["A_0.jpg -1"], r"ann.txt:1: 'A_0.jpg -1' found; expected `filename label`"),
        (["A_0.jpg one"], r"ann.txt:1: 'A_0.jpg one' found"),
        (["A_0.jpg"], r"ann.txt:1: 'A_0.jpg' found"),
        (["A_0.jpg 0", "patch.jpg 0"], r"ann.txt:2: patch name 'patch.jpg' holds no slide id"),
        (["A_0.jpg 0", "A_1.jpg 1"], r"ann.txt:2: slide A has label 1 here and 0 in line 1"),
        (["A_0.jpg 0", "B_0.jpg 1"], r"ann.txt: class 2 \(Poorly .*\) has no slide"),
        (["../A_0.jpg 0"], r"ann.txt:1: ../A_0.jpg leaves the folder of patches"),
        (["/etc/A_0.jpg 0"], r"ann.txt:1: /etc/A_0.jpg leaves the folder"),
        ([], "no lines"),
    ],
)
def test_lines_that_cannot_be_used(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchGastric(**write(tmp_path, lines, images=not any("/" in line for line in lines)))


def test_missing_images(tmp_path: Path) -> None:
    lines = [f"A_{i}.jpg 0" for i in range(8)] + ["B_0.jpg 1", "C_0.jpg 2"]
    arguments = write(tmp_path, lines)
    (tmp_path / "patches" / "A_3.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"ann.txt:4: no image .*A_3.jpg; 1 of 10 images"):
        PatchGastric(**arguments)
    dataset = PatchGastric(max_missing=0.1, **arguments)
    assert len(dataset) == 9
    assert [line.split(": ")[0] for line in dataset.missing] == [f"{tmp_path}/ann.txt:4"]
    (tmp_path / "patches" / "C_0.jpg").unlink()
    with pytest.raises(ValueError, match="class 2"):
        PatchGastric(max_missing=0.3, **arguments)


def test_class_without_a_slide_is_no_matter_when_testing(tmp_path: Path) -> None:
    dataset = PatchGastric(test_mode=True, **write(tmp_path, ["A_0.jpg 0"]))
    assert len(dataset) == 1


def test_missing_files(tmp_path: Path) -> None:
    arguments = write(tmp_path, ["A_0.jpg 0"])
    with pytest.raises(FileNotFoundError, match=r"none.txt: no such annotation file.*tools/ann.py"):
        PatchGastric(**{**arguments, "ann_file": "none.txt"})
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder of patches"):
        PatchGastric(**{**arguments, "data_prefix": "nowhere"})
    (tmp_path / "ann.txt").write_bytes(b"A_0.jpg 0\n\xff\xfe_0.jpg 1\n")
    with pytest.raises(ValueError, match=r"ann.txt:2: not UTF-8 text"):
        PatchGastric(**arguments)


def test_a_patch_that_is_listed_twice_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("cite.mm.datasets.print_log", lambda text, **_: said.append(text))
    dataset = PatchGastric(**write(tmp_path, ["A_0.jpg 0", "B_0.jpg 1", "C_0.jpg 2", "A_0.jpg 0"]))
    assert len(dataset) == 4
    assert len(said) == 1
    assert "1 patches are listed more than once" in said[0]
    assert said[0].endswith("A_0.jpg")
