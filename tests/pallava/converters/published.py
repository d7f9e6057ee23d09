"""Synthetic data in the layouts of the published datasets."""

from __future__ import annotations

import csv
import io
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

CAPTION = (
    "Photomicrograph of a colon biopsy of a patient with crowded glands, hyperchromatic nuclei and "
    "a desmoplastic stroma around them, consistent with adenocarcinoma (H&E, x200)."
)


def save_image(path: Path, size: tuple[int, int] = (8, 6), colour: object = "pink") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)  # type: ignore[arg-type]
    return path


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_csv(path: Path, header: str, rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([header.split(","), *rows])
    return path


def pubmedvision(root: Path) -> Path:
    def row(number: int, images: list[str], modality: str = "Microscopy Images") -> dict[str, Any]:
        for name in images:
            save_image(root / name)
        return {
            "id": f"PubMedVision_{number}",
            "image": images,
            "conversations": [
                {"from": "human", "value": "What do you see?"},
                {"from": "gpt", "value": f"{CAPTION} Number {number}."},
            ],
            "modality": modality,
            "body_part": "Colon",
        }

    rows = [
        row(1, ["images/pmc_1_0.jpg"]),
        row(2, ["images/pmc_2_0.jpg", "images/pmc_2_1.jpg"]),
        row(3, ["images/pmc_3_0.jpg"], "Computed Tomography"),
    ]
    (root / "PubMedVision_Alignment_VQA.json").write_text(json.dumps(rows), encoding="utf-8")
    return root


def pmc_oa(root: Path, count: int = 3) -> Path:
    rows = []
    for number in range(count):
        name = f"PMC{100 + number}_Fig1_{number}.jpg"
        save_image(root / "images" / name)
        rows.append({"image": name, "caption": f"{CAPTION} Panel {number}.", "alignment_score": 9})
    write_lines(root / "pmc_oa.jsonl", rows)
    return root


def quilt(root: Path) -> Path:
    header = (
        ",caption,image_path,subset,split,pathology,roi_text,noisy_text,corrected_text,"
        "med_umls_ids,magnification,height,width"
    )
    rows = []
    for number, subset in enumerate(["quilt", "openpath", "laion"]):
        name = f"-1vq9Lc5iC8_image_{number}.jpg"
        save_image(root / "quilt_1m" / name)
        texts = [CAPTION, name, subset, "train", "['Breast pathology']", "", "", "", "", "1.0"]
        rows.append([number, *texts, 6, 8])
    write_csv(root / "quilt_1M_lookup.csv", header, rows)
    return root


def pathvqa(root: Path) -> Path:
    rows = []
    for number, answer in enumerate(["yes", "in the glands"]):
        save_image(root / "images" / "train" / f"train_{number:04d}.jpg")
        rows.append(
            {"image": f"train_{number:04d}", "question": f"Question {number}?", "answer": answer}
        )
    path = root / "qas" / "train" / "train_qa.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(rows))
    return root


def pathvqa_parquet(root: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def content(colour: str) -> dict[str, object]:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6), colour).save(buffer, "JPEG")
        return {"bytes": buffer.getvalue(), "path": None}

    images = [content("pink"), content("pink"), content("purple")]
    table = pa.table(
        {"image": images, "question": ["a?", "b?", "c?"], "answer": ["yes", "no", "glands"]}
    )
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, root / "train-00000-of-00001.parquet", row_group_size=2)
    return root


def pmcvqa(root: Path) -> Path:
    choices = [" A:fat ", " B:glands ", " C:bone ", " D:nerve "]
    save_image(root / "images" / "PMC7_Fig1.jpg")
    header = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label"
    row = ["PMC7_Fig1.jpg", "What is shown? {x}", "glands", *choices, "B"]
    write_csv(root / "train.csv", header, [row])
    header = "index,Figure_path,Caption,Question,Choice A,Choice B,Choice C,Choice D,Answer,split"
    row = [0, "PMC7_Fig1.jpg", "Mouse colon.", "What is shown?", *choices, "B", "test"]
    write_csv(root / "test_2.csv", header, [row])
    return root


