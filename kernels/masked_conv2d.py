"""Masked convolution, plain and with a gate (see fastgen/ops/masked_conv2d.py), by the kernels of convolution.py.

Beside x and the result, x with its channels last is in memory, and for the backward of a gate the sums before it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastgen.ops.masked_conv2d import MASKS, mask_2d, weight_mask

from .convolution import conv, gate_grad, gated_conv
from .grad_weight import grad_weight
from .launch import on_device
from .tiles import Shape, arranged, by_tap


@functools.cache
def live_taps(mask: str, kernel_size: tuple[int, int], colors: int) -> int:
    """How many taps are live, of some color at least: always the first ones in raster order."""
    of_pixel_itself = int(mask == "A" and colors > 1)
    return int(mask_2d(mask, kernel_size, device=torch.device("cpu")).sum()) + of_pixel_itself


def _shape(x: Tensor, weight: Tensor, mask: str, colors: int) -> Shape:
    height, width = weight.shape[2:]
    taps = live_taps(mask, (height, width), colors)
    return Shape(x.shape[2], x.shape[3], taps, height // 2, width // 2, width, margin=width // 2)


def _live(weight: Tensor, mask: str, colors: int, gated: bool) -> Tensor:
    """Zeros behind the mask, whatever was there; without colors, taps that are not live are never read."""
    if colors == 1:
        return weight
    return torch.where(weight_mask(weight, mask, colors, 1 + gated), weight, 0)


def masked_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, mask: int, colors: int, relu: bool) -> Tensor:
    """Contiguous x (B, C, H, W), weight (O, C, KH, KW), bias (O,) -> (B, O, H, W)."""
    out = x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])
    if out.numel():
        shape = _shape(x, weight, MASKS[mask], colors)
        with on_device(x):
            conv(
                arranged(x, shape), by_tap(_live(weight, MASKS[mask], colors, False), shape.taps), out, shape, bias=bias
            )
    return out.relu_() if relu else out


def gated_masked_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, mask: int, colors: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """-> (B, O/2, H, W), and what the backward needs: the sums before the gate, (B, positions, O)."""
    batch, rows = x.shape[0], weight.shape[0]
    out = x.new_empty(batch, rows // 2, *x.shape[2:])
    shape = _shape(x, weight, MASKS[mask], colors)
    kept = x.new_empty((batch, shape.length, rows) if keep else 0)
    if out.numel():
        with on_device(x):
            live = by_tap(_live(weight, MASKS[mask], colors, True), shape.taps)
            gated_conv(arranged(x, shape), live, bias, cond, out, kept.transpose(1, 2) if keep else None, shape)
    return out, kept


def masked_conv2d_backward(
    grad: Tensor, kept: Tensor | None, x: Tensor, weight: Tensor, cond: Tensor | None, mask: int, colors: int,
    relu: bool, need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradients of x (nothing unless needed), weight, bias, cond (nothing without); kept: a gate's, or a ReLU's."""
    if kept is not None and relu:
        grad, kept = torch.where(kept <= 0, 0, grad), None
    rows = weight.shape[0]
    gated, name = kept is not None, MASKS[mask]
    of_x, of_cond = x.new_empty(x.shape if need_x else 0), x.new_empty(0)
    if not x.numel():
        of_cond = of_cond if cond is None else torch.zeros_like(cond)
        return of_x, torch.zeros_like(weight), x.new_zeros(rows), of_cond
    shape = _shape(x, weight, name, colors)
    with on_device(x):
        if kept is None:
            of_sums, of_bias = arranged(grad, shape), grad.sum((0, 2, 3), dtype=torch.float32)
        else:
            of_sums, of_bias, of_cond = gate_grad(grad, kept.transpose(1, 2), cond, shape)
        if need_x:
            conv(of_sums, by_tap(_live(weight, name, colors, gated), shape.taps), of_x, shape, flip=True)
        of_weight = _live(grad_weight(of_sums, arranged(x, shape), weight, shape), name, colors, gated)
        return of_x, of_weight, of_bias.to(weight.dtype), of_cond
