"""Dilated causal convolution with its gate (see fastgen/ops/gated_causal_conv1d.py), by convolution.py's kernels.

The backward computes the gate again and writes the gradient of what goes into it; that is multiplied with the weights
for x's gradient, with x for the weights'.

Least work: 4 H C K operations for each sample forward, 12 H C K backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .convolution import conv, gated_conv
from .grad_weight import grad_weight
from .launch import on_device, sum_rows
from .tiles import Shape, arranged, by_tap, channels_last, is_last


def shape_of(x: Tensor, weight: Tensor, dilation: int) -> Shape:
    steps, taps = x.shape[2], weight.shape[2]
    return Shape(1, steps, taps, 0, taps - 1, taps, min(dilation, max(steps, 1)))


def gated_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int) -> Tensor:
    """Contiguous x (B, C, T), weight (2H, C, K), bias (2H,), cond (B, 2H, T or 1) -> (B, H, T)."""
    out = x.new_empty(x.shape[0], weight.shape[0] // 2, x.shape[2])
    if out.numel():
        shape = shape_of(x, weight, dilation)
        with on_device(x):
            gated_conv(arranged(x, shape), by_tap(weight, shape.taps), bias, cond, out, None, shape)
    return out


def gated_causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, weight, bias and cond; of the last two nothing that means anything where there are none."""
    if not x.numel():
        return nothing_to_do(x, weight, cond)
    shape = shape_of(x, weight, dilation)
    with on_device(x):
        source = arranged(x, shape)
        of_sums = sums_for(source, len(weight))
        live = by_tap(weight, shape.taps)
        partial = gated_conv(source, live, bias, cond, None, of_sums, shape, grad=grad)
        of_bias = sum_rows(partial, weight.dtype)
        return through_taps(of_sums, of_bias, source, x, live, cond, weight, shape, None)


def sums_for(source: Tensor, rows: int) -> Tensor:
    """Where gradients of what goes into the gate are put: (B, rows, T), arranged as x is."""
    batch, _, steps = source.shape
    return channels_last(source, rows, steps) if is_last(source) else source.new_empty(batch, rows, steps)


def nothing_to_do(x: Tensor, weight: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_cond = x.new_empty(0) if cond is None else torch.zeros_like(cond)
    return torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(weight.shape[0]), of_cond


def through_taps(
    of_sums: Tensor, of_bias: Tensor, source: Tensor, x: Tensor, live: Tensor, cond: Tensor | None, weight: Tensor,
    shape: Shape, added: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """of_sums (B, 2H, length): of what goes into the gate; live: weights by tap -> gradients of x (with `added`),
    weight, bias and cond.
    """
    of_x = torch.empty_like(x)
    conv(of_sums, live, of_x, shape, added=added, flip=True)
    of_weight = grad_weight(of_sums, source, weight, shape)
    of_cond = x.new_empty(0)
    if cond is not None:
        of_steps = of_sums[:, :, : shape.width]
        if cond.shape[2] == shape.width:
            of_cond = of_steps.contiguous()
        else:
            of_cond = of_steps.sum(2, keepdim=True, dtype=torch.float32).to(cond.dtype)
    return of_x, of_weight, of_bias, of_cond
