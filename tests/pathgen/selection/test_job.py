"""From slides and coordinates to selected patches, with tiny encoders."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from pathcore import files
from pathcore.device_claims import Placement
from pathcore.encoders import create_encoder
from pathcore.encoders.origin import TileOrigin
from pathcore.files import folder_lock
from pathgen.selection import job as select_job
from pathgen.selection.features import slide_features
from pathgen.selection.job import SelectionSettings, select_patches
from tests.killing import visible_digests
from tests.pathgen.conftest import read_rows
from tests.pathgen.describer_server import DescriberServer
from tests.pathgen.tiny_encoders import save_hugging_face, save_open_clip
from tests.wsi.qupath import read_valid
from tests.wsi.slides import tissue_pixels, write_svs
from wsi.reader import Slide
from wsi.store import (
    read_attributes,
    read_coordinates,
    read_feature_attributes,
    read_features,
    write_coordinates,
)
from wsi.tiling import PatchSpec, tile
from xtuner_add import cli

PATCH_PX = 64
SETTINGS = SelectionSettings(quota=6, max_similarity=1, pictures=False)
FEW = ("--quota", 3, "--similarity", 1, "--no-pictures")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides with coordinates, an open_clip folder."""
    root = tmp_path_factory.mktemp("selection")
    (root / "coords").mkdir()
    for number, name in enumerate(("a", "b")):
        pixels = tissue_pixels(768, 512, seed=number)
        path = write_svs(root / "slides" / f"{name}.svs", pixels)
        with Slide(path) as slide:
            spec = PatchSpec(PATCH_PX, 0.5)
            write_coordinates(root / "coords" / f"{name}.h5", slide, tile(slide, spec))
    save_open_clip(root / "encoder")
    return root


@pytest.fixture(scope="module")
def spec(folder: Path) -> str:
    return f"open_clip:local-dir:{folder / 'encoder'}"


def run(folder: Path, spec: str, out: Path, *options: object) -> Result:
    arguments = [
        "select-patches", folder / "coords", "--slides", folder / "slides", "--output", out,
        "--encoder", spec, "--device", "cpu", "--quiet", *options,
    ]  # fmt: skip
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


