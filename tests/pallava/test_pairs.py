import json
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pallava.pairs import (
    PairDataset,
    PairError,
    RandomQuarterTurn,
    collate_pairs,
    histology_augmentation,
    parse_pair,
    plain_resize,
    read_captions,
)
from pallava.skipping import SkipLog
from pathcore.images import ImageError


def row(**changes):
    fields = {"id": "a", "image": "a.png", "caption": "Dense nests of cells.", **changes}
    return json.dumps({name: value for name, value in fields.items() if value is not None})


@pytest.fixture
def make_dataset(tmp_path):
    def make(*lines, image_folder=None, **options):
        for index, colour in enumerate(((200, 0, 0), (0, 200, 0), (0, 0, 200))):
            Image.new("RGB", (40, 30), colour).save(tmp_path / f"{'abc'[index]}.png")
        (tmp_path / "bad.png").write_bytes(b"no image")
        file = tmp_path / "pairs.jsonl"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        log = SkipLog(tmp_path / "skipped.jsonl")
        return PairDataset(file, image_folder, image_size=16, skip_log=log, **options)

    return make


def test_a_pair_comes_out(make_dataset):
    dataset = make_dataset(row(), "", row(id=2, image="b.png", caption="  Größe \n", mpp=0.5))
    assert len(dataset) == 2
    sample = dataset[1]
    assert sample["image"].shape == (3, 16, 16)
    assert sample["image"].dtype == torch.uint8
    assert sample["image"][1].float().mean() > 150
    assert sample["caption"] == "Größe"
    assert dataset.pair(1).id == "2"
    assert dataset.skip_log.read() == []
    assert list(read_captions(dataset.pairs_file)) == ["Dense nests of cells.", "Größe"]


def test_equal_captions_share_an_id(make_dataset):
    captions = ["Fat.", "fat.", " FAT. ", "Bone.", "Fat"]
    dataset = make_dataset(*(row(caption=caption) for caption in captions))
    ids = [dataset[index]["caption_id"] for index in range(5)]
    assert ids[0] == ids[1] == ids[2]
    assert len(set(ids)) == 3
    assert min(ids) >= 0
    # The queues of a checkpoint hold ids when another file continues from its weights.
    other = make_dataset(row(caption="Artery."), row(caption="fat."))
    assert other[1]["caption_id"] == ids[0] and other[0]["caption_id"] not in ids


def test_an_unreadable_image_is_recorded_and_replaced(make_dataset):
    dataset = make_dataset(row(id="x", image="bad.png"), row(image="b.png", caption="green"))
    assert dataset[0]["caption"] == "green"
    dataset[0]
    (skipped,) = dataset.skip_log.read()
    assert skipped.id == "x"
    assert skipped.file.endswith("bad.png")
    assert "not a readable image" in skipped.reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[1]", "expected a JSON object, found list"),
        (row(id=None), "id: expected text or a whole number, found None"),
        (row(image=None), "image: expected text"),
        (row(image=3), "image: expected text, found 3"),
        (row(caption=" \n"), "caption: expected text"),
        (row(caption="cell \ud800"), "characters that no text has"),
        (row(image="a\0.png"), "characters that no text has"),
        ("[" * 100_000, "no JSON"),
        (row(image="../secret.png"), "resolves to a path outside the image folder"),
        (row(image="a/../../secret.png"), "resolves to a path outside the image folder"),
        (row(image="/etc/passwd"), "is outside the image folder"),
    ],
)
def test_an_unusable_line_is_recorded(make_dataset, line, reason):
    dataset = make_dataset(row(), line)
    assert len(dataset) == 1
    (skipped,) = dataset.skip_log.read()
    assert skipped.id == "line 2"
    assert reason in skipped.reason


@given(st.text())
def test_any_line_is_a_pair_or_an_error_of_ours(line):
    try:
        pair = parse_pair(line)
    except PairError:
        return
    assert pair.image.strip() and pair.caption


def test_many_unusable_lines_mean_a_wrong_file(make_dataset):
    lines = [row() for _ in range(17)] + [row(caption="")] * 3
    with pytest.raises(ValueError, match="3 of 20 rows cannot be used"):
        make_dataset(*lines)
    with pytest.raises(ValueError, match="1 of 1 rows"):
        make_dataset("{}")


def test_a_wrong_folder_is_named(make_dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image_folder .*absent"):
        make_dataset(row(), image_folder=tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    dataset = make_dataset(row(), row(image="b.png"), image_folder=tmp_path / "empty")
    with pytest.raises(ImageError, match="2 images in a row cannot be read"):
        dataset[0]


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl"):
        PairDataset(
            tmp_path / "absent.jsonl", tmp_path, image_size=8, skip_log=SkipLog(tmp_path / "log")
        )


def test_workers_get_a_copy(make_dataset):
    dataset = pickle.loads(pickle.dumps(make_dataset(row())))
    assert dataset[0]["caption"] == "Dense nests of cells."


def test_a_batch(make_dataset):
    dataset = make_dataset(row(), row(image="b.png", caption="x"))
    batch = collate_pairs([dataset[0], dataset[1]])
    assert batch["images"].shape == (2, 3, 16, 16)
    assert batch["captions"] == ["Dense nests of cells.", "x"]
    assert batch["caption_ids"].dtype == torch.int64


class TestTransforms:
    def test_all_eight_orientations_come_and_nothing_else(self):
        torch.manual_seed(0)
        pixels = np.zeros((8, 8, 3), dtype=np.uint8)
        pixels[1, 3] = 255
        transform = histology_augmentation(8, min_area=1.0, jitter=0, hue=0)
        seen = Counter()
        for _ in range(300):
            # A full-area crop of a square may still be a strip; those are resized and dimmer.
            image = transform(Image.fromarray(pixels))
            if image.max() == 255:
                seen[tuple(divmod(int(image[0].argmax()), 8))] += 1
        corners = {(1, 3), (3, 1), (6, 3), (3, 6), (1, 4), (4, 1), (6, 4), (4, 6)}
        assert set(seen) == corners

    def test_colour_is_moved_a_little(self):
        torch.manual_seed(0)
        image = Image.new("RGB", (32, 32), (180, 100, 160))
        transform = histology_augmentation(16)
        means = torch.stack([transform(image).float().mean(dim=(1, 2)) for _ in range(50)])
        assert means.std(dim=0).min() > 1
        assert (means - torch.tensor([180.0, 100.0, 160.0])).abs().max() < 60

    def test_plain_resize_takes_the_whole_image(self):
        image = Image.new("RGB", (64, 16))
        image.paste((255, 0, 0), (32, 0, 64, 16))
        out = plain_resize(8)(image)
        assert out.shape == (3, 8, 8)
        assert out[0, :, :3].max() < 60 and out[0, :, 5:].min() > 200

    def test_quarter_turns_keep_pixels(self):
        torch.manual_seed(0)
        image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)
        turned = {tuple(RandomQuarterTurn()(image).flatten().tolist()) for _ in range(50)}
        assert len(turned) == 4
        assert all(sorted(values) == list(range(48)) for values in turned)
