"""Affine coupling, forward and backward: one pass over x and params (see fastgen/ops/affine_coupling.py).

A sample's channels lie one after another, so that the transformed ones are one run of numbers, and so are the others.
A program takes BLOCK numbers of a sample's runs. `given` are params, a name that Triton's launcher has for itself.
Least traffic, in elements: 2 per element of x and 1 per parameter forward; backward 3 and 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functions import log1p_unit, tanh
from .launch import Plan, cdiv, on_device, planned, power_within, sum_rows

SCALES = ("exp", "tanh", "sigmoid", "none")
LAYOUTS = ("scale_shift", "shift_scale", "interleaved")


@triton.jit
def _log_scale(s, bound, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """-> l, and dl / ds."""
    if SCALE == "tanh":
        t = tanh(s / bound)
        return bound * t, 1 - t * t
    elif SCALE == "sigmoid":
        z = s + 2
        e = tl.exp(-tl.abs(z))
        return tl.minimum(z, 0.0) - log1p_unit(e), tl.where(z > 0, e, 1.0) / (1 + e)
    else:
        return s, tl.full(s.shape, 1.0, tl.float32)


@triton.jit
def _pass_through(x, y, chunk, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = chunk.to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < count - start
    tl.store(y + start + i, tl.load(x + start + i, live), live)


@triton.jit
def _parameters(given, start, i, active, pixels, LAYOUT: tl.constexpr, HAS_SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where scale and shift of elements start + i of the transformed run lie."""
    if not HAS_SCALE:
        return given + start + i, given + start + i
    elif LAYOUT == "interleaved":
        shift = given + start + i + (start + i) // pixels * pixels
        return shift + pixels, shift
    elif LAYOUT == "scale_shift":
        return given + start + i, given + active + start + i
    else:
        return given + active + start + i, given + start + i


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    x, given, mask, y, partial, size, active, first, rest, pixels, mask_stride, bound, active_chunks, chunks,
    SCALE: tl.constexpr, LAYOUT: tl.constexpr, INVERSE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    x += sample * size
    y += sample * size
    if chunk >= active_chunks:
        _pass_through(x + rest, y + rest, chunk - active_chunks, size - active, BLOCK)
        return
    start = chunk.to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < active - start
    HAS_SCALE: tl.constexpr = SCALE != "none"
    given += sample * active * (2 if HAS_SCALE else 1)
    at_scale, at_shift = _parameters(given, start, i, active, pixels, LAYOUT, HAS_SCALE)
    v = tl.load(x + first + start + i, live, other=0.0).to(tl.float32)
    out = v
    shift = tl.load(at_shift, live, other=0.0).to(tl.float32)
    through = live == 0
    if MASKED:
        through = tl.load(mask + sample * mask_stride + start + i, live, other=1) != 0
    if HAS_SCALE:
        log_scale, _ = _log_scale(tl.load(at_scale, live, other=0.0).to(tl.float32), bound, SCALE)
        out = (v - shift) * tl.exp(-log_scale) if INVERSE else v * tl.exp(log_scale) + shift
        total = tl.sum(tl.where(through, 0.0, log_scale))
        tl.store(partial + sample * active_chunks + chunk, -total if INVERSE else total)
    else:
        out = v - shift if INVERSE else v + shift
    tl.store(y + first + start + i, tl.where(through, v, out).to(y.dtype.element_ty), live)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, grad_log_det, kept, given, mask, grad_x, grad_params, size, active, first, rest, pixels, mask_stride, bound,
    active_chunks, chunks,
    SCALE: tl.constexpr, LAYOUT: tl.constexpr, INVERSE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    grad += sample * size
    grad_x += sample * size
    if chunk >= active_chunks:
        _pass_through(grad + rest, grad_x + rest, chunk - active_chunks, size - active, BLOCK)
        return
    start = chunk.to(tl.int64) * BLOCK
    i = tl.arange(0, BLOCK)
    live = i < active - start
    HAS_SCALE: tl.constexpr = SCALE != "none"
    row = sample * active * (2 if HAS_SCALE else 1)
    at_scale, _ = _parameters(given + row, start, i, active, pixels, LAYOUT, HAS_SCALE)
    to_scale, to_shift = _parameters(grad_params + row, start, i, active, pixels, LAYOUT, HAS_SCALE)
    g = tl.load(grad + first + start + i, live, other=0.0).to(tl.float32)
    through = live == 0
    if MASKED:
        through = tl.load(mask + sample * mask_stride + start + i, live, other=1) != 0
    of_x = g
    if HAS_SCALE:
        v = tl.load(kept + sample * size + first + start + i, live, other=0.0).to(tl.float32)
        log_scale, slope = _log_scale(tl.load(at_scale, live, other=0.0).to(tl.float32), bound, SCALE)
        of_x = g * tl.exp(-log_scale if INVERSE else log_scale)
        of_log_scale = of_x * v if not INVERSE else -g * v
        of_sum = tl.load(grad_log_det + sample).to(tl.float32)
        of_scale = (of_log_scale + (-of_sum if INVERSE else of_sum)) * slope
        tl.store(to_scale, tl.where(through, 0.0, of_scale).to(grad_params.dtype.element_ty), live)
    of_shift = -of_x if INVERSE else g
    tl.store(to_shift, tl.where(through, 0.0, of_shift).to(grad_params.dtype.element_ty), live)
    tl.store(grad_x + first + start + i, tl.where(through, g, of_x).to(grad_x.dtype.element_ty), live)


