"""Extraction gives the right patches for any number of workers, and reports every fault."""

from __future__ import annotations

import functools
import json
import operator
import os
import subprocess
import tarfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import webdataset
from PIL import Image

from pathcore import files
from pathcore.files import FolderInUseError, folder_lock, sha256_of
from pathcore.jobs import OutputExistsError, Report
from pathcore.pool import WorkerDiedError, run_tasks
from tests.killing import finishes
from tests.wsi.real_data import real_file
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.extraction import OutputSettings, extract
from wsi.reader import Region, Slide
from wsi.requests import PatchRequest, RejectedRow
from wsi.tile_job import TileSettings, tile_slides
from wsi.tiling import PatchSpec

PATCH = 128
WIDTH, HEIGHT = 900, 700
CAPTION = "two lines\r\n\ttab, “quotes”, emoji 🔬 and \\n"


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for number in range(3):
        pixels = tissue_pixels(WIDTH, HEIGHT, seed=number)
        write_svs(folder / f"uuid{number}" / f"TCGA.{number}.svs", pixels)
    return folder


def requests(number: int = 60, seed: int = 0) -> list[PatchRequest]:
    generator = np.random.default_rng(seed)
    return [
        PatchRequest(
            n + 1,
            f"TCGA.{generator.integers(3)}",
            int(generator.integers(0, WIDTH - PATCH)),
            int(generator.integers(0, HEIGHT - PATCH)),
            PATCH,
            PATCH,
            f"{n}: {CAPTION}",
        )
        for n in range(number)
    ]


def run(rows: list[Any], slides: Path, out: Path, **options: Any) -> Report:
    settings = options.pop("settings", OutputSettings(part_size=7))
    return extract(
        lambda: iter(rows), slides, out, settings=settings, source={}, progress=False, **options
    )


