"""Reads configs of classifiers, which are user code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from pathcore import config_file
from pathcore.files import StrPath
from pathcore.names import WrongArgumentError


def read_config(file: StrPath, options: Mapping[str, Any] | None = None) -> Config:
    """Reads the config of a classifier, see `pathcore.config_file.read_config`.

    Raises:
        WrongArgumentError: If the config cannot be read or has no `model`, or a setting
            cannot be applied.
    """
    cfg: Config = config_file.read_config(Config.fromfile, file, options)
    if not isinstance(cfg.get("model"), Mapping):
        raise WrongArgumentError(f"config {file}: expected `model`, the settings of a classifier")
    return cfg
