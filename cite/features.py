"""Stores features of many images in one file, written in parts so that a run can be resumed.

Shapes: N images, E features.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathcore.files import StrPath, atomic_file, read_json, write_json

_KEY = "cite"
_MADE_BY = ("encoder", "backbone", "preprocessing", "pipeline", "checkpoint")
"""Fields of the header that determine the values."""


@dataclass(frozen=True)
class Features:
    """Features of images.

    Attributes:
        names: Names of the images, relative to their folder.
        features: `(N, E)`.
        labels: int64 `(N,)`; -1 for images without label.
        header: Origin of the features, as JSON values; `skipped` lists images that could not be
            read.
        source: Name of the file, for error messages.
    """

    names: tuple[str, ...]
    features: Tensor
    labels: Tensor
    header: Mapping[str, Any] = field(default_factory=dict)
    source: str = "features"

    @property
    def origin(self) -> str:
        """Encoder and digest of everything that determines the values, such as `uni2-h 3f0c1a9b`.

        Empty for files that do not state their origin.
        """
        made_by = {key: self.header.get(key) for key in _MADE_BY}
        backbone, encoder = made_by["backbone"], made_by["encoder"] or {}
        if not backbone:
            return ""
        if encoder.get("digest"):  # the same weights may be elsewhere
            made_by["backbone"] = {k: v for k, v in backbone.items() if k != "checkpoint"}
            made_by = _without_places(made_by) | {"digest": encoder["digest"]}
        text = json.dumps(made_by, sort_keys=True).encode()
        name = encoder.get("encoder") or backbone.get("type")
        return f"{name} {hashlib.sha256(text).hexdigest()[:12]}"

    def rows(self) -> dict[str, int]:
        """Returns the row of each image by name."""
        return {name: row for row, name in enumerate(self.names)}


def _without_places(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_places(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {k: _without_places(v) for k, v in value.items() if k != "encoder"}


class FeatureWriter:
    """Writes parts to the folder `OUT.partial` and joins them at the end.

    Args:
        out: The safetensors file to write.
        header: Origin of the features, as JSON values; parts of an earlier run with another header
            are deleted.
    """

    def __init__(self, out: StrPath, header: Mapping[str, Any]) -> None:
        self.out = Path(out)
        self.folder = self.out.with_name(f"{self.out.name}.partial")
        self.header = json.loads(json.dumps(header))
        self.parts: list[dict[str, Any]] = []
        state = self.folder / "state.json"
        if state.is_file() and read_json(state, what="state") == self.header:
            while (part := self._path(len(self.parts), "json")).is_file():
                self.parts.append(read_json(part, what="part"))
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(state, self.header)

    @property
    def num_done(self) -> int:
        """Number of images at the start of the dataset that are already processed."""
        return sum(len(part["names"]) + len(part["skipped"]) for part in self.parts)

    def write_part(
        self, names: Iterable[str], features: Tensor, labels: Tensor, skipped: Iterable[str] = ()
    ) -> None:
        """Writes the next images of the dataset as a part.

        Args:
            names: Names of the images.
            features: `(len(names), E)`.
            labels: int64 `(len(names),)`.
            skipped: Messages for images that could not be read.

        Raises:
            ValueError: If features are not finite.
        """
        from safetensors.torch import save_file

        number, names = len(self.parts), list(names)
        finite = torch.isfinite(features).all(dim=1)
        if not finite.all():
            raise ValueError(
                f"{self.out}: features of {names[int(finite.int().argmin())]} are not finite; "
                "check the weights of the backbone, and its precision"
            )
        with atomic_file(self._path(number, "safetensors")) as partial:
            save_file({"features": features.cpu().contiguous(), "labels": labels}, partial)
        # The JSON file is written last and marks the part as complete.
        part = {"names": names, "skipped": list(skipped)}
        write_json(self._path(number, "json"), part)
        self.parts.append(part)

    def finish(self) -> list[str]:
        """Joins the parts into the file and removes them.

        Returns:
            Messages for skipped images.

        Raises:
            ValueError: If no image could be read.
        """
        from safetensors.torch import load_file, save_file

        names = [name for part in self.parts for name in part["names"]]
        skipped = [line for part in self.parts for line in part["skipped"]]
        if not names:
            shutil.rmtree(self.folder)
            raise ValueError(
                f"{self.out}: no image could be read: {(skipped or ['none given'])[0]}"
            )
        parts = [load_file(self._path(i, "safetensors")) for i in range(len(self.parts))]
        tensors = {key: torch.cat([part[key] for part in parts]) for key in ("features", "labels")}
        header = {**self.header, "names": names, "skipped": skipped}
        with atomic_file(self.out) as partial:
            save_file(tensors, partial, metadata={_KEY: json.dumps(header, ensure_ascii=False)})
        shutil.rmtree(self.folder)
        return skipped

    def _path(self, number: int, suffix: str) -> Path:
        return self.folder / f"{number:06d}.{suffix}"


def read_features(path: StrPath) -> Features:
    """Reads a file that `FeatureWriter` wrote.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"features {path}: no such file; `xtuner-add cite-features` writes it"
        )
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            features, labels = file.get_tensor("features"), file.get_tensor("labels")
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"features {path}: not a file of `xtuner-add cite-features` ({error})"
        ) from error
    names = tuple(header.pop("names"))
    return Features(names, features, labels, header, str(path))
