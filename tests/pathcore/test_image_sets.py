"""Small synthetic copies of each public dataset's layout are read in place."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pathcore.image_sets import HDF5Image, image_set_names, load_image_set, read_images
from pathcore.images import ImageError


def image(path: Path, value: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 12), (value, 80, 90)).save(path)


def patch_camelyon(folder: Path) -> dict[str, int]:
    stem = "camelyonpatch_level_2_split_test"
    pixels = np.random.default_rng(0).integers(0, 255, (4, 96, 96, 3), dtype=np.uint8)
    with h5py.File(folder / f"{stem}_x.h5", "w") as file:
        file["x"] = pixels
    with h5py.File(folder / f"{stem}_y.h5", "w") as file:
        file["y"] = np.array([0, 1, 1, 0], dtype=np.uint8).reshape(4, 1, 1, 1)
    return {f"{stem}_x.h5:{row}": label for row, label in enumerate([0, 1, 1, 0])}


def in_folders(folder: Path, *names: str) -> dict[str, int]:
    for index, name in enumerate(names):
        image(folder / name / f"{index}.tif")
    return {f"{name}/{index}.tif": index for index, name in enumerate(names)}


def crc100k(folder: Path) -> dict[str, int]:
    (folder / "NCT-CRC-HE-100K/ADI").mkdir(parents=True)
    image(folder / "NCT-CRC-HE-100K/ADI/train.tif")
    kinds = ["ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM"]
    return in_folders(folder, *(f"CRC-VAL-HE-7K/{kind}" for kind in kinds))


def sicapv2(folder: Path) -> dict[str, int]:
    (folder / "partition/Test").mkdir(parents=True)
    columns = ["image_name", "NC", "G3", "G4", "G5", "G4C"]
    rows = [[f"{n}.jpg", *(int(n == k) for k in range(4)), int(n == 2)] for n in range(4)]
    pd.DataFrame(rows, columns=columns).to_excel(folder / "partition/Test/Test.xlsx", index=False)
    for number in range(4):
        image(folder / f"images/{number}.jpg")
    return {f"{number}.jpg": number for number in range(4)}


def bach(folder: Path) -> dict[str, int]:
    root = "ICIAR2018_BACH_Challenge/Photos"
    return in_folders(folder, *(f"{root}/{k}" for k in ("Normal", "Benign", "InSitu", "Invasive")))


def osteo(folder: Path) -> dict[str, int]:
    image(folder / "Training-Set-1/set1/Case-3-A1-20343-10079.jpg")
    image(folder / "Training-Set-2/set2/Case-4-B2-1-2.jpg")
    image(folder / "Training-Set-2/set2/Case-48-P5-C3-4.jpg")
    (folder / "ML_Features_1144.csv").write_text(
        "image.name,classification\nCase 3 A1-20343- 10079,Non-Tumor\nCase 4 B2 -1-2,viable\n"
        "Case 48- P5-C3-4,Non-Viable-Tumor\nCase 9,viable: non-viable\n"
    )
    return {"Case 3 A1-20343- 10079": 0, "Case 4 B2 -1-2": 1, "Case 48- P5-C3-4": 2}


def skin_cancer(folder: Path) -> dict[str, int]:
    labels = [item.keys[0] for item in load_image_set("skin_cancer", "prompts").classes]
    lines = ["file,class,set,malignicy"]
    for label in labels:
        image(folder / f"data/tiles/{label}/{label}_ws_1.jpg")
        lines.append(f"data/tiles/{label}/{label}_ws_1.jpg,{label},Test,x")
    lines.append(f"data/tiles/none.jpg,{labels[0]},Train,x")
    (folder / "data/tiles-v2.csv").write_text("\n".join(lines))
    return {f"data/tiles/{label}/{label}_ws_1.jpg": i for i, label in enumerate(labels)}


def mhist(folder: Path) -> dict[str, int]:
    for name in ("MHIST_a.png", "MHIST_b.png"):
        image(folder / "images" / name)
    (folder / "annotations.csv").write_text(
        "Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),"
        "Partition\n"
        "MHIST_a.png,SSA,6,test\nMHIST_b.png,HP,0,test\nMHIST_c.png,HP,0,train\n"
    )
    return {"MHIST_a.png": 1, "MHIST_b.png": 0}


def wsss4luad(folder: Path) -> dict[str, int]:
    names = ["1-2-3-[1, 0, 0].png", "1-2-4-[0, 1, 0].png", "1.2.276.0_1_[0_0_1].png"]
    for name in [*names, "1-2-5-[1, 1, 0].png"]:
        image(folder / "1.training" / name)
    return {f"1.training/{name}": index for index, name in enumerate(names)}


def lc25000(folder: Path) -> dict[str, int]:
    root = "lung_colon_image_set"
    colon = [f"{root}/colon_image_sets/{k}" for k in ("colon_aca", "colon_n")]
    lung = [f"{root}/lung_image_sets/{k}" for k in ("lung_aca", "lung_n", "lung_scc")]
    return in_folders(folder, *colon, *lung)


LAYOUTS = [
    *(bach, crc100k, lc25000, mhist, osteo, patch_camelyon, sicapv2, skin_cancer, wsss4luad),
]


def test_every_shipped_benchmark_has_a_layout_here_and_says_where_it_comes_from() -> None:
    assert [layout.__name__ for layout in LAYOUTS] == image_set_names("prompts")
    for name in image_set_names("prompts"):
        benchmark = load_image_set(name, "prompts")
        assert all(item.prompts for item in benchmark.classes) and len(benchmark.templates) > 2
        flat = [prompt for item in benchmark.classes for prompt in item.prompts]
        assert len(flat) == len(set(flat)), f"{name}: one wording for two classes"


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_published_layout_is_read_in_place(layout: object, tmp_path: Path) -> None:
    expected = layout(tmp_path)  # type: ignore[operator]
    found = read_images(load_image_set(layout.__name__, "prompts"), tmp_path)  # type: ignore[attr-defined]
    ids = [image.id for image in found.images]
    assert dict(zip(ids, found.labels, strict=True)) == expected
    assert not found.skipped
    assert all(image.open().mode == "RGB" for image in found.images)


def test_rows_that_cannot_be_used_are_recorded(tmp_path: Path) -> None:
    mhist(tmp_path)
    with (tmp_path / "annotations.csv").open("a") as file:
        file.write("MHIST_gone.png,HP,0,test\nMHIST_a.png,UNSURE,3,test\n../x.png,HP,0,test\n")
    found = read_images(load_image_set("mhist", "prompts"), tmp_path)
    assert [row["id"] for row in found.skipped] == ["MHIST_gone.png", "MHIST_a.png", "../x.png"]
    assert "0 classes" in found.skipped[1]["reason"]
    assert "outside the image folder" in found.skipped[2]["reason"]


@pytest.mark.parametrize(
    ("files", "rows", "name"),
    [
        (["1_01.png"], [], "10_1"),  # another image, though both have the digits 101
        (["1_01.png", "1-01.jpg"], [], "1 01"),  # one of two images
        (["1_01.png"], ["1_01.png"], "1 01"),  # the table names this file in another row
    ],
)
def test_a_missing_image_is_not_replaced_by_another(
    files: list[str], rows: list[str], name: str, tmp_path: Path
) -> None:
    for file in files:
        image(tmp_path / "images" / file)
    others = "".join(f"{row},SSA,6,test\n" for row in rows)
    (tmp_path / "annotations.csv").write_text(
        "Image Name,Majority Vote Label,Number,Partition\n" + others + f"{name},HP,0,test\n"
    )
    found = read_images(load_image_set("mhist", "labels"), tmp_path, all_classes=False)
    assert [image.id for image in found.images] == rows
    assert [row["id"] for row in found.skipped] == [name]


def test_a_layout_that_does_not_fit_is_explained(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no images of 'Normal'.*adapt it"):
        read_images(load_image_set("bach", "prompts"), tmp_path)
    (tmp_path / "annotations.csv").write_text("name,label\n")
    (tmp_path / "annotations.csv").write_text("name,label\na,b\n")
    with pytest.raises(ValueError, match=r"no columns \['Image Name'"):
        read_images(load_image_set("mhist", "prompts"), tmp_path)
    (tmp_path / "camelyonpatch_level_2_split_test_x.h5.gz").touch()
    with pytest.raises(FileNotFoundError, match="gunzip"):
        read_images(load_image_set("patch_camelyon", "prompts"), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": ["no place"]}, "one {} each"),
        ({"layout": {"kind": "cloud"}}, "kind 'cloud'"),
        ({"layout": {"kind": "table", "file": "a.csv", "image": "i"}}, "label or one_hot"),
        ({"layout": {"kind": "hdf5", "images": {}}}, r"lacks \['labels'\]"),
        ({"classes": [{"name": "a", "prompts": ["x"]}]}, "at least two"),
        ({"classes": [{"name": "a"}, {"name": "b"}]}, "prompts"),
        ({"classes": [{"name": "a", "prompts": "fat cells"}]}, "prompts: expected a list, found"),
        ({"classes": [{"name": "a", "prompts": []}]}, "'a': prompts: expected a list of texts"),
        ({"classes": [{"name": "a", "prompts": ["a"], "folders": "*/A"}]}, "folders: expected a l"),
        ({"templates": "an image of {}"}, "templates: expected a list"),
        (
            {
                "table": {"file": "a.csv", "image": "i", "label": "l"},
                "classes": [
                    {"name": "a", "prompts": ["a"], "labels": ["T"]},
                    {"name": "b", "prompts": ["b"], "labels": ["t", "x"]},
                ],
            },
            "'t' denotes both 'a' and 'b'",
        ),
    ],
)
def test_mistakes_in_configs_are_named(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    classes = [{"name": name, "prompts": [name]} for name in "ab"]
    content = {"name": "own", "templates": ["an image of {}"], "classes": classes, **change}
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_image_set(tmp_path / "own.json", "prompts")


def test_images_of_hdf5_are_8_bit_or_their_scale_is_known(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["grey"] = np.full((1, 4, 4), 65535, np.uint16)
        file["float"] = np.full((1, 4, 4, 3), 0.5)
    assert HDF5Image("grey", tmp_path / "x.h5", "grey", 0).open().getpixel((0, 0)) == (255,) * 3
    with pytest.raises(ImageError, match=r"x: pixels float64 \(4, 4, 3\), expected uint8"):
        HDF5Image("x", tmp_path / "x.h5", "float", 0).open()


def test_an_image_belongs_to_one_class_and_counts_once(tmp_path: Path) -> None:
    config = tmp_path / "own.json"
    classes = [{"name": "a", "folders": ["a*"]}, {"name": "b", "folders": ["ab"]}]
    config.write_text(json.dumps({"name": "own", "classes": classes}))
    image(tmp_path / "a" / "1.png")
    image(tmp_path / "ab" / "1.png")
    with pytest.raises(ValueError, match=r"ab/1\.png: in folders of 'a' and of 'b'"):
        read_images(load_image_set(config, "labels"), tmp_path)
    table = {"file": "labels.csv", "image": "image", "label": "label"}
    config.write_text(
        json.dumps({"name": "own", "table": table, "classes": [{"name": "a"}, {"name": "b"}]})
    )
    rows = "image,label\na/1.png,a\nab/1.png,b\n"
    (tmp_path / "labels.csv").write_text(f"{rows}ab/1,b\n")
    found = read_images(load_image_set(config, "labels"), tmp_path)
    assert found.labels == (0, 1) and [row["id"] for row in found.skipped] == ["ab/1"]
    assert "named twice, first in row 3" in found.skipped[0]["reason"]
    (tmp_path / "labels.csv").write_text(f"{rows}ab/1,a\n")
    found = read_images(load_image_set(config, "labels"), tmp_path, all_classes=False)
    assert [image.id for image in found.images] == ["a/1.png"] and found.labels == (0,)
    assert "first in row 3, as 'b' instead of 'a'" in found.skipped[0]["reason"]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match=r"bach, crc100k"):
        load_image_set("camelyon", "prompts")


def test_a_table_is_described_in_short_and_damaged_rows_are_skipped(tmp_path: Path) -> None:
    config = tmp_path / "own.yml"
    config.write_text(
        "name: own\nquestion: Tumour?\ntable: {file: labels.csv, image: name, label: tumour}\n"
        "classes: [{name: no tumour, label: 0}, {name: tumour, label: 1, wordings: [cancer]}]\n"
    )
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    (tmp_path / "labels.csv").write_text(
        "name,tumour,note,\na,1,good,\nb.png,0,,\na.png,0\nb.png,1,x,,more\n,1,,\n"
    )
    found = read_images(load_image_set(config, "question"), tmp_path)
    assert [image.id for image in found.images] == ["a", "b.png"]
    assert found.labels == (1, 0)
    assert [row["id"] for row in found.skipped] == ["a.png", "b.png", "row 6"]
    assert "columns than the header" in found.skipped[0]["reason"]
    (tmp_path / "labels.csv").write_text("name,tumour\na.png,1\n")
    with pytest.raises(FileNotFoundError, match="no images of 'no tumour'"):
        read_images(load_image_set(config, "question"), tmp_path)
    assert read_images(load_image_set(config, "question"), tmp_path, all_classes=False).images
    with pytest.raises(ValueError, match="prompts"):
        load_image_set(config, "prompts")


def test_one_config_serves_questions_and_prompts() -> None:
    asked, prompted = load_image_set("bach", "question"), load_image_set("bach", "prompts")
    assert asked == prompted
    assert asked.names == ["Normal", "Benign", "InSitu", "Invasive"]
    assert "an H&E stained section showing benign breast tissue." in prompted.sentences(1)
