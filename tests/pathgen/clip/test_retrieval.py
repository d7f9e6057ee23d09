from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from pathcore.encoders import create_encoder
from pathcore.image_sets import load_image_set
from pathcore.rows import write_csv
from pathgen.clip.retrieval import (
    LabelledFeatures,
    _ranks,
    features_of_set,
    features_of_table,
    image_retrieval,
    retrieval,
)
from tests.pathgen.histology import KINDS, knowing_encoder, patch, write_class_folders, write_pairs
from tests.pathgen.tiny_encoders import save_hugging_face, save_open_clip
from wsi.store import write_features


def test_retrieval_counts_equal_captions_once(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "data", 5)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        row["caption"] = row["id"].split(".")[1].split("_")[0]
    bad = [{"id": "out", "image": "../x.png", "caption": "fat"}, {"id": "gone", "image": "no.png"}]
    gone = {"id": "lost", "image": "images/lost.png", "caption": "fat"}
    pairs.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad, gone]))
    metrics = retrieval(knowing_encoder(), pairs, tmp_path / "out", ks=(1, 2), progress=False)
    assert (metrics["num_images"], metrics["num_captions"], metrics["num_skipped"]) == (20, 4, 3)
    for direction in ("image_to_text", "text_to_image"):
        assert metrics[direction]["recall@1"]["value"] == 1.0
        assert metrics[direction]["median_rank"] == 1
    assert "recall@2 | 1.0000" in (tmp_path / "out/metrics.md").read_text()


@pytest.mark.parametrize(("save", "length"), [(save_open_clip, 77), (save_hugging_face, 32)])
def test_captions_that_the_text_tower_cuts_are_counted(
    save: Callable[[Path], str], length: int, tmp_path: Path
) -> None:
    encoder = create_encoder(save(tmp_path / "encoder"), device="cpu")
    fits, long = " ".join("a" * (length - 2)), " ".join("a" * (length - 1))  # with start and end
    assert encoder.num_cut(["", "a", fits]) == 0 and encoder.num_cut(["a", long, 2 * long]) == 2
    pairs = write_pairs(tmp_path / "data", 1)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row, caption in zip(rows, ("a", fits, long, 2 * long), strict=True):
        row["caption"] = caption
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = retrieval(encoder, pairs, tmp_path / "out", ks=(1,), progress=False)
    assert metrics["num_cut"] == 2
    assert "2 texts are too long for the text tower" in (tmp_path / "out/metrics.md").read_text()


