"""Reads configs of MMEngine, which are user code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from pathcore.extras import is_requirement
from pathcore.files import StrPath
from pathcore.names import WrongArgumentError


def read_config(
    load: Callable[[str], Any],
    file: StrPath,
    options: Mapping[str, Any] | None = None,
    *,
    check: Callable[[Any], None] | None = None,
) -> Any:
    """Reads a config and applies settings that override it, as `--cfg-options`.

    Args:
        load: MMEngine's `Config.fromfile`, which this package does not import.
        file: The config.
        options: Values by dotted name.
        check: Called with the config before the settings are applied.

    Raises:
        ModuleNotFoundError: If the config needs a package that one of our extras installs.
        WrongArgumentError: If the config cannot be read, or a setting cannot be applied.
    """
    try:
        cfg = load(os.fspath(file))
    except Exception as error:  # a config can raise anything
        if isinstance(error, ModuleNotFoundError) and is_requirement(error.name or ""):
            raise  # the group of all commands says what to install
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise WrongArgumentError(
            f"config {file}{line}: cannot be read: {type(error).__name__}: {error}"
        ) from error
    if check is not None:
        check(cfg)
    try:
        cfg.merge_from_dict(dict(options or {}))
    except Exception as error:  # MMEngine raises KeyError, TypeError and its own for wrong paths
        raise WrongArgumentError(f"--cfg-options: {type(error).__name__}: {error}") from error
    return cfg
