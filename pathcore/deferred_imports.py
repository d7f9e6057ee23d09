"""Defers imports of host libraries that most runs never use.

XTuner, MMEngine, PEFT and transformers import libraries that only some of their functions need: the
compiler of torch, DeepSpeed, scikit-learn, matplotlib. Together these take nearly half of the CPU
time before the first training step. A deferred module is the real module, but its code runs only at
the first use.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from pathcore.garbage import collect_rarely

EAGER_VARIABLE = "XTUNER_ADD_EAGER_IMPORTS"
"""Environment variable that switches deferred imports off."""

_WAITING: dict[str, list[Callable[[], Any]]] = {}
"""Functions passed to `after_import`, by module."""


@dataclass(frozen=True)
class _Rule:
    """Rule by which the import of a module is deferred.

    Attributes:
        deferred: Whether its code runs at the first use instead of at the import.
        submodules_alone: Whether all submodules can be imported before that.
        alone: Submodules that can be imported before that, if not all of them can.
        presets: Attributes that can be used before that; running the code replaces them.
        during: Context manager around the execution of the code.
        after: Function that is called with the module after its code has run.
    """

    deferred: bool = True
    submodules_alone: bool = False
    alone: tuple[str, ...] = ()
    presets: Mapping[str, Any] = field(default_factory=dict)
    during: Callable[[], AbstractContextManager[None]] = nullcontext
    after: Callable[[ModuleType], None] = lambda module: None


class _DeferredModule(ModuleType):
    """Module whose code runs when an attribute is missing."""

    def __getattr__(self, name: str) -> Any:
        loader = object.__getattribute__(self, "__loader__")
        loader.run(self, name)
        return object.__getattribute__(self, name)


class _Loader(Loader):
    def __init__(self, rule: _Rule, loader: Loader, path: Sequence[str] | None) -> None:
        self._rule = rule
        self._loader = loader
        self._path = path
        self._lock = threading.RLock()
        self._is_running = False

    def __getattr__(self, name: str) -> Any:  # resources and sources, `get_source` for instance
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if not self._rule.deferred:
            self._execute(module)
            return
        vars(module).update(self._rule.presets)
        if self._path is not None and not self._rule.submodules_alone:
            del module.__path__  # needed to import submodules
        module.__class__ = _DeferredModule

    def run(self, module: ModuleType, wanted: str) -> None:
        """Runs the code of a deferred module once, or only imports a submodule if that suffices."""
        with self._lock:
            # The code runs, but has not defined it yet; or an import asks whether it is a package.
            if self._is_running or (wanted == "__path__" and self._path is None):
                raise AttributeError(f"module {module.__name__!r} has no attribute {wanted!r}")
            if not isinstance(module, _DeferredModule):
                return  # another thread was faster
            if wanted in self._rule.alone:
                module.__path__ = self._path  # type: ignore[assignment]
                importlib.import_module(f"{module.__name__}.{wanted}")
                del module.__path__
                return
            self._is_running = True
            if self._path is not None:
                module.__path__ = self._path  # type: ignore[assignment]
            try:
                self._execute(module)
                module.__class__ = ModuleType  # type: ignore[assignment]
            finally:
                self._is_running = False
        for function in _WAITING.pop(module.__name__, ()):
            function()

    def _execute(self, module: ModuleType) -> None:
        with self._rule.during():
            self._loader.exec_module(module)
        self._rule.after(module)


class _Finder(MetaPathFinder):
    def __init__(self, rules: Mapping[str, _Rule]) -> None:
        self.rules = rules

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.rules:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(self.rules[name], spec.loader, spec.submodule_search_locations)
        return spec


def defer_imports() -> None:
    """Defers the imports of `RULES` in this process, unless `EAGER_VARIABLE` is set.

    It also makes the other imports faster, see `collect_rarely`. Repeated calls have no effect,
    nor does a call after the modules have been imported.
    """
    if _finder() is None and not os.environ.get(EAGER_VARIABLE):
        sys.meta_path.insert(0, _Finder(RULES))
        collect_rarely()


def after_import(name: str, function: Callable[[], Any]) -> None:
    """Calls a function once a module has been imported: at once, unless it is deferred."""
    module = sys.modules.get(name)
    if isinstance(module, _DeferredModule) or (module is None and _finder() is not None):
        _WAITING.setdefault(name, []).append(function)
    else:
        function()


def _finder() -> _Finder | None:
    return next((finder for finder in sys.meta_path if isinstance(finder, _Finder)), None)


def _graph_break(msg: str = "") -> None:
    """Stands in for `torch._dynamo.graph_break`, which optimizers call, if nothing is compiled."""
    del msg


def _disable(function: Any = None, *arguments: Any, **options: Any) -> Any:
    """Stands in for `torch._dynamo.disable`; takes effect once the compiler is imported."""
    if function is None:  # as a decorator with options
        return lambda decorated: _disable(decorated, *arguments, **options)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        module = sys.modules["torch._dynamo"]
        if isinstance(module, _DeferredModule):
            return function(*args, **kwargs)
        return module.disable(function, *arguments, **options)(*args, **kwargs)

    return call


def _allow_in_graph(function: Any) -> Any:
    after_import("torch._dynamo", lambda: sys.modules["torch._dynamo"].allow_in_graph(function))
    return function


@contextmanager
def _compiling_at_first_call() -> Iterator[None]:
    """Delays `torch.compile`, used as a decorator, until the first call of the function."""
    import torch

    compile_now = torch.compile

    def compile_later(function: Any, **options: Any) -> Any:
        compiled = functools.cache(lambda: compile_now(function, **options))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


@contextmanager
def _imported_alone(package: str, submodule: str) -> Iterator[None]:
    """Imports a submodule first, so that the code finds it without importing its package."""
    getattr(importlib.import_module(package), submodule)
    yield


def _forwarding(module: str, function: str) -> Callable[..., Any]:
    """Returns a function that imports the module when it is called, and calls the function."""

    def call(*args: Any, **kwargs: Any) -> Any:
        imported = importlib.import_module(module)
        if isinstance(imported, _DeferredModule):
            imported.__loader__.run(imported, function)  # type: ignore[union-attr]
        return getattr(imported, function)(*args, **kwargs)

    return call


@contextmanager
def _postponed(module: str, function: str) -> Iterator[None]:
    """Makes `from module import function` import the module only when the function is called."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = ModuleType(module)
    setattr(sys.modules[module], function, _forwarding(module, function))
    try:
        yield
    finally:
        del sys.modules[module]