def test_retrieval_counts_an_image_with_several_captions_once(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "data", 1)
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for row in rows:
        row["caption"] = row["id"].split(".")[1].split("_")[0]
    more = [
        {**row, "id": f"{row['id']}x", "image": f"./{row['image']}", "caption": f"more {cap}"}
        for row in rows
        for cap in (row["caption"], row["caption"], f"of {row['caption']}")
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    metrics = retrieval(knowing_encoder(), pairs, tmp_path / "out", ks=(1,), progress=False)
    assert (metrics["num_images"], metrics["num_captions"], metrics["num_skipped"]) == (4, 12, 0)
    for direction in ("image_to_text", "text_to_image"):
        assert metrics[direction]["recall@1"]["value"] == 1.0


def test_ranks_count_ties_against_the_model() -> None:
    queries = np.eye(3, dtype=np.float32)
    candidates = np.array([[1, 0, 0], [1, 0, 0], [0.5, 0, 0], [0, 1, 0]], dtype=np.float32)
    found = _ranks(queries, candidates, [[0], [3], [2]])
    assert found.tolist() == [1, 0, 3]
    assert _ranks(queries[:1], candidates, [[0, 1]]).tolist() == [0]
    same = np.ones((4, 3), dtype=np.float32)
    assert _ranks(same, same, [[0], [1], [2], [3]]).tolist() == [3] * 4


def test_images_find_images_as_scikit_learn_scores_them(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(40, 5)), generator.integers(0, 3, 40)
    groups = tuple(str(number) for number in generator.integers(0, 15, 40))
    data = LabelledFeatures("made up", "numbers", features, labels, groups)
    metrics = image_retrieval(data, tmp_path / "out", ks=(1, 4))
    assert metrics == json.loads((tmp_path / "out/metrics.json").read_text())

    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    expected: dict[str, list[float]] = {}
    for row in range(40):
        others = [n for n in range(40) if groups[n] != groups[row]]
        similarities = unit[others] @ unit[row]
        right = labels[others] == labels[row]
        order = np.argsort(-similarities)
        expected.setdefault("map", []).append(average_precision_score(right, similarities))
        for k in (1, 4):
            near = labels[others][order][:k].tolist()
            most = max(near, key=lambda label: (near.count(label), -near.index(label)))
            expected.setdefault(f"precision@{k}", []).append(np.mean(right[order][:k]))
            expected.setdefault(f"recall@{k}", []).append(right[order][:k].any())
            expected.setdefault(f"majority_vote@{k}", []).append(most == labels[row])
    for name, values in expected.items():
        assert metrics[name]["value"] == pytest.approx(np.mean(values)), name
        assert metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    assert metrics["num_queries"] == 40 and metrics["num_groups"] == len(set(groups))


def test_the_own_slide_is_no_candidate_and_ties_find_nothing(tmp_path: Path) -> None:
    features = np.array([[1.0, 0], [1, 0.1], [0, 1], [0.02, 1], [1, 1]])
    labels, groups = np.array([0, 0, 1, 1, 1]), ("a", "a", "b", "b", "c")
    known = LabelledFeatures("s", "m", features, labels, groups)
    metrics = image_retrieval(known, tmp_path / "groups", ks=(1,))
    # The images of slide a have no match elsewhere; those of b have c; c has b.
    assert (metrics["num_queries"], metrics["num_without_match"]) == (3, 2)
    assert metrics["recall@1"]["value"] == pytest.approx(2 / 3)
    assert "2 images have no match" in (tmp_path / "groups/metrics.md").read_text()
    blind = LabelledFeatures("s", "m", np.ones((6, 2)), np.array([0, 0, 0, 1, 1, 1]))
    metrics = image_retrieval(blind, tmp_path / "blind", ks=(1, 3))
    assert metrics["recall@1"]["value"] == metrics["recall@3"]["value"] == 0.0
    alone = LabelledFeatures("s", "m", np.eye(2), np.array([0, 1]))
    with pytest.raises(ValueError, match="no image of 2 has another one of its class"):
        image_retrieval(alone, tmp_path / "alone")


def test_sets_tables_and_slides_are_read(tmp_path: Path) -> None:
    folder = write_class_folders(tmp_path / "data", 3)
    content = {"name": "kinds", "classes": [{"name": kind} for kind in KINDS]}
    (tmp_path / "kinds.json").write_text(json.dumps(content))
    image_set = load_image_set(tmp_path / "kinds.json", "labels")
    data = features_of_set(knowing_encoder(), image_set, folder, tmp_path / "cache", progress=False)
    metrics = image_retrieval(data, tmp_path / "set", ks=(2,))
    assert metrics["precision@2"]["value"] == 1.0 and metrics["num_groups"] is None

    patch("fat", 7).save(folder / "more.png")
    rows = [[f"{k}/{n}.png", k, f"slide{n}"] for k in KINDS for n in range(1000, 1003)]
    rows += [["more.png", "fat", ""], ["none.png", "fat", "slide1"], ["x.png", "", "a"]]
    write_csv(tmp_path / "tiles.csv", ["input", "label", "group"], rows)
    data = features_of_table(
        knowing_encoder(), tmp_path / "tiles.csv", folder, tmp_path / "cache", progress=False
    )
    assert len(data.features) == 12 and data.groups is not None and len(set(data.groups)) == 3
    reasons = {row["id"]: row["reason"] for row in data.skipped}
    assert list(reasons) == ["more.png", "none.png", "x.png"]
    assert reasons["more.png"].endswith("tiles.csv:14: no group")
    assert reasons["x.png"].endswith("tiles.csv:16: no label")

    (tmp_path / "slides").mkdir()
    generator, rows = np.random.default_rng(0), []
    for number in range(6):
        features = generator.normal(size=(4, 8)).astype(np.float32)
        features[:, number % 2] += 9
        coords = np.arange(8).reshape(4, 2)
        write_features(tmp_path / f"slides/S{number}.h5", features, coords, encoder="uni")
        rows.append([f"S{number}", "ab"[number % 2]])
    rows += [["S9", "a"], ["S0.h5", "a"]]
    write_csv(tmp_path / "slides.csv", ["input", "label"], rows)
    data = features_of_table(None, tmp_path / "slides.csv", tmp_path / "slides", tmp_path)
    np.testing.assert_allclose(data.features[5], features.mean(axis=0), rtol=1e-6)
    assert data.groups is None and [row["id"] for row in data.skipped] == ["S0.h5", "S9"]
    assert "named twice, first in line 2" in data.skipped[0]["reason"]
    assert image_retrieval(data, tmp_path / "out", ks=(1,))["precision@1"]["value"] == 1.0
    write_features(tmp_path / "slides/S1.h5", features, coords, encoder="gpfm")
    with pytest.raises(ValueError, match=r"S0\.h5 of uni, .*S1\.h5 of gpfm; expected those of one"):
        features_of_table(None, tmp_path / "slides.csv", tmp_path / "slides", tmp_path)
