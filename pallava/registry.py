"""Registries of encoders, connectors and other parts by name.

A registry maps a short name to a class or function. Built-in parts register themselves where they
are defined; other packages register theirs through the entry-point group ``xtuner_add.plugins``.
Nothing is imported until a name is missing or a listing is requested.

A third-party package declares in its ``pyproject.toml``::

    [project.entry-points."xtuner_add.plugins"]
    my_parts = "my_package.parts"          # a module that registers when it is imported
    my_others = "my_package.setup:register"  # or a function without arguments

Example:
    >>> from pallava.registry import CONNECTORS
    >>> @CONNECTORS.register("pooling")
    ... class PoolingConnector: ...
    >>> CONNECTORS.get("pooling") is PoolingConnector
    True
"""

from __future__ import annotations

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar

from pathcore.names import did_you_mean

PLUGIN_GROUP = "xtuner_add.plugins"

_logger = logging.getLogger(__name__)
_Registered = TypeVar("_Registered")


class Registry:
    """Classes or functions of one kind, by name.

    Args:
        kind: Kind of the entries, in the singular, for messages ("connector").
        builtin_modules: Modules that register the built-in entries on import. They are imported on
            the first look-up that fails without them, or on the first listing.
        shares_models: Whether names in MMEngine's `MODELS` are found too, if MMEngine is loaded.
    """

    def __init__(
        self, kind: str, builtin_modules: Iterable[str] = (), *, shares_models: bool = False
    ) -> None:
        self.kind = kind
        self._shares_models = shares_models
        self._builtin_modules = tuple(builtin_modules)
        self._builtins_loaded = False
        self._entries: dict[str, Any] = {}

    def register(self, name: str, *, replace: bool = False) -> Callable[[_Registered], _Registered]:
        """Returns a decorator that registers a class or function under ``name``.

        Args:
            name: Name in configs and on command lines.
            replace: Whether to replace an existing entry.

        Raises:
            ValueError: If the name is empty or already taken.
        """
        if not name or name != name.strip():
            raise ValueError(f"{self.kind} name {name!r} is empty or padded with blanks")

        def enter(target: _Registered) -> _Registered:
            existing = self._entries.get(name)
            if existing is not None and not replace and _origin(existing) != _origin(target):
                raise ValueError(
                    f"{self.kind} {name!r} is registered by {_origin(existing)}; "
                    f"{_origin(target)} needs another name, or replace=True"
                )
            self._entries[name] = target
            return target

        return enter

    def get(self, name: str) -> Any:
        """Returns the entry registered under ``name``.

        Raises:
            ValueError: If neither the built-in parts nor the plug-ins have this name; the message
                suggests the nearest ones.
        """
        if name not in self._entries:
            self._load_builtins()
        if name not in self._entries:
            load_plugins()
        if name in self._entries:
            return self._entries[name]
        # Parts registered with `@MODELS.register_module()` are found here too. MMEngine is not
        # imported for it, because this module must work without MMEngine.
        registries = sys.modules.get("mmengine.registry")
        if self._shares_models and registries and name in registries.MODELS.module_dict:
            return registries.MODELS.module_dict[name]
        raise ValueError(self._unknown(name))

    def names(self) -> list[str]:
        """Returns all registered names, sorted, including built-in parts and plug-ins."""
        self._load_builtins()
        load_plugins()
        return sorted(self._entries)

    def origins(self) -> dict[str, str]:
        """Returns where each registered name is defined, as ``module:name``."""
        return {name: _origin(self._entries[name]) for name in self.names()}

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {sorted(self._entries)})"

    def _load_builtins(self) -> None:
        if self._builtins_loaded:
            return
        for module in self._builtin_modules:
            importlib.import_module(module)
        self._builtins_loaded = True

    def _unknown(self, name: str) -> str:
        known = sorted(self._entries)
        hint = did_you_mean(name, known)
        stop = "" if hint.endswith("?") else "."
        message = (
            f"unknown {self.kind} {name!r}{hint}{stop} Registered: {', '.join(known) or 'none'}. "
            f"Other packages add theirs through the entry-point group {PLUGIN_GROUP!r}."
        )
        failures = plugin_failures()
        if failures:
            message += " Plug-ins that could not be loaded: " + "; ".join(map(str, failures))
        return message