def block_for(active: int, size: int) -> int:
    """Numbers for each program: two or four 128-bit accesses of each of its 128 threads, fewer for small samples."""
    return power_within(max(active, size - active), 128, 2048)


def _plan(
    kernel: Any, x: Tensor, params: Tensor, mask: Tensor | None, scale: int, bound: float, layout: int, swap: bool,
    inverse: bool,
) -> Plan:  # fmt: skip
    """Its `sizes`: programs for a sample's transformed part."""

    def make() -> Plan:
        pixels = x.shape[2:].numel()
        size, active = x.shape[1] * pixels, params.shape[1] * pixels // (1 if SCALES[scale] == "none" else 2)
        first, rest = (0, active) if swap else (size - active, 0)
        block = block_for(active, size)
        active_chunks = cdiv(active, block)
        chunks = active_chunks + cdiv(size - active, block)
        mask_stride = size if mask is not None and mask.shape[0] == x.shape[0] else 0
        numbers = size, active, first, rest, pixels, mask_stride, bound, active_chunks, chunks
        options = {
            "SCALE": SCALES[scale], "LAYOUT": LAYOUTS[layout], "INVERSE": inverse, "MASKED": mask is not None,
            "BLOCK": block, "num_warps": 4,
        }  # fmt: skip
        return Plan(kernel, x.shape[0] * chunks, numbers, options, (), (active_chunks,))

    of_mask = None if mask is None else mask.shape[0]
    return planned(kernel, (x.shape, params.shape, of_mask, x.dtype, scale, bound, layout, swap, inverse), make)


def affine_coupling(
    x: Tensor, params: Tensor, mask: Tensor | None, scale: int, bound: float, layout: int, swap: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Contiguous x (B, D, *S), params and mask -> y, log_det (B,) float32."""
    with on_device(x):
        plan = _plan(_forward, x, params, mask, scale, bound, layout, swap, inverse)
        y, partial = torch.empty_like(x), x.new_empty(x.shape[0], plan.sizes[0], dtype=torch.float32)
        if x.numel():
            plan.run(x, params, mask, y, partial)
        if SCALES[scale] == "none":
            return y, x.new_zeros(x.shape[0], dtype=torch.float32)
        return y, sum_rows(partial)


def affine_coupling_backward(
    grad: Tensor, grad_log_det: Tensor, kept: Tensor, params: Tensor, mask: Tensor | None, scale: int, bound: float,
    layout: int, swap: bool, inverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`kept`: x, or the output of the inverse -> gradients of x and params."""
    grad_x, grad_params = torch.empty_like(kept), torch.empty_like(params)
    if kept.numel():
        with on_device(kept):
            plan = _plan(_backward, kept, params, mask, scale, bound, layout, swap, inverse)
            plan.run(grad, grad_log_det, kept, params, mask, grad_x, grad_params)
    return grad_x, grad_params
