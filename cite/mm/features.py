"""Training on precomputed features of a frozen encoder.

In the config of a linear or zero-shot baseline, `PrecomputedFeatures` replaces the backbone,
`FeatureDataPreprocessor` the data preprocessor and `CachedFeatureDataset` the data set. `xtuner-add
cite-features` writes the file. Head and optimizer remain the same.
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
    """Precomputed features of the patches in an annotation file; images are not needed.

    A file of features can be used for all splits whose patches it contains.

    Args:
        feature_file: File of `xtuner-add cite-features`, relative to `data_root`.
        ann_file: Annotation file with lines `filename label`; by default all patches of the feature
            file, with their labels.
        **kwargs: Arguments of `PatchDataset`; `classes` are by default those of the feature file.

    Raises:
        FileNotFoundError: If a file does not exist.
        ValueError: If a patch has no features, or labels disagree.
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
        """Reads the annotation file; without one, returns all patches of the feature file."""
        if self.ann_file and not os.path.isdir(self.ann_file):
            return super().load_data_list()
        samples = [
            self._sample(patch, number)
            for number, patch in enumerate(
                zip(self.cache.names, self.cache.labels.tolist(), strict=True), 1
            )
        ]
        return self._without_missing(samples)

    def prepare_data(self, idx: int) -> dict[str, Any]:
        """Returns `inputs` `(embed_dim,)` and `data_samples`."""
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
    """Backbone that returns its input, which are precomputed features.

    Args:
        embed_dim: Width of the features.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.embed_dim = embed_dim

    def forward(self, features: Tensor) -> tuple[Tensor]:
        """Returns float32 features `(batch, embed_dim)` as a tuple of one element.

        Raises:
            ValueError: If features have another shape.
        """
        if features.dim() != 2 or features.shape[1] != self.embed_dim:
            raise ValueError(
                f"PrecomputedFeatures: expected features of shape (batch, {self.embed_dim}), found "
                f"{tuple(features.shape)}; embed_dim must be that of the feature file"
            )
        return (features.float(),)


@MODELS.register_module()
class FeatureDataPreprocessor(BaseDataPreprocessor):
    """Stacks features and moves them to the device.

    Args:
        batch_augments: Name under which MMPreTrain passes its `train_cfg`; must be empty.
        **kwargs: Arguments of MMEngine's `BaseDataPreprocessor`.

    Raises:
        ValueError: If batches are to be augmented, which needs images.
    """

    def __init__(self, batch_augments: Any = None, **kwargs: Any) -> None:
        if batch_augments:
            raise ValueError(f"train_cfg {batch_augments}: features of images cannot be augmented")
        super().__init__(**kwargs)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Prepares a batch as the data loader collates it."""
        data = dict(self.cast_data(data))
        if isinstance(data["inputs"], (list, tuple)):
            data["inputs"] = torch.stack(list(data["inputs"]))
        return data