def test_encoders_of_both_libraries(folder: Path, spec: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(3)]
    for name in (spec, save_hugging_face(tmp_path / "hf")):
        encoder = create_encoder(name, device="cpu")
        pictures = encoder.encode_images(images)
        words = encoder.encode_texts(["dense stroma", "fat", "a very long text " * 60])
        assert pictures.shape == words.shape == (3, 16)
        np.testing.assert_allclose(np.linalg.norm(pictures, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(words, axis=1), 1, rtol=1e-5)
        np.testing.assert_allclose(encoder.encode_images(images[1:2]), pictures[1:2], atol=1e-5)
        assert abs(pictures[0] - pictures[1]).max() > 1e-4
        assert abs(words[0] - words[1]).max() > 1e-4
    other = create_encoder(save_open_clip(tmp_path / "encoder", seed=1), device="cpu")
    assert other.folder_name != create_encoder(spec, device="cpu").folder_name, (
        "the weights are part of the name"
    )


def test_features_are_computed_once(
    folder: Path, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = create_encoder(spec, device="cpu")
    coords = folder / "coords" / "a.h5"
    slide = shutil.copy(folder / "slides" / "a.svs", tmp_path / "a.svs")
    first = slide_features(slide, coords, encoder, tmp_path, batch_size=5)
    assert first.features.shape == (len(read_coordinates(coords).coords), 16)
    assert not first.reused
    written = read_feature_attributes(tmp_path / encoder.folder_name / "a.h5")
    assert TileOrigin.read(written).digest == encoder.digest
    with monkeypatch.context() as patch:
        patch.setattr("wsi.features.Slide", lambda path: pytest.fail("opened again"))
        second = slide_features(slide, coords, encoder, tmp_path, batch_size=5)
    assert second.reused
    np.testing.assert_array_equal(second.features, first.features)
    with Slide(folder / "slides" / "a.svs") as opened:
        half = tile(opened, PatchSpec(PATCH_PX // 2, 0.5))
        write_coordinates(tmp_path / "a.h5", opened, half)
    third = slide_features(folder / "slides" / "a.svs", tmp_path / "a.h5", encoder, tmp_path)
    assert not third.reused, "other coordinates"
    shutil.copy(folder / "slides" / "b.svs", tmp_path / "a.svs")
    fourth = slide_features(slide, coords, encoder, tmp_path)
    assert not fourth.reused, "another slide under the same name"


def test_the_command(folder: Path, spec: str, tmp_path: Path) -> None:
    reports = tmp_path / "reports.jsonl"
    reports.write_text(json.dumps({"wsi_id": "a", "report": "Invasive carcinoma of the breast."}))
    options = ("--quota", 8, "--cancer-type", "BRCA", "--reports", reports, "--similarity", 1)
    result = run(folder, spec, tmp_path / "out", *options, "--geojson")
    assert result.exit_code == 0, result.output
    rows = read_rows(tmp_path / "out" / "selection.jsonl")
    assert [row["wsi_id"] for row in rows] == ["a"] * 8 + ["b"] * 8
    sources = [row["chosen_for"] for row in rows]
    assert sources[:8] == ["prompt"] * 2 + ["report"] * 2 + ["cluster"] * 4
    assert sources[8:] == ["prompt"] * 2 + ["cluster"] * 6, "no report: its share goes on"
    assert rows[0]["label"] and rows[0]["text"]
    squares = read_valid(tmp_path / "out" / "geojson" / "a.geojson")
    for row, square in zip(rows[:8], squares, strict=True):
        found = square["properties"]
        assert found["classification"]["name"] == row["chosen_for"]
        assert found["measurements"]["cluster"] == row["cluster"]
        assert square["geometry"]["coordinates"][0][0] == [int(p) for p in row["position"]]
    assert rows[2]["text"] == "Invasive carcinoma of the breast."
    chosen = read_coordinates(tmp_path / "out" / "coords" / "a.h5")
    assert chosen.size_level0 == read_coordinates(folder / "coords" / "a.h5").size_level0
    assert {tuple(map(str, xy)) for xy in chosen.coords.tolist()} == {
        tuple(row["position"]) for row in rows[:8]
    }
    features, _ = read_features(tmp_path / "out" / "coords" / "a.h5")
    assert features.shape == (8, 16)
    source = read_attributes(folder / "coords" / "a.h5")
    assert read_attributes(tmp_path / "out" / "coords" / "a.h5").keys() == source.keys()
    picture = Image.open(tmp_path / "out" / "pictures" / "a.jpg")
    assert picture.width > 2 * 700 and picture.height > 500
    first = (tmp_path / "out" / "selection.jsonl").read_bytes()
    result = run(folder, spec, tmp_path / "out", *options)
    assert "of which 2: features were cached" in result.output, "other files, other settings"
    assert (tmp_path / "out" / "selection.jsonl").read_bytes() == first


def test_chosen_patches_are_extracted_and_described(
    folder: Path, spec: str, tmp_path: Path, server: DescriberServer
) -> None:
    chosen, patches = tmp_path / "chosen", tmp_path / "patches"
    assert run(folder, spec, chosen, "--quota", 3, "--similarity", 1).exit_code == 0
    steps = [
        ["extract", chosen / "coords", "--slides", folder / "slides", "--output", patches,
         "--workers", 1, "--quiet"],
        ["describe", chosen / "selection.jsonl", tmp_path / "pairs.jsonl", "--image-folder",
         patches,
         "--endpoint", server.url, "--model", "m"],
    ]  # fmt: skip
    for arguments in steps:
        result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
    pairs = read_rows(tmp_path / "pairs.jsonl")
    assert len(pairs) == 6
    for pair in pairs:
        assert (patches / pair["image"]).is_file()
        assert pair["caption"].startswith("Sheets of atypical")


def test_slides_that_cannot_be_used_are_named(folder: Path, spec: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder / "coords", broken / "coords")
    (broken / "slides").mkdir()
    shutil.copy(folder / "slides" / "a.svs", broken / "slides" / "a.svs")
    shutil.copy(broken / "coords" / "a.h5", broken / "coords" / "gone.h5")
    (broken / "coords" / "text.h5").write_text("no HDF5")
    (broken / "slides" / "b.svs").write_bytes((folder / "slides" / "b.svs").read_bytes()[:3000])
    (broken / "slides" / "text.svs").write_text("no slide")
    write_svs(broken / "slides" / "other.svs", tissue_pixels(1536, 1024))
    shutil.copy(broken / "coords" / "a.h5", broken / "coords" / "other.h5")
    with h5py.File(broken / "coords" / "outside.h5", "w") as file:  # as CLAM, without a size
        file["coords"] = np.array([[0, 0], [4000, 0]])
        file["coords"].attrs.update({"patch_size": 64, "patch_level": 0})
    shutil.copy(folder / "slides" / "a.svs", broken / "slides" / "outside.svs")
    result = run(broken, spec, tmp_path / "out", "--quota", 4, "--no-pictures")
    assert result.exit_code == 3, result.output
    left = {
        row["wsi_id"]: row["reason"]
        for row in read_rows(tmp_path / "out" / "selection.skipped.jsonl")
    }
    assert set(left) == {"b", "gone", "text", "other", "outside"}
    assert "of a slide of 768 x 512 px" in left["other"]
    assert "1 of 2 patches lie outside the slide" in left["outside"]
    assert "no slide of this name" in left["gone"]
    assert {row["wsi_id"] for row in read_rows(tmp_path / "out" / "selection.jsonl")} == {"a"}
    assert not (tmp_path / "out" / "pictures").exists()


def test_wrong_usage(folder: Path, spec: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for wrong, words in {
        "song:x": "open_clip:ARCH@WEIGHTS",
        "open_clip:ViT-B-32": "name a tag or a file",
        "open_clip:No-Such@x": "no architecture No-Such",
        "open_clip:ViT-B-32@absent.pt": "neither a file nor one of",
        "open_clip:local-dir:/absent": "no open_clip_config.json in this folder",
        "hf:/absent": "no such folder",
    }.items():
        result = run(folder, wrong, out)
        assert result.exit_code == 1, wrong
        assert words in result.output
    assert "cancer type 'X'" in run(folder, spec, out, "--cancer-type", "X").output
    (tmp_path / "types.json").write_text('{"a": 3}')
    result = run(folder, spec, out, "--cancer-types", tmp_path / "types.json")
    assert "expected text" in result.output
    (tmp_path / "reports.jsonl").write_text('{"wsi_id": "a.svs", "report": "x"}\n')
    result = run(folder, spec, out, "--reports", tmp_path / "reports.jsonl")
    assert result.exit_code == 1
    assert "reports: none of 1 entries, such as 'a.svs', is for a slide" in result.output
    assert "such as 'a'; name slides like" in result.output


def test_entries_of_other_slides_are_counted(folder: Path, spec: str, tmp_path: Path) -> None:
    (tmp_path / "reports.json").write_text('{"a": "Necrosis.", "x": "Mitosis.", "y": "Fat."}')
    (tmp_path / "types.json").write_text('{"b": "BRCA", "z": "BRCA"}')
    result = run(
        folder, spec, tmp_path / "out", *FEW,
        "--reports", tmp_path / "reports.json", "--cancer-types", tmp_path / "types.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "Passed over 2: report of a slide without coordinates (see" in result.output
    assert "Passed over 1: cancer type of a slide without coordinates" in result.output
    rows = read_rows(tmp_path / "out" / "passed_over.jsonl")
    assert [row["slide"] for row in rows] == ["z", "x", "y"]


def select_by_name(folder: Path, spec: str, out: Path, **options: Any) -> Any:
    paths = folder / "coords", folder / "slides", out
    placement = Placement("cpu")
    return select_patches(*paths, spec, SETTINGS, placement=placement, progress=False, **options)


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    """A copy of the slides and coordinates that a test may damage."""
    for name in ("coords", "slides"):
        shutil.copytree(folder / name, tmp_path / "own" / name)
    return tmp_path / "own"


@pytest.mark.multiproc
def test_processes_change_nothing(folder: Path, spec: str, tmp_path: Path) -> None:
    assert run(folder, spec, tmp_path / "one", "--quota", 6, "--geojson").exit_code == 0
    options = ("--quota", 6, "--geojson", "--workers", 2, "--read-workers", 1)
    result = run(folder, spec, tmp_path / "two", *options)
    assert result.exit_code == 0, result.output
    one = visible_digests(tmp_path / "one")
    assert one == visible_digests(tmp_path / "two")
    assert {name.partition("/")[0] for name in one} == {
        *("features", "coords", "pictures", "geojson", "selection.jsonl"),
        *("selection.skipped.jsonl", "manifest.jsonl", "skipped.jsonl", "report.json"),
    }


def test_an_open_encoder_selects_in_this_process(folder: Path, spec: str, tmp_path: Path) -> None:
    encoder = create_encoder(spec, device="cpu")
    paths = folder / "coords", folder / "slides", tmp_path / "open"
    report = select_patches(*paths, encoder, SETTINGS, progress=False)
    assert (report.written, report.num_patches, report.exit_code) == (2, 12, 0)
    assert select_by_name(folder, spec, tmp_path / "named") == report
    assert visible_digests(tmp_path / "open") == visible_digests(tmp_path / "named")
    for pool in ({"workers": 2}, {"engine": "ray"}, {"placement": Placement("cpu")}):
        with pytest.raises(ValueError, match="is open already"):
            select_patches(*paths, encoder, SETTINGS, **pool)


def modified(out: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(out.glob(pattern))}


def test_a_finished_folder_is_left_as_it_is(folder: Path, spec: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = select_by_name(folder, spec, out)
    written, rows = modified(out, "*/*.h5"), (out / "selection.jsonl").read_bytes()
    assert select_by_name(folder, spec, out) == first
    assert modified(out, "*/*.h5") == written
    assert (out / "selection.jsonl").read_bytes() == rows


def test_settings_of_the_selection_may_change(own_folder: Path, spec: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(own_folder, spec, out, *FEW).exit_code == 0
    features, chosen = modified(out, "features/*/*.h5"), modified(out, "coords/*.h5")
    reports = tmp_path / "reports.json"
    reports.write_text(json.dumps({"b": "Invasive carcinoma of the breast."}))
    options = (*FEW, "--reports", reports)
    result = run(own_folder, spec, out, *options)
    assert "of which 1: features were cached" in result.output, "only b has a report"
    assert modified(out, "features/*/*.h5") == features
    again = modified(out, "coords/*.h5")
    assert again["a.h5"] == chosen["a.h5"] and again["b.h5"] != chosen["b.h5"]
    rows = read_rows(out / "selection.jsonl")
    assert [(row["wsi_id"], "report" in row) for row in rows] == [("a", False)] * 3 + [
        ("b", True)
    ] * 3
    (own_folder / "coords" / "a.h5").unlink()
    assert run(own_folder, spec, out, *options).exit_code == 0
    assert {row["wsi_id"] for row in read_rows(out / "selection.jsonl")} == {"b"}
    assert [path.name for path in (out / "coords").iterdir()] == ["b.h5"]


def test_a_folder_belongs_to_one_encoder_and_one_run(
    folder: Path, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert run(folder, spec, out, *FEW).exit_code == 0
    before = visible_digests(out)
    other = save_open_clip(tmp_path / "encoder", seed=1)
    for options, name in ((("--batch-size", 7), "batch_size"), (("--encoder", other), "digest")):
        result = run(folder, spec, out, *FEW, *options)
        assert result.exit_code == 1 and "was begun with other settings" in result.output
        assert name in result.output
    monkeypatch.setattr(files, "_LOCK_PATIENCE_S", 0.0)
    with folder_lock(out / ".job" / "lock"):
        result = run(folder, spec, out, "--quota", 4, "--no-pictures")
    assert result.exit_code == 1 and "another process is working on this folder" in result.output
    assert visible_digests(out) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").touch()
    assert run(folder, spec, tmp_path / "foreign").exit_code == 1


def test_features_of_version_0_1_0_are_kept(folder: Path, spec: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = select_by_name(folder, spec, out)
    shutil.rmtree(out / ".job")  # that version had none
    features, rows = modified(out, "features/*/*.h5"), (out / "selection.jsonl").read_bytes()
    report = select_by_name(folder, spec, out)
    assert (report.notes, report.num_patches) == ({"features were cached": 2}, first.num_patches)
    assert modified(out, "features/*/*.h5") == features
    assert (out / "selection.jsonl").read_bytes() == rows


def test_skipped_slides_are_retried_on_request(own_folder: Path, spec: str, tmp_path: Path) -> None:
    out, slide = tmp_path / "out", own_folder / "slides" / "b.svs"
    whole = slide.read_bytes()
    slide.write_bytes(whole[:3000])
    result = run(own_folder, spec, out, *FEW)
    assert result.exit_code == 3 and "--retry-skipped" in result.output
    slide.write_bytes(whole)
    assert run(own_folder, spec, out, *FEW).exit_code == 3
    assert {row["wsi_id"] for row in read_rows(out / "selection.jsonl")} == {"a"}
    first = modified(out, "coords/a.h5")
    result = run(own_folder, spec, out, *FEW, "--retry-skipped")
    assert result.exit_code == 0, result.output
    assert {row["wsi_id"] for row in read_rows(out / "selection.jsonl")} == {"a", "b"}
    assert read_rows(out / "selection.skipped.jsonl") == []
    assert modified(out, "coords/a.h5") == first


def test_a_slide_that_was_replaced_is_selected_from_again(
    own_folder: Path, spec: str, tmp_path: Path
) -> None:
    out, slide = tmp_path / "out", own_folder / "slides" / "b.svs"
    assert run(own_folder, spec, out, *FEW).exit_code == 0
    first, features = modified(out, "coords/*.h5"), modified(out, "features/*/*.h5")
    write_svs(slide, tissue_pixels(768, 512, seed=7))  # another section
    assert run(own_folder, spec, out, *FEW).exit_code == 0
    again = modified(out, "coords/*.h5")
    assert again["a.h5"] == first["a.h5"] and again["b.h5"] != first["b.h5"]
    assert modified(out, "features/*/*.h5")["b.h5"] != features["b.h5"]
    slide.unlink()  # what was made of a slide that is gone stays
    assert run(own_folder, spec, out, *FEW).exit_code == 0
    assert modified(out, "coords/*.h5") == again


def test_a_slide_of_a_table_that_is_gone_is_skipped(
    folder: Path, spec: str, tmp_path: Path
) -> None:
    table = tmp_path / "slides.csv"
    table.write_text(f"path\n{folder / 'slides' / 'a.svs'}\n{tmp_path / 'b.svs'}\n")
    paths = folder / "coords", table, tmp_path / "out"
    report = select_patches(*paths, spec, SETTINGS, placement=Placement("cpu"), progress=False)
    assert (report.written, report.skipped) == (1, 1)
    (row,) = read_rows(tmp_path / "out" / "selection.skipped.jsonl")
    assert row == {"wsi_id": "b", "reason": f"{tmp_path / 'b.svs'}: no such file"}


@pytest.mark.multiproc
def test_a_killed_worker_costs_its_slide(
    folder: Path, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = select_job.slide_features

    def deadly(slide: Path, *arguments: Any, **options: Any) -> Any:
        if slide.stem == "a":
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
        return whole(slide, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(select_job, "slide_features", deadly)
        report = select_by_name(folder, spec, tmp_path / "out")
    assert (report.written, report.reasons, report.exit_code) == (1, {"worker died": 1}, 3)
    (row,) = read_rows(tmp_path / "out" / "selection.skipped.jsonl")
    assert row["wsi_id"] == "a" and "killed by SIGKILL" in row["reason"]
    assert select_by_name(folder, spec, tmp_path / "out", retry_skipped=True).written == 2


def kill_when(work: Callable[[], object], due: Callable[[], bool]) -> None:
    """Runs a job in a child and kills the child as soon as `due`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    while not due():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended before it was killed"
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.multiproc
def test_a_killed_run_continues(folder: Path, spec: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    records = out / ".job" / "records"
    kill_when(lambda: select_by_name(folder, spec, out), lambda: any(records.glob("a-*.jsonl")))
    assert not (out / "selection.jsonl").exists()
    first = modified(out, "coords/a.h5")
    assert select_by_name(folder, spec, out).written == 2
    assert modified(out, "coords/a.h5") == first
    select_by_name(folder, spec, tmp_path / "whole")
    rows = [(path / "selection.jsonl").read_bytes() for path in (out, tmp_path / "whole")]
    assert rows[0] == rows[1]


def test_settings_are_checked_before_a_slide_is_opened(
    folder: Path, spec: str, tmp_path: Path
) -> None:
    for options, code, words in (
        (("--quota", 0), 1, "quota of at least 1"),
        (("--clusters", "many"), 1, "clusters 'many'"),
        (("--fractions", "prompt=-1"), 1, "expected weights for"),
        (("--batch-size", 0), 2, "'--batch-size': 0 is not in the range"),
        (("--address", "auto"), 1, "only Ray takes one"),
    ):
        result = run(folder, spec, tmp_path / "out", *options)
        assert result.exit_code == code and words in result.output, result.output
    shutil.copytree(folder / "coords", tmp_path / "coords")
    shutil.copy(tmp_path / "coords" / "a.h5", tmp_path / "coords" / "a_patches.h5")
    with pytest.raises(ValueError, match=r"both a\.h5 and a_patches\.h5 are of slide a"):
        select_patches(tmp_path / "coords", folder / "slides", tmp_path / "out", spec)
