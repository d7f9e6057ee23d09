from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pathcore import files
from pathcore.files import FolderInUseError
from pathgen.clip import training
from pathgen.clip.export import ExportError, hugging_face_config
from pathgen.clip.recipe import read_recipe
from pathgen.clip.shards import prepare_shards
from pathgen.clip.training import TrainingError, start_here, train_clip
from tests.pathgen.histology import patch, write_pairs

RECIPE = Path(__file__).resolve().parents[3] / "configs/pathgen/pathgen_clip_tiny.yml"
CAPTIONS = ["The image shows tumour.", "fat, field 3", "Stroma (H&E): <b>blood</b>!"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("clip")
    pairs = write_pairs(folder / "all", 6)
    clean = write_pairs(folder / "clean", 3)
    data = {"all_pairs": pairs, "clean_pairs": clean}
    results = train_clip(read_recipe(RECIPE, data=data), folder / "out", start=start_here,
                         device="cpu")  # fmt: skip
    return {"results": results, "data": data, "out": folder / "out"}


def test_two_stages_leave_folders_that_open_clip_and_transformers_load(
    trained: dict[str, Any],
) -> None:
    first, second = trained["results"]
    assert [r.num_pairs for r in trained["results"]] == [24, 12]
    assert first.num_skipped == second.num_skipped == 0
    weights = [load_file(r.open_clip / "open_clip_model.safetensors") for r in (first, second)]
    assert not torch.equal(weights[0]["visual.proj"], weights[1]["visual.proj"])
    job = json.loads((trained["out"] / "clean_pairs/job.json").read_text())
    start = job["arguments"][job["arguments"].index("--pretrained") + 1]
    assert Path(start) == first.open_clip.absolute() / "open_clip_model.safetensors"
    log = (trained["out"] / "clean_pairs/out.log").read_text()
    assert "Train Epoch: 0" in log


def test_exports_give_the_same_features(trained: dict[str, Any]) -> None:
    from transformers import CLIPModel, CLIPProcessor

    result = trained["results"][1]
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{result.open_clip}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{result.open_clip}")
    theirs = CLIPModel.from_pretrained(result.hugging_face).eval()
    processor = CLIPProcessor.from_pretrained(result.hugging_face)
    images = [patch("tumour", 1), patch("fat", 2).resize((50, 40), Image.Resampling.BICUBIC)]
    with torch.no_grad():
        pixels = torch.stack([preprocess(image) for image in images])
        inputs = processor(text=CAPTIONS, images=images, return_tensors="pt", padding=True)
        torch.testing.assert_close(inputs["pixel_values"], pixels, atol=2e-2, rtol=0)
        torch.testing.assert_close(
            theirs.get_image_features(pixel_values=pixels), model.eval().encode_image(pixels)
        )
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        torch.testing.assert_close(
            theirs.get_text_features(**texts), model.encode_text(tokenizer(CAPTIONS))
        )


def test_finished_stages_are_not_trained_again(trained: dict[str, Any]) -> None:
    def never(_: object) -> int:
        raise AssertionError("started again")

    recipe = read_recipe(RECIPE, data=trained["data"])
    assert train_clip(recipe, trained["out"], start=never, device="cpu") == trained["results"]
    other = read_recipe(RECIPE, data=trained["data"], options={"lr": 0.5})
    with pytest.raises(ValueError, match="other options"):
        train_clip(other, trained["out"], start=never, device="cpu")


@pytest.mark.parametrize("packed", [False, True])
def test_changed_data_under_the_same_path_are_refused(tmp_path: Path, packed: bool) -> None:
    data = write_pairs(tmp_path / "pairs", 4)
    if packed:
        data = prepare_shards(data, tmp_path / "made").paths[0].parent
    recipe = read_recipe(one_stage(tmp_path), data={"only": data})

    def dies(_: object) -> int:
        return 137

    for _ in range(2):  # unchanged data are resumed
        with pytest.raises(TrainingError, match="exit code 137"):
            train_clip(recipe, tmp_path / "out", start=dies, device="cpu")
    if packed:
        (data / "more.tar").write_bytes((data / "000000.tar").read_bytes())
    else:
        data.write_text(data.read_text().replace("fat", "adipose"))
    with pytest.raises(ValueError, match="started with other data; name a new output folder"):
        train_clip(recipe, tmp_path / "out", start=dies, device="cpu")


def test_finished_stages_do_not_need_their_data(trained: dict[str, Any], tmp_path: Path) -> None:
    pairs = trained["data"]["all_pairs"]
    away = pairs.rename(tmp_path / "away.jsonl")
    recipe = read_recipe(RECIPE, data=trained["data"])
    try:
        found = train_clip(recipe, trained["out"], start=lambda _: 1, device="cpu")
    finally:
        away.rename(pairs)
    assert found == trained["results"]


def test_two_runs_on_one_folder(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOCK_PATIENCE_S", 0.1)
    recipe = read_recipe(RECIPE, data=trained["data"])
    seen: list[str] = []

    def second(_: object) -> int:
        with pytest.raises(FolderInUseError, match="another process is working on this folder"):
            train_clip(recipe, tmp_path / "out", start=second, device="cpu")
        seen.append("refused")
        return 137

    with pytest.raises(TrainingError, match="exit code 137"):
        train_clip(recipe, tmp_path / "out", start=second, device="cpu")
    assert seen == ["refused"]


def one_stage(folder: Path) -> Path:
    file = folder / "one.yml"
    stage = "{name: only, data: unset, options: {epochs: 2, lr: 1.0e-3, warmup: 2, workers: 1}}"
    file.write_text(f"_base_: {RECIPE}\nmodel: {RECIPE.parent}/tiny_clip.json\nstages: [{stage}]\n")
    return file


def shards_with_a_bad_image(folder: Path) -> Path:
    made = prepare_shards(write_pairs(folder / "pairs", 5), folder / "made")
    with tarfile.open(made.paths[0], "a") as tar:
        for name, content in (("bad.png", b"no image"), ("bad.txt", b"text")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.paths[0].parent


@pytest.mark.slow
def test_a_training_that_dies_continues_at_its_last_whole_epoch(tmp_path: Path) -> None:
    recipe = read_recipe(one_stage(tmp_path), data={"only": shards_with_a_bad_image(tmp_path)})
    folder = tmp_path / "out/only"

    def one_epoch(arguments: Any) -> int:
        job_file = Path(arguments[-1])
        job = json.loads(job_file.read_text())
        position = job["arguments"].index("--epochs") + 1
        whole, job["arguments"][position] = job["arguments"][position], "1"
        job_file.write_text(json.dumps(job))
        start_here(arguments)
        job["arguments"][position] = whole
        return 137  # as after kill -9

    with pytest.raises(TrainingError, match="exit code 137") as caught:
        train_clip(recipe, tmp_path / "out", start=one_epoch, device="cpu")
    assert caught.value.code == 137
    assert not (folder / "open_clip").exists()
    (folder / "checkpoints/epoch_1.pt").write_bytes(b"cut off in the middle of being written")
    [result] = train_clip(recipe, tmp_path / "out", start=start_here, device="cpu")
    log = (folder / "out.log").read_text()
    assert "resuming checkpoint" in log and log.count("Start epoch 0") == 1
    checkpoint = torch.load(folder / "checkpoints/epoch_latest.pt", weights_only=True)
    assert checkpoint["epoch"] == 2
    assert (result.num_pairs, result.num_skipped) == (21, 1)
    [row] = map(json.loads, (folder / "skipped.jsonl").read_text().splitlines())
    assert row["id"] == "bad" and "UnidentifiedImageError" in row["reason"]


@pytest.mark.slow
def test_a_stage_without_a_step_fails(tmp_path: Path) -> None:
    folder = shards_with_a_bad_image(tmp_path)
    for path in folder.glob("*.tar"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"\x89PNG", b"\x89PNX"))
    recipe = read_recipe(one_stage(tmp_path), data={"only": folder})
    with pytest.raises(TrainingError, match=r"ran no step.*the first fault:.*cannot be decoded"):
        train_clip(recipe, tmp_path / "out", start=start_here, device="cpu")
    assert not (tmp_path / "out/only/open_clip").exists()


def test_too_small_data_is_refused_before_anything_starts(tmp_path: Path) -> None:
    data = {name: write_pairs(tmp_path / "d", 1) for name in ("all_pairs", "clean_pairs")}
    with pytest.raises(ValueError, match="a batch of 8 pairs, but"):
        train_clip(read_recipe(RECIPE, data=data), tmp_path / "out", start=start_here)
    assert not (tmp_path / "out/all_pairs/out.log").exists()


def test_diverged_weights_are_not_exported(trained: dict[str, Any], tmp_path: Path) -> None:
    from pathgen.clip.export import export_open_clip, model_config

    checkpoint = trained["out"] / "all_pairs/checkpoints/epoch_latest.pt"
    state = torch.load(checkpoint, weights_only=True)
    state["state_dict"]["visual.proj"][0, 0] = torch.nan
    torch.save(state, tmp_path / "nan.pt")
    model = model_config(str(RECIPE.parent / "tiny_clip.json"))
    with pytest.raises(ValueError, match="diverged"):
        export_open_clip(tmp_path / "nan.pt", tmp_path / "out", config=model, preprocessing={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16-SigLIP", "coca_ViT-B-32", "convnext_base"])
def test_architectures_without_a_class_in_transformers_are_refused(name: str) -> None:
    with pytest.raises(ExportError):
        hugging_face_config(open_clip.get_model_config(name))


def test_architecture_of_the_full_recipe_has_a_class_in_transformers() -> None:
    recipe = read_recipe(RECIPE.with_name("pathgen_clip.yml"))
    config = hugging_face_config(open_clip.get_model_config(recipe.model))
    assert config.vision_config.hidden_act == "quick_gelu"
    assert (config.vision_config.image_size, config.vision_config.hidden_size) == (336, 1024)


def test_preprocessing_follows_the_starting_weights() -> None:
    openai = training._preprocessing("ViT-B-32-quickgelu", "openai", {})
    siglip = training._preprocessing("ViT-B-16-SigLIP", "webli", {})
    assert openai["mean"] == list(open_clip.OPENAI_DATASET_MEAN)
    assert siglip["mean"] == [0.5, 0.5, 0.5] and siglip["resize_mode"] == "squash"
    assert training._preprocessing("ViT-B-32", "", {"image_mean": [0, 0, 0]})["mean"] == [0] * 3


def test_the_activation_is_that_of_the_starting_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"QuickGELU, which .* lacks; use ViT-B-16-quickgelu"):
        training._preprocessing("ViT-B-16", "openai", {})
    assert training._preprocessing("ViT-B-16", "openai", {"force_quick_gelu": True})
    content = {"model_cfg": {"quick_gelu": True}, "preprocess_cfg": {"std": [1, 1, 1]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    weights = tmp_path / "open_clip_model.safetensors"
    weights.touch()
    found = training._preprocessing("ViT-B-16-quickgelu", str(weights), {})
    assert found["std"] == [1, 1, 1]
    with pytest.raises(ValueError, match="use the model that the weights were trained with"):
        training._preprocessing("ViT-B-16", str(weights), {})
