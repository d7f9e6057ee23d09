"""Collects the code that is exported with a model, for environments without this package.

`trust_remote_code=True` runs Python files of the model folder, which may import one another only by
`from .name import ...`. Every module that the Hugging Face classes need is therefore copied with
`from pallava.a.name import ...` and `from pathcore.name import ...` rewritten; the code is
otherwise unchanged.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

ENTRY_MODULES = (
    "pallava.modeling.hf.configuration_pallava",
    "pallava.modeling.hf.modeling_pallava",
    "pallava.modeling.hf.processing_pallava",
)
AUTO_MAP = {
    "AutoConfig": "configuration_pallava.PALLaVAConfig",
    "AutoModelForImageTextToText": "modeling_pallava.PALLaVAForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_pallava.PALLaVAForConditionalGeneration",
    "AutoProcessor": "processing_pallava.PALLaVAProcessor",
}
_OURS = ("pallava", "pathcore")
_IMPORT = re.compile(
    r"^(?P<indent>\s*)from (?:pallava|pathcore)\.(?:\w+\.)*(?P<name>\w+) import ", re.MULTILINE
)


def travelling_files() -> dict[str, str]:
    """Returns the source of every exported module, by file name.

    Raises:
        ValueError: If two modules share a file name, or a module cannot be made self-contained.
    """
    closures = {entry: _closure(entry) for entry in ENTRY_MODULES}
    sources = {module: source for found in closures.values() for module, source in found.items()}
    files = {
        _file_name(module): _IMPORT.sub(r"\g<indent>from .\g<name> import ", source)
        for module, source in sources.items()
    }
    for entry, found in closures.items():
        others = sorted(_file_name(module) for module in found if module != entry)
        files[_file_name(entry)] += _naming(others)
    return dict(sorted(files.items()))


def _closure(entry: str) -> dict[str, str]:
    """Returns a module and all modules of this package that it imports: name -> source."""
    found: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        if _file_name(module) in {_file_name(name) for name in found}:
            raise ValueError(f"{_file_name(module)}: the name of two modules that travel")
        found[module] = _source(module)
        waiting += _needed(module, found[module])
    return found


def _naming(files: list[str]) -> str:
    """Returns a statement that names every file that an entry module needs, directly or not.

    From a local folder, transformers copies only files that the entry module itself names.
    """
    if not files:
        return ""
    lines = [
        "\n\nif False:  # tells transformers which files belong to this one",
        *(
            f"    from .{file.removesuffix('.py')} import __doc__ as _{i}"
            for i, file in enumerate(files)
        ),
    ]
    return "\n".join(lines) + "\n"


def _file_name(module: str) -> str:
    return f"{module.rpartition('.')[2]}.py"


def _needed(module: str, source: str) -> list[str]:
    needed = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module in _OURS:
                raise ValueError(
                    f"{module}: `from {node.module} import` cannot travel; name the module"
                )
            if node.module.split(".")[0] in _OURS:
                needed.append(node.module)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in _OURS:
                    raise ValueError(
                        f"{module}: `import {alias.name}` cannot travel; import the names"
                    )
    return needed


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{module}: no source file")
    return Path(spec.origin).read_text(encoding="utf-8")
