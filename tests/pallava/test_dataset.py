"""Conversations and images on disk: what is used, skipped and recorded, or an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor
from xtuner.dataset.map_fns import llava_map_fn, template_map_fn_factory
from xtuner.utils import PROMPT_TEMPLATE

from pallava.anyres import AnyRes
from pallava.dataset import LLaVADataset, process_text
from pallava.default_collate_fn import default_collate_fn
from pallava.skipping import SkipLog
from pallava.text.contrasts import ANSWER_BITS
from pallava.text.encoding import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from pathcore.images import ImageError, load_image
from tests.pallava import goldens

SIZES_PX = [(64, 64), (96, 40), (40, 120), (30, 30)]
Row = dict[str, Any]


def row(name: object, answer: object = "yes", image: object = "", question: str = "red?") -> Row:
    """A question about `<name>.png`, or about `image`; None for no image."""
    image = f"{name}.png" if image == "" else image
    marks = len(image) if isinstance(image, list) else int(image is not None)
    turns = [{"from": "human", "value": IMAGE_TOKEN * marks + question}]
    turns.append({"from": "gpt", "value": answer})
    return {"id": name, "conversations": turns, **({"image": image} if image else {})}


def write_image(path: Path, index: int = 0) -> None:
    width_px, height_px = SIZES_PX[index % len(SIZES_PX)]
    pixels = np.random.default_rng(index).integers(0, 255, (height_px, width_px, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


class Folder:
    """A data folder: images, rows, and the data set over them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = root / "images"
        self.images.mkdir()

    def add_images(self, number: int) -> list[Row]:
        """Writes images `0.png`, ... and returns one row for each."""
        for index in range(number):
            write_image(self.images / f"{index}.png", index)
        return [row(index) for index in range(number)]

    def dataset(self, rows: list[Any], **changes: Any) -> LLaVADataset:
        (self.root / "rows.jsonl").write_text("\n".join(json.dumps(each) for each in rows))
        arguments: dict[str, Any] = {
            "image_folder": self.images,
            "image_processor": CLIPImageProcessor(crop_size={"height": 32, "width": 32}),
            "data_path": self.root / "rows.jsonl",
            "tokenizer": goldens.tokenizer(),
            "template_map_fn": template_map_fn_factory(PROMPT_TEMPLATE.llama3_chat),
            "skip_log": self.root / "skipped.jsonl",
        }
        return LLaVADataset(**(arguments | changes))

    def skipped(self) -> dict[str, str]:
        """Reason by id."""
        log = SkipLog(self.root / "skipped.jsonl").read()
        return {sample.id: sample.reason for sample in log}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_special_tokens_in_rows_are_letters(folder: Folder) -> None:
    word = "<|eot_id|>"
    plain, spelled = (
        folder.dataset([row("a", f"y{text}es", None, f"re{text}d?")])[0]["input_ids"]
        for text in ("", word)
    )
    special = [[token for token in ids if token in range(5)] for ids in (plain, spelled)]
    assert special[0] == special[1]
    assert goldens.tokenizer().decode(spelled).count(word) == 2 + special[1].count(4)


def test_a_sample_is_what_the_model_reads(folder: Folder) -> None:
    dataset = folder.dataset(folder.add_images(4))
    assert len(dataset) == 4
    sample = dataset[2]
    (stack,) = sample["pixel_values"]
    expected = AnyRes(tile_px=32)(load_image(folder.images / "2.png"))
    assert torch.equal(stack, expected)
    assert sample["input_ids"].count(IMAGE_TOKEN_INDEX) == 1
    learned = [token for token in sample["labels"] if token >= 0]
    assert goldens.tokenizer().decode(learned) == "yes<|eot_id|>"
    assert dataset.num_sub_images == [4, 6, 8, 4]
    assert dataset.modality_length == [len(dataset[index]["input_ids"]) for index in range(4)]
    assert folder.skipped() == {}


