from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallava.registry import CONNECTORS, ENCODERS, Registry


def test_registers_and_returns_what_was_given() -> None:
    registry = Registry("colour")

    @registry.register("eosin")
    class Eosin:
        pass

    assert registry.get("eosin") is Eosin
    assert registry.origins()["eosin"].endswith("Eosin")
    assert "eosin" in registry
    assert "alcian blue" not in registry


def test_unknown_name_is_an_error_that_names_the_nearest() -> None:
    registry = Registry("colour")
    registry.register("haematoxylin")(object)
    with pytest.raises(
        ValueError, match=r"unknown colour 'hematoxylin'; did you mean haematoxylin"
    ):
        registry.get("hematoxylin")


def test_name_cannot_be_taken_twice_unless_asked() -> None:
    registry = Registry("colour")
    registry.register("eosin")(int)
    registry.register("eosin")(int)  # the same thing again, as when a module is reloaded
    with pytest.raises(ValueError, match=r"'eosin' is registered by builtins:int.*replace=True"):
        registry.register("eosin")(float)
    registry.register("eosin", replace=True)(float)
    assert registry.get("eosin") is float


@pytest.mark.parametrize("name", ["", " eosin", "eosin\n"])
def test_name_must_be_typeable(name: str) -> None:
    with pytest.raises(ValueError, match="empty or padded"):
        Registry("colour").register(name)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.integers(), max_size=8))
def test_names_are_sorted_and_complete(entries: dict[str, int]) -> None:
    registry = Registry("number")
    for name, value in entries.items():
        registry.register(name)(value)
    assert registry.names() == sorted(entries)
    assert {name: registry.get(name) for name in entries} == entries


def test_built_in_modules_are_imported_only_when_a_name_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_colours.py").write_text(
        "from pallava import registry\nregistry.LATE.register('late')(str)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry("colour", builtin_modules=("late_colours",))
    monkeypatch.setattr("pallava.registry.LATE", registry, raising=False)
    registry.register("early")(int)
    assert registry.get("early") is int
    assert "late_colours" not in sys.modules
    assert registry.get("late") is str


def test_built_in_parts_are_known_by_name() -> None:
    assert "plip" in ENCODERS
    assert CONNECTORS.get("qformer_mlp").__name__ == "ScaleInvariantConnector"


def _write_plugin(site: Path, name: str, entry_point: str, code: str) -> None:
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[xtuner_add.plugins]\n{entry_point}\n")
    (site / f"{name}.py").write_text(code)


def test_broken_plugin_is_reported_and_the_others_stay_usable(tmp_path: Path) -> None:
    _write_plugin(
        tmp_path, "broken_stain", "a_broken = broken_stain", "raise OSError('no licence')\n"
    )
    _write_plugin(
        tmp_path,
        "good_stain",
        "z_good = good_stain",
        "from pallava.registry import EVALUATIONS\nEVALUATIONS.register('stain')(len)\n",
    )
    code = (
        "from pallava.registry import EVALUATIONS, plugin_failures\n"
        "assert plugin_failures() == []\n"
        "assert EVALUATIONS.get('stain') is len\n"
        "print(*plugin_failures())\n"
        "EVALUATIONS.get('missing')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.strip() == "a_broken (broken_stain): OSError: no licence"
    assert "plug-in a_broken (broken_stain): OSError: no licence was skipped" in result.stderr
    assert "unknown evaluation 'missing'" in result.stderr
    assert "could not be loaded: a_broken" in result.stderr


def test_importing_the_registry_imports_no_plugin_and_nothing_heavy(tmp_path: Path) -> None:
    _write_plugin(
        tmp_path, "broken_stain", "broken = broken_stain", "raise SystemExit('imported')\n"
    )
    code = "import sys, pallava.registry; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "False"
