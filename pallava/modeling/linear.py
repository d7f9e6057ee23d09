"""Linear layers of frozen parts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` that asks oneDNN on a CPU when no graph is kept.

    PyTorch gives fp32 products to MKL, whose kernels for processors of other makers than Intel
    reach half the speed of oneDNN's (measured in docs/benchmarks.md). Both compute in fp32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns `input @ weight.T + bias`."""
        if _suits_onednn(input) and self.weight.dtype == torch.float32:
            # Weight and bias stay as they are; input and output are copied, which costs little.
            output = torch.ops.aten.mkldnn_linear(input.to_mkldnn(), self.weight, self.bias)
            return output.to_dense()
        return super().forward(input)


def _suits_onednn(input: Tensor) -> bool:
    return (
        input.device.type == "cpu"
        and input.dtype == torch.float32
        and input.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )
