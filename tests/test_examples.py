"""Every example in a docstring of the packages runs as printed."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("pathcore", "wsi", "pathgen", "gigapath", "cite", "pallava", "xtuner_add")
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert not doctest.testmod(importlib.import_module(name)).failed


def test_every_package_shows_examples() -> None:
    assert {name.split(".")[0] for name in MODULES} >= set(PACKAGES) - {"xtuner_add"}
