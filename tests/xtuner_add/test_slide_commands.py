"""``xtuner-add tile``, ``extract`` and ``gdc-manifest`` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.wsi.qupath import read_valid
from tests.wsi.real_data import real_file
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.store import read_coordinates
from xtuner_add.cli import main


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    write_svs(folder / "TCGA.A.svs", tissue_pixels(1600, 1100, blank=0.5), mpp=0.25)
    write_svs(folder / "TCGA.B.svs", tissue_pixels(1300, 900, seed=1), mpp=0.5, magnification=20)
    return folder


def write_annotations(path: Path, rows: list[tuple[Any, Any, str]]) -> Path:
    names = ("wsi_id", "position", "caption")
    path.write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
    return path


def test_tile_then_extract(slides: Path, tmp_path: Path) -> None:
    tiles, patches = tmp_path / "tiles", tmp_path / "patches"
    result = invoke("tile", slides, "--output", tiles, "--patch-px", 200, "--workers", 1)
    assert result.exit_code == 0, result.output
    found = {
        name: read_coordinates(tiles / "coords" / f"{name}.h5") for name in ("TCGA.A", "TCGA.B")
    }
    assert {name: c.size_level0 for name, c in found.items()} == {"TCGA.A": 400, "TCGA.B": 200}
    assert found["TCGA.A"].coords[:, 0].min() >= 600  # the left half is glass
    for folder in ("overlays", "thumbnails"):
        assert {p.name for p in (tiles / folder).iterdir()} == {"TCGA.A.jpg", "TCGA.B.jpg"}
    arguments = ("extract", tiles / "coords", "--slides", slides, "--output", patches)
    result = invoke(*arguments, "--layout", "shards", "--format", "jpg", "--workers", 2)
    assert result.exit_code == 0, result.output
    total = sum(len(c.coords) for c in found.values())
    assert f"Wrote {total} patches" in result.output
    rows = [json.loads(line) for line in (patches / "manifest.jsonl").open()]
    assert len(rows) == total and {row["mpp"] for row in rows} == {0.5}


def test_tile_leaves_out_what_it_cannot_tile_and_says_so(slides: Path, tmp_path: Path) -> None:
    some = tmp_path / "slides"
    some.mkdir()
    for slide in slides.iterdir():
        (some / slide.name).symlink_to(slide)
    (some / "broken.svs").write_text("not found")
    write_svs(some / "unknown.svs", tissue_pixels(500, 500), mpp=None, magnification=20)
    write_svs(some / "coarse.svs", tissue_pixels(500, 500), mpp=2.0)
    out = tmp_path / "out"
    result = invoke("tile", some, "--output", out, "--workers", 2)
    assert result.exit_code == 3
    assert "3 slides were skipped" in result.output
    rows = {row["slide"]: row for row in map(json.loads, (out / "manifest.jsonl").open())}
    assert len(rows) == 5
    assert rows["broken"]["reason"] == "slide unreadable"
    assert rows["unknown"]["reason"] == "resolution unknown"
    assert "suggests about 0.5" in rows["unknown"]["detail"]
    assert "--mpp 2 or more" in rows["coarse"]["detail"]
    assert rows["TCGA.A"]["patches"] > 0
    for name in ("broken", "unknown", "coarse"):
        (some / f"{name}.svs").unlink()
    write_svs(some / "broken.svs", tissue_pixels(900, 900), mpp=0.5)
    (some / "unknown.svs").symlink_to(some / "broken.svs")
    (some / "coarse.svs").symlink_to(some / "broken.svs")
    again = invoke("tile", some, "--output", out, "--workers", 1, "--retry-skipped")
    assert again.exit_code == 0, again.output
    assert "Wrote 5 slides" in again.output


def test_tile_with_masks_and_styles(slides: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    ring = [[0, 0], [820, 0], [820, 820], [0, 820], [0, 0]]
    shape = {"type": "Polygon", "coordinates": [ring]}
    (masks / "TCGA.A.geojson").write_text(json.dumps(shape))
    Image.new("L", (130, 90), 255).save(masks / "TCGA.B.png")
    out = tmp_path / "out"
    options = ("--masks", masks, "--output", out, "--workers", 1, "--coords-style", "clam")
    result = invoke("tile", slides, *options, "--patch-px", 200, "--min-tissue", 1)
    assert result.exit_code == 0, result.output
    first = read_coordinates(out / "coords" / "TCGA.A.h5")
    assert sorted(map(tuple, first.coords.tolist())) == [(0, 0), (0, 400), (400, 0), (400, 400)]
    assert len(read_coordinates(out / "coords" / "TCGA.B.h5").coords) == 6 * 4
    (masks / "TCGA.B.png").unlink()
    result = invoke("tile", slides, "--masks", masks, "--output", tmp_path / "o2", "--workers", 1)
    assert result.exit_code == 3 and "Skipped 1: mask missing" in result.output
    result = invoke("tile", slides, "--masks", masks, "--whole-slide", "--output", tmp_path / "o3")
    assert result.exit_code == 2


def test_outlines_for_qupath_and_back(slides: Path, tmp_path: Path) -> None:
    """Tissue written as GeoJSON and given as --masks yields the same patches."""
    out, again = tmp_path / "out", tmp_path / "again"
    options = ("--patch-px", 100, "--workers", 1, "--quiet")
    result = invoke("tile", slides, "--output", out, "--geojson", *options)
    assert result.exit_code == 0, result.output
    for name in ("TCGA.A", "TCGA.B"):
        tissue = read_valid(out / "tissue_geojson" / f"{name}.geojson")
        assert {f["properties"]["classification"]["name"] for f in tissue} == {"Tissue"}
        coords = read_coordinates(out / "coords" / f"{name}.h5").coords
        patches = read_valid(out / "patch_geojson" / f"{name}.geojson")
        assert [f["geometry"]["coordinates"][0][0] for f in patches] == coords.tolist()
        assert all(f["properties"]["measurements"]["tissue"] >= 0.5 for f in patches)
    masks = out / "tissue_geojson"
    result = invoke("tile", slides, "--output", again, "--masks", masks, *options)
    assert result.exit_code == 0, result.output
    for name in ("TCGA.A", "TCGA.B"):
        first, second = (
            set(map(tuple, read_coordinates(folder / "coords" / f"{name}.h5").coords.tolist()))
            for folder in (out, again)
        )
        assert len(first & second) > 0.95 * len(first | second)


def test_slides_of_a_table(slides: Path, tmp_path: Path) -> None:
    """Each row has its own resolution and mask; a missing file costs only its row."""
    ring = [[0, 0], [820, 0], [820, 820], [0, 820], [0, 0]]
    (tmp_path / "m.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    (tmp_path / "slides.csv").write_text(
        "sample_id,image_path,mask_path,spacing_at_level_0,label\n"
        f"first,{slides / 'TCGA.A.svs'},m.geojson,0.5,tumour\n"
        f"second,{slides / 'TCGA.B.svs'},,,normal\n"
        "third,absent.svs,,,normal\n"
        f"fourth,{slides / 'TCGA.B.svs'},none.png,,normal\n"
    )
    tiles, patches = tmp_path / "tiles", tmp_path / "patches"
    options = ("--workers", 1, "--quiet")
    result = invoke("tile", tmp_path / "slides.csv", "--output", tiles, "--patch-px", 200,
                    *options)  # fmt: skip
    assert result.exit_code == 3, result.output
    rows = {row["slide"]: row for row in map(json.loads, (tiles / "manifest.jsonl").open())}
    assert rows["first"]["mpp_level0"] == 0.5 and rows["first"]["patches"] == 16
    assert rows["second"]["mpp_level0"] == 0.5 and rows["second"]["patches"] > 0
    assert rows["third"]["reason"] == "slide unreadable" and "absent.svs" in rows["third"]["detail"]
    assert rows["fourth"]["reason"] == "mask missing"
    result = invoke("extract", tiles / "coords", "--slides", tmp_path / "slides.csv", "--output",
                    patches, *options)  # fmt: skip
    assert result.exit_code == 0, result.output
    found = [json.loads(line) for line in (patches / "manifest.jsonl").open()]
    assert {row["wsi_id"] for row in found} == {"first", "second"}
    assert {row["mpp"] for row in found} == {0.5}


def test_patches_in_level0_pixels(slides: Path, tmp_path: Path) -> None:
    options = ("--level0", "--patch-px", 300, "--overlap-px", 100, "--whole-slide", "--workers", 1)
    result = invoke("tile", slides, "--output", tmp_path / "o", *options)
    assert result.exit_code == 0, result.output
    for name, mpp in (("TCGA.A", 0.25), ("TCGA.B", 0.5)):
        found = read_coordinates(tmp_path / "o" / "coords" / f"{name}.h5")
        assert (found.size_level0, found.patch_px, found.mpp) == (300, 300, mpp)
        assert set(np.diff(np.unique(found.coords[:, 0]))) == {200}


def test_one_slide_and_no_slides(slides: Path, tmp_path: Path) -> None:
    one = invoke("tile", slides / "TCGA.B.svs", "--output", tmp_path / "o", "--slide-mpp", 0.4,
                 "--whole-slide", "--workers", 1)  # fmt: skip
    assert one.exit_code == 0, one.output
    assert read_coordinates(tmp_path / "o" / "coords" / "TCGA.B.h5").size_level0 == 320
    (tmp_path / "empty").mkdir()
    for folder, message in (
        ("empty", "no slide in this folder"),
        ("absent", "no such file or"),
    ):
        result = invoke("tile", tmp_path / folder, "--output", tmp_path / f"o_{folder}")
        assert result.exit_code == 1 and message in result.output
        assert not (tmp_path / f"o_{folder}").exists()


def test_extract_pathgen(slides: Path, tmp_path: Path) -> None:
    annotations = write_annotations(
        tmp_path / "a.json",
        [
            ("TCGA.A", ["100", "200"], "first\r\nsecond 🔬"),
            ("TCGA.B", [5, 6], "b"),
            ("../../escape", ["1", "2"], "c"),
            ("/etc/passwd", ["1", "2"], "d"),
            ("TCGA.A", ["ten", "2"], "e"),
            ("TCGA.A", ["100", "200"], "again"),
            ("TCGA.A", ["100000", "200"], "far"),
            ("TCGA.C", ["1", "2"], "no slide"),
        ],
    )
    out = tmp_path / "deep" / "out"
    arguments = ("extract", annotations, "--slides", slides, "--output", out, "--workers", 1)
    result = invoke(*arguments, "--quiet")
    assert result.exit_code == 3
    assert "Wrote 2 patches" in result.output and "6 patches were skipped" in result.output
    for count, reason in ((2, "bad id"), (1, "bad position"), (1, "duplicate"),
                          (1, "outside the slide"), (1, "slide missing")):  # fmt: skip
        assert f"Skipped {count}: {reason}" in result.output
    patch = np.asarray(Image.open(out / "TCGA.A_100_200.png"))
    assert patch.shape == (672, 672, 3)
    assert (out / "TCGA.A_100_200.txt").read_bytes().decode() == "first\r\nsecond 🔬"
    top = {path.name for path in tmp_path.rglob("*") if ".job" not in path.parts}
    assert (
        top
        == {
            *("a.json", "deep", "out", ".job", "manifest.jsonl", "skipped.jsonl", "report.json"),
            *("pairs.jsonl", "TCGA.A_100_200.png", "TCGA.A_100_200.txt"),
            *("TCGA.B_5_6.png", "TCGA.B_5_6.txt"),
        }
        - {".job"}
        | {".job"} & top
    )
    assert invoke(*arguments, "--patch-px", 100).exit_code == 1  # other settings, same folder


def test_extract_refuses_what_makes_no_sense(slides: Path, tmp_path: Path) -> None:
    annotations = write_annotations(tmp_path / "a.json", [("TCGA.A", [1, 2], "x")])
    good = ("extract", annotations, "--slides", slides, "--output", tmp_path / "o")
    for arguments, code, message in (
        ((*good, "--quality", 80), 1, "PNG is lossless"),
        ((*good, "--address", "auto"), 1, "--engine ray"),
        (("extract", tmp_path / "no.json", *good[2:]), 1, "no such file"),
        (
            ("extract", annotations, "--slides", tmp_path / "no", *good[4:]),
            1,
            "no such file or",
        ),
        (("extract", slides, *good[2:], "--patch-px", 5), 2, "--patch-px"),
        (("extract", slides, *good[2:]), 1, ".h5"),
    ):
        result = invoke(*arguments)
        assert (result.exit_code, message in result.output) == (code, True), result.output


def test_gdc_manifest(slides: Path, tmp_path: Path) -> None:
    annotations = write_annotations(
        tmp_path / "a.json", [("TCGA.A", [1, 2], "x"), ("TCGA.C", [1, 2], "x")]
    )
    listing = tmp_path / "listing.txt"
    listing.write_text("id\tfilename\tmd5\tsize\tstate\nu\tTCGA.A.svs\tm\t1\treleased\n")
    result = invoke("gdc-manifest", annotations, tmp_path / "m.txt", "--listing", listing)
    assert result.exit_code == 3
    assert "1 of 2 slides" in result.output and "not found: TCGA.C" in result.output
    assert len((tmp_path / "m.txt").read_text().splitlines()) == 2
    assert invoke("gdc-manifest", annotations, tmp_path / "m.txt").exit_code == 2
    annotations = write_annotations(
        tmp_path / "a.json", [("TCGA.A", [1, 2], "x"), ("../TCGA.C", [1, 2], "x"), ("b", [1], "x")]
    )
    result = invoke("gdc-manifest", annotations, tmp_path / "m.txt", "--listing", listing)
    assert result.exit_code == 3
    assert "1 of 1 slides" in result.output
    assert f"Skipped 1 row of {annotations}: bad position" in result.output


@pytest.mark.slow
def test_the_published_rows_stream_through(tmp_path: Path) -> None:
    annotations = real_file("pathgen/PathGen-1.6M_sample.json")
    rows = json.loads(annotations.read_bytes())
    slides = tmp_path / "slides"
    made = write_svs(slides / "made_up.svs", tissue_pixels(1500, 1200))
    names = sorted({row["wsi_id"] for row in rows})
    for name in names[:-1]:
        (slides / f"{name}.svs").symlink_to(made)
    out = tmp_path / "out"
    arguments = ("extract", annotations, "--slides", slides, "--output", out, "--workers", 2)
    result = invoke(*arguments, "--layout", "shards", "--format", "jpg", "--quiet")
    assert result.exit_code == 3
    inside = sum(
        row["wsi_id"] != names[-1]
        and int(row["position"][0]) < 1500
        and int(row["position"][1]) < 1200
        for row in rows
    )
    report = json.loads((out / "report.json").read_bytes())
    missing = sum(row["wsi_id"] == names[-1] for row in rows)
    assert report["written"] == inside
    assert report["reasons"] == {
        "outside the slide": 5000 - inside - missing, "slide missing": missing
    }  # fmt: skip
    manifest = [json.loads(line) for line in (out / "manifest.jsonl").open()]
    numbers = [number for row in manifest for number in row.get("rows", [row.get("row")])]
    assert sorted(numbers) == list(range(1, 5001))


def test_a_setting_without_which_everything_is_skipped_is_given_in_the_next_run(
    tmp_path: Path,
) -> None:
    Image.fromarray(tissue_pixels(600, 600)).save(tmp_path / "s.png")
    arguments = ("tile", tmp_path / "s.png", "--output", tmp_path / "out", "--workers", 1)
    result = invoke(*arguments)
    assert result.exit_code == 3 and "1 slide was skipped" in result.output
    assert "for instance s.png: the file does not say" in result.output
    assert "--slide-mpp" in result.output
    result = invoke(*arguments, "--slide-mpp", 0.5)
    assert result.exit_code == 0 and "Wrote 1 slide to" in result.output, result.output
    assert (tmp_path / "out/skipped.jsonl").read_text() == ""
    result = invoke(*arguments, "--slide-mpp", 0.25)
    assert result.exit_code == 1 and "begun with other settings" in result.output
    result = invoke(*arguments, "--slide-mpp", 0.5, "--mpp", 1.0)
    assert "begun with other settings (spec.mpp: 0.5 then, 1.0 now)" in result.output
    # Two ways to miss the folder of the coordinates:
    cut = ("--slides", tmp_path, "--output", tmp_path / "patches")
    result = invoke("extract", tmp_path / "out", *cut)
    assert result.exit_code == 1 and f"did you mean {tmp_path}/out/coords?" in result.output
    result = invoke("extract", tmp_path / "out/coords/s.h5", *cut)
    assert result.exit_code == 1 and f"name its folder, {tmp_path}/out/coords" in result.output
