"""The examples in docstrings of what users import run as printed."""

from __future__ import annotations

import doctest
import importlib

import pytest

MODULES = (
    "gigapath.classification_head",
    "gigapath.dilated_attention",
    "gigapath.finetune.mil",
    "gigapath.longnet",
    "gigapath.slide_encoder",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
