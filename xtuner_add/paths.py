"""Locates configs and resolves config names to files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pathcore.extras import install_line
from pathcore.names import UnknownNameError, did_you_mean


class UnknownConfigError(FileNotFoundError, UnknownNameError):
    """Raised if a config is neither a file nor a name."""


def configs_dir() -> Path:
    """Returns the folder of this project's configs, in an installation or in a checkout.

    Raises:
        FileNotFoundError: If neither exists, which means that the installation is damaged.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "configs", package.parent / "configs")
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(
        f"no configs folder at {candidates[0]} or {candidates[1]}: reinstall xtuner-add"
    )


def xtuner_dir() -> Path:
    """Returns the folder of the installed XTuner, without importing it.

    Raises:
        FileNotFoundError: If XTuner is not installed.
    """
    spec = importlib.util.find_spec("xtuner")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"XTuner is not installed in this environment. Install it with: "
            f"{install_line('xtuner')}"
        )
    return Path(spec.submodule_search_locations[0])


def own_configs() -> dict[str, Path]:
    """Returns this project's configs by name (file name without `.py`)."""
    return {
        path.stem: path
        for path in sorted(configs_dir().rglob("*.py"))
        if not any(part.startswith(("_", ".")) for part in path.relative_to(configs_dir()).parts)
    }


def xtuner_configs() -> dict[str, Path]:
    """Returns XTuner's own configs by name (file name without `.py`)."""
    root = xtuner_dir() / "configs"
    return {path.stem: path for path in sorted(root.rglob("*.py")) if path.name[0] not in "_."}


def find_yaml(what: str, name: str, folder: str, pattern: str = "*.yml") -> Path:
    """Resolves a YAML file, given as a path or as a name in a folder of `configs/`.

    Raises:
        FileNotFoundError: If it is neither; the message suggests similar names.
    """
    if Path(name).is_file():
        return Path(name)
    known = {path.stem: path for path in (configs_dir() / folder).glob(pattern)}
    if name not in known:
        raise FileNotFoundError(
            f"{what} {name}: neither a file nor a known name{did_you_mean(name, known)}"
        )
    return known[name]


def find_config(name: str) -> Path:
    """Resolves a config argument to a file.

    The path of an existing file is returned unchanged. A name, with or without `.py`, is looked up
    among this project's configs and then among XTuner's.

    Raises:
        UnknownConfigError: If there is no such config; the message suggests similar names.
        FileNotFoundError: If it is none of ours, and XTuner is not installed.
    """
    path = Path(name)
    if path.is_file():
        return path
    stem = path.name.removesuffix(".py")
    configs = own_configs()
    if len(path.parts) == 1 and stem not in configs:
        configs |= xtuner_configs()  # only now: CITE's configs need no XTuner
    if len(path.parts) == 1 and stem in configs:
        return configs[stem]
    raise UnknownConfigError(
        f"config {name!r} is neither a file nor one that `xtuner-add list-cfg` lists"
        f"{did_you_mean(stem, configs)}"
    )