def contents(out: Path) -> dict[str, str]:
    """Digest by name of everything a user sees."""
    return {
        path.relative_to(out).as_posix(): sha256_of(path)
        for path in out.rglob("*")
        if path.is_file() and ".job" not in path.parts
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_files_with_the_published_names(slides: Path, tmp_path: Path) -> None:
    rows = requests()
    report = run(rows, slides, tmp_path / "out")
    assert report == Report(written=60)
    for row in rows:
        stem = tmp_path / "out" / f"{row.slide_id}_{row.x_level0}_{row.y_level0}"
        with Slide(next(slides.rglob(f"{row.slide_id}.svs"))) as slide:
            expected = slide.read(Region(row.x_level0, row.y_level0, PATCH, PATCH))
        assert np.array_equal(np.asarray(Image.open(f"{stem}.png")), expected)
        assert Path(f"{stem}.txt").read_bytes().decode() == row.caption
    names = set(contents(tmp_path / "out"))
    assert len(names) == 2 * 60 + 4
    assert {"manifest.jsonl", "skipped.jsonl", "report.json", "pairs.jsonl"} <= names
    pairs = read_rows(tmp_path / "out" / "pairs.jsonl")
    assert {(p["image"], p["caption"]) for p in pairs} == {
        (f"{r.slide_id}_{r.x_level0}_{r.y_level0}.png", r.caption) for r in rows
    }
    assert {p["mpp"] for p in pairs} == {0.25}


@pytest.mark.parametrize("image_format", ["png", "jpg", "webp"])
def test_shards_are_read_by_webdataset(slides: Path, tmp_path: Path, image_format: str) -> None:
    rows = requests(20)
    settings = OutputSettings("shards", image_format, part_size=8)
    run(rows, slides, tmp_path / "out", settings=settings)
    shards = sorted((tmp_path / "out" / "shards").iterdir())
    assert [shard.name for shard in shards] == ["000000.tar", "000001.tar", "000002.tar"]
    pipeline = webdataset.WebDataset(list(map(str, shards)), shardshuffle=False)
    samples = list(pipeline.decode("rgb8"))
    ordered = sorted(rows, key=lambda r: (r.slide_id, r.y_level0, r.x_level0))
    assert [s["txt"] for s in samples] == [r.caption for r in ordered]
    assert [s["json"]["position"] for s in samples] == [[r.x_level0, r.y_level0] for r in ordered]
    assert [s["json"]["wsi_id"] for s in samples] == [r.slide_id for r in ordered]
    assert {s[image_format].shape for s in samples} == {(PATCH, PATCH, 3)}
    assert len({s["__key__"] for s in samples}) == 20


@pytest.mark.parametrize("layout", ["files", "shards"])
@pytest.mark.multiproc
def test_two_processes_write_the_same_bytes(slides: Path, tmp_path: Path, layout: Any) -> None:
    rows: list[Any] = [*requests(), RejectedRow(61, "bad row", "x")]
    settings = OutputSettings(layout, part_size=7)
    for workers in (1, 2, 3):
        run(rows, slides, tmp_path / f"{workers}", settings=settings, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert len(contents(tmp_path / "1")) == {"files": 124, "shards": 12}[layout]


@pytest.mark.slow
@pytest.mark.multiproc
def test_ray_writes_the_same_bytes(slides: Path, tmp_path: Path) -> None:
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    rows: list[Any] = [*requests(), RejectedRow(61, "bad row", "x")]

    def compare(layout: Any) -> None:
        settings = OutputSettings(layout, part_size=7)
        run(rows, slides, tmp_path / f"one_{layout}", settings=settings)
        out = tmp_path / f"ray_{layout}"
        run(rows, slides, out, settings=settings, engine="ray", workers=2)
        assert contents(out) == contents(tmp_path / f"one_{layout}")

    def body() -> None:
        import ray

        compare("shards")
        assert not ray.is_initialized()  # what was started here has ended
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            compare("files")
            # An error reaches the caller as what it was.
            with pytest.raises(json.JSONDecodeError):
                list(run_tasks(json.loads, ["1", "no JSON"], workers=1, engine="ray"))
            assert ray.is_initialized()  # it belongs to the caller
        finally:
            ray.shutdown()

    # Ray leaves threads and signal handlers behind, and workers that later tests forked off this
    # process died of SIGSEGV.
    assert finishes(body, kill_after_s=None)


# Of the standard library: a spawned worker does not know the folder of the tests.
reciprocal = functools.partial(operator.truediv, 1)


@pytest.mark.multiproc
def test_engines_pass_errors_on() -> None:
    with pytest.raises(ZeroDivisionError):
        list(run_tasks(reciprocal, [1, 0, 2], workers=2))
    with pytest.raises(WorkerDiedError, match="run the same command again"):
        list(run_tasks(os._exit, [7], workers=2))
    with pytest.raises(ValueError, match="at least 1"):
        list(run_tasks(reciprocal, [1], workers=0))
    with pytest.raises(ValueError, match="--engine ray"):
        list(run_tasks(reciprocal, [1], workers=1, address="auto"))
    assert sorted(run_tasks(reciprocal, iter([1, 2, 4]), workers=2)) == [0.25, 0.5, 1]


def test_what_is_left_out_and_why(slides: Path, tmp_path: Path) -> None:
    broken = tmp_path / "slides"
    broken.mkdir()
    whole = next(slides.rglob("TCGA.0.svs")).read_bytes()
    (broken / "cut.svs").write_bytes(whole[: len(whole) // 2])
    (broken / "whole.svs").write_bytes(whole)
    (broken / "a").mkdir()
    (broken / "a" / "twice.svs").write_bytes(whole)
    (broken / "twice.tif").write_bytes(whole)
    spoilt = broken / "spoilt.svs"
    spoilt.write_bytes(whole)
    with tifffile.TiffFile(spoilt) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]  # type: ignore[union-attr]
    with spoilt.open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))
    places = [
        ("whole", 5, 6, "written"),
        ("whole", -10, 6, "over the edge"),
        ("whole", WIDTH - 20, HEIGHT - 20, "over the edge"),
        ("whole", 5, 6, "duplicate"),
        ("whole", -PATCH, 0, "outside the slide"),
        ("whole", WIDTH, 0, "outside the slide"),
        ("whole", 2**30, 2**30, "outside the slide"),
        ("missing", 5, 6, "slide missing"),
        ("twice", 5, 6, "slide missing"),
        ("cut", 5, 6, "slide unreadable"),
        ("spoilt", 0, 0, "damaged region"),
        ("spoilt", 500, 400, "written"),
    ]
    rows: list[Any] = [
        PatchRequest(n, slide_id, x, y, PATCH, PATCH, "text")
        for n, (slide_id, x, y, _) in enumerate(places, 1)
    ]
    rows.append(RejectedRow(13, "bad position", "half \ud800"))
    report = run(rows, broken, tmp_path / "out")
    manifest = read_rows(tmp_path / "out" / "manifest.jsonl")
    numbers = [number for row in manifest for number in row.get("rows", [row.get("row")])]
    assert len(numbers) == 13
    found = {n: row for row in manifest for n in row.get("rows", [row.get("row")])}
    assert sorted(found) == list(range(1, 14))  # nothing lost, nothing twice
    for n, (_, _, _, expected) in enumerate(places, 1):
        row = found[n]
        assert expected in (row.get("reason"), row["state"], *row.get("notes", ())), row
    assert "2 slides have this name" in found[9]["detail"]
    assert "truncated" in found[10]["detail"]
    assert "900 x 700 pixels" in found[5]["detail"]
    assert report.written == 4 and report.skipped == 9
    assert report.notes == {"over the edge": 2}
    assert json.loads((tmp_path / "out" / "report.json").read_text())["skipped"] == 9
    skipped = read_rows(tmp_path / "out" / "skipped.jsonl")
    assert skipped == [
        row for row in read_rows(tmp_path / "out" / "manifest.jsonl") if "reason" in row
    ]
    edge = np.asarray(Image.open(tmp_path / "out" / "whole_-10_6.png"))
    assert (edge[:, :10] == 255).all() and (edge[:, 10:] != 255).any()


def test_coordinates_of_another_scan_are_left_out(tmp_path: Path) -> None:
    write_svs(tmp_path / "slides" / "a.svs", tissue_pixels(400, 300), mpp=0.5)
    write_svs(tmp_path / "slides" / "b.svs", tissue_pixels(400, 300), mpp=0.5)
    tile_slides(
        tmp_path / "slides", tmp_path / "out", TileSettings(PatchSpec(64, 0.5)), progress=False
    )
    write_svs(tmp_path / "slides" / "a.svs", tissue_pixels(800, 600), mpp=0.25)
    coords = tmp_path / "out" / "coords"
    report = extract(coords, tmp_path / "slides", tmp_path / "patches", progress=False)
    skipped = read_rows(tmp_path / "patches" / "skipped.jsonl")
    assert {row["wsi_id"] for row in skipped} == {"a"}
    assert report.reasons == {"coordinates of another slide": len(skipped)}
    assert "400 x 300 px" in skipped[0]["detail"] and "800 x 600 px" in skipped[0]["detail"]
    assert report.written > 0


def test_what_was_left_out_can_be_tried_again(slides: Path, tmp_path: Path) -> None:
    some = tmp_path / "slides"
    some.mkdir()
    for number in (0, 2):
        (some / f"TCGA.{number}.svs").symlink_to(next(slides.rglob(f"TCGA.{number}.svs")))
    rows, out = requests(), tmp_path / "out"
    settings = OutputSettings("shards", part_size=7)
    first = run(rows, some, out, settings=settings)
    assert first.reasons == {"slide missing": sum(r.slide_id == "TCGA.1" for r in rows)}
    (some / "TCGA.1.svs").symlink_to(next(slides.rglob("TCGA.1.svs")))
    assert run(rows, some, out, settings=settings) == first
    assert run(rows, some, out, settings=settings, retry_skipped=True) == Report(written=60)
    run(rows, slides, tmp_path / "whole", settings=settings)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_missing_slide_takes_one_row_whatever_it_was_asked_for(
    slides: Path, tmp_path: Path
) -> None:
    missing = [
        PatchRequest(n, f"gone{n % 2}", n, n, PATCH, PATCH, "a long caption " * 60)
        for n in range(1, 3001)
    ]
    there = PatchRequest(3001, "TCGA.0", 5, 6, PATCH, PATCH, "text")
    report = run([*missing, there], slides, tmp_path / "out")
    assert (report.written, report.skipped) == (1, 3000)
    assert report.reasons == {"slide missing": 3000}
    rows = read_rows(tmp_path / "out" / "skipped.jsonl")
    assert [(row["wsi_id"], row["count"]) for row in rows] == [("gone0", 1500), ("gone1", 1500)]
    assert rows[0]["rows"] == list(range(2, 3001, 2))
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert size < 0.1 * sum(len(row.caption or "") for row in missing)


def test_a_finished_run_is_not_done_again(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out = requests(20), tmp_path / "out"
    report = run(rows, slides, out)
    before = contents(out)
    monkeypatch.setattr("wsi.extraction.write_part", lambda part: pytest.fail("done again"))
    assert run(rows, slides, out) == report
    assert contents(out) == before


def test_a_folder_with_something_else_is_refused(slides: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("dear")
    (tmp_path / "file").write_text("dear")
    for name, message in (
        ("thesis", "was not written by this command"),
        ("file", "is a file; name"),
    ):
        with pytest.raises(OutputExistsError, match=message):
            run(requests(3), slides, tmp_path / name)
    run(requests(3), slides, tmp_path / "out")
    with pytest.raises(OutputExistsError, match=r"other settings \(part_size: 7 then, 9 now\)"):
        run(requests(3), slides, tmp_path / "out", settings=OutputSettings(part_size=9))
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "dear"


def test_a_job_that_wrote_nothing_makes_room_for_another(slides: Path, tmp_path: Path) -> None:
    def broken() -> Iterator[PatchRequest]:
        yield from requests(2)
        raise ValueError("the annotations break off")

    out, settings = tmp_path / "out", OutputSettings(part_size=7)
    with pytest.raises(ValueError, match="break off"):
        extract(broken, slides, out, settings=settings, source={"a": 1}, progress=False)
    (out / "TCGA.0_1_2.png").touch()  # as if it had been killed on the way
    with pytest.raises(OutputExistsError, match="other settings"):
        run(requests(5), slides, out)
    (out / "TCGA.0_1_2.png").unlink()
    assert run(requests(5), slides, out) == Report(written=5)


def test_two_runs_on_one_folder(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOCK_PATIENCE_S", 0.1)
    run(requests(3), slides, tmp_path / "out")
    lock = tmp_path / "out" / ".job" / "lock"
    with folder_lock(lock), pytest.raises(FolderInUseError, match=str(tmp_path / "out")):
        run(requests(3), slides, tmp_path / "out")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("layout", ["files", "shards"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_stops_the_run_and_more_room_continues_it(
    slides: Path, tmp_path: Path, small_disk: Path, layout: Any, workers: int
) -> None:
    rows, settings = requests(), OutputSettings(layout, part_size=7)
    out = small_disk / "out"
    with pytest.raises(OSError, match="No space left"):
        run(rows, slides, out, settings=settings, workers=workers)
    run(rows, slides, tmp_path / "whole", settings=settings)
    whole = contents(tmp_path / "whole")
    images = {k: v for k, v in contents(out).items() if not k.endswith("jsonl")}
    assert images.items() <= whole.items()  # what has a name is whole
    assert images
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run(rows, slides, out, settings=settings, workers=workers)
    assert contents(out) == whole


def test_a_shard_holds_no_trace_of_time_or_user(slides: Path, tmp_path: Path) -> None:
    run(requests(5), slides, tmp_path / "out", settings=OutputSettings("shards"))
    with tarfile.open(tmp_path / "out" / "shards" / "000000.tar") as shard:
        assert {(m.mtime, m.uid, m.uname, m.mode) for m in shard} == {(0, 0, "", 0o644)}


def test_patches_of_a_real_slide(tmp_path: Path) -> None:
    slide_path = real_file("slides/small_HE.svs")
    rows: list[Any] = [
        PatchRequest(n, "small_HE", 300 * n, 400 * n, 672, 672, "text") for n in range(1, 5)
    ]
    report = run(rows, slide_path.parent, tmp_path / "out")
    assert report == Report(written=4, notes={})
    manifest = read_rows(tmp_path / "out" / "manifest.jsonl")
    assert {row["mpp"] for row in manifest} == {0.499}
