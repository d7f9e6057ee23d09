from __future__ import annotations

import csv
import io
import json
import pickle
import zipfile
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gigapath.finetune.probe import LinearProbe, ProbeRun, ProbeSettings, probe_tiles, standardised
from gigapath.published import embedding_zip
from gigapath.published.embedding_zip import EmbeddingData, EmbeddingSplit, read_embeddings

GOLDEN = Path(__file__).parents[2] / "golden/gigapath/linear_probe"
RECORDS = json.loads((GOLDEN / "linear_probe.json").read_text())
TENSORS = load_file(GOLDEN / "linear_probe.safetensors")
SETTINGS = {
    "pcam_like": {},
    "adam_z": {"optim": "adam", "lr": 0.003, "z_score": True, "weight_decay": 0.0},
    "momentum_last": {
        "lr": 0.05, "momentum": 0.9, "min_lr": 0.001, "model_select": "last", "weight_decay": 0.0,
    },
}  # fmt: skip
SMALL = ProbeSettings(batch_size=16, train_iters=40, eval_interval=10, num_resamples=20)


def golden_data(z_score: bool) -> EmbeddingData:
    splits = {}
    for name in ("train", "val", "test"):
        x, y = TENSORS[f"{name}.x"], TENSORS[f"{name}.y"].numpy()
        splits[name] = EmbeddingSplit(tuple(map(str, range(len(y)))), x, y)
    data = EmbeddingData(("0", "1"), splits, (), 0)
    return standardised(data) if z_score else data


@pytest.mark.parametrize("name", SETTINGS)
def test_published_protocol_step_by_step(name: str, tmp_path: Path) -> None:
    settings = ProbeSettings(
        protocol="published", batch_size=32, train_iters=60, eval_interval=20, num_resamples=0,
        **SETTINGS[name],
    )  # fmt: skip
    record = RECORDS[name]
    drawn = TENSORS[f"{name}.sampled_index"]
    run = ProbeRun(golden_data(settings.z_score), settings, tmp_path, device="cpu",
                   order=lambda number: drawn)  # fmt: skip
    with torch.no_grad():
        run.model.fc.weight.copy_(TENSORS[f"{name}.w0"])
        run.model.fc.bias.copy_(TENSORS[f"{name}.b0"])
    losses = run.train()
    np.testing.assert_allclose(losses, record["train_loss_each_iter"], rtol=1e-5)
    assert [row["lr"] for row in run.history] == pytest.approx(
        record["lr_after_iter_10_20_etc"][1::2], abs=1e-12
    )
    for kind in ("last", "best"):
        weights = load_file(tmp_path / f"{kind}.safetensors")
        torch.testing.assert_close(weights["fc.weight"], TENSORS[f"{name}.w_{kind}"])
        torch.testing.assert_close(weights["fc.bias"], TENSORS[f"{name}.b_{kind}"])
    for row, expected in zip(run.history, record["evals"], strict=False):
        assert [row["accuracy"], row["weighted_f1"]] == pytest.approx(expected[:2])
    found = run.test("binary")["test"]
    assert list(found["published"].values()) == pytest.approx(record["evals"][-1])
    if name == "pcam_like":  # the same weights, scored from probabilities as they should be
        assert found["auroc"]["value"] == pytest.approx(0.834, abs=5e-4)
        assert found["published"]["auroc_macro"] == pytest.approx(0.751, abs=5e-4)