@dataclass(frozen=True)
class PluginFailure:
    """A plug-in that could not be loaded.

    Attributes:
        name: Name of its entry point.
        target: Module or function that the entry point names.
        error: Exception, as ``Type: message``.
    """

    name: str
    target: str
    error: str

    def __str__(self) -> str:
        return f"{self.name} ({self.target}): {self.error}"


class _Plugins:
    """State of plug-in discovery, which runs at most once per process."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.loaded = False
        self.failures: list[PluginFailure] = []


_plugins = _Plugins()


def load_plugins() -> list[PluginFailure]:
    """Loads every plug-in of the entry-point group ``xtuner_add.plugins``, once per process.

    A plug-in that cannot be loaded is reported as a warning and skipped, and the others stay
    usable.

    Returns:
        The plug-ins that could not be loaded.
    """
    with _plugins.lock:
        if not _plugins.loaded:
            _plugins.loaded = True  # first, because plug-ins may look up names
            for entry_point in sorted(entry_points(group=PLUGIN_GROUP), key=lambda ep: ep.name):
                _load_entry_point(entry_point)
    return plugin_failures()


def plugin_failures() -> list[PluginFailure]:
    """Returns the plug-ins that could not be loaded; empty before the first attempt."""
    return list(_plugins.failures)


def _load_entry_point(entry_point: EntryPoint) -> None:
    try:
        target = entry_point.load()
        if callable(target) and not isinstance(target, ModuleType):
            target()
    except Exception as error:  # a failing plug-in must not affect the others
        failure = PluginFailure(
            entry_point.name, entry_point.value, f"{type(error).__name__}: {error}"
        )
        _plugins.failures.append(failure)
        _logger.warning("plug-in %s was skipped", failure)


def _origin(target: Any) -> str:
    owner = getattr(target, "__self__", None)
    if isinstance(owner, type):  # a class method is identified by its class
        return f"{_origin(owner)}.{target.__name__}"
    name = getattr(target, "__qualname__", None) or type(target).__qualname__
    return f"{getattr(target, '__module__', '?')}:{name}"


ENCODERS = Registry(
    "encoder",
    builtin_modules=("pallava.modeling.folders", "pallava.named_encoder"),
    shares_models=True,
)
"""Vision encoders: functions of a folder of weights that return a module with a ``config`` and with
``features(pixel_values, select_layer)``. For inputs other than pixels, the module is
a `pallava.modeling.llava.BagEncoder` instead, as `pallava.modeling.slide_tokens.SlideTokenEncoder`.
A trained module with a method ``save`` writes its own folder. In configs:
``visual_encoder="name:folder"``."""

CONNECTORS = Registry(
    "connector", builtin_modules=("pallava.modeling.folders",), shares_models=True
)
"""Modules that map the features of thumbnails and sub-images to LLM embeddings: classes constructed
from a `pallava.modeling.qformer.ConnectorConfig` with the call signature of
`ScaleInvariantConnector` and its properties ``uses_sub_images`` and ``dtype``. In configs:
``projector_type="name"``."""

TEXT_ENCODERS = Registry("text encoder")
"""Encoders of captions and class names."""

CONVERTERS = Registry(
    "converter",
    builtin_modules=tuple(
        f"pallava.converters.{name}"
        for name in (
            "bach",
            "caption_sets",
            "colonpath",
            "oscc",
            "pathvqa",
            "pmc_oa",
            "pmcvqa",
            "pubmedvision",
            "quilt",
            "slide_instruction",
        )
    ),
)
"""Functions of a data path, an image folder and options that return a
`pallava.converters.conversion.Conversion` (or `class_sets.ClassConversion`). On command lines:
`xtuner-add convert-dataset NAME`."""

EVALUATIONS = Registry("evaluation", builtin_modules=("pallava.evaluation.benchmarks",))
"""Functions of a data path, an image folder and options that return a
`pallava.evaluation.benchmarks.Benchmark`: questions and how their answers are scored. On command
lines: `xtuner-add evaluate NAME`."""