class _NeverRaised(Exception):
    """Stands in for an error of a module that has not run and can thus not have raised it."""


def _raise_real_symbol_errors(module: ModuleType) -> None:
    if importer := sys.modules.get("torch.distributed.tensor._decompositions"):
        importer.GuardOnDataDependentSymNode = module.GuardOnDataDependentSymNode  # type: ignore[attr-defined]


def _lighter_transformers(module: ModuleType) -> None:
    """Saves transformers work when it is imported.

    Hides scikit-learn, which is only used for assisted decoding, unused here; and passes the last
    lines of its 2,000 modules to the search for `__all__`, which goes through them one by one.
    """
    search = module.fetch__all__
    module._sklearn_available = False  # type: ignore[attr-defined]
    module.fetch__all__ = lambda text: search(text[text.rfind("\n__all__") + 1 :])  # type: ignore[attr-defined]


def _figure_when_drawn(module: ModuleType) -> None:
    """Creates the figure of MMEngine's visualizer only when something is drawn, not logged."""
    visualizer = module.Visualizer
    make = visualizer._initialize_fig

    def make_later(self: Any, fig_cfg: Any) -> tuple[_LazyPart, ...]:
        parts = functools.cache(lambda: make(self, fig_cfg))
        return tuple(_LazyPart(parts, index) for index in range(3))

    visualizer._initialize_fig = make_later
    # The constructor accesses it, which would create the figure.
    visualizer.dpi = property(lambda self: self.fig_save.dpi, lambda self, value: None)


class _LazyPart:
    """Canvas, figure or axes of a visualizer."""

    def __init__(self, parts: Callable[[], Sequence[Any]], index: int) -> None:
        self._parts = parts
        self._index = index

    def get_dpi(self) -> float | None:
        return None  # see `_figure_when_drawn`

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parts()[self._index], name)


RULES: Mapping[str, _Rule] = {
    # 4 s of CPU time. A training that compiles nothing still accesses these names in each step.
    "torch._dynamo": _Rule(
        alone=("config", "_trace_wrapped_higher_order_op"),  # used by checkpointing and by masks
        presets={
            "graph_break": _graph_break,
            "disable": _disable,
            "allow_in_graph": _allow_in_graph,
        },
    ),
    # These three would import the compiler anyway. PEFT and MMEngine import bitsandbytes,
    # which compiles two functions, although nothing is quantised.
    "bitsandbytes.backends.default.ops": _Rule(deferred=False, during=_compiling_at_first_call),
    "transformers.masking_utils": _Rule(
        deferred=False,
        during=lambda: _imported_alone("torch._dynamo", "_trace_wrapped_higher_order_op"),
    ),
    "torchvision.ops.roi_align": _Rule(
        deferred=False, during=lambda: _postponed("torch._dynamo.utils", "is_compile_supported")
    ),
    # 0.7 s, with sympy. transformers imports torch.distributed.tensor, which only uses it to
    # compute with tensors that are distributed, and flex_attention, which has to be compiled.
    "torch.fx.experimental.symbolic_shapes": _Rule(
        presets={
            name: _forwarding("torch.fx.experimental.symbolic_shapes", name)
            for name in ("guard_or_false", "has_free_unbacked_symbols", "statically_known_true")
        }
        | {"GuardOnDataDependentSymNode": _NeverRaised},
        after=_raise_real_symbol_errors,
    ),
    # 1.5 s for scikit-learn with scipy and pandas, 0.2 s for the search.
    "transformers.utils.import_utils": _Rule(deferred=False, after=_lighter_transformers),
    # 0.5 s, for the losses of object detectors, which transformers imports with all others.
    **{
        f"transformers.loss.loss_{name}": _Rule(
            deferred=False, during=lambda: _postponed("scipy.optimize", "linear_sum_assignment")
        )
        for name in ("for_object_detection", "deformable_detr", "grounding_dino", "rt_detr")
    },
    # 1 s. MMEngine imports it for its DeepSpeed strategy.
    "deepspeed": _Rule(),
    # 1.5 s. The package imports all of XTuner's datasets, one of which draws with the next two.
    "xtuner.dataset": _Rule(submodules_alone=True),
    "matplotlib.pyplot": _Rule(),
    "skimage.io": _Rule(),
    # 0.7 s, with matplotlib.
    "mmengine.visualization.visualizer": _Rule(deferred=False, after=_figure_when_drawn),
    "mmcv": _Rule(submodules_alone=True),  # MMEngine asks whether there is mmcv._ext
    # transformers imports torchvision for the names of interpolations.
    "torchvision.models": _Rule(),
    "torchvision.datasets": _Rule(),
}
"""Rules by module; the times were measured on a processor of 2023."""
