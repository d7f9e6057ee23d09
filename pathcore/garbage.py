"""Fewer garbage collections while the host libraries are imported."""

from __future__ import annotations

import gc
import sys

_RARE_COLLECTION = 50_000
"""New objects between two collections during imports; the default of Python is 700."""


class _RareCollection:
    """Raised threshold of the garbage collector, and the callback that restores it."""

    def __init__(self) -> None:
        self._usual, self._num_modules = gc.get_threshold(), len(sys.modules)
        gc.callbacks.append(self)
        gc.set_threshold(_RARE_COLLECTION, *self._usual[1:])

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            return
        if len(sys.modules) == self._num_modules:
            self.end()
        self._num_modules = len(sys.modules)

    def end(self) -> None:
        gc.set_threshold(*self._usual)
        gc.callbacks.remove(self)


def collect_rarely() -> None:
    """Lets the garbage collector run less often until modules are no longer imported.

    The hosts create a million objects, hardly any of which is garbage; searching them again and
    again takes a sixth of the import. The first collection since which no module was imported
    restores the usual threshold. Without effect if the collector is switched off.
    """
    if gc.isenabled():
        _RareCollection()


def collect_as_usual() -> None:
    """Restores the threshold of the garbage collector that `collect_rarely` raised.

    Long jobs call it before they begin. Otherwise it takes tens of thousands of new objects, and
    fewer may hold much memory: a reader of TIFF refers to itself and to the offsets of all tiles.
    """
    for callback in list(gc.callbacks):
        if isinstance(callback, _RareCollection):
            callback.end()
