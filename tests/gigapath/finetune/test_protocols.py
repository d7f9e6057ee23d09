from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import normalize

from gigapath.finetune.baselines import METHODS, VectorSplit
from gigapath.finetune.labelled_vectors import embed_images, labelled_images, read_vectors
from gigapath.finetune.probe import ProbeSettings, probe_vectors
from gigapath.finetune.protocols import Protocol, get_protocol, list_protocols, score_shots
from gigapath.published.embedding_zip import EmbeddingData, EmbeddingSplit
from pathcore.encoders import Encoder, create_encoder
from pathcore.image_sets import load_image_set
from pathcore.names import UnknownNameError
from pathcore.rows import write_csv
from tests.pathgen.histology import KINDS, patch, write_class_folders
from tests.pathgen.tiny_encoders import save_open_clip
from wsi.store import write_features


def vectors(name: str, count: int, seed: int, classes: int = 3) -> VectorSplit:
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    x = generator.normal(size=(count, 16)).astype(np.float32) + 5.0
    x[np.arange(count), labels] += 1.5
    return VectorSplit(tuple(f"{name}{n}" for n in range(count)), x, labels)


TRAIN, VAL, TEST = vectors("a", 90, 0), vectors("b", 30, 1), vectors("c", 60, 2)


def as_data(*splits: VectorSplit) -> EmbeddingData:
    found = {
        name: EmbeddingSplit(split.ids, torch.from_numpy(split.vectors), split.labels)
        for name, split in zip(("train", "val", "test"), splits, strict=True)
    }
    return EmbeddingData(("x", "y", "z"), found, (), 0)


def test_protocols_equal_scikit_learn() -> None:
    mean = TRAIN.vectors.mean(axis=0)
    train, test = normalize(TRAIN.vectors - mean), normalize(TEST.vectors - mean)

    knn = KNeighborsClassifier(20, metric="cosine", algorithm="brute")
    knn.fit(TRAIN.vectors - mean, TRAIN.labels)
    found = get_protocol("uni-knn").fit(TRAIN, VAL, 3)(TEST.vectors)
    np.testing.assert_allclose(found, knn.predict_proba(TEST.vectors - mean))

    nearest = NearestCentroid().fit(train, TRAIN.labels)
    found = get_protocol("uni-simpleshot").fit(TRAIN, VAL, 3)(TEST.vectors)
    assert found.argmax(axis=1).tolist() == nearest.predict(test).tolist()
    gaps = -np.square(test[:, None] - nearest.centroids_[None]).sum(axis=-1)
    np.testing.assert_allclose(
        found, np.exp(gaps) / np.exp(gaps).sum(axis=1, keepdims=True), rtol=1e-5
    )

    both = np.concatenate([TRAIN.vectors, VAL.vectors])
    model = LogisticRegression(C=16 * 3 / 100, max_iter=1000)
    model.fit(both, np.concatenate([TRAIN.labels, VAL.labels]))
    found = get_protocol("uni-linear").fit(TRAIN, VAL, 3)(TEST.vectors)
    np.testing.assert_allclose(found, model.predict_proba(TEST.vectors))

    model = LogisticRegression(C=1.0, max_iter=10000).fit(TRAIN.vectors, TRAIN.labels)
    found = get_protocol("patho-bench-linear").fit(TRAIN, VAL, 3)(TEST.vectors)
    np.testing.assert_allclose(found, model.predict_proba(TEST.vectors))


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # of NearestCentroid
def test_shots_are_drawn_by_class_and_scored_as_scikit_learn_does() -> None:
    protocol = Protocol("mine", "simpleshot", shots=(1, 5, 40), repeats=6)
    found = score_shots(protocol, TRAIN, TEST, 3, seed=3)
    assert found["left_out"] == {"40": "the smallest class has 30 training cases"}
    assert list(found["shots"]) == ["1", "5"]
    for number in (1, 5):
        values = []
        for repeat in range(6):
            generator = np.random.default_rng((3, repeat))
            orders = [generator.permutation(np.arange(k, 90, 3)) for k in range(3)]
            rows = np.concatenate([order[:number] for order in orders])
            mean = TRAIN.vectors[rows].mean(axis=0)
            model = NearestCentroid()
            model.fit(normalize(TRAIN.vectors[rows] - mean), TRAIN.labels[rows])
            said = model.predict(normalize(TEST.vectors - mean))
            values.append(balanced_accuracy_score(TEST.labels, said))
        score = found["shots"][str(number)]["balanced_accuracy"]
        assert score["value"] == pytest.approx(np.mean(values))
        assert score["std"] == pytest.approx(np.std(values, ddof=1))
        assert score["low"] <= score["value"] <= score["high"]
    with pytest.raises(ValueError, match="smallest class has 30"):
        score_shots(Protocol("mine", "knn", shots=(31,)), TRAIN, TEST, 3)


