from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from webdataset.autodecode import imagehandler

from pathcore.images import load_image
from pathgen.clip import shards
from pathgen.clip.shards import ShardSet, prepare_shards
from pathgen.clip.worker import shards_without_end_marks
from tests.pathgen.histology import write_pairs


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def test_pairs_become_shards_once_each(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "data", 5)
    found = prepare_shards(pairs, tmp_path / "work", num_readers=3)
    assert len(found.paths) == 3 and found.total == 20 and not found.skipped
    assert found.num_pairs == tuple(len(members(path)) // 3 for path in found.paths)
    seen = {}
    for path in found.paths:
        content = members(path)
        for name in content:
            if name.endswith(".json"):
                row = json.loads(content[name])
                key = name.removesuffix(".json")
                seen[row["id"]] = (content[f"{key}.png"], content[f"{key}.txt"].decode())
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert seen == {
        row["id"]: ((pairs.parent / row["image"]).read_bytes(), row["caption"]) for row in rows
    }
    assert found.urls.split("::") == [str(path.absolute()) for path in found.paths]


def test_same_shards_from_one_process_and_two_and_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = write_pairs(tmp_path / "data", 6)
    one = prepare_shards(pairs, tmp_path / "one", num_readers=3)
    two = prepare_shards(pairs, tmp_path / "two", num_readers=3, num_processes=2)
    third = tmp_path / "three"
    real, calls = shards._write_shard, []

    def dies_at_second(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(shards, "_write_shard", dies_at_second)
    with pytest.raises(KeyboardInterrupt):
        prepare_shards(pairs, third, num_readers=3)
    three = prepare_shards(pairs, third, num_readers=3)
    assert len(calls) == 4  # one whole shard was kept
    digests = [[path.read_bytes() for path in found.paths] for found in (one, two, three)]
    assert digests[0] == digests[1] == digests[2]
    assert not list(tmp_path.rglob("*.partial*"))


def test_bad_pairs_are_recorded_and_left_out(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "data", 2)
    whole = (tmp_path / "data/images/TCGA-1.fat_0.png").read_bytes()
    (tmp_path / "data/images/half.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (8, 8)).save(tmp_path / "data/images/old.bmp")
    bad = [
        {"id": "half", "image": "images/half.png", "caption": "x"},
        {"id": "outside", "image": "../secret.png", "caption": "x"},
        {"id": "missing", "image": "images/none.png", "caption": "x"},
        {"id": "silent", "image": "images/TCGA-1.fat_0.png", "caption": "  "},
    ]
    with pairs.open("a") as file:
        file.write("not json\n[1]\n")
        file.write('{"id": "x", "image": "images/old.bmp", "caption": "\\ud800"}\n')
        file.write("[" * 100_000 + "\n")
        file.writelines(json.dumps(row) + "\n" for row in bad)
        file.write(json.dumps({"id": "bmp", "image": "images/old.bmp", "caption": "one\n\ttwo"}))
    found = prepare_shards(pairs, tmp_path / "work")
    assert found.total == 9
    assert [row["id"] for row in found.skipped] == [*[None] * 4, *(row["id"] for row in bad)]
    assert "surrogates not allowed" in found.skipped[2]["reason"]
    assert "cannot be decoded" in found.skipped[4]["reason"]
    content = members(found.paths[0])
    [caption] = [name for name in content if content[name] == b"one\n\ttwo"]
    assert Image.open(io.BytesIO(content[caption.replace(".txt", ".png")])).format == "PNG"


def test_shards_hold_the_pixels_that_scoring_reads(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    rgba, rgb = Image.fromarray(values), Image.fromarray(values[..., :3])
    deep = Image.fromarray(values[..., 0].astype(np.uint16) * 200)
    palette = rgb.quantize(16)
    kinds: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "rgb.png": (rgb, {}),
        "grey.jpg": (rgb.convert("L"), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "deep.png": (deep, {}),
        "deep.tif": (deep, {}),
        "clear.png": (rgba, {}),
        "clear.tif": (rgba, {}),
        "clear.webp": (rgba, {"lossless": True, "exact": True}),
        "grey_clear.png": (rgba.convert("LA"), {}),
        "key.png": (rgb, {"transparency": rgb.getpixel((2, 2))}),
        "palette.png": (palette, {}),
        "palette_clear.png": (palette, {"transparency": 3}),
    }
    for name, (image, options) in kinds.items():
        image.save(tmp_path / name, **options)
    rows = [json.dumps({"id": name, "image": name, "caption": name}) for name in kinds]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    found = prepare_shards(tmp_path / "pairs.jsonl", tmp_path / "work")
    assert found.total == len(kinds)
    content = members(found.paths[0])
    names = {content[n].decode(): n.removesuffix(".txt") for n in content if n.endswith(".txt")}
    for name in kinds:
        [packed] = [n for n in content if n.startswith(names[name]) and n[-3:] in ("png", "jpg")]
        trained = imagehandler("pilrgb")(packed, content[packed])
        expected = load_image(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(trained), np.asarray(expected), name)
        if name in ("rgb.png", "grey.jpg"):
            assert content[packed] == (tmp_path / name).read_bytes()


def test_no_usable_pair_names_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"id": "a", "image": "a.png", "caption": "x"}\n')
    with pytest.raises(ValueError, match=r"no pair can be used.*a\.png"):
        prepare_shards(tmp_path / "pairs.jsonl", tmp_path / "work")


def test_shards_in_place_are_counted_and_a_cut_one_is_named(tmp_path: Path) -> None:
    made = prepare_shards(write_pairs(tmp_path / "data", 5), tmp_path / "work", num_readers=2)
    folder = made.paths[0].parent
    found = prepare_shards(folder.parent, tmp_path / "index")
    assert (found.paths, found.num_pairs) == (made.paths, made.num_pairs)
    made.paths[1].write_bytes(made.paths[1].read_bytes()[:700])
    again = prepare_shards(folder, tmp_path / "index")
    assert again.paths == made.paths[:1]
    assert [Path(row["shard"]) for row in again.skipped] == [made.paths[1]]


def write_shard(path: Path, names: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return path


KEYS = [f"{number:03d}" for number in range(6)]
IMAGES, TEXTS = [f"{key}.png" for key in KEYS], [f"{key}.txt" for key in KEYS]
PAIRS = sorted(IMAGES + TEXTS)


@pytest.mark.parametrize(
    ("names", "num_pairs", "num_lost"),
    [
        (PAIRS, 6, 0),
        (IMAGES + TEXTS[::-1], 1, 5),  # one pair meets in the middle
        ([*PAIRS[:6], *IMAGES[3:], *TEXTS[3:]], 3, 3),
        ([*PAIRS, *PAIRS[:2]], 7, 0),
        ([f"a.b/{name.upper()}" for name in PAIRS], 6, 0),
        ([*PAIRS, "alone.png", "empty/", "__meta__/x.png"], 6, 0),
    ],
)
def test_pairs_are_counted_as_the_trainer_finds_them(
    tmp_path: Path, names: list[str], num_pairs: int, num_lost: int
) -> None:
    from open_clip_train.data import filter_no_caption_or_no_image, tarfile_to_samples_nothrow

    path = write_shard(tmp_path / "shards/0.tar", names)
    with shards_without_end_marks():
        samples = list(tarfile_to_samples_nothrow([{"url": str(path)}]))
    assert sum(map(filter_no_caption_or_no_image, samples)) == num_pairs
    found = prepare_shards(path.parent, tmp_path / "work")
    assert found.num_pairs == (num_pairs,)
    assert [f"pairs lost: {num_lost}," in row["reason"] for row in found.skipped] == [True] * bool(
        num_lost
    )


def test_shards_of_images_before_captions_are_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "shards/0.tar", IMAGES + TEXTS)
    with pytest.raises(ValueError, match=r"pairs lost: 6.*not neighbours.*tar --sort=name"):
        prepare_shards(path.parent, tmp_path / "work")


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 20),
    st.integers(1, 6),
    st.randoms(),
)
def test_check_passes_only_when_every_reader_can_fill_a_batch(
    counts: list[int], batch: int, readers: int, random: object
) -> None:
    shards = ShardSet(tuple(Path(f"{n}.tar") for n in range(len(counts))), tuple(counts))
    try:
        shards.check(batch, readers)
    except ValueError:
        return
    random.shuffle(counts)  # type: ignore[attr-defined]
    assert all(sum(counts[reader::readers]) >= batch for reader in range(readers))


def test_paths_that_open_clip_would_expand_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rename the folder"):
        _ = ShardSet((tmp_path / "a{1}" / "0.tar",), (1,)).urls
