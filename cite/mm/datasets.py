"""Data sets of patches, from annotation files with a line `filename label` per patch."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from cite.mm.published import published_arguments
from cite.splits import Patch, read_patches, slide_id

GASTRIC_CLASSES = (
    "Well differentiated tubular adenocarcinoma",
    "Moderately differentiated tubular adenocarcinoma",
    "Poorly differentiated adenocarcinoma",
)
"""Classes of the published task, in the order of their labels; also used as texts."""


@DATASETS.register_module()
@published_arguments(
    {
        "patch_balance": "sampler=dict(type='PatchBalancedSampler') of the data loader",
        "slide_balance": "sampler=dict(type='SlideBalancedSampler') of the data loader",
    }
)
class PatchDataset(BaseDataset):
    """Labelled patches, from an annotation file of lines `filename label`.

    File names may contain spaces and folders; the label follows the last space. A sample is a dict
    of `img_path`, `gt_label`, `slide` (if there are slides), `ann_file` and `ann_line`.

    Args:
        ann_file: The annotation file, relative to `data_root`.
        classes: Names of the classes, in the order of their labels.
        data_root: Folder to which other paths are relative.
        data_prefix: Folder of the patches, as a string or `dict(img_path=...)`.
        slide_pattern: Regular expression whose first group is the slide id in a file name; `_` for
            the published rule, the name up to the first `_`; None for patches without slides.
        every_class: Whether each class must have a patch; by default only if not `test_mode`.
        max_missing: Fraction of images that may be missing. They are skipped, recorded in `missing`
            and reported by `MissingPatchesHook`. By default none may be missing.
        **kwargs: Further arguments of MMEngine's `BaseDataset`.

    Raises:
        FileNotFoundError: If annotation file or folder do not exist, or too many images are
            missing.
        ValueError: If a line is invalid. The message names file and line.
    """

    METAINFO: dict[str, Any] = {}

    def __init__(
        self,
        ann_file: str,
        classes: Sequence[str] | None = None,
        data_root: str = "",
        data_prefix: str | dict[str, str] = "",
        slide_pattern: str | None = "_",
        every_class: bool | None = None,
        max_missing: float = 0.0,
        **kwargs: Any,
    ) -> None:
        if isinstance(data_prefix, str):
            data_prefix = {"img_path": data_prefix}
        metainfo = dict(kwargs.pop("metainfo", None) or {})
        if classes is not None:
            metainfo["classes"] = tuple(classes)
        if not {**self.METAINFO, **metainfo}.get("classes"):
            raise ValueError(
                f"{type(self).__name__} of {ann_file}: no classes; name them in the order of their "
                "labels, as classes=['normal', 'tumour']"
            )
        self.slide_pattern = slide_pattern
        self.every_class = not kwargs.get("test_mode") if every_class is None else every_class
        self.max_missing = max_missing
        self.missing: list[str] = []
        super().__init__(
            ann_file=ann_file,
            metainfo=metainfo,
            data_root=data_root,
            data_prefix=data_prefix,
            **kwargs,
        )

    @property
    def CLASSES(self) -> tuple[str, ...]:
        """Names of the classes, under the name that MMClassification 1.0.0rc uses."""
        return tuple(self.metainfo["classes"])

    def load_data_list(self) -> list[dict[str, Any]]:
        """Reads and checks the annotation file."""
        samples = []
        seen: dict[str, dict[str, Any]] = {}
        counts: Counter[str] = Counter()
        for number, patch in read_patches(self.ann_file):
            sample = self._sample(patch, number)
            slide = sample.get("slide")
            first = seen.setdefault(slide, sample) if slide is not None else sample
            if first["gt_label"] != sample["gt_label"]:
                raise ValueError(
                    f"{self.ann_file}:{number}: slide {slide} has label {sample['gt_label']} here "
                    f"and {first['gt_label']} in line {first['ann_line']}"
                )
            samples.append(sample)
            counts[sample["img_path"]] += 1
        if repeated := [path for path, count in counts.items() if count > 1]:
            print_log(
                f"{self.ann_file}: {len(repeated)} patches are listed more than once and count as "
                f"often, for instance {repeated[0]}",
                logger="current",
                level=logging.WARNING,
            )
        if not samples:
            raise ValueError(f"{self.ann_file}: no lines; expected `filename label` in each")
        samples = self._without_missing(samples)
        self._check_classes(samples)
        return samples

    def prepare_data(self, idx: int) -> Any:
        """Runs the pipeline on a sample; passes on the number of its draw if the sampler set it."""
        sample = self.get_data_info(idx)
        sample["draw"] = getattr(idx, "number", None)
        return self.pipeline(sample)

    def __getitem__(self, idx: int) -> Any:
        # MMEngine's method draws another sample if the pipeline returns None; ours raises instead.
        if not self._fully_initialized:
            self.full_init()
        return self.prepare_data(idx)

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Returns the dict of a sample; negative indices count from the end."""
        info: dict[str, Any] = super().get_data_info(int(idx))
        return info

    def get_gt_labels(self) -> list[int]:
        """Returns the labels of all patches."""
        return [int(self.get_data_info(i)["gt_label"]) for i in range(len(self))]

    def get_cat_ids(self, idx: int) -> list[int]:
        """Returns the label of one patch, for MMEngine's `ClassBalancedDataset`."""
        return [int(self.get_data_info(idx)["gt_label"])]

    def _sample(self, patch: Patch, number: int) -> dict[str, Any]:
        place, (name, label) = f"{self.ann_file}:{number}", patch
        num_classes = len(self.metainfo["classes"])
        if not 0 <= label < num_classes:  # features may be stored without labels, as -1
            raise ValueError(
                f"{place}: label {label} of {name}; expected 0 to {num_classes - 1}, for the "
                f"classes {', '.join(self.metainfo['classes'])}"
            )
        prefix = self.data_prefix["img_path"]
        if os.path.isabs(name) or ".." in Path(name).parts:
            raise ValueError(f"{place}: {name} leaves the folder of patches ({prefix})")
        sample: dict[str, Any] = {
            "img_path": os.path.join(prefix, name),
            "gt_label": label,
            "ann_file": self.ann_file,
            "ann_line": number,
        }
        if self.slide_pattern is not None:
            sample["slide"] = self._find_slide(name, place)
        return sample

    def _find_slide(self, name: str, place: str) -> str:
        if self.slide_pattern == "_":
            try:
                return slide_id(name)
            except ValueError as error:
                raise ValueError(
                    f"{place}: {error}. Patches without slides: slide_pattern=None"
                ) from error
        match = re.search(str(self.slide_pattern), name)
        if match is None or not match.groups() or not match.group(1):
            raise ValueError(
                f"{place}: patch name {name!r} holds no slide id; expected a match of the pattern "
                f"{self.slide_pattern!r} with the id in its first group"
            )
        return match.group(1)

    def _without_missing(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        folder = self.data_prefix["img_path"] or "."
        if not os.path.isdir(folder):
            raise FileNotFoundError(
                f"{folder}: no such folder of patches, for {self.ann_file}; check data_root and "
                "data_prefix"
            )
        there = _Listing()
        missing = [sample for sample in samples if sample["img_path"] not in there]
        if not missing:
            return samples
        first = missing[0]
        message = (
            f"{first['ann_file']}:{first['ann_line']}: no image {first['img_path']}; "
            f"{len(missing)} of {len(samples)} images are missing"
        )
        if len(missing) > self.max_missing * len(samples):
            raise FileNotFoundError(
                f"{message}. Unpack them, write the annotation file again, or "
                "allow a fraction of them with max_missing"
            )
        self.missing = [f"{s['ann_file']}:{s['ann_line']}: {s['img_path']}" for s in missing]
        print_log(f"{message}: skipped", logger="current", level=logging.WARNING)
        gone = {id(sample) for sample in missing}
        return [sample for sample in samples if id(sample) not in gone]

    def _check_classes(self, samples: list[dict[str, Any]]) -> None:
        if not self.every_class:
            return
        present = {sample["gt_label"] for sample in samples}
        for label, name in enumerate(self.metainfo["classes"]):
            if label not in present:
                thing = "patch" if self.slide_pattern is None else "slide"
                raise ValueError(
                    f"{self.ann_file}: class {label} ({name}) has no {thing} among its "
                    f"{len(samples)} lines; add one, or set every_class=False"
                )


@DATASETS.register_module()
class PatchGastric(PatchDataset):
    """The published task with three classes of PatchGastric; `tools/ann.py` writes its files.

    Also registered under the published name `PatchGastricCls3`. Balanced sampling, an option of the
    published data set, is done by `PatchBalancedSampler` and `SlideBalancedSampler`.
    """

    METAINFO = {"classes": GASTRIC_CLASSES}


DATASETS.register_module(name="PatchGastricCls3", module=PatchGastric)


class _Listing:
    """Set of existing files; lists each folder once, which is faster than checking each file."""

    def __init__(self) -> None:
        self._folders: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._folders:
            exists = os.path.isdir(folder or ".")
            self._folders[folder] = set(os.listdir(folder or ".")) if exists else set()
        return name in self._folders[folder]
