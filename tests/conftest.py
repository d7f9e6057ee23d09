"""Fixtures of all tests."""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

# Before huggingface_hub is imported: where there is no network, it would wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples in every run, so that a change is judged by what it changes. For new ones:
# HYPOTHESIS_PROFILE=explore
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets pools fork although libraries of other tests have left threads behind.

    A spawned worker would import everything anew, seconds for each call, and know neither the
    functions of a test module nor what the test has patched. Tests of spawning patch it back.
    """
    if sys.platform == "linux":
        context = multiprocessing.get_context("fork")
        monkeypatch.setattr("pathcore.pool._context", lambda: context)


def build_wheel(folder: Path) -> Path:
    """Builds the wheel of this tree below a folder, from a copy with new times of its files.

    A build leaves files in its source, and takes up those of an older build.
    """
    source = folder / "source"
    ignore = shutil.ignore_patterns(
        ".*", "build", "dist", "work_dirs", "*.egg-info", "__pycache__", "golden"
    )
    root = Path(__file__).parents[1]
    shutil.copytree(root, source, ignore=ignore, copy_function=shutil.copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run(
        [*command, str(source)],
        check=True,
        capture_output=True,
        env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"},
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def pytest_collection_finish() -> None:
    """Exempts what all imports have created from garbage collection.

    Collections would search these million objects again and again, half a second each time;
    transformers and MMEngine also collect explicitly.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts files with many slow tests first.

    Workers take whole files (`--dist loadfile`): one with minutes of tests that begins last would
    leave the others idle.
    """
    num_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -num_slow[item.path])
