"""Faster linear layers for inference on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` that uses oneDNN on a CPU when no autograd graph is kept.

    PyTorch runs fp32 matrix products in MKL, which reaches half the speed of oneDNN on CPUs not
    made by Intel (measured in docs/benchmarks.md). Both compute in fp32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Returns `input @ weight.T + bias`."""
        if _suits_onednn(input) and self.weight.dtype == torch.float32:
            # Only input and output are converted to oneDNN's layout, which costs little; weights
            # are not copied.
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
