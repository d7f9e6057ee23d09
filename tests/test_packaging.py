"""The wheel contains what users need without a checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import build_wheel

ROOT = Path(__file__).parents[1]
OURS = {"xtuner_add", "pallava", "cite", "wsi", "pathgen", "gigapath", "pathcore"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_top_level_holds_our_packages_only(members: set[str]) -> None:
    top = {member.split("/")[0] for member in members}
    packages = {name for name in top if not name.endswith(".dist-info")}
    assert {"xtuner_add", "pallava"} <= packages <= OURS


def test_every_package_says_that_it_is_typed(members: set[str]) -> None:
    assert {f"{package}/py.typed" for package in OURS} <= members


def test_version_and_date_of_the_release_are_the_same_everywhere(wheel: Path) -> None:
    from xtuner_add import __version__

    assert f"-{__version__}-" in wheel.name
    assert __version__ not in (ROOT / "setup.py").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    cited = dict(re.findall(r"^(version|date-released): (.+)$", citation, flags=re.MULTILINE))
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (.+)$", changes, flags=re.MULTILINE)
    assert cited["version"] == __version__
    assert sections[:2] == ["[Unreleased]", f"[{__version__}] - {cited['date-released']}"]


def test_every_config_is_shipped_inside_xtuner_add(members: set[str]) -> None:
    configs = {
        f"xtuner_add/configs/{path.relative_to(ROOT / 'configs').as_posix()}"
        for suffix in ("py", "md", "yml")
        for path in (ROOT / "configs").rglob(f"*.{suffix}")
    }
    assert any(name.endswith(".py") for name in configs)
    assert configs <= members


def test_every_script_is_shipped_inside_xtuner_add(members: set[str]) -> None:
    scripts = {f"xtuner_add/scripts/{path.name}" for path in (ROOT / "scripts").iterdir()}
    assert "xtuner_add/scripts/run_pcam.sh" in scripts
    assert scripts <= members


def test_every_file_of_the_packages_is_shipped(members: set[str]) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for package in OURS
        for path in (ROOT / package).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert "pallava/registry.py" in files
    assert files - members == set()


def test_metadata_names_licence_extras_and_script(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        assert f"{info}/licenses/LICENSE" in archive.namelist()
    assert metadata["Name"] == "xtuner-add"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra")) == {
        "train",
        "evaluate",
        "convert",
        "pathgen",
        "ray",
        "cite",
        "gigapath",
        "demo",
        "serve",
        "dev",
        "docs",
        "all",
    }
    assert "xtuner-add = xtuner_add.cli:main" in scripts
    required = {str(line) for line in metadata.get_all("Requires-Dist")}
    base = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in required if "extra ==" not in line}
    assert {"click", "openslide-bin", "h5py"} <= base
    assert not base & {"torch", "torchvision", "transformers", "scikit-learn", "timm", "xtuner"}
    # XTuner's metadata pins outdated versions; a resolver that sees it finds no solution.
    assert not [line for line in required if line.startswith("xtuner")]
    with_torch = {line.partition("extra == ")[2] for line in required if line.startswith("torch>")}
    assert {"'train'", "'gigapath'", "'cite'", "'pathgen'", "'serve'", "'all'"} <= {
        name.replace('"', "'") for name in with_torch
    }


def test_the_lock_holds_what_every_extra_asks_for(wheel: Path) -> None:
    lines = (ROOT / "requirements/lock.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if re.match(r"[a-z0-9]", line)]
    locked = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert len(required) > 100
    outside = [r for r in required if not r.specifier.contains(locked[canonicalize_name(r.name)])]
    assert not outside


def test_two_builds_of_the_wheel_are_equal_to_the_bit(wheel: Path, tmp_path: Path) -> None:
    again = build_wheel(tmp_path)
    assert again.name == wheel.name and again.read_bytes() == wheel.read_bytes()


def test_setup_host_installs_the_trainer_of_the_lock() -> None:
    from xtuner_add.commands.host import XTUNER

    lock = (ROOT / "requirements/lock.txt").read_text(encoding="utf-8").splitlines()
    host = (ROOT / "requirements/host.txt").read_text(encoding="utf-8")
    assert XTUNER in lock and f"\n{XTUNER} " in host


def test_installed_wheel_finds_its_configs(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, "--target", str(target), str(wheel)], check=True)
    code = "from xtuner_add.paths import configs_dir, own_configs; print(configs_dir())"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(result.stdout.strip()) == target / "xtuner_add" / "configs"
