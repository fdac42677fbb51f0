"""torch.nn.Linear with the kernel of `fastgen.ops.linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import stands_in
from fastgen.ops.linear import linear

SMALL_PRODUCT = 1 << 21  # multiply-adds of a call: up to there PyTorch is as fast
SMALL_SIDE = 16  # rows, inputs or outputs: with fewer, vectors and tiles are not filled


class Linear(nn.Linear):
    """torch.nn.Linear, whose parameters, their initialisation and state it has.

    On x86 it runs `fastgen.ops.linear` in float32 and float64, save for small products, and in bfloat16, by autocast or
    not, where the processor has no instructions for it; anything else, torch.jit.trace and torch.vmap included, is
    PyTorch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        return linear_map(x, self.weight, self.bias)


def linear_map(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C), weight (O, C), bias (O,) -> (..., O), by what is faster."""
    return linear(x, weight, bias) if _suits(x, weight) else F.linear(x, weight, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    if not stands_in(x) or not x.dim() or weight.device != x.device:
        return False
    # in compiled code the last tests would compile anew where batches cross the limits
    if torch.compiler.is_compiling():
        return True
    rows = x.shape[:-1].numel()
    return rows * weight.numel() > SMALL_PRODUCT and min(rows, *weight.shape) >= SMALL_SIDE
