"""Dilated causal convolution with its gate (see fastgen/ops/gated_causal_conv1d.py), by convolution.py's kernels.

The backward computes the gate again and writes the gradient of what goes into it; that is multiplied with the weights
for x's gradient, with x for the weights'.

Least work: 4 H C K operations for each sample forward, 12 H C K backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .convolution import Shape, by_tap, conv, from_taps, gated_conv, grad_weight, is_aligned
from .launch import on_device, sum_rows


def shape_of(x: Tensor, weight: Tensor, dilation: int) -> Shape:
    steps, taps = x.shape[2], weight.shape[2]
    return Shape(1, steps, taps, 0, taps - 1, taps, min(dilation, max(steps, 1)))


def arranged(x: Tensor, shape: Shape) -> tuple[Tensor, bool]:
    """x (B, C, T), or with channels last where taps would not be aligned -> and whether they are."""
    return (x, False) if is_aligned(shape) else (x.transpose(1, 2).contiguous(), True)


def columns_of(weight: Tensor) -> Tensor:
    """(2H, C, K) -> (K, C, 2H), the halves in turns."""
    return by_tap(weight.unsqueeze(2), weight.shape[2], 2)


def gated_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int) -> Tensor:
    """Contiguous x (B, C, T), weight (2H, C, K), bias (2H,), cond (B, 2H, T or 1) -> (B, H, T)."""
    out = x.new_empty(x.shape[0], weight.shape[0] // 2, x.shape[2])
    if out.numel():
        shape = shape_of(x, weight, dilation)
        with on_device(x):
            source, last = arranged(x, shape)
            gated_conv(source, columns_of(weight), bias, cond, out, None, shape, last=last)
    return out


def gated_causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, weight, bias and cond; of the last two nothing that means anything where there are none."""
    if not x.numel():
        return nothing_to_do(x, weight, cond)
    shape = shape_of(x, weight, dilation)
    with on_device(x):
        source, last = arranged(x, shape)
        of_sums = x.new_empty(x.shape[0], x.shape[2], weight.shape[0])
        partial = gated_conv(source, columns_of(weight), bias, cond, None, of_sums, shape, last=last, grad=grad)
        return through_taps(of_sums, partial, source, last, x, weight, bias, cond, shape, None)


def nothing_to_do(x: Tensor, weight: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    of_cond = x.new_empty(0) if cond is None else torch.zeros_like(cond)
    return torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(weight.shape[0]), of_cond


def through_taps(
    of_sums: Tensor, partial: Tensor, source: Tensor, last: bool, x: Tensor, weight: Tensor, bias: Tensor | None,
    cond: Tensor | None, shape: Shape, added: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """of_sums (B, T, 2H): of what goes into the gate -> gradients of x (with `added`), weight, bias and cond."""
    rows, channels, taps = weight.shape
    of_x = torch.empty_like(x)
    conv(of_sums, by_tap(weight.unsqueeze(2), taps, 2, flip=True), of_x, shape, added=added, flip=True)
    of_taps = grad_weight(of_sums, source, rows, channels, shape, last=last)
    of_weight = from_taps(of_taps, weight.unsqueeze(2).shape, 2).squeeze(2).to(weight.dtype)
    of_bias = weight.new_zeros(rows) if bias is None else sum_rows(partial).to(weight.dtype)
    of_cond = x.new_empty(0)
    if cond is not None:
        halves = of_sums.unflatten(2, (rows // 2, 2)).permute(0, 3, 2, 1)  # (B, 2, H, T)
        if cond.shape[2] == shape.width:
            of_cond = halves.reshape(cond.shape)
        else:
            of_cond = halves.sum(3, dtype=torch.float32).to(cond.dtype).reshape(cond.shape)
    return of_x, of_weight, of_bias, of_cond
