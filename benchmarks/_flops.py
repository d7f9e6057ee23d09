"""Operations of a block of code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode


def count_gflop(function: Callable[[], object]) -> float:
    """Runs a function, and counts the operations of its matrix products and attention."""
    mapping = {torch.ops.aten.mkldnn_linear: _linear_flop}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops() / 1e9


def _linear_flop(
    input_shape: Sequence[int], weight_shape: Sequence[int], *_: object, **__: object
) -> int:
    rows = 1
    for side in input_shape[:-1]:
        rows *= side
    return 2 * rows * weight_shape[0] * weight_shape[1]
