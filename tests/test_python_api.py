"""What the packages export: by name and lazily."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMISED = {
    "wsi": {"open_slide", "tile", "extract", "read_features"},
    "pathcore": {"list_encoders", "create_encoder"},
    "gigapath": {"embed_slides", "create_model"},
    "pathgen": {"select_patches", "describe", "train_clip", "zero_shot"},
    "cite": {"load_classifier", "PromptedEncoder", "encode_texts"},
    "pallava": {"load_model", "merge", "export", "evaluate"},
}


@pytest.mark.parametrize("package", PROMISED)
def test_every_export_is_there_and_seen_by_type_checkers(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) >= PROMISED[package]
    assert dir(module) == sorted(module.__all__)
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    static = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            found = getattr(importlib.import_module(str(node.module)), alias.name)
            static[str(alias.asname)] = found
    exports = {name: getattr(module, name) for name in module.__all__}
    submodules = {f"{package}.{name}" for name in exports}
    functions = {k: v for k, v in exports.items() if getattr(v, "__name__", "") not in submodules}
    assert functions == static
    assert all(value.__doc__ for value in functions.values())


def test_importing_the_packages_imports_nothing_else() -> None:
    code = f"import json, sys, {', '.join(PROMISED)}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    imported = {name.split(".")[0] for name in json.loads(done.stdout)}
    assert PROMISED.keys() <= imported
    assert not imported & {"torch", "numpy", "PIL", "transformers", "h5py", "openslide", "click"}


def test_an_unknown_name_suggests_the_nearest() -> None:
    code = "import wsi; wsi.read_feature"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "has no attribute 'read_feature'. Did you mean: 'read_features'?" in done.stderr
    with pytest.raises(ImportError):
        exec("from pathgen import captions")


def test_a_missing_requirement_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport gigapath; gigapath.create_model"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "gigapath.create_model needs torch" in done.stderr
    assert 'pip install "xtuner-add[gigapath]"' in done.stderr
    assert done.returncode == 1
