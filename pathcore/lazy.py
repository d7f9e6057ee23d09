"""Package attributes that are imported on first access (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pathcore.extras import says_extra


def lazy_exports(
    package: str, extra: str, exports: Mapping[str, str], modules: Iterable[str] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Returns `__getattr__`, `__dir__` and `__all__` for a package.

    Nothing is imported until an attribute is accessed, so that `import wsi` takes milliseconds and
    `import pallava` does not import torch.

    Args:
        package: `__name__` of the package.
        extra: Extra of `xtuner-add` with the requirements of the exports; empty if the base
            installation has them.
        exports: Module of each exported name, as `module` or, if the names differ,
            `module:attribute`.
        modules: Names of submodules that are imported on first access.
    """
    names = sorted([*exports, *modules])

    def get(name: str) -> Any:
        """Imports an attribute or submodule of the package; serves as its `__getattr__`."""
        if name not in names:
            # Given `name` and `obj`, Python's traceback suggests a similar attribute.
            raise AttributeError(
                f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package]
            )
        module, _, attribute = exports.get(name, f"{package}.{name}").partition(":")
        with says_extra(f"{package}.{name}", extra):
            found = importlib.import_module(module)
            return found if name in modules else getattr(found, attribute or name)

    return get, lambda: names, names
