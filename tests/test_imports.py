"""Pure modules import without XTuner and MMEngine; the command line also without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
HOSTS = ("xtuner", "mmengine", "mmcls", "mmpretrain", "mmcv", "deepspeed")
EDGES = (
    "pallava.engine",
    "pallava.model",
    "pallava.dataset",
    "pallava.default_collate_fn",
    "pallava.evaluate_chat_hook",
    "cite.mm",
)
PURE = {
    "pathcore": "pathcore.files",
    "pallava": "pallava.modeling.qformer",
    "cite": "cite.prompts",
    "wsi": "wsi.reader",
    "pathgen": "pathgen.annotations",
    "gigapath": "gigapath.slide_encoder",
}
"""By package, a module that must be among the pure ones."""

BLOCK = """
import importlib, json, sys

given, blocked = json.loads(sys.argv[1])

class Finder:
    # Not an error from find_spec: others ask it whether a package is there.

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
"""
IMPORT_EACH = f"""{BLOCK}
failures = {{}}
for module in given:
    try:
        importlib.import_module(module)
    except Exception as error:
        failures[module] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(failures))
"""


def modules_of(package: str) -> list[str]:
    names = []
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def is_edge(module: str) -> bool:
    return any(module == edge or module.startswith(f"{edge}.") for edge in EDGES)


def failures_without(blocked: tuple[str, ...], modules: list[str]) -> dict[str, str]:
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, json.dumps([modules, blocked])],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    failures: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return failures


@pytest.fixture(scope="module")
def failures_without_hosts() -> dict[str, str]:
    """Failures of all packages, from one process: importing torch and the like takes seconds."""
    modules = [module for package in PURE for module in modules_of(package) if not is_edge(module)]
    return failures_without(HOSTS, modules)


@pytest.mark.parametrize("package", PURE)
def test_pure_modules_import_without_the_hosts(
    package: str, failures_without_hosts: dict[str, str]
) -> None:
    pure = [module for module in modules_of(package) if not is_edge(module)]
    assert PURE[package] in pure
    assert {m: why for m, why in failures_without_hosts.items() if m in pure} == {}


@pytest.mark.parametrize("package", PURE)
def test_pure_modules_do_not_reach_the_hosts_even_inside_functions(package: str) -> None:
    graph = grimp.build_graph(package, include_external_packages=True)
    pure = [module for module in sorted(graph.modules) if module.startswith(package)]
    chains = [
        graph.find_shortest_chain(module, host)
        for module in pure
        for host in {*HOSTS, "xtuner_add"} & graph.modules
        if not is_edge(module)
    ]
    assert "mmengine" in graph.modules or not any(e.startswith(package) for e in EDGES)
    assert [chain for chain in chains if chain] == []


def test_slides_need_no_torch() -> None:
    assert failures_without((*HOSTS, "torch", "transformers"), modules_of("wsi")) == {}


def test_the_command_line_imports_without_torch_and_the_hosts() -> None:
    modules = [module for module in modules_of("xtuner_add") if ".demo" not in module]
    assert "xtuner_add.cli" in modules
    heavy = (*HOSTS, "torch", "transformers", "datasets", "numpy", "PIL")
    assert failures_without(heavy, modules) == {}


def test_blocking_is_seen() -> None:
    failures = failures_without(("json_tricks", "email"), ["email.parser", "string"])
    assert list(failures) == ["email.parser"]


RUN = f"{BLOCK}\nfrom xtuner_add.cli import main\nmain(given)"
# What the base installation lacks, of all that the extras bring.
NOT_IN_BASE = (
    *("torch", "torchvision", "transformers", "safetensors", "tokenizers", "huggingface_hub"),
    *("sklearn", "timm", "open_clip", "matplotlib", "pandas", "openai", *HOSTS),
)


def run_without_torch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, json.dumps([arguments, NOT_IN_BASE])],
        capture_output=True, text=True, cwd=folder, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_slides_are_tiled_and_extracted_by_the_base_installation(tmp_path: Path) -> None:
    picture = Image.new("RGB", (1024, 1024), (190, 110, 160))
    picture.paste((243, 240, 243), (0, 0, 1024, 300))
    (tmp_path / "slides").mkdir()
    picture.save(tmp_path / "slides/a.png")
    common = ("--slide-mpp", "0.5", "--workers", "1", "--quiet")
    tiled = run_without_torch(tmp_path, "tile", "slides", "--output", "tiles", *common)
    assert tiled.returncode == 0, tiled.stderr
    assert (tmp_path / "tiles/coords/a.h5").is_file()
    arguments = ("tiles/coords", "--slides", "slides", "--output", "patches", *common)
    cut = run_without_torch(tmp_path, "extract", *arguments)
    assert cut.returncode == 0, cut.stderr
    assert len(list((tmp_path / "patches").rglob("*.png"))) > 0
    shown = run_without_torch(tmp_path, "doctor")
    assert shown.returncode == 0 and "can be loaded" in shown.stdout, shown.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("embed", "a.png", "--output", "o"), 'embed needs torch, which is not installed. Install '
         'it with: pip install "xtuner-add[gigapath]"'),
        (("chat", "model"), 'pip install "xtuner-add[serve]"'),
        (("cite-texts", "o", "--classes", "classes.json", "--model", "m"), "xtuner-add[cite]"),
    ],
)  # fmt: skip
def test_a_command_without_its_extra_says_the_install_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "classes.json").write_text('{"a": "b"}')
    result = run_without_torch(tmp_path, *arguments)
    assert said in result.stderr, result.stderr
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
