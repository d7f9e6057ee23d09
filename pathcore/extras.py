"""Finds the extra of `xtuner-add` that installs a missing package."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

DISTRIBUTION = "xtuner-add"
# Distributions whose names are not those of their modules. What is not installed cannot be asked.
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "mim": "openmim",
    "mmcv": "mmcv-lite",
    "multipart": "python-multipart",
    "open_clip": "open-clip-torch",
    "open_clip_train": "open-clip-torch",
    "openslide": "openslide-python",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "starlette": "fastapi",
    "markupsafe": "jinja2",
    "yaml": "pyyaml",
}
NOT_FOR_USERS = ("all", "dev", "docs")
OURS = ("cite", "gigapath", "pallava", "pathcore", "pathgen", "wsi", "xtuner_add")


class MissingPackageError(ModuleNotFoundError):
    """A package is not installed; the message says what needs it and how to install it."""


def install_line(module: str, extras: str = "") -> str:
    """Returns the command that installs a missing package.

    Args:
        module: Its module.
        extras: Extras of what needs it, separated by commas. They are named if one of them brings
            the package, or if the requirements are not known; otherwise the first extra that does.

    Example:
        >>> install_line("lifelines", "gigapath")
        'pip install "xtuner-add[gigapath]"'
        >>> install_line("open_clip.factory", "gigapath")
        'pip install "xtuner-add[convert]"'
        >>> install_line("xtuner")
        'pip install "xtuner-add[train]" && xtuner-add setup-host'
        >>> install_line("flash_attn")
        'pip install flash-attn'
    """
    module = module.partition(".")[0]
    if module == "xtuner":
        return f'pip install "{DISTRIBUTION}[train]" && xtuner-add setup-host'
    distribution = distribution_of(module)
    brings = _extras_by_distribution().get(distribution, [])
    if brings and not set(brings) & set(extras.split(",")):
        extras = brings[0]
    elif not brings and (_extras_by_distribution() or not extras):
        return f"pip install {distribution}"
    return f'pip install "{DISTRIBUTION}[{extras}]"'


def is_requirement(module: str) -> bool:
    """Returns whether a module belongs to a package that an extra installs."""
    module = module.partition(".")[0]
    return module == "xtuner" or distribution_of(module) in _extras_by_distribution()


def distribution_of(module: str) -> str:
    """Returns the name by which pip installs a module."""
    return _DISTRIBUTIONS.get(module, module.replace("_", "-"))


def missing_package(error: ModuleNotFoundError, what: str, extras: str) -> MissingPackageError:
    """Returns the error that says how to install what an import lacked.

    Args:
        error: The error of the import.
        what: What needs the package, for the message.
        extras: As for `install_line`.

    Raises:
        ModuleNotFoundError: `error`, if the module is one of this project: a fault of ours.
    """
    module = (error.name or "").partition(".")[0]
    if not module or module in OURS:
        raise error
    line = install_line(module, extras)
    text = f"{what} needs {module}, which is not installed. Install it with: {line}"
    return MissingPackageError(text, name=module)


@contextmanager
def says_extra(what: str, extras: str) -> Iterator[None]:
    """Raises a `missing_package` in place of the error of an import; also a decorator."""
    try:
        yield
    except MissingPackageError:
        raise
    except ModuleNotFoundError as error:
        raise missing_package(error, what, extras) from error


@cache
def _extras_by_distribution() -> dict[str, list[str]]:
    """Returns the extras that require each distribution, in the order of their declaration."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        metadata = importlib.metadata.metadata(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return {}
    found: dict[str, list[str]] = {}
    for line in map(Requirement, metadata.get_all("Requires-Dist") or ()):
        for extra in metadata.get_all("Provides-Extra") or ():
            marker = line.marker
            if marker and "extra" in str(marker) and marker.evaluate({"extra": extra}):
                found.setdefault(canonicalize_name(line.name), []).append(extra)
    # `all`, and those for development, are no answer to what is missing.
    return {
        name: kept
        for name, names in found.items()
        if (kept := [n for n in names if n not in NOT_FOR_USERS])
    }