def test_presets_are_what_was_published() -> None:
    assert list_protocols() == [
        *("eva-linear", "linear-few-shot", "patho-bench-linear", "uni-few-shot", "uni-knn"),
        *("uni-linear", "uni-simpleshot"),
    ]
    settings = ProbeSettings(**get_protocol("eva-linear").settings)
    assert (settings.train_iters, settings.batch_size, settings.lr) == (12500, 256, 3e-4)
    assert get_protocol("eva-linear").num_runs == 5
    assert settings.patience == 0.2 * settings.train_iters
    few = get_protocol("uni-few-shot")
    assert few.method == "simpleshot" and few.repeats == 1000 and few.shots[-1] == 256
    for name in list_protocols():
        protocol = get_protocol(name)
        assert protocol.note and (protocol.source or protocol.note.startswith("Ours"))
    with pytest.raises(UnknownNameError, match="did you mean uni-knn"):
        get_protocol("uni_knn")
    for values, message in (
        (("p", "forest"), "unknown"),
        (("p", "knn", {"neighbours": 3}), "did you mean num_neighbours"),
        (("p", "linear_probe", {}, 1, (4,)), "k shots are for"),
        (("p", "knn", {}, 5), "has no seed"),
        (("p", "knn", {}, 1, (0,)), "expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            Protocol(*values)
    with pytest.raises(ValueError, match="multi-label"):
        METHODS["simpleshot"](VectorSplit((), np.ones((2, 2)), np.ones((2, 2))), None, 2)


def test_eva_trains_as_torch_does_and_stops(tmp_path: Path) -> None:
    short = {"train_iters": 24, "batch_size": 30, "patience": 0, "num_resamples": 10}
    protocol = replace(get_protocol("eva-linear").changed(short, (), None), num_runs=2)
    results = probe_vectors(
        as_data(TRAIN, VAL, TEST), "made up", tmp_path / "out", [protocol], device="cpu",
        progress=False,
    )  # fmt: skip
    found = results["methods"]["eva-linear"]
    assert len(found["runs"]) == 2 and found["spread"]["balanced_accuracy"]["num_runs"] == 2
    assert "| eva-linear, 2 seeds |" in (tmp_path / "out/results.md").read_text()
    history = json.loads((tmp_path / "out/eva-linear/seed_42/history.json").read_text())
    assert [row["iteration"] for row in history] == [3, 6, 9, 12, 15, 18, 21, 24]

    torch.manual_seed(42)
    layer = torch.nn.Linear(16, 3)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 24, 0.0)
    x, y = torch.from_numpy(TRAIN.vectors), torch.from_numpy(TRAIN.labels)
    for number in range(8):
        generator = torch.Generator().manual_seed(42 * 100_003 + number)
        for rows in torch.randperm(90, generator=generator).split(30):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    weights = load_file(tmp_path / "out/eva-linear/seed_42/last.safetensors")
    torch.testing.assert_close(weights["fc.weight"], layer.weight.detach())

    same = {**short, "lr": 1e-9, "patience": 6, "num_resamples": 0}
    stopped = Protocol("stops", "linear_probe", {**protocol.settings, **same})
    for _ in range(2):  # a run that has stopped does not go on
        probe_vectors(as_data(TRAIN, VAL, TEST), "made up", tmp_path / "stop", [stopped],
                      device="cpu", progress=False)  # fmt: skip
        history = json.loads((tmp_path / "stop/stops/history.json").read_text())
        assert [row["iteration"] for row in history] == [3, 6, 9]


def test_without_validation_cases(tmp_path: Path) -> None:
    empty = VectorSplit((), np.zeros((0, 16), np.float32), np.zeros(0, np.int64))
    data = as_data(TRAIN, empty, TEST)
    settings = {"train_iters": 4, "num_resamples": 10}
    with pytest.raises(ValueError, match="model_select=last"):
        probe_vectors(data, "x", tmp_path, [Protocol("a", "linear_probe", settings)],
                      progress=False)  # fmt: skip
    kept = Protocol("b", "linear_probe", {**settings, "model_select": "last"})
    results = probe_vectors(
        data, "x", tmp_path, [kept, *map(get_protocol, ("uni-linear", "uni-knn"))],
        settings=ProbeSettings(num_resamples=10), device="cpu", progress=False,
    )  # fmt: skip
    for name in ("b", "uni-linear", "uni-knn"):
        assert list(results["methods"][name]) == ["test"]
    assert results["methods"]["uni-linear"]["test"]["ece"]["value"] < 0.5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    name = save_open_clip(tmp_path_factory.mktemp("encoder") / "clip")
    return create_encoder(name, device="cpu")


def test_image_sets_and_tables_give_the_same_vectors(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_class_folders(tmp_path / "train", 4)
    write_class_folders(tmp_path / "test", 2, start=0)
    (tmp_path / "test/fat/9.png").write_bytes(b"no image")
    config = {"name": "kinds", "classes": [{"name": kind} for kind in sorted(KINDS)]}
    (tmp_path / "kinds.json").write_text(json.dumps(config))
    image_set = load_image_set(tmp_path / "kinds.json", "labels")
    with pytest.raises(FileNotFoundError, match="does not say which images"):
        labelled_images(tmp_path / "test", image_set=image_set)
    with pytest.raises(ValueError, match=r"blood/0\.png is in splits test and train"):
        labelled_images(tmp_path / "test", image_set=image_set, train=tmp_path / "test")
    found = labelled_images(tmp_path / "test", image_set=image_set, train=tmp_path / "train")
    first = embed_images(encoder, *found, tmp_path / "cache", progress=False)
    assert [row["id"] for row in first.skipped] == ["fat/9.png"]
    shown = patch(sorted(KINDS)[0], 1000)
    torch.testing.assert_close(first.splits["train"].features[:1], encoder.features([shown]))

    rows = [
        [f"{split}/{path.parent.name}/{path.name}", path.parent.name, split]
        for split in ("train", "test")
        for path in sorted((tmp_path / split).rglob("*.png"))
    ]
    rows.append(["train/none.png", "fat", "train"])
    write_csv(tmp_path / "tiles.csv", ["input", "label", "split"], rows)
    first_row = rows[0]
    write_csv(tmp_path / "two.csv", ["input", "label", "split"], [*rows, [*first_row[:2], "test"]])
    with pytest.raises(ValueError, match="'test' here, 'train' in the row of"):
        labelled_images(tmp_path, table=tmp_path / "two.csv")
    found = labelled_images(tmp_path, table=tmp_path / "tiles.csv")
    second = embed_images(encoder, *found, tmp_path / "other", progress=False)
    assert second.classes == first.classes and len(second.skipped) == 2
    for name in ("train", "test"):
        assert torch.equal(first.splits[name].features, second.splits[name].features)
        assert first.splits[name].labels.tolist() == second.splits[name].labels.tolist()

    def computes(*arguments: object) -> None:
        raise AssertionError("features were computed a second time")

    monkeypatch.setattr(encoder, "features", computes)
    again = embed_images(encoder, *found, tmp_path / "other", progress=False)
    assert torch.equal(again.splits["test"].features, second.splits["test"].features)


def test_published_splits_of_a_set(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rows = []
    for number in range(6):
        patch("fat", number).save(tmp_path / f"images/{number}.png")
        rows.append([f"{number}.png", ("HP", "SSA")[number % 2], ("train", "test")[number // 4]])
    header = ["Image Name", "Majority Vote Label", "Partition"]
    write_csv(tmp_path / "annotations.csv", header, rows)
    _, parts = labelled_images(tmp_path, image_set=load_image_set("mhist", "labels"))
    assert {name: len(part.images) for name, part in parts.items()} == {"test": 2, "train": 4}

    for split, count in (("train", 3), ("valid", 2), ("test", 2)):
        for part, shape in (("x", (count, 4, 4, 3)), ("y", (count, 1, 1, 1))):
            name = f"camelyonpatch_level_2_split_{split}_{part}.h5"
            with h5py.File(tmp_path / name, "w") as file:
                values = np.arange(np.prod(shape)).reshape(shape) % 2
                file[part] = (np.arange(count) % 2).reshape(shape) if part == "y" else values
    _, parts = labelled_images(tmp_path, image_set=load_image_set("patch_camelyon", "labels"))
    assert {name: len(part.images) for name, part in parts.items()} == {
        "test": 2, "train": 3, "val": 2,
    }  # fmt: skip


def test_slides_are_means_of_their_features(tmp_path: Path) -> None:
    generator, rows = np.random.default_rng(0), []
    for number in range(8):
        features = generator.normal(size=(5, 4)).astype(np.float32)
        coords = np.arange(10).reshape(5, 2)
        write_features(tmp_path / f"S{number}.h5", features, coords, encoder="uni")
        rows.append([f"S{number}", "ab"[number % 2], "train" if number < 6 else "test"])
    write_csv(tmp_path / "labels.csv", ["input", "label", "split"], [*rows, ["S9", "a", "test"]])
    data = read_vectors(tmp_path, tmp_path / "labels.csv", progress=False)
    np.testing.assert_allclose(
        data.splits["test"].features[1].numpy(), features.mean(axis=0), rtol=1e-5
    )
    assert len(data.splits["train"].ids) == 6 and not data.splits["val"].ids
    [skipped] = data.skipped
    assert skipped["id"] == "S9" and "no S9.h5" in skipped["reason"]
    for row in (["S0.svs", "a", "test"], ["S0", "b", "train"]):
        write_csv(tmp_path / "two.csv", ["input", "label", "split"], [*rows, row])
        with pytest.raises(ValueError, match=r"in the row of 'S0', which names the same file"):
            read_vectors(tmp_path, tmp_path / "two.csv", progress=False)
    write_features(tmp_path / "S0.h5", np.ones((2, 3), np.float32), np.ones((2, 2), int),
                   encoder="uni")  # fmt: skip
    write_features(tmp_path / "S1.h5", features, coords, encoder="other")
    data = read_vectors(tmp_path, tmp_path / "labels.csv", progress=False)
    assert data.splits["train"].ids == ("S2", "S3", "S4", "S5")
    assert {row["id"]: row["reason"] for row in data.skipped} == {
        "S0": "features of width 3; most slides have width 4",
        "S1": "features of encoder other; most slides have uni's",
        "S9": skipped["reason"],
    }
    with pytest.raises(FileNotFoundError, match="name one"):
        read_vectors(tmp_path, progress=False)