def bach(root: Path) -> Path:
    for name in ("Normal", "Benign", "InSitu", "Invasive"):
        save_image(root / "Photos" / name / f"{name[:2].lower()}001.tif")
    return root


def oscc(root: Path) -> Path:
    for part in ("First Set/100x", "Second Set/400x"):
        save_image(root / f"{part} Normal Oral Cavity Histopathological Images" / "image_1.jpg")
        save_image(root / f"{part} OSCC Histopathological Images" / "image_1.jpg", colour="red")
    return root


def colonpath(root: Path) -> Path:
    rows = []
    for number, label in enumerate([0, 1, 1]):
        save_image(root / "images" / f"2019 {number}.png")
        rows.append([f"2019 {number}.png", f"study{number}", label])
    write_csv(root / "colon_train.csv", "img_id,study_id,tumor", rows)
    return root


def pathcap(root: Path, form: str = "list") -> Path:
    rows = []
    for number in range(3):
        save_image(root / "images" / f"{number}_fig.jpg")
        rows.append({"img": f"{number}_fig.jpg", "caption": f"{CAPTION} Part {number}."})
    content = {row["img"]: row["caption"] for row in rows} if form == "object" else rows
    (root / "captions.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def openpath(root: Path) -> Path:
    rows = []
    for number in range(3):
        save_image(root / "images" / f"15{number}.jpg")
        rows.append([f"https://example.org/a/status/15{number}?s=20", f"{CAPTION} #{number}"])
    write_csv(root / "openpath.csv", "weblink,caption", rows)
    return root


def arch(root: Path) -> Path:
    for name, suffix in (("books_set", ".png"), ("pubmed_set", ".jpg")):
        content = {}
        for number in range(11):
            uuid = f"{name}-{number:04x}"
            content[str(number)] = {"caption": f"{CAPTION} {number}.", "uuid": uuid}
            if number:  # a few captions have lost their image
                save_image(root / name / "images" / f"{uuid}{suffix}")
        content["1"] |= {"figure_id": "00", "letter": "Single"}
        (root / name / "captions.json").write_text(json.dumps(content))
    return root


def quilt_instruct(root: Path) -> Path:
    def turns(*texts: str) -> list[dict[str, str]]:
        return [
            {"from": "gpt" if number % 2 else "human", "value": text}
            for number, text in enumerate(texts)
        ]

    save_image(root / "quilt_1m" / "vid_image_1.jpg")
    rows = [
        {"id": "7", "image": "vid_image_1.jpg",
         "conversations": turns("<image>\nWhat is it?", "A gland.", "Why?", "It has a lumen.")},
        {"id": "8", "image": "vid_image_1.jpg",
         "conversations": turns("Describe.\n<image>", "Pale.")},
        {"id": "9", "conversations": turns("What is mitosis?", "Division.")},
    ]  # fmt: skip
    (root / "quilt_instruct_107k.json").write_text(json.dumps(rows))
    return root


def slide_instruction(root: Path) -> Path:
    rows = []
    for number in range(11):
        slide = f"TCGA-XX-{number:04d}-01Z-00-DX1"
        question = [{"from": "human", "value": "Name the organ.\n<image>"},
                    {"from": "gpt", "value": "Kidney."}]  # fmt: skip
        rows.append(
            {"id": f"train::{number}", "image": [f"{slide}.csv"], "conversations": question}
        )
        if number:  # features of the first slide are missing
            (root / "features").mkdir(parents=True, exist_ok=True)
            (root / "features" / f"{slide}.h5").write_bytes(b"features")
    (root / "SlideInstruct_train_stage2_vqa.json").write_text(json.dumps(rows))
    return root
