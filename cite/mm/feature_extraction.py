"""Computes the features of a data set with the backbone of a config."""

from __future__ import annotations

import copy
import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner.checkpoint import load_state_dict
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cite.features import FeatureWriter
from cite.mm.config_file import read_config
from pathcore.device_claims import choose_device
from pathcore.files import StrPath, folder_lock, sha256_of
from pathcore.weights import read_state_dict

SPLITS = ("train", "val", "test")


def extract_features(
    config: StrPath,
    out: StrPath,
    *,
    split: str = "train",
    checkpoint: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    part_size: int = 4096,
    device: str | None = None,
    cfg_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> list[str]:
    """Writes the features of all patches of a data set.

    Images of all splits go through the test pipeline of the config, without augmentation.

    Args:
        config: Config with a backbone of `cite.mm.backbones`.
        out: The safetensors file to write; a run that was killed continues in `OUT.partial`.
        split: `train`, `val` or `test`.
        checkpoint: Checkpoint of a classifier; required if the backbone was adapted.
        batch_size: Number of images per batch.
        num_workers: Number of processes that read images.
        part_size: Number of images after which a part is saved.
        device: Device; by default a GPU if there is one.
        cfg_options: Values that override the config, by dotted name.
        progress: Whether to show a progress bar.

    Returns:
        Messages for images that could not be read.

    Raises:
        ValueError: If the config has no such split, prompts are untrained, or no image could be
            read.
    """
    cfg = read_config(config, cfg_options)
    device = str(choose_device(device))
    dataset = build_dataset(cfg, split)
    backbone, preprocessor = _build_model(cfg, checkpoint, device)
    if checkpoint is None and getattr(backbone, "prompts", None) is not None:
        # With `token` initialisation, features would even depend on the first batch.
        raise ValueError(
            f"{config}: its backbone has prompts, which are untrained without a checkpoint; give "
            "checkpoint=, or set model.backbone.prompt_length=0"
        )
    lock = Path(out).with_name(f".{Path(out).name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(lock, folder=out):
        identity = getattr(getattr(backbone, "encoder", None), "identity", {})
        writer = FeatureWriter(out, _describe_inputs(cfg, split, dataset, checkpoint, identity))
        rest = _Readable(dataset, writer.num_done)
        loader = DataLoader(rest, batch_size, num_workers=num_workers, collate_fn=_keep)
        bar = tqdm(total=len(dataset), initial=writer.num_done, disable=not progress, unit="img")
        for batches in _in_parts(loader, part_size):
            rows = [torch.empty(0, backbone.embed_dim)]
            for batch in batches:
                if good := [item for item in batch if "inputs" in item]:
                    rows.append(encode_batch(backbone, preprocessor, good))
                bar.update(len(batch))
            items = [item for batch in batches for item in batch]
            _write_part(writer, items, torch.cat(rows))
        bar.close()
        return writer.finish()


def build_dataset(cfg: Config, split: str) -> Any:
    """Builds the dataset of a split with the test pipeline.

    Raises:
        ValueError: If the config has no such split.
    """
    if split not in SPLITS or cfg.get(f"{split}_dataloader") is None:
        raise ValueError(f"split {split!r}: expected one of {SPLITS} that the config has")
    prepare_registries(cfg)
    settings = copy.deepcopy(cfg[f"{split}_dataloader"].dataset)
    if "pipeline" in cfg.test_dataloader.dataset:  # precomputed features have none
        settings.pipeline = cfg.test_dataloader.dataset.pipeline
    return DATASETS.build(settings)


def prepare_registries(cfg: Config) -> None:
    """Imports the host library of a config and sets the default scope, as a runner would."""
    scope = cfg.get("default_scope", "mmcls")
    importlib.import_module(f"{scope}.models")
    importlib.import_module(f"{scope}.datasets")
    init_default_scope(scope)


def build_classifier(cfg: Config, checkpoint: str | None) -> Any:
    """Builds the classifier of a config in evaluation mode and loads a checkpoint strictly.

    Raises:
        CheckpointError: If the checkpoint cannot be read.
        ValueError: If the checkpoint does not fit.
    """
    prepare_registries(cfg)
    model = MODELS.build(cfg.model)
    if checkpoint is not None:
        try:
            load_state_dict(model, read_state_dict(checkpoint), strict=True)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint}: not a checkpoint of this config: {error}") from error
    return model.eval()


class _Readable(Dataset):  # type: ignore[type-arg]
    """Items of a data set from an index on; items that raise become `{"reason": message}`."""

    def __init__(self, dataset: Any, start: int) -> None:
        self.dataset, self.start = dataset, start

    def __len__(self) -> int:
        return len(self.dataset) - self.start

    def __getitem__(self, index: int) -> dict[str, Any]:
        info = self.dataset.get_data_info(index + self.start)
        prefix = self.dataset.data_prefix.get("img_path") or "."
        name = os.path.relpath(info["img_path"], prefix)
        try:
            item = self.dataset[index + self.start]
        except (OSError, ValueError) as error:
            return {"reason": f"{name}: {error}"}
        return {"name": name, "label": info.get("gt_label", -1), **item}


def _keep(batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return batch


def _in_parts(loader: Any, part_size: int) -> Iterator[list[list[dict[str, Any]]]]:
    part: list[list[dict[str, Any]]] = []
    count = 0
    for batch in loader:
        part.append(batch)
        count += len(batch)
        if count >= part_size:
            yield part
            part, count = [], 0
    if part:
        yield part


def _build_model(cfg: Config, checkpoint: str | None, device: str) -> tuple[Any, Any]:
    model = build_classifier(cfg, checkpoint).to(device)
    return model.backbone, model.data_preprocessor


@torch.no_grad()
def encode_batch(backbone: Any, preprocessor: Any, items: list[dict[str, Any]]) -> torch.Tensor:
    """Returns the features `(len(items), embed_dim)` of items of a data set, on the CPU."""
    batch = {key: [item[key] for item in items] for key in ("inputs", "data_samples")}
    features = backbone(preprocessor(batch, False)["inputs"])
    return features[-1].float().cpu()


def _write_part(writer: FeatureWriter, items: list[dict[str, Any]], features: torch.Tensor) -> None:
    good = [item for item in items if "inputs" in item]
    labels = torch.tensor([item["label"] for item in good], dtype=torch.int64)
    skipped = [item["reason"] for item in items if "reason" in item]
    writer.write_part([item["name"] for item in good], features, labels, skipped)


def _describe_inputs(
    cfg: Config, split: str, dataset: Any, checkpoint: str | None, identity: dict[str, str]
) -> dict[str, Any]:
    return {
        "encoder": identity,
        "split": split,
        "classes": list(dataset.metainfo.get("classes", ())),
        "backbone": _plain_config(cfg.model.backbone),
        "preprocessing": _plain_config(cfg.model.get("data_preprocessor", {})),
        "pipeline": _plain_config(cfg.test_dataloader.dataset.get("pipeline", [])),
        "annotations": sha256_of(dataset.ann_file) if os.path.isfile(dataset.ann_file) else "",
        "checkpoint": sha256_of(checkpoint) if checkpoint else "",
    }


def _plain_config(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
