from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch

from pathcore import image_features as features_module
from pathcore.encoders import Encoder, Network, Transform, create_encoder
from pathcore.image_sets import load_image_set
from pathgen.clip.export import export_hugging_face, export_open_clip, model_config
from pathgen.clip.zero_shot import _ranks, class_features, retrieval, zero_shot
from tests.pathgen.histology import KINDS, write_class_folders, write_pairs

CONFIG = Path(__file__).resolve().parents[3] / "configs/pathgen/tiny_clip.json"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP as train-clip exports it."""
    folder = tmp_path_factory.mktemp("model")
    config = model_config(str(CONFIG))
    torch.manual_seed(0)
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "random.pt")
    pre = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    export_open_clip(folder / "random.pt", folder / "open_clip", config=config, preprocessing=pre)
    export_hugging_face(folder / "open_clip", folder / "hf")
    return folder


def knowing_encoder() -> Encoder:
    """Sees the mean colour, and knows the colour of each kind: what training would bring."""

    def encode_texts(texts: list[str], device: torch.device) -> torch.Tensor:
        found = [next(c for kind, c in KINDS.items() if kind in text) for text in texts]
        return torch.tensor(found, dtype=torch.float32) - 150

    def encode_pixels(pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values.mean(dim=(2, 3))

    centred = Transform(None, None, "bilinear", (150 / 255,) * 3, (1 / 255,) * 3)
    network = Network(torch.nn.Identity(), encode_pixels, centred, 3, texts=encode_texts)
    return Encoder(
        "colours", network, feature="projected", patch_px=None, mpp=(), precision="float32",
        device=torch.device("cpu"),
    )  # fmt: skip


@pytest.fixture
def benchmark_file(tmp_path: Path) -> Path:
    classes = [{"name": k, "folders": [k], "prompts": [k, f"much {k}"]} for k in KINDS]
    file = tmp_path / "kinds.yml"
    content = {"name": "kinds", "templates": ["an image of {}", "{}"], "classes": classes}
    file.write_text(json.dumps(content))
    return file


def test_a_model_that_knows_is_right_and_bad_images_are_recorded(
    benchmark_file: Path, tmp_path: Path
) -> None:
    data = write_class_folders(tmp_path / "data", 6)
    (data / "fat" / "0.png").write_bytes(b"no image")
    metrics = zero_shot(
        knowing_encoder(),
        load_image_set(benchmark_file, "prompts"),
        data,
        tmp_path / "out",
        progress=False,
    )
    assert metrics["balanced_accuracy"]["value"] == 1.0
    assert metrics["num_images"] == 24 and metrics["num_skipped"] == 1
    assert np.array(metrics["confusion_matrix"]).trace() == 24
    assert metrics == json.loads((tmp_path / "out/metrics.json").read_text())
    [skipped] = map(json.loads, (tmp_path / "out/skipped.jsonl").read_text().splitlines())
    assert skipped["id"] == "fat/0.png" and "cannot identify" in skipped["reason"]
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    assert len(rows) == 24 and all(row["true"] == row["predicted"] for row in rows)
    report = (tmp_path / "out/metrics.md").read_text()
    assert "balanced accuracy | 1.0000" in report and "1 skipped" in report


def test_features_are_kept_and_a_killed_run_continues(
    benchmark_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, benchmark = (
        write_class_folders(tmp_path / "data", 3),
        load_image_set(benchmark_file, "prompts"),
    )
    monkeypatch.setattr(features_module, "PART_SIZE", 5)
    encoder, calls = knowing_encoder(), []
    real = encoder.encode_images

    def dies_at_third(pixel_values: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixel_values))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(pixel_values)

    monkeypatch.setattr(encoder, "encode_images", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        zero_shot(encoder, benchmark, data, tmp_path / "out", progress=False)
    assert not (tmp_path / "out/metrics.json").exists()
    first = zero_shot(encoder, benchmark, data, tmp_path / "out", progress=False)
    assert calls == [5, 5, 2, 2]
    again = zero_shot(encoder, benchmark, data, tmp_path / "out", progress=False)
    assert again == first and len(calls) == 4
    whole = zero_shot(knowing_encoder(), benchmark, data, tmp_path / "other", progress=False)
    assert whole == first


def test_classes_are_means_of_their_prompts(benchmark_file: Path, folders: Path) -> None:
    encoder = create_encoder(str(folders / "open_clip"), device="cpu")
    benchmark = load_image_set(benchmark_file, "prompts")
    found = class_features(encoder, benchmark)
    theirs = open_clip.build_zero_shot_classifier(
        open_clip.create_model(f"local-dir:{folders / 'open_clip'}").eval(),
        open_clip.get_tokenizer(f"local-dir:{folders / 'open_clip'}"),
        classnames=list(KINDS),
        templates=["an image of {}".format, "an image of much {}".format, "{}".format,
                   "much {}".format],
    )  # fmt: skip
    torch.testing.assert_close(found, theirs.T)
    assert sorted(benchmark.sentences(2)) == sorted(
        ["an image of fat", "an image of much fat", "fat", "much fat"]
    )


def test_open_clip_and_transformers_give_the_same_scores(
    benchmark_file: Path, folders: Path, tmp_path: Path
) -> None:
    data, benchmark = (
        write_class_folders(tmp_path / "data", 2),
        load_image_set(benchmark_file, "prompts"),
    )
    rows = []
    for name in ("open_clip", "hf"):
        encoder = create_encoder(str(folders / name), device="cpu")
        zero_shot(encoder, benchmark, data, tmp_path / name, num_workers=1, progress=False)
        rows.append(list(csv.DictReader((tmp_path / name / "predictions.csv").open())))
    for left, right in zip(*rows, strict=True):
        for kind in KINDS:
            assert float(left[kind]) == pytest.approx(float(right[kind]), abs=2e-2)


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


def test_ranks_count_ties_against_the_model() -> None:
    queries = np.eye(3, dtype=np.float32)
    candidates = np.array([[1, 0, 0], [1, 0, 0], [0.5, 0, 0], [0, 1, 0]], dtype=np.float32)
    found = _ranks(queries, candidates, [[0], [3], [2]])
    assert found.tolist() == [1, 0, 3]
    assert _ranks(queries[:1], candidates, [[0, 1]]).tolist() == [0]
    same = np.ones((4, 3), dtype=np.float32)
    assert _ranks(same, same, [[0], [1], [2], [3]]).tolist() == [3] * 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("open_clip:ViT-B-32", "without weights"),
        ("open_clip:ViT-B-32@nothing", "neither a file nor one of"),
        ("open_clip:ViT-B-9@openai", "no architecture"),
        ("ViT-B-32:openai", "open_clip:ARCH@WEIGHTS"),
        (".", "neither open_clip_config.json nor a config.json"),
    ],
)
def test_models_that_are_none(
    model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        create_encoder(model, device="cpu")


def test_data_without_any_image_that_can_be_read(benchmark_file: Path, tmp_path: Path) -> None:
    for kind in KINDS:
        (tmp_path / "data" / kind).mkdir(parents=True)
        (tmp_path / "data" / kind / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of 4 images can be read"):
        zero_shot(knowing_encoder(), load_image_set(benchmark_file, "prompts"), tmp_path / "data",
                  tmp_path / "out", progress=False)  # fmt: skip
    assert not (tmp_path / "out/metrics.json").exists()
