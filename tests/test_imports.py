"""Pure modules import without XTuner and MMEngine; the command line also without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

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

BLOCKED_IMPORTS = """
import importlib, json, sys

modules, blocked = json.loads(sys.argv[1])

class Finder:
    # Not an error from find_spec: others ask it whether a package is there.

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in blocked else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
failures = {}
for module in modules:
    try:
        importlib.import_module(module)
    except Exception as error:
        failures[module] = f"{type(error).__name__}: {error}"
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
        [sys.executable, "-c", BLOCKED_IMPORTS, json.dumps([modules, blocked])],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    failures: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return failures


@pytest.mark.parametrize("package", PURE)
def test_pure_modules_import_without_the_hosts(package: str) -> None:
    pure = [module for module in modules_of(package) if not is_edge(module)]
    assert PURE[package] in pure
    assert failures_without(HOSTS, pure) == {}


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
