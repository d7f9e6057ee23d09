"""What is not installed is named with the line that installs it."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pathcore.encoders.availability import availability
from pathcore.extras import OURS, distribution_of, install_line
from xtuner_add.cli import LazyGroup

ROOT = Path(__file__).parents[1]
# The extras that a package may rely on: those of its functions and commands.
EXTRAS_OF = {
    "wsi": "gigapath",  # for pictures of scores alone
    "gigapath": "gigapath",
    "pathgen": "pathgen",
    "cite": "cite",
    "pallava": "train,evaluate,convert,serve",
    "pathcore": "gigapath,pathgen,ray",
    "xtuner_add": "train,evaluate,convert,serve,demo,cite,pathgen,gigapath",
}
# In no extra. Their absence is handled where they are used.
HANDLED = {"conch", "flash_attn", "musk", "xtuner"}


def required(*names: str) -> set[str]:
    """Distributions that files of requirements name."""
    lines = (
        line.partition("#")[0].strip()
        for name in names
        for line in (ROOT / f"requirements/{name}.txt").read_text(encoding="utf-8").splitlines()
    )
    return {canonicalize_name(Requirement(line).name) for line in lines if line}


def brought(extras: str) -> set[str]:
    """Distributions that extras bring, beyond the base installation."""
    names = extras.split(",") if extras else []
    return required("models", *names) if names and names != ["ray"] else required(*names)


BASE = required("runtime")


def third_party(package: str) -> Iterator[tuple[str, str]]:
    """Modules outside the base installation that a package imports anywhere, and where."""
    for file in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for module in {name.partition(".")[0] for name in names}:
                known = {*OURS, *sys.stdlib_module_names, *HANDLED}
                if module not in known and distribution_of(module) not in BASE:
                    yield module, f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


IMPORTED = {package: list(third_party(package)) for package in OURS}
OPTIONAL = sorted({module for found in IMPORTED.values() for module, _ in found})
# Of the base installation, by way of scikit-image and h5py.
INDIRECT = {"typing_extensions", "threadpoolctl"}


@pytest.mark.parametrize("package", OURS)
def test_a_package_imports_what_its_extras_bring(package: str) -> None:
    bring = brought(EXTRAS_OF[package])
    wrong = [
        f"{where}: {module}"
        for module, where in IMPORTED[package]
        if distribution_of(module) not in bring and module not in INDIRECT
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [m for m in OPTIONAL if m not in INDIRECT] + ["xtuner"])
def test_a_command_names_the_extra_of_whatever_it_lacks(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    @click.command()
    def embed() -> None:
        importlib.import_module(module)

    group = LazyGroup("xtuner-add", commands={"embed-here": embed})
    result = CliRunner().invoke(group, ["embed-here"])
    assert result.exit_code == 1
    assert f"Error: embed-here needs {module}, which is not installed. Install it" in result.output
    found = re.search(r'with: pip install "xtuner-add\[([\w,]+)\]"', result.output)
    assert found is not None, result.output
    if module == "xtuner":
        assert found[1] == "train" and '" && xtuner-add setup-host' in result.output
    else:
        assert distribution_of(module) in brought(found[1])


LATE = """
import sys

sys.modules["torch"] = None
try:
    {call}
except ModuleNotFoundError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("call", "extra"),
    [
        ("from pathcore.encoders import create_encoder", "gigapath"),
        ("import pallava; pallava.load_model('model')", "evaluate"),
    ],
)
def test_functions_that_import_late_name_their_extra(call: str, extra: str) -> None:
    """In a new process, since what this one has imported is not imported again."""
    command = [sys.executable, "-c", LATE.format(call=call)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith("MissingPackageError ") and "torch" in output
    assert f'pip install "xtuner-add[{extra}]"' in output


def test_an_encoder_names_the_extra_of_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name, library in (("uni", "timm"), ("plip", "transformers"), ("keep", "timm")):
        assert distribution_of(library) in brought(extra_in(availability(name).reason))
    assert "open-clip-torch" in brought(extra_in(availability("biomedclip").reason))


def extra_in(text: str) -> str:
    found = re.search(r'pip install "xtuner-add\[([\w,]+)\]"', text)
    assert found is not None, text
    return found[1]


def test_a_package_of_no_extra_is_named_itself() -> None:
    assert install_line("flash_attn", "gigapath") == "pip install flash-attn"
