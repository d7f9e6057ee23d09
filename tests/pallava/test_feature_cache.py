"""Stored features: the same training, whole files or none, and refusals where they differ."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.config import Config
from PIL import Image
from safetensors.torch import load_file
from xtuner.registry import BUILDER

from pallava.dataset import LLaVADataset
from pallava.default_collate_fn import default_collate_fn
from pallava.engine.runtime import adapt_config
from pallava.feature_cache import CachedImage, describe
from tests.pallava.engine.tiny_run import STAGE1, losses, make_folder, run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_folder(tmp_path, num_images=10)


def config(**options: Any) -> Any:
    cfg = adapt_config(Config.fromfile(STAGE1))
    cfg.merge_from_dict(options)
    return cfg


def dataset(cfg: Any, feature_cache: str | None) -> LLaVADataset:
    return BUILDER.build({**cfg.train_dataloader.dataset, "feature_cache": feature_cache})


def model(cfg: Any) -> Any:
    torch.manual_seed(0)
    return BUILDER.build(cfg.model).train()


def batches(data: LLaVADataset, order: list[int], size: int = 4) -> list[dict[str, Any]]:
    return [
        default_collate_fn([data[i] for i in order[start : start + size]])["data"]
        for start in range(0, len(order), size)
    ]


def step(network: Any, batch: dict[str, Any], seed: int) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(seed)  # dropout
    network.zero_grad()
    loss = network(batch)["loss"]
    loss.backward()
    grads = {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}
    return loss.item(), grads


@pytest.mark.parametrize("cross_attention", [True, False])
def test_losses_and_gradients_are_those_without_the_cache(
    folder: Path, cross_attention: bool
) -> None:
    """In the epoch that stores, in one that reads in another order, and in one that does both."""
    cfg = config(**{"model.cross_attention": cross_attention})
    network, plain, cached = model(cfg), dataset(cfg, None), dataset(cfg, "features")
    orders = [[0, 1, 2, 3, 4, 5], [5, 2, 8, 0, 4, 1, 9, 3], [9, 8, 3, 7, 6, 0]]
    stored = []
    for order in orders:
        pairs = zip(batches(plain, order), batches(cached, order), strict=True)
        for seed, (expected, found) in enumerate(pairs):
            stored += [image.is_stored for image in found["pixel_values"]]
            (loss, grads), (other, others) = (step(network, b, seed) for b in (expected, found))
            assert loss == other
            assert grads.keys() == others.keys() and len(grads) > 20
            assert all(torch.equal(grads[name], others[name]) for name in grads)
    assert stored[:6] == [False] * 6 and sum(stored[6:]) >= 8 and not all(stored[6:])
    files = list(Path("features").glob("*/*.safetensors"))
    assert len(files) == 10
    tiles = 1 if not cross_attention else 5
    assert min(len(load_file(file)["tiles"]) for file in files) == tiles
    assert not list(Path("features").rglob("*.partial"))


@pytest.mark.slow
def test_a_run_encodes_each_image_once(folder: Path) -> None:
    settings = ("--seed", 0, "--cfg-options", "train_cfg.max_epochs=2", "param_scheduler.0.end=0.7",
                "param_scheduler.1.begin=0.7")  # fmt: skip
    option = "train_dataloader.dataset.feature_cache=features"
    plain = run(folder, "train", STAGE1, "--work-dir", "plain", *settings).stdout
    cached = run(folder, "train", STAGE1, "--work-dir", "cached", *settings, option).stdout
    assert losses(plain) == losses(cached) and len(losses(plain)) == 6
    assert "Features  10 images, " in cached and "of which 0.00 GiB are stored" in cached
    written = {p: p.stat().st_mtime_ns for p in (folder / "features").glob("*/*.safetensors")}
    assert len(written) == 10
    again = run(folder, "train", STAGE1, "--work-dir", "again", *settings, option).stdout
    assert losses(again) == losses(plain)
    assert written == {file: file.stat().st_mtime_ns for file in written}
    trained = run(folder, "train", STAGE1, "--work-dir", "no", *settings, option,
                  "model.freeze_visual_encoder=False")  # fmt: skip
    assert trained.returncode == 2 and "this one is trained" in trained.stdout


@pytest.mark.multiproc
def test_processes_share_the_features(folder: Path) -> None:
    epochs = ("--seed", 0, "--cfg-options", "train_cfg.max_epochs=2", "param_scheduler.0.end=1",
              "param_scheduler.1.begin=1")  # fmt: skip
    option = "train_dataloader.dataset.feature_cache=features"
    plain = run(folder, "train", STAGE1, "--work-dir", "plain", *epochs, processes=2).stdout
    assert len(losses(plain)) >= 4, plain[-3000:]
    for name in ("cold", "warm"):
        cached = run(folder, "train", STAGE1, "--work-dir", name, *epochs, option, processes=2)
        assert losses(cached.stdout) == losses(plain), name
        assert len(list((folder / "features").glob("*/*.safetensors"))) == 10
    assert not list((folder / "features").rglob("*.partial"))
    zero3 = ("--deepspeed", "deepspeed_zero3", *epochs, option)
    refused = run(folder, "train", STAGE1, "--work-dir", "zero3", *zero3, processes=2)
    assert refused.returncode == 2 and "ZeRO-3 divides the encoder" in refused.stdout


def test_a_changed_image_is_encoded_again_and_a_damaged_file_replaced(folder: Path) -> None:
    cfg = config()
    network, data = model(cfg), dataset(cfg, "features")
    step(network, batches(data, [0, 1])[0], 0)
    first, second = (data[i]["pixel_values"][0] for i in (0, 1))
    assert first.is_stored and second.is_stored
    image = folder / "data/tiny/images/0.png"
    Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    Path(second.file).write_bytes(Path(second.file).read_bytes()[:100])
    again = [data[i]["pixel_values"][0] for i in (0, 1)]
    assert [item.is_stored for item in again] == [False, False]
    assert again[0].file != first.file and again[1].file == second.file
    step(network, batches(data, [0, 1])[0], 0)
    assert torch.equal(data[1]["pixel_values"][0].tiles, second.tiles)


def test_a_failed_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config()
    network, data = model(cfg), dataset(cfg, "features")

    def fail(tensors: Any, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("pallava.feature_cache.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        step(network, batches(data, [0])[0], 0)
    assert [path.name for path in Path("features").rglob("*") if path.is_file()] and not list(
        Path("features").glob("*/*")
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"model.freeze_visual_encoder": False}, "this one is trained"),
        ({"model.visual_select_layer": -1}, "layer=-2, this run has layer=-1"),
        ({"model.cross_attention": False}, "thumbnail_only=False"),
    ],
)
def test_features_of_another_encoder_are_refused(
    folder: Path, options: dict[str, Any], match: str
) -> None:
    data = dataset(config(), "features")
    step(model(config()), batches(data, [0])[0], 0)
    with pytest.raises(ValueError, match=match):
        model(config(**options))(batches(data, [0])[0])


def test_other_weights_tilings_and_precisions_are_refused(folder: Path) -> None:
    data = dataset(config(), "features")
    network = model(config())
    step(network, batches(data, [0])[0], 0)
    with pytest.raises(ValueError, match="made with pad_to_square=False"):
        dataset(config(**{"train_dataloader.dataset.pad_image_to_square": True}), "features")
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="dtype='float32', this run has dtype='bfloat16'"),
    ):
        network(batches(data, [0])[0])
    other = model(config())
    next(other.visual_encoder.parameters()).data.add_(1e-3)
    with pytest.raises(ValueError, match="made with weights="):
        other(batches(data, [0])[0])
    random = model(config())
    random.visual_encoder.config.attention_dropout = 0.1
    with pytest.raises(ValueError, match="drops out 10%"):
        random(batches(data, [0])[0])


def test_images_that_change_from_epoch_to_epoch_are_refused(folder: Path) -> None:
    class Flipped(LLaVADataset):
        def load_image(self, name: str) -> Any:
            return super().load_image(name).transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    settings = {k: v for k, v in config().train_dataloader.dataset.items() if k != "type"}
    with pytest.raises(ValueError, match="Flipped has its own load_image"):
        Flipped(**settings, feature_cache="features")


def test_size_is_said_before_it_is_written_and_must_fit(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config()
    network, data = model(cfg), dataset(cfg, "features")
    said = describe(network, data)
    tiles = sum(number for _, number in data.cached_images())
    assert said.startswith(f"10 images, {tiles} tiles") and "0.00 GiB are stored" in said
    order = list(range(10))
    for batch in batches(data, order):
        step(network, batch, 0)
    written = [load_file(file)["tiles"] for file in Path("features").glob("*/*.safetensors")]
    assert sum(map(len, written)) == tiles
    shutil.rmtree("features/" + next(p.name for p in Path("features").iterdir() if p.is_dir()))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("pallava.feature_cache.shutil", SimpleNamespace(
        disk_usage=lambda folder: usage(10, 9, 1)))  # fmt: skip
    with pytest.raises(ValueError, match=r"10 images need .* GiB are free"):
        describe(network, data)


def test_settings_of_a_folder_are_readable(folder: Path) -> None:
    data = dataset(config(), "features")
    step(model(config()), batches(data, [0])[0], 0)
    encoder = json.loads(Path("features/encoder.json").read_text())
    assert encoder["layer"] == -2 and len(encoder["weights"]) == 64
    assert isinstance(data[0]["pixel_values"][0], CachedImage)
