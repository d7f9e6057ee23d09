"""Every config is read, and every class it names exists."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from xtuner_add.paths import configs_dir, own_configs

CONFIGS = own_configs()


def test_names_are_unique() -> None:
    """A bare name must mean one file."""
    stems = [path.stem for path in configs_dir().rglob("*.py") if path.parent.name != "_base_"]
    assert {name for name, count in Counter(stems).items() if count > 1} == set()
    assert set(stems) == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_read_and_names_what_exists(name: str) -> None:
    from pallava.engine.runtime import prepare_host

    prepare_host()
    from mmengine.config import Config

    config = Config.fromfile(CONFIGS[name])
    resolved = list(walk(config))
    assert resolved
    assert config.get("model") is not None
    assert config.filename == str(CONFIGS[name])


def walk(node: Any) -> Any:
    """Yield every leaf; reading a lazy object imports the module it names."""
    if hasattr(node, "items"):
        for _, value in node.items():
            yield from walk(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from walk(value)
    else:
        yield node


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.endswith("_tiny")])
def test_tiny_twin_belongs_to_a_full_config(name: str) -> None:
    assert name.removesuffix("_tiny") in CONFIGS
    assert Path(CONFIGS[name]).parent == CONFIGS[name.removesuffix("_tiny")].parent
