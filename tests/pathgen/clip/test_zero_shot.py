from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from pathcore import image_features as features_module
from pathcore.encoders import create_encoder
from pathcore.image_sets import load_image_set
from pathgen.clip.export import export_hugging_face, export_open_clip, model_config
from pathgen.clip.zero_shot import (
    class_features,
    prompt_features,
    prompt_variants,
    score_spread,
    zero_shot,
)
from tests.pathgen.histology import KINDS, knowing_encoder, write_class_folders

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
    spread = metrics["prompt_spread"]["wordings"]
    assert spread["mean"]["value"] == 1.0 and spread["range"]["value"] == 0.0
    report = (tmp_path / "out/metrics.md").read_text()
    assert "| one template, mean of 2 | 1.0000 |" in report
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
    found = class_features(prompt_features(encoder, benchmark))
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


def test_variants_are_classifiers_of_their_own_prompts(tmp_path: Path, folders: Path) -> None:
    encoder = create_encoder(str(folders / "open_clip"), device="cpu")
    classes = [{"name": "fat", "prompts": ["fat", "adipose"]}, {"name": "blood", "prompts": ["b"]}]
    content = {"name": "k", "templates": ["an image of {}", "{}"], "classes": classes}
    (tmp_path / "set.json").write_text(json.dumps(content))
    benchmark = load_image_set(tmp_path / "set.json", "prompts")
    found = prompt_variants(prompt_features(encoder, benchmark), benchmark)
    assert list(found["templates"]) == ["an image of {}", "{}"]
    assert list(found["wordings"]) == ["fat, b", "adipose, b"]
    for variants, sentences in (
        ((found["templates"], "{}"), [["fat", "adipose"], ["b"]]),
        ((found["wordings"], "adipose, b"), [["an image of adipose", "adipose"],
                                             ["an image of b", "b"]]),
    ):  # fmt: skip
        means = torch.stack([encoder.encode_texts(own).mean(dim=0) for own in sentences])
        expected = torch.nn.functional.normalize(means, dim=-1)
        torch.testing.assert_close(variants[0][variants[1]], expected)


def test_spread_of_predictions_equals_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, 60)
    predicted = {f"p{k}": np.where(generator.random(60) < 0.2 * k, true, 0) for k in range(1, 4)}
    values = {n: balanced_accuracy_score(true, said) for n, said in predicted.items()}
    found = score_spread(true, predicted, 3)
    assert found["each"] == pytest.approx(values)
    assert found["best"]["name"] == max(values, key=values.__getitem__)
    assert found["mean"]["value"] == pytest.approx(np.mean(list(values.values())))
    rows = generator.integers(0, 60, (500, 60))
    drawn = [
        [balanced_accuracy_score(true[r], said[r]) for said in predicted.values()] for r in rows
    ]
    for name, column in (("mean", np.mean(drawn, axis=1)), ("range", np.ptp(drawn, axis=1))):
        low, high = np.percentile(column, [2.5, 97.5])
        assert (found[name]["low"], found[name]["high"]) == pytest.approx((low, high), abs=0.03)


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