def test_the_hosts_map_function_gives_the_recorded_ids(folder: Folder) -> None:
    recorded = goldens.read_json("text/train_encoding.json")[0]
    write_image(folder.images / "a.png")
    dataset = folder.dataset([recorded["example"]], dataset_map_fn=llava_map_fn)
    assert dataset[0]["input_ids"] == recorded["input_ids"]
    assert dataset[0]["labels"] == recorded["labels"]


def test_texts_several_images_and_one_image_live_together(folder: Folder) -> None:
    rows = folder.add_images(3)
    rows += [row("text", image=None), row("pair", image=["2.png", "0.png"])]
    dataset = folder.dataset(rows)
    assert [len(dataset[index]["pixel_values"]) for index in range(5)] == [1, 1, 1, 0, 2]
    assert torch.equal(dataset[4]["pixel_values"][0], dataset[2]["pixel_values"][0])
    assert dataset.num_sub_images == [4, 6, 8, 0, 8 + 4]
    lengths = dataset.modality_length
    assert [length < 0 for length in lengths] == [False, False, False, True, False]
    batch = default_collate_fn([dataset[index] for index in range(5)])["data"]
    assert len(batch["pixel_values"]) == 5
    assert folder.skipped() == {}


def test_texts_alone_need_no_image(folder: Folder) -> None:
    dataset = folder.dataset([row("a", image=None), row("b", image=None)])
    assert dataset.num_sub_images == [0, 0]
    assert dataset[1]["pixel_values"] == []


# The row, why it is left out, and the image at fault if it is not the file of rows.
BAD_ROWS: dict[str, tuple[Any, str, str | None]] = {
    "empty_caption": (row("bad", answer=""), "an empty answer", None),
    "blank_caption": (row("bad", answer="  \n"), "an empty answer", None),
    "no_mark": ({**row("bad", image=None), "image": "0.png"}, "1 image file(s) but 0 <", None),
    "no_file": (row("bad", image=[], question=IMAGE_TOKEN), "0 image file(s) but 1 <", None),
    "no_conversations": ({"id": "bad", "image": "0.png"}, "a list of {from, value}", None),
    "no_answer": (
        {"id": "bad", "conversations": [{"from": "human", "value": "a"}]},
        "no question with an answer",
        None,
    ),
    "mark_in_answer": (row("bad", answer=f"see {IMAGE_TOKEN}"), "mark in an answer", None),
    "two_answers": (
        {
            "id": "bad",
            "conversations": [*row("", image=None)["conversations"], {"from": "gpt", "value": "b"}],
        },
        "two answers to one question",
        None,
    ),
    "number": (row("bad", answer=2), "expected text, found int 2", None),
    "surrogate": (row("bad", answer="\ud800"), "no valid Unicode", None),
    "no_object": (["bad"], "no object: ['bad']", None),
    "missing_image": (row("bad", image="absent.png"), "no such image file", "absent.png"),
    "outside": (
        row("bad", image="../rows.jsonl"),
        "resolves to a path outside the image",
        "../rows.jsonl",
    ),
    "absolute": (row("bad", image="/etc/hosts"), "is outside the image", "/etc/hosts"),
    "nul": (row("bad", image="a\0.png"), "expected a file name", "a\0.png"),
    "no_image": (row("bad", image="text.png"), "not a readable image", "text.png"),
}


@pytest.mark.parametrize("fault", BAD_ROWS)
def test_one_bad_row_is_recorded_and_left_out(folder: Folder, fault: str) -> None:
    bad, reason, image = BAD_ROWS[fault]
    (folder.images / "text.png").write_text("no image")
    rows = folder.add_images(4)
    dataset = folder.dataset([*rows[:2], bad, *rows[2:]])
    assert [dataset.text_data[index]["id"] for index in range(len(dataset))] == list("0123")
    assert all(len(dataset[index]["pixel_values"]) == 1 for index in range(4))
    (record,) = SkipLog(folder.root / "skipped.jsonl").read()
    assert record.id == ("3" if fault == "no_object" else "bad")  # without an id, the line
    assert reason in record.reason
    if image is None:
        assert record.file == str(folder.root / "rows.jsonl")
        assert "rows.jsonl, row 3: " in record.reason
    else:
        assert record.file == image