def test_batches_of_the_two_protocols(tmp_path: Path) -> None:
    data = golden_data(False)

    def passes(protocol: str) -> list[list[int]]:
        settings = ProbeSettings(protocol=protocol, batch_size=32)
        run = ProbeRun(data, settings, tmp_path, device="cpu")
        rows = [run.batch(step).tolist() for step in range(20)]
        assert [len(batch) for batch in rows[:10]] == [32] * 9 + [12]
        return [list(chain(*rows[:10])), list(chain(*rows[10:]))]

    first, second = passes("corrected")
    assert sorted(first) == sorted(second) == list(range(300)) and first != second
    first, second = passes("published")
    assert first == second and len(set(first)) < 300


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def write_cohort(folder: Path, count: int = 120, classes: int = 2, seed: int = 0) -> Path:
    """A zip in the published layout; the class is read off the first numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows = [("input", "label", "split")]
    with zipfile.ZipFile(folder / "embeddings.zip", "w") as archive:
        for number in range(count):
            split = ("train", "train", "train", "val", "test")[number % 5]
            label = number % classes
            vector = torch.randn(12, generator=generator)
            vector[label] += 4
            archive.writestr(f"pcam/{split}/tile_{number}.pt", saved(vector))
            rows.append((f"tile_{number}", str(label), split))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "embeddings.zip"


def test_learns_and_writes_everything(tmp_path: Path) -> None:
    path = write_cohort(tmp_path)
    results = probe_tiles(path, tmp_path / "labels.csv", tmp_path / "out", settings=SMALL,
                          methods=("linear_probe", "knn", "logistic"), progress=False)  # fmt: skip
    assert results["num_tiles"] == {"train": 72, "val": 24, "test": 24}
    assert results["setting"] == "binary" and results["num_skipped"] == 0
    for method, found in results["methods"].items():
        assert found["test"]["auroc"]["value"] > 0.95, method
        assert found["test"]["auroc"]["low"] <= found["test"]["auroc"]["high"]
    folder = tmp_path / "out/linear_probe"
    model = LinearProbe(12, 2)
    model.load_state_dict(load_file(folder / "best.safetensors"))
    rows = list(csv.DictReader((folder / "predictions_test.csv").open()))
    assert len(rows) == 24 and set(rows[0]) == {
        "id", "true", "predicted", "probability_0", "probability_1",
    }  # fmt: skip
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "| linear_probe | 24 |" in (tmp_path / "out/results.md").read_text()


def test_a_killed_run_gives_what_an_unbroken_one_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_cohort(tmp_path)
    table = tmp_path / "labels.csv"
    whole = probe_tiles(path, table, tmp_path / "whole", settings=SMALL, progress=False)
    real, calls = ProbeRun.batch, []

    def dies(self: ProbeRun, step: int) -> torch.Tensor:
        calls.append(step)
        if len(calls) == 26:
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(ProbeRun, "batch", dies)
    with pytest.raises(KeyboardInterrupt):
        probe_tiles(path, table, tmp_path / "broken", settings=SMALL, progress=False)
    broken = probe_tiles(path, table, tmp_path / "broken", settings=SMALL, progress=False)
    assert calls[26] == 20  # the last evaluation, not the start
    assert broken["methods"] == whole["methods"]
    files = [tmp_path / name / "linear_probe/last.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()
    other = ProbeSettings(train_iters=3, eval_interval=1)
    with pytest.raises(ValueError, match="other settings"):
        probe_tiles(path, table, tmp_path / "broken", settings=other, progress=False)
    (tmp_path / "other").mkdir()
    elsewhere = write_cohort(tmp_path / "other", seed=1)  # as if of another encoder
    with pytest.raises(ValueError, match="run with other features; name"):
        probe_tiles(elsewhere, table, tmp_path / "broken", settings=SMALL, progress=False)


@pytest.mark.parametrize("tile", ["tile_0,0,train", "tile_3,1,val", "tile_4,0,test"])
def test_other_labels_are_another_run(tile: str, tmp_path: Path) -> None:
    path, table = write_cohort(tmp_path), tmp_path / "labels.csv"
    probe_tiles(path, table, tmp_path / "out", settings=SMALL, progress=False)
    name, label, split = tile.split(",")
    lines = table.read_text().splitlines()
    assert tile in lines
    corrected = [f"{name},{1 - int(label)},{split}" if line == tile else line for line in lines]
    table.write_text("\n".join(corrected))
    with pytest.raises(ValueError, match="run with other labels; name a new output folder"):
        probe_tiles(path, table, tmp_path / "out", settings=SMALL, progress=False)


class Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("pwned"),))


def test_faults_are_recorded_and_the_rest_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(embedding_zip, "ENTRY_LIMIT_BYTES", 1 << 16)
    good = write_cohort(tmp_path)
    vector = torch.randn(12)
    bad = {
        "evil": pickle.dumps(Evil(), protocol=2),
        "evil_zip": saved(Evil()),
        "text": b"not a tensor",
        "empty": b"",
        "list": saved([1, 2]),
        "whole_numbers": saved(torch.arange(12)),
        "matrix": saved(torch.randn(3, 12)),
        "narrow": saved(torch.randn(11)),
        "nan": saved(vector * float("nan")),
        "infinite": saved(vector / 0),
        "large": saved(torch.zeros(1 << 15)),
        "damaged": saved(torch.randn(12)),
        "twice": saved(vector),
    }
    table = tmp_path / "labels.csv"
    with zipfile.ZipFile(good, "a") as archive, table.open("a", newline="") as file:
        writer = csv.writer(file)
        for name, content in bad.items():
            archive.writestr(f"pcam/train/{name}.pt", content)
            writer.writerow([name, "1", "train"])
        archive.writestr("copy/train/twice.pt", saved(vector))
        archive.writestr("../../outside.pt", saved(vector))  # a name only: nothing is unpacked
        archive.writestr("pcam/train/unnamed.pt", saved(vector))
        writer.writerows(
            [["absent", "1", "train"], ["tile_0", "0", "train"], ["unlabelled", "", "train"],
             ["tile_1", "1", "holdout"], ["by_pandas", "NaN", "train"]]
        )  # fmt: skip
    content = bytearray(good.read_bytes())
    start = content.index(bad["damaged"])
    content[start + 200] ^= 0xFF
    good.write_bytes(content)
    found = read_embeddings(good, table, progress=False)
    reasons = {row["id"]: row["reason"] for row in found.skipped}
    assert set(reasons) == {*bad, "absent", "tile_0", "unlabelled", "tile_1", "by_pandas"}
    assert not Path("pwned").exists() and not (tmp_path.parent / "outside.pt").exists()
    for name, words in {
        "evil": "UnpicklingError", "evil_zip": "UnpicklingError", "list": "found list",
        "matrix": "(3, 12)", "narrow": "11 values; expected 12", "nan": "NaN", "infinite": "NaN",
        "large": "at most", "damaged": "CRC", "twice": "2 embeddings", "absent": "no embedding",
        "tile_0": "named twice", "unlabelled": "no label", "tile_1": "holdout",
        "whole_numbers": "float tensor", "by_pandas": "no label",
    }.items():  # fmt: skip
        assert words in reasons[name], (name, reasons[name])
    assert found.num_without_row == 2
    assert {name: len(split.ids) for name, split in found.splits.items()} == {
        "train": 72, "val": 24, "test": 24,
    }  # fmt: skip
    results = probe_tiles(good, table, tmp_path / "out", settings=SMALL, progress=False)
    assert results["num_skipped"] == len(reasons)
    assert len((tmp_path / "out/skipped.jsonl").read_text().splitlines()) == len(reasons)


def test_embeddings_that_cannot_be_standardised_are_skipped(tmp_path: Path) -> None:
    good, table = write_cohort(tmp_path), tmp_path / "labels.csv"
    with zipfile.ZipFile(good, "a") as archive, table.open("a", newline="") as file:
        for split in ("train", "test"):
            archive.writestr(f"pcam/{split}/blank_{split}.pt", saved(torch.full((12,), 0.1)))
            csv.writer(file).writerow([f"blank_{split}", "0", split])
    settings = replace(SMALL, z_score=True)
    found = probe_tiles(good, table, tmp_path / "out", settings=settings, progress=False)
    assert found["num_tiles"] == {"train": 72, "val": 24, "test": 24} and found["num_skipped"] == 2
    rows = (tmp_path / "out/skipped.jsonl").read_text()
    assert "blank_train" in rows and "all values are equal" in rows


@pytest.mark.parametrize("method", ["linear_probe", "knn"])
def test_a_class_that_is_only_tested_is_refused(method: str, tmp_path: Path) -> None:
    good, table = write_cohort(tmp_path), tmp_path / "labels.csv"
    written = table.read_text()
    table.write_text(written.replace("tile_4,0,test", "tile_4,O,test"))
    with pytest.raises(ValueError, match="label 'O': 1 usable cases in split test, none in train"):
        probe_tiles(good, table, tmp_path / "out", methods=(method,), progress=False)
    table.write_text(written.replace("tile_0,0,train", "tile_0,O,train"))
    found = probe_tiles(
        good, table, tmp_path / "out", settings=SMALL, methods=(method,), progress=False
    )
    assert found["untested"] == ["O"]
    assert "Classes without test cases, left out of means over classes: O." in (
        (tmp_path / "out/results.md").read_text()
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("tile_0,0,test", "split of input 'tile_0': 'test' here, 'train' in the row of 'tile_0'"),
        ("tile_0.pt,0,val", "split of input 'tile_0.pt': 'val' here, 'train' in the row"),
        ("pcam/tile_0,1,train", "label of input 'pcam/tile_0': '1' here, '0' in the row"),
    ],
)
def test_one_embedding_in_two_splits_or_classes(row: str, message: str, tmp_path: Path) -> None:
    path = write_cohort(tmp_path)
    with (tmp_path / "labels.csv").open("a") as file:
        file.write(f"{row}\n")
    with pytest.raises(ValueError, match=message):
        read_embeddings(path, tmp_path / "labels.csv", progress=False)


def test_one_name_in_the_folders_of_two_splits(tmp_path: Path) -> None:
    path = write_cohort(tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("pcam/test/tile_0.pt", saved(torch.ones(12)))
    with (tmp_path / "labels.csv").open("a") as file:
        file.write("tile_0,1,test\n")
    test = read_embeddings(path, tmp_path / "labels.csv", progress=False).splits["test"]
    assert test.ids[-1] == "tile_0" and test.features[-1].tolist() == [1.0] * 12


def test_inflating_entries_are_refused() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"\0" * (1 << 20))
    with pytest.raises(embedding_zip.EntryError, match="inflated"):
        embedding_zip.load_tensors(stream.getvalue(), limit_bytes=1 << 16)


def test_a_folder_and_a_table_among_the_embeddings(tmp_path: Path) -> None:
    path = write_cohort(tmp_path)
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path / "unzipped")
    with zipfile.ZipFile(path, "a") as archive:
        archive.write(tmp_path / "labels.csv", "pcam/pcam.csv")
    inside = read_embeddings(path, progress=False)
    beside = read_embeddings(tmp_path / "unzipped", tmp_path / "labels.csv", progress=False)
    for name, split in inside.splits.items():
        assert split.ids == beside.splits[name].ids
        assert torch.equal(split.features, beside.splits[name].features)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("input,label\na,1\n", "no columns"),
        ("input,label,split\ntile_0,1,train\n", "two labels"),
        ("input,label,split\ntile_0,0,train\ntile_1,1,train\n", "none of split test"),
    ],
)
def test_tables_that_cannot_be_used(table: str, message: str, tmp_path: Path) -> None:
    path = write_cohort(tmp_path)
    (tmp_path / "bad.csv").write_text(table)
    with pytest.raises(ValueError, match=message):
        read_embeddings(path, tmp_path / "bad.csv", progress=False)


def test_archives_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such zip"):
        read_embeddings(tmp_path / "absent.zip", progress=False)
    path = write_cohort(tmp_path)
    with pytest.raises(FileNotFoundError, match="single csv"):
        read_embeddings(path, progress=False)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="download"):
        read_embeddings(path, tmp_path / "labels.csv", progress=False)


@pytest.mark.parametrize(
    "field", [{"protocol": "new"}, {"optim": "lbfgs"}, {"batch_size": 0}, {"lr": 0.0}]
)
def test_settings_are_checked(field: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        ProbeSettings(**field)
