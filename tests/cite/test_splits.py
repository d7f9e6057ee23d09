from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cite.splits import choose_slides, read_captions, slide_id, split_slides, write_patches

SUBTYPES = (
    "Well differentiated tubular adenocarcinoma",
    "Moderately differentiated tubular adenocarcinoma",
    "Poorly differentiated adenocarcinoma, solid type",
)


def captions(path: Path, rows: list[tuple[str, str]]) -> Path:
    lines = [f'{slide},"{subtype}",text' for slide, subtype in rows]
    path.write_text("\n".join(["id,subtype,text", *lines]) + "\n")
    return path


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(2, 12), min_size=2, max_size=4),
    st.integers(0, 100),
    st.floats(0.5, 0.9),
)
def test_sides_share_no_slide_and_lose_no_patch(
    num_slides: list[int], seed: int, val: float
) -> None:
    labels = {f"{c}x{s}": c for c, count in enumerate(num_slides) for s in range(count)}
    listing = [f"{slide}_{p}.jpg" for slide in labels for p in range(3)]
    split = split_slides(labels, listing, val=val, seed=seed)
    train, validation = ({slide_id(n) for n, _ in part} for part in (split.train, split.val))
    assert not train & validation
    assert sorted(n for n, _ in split.train + split.val) == sorted(listing)
    for name, label in split.train + split.val:
        assert label == labels[slide_id(name)]
    few = choose_slides(split.train, 1, seed=seed)
    assert {label for _, label in few} == set(range(len(num_slides)))
    assert len({slide_id(name) for name, _ in few}) == len(num_slides)


def test_order_of_the_listing_decides_between_equal_slides() -> None:
    train = [("A_0.jpg", 0), ("B_0.jpg", 0), ("C_0.jpg", 0), ("C_1.jpg", 0)]
    assert {name for name, _ in choose_slides(train, 2)} == {"C_0.jpg", "C_1.jpg", "A_0.jpg"}
    assert {name for name, _ in choose_slides(train[::-1], 2)} == {"C_0.jpg", "C_1.jpg", "B_0.jpg"}


def test_class_without_a_slide(tmp_path: Path) -> None:
    file = captions(tmp_path / "captions.csv", [("a", SUBTYPES[0]), ("b", SUBTYPES[1])])
    with pytest.raises(ValueError, match=r"captions.csv: class 2 has no slide.*Poorly"):
        read_captions(file)
    labels = {"a": 0, "b": 0, "c": 1, "d": 1}
    with pytest.raises(ValueError, match="class 1 has no slide with patches for training"):
        split_slides(labels, ["a_0.jpg", "b_0.jpg"], val=0.5)


def test_captions_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "captions.csv"
    with pytest.raises(FileNotFoundError, match=r"captions\.csv"):
        read_captions(file)
    file.write_text("slide,subtype\na,b\n")
    with pytest.raises(ValueError, match=r"captions.csv:1: no column id; found slide, subtype"):
        read_captions(file)
    captions(file, [("a", SUBTYPES[0]), ("a", SUBTYPES[1])])
    with pytest.raises(ValueError, match=r"captions.csv:3: slide 'a' is named a second time"):
        read_captions(file)


def test_names_without_a_slide() -> None:
    for name in ("patch.jpg", "_3.jpg", "folder_1/patch.jpg"):
        with pytest.raises(ValueError, match="holds no slide id"):
            slide_id(name)
    split = split_slides(
        {"a": 0, "b": 0}, ["a_0.jpg", "b_0.jpg", "x.jpg", "z_1.jpg", "z_2.jpg"], val=0.5
    )
    assert split.without_slide_id == ["x.jpg"]
    assert split.unknown == {"z": 2}
    with pytest.raises(ValueError, match="line break"):
        split_slides({"a": 0, "b": 0}, ["a_\n0.jpg"], val=0.5)


def test_settings_out_of_range() -> None:
    for val in (0, 1, 80):
        with pytest.raises(ValueError, match="expected a fraction"):
            split_slides({"a": 0}, [], val=val)
    with pytest.raises(ValueError, match="num_slides is 0"):
        choose_slides([("a_0.jpg", 0)], 0)
    with pytest.raises(ValueError, match="class 0 has 1 patches; 2 are to be drawn"):
        choose_slides([("a_0.jpg", 0)], 2, most_patches=False)


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    write_patches(file, [("a_0.jpg", 0)])
    with pytest.raises(UnicodeEncodeError):
        write_patches(file, [("\ud800_0.jpg", 0)])
    assert file.read_text() == "a_0.jpg 0\n"
    assert [path.name for path in tmp_path.iterdir()] == ["train.txt"]


def test_captions_in_another_encoding_name_file_and_line(tmp_path: Path) -> None:
    file = captions(tmp_path / "captions.csv", [("a", SUBTYPES[0]), ("b", SUBTYPES[1])])
    file.write_bytes(file.read_bytes() + "c,x,caf\u00e9\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"captions\.csv:4: not UTF-8"):
        read_captions(file)


def test_blanks_around_ids_and_files_that_are_no_images(tmp_path: Path) -> None:
    rows = [(f" {label}x{number} ", SUBTYPES[label]) for label in range(3) for number in range(2)]
    labels = read_captions(captions(tmp_path / "captions.csv", rows))
    listing = [f"{slide}_0.jpg" for slide in labels]
    listing += ["0x0_notes.txt", "0x0_9.jpg.part", "0x0_1.TIFF"]
    split = split_slides(labels, listing, val=0.5)
    assert split.no_images == ["0x0_notes.txt", "0x0_9.jpg.part"]
    assert len(split.train) + len(split.val) == 7
    with pytest.raises(ValueError, match=r"No patch belongs to a slide: .*'0x0', .*'0-0'"):
        split_slides(labels, ["0-0_0.jpg"], val=0.5)