@pytest.mark.parametrize("name", [None, "", "video_7"])
def test_every_bad_row_counts_also_if_several_have_one_id(folder: Folder, name: Any) -> None:
    rows = folder.add_images(30)
    dataset = folder.dataset([*rows, *[row(name, answer="", image=None)] * 3])
    assert len(dataset) == 30
    assert list(folder.skipped()) == [str(name), f"{name} (row 32)", f"{name} (row 33)"]
    with pytest.raises(ValueError, match="4 of 34 rows cannot be used, more than a tenth"):
        folder.dataset([*rows, *[row(name, answer="", image=None)] * 4])


def test_a_line_that_is_no_json_is_recorded(folder: Folder) -> None:
    rows = folder.add_images(3)
    path = folder.root / "mixed.jsonl"
    lines = [json.dumps(each).encode() for each in rows]
    path.write_bytes(b"\n".join([lines[0], b"{", b'{"id": "\xff"}', *lines[1:]]))
    dataset = folder.dataset([], data_path=path)
    assert len(dataset) == 3
    assert set(folder.skipped()) == {"2", "3"}
    assert "mixed.jsonl, row 2: no object: no JSON" in folder.skipped()["2"]


@pytest.mark.parametrize(
    "case", ["cmyk.tiff", "cmyk.jpg", "grey16.png", "rgba.png", "palette.png", "animated.gif"]
)
def test_unusual_images_are_samples(folder: Folder, case: str) -> None:
    kind = case.split(".")[0]
    image = Image.linear_gradient("L").resize((50, 40))
    if kind == "grey16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    elif kind in ("cmyk", "rgba"):
        image = image.convert("RGB").convert(kind.upper())
    elif kind == "palette":
        image = image.quantize(8)
    more = {"save_all": True, "append_images": [image.rotate(180)]} if kind == "animated" else {}
    image.save(folder.images / case, **more)
    dataset = folder.dataset([row("a", image=case)])
    (stack,) = dataset[0]["pixel_values"]
    assert stack.shape == (1 + dataset.num_sub_images[0], 3, 32, 32)
    upper, lower = stack[0, :, :8].mean(), stack[0, :, -8:].mean()
    assert lower - upper > 1.5  # the gradient is there, neither clipped nor reversed
    assert folder.skipped() == {}


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_images_of_one_pixel_are_samples(folder: Folder, size: tuple[int, int]) -> None:
    Image.new("RGB", size, "red").save(folder.images / "a.png")
    dataset = folder.dataset([row("a")])
    assert dataset[0]["pixel_values"][0].isfinite().all()


def test_too_large_images_are_left_out_at_the_start(folder: Folder) -> None:
    rows = folder.add_images(4)
    dataset = folder.dataset(rows, max_pixels=64 * 64)
    assert len(dataset) == 3  # 40 x 120 is larger
    assert "40 x 120 px is more than the 4,096 pixels allowed" in folder.skipped()["2"]


@pytest.mark.slow
def test_20_000_px_are_a_sample(folder: Folder) -> None:
    Image.new("1", (20_000, 20_000), 1).save(folder.images / "a.png")
    dataset = folder.dataset([row("a")])
    (stack,) = dataset[0]["pixel_values"]
    assert stack.shape == (5, 3, 32, 32)
    assert stack.std() > 0  # three channels of white, normalised


