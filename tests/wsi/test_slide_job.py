"""A bad slide never stops the others, even if it kills its worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tifffile

from pathcore.files import UnsafeNameError
from pathcore.jobs import UnitError, write_record
from pathcore.rows import write_csv
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.extraction import OutputSettings, extract
from wsi.requests import PatchRequest
from wsi.slide_job import SlideUnit, process_slides

ROOT = Path(__file__).parents[2]

LIMITED = """
import resource, sys
from wsi.tile_job import TileSettings, tile_slides
from wsi.tiling import PatchSpec
gigabytes = 6 << 30
resource.setrlimit(resource.RLIMIT_AS, (gigabytes, gigabytes))
for workers in (1, 2):
    settings = TileSettings(PatchSpec(64, 0.5))
    print(tile_slides(sys.argv[1], f"{sys.argv[2]}{workers}", settings, workers=workers,
                      progress=False))
"""


def write_poison(path: Path) -> Path:
    """A slide whose directory asks for tiles of 65,520 px: OpenSlide aborts for want of memory."""
    write_svs(path, tissue_pixels(300, 300), mpp=0.5, downsamples=())
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for tag in ("TileWidth", "TileLength"):
            tiff.pages[0].tags[tag].overwrite(65520)  # type: ignore[union-attr]
    return path


@pytest.mark.multiproc
def test_a_slide_that_aborts_its_worker_is_recorded(tmp_path: Path) -> None:
    write_svs(tmp_path / "slides" / "good.svs", tissue_pixels(300, 300), mpp=0.5)
    write_poison(tmp_path / "slides" / "a_poison.svs")
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "slides"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    for workers in (1, 2):
        rows = {
            row["slide"]: row
            for row in map(json.loads, (tmp_path / f"out{workers}" / "manifest.jsonl").open())
        }
        assert rows["good"]["state"] == "written"
        assert rows["a_poison"]["reason"] in ("worker died", "out of memory"), rows
        assert "a_poison.svs" in rows["a_poison"]["detail"]


def process(unit: SlideUnit) -> dict[str, Any]:
    fault = unit.path.read_text()
    if fault == "abort":
        os.abort()
    if fault:
        raise {"ValueError": ValueError, "TypeError": TypeError, "MemoryError": MemoryError,
               "UnitError": UnitError, "OSError": OSError}[fault](f"a {fault}")  # fmt: skip
    return {"size": 1}


@pytest.mark.multiproc
@pytest.mark.parametrize("workers", [1, 2])
def test_faults_cost_their_slide(tmp_path: Path, workers: int) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    faults = ("", "abort", "ValueError", "TypeError", "MemoryError", "UnitError")
    for number, fault in enumerate(faults):
        (slides / f"s{number}.svs").write_text(fault)
    (slides / " bad name.svs").touch()

    def run(**options: Any) -> Any:
        return process_slides(process, slides, tmp_path / "out", {}, progress=False, **options)

    report = run(workers=workers)
    assert (report.written, report.skipped, report.exit_code) == (1, 6, 3)
    assert report.reasons == {
        "worker died": 1,
        "cannot be processed": 2,
        "unexpected error": 1,
        "out of memory": 1,
        "bad id": 1,
    }
    rows = {row["slide"]: row for row in map(json.loads, (tmp_path / "out/manifest.jsonl").open())}
    assert "s1.svs: a worker process died: it was killed by SIGABRT" in rows["s1"]["detail"]
    assert "TypeError: a TypeError (test_slide_job.py:" in rows["s3"]["detail"]
    assert run() == report  # continued: nothing is done again
    (slides / "s1.svs").write_text("")
    assert run(retry_skipped=True, workers=workers).written == 2
    (slides / "s2.svs").write_text("OSError")  # as for a full disk
    with pytest.raises(OSError, match="a OSError"):
        run(retry_skipped=True, workers=workers)


def test_ids_that_are_no_file_names_are_reported_and_stay_inside_the_output(tmp_path: Path) -> None:
    (tmp_path / "s.svs").touch()
    bad = ["BRCA/a", "../../../escaped", "..", "/absolute", "a\\b", "tab\tbed", "x" * 300]
    write_csv(
        tmp_path / "t.csv", ["path", "slide_id"], [["s.svs", name] for name in [*bad, "good"]]
    )
    before = set(tmp_path.iterdir())
    report = process_slides(
        process, tmp_path / "t.csv", tmp_path / "a/b/out", {}, workers=1, progress=False
    )
    assert (report.written, report.reasons, report.exit_code) == (1, {"bad id": 7}, 3)
    rows = map(json.loads, (tmp_path / "a/b/out/skipped.jsonl").open())
    assert {row["slide"] for row in rows} == {*bad}
    assert set(tmp_path.iterdir()) == {*before, tmp_path / "a"}
    assert list((tmp_path / "a/b").iterdir()) == [tmp_path / "a/b/out"]
    with pytest.raises(UnsafeNameError, match="'/' is not allowed"):
        write_record(tmp_path, "../outside", [])


def test_a_slide_that_changed_is_processed_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def tile(unit: SlideUnit) -> dict[str, Any]:
        calls.append(unit.slide_id)
        if unit.path.read_text() == "damaged":
            raise UnitError("damaged")
        (unit.out / "coords" / f"{unit.slide_id}.h5").write_text(unit.path.read_text())
        return {"mpp": unit.mpp}

    def run(mpp: float = 0.5) -> list[str]:
        table = [["a.svs", str(mpp), "a.png"], ["a.b.svs", "", ""]]
        write_csv(tmp_path / "t.csv", ["path", "mpp", "mask"], table)
        calls.clear()
        process_slides(
            tile, tmp_path / "t.csv", out, {}, folders=["coords"], engine="inline", progress=False
        )
        return calls

    out, slide = tmp_path / "out", tmp_path / "a.svs"
    for name in ("a.svs", "a.b.svs", "a.png"):
        (tmp_path / name).write_text(name)
    assert run() == ["a", "a.b"]
    os.utime(slide, (1, 1))  # as in a copy
    assert run() == []
    assert run(mpp=0.25) == ["a"]
    (tmp_path / "a.png").write_text("a mask")
    assert run(mpp=0.25) == ["a"]
    slide.unlink()
    assert run(mpp=0.25) == [] and (out / "coords/a.h5").is_file()
    slide.write_text("damaged")
    assert run(mpp=0.25) == ["a"]
    # Later steps do not find the old output of a slide that is skipped now.
    assert [path.name for path in (out / "coords").iterdir()] == ["a.b.h5"]


@pytest.mark.multiproc
@pytest.mark.parametrize("layout", ["files", "shards"])
def test_extraction_goes_on_without_the_deadly_slide(
    tmp_path: Path, layout: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wsi import extraction

    for name in ("a", "b", "c", "d"):
        write_svs(tmp_path / "slides" / f"{name}.svs", tissue_pixels(300, 300), mpp=0.5)
    whole = extraction.Slide

    def slide(path: Path, **options: Any) -> Any:
        if path.stem == "b":
            os.abort()
        if path.stem == "c":
            raise MemoryError
        return whole(path, **options)

    monkeypatch.setattr(extraction, "Slide", slide)
    requests = [
        PatchRequest(n, name, x, 0, 64, 64, "text")
        for n, (name, x) in enumerate([(s, x) for s in "abcd" for x in (0, 64)], 1)
    ]
    settings = OutputSettings(layout, part_size=8)

    def run(retry_skipped: bool = False) -> Any:
        return extract(
            lambda: iter(requests), tmp_path / "slides", tmp_path / "out", settings=settings,
            source={}, progress=False, retry_skipped=retry_skipped,
        )  # fmt: skip

    report = run()
    assert report.written == 4
    assert report.reasons == {"worker died": 2, "out of memory": 2}
    monkeypatch.undo()
    assert run(retry_skipped=True).written == 8
