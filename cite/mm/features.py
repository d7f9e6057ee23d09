"""Training on features that the frozen encoder computed once.

In a config of a linear or zero-shot baseline, `PrecomputedFeatures` takes the place of the
backbone, `FeatureDataPreprocessor` that of the data preprocessor, and `CachedFeatureDataset` that
of the dataset; xtuner-add cite-features makes the file. Head and optimizer stay as they are.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DATASETS, MODELS
from torch import Tensor, nn

from cite.features import Features, read_features
from cite.mm.datasets import PatchDataset
from cite.mm.samples import new_sample
from cite.mm.transforms import default_host

_META_KEYS = ("sample_idx", "img_path", "slide")


@DATASETS.register_module()
class CachedFeatureDataset(PatchDataset):
    """The features of the patches that an annotation file names; the images are not needed.

    One file of features serves every split whose patches are in it.

    Args:
        feature_file: File of xtuner-add cite-features, relative to `data_root`.
        ann_file: Lines `filename label`; without it, all patches of the features with their labels.
        **kwargs: As for `PatchDataset`; `classes` are by default those of the feature file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A patch that has no features, or labels that disagree.
    """

    def __init__(self, feature_file: str, ann_file: str = "", **kwargs: Any) -> None:
        root = kwargs.get("data_root", "")
        if root and not os.path.isabs(feature_file):
            feature_file = os.path.join(root, feature_file)
        self.cache: Features = read_features(feature_file)
        self.host = default_host()
        kwargs.setdefault("classes", self.cache.header.get("classes"))
        super().__init__(ann_file=ann_file, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Reads the annotation file, or takes every patch of the features."""
        if self.ann_file and not os.path.isdir(self.ann_file):
            return super().load_data_list()
        samples = [
            self._parse_line(f"{name} {label}", line)
            for line, (name, label) in enumerate(
                zip(self.cache.names, self.cache.labels.tolist(), strict=True), 1
            )
        ]
        return self._without_missing(samples)

    def prepare_data(self, idx: int) -> dict[str, Any]:
        """Returns `inputs`, `(embed_dim,)`, and `data_samples`."""
        info = self.get_data_info(idx)
        sample = new_sample(self.host)
        sample.set_gt_label(info["gt_label"])
        sample.set_metainfo({key: info[key] for key in _META_KEYS if key in info})
        return {"inputs": self.cache.features[info["row"]], "data_samples": sample}

    def _without_missing(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = self.cache.rows()
        prefix = self.data_prefix["img_path"] or "."
        for sample in samples:
            name = os.path.relpath(sample["img_path"], prefix)
            if name not in rows:
                raise ValueError(
                    f"{sample['ann_file']}:{sample['ann_line']}: no features of {name} in "
                    f"{self.cache.source}, which has {len(rows)} patches; extract them from the "
                    "dataset that this file belongs to"
                )
            sample["row"] = rows[name]
            label = int(self.cache.labels[sample["row"]])
            if label not in (-1, sample["gt_label"]):
                raise ValueError(
                    f"{sample['ann_file']}:{sample['ann_line']}: label {sample['gt_label']} of "
                    f"{name}, but {label} in {self.cache.source}"
                )
        return samples


@MODELS.register_module()
class PrecomputedFeatures(nn.Module):
    """Stands where the encoder was: passes features on.

    Args:
        embed_dim: Their width.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim

    def forward(self, features: Tensor) -> tuple[Tensor]:
        """Returns features `(batch, embed_dim)` in fp32 as a tuple of one.

        Raises:
            ValueError: Features of another width.
        """
        if features.dim() != 2 or features.shape[1] != self.embed_dim:
            raise ValueError(
                f"PrecomputedFeatures: features of shape {tuple(features.shape)} arrive, "
                f"(batch, {self.embed_dim}) expected; embed_dim must be that of the feature file"
            )
        return (features.float(),)


@MODELS.register_module()
class FeatureDataPreprocessor(BaseDataPreprocessor):
    """Stacks features and moves them to the device.

    Args:
        batch_augments: MMPreTrain hands its `train_cfg` on under this name; none is possible.
        **kwargs: As for MMEngine's `BaseDataPreprocessor`.

    Raises:
        ValueError: Images would have to be mixed, of which there are features only.
    """

    def __init__(self, batch_augments: Any = None, **kwargs: Any) -> None:
        if batch_augments:
            raise ValueError(f"train_cfg {batch_augments}: features of images cannot be augmented")
        super().__init__(**kwargs)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Takes a batch as the dataloader collates it."""
        data = dict(self.cast_data(data))
        if isinstance(data["inputs"], (list, tuple)):
            data["inputs"] = torch.stack(list(data["inputs"]))
        return data