def break_file(path: Path, how: str) -> None:
    if how == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize("how", ["removed", "truncated"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_turns_bad_later_is_recorded_and_replaced(
    folder: Folder, how: str, workers: int
) -> None:
    dataset = folder.dataset(folder.add_images(8))
    assert len(dataset) == 8
    for index in (2, 3, 7):
        break_file(folder.images / f"{index}.png", how)
    loader = DataLoader(
        dataset, batch_size=2, num_workers=workers, collate_fn=partial(default_collate_fn)
    )
    for _ in range(2):
        images = [image for batch in loader for image in batch["data"]["pixel_values"]]
        assert len(images) == 8
        for index, stands_in in ((2, 4), (3, 4), (7, 0)):
            assert torch.equal(images[index], images[stands_in])
    assert set(folder.skipped()) == {"2", "3", "7"}
    reason = "no such image file" if how == "removed" else "cannot be decoded"
    assert all(reason in found for found in folder.skipped().values())
    files = {sample.file for sample in SkipLog(folder.root / "skipped.jsonl").read()}
    assert files == {"2.png", "3.png", "7.png"}


def test_a_truncated_image_is_found_when_it_is_read(folder: Folder) -> None:
    rows = folder.add_images(4)
    break_file(folder.images / "1.png", "truncated")
    dataset = folder.dataset(rows)
    assert len(dataset) == 4  # its header is whole
    assert torch.equal(dataset[1]["pixel_values"][0], dataset[2]["pixel_values"][0])
    assert dataset[1]["input_ids"] == dataset[2]["input_ids"]
    assert "cannot be decoded" in folder.skipped()["1"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_than_a_tenth_of_undecodable_images_stops_the_run(
    folder: Folder, num_workers: int
) -> None:
    rows = folder.add_images(24)
    for index in range(0, 24, 2):
        break_file(folder.images / f"{index}.png", "truncated")
    dataset = folder.dataset(rows)
    assert len(dataset) == 24  # the headers are whole
    loader = DataLoader(dataset, 4, collate_fn=default_collate_fn, num_workers=num_workers)
    with pytest.raises(ValueError, match="of 24 rows cannot be used, more than a tenth"):
        list(loader)


def test_two_undecodable_images_of_twenty_four_do_not(folder: Folder) -> None:
    rows = folder.add_images(24)
    for index in (3, 9):
        break_file(folder.images / f"{index}.png", "truncated")
    dataset = folder.dataset(rows)
    for _ in range(2):  # an image that fails in every epoch is one image
        assert len([dataset[index] for index in range(24)]) == 24
    assert set(folder.skipped()) == {"3", "9"}


def test_when_the_storage_is_gone_the_run_stops(folder: Folder) -> None:
    dataset = folder.dataset(folder.add_images(20))
    for path in folder.images.iterdir():
        path.unlink()
    with pytest.raises(ImageError, match="16 rows one after the other are unreadable"):
        dataset[3]


def test_a_wrong_image_folder_stops_at_the_start(folder: Folder) -> None:
    rows = folder.add_images(12)
    (folder.root / "other").mkdir()
    with pytest.raises(ValueError, match=r"images in .*other: 12 of 12 rows cannot be used"):
        folder.dataset(rows, image_folder=folder.root / "other")


def test_a_file_of_something_else_stops_at_the_start(folder: Folder) -> None:
    with pytest.raises(ValueError, match=r"rows\.jsonl: 3 of 3 rows cannot be used"):
        folder.dataset([{"text": "a"}] * 3)
    with pytest.raises(ValueError, match=r"rows\.jsonl: no rows"):
        folder.dataset([])


def test_two_images_in_a_turn_need_another_map_function(folder: Folder) -> None:
    rows = [*folder.add_images(3), row("pair", image=["0.png", "1.png"])]
    dataset = folder.dataset(rows, dataset_map_fn=llava_map_fn)
    assert len(dataset) == 3
    assert folder.skipped()["pair"] == (
        "dataset_map_fn left 1 image token(s) for 2 image(s); conversations with several images in "
        "one turn need interleaved_map_fn"
    )


def test_an_answer_cut_off_is_left_out(folder: Folder) -> None:
    rows = folder.add_images(2)
    rows[1] = row(1, question="word " * 40)
    dataset = folder.dataset(rows, max_length=40)
    assert len(dataset) == 1
    assert folder.skipped()["1"] == "no word of the answer is within max_length 40"
    with pytest.raises(ValueError, match=r"2 of 2 rows cannot be used.*\n.*no word of the answer"):
        folder.dataset(rows, max_length=5)


def test_answers_cut_off_in_more_than_a_tenth_of_the_rows_are_an_error(folder: Folder) -> None:
    rows = folder.add_images(20)
    rows[18:] = [row(number, question="word " * 40) for number in (18, 19)]
    assert len(folder.dataset(rows, max_length=40)) == 18
    rows[17] = row(17, question="word " * 40)
    with pytest.raises(ValueError, match=r"rows\.jsonl: 3 of 20 rows cannot be used"):
        folder.dataset(rows, max_length=40)


def test_images_whose_mark_is_cut_off_are_not_loaded(folder: Folder) -> None:
    rows = folder.add_images(2)
    turns = [("human", f"{IMAGE_TOKEN}a?"), ("gpt", "b"), ("human", f"{'c ' * 40}{IMAGE_TOKEN}")]
    turns.append(("gpt", "d"))
    conversations = [{"from": role, "value": value} for role, value in turns]
    rows.append({"id": "long", "image": ["0.png", "1.png"], "conversations": conversations})
    dataset = folder.dataset(rows, max_length=60)
    assert len(dataset[2]["pixel_values"]) == 1
    assert dataset.num_sub_images[2] == 4
    default_collate_fn([dataset[2]])


def test_rows_are_taken_at_random_when_fewer_are_asked_for(folder: Folder) -> None:
    rows = folder.add_images(8)
    ids = [list(folder.dataset(rows, max_dataset_length=5).text_data["id"]) for _ in range(2)]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 5
    assert ids[0] != sorted(ids[0])


def test_answers_are_marked_on_request(folder: Folder) -> None:
    rows = folder.add_images(20)
    for number, each in enumerate(rows):
        each["conversations"][0]["value"] = "<image>\nIs mucin shown?"
        each["conversations"][1]["value"] = "yes" if number % 5 else "no"
    plain, marked = folder.dataset(rows), folder.dataset(rows, contrast_answers=True)
    assert "label_marks" not in plain[0]
    assert len(marked) == len(plain)
    found: dict[str, set[int]] = {"yes": set(), "no": set()}
    for index in range(20):
        sample = marked[index]
        assert {**plain[index], "pixel_values": None} == {
            name: value if name != "pixel_values" else None
            for name, value in sample.items()
            if name != "label_marks"
        }
        start = next(place for place, label in enumerate(sample["labels"]) if label >= 0)
        found["yes" if index % 5 else "no"].add(sample["label_marks"].pop(start))
        assert set(sample["label_marks"]) == {0}
    (yes,), (no,) = found["yes"], found["no"]
    assert yes != no
    assert yes >> ANSWER_BITS == no >> ANSWER_BITS != 0


def test_answers_without_counterparts_are_reported(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(
        "pallava.engine.conversations.print_log", lambda message, **_: shown.append(message)
    )
    data = folder.dataset(folder.add_images(3), contrast_answers=True)
    assert set(data[0]["label_marks"]) == {0}
    assert any("0 of 3 answers in" in text and "often enough" in text for text in shown)


def test_marks_of_tokenised_rows_are_used_on_request(folder: Folder) -> None:
    rows = [row(number, "yes" if number % 5 else "no", question="red?") for number in range(20)]
    folder.add_images(20)
    stored = folder.root / "stored"
    folder.dataset(rows, contrast_answers=True).text_data.save_to_disk(str(stored))
    offline = {"data_path": None, "tokenizer": None, "offline_processed_text_folder": stored}
    marked = folder.dataset(rows, **offline, contrast_answers=True)
    assert len(set(marked[0]["label_marks"])) == 2
    assert marked[0]["label_marks"] == folder.dataset(rows, contrast_answers=True)[0]["label_marks"]
    assert "label_marks" not in folder.dataset(rows, **offline)[0]
    marked.text_data.remove_columns("label_marks").save_to_disk(str(folder.root / "without"))
    offline["offline_processed_text_folder"] = folder.root / "without"
    with pytest.raises(ValueError, match="needs the column label_marks, found"):
        folder.dataset(rows, **offline, contrast_answers=True)


def test_many_processes_give_the_same(folder: Folder) -> None:
    rows = folder.add_images(6)
    alone, shared = (folder.dataset(rows, map_num_proc=number) for number in (1, 2))
    assert alone.text_data["input_ids"] == shared.text_data["input_ids"]


def test_squares_and_thumbnails_alone(folder: Folder) -> None:
    rows = folder.add_images(3)
    squared = folder.dataset(rows, pad_image_to_square=True)
    assert squared.num_sub_images == [len(squared[i]["pixel_values"][0]) - 1 for i in range(3)]
    assert squared.num_sub_images == [4, 4, 4]
    assert folder.skipped() == {}
    thumbnails = folder.dataset(rows, anyres_image=False)
    assert [thumbnails[index]["pixel_values"][0].shape[0] for index in range(3)] == [1, 1, 1]
    assert thumbnails.num_sub_images == [0, 0, 0]


def test_small_squares_fill_their_grid_unless_the_published_rule_is_named(folder: Folder) -> None:
    rows = folder.add_images(1)
    Image.new("RGB", (20, 20), (255, 255, 255)).save(folder.images / "0.png")
    rules: list[dict[str, Any]] = [{}, {"grid_ties": "published"}]
    ours, strip = (folder.dataset(rows, **rule)[0]["pixel_values"][0] for rule in rules)
    assert ours.shape == strip.shape == (5, 3, 32, 32)
    assert torch.equal(ours[0], strip[0])
    is_black = [float((tiles[1:] < 0).float().mean()) for tiles in (ours, strip)]
    assert is_black == [0, 0.75]


def test_a_square_that_would_be_too_large_is_recorded(folder: Folder) -> None:
    rows = folder.add_images(3)
    dataset = folder.dataset(rows, pad_image_to_square=True, max_pixels=100 * 100)
    assert len(dataset) == 3  # 40 x 120 is small enough, its square is not
    assert torch.equal(dataset[2]["pixel_values"][0], dataset[0]["pixel_values"][0])
    assert "40 x 120 px, padded to a square" in folder.skipped()["2"]


def without_answers(row: Row) -> dict[str, list[dict[str, str]]]:
    pair = {"input": IMAGE_TOKEN, "output": "yes"}
    return {"conversation": [] if row["id"] == "1" else [pair]}


@pytest.mark.parametrize("template", [None, PROMPT_TEMPLATE.llama3_chat])
def test_rows_that_a_map_function_empties_are_recorded(folder: Folder, template: Any) -> None:
    template = template and template_map_fn_factory(template)
    rows = folder.add_images(3)
    dataset = folder.dataset(rows, dataset_map_fn=without_answers, template_map_fn=template)
    assert list(dataset.text_data["id"]) == ["0", "2"]
    assert set(folder.skipped()) == {"1"}


def test_without_the_header_check_costs_are_unknown(folder: Folder) -> None:
    rows = [*folder.add_images(2), row("absent")]
    dataset = folder.dataset(rows, check_images="none")
    assert len(dataset) == 3
    with pytest.raises(ValueError, match="needs check_images='header'"):
        dataset.num_sub_images  # noqa: B018
    assert torch.equal(dataset[2]["pixel_values"][0], dataset[0]["pixel_values"][0])
    assert "absent.png: no such image file" in folder.skipped()["absent"]


def absent(name: str) -> Callable[[Folder], dict[str, Any]]:
    return lambda folder: {name: folder.root / "absent"}


@pytest.mark.parametrize("name", ["image_folder", "data_path", "offline_processed_text_folder"])
def test_an_absent_folder_or_file_is_named(folder: Folder, name: str) -> None:
    rows = folder.add_images(1)
    with pytest.raises(FileNotFoundError, match=rf"{name} .*absent: no such (folder|file)"):
        folder.dataset(rows, **absent(name)(folder))


@pytest.mark.parametrize("missing", ["data_path", "tokenizer"])
def test_missing_arguments_are_named(folder: Folder, missing: str) -> None:
    with pytest.raises(ValueError, match="offline_processed_text_folder, or data_path and tok"):
        folder.dataset(folder.add_images(1), **{missing: None})


def process(folder: Folder, rows: list[Row]) -> Any:
    (folder.root / "rows.jsonl").write_text("\n".join(json.dumps(each) for each in rows))
    return process_text(
        folder.root / "rows.jsonl",
        tokenizer=goldens.tokenizer(),
        dataset_map_fn=None,
        template_map_fn=None,
        max_length=100,
        max_dataset_length=None,
        num_proc=None,
        skip_log=SkipLog(folder.root / "skipped.jsonl"),
    )


def test_tokenised_rows_are_used_as_they_are(folder: Folder) -> None:
    rows = [*folder.add_images(2), row("text", image=None)]
    process(folder, rows).save_to_disk(folder.root / "text")
    dataset = folder.dataset([], data_path=None, offline_processed_text_folder=folder.root / "text")
    assert [len(dataset[index]["pixel_values"]) for index in range(3)] == [1, 1, 0]
    assert dataset.num_sub_images == [4, 6, 0]


def test_published_tokenised_rows_have_three_columns(folder: Folder) -> None:
    from datasets import Dataset

    rows = folder.add_images(2)
    names = [{"image": rows[0]["image"]}, {"image": rows[1]["image"]}, {"image": None}]
    ids = [{"input_ids": [0, IMAGE_TOKEN_INDEX, 9], "labels": [-100, -100, 9]}] * 2
    ids.append({"input_ids": [0, 8], "labels": [-100, 8]})
    Dataset.from_list([a | b for a, b in zip(names, ids, strict=True)]).save_to_disk(
        folder.root / "text"
    )
    dataset = folder.dataset([], offline_processed_text_folder=folder.root / "text")
    assert [len(dataset[index]["pixel_values"]) for index in range(3)] == [1, 1, 0]
    assert len(dataset) == 3


def test_tokenised_rows_without_a_column_are_named(folder: Folder) -> None:
    from datasets import Dataset

    Dataset.from_list([{"input_ids": [1]}]).save_to_disk(folder.root / "text")
    with pytest.raises(ValueError, match=r"text: columns \['labels'\] are missing"):
        folder.dataset([], offline_processed_text_folder=folder.root / "text")


def test_tokenised_rows_whose_images_are_not_named_are_left_out(folder: Folder) -> None:
    from datasets import Dataset

    (name,) = [each["image"] for each in folder.add_images(1)]
    ids = {"input_ids": [0, IMAGE_TOKEN_INDEX, 9], "labels": [-100, -100, 9]}
    rows = [{"id": "good", "image": name, **ids}, {"id": "bad", "image": None, **ids}]
    Dataset.from_list(rows).save_to_disk(folder.root / "text")
    dataset = folder.dataset([], offline_processed_text_folder=folder.root / "text")
    assert all(len(dataset[index]["pixel_values"]) == 1 for index in range(len(dataset)))
    assert "1 image places, 0 image file(s)" in folder.skipped()["bad"]
