"""A WaveNet layer in one kernel each way (see fastgen/ops/wavenet_layer.py).

A program has all gates of ROWS samples on chip and multiplies them with the 1x1 convolutions there: nothing but the
results goes to memory. The backward computes the gates again; it writes them, for the gradient of the 1x1 convolutions,
and the gradient of what goes into them, which convolution.py's kernels take further. Layers with more than MOST_GATES
gates have them in memory, and PyTorch's products for the 1x1 convolutions.

Least work: 2 H (2 C K + C + S) operations for each sample forward, three times that backward and the gates again.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .convolution import (
    Shape,
    both_halves,
    gate_gradients,
    grad_weight,
    is_spread,
    power_within,
    product,
    store_halves,
    store_sums,
)
from .functions import sigmoid, tanh
from .gated_causal_conv1d import (
    arranged,
    columns_of,
    gated_causal_conv1d,
    gated_causal_conv1d_backward,
    nothing_to_do,
    shape_of,
    through_taps,
)
from .launch import MOST_SHARED, fitted, on_device, precision_of, shared_memory, staged
from .tuning import tuned

MOST_GATES = 256  # of a sample, on chip


@triton.jit
def _project(  # type: ignore[no-untyped-def]
    z, weight, bias, x, out, pixel, gate, pixels, steps, gates, outs,
    BIASED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """out [sequence][outs][time] = z weight^T + bias, and x where that is the residual."""
    for first in range(0, outs, OUTS):
        row = first + tl.arange(0, OUTS)
        known = (gate < gates)[:, None] & (row < outs)[None, :]
        w = tl.load(weight + row.to(tl.int64)[None, :] * gates + gate[:, None], known, other=0.0)
        sums = tl.dot(z, w, input_precision=PRECISION)
        if BIASED:
            sums += tl.load(bias + row, row < outs, other=0.0).to(tl.float32)[None, :]
        at = (pixel // steps * outs * steps + pixel % steps)[:, None] + row.to(tl.int64)[None, :] * steps
        live = (pixel < pixels)[:, None] & (row < outs)[None, :]
        if ADD:
            sums += tl.load(x + at, live, other=0.0).to(tl.float32)
        tl.store(out + at, sums.to(out.dtype.element_ty), live)


@triton.jit
def _back(  # type: ignore[no-untyped-def]
    g, grad, weight, pixel, gate, pixels, steps, gates, outs, PRECISION: tl.constexpr, OUTS: tl.constexpr
):  # fmt: skip
    """g + grad weight: what reaches the gates from grad [sequence][outs][time]."""
    for first in range(0, outs, OUTS):
        row = first + tl.arange(0, OUTS)
        at = (pixel // steps * outs * steps + pixel % steps)[:, None] + row.to(tl.int64)[None, :] * steps
        v = tl.load(grad + at, (pixel < pixels)[:, None] & (row < outs)[None, :], other=0.0)
        known = (row < outs)[:, None] & (gate < gates)[None, :]
        w = tl.load(weight + row.to(tl.int64)[:, None] * gates + gate[None, :], known, other=0.0)
        g = tl.dot(v, w, g, input_precision=PRECISION)
    return g


@triton.jit
def _layer(  # type: ignore[no-untyped-def]
    x, source, weight, bias, cond, out_weight, out_bias, residual, skip, gate_grads, gates_out, partial,
    pixels, steps, channels, gates, skips, cond_stride, cond_step, taps, left, dilation,
    BIASED: tl.constexpr, CONDITIONED: tl.constexpr, OUT_BIASED: tl.constexpr, BACKWARD: tl.constexpr,
    LAST: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, GATES: tl.constexpr, CHUNK: tl.constexpr,
    OUTS: tl.constexpr,
):  # fmt: skip
    """source: x as `product` takes it. Backward: residual and skip are gradients that come in, gate_grads
    [sample][gate][half] and gates_out [sample][gate] go out, with sums of the former in partial.
    """
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    gate = tl.arange(0, GATES)
    column = tl.arange(0, 2 * GATES)
    skip_weight = out_weight + tl.cast(channels, tl.int64) * gates
    if BACKWARD:
        g = tl.zeros([ROWS, GATES], tl.float32)
        g = _back(g, residual, out_weight, pixel, gate, pixels, steps, gates, channels, PRECISION, OUTS)
        g = _back(g, skip, skip_weight, pixel, gate, pixels, steps, gates, skips, PRECISION, OUTS)
        g = g.to(x.dtype.element_ty)  # half the registers while the gate is computed
    sums = product(
        source, weight, pixel, column, pixels, 1, steps, channels, 2 * gates, taps, 0, left, taps, dilation,
        LAST, False, PRECISION, ROWS, 2 * GATES, CHUNK,
    )  # fmt: skip
    a, b = both_halves(
        sums, bias, cond, pixel, gate, pixels, steps, gates, cond_stride, cond_step, BIASED, CONDITIONED, ROWS, GATES
    )
    z = (tanh(a) * sigmoid(b)).to(x.dtype.element_ty)
    if BACKWARD:
        live = (pixel < pixels)[:, None] & (gate < gates)[None, :]
        tl.store(gates_out + pixel[:, None] * gates + gate[None, :], z, live)
        a, b = gate_gradients(g.to(tl.float32), a, b)
        store_halves(a, b, gate_grads, pixel, column, pixels, 2 * gates, ROWS, GATES)
        store_sums(a, b, partial, gate, gates)
    else:
        _project(
            z, out_weight, out_bias, x, residual, pixel, gate, pixels, steps, gates, channels,
            OUT_BIASED, True, PRECISION, OUTS,
        )  # fmt: skip
        skip_bias = out_bias + channels if OUT_BIASED else out_bias
        _project(
            z, skip_weight, skip_bias, x, skip, pixel, gate, pixels, steps, gates, skips,
            OUT_BIASED, False, PRECISION, OUTS,
        )  # fmt: skip


def shared_by(tile: dict[str, int], bits: int, limit: int) -> int:
    """Of the larger product, or of the sums while their halves come apart."""
    gate = (tile["ROWS"] + 2 * tile["GATES"]) * tile["CHUNK"]
    outs = (tile["ROWS"] + tile["GATES"]) * tile["OUTS"]
    apart = 4 * tile["ROWS"] * tile["GATES"]
    return max(apart, staged(max(gate, outs) * bits // 8, tile["num_stages"], limit))


def options_for(
    gates: int, channels: int, bits: int, limit: int = MOST_SHARED, *, backward: bool = False
) -> dict[str, int]:
    """Tile of a program: as many samples as leave both halves of their gates, and a gradient's, in registers."""
    across = power_within(gates, 16, MOST_GATES)
    rows = min(128, (4096 if bits == 32 else 8192 if backward else 16384) // across)
    few = 2048 if bits == 16 else 4096  # gates, which four warps have registers for
    tile = {
        "ROWS": rows, "GATES": across, "CHUNK": power_within(channels, 16, 1024 // bits), "OUTS": 1024 // bits,
        "num_warps": 8 if rows * across > few else 4, "num_stages": 3 if across < 256 else 2,
    }  # fmt: skip
    needed = functools.partial(shared_by, bits=bits, limit=limit)
    return fitted(fitted(tile, limit, needed, smaller="ROWS"), limit, needed)


def _run(
    x: Tensor, source: Tensor, last: bool, weight: Tensor, bias: Tensor | None, out_weight: Tensor,
    out_bias: Tensor | None, cond: Tensor | None, residual: Tensor, skip: Tensor, shape: Shape,
    backward: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Forward; or for `backward`, (gate_grads, gates): those, and the sums of the former, (2H, programs)."""
    gates, pixels = out_weight.shape[1], x.shape[0] * x.shape[2]
    kernel = "layer" if backward is None else "layer_backward"
    sizes = (gates, x.shape[1], skip.shape[1])
    heuristic = options_for(gates, x.shape[1], 8 * x.element_size(), shared_memory(x), backward=backward is not None)
    options = tuned(kernel, x, sizes, heuristic)
    programs = triton.cdiv(pixels, options["ROWS"])
    partial = x.new_empty(2 * gates, programs if backward else 0, dtype=torch.float32)
    spread = is_spread(cond, shape)
    gate_grads, gates_out = backward or (None, None)
    _layer[(programs,)](
        x, source, columns_of(weight), bias, cond, out_weight, out_bias, residual, skip, gate_grads, gates_out, partial,
        pixels, shape.width, x.shape[1], gates, skip.shape[1], shape.width if spread else 1, int(spread), shape.taps,
        shape.left, shape.dilation, BIASED=bias is not None, CONDITIONED=cond is not None,
        OUT_BIASED=out_bias is not None, BACKWARD=backward is not None, LAST=last, PRECISION=precision_of(x), **options,
    )  # fmt: skip
    return partial


def wavenet_layer_out(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, cond: Tensor | None,
    dilation: int, residual: Tensor, skip: Tensor,
) -> None:  # fmt: skip
    """Contiguous x (B, C, T) and the rest -> into residual (B, C, T) and skip (B, S, T)."""
    if not x.numel():
        return
    shape, gates = shape_of(x, weight, dilation), out_weight.shape[1]
    with on_device(x):
        source, last = arranged(x, shape)
        if gates <= MOST_GATES:
            _run(x, source, last, weight, bias, out_weight, out_bias, cond, residual, skip, shape)
            return
        out = out_weight @ gated_causal_conv1d(x, weight, bias, cond, dilation)
        if out_bias is not None:
            out += out_bias[:, None]
        torch.add(x, out[:, : x.shape[1]], out=residual)
        skip.copy_(out[:, x.shape[1] :])


def wavenet_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, cond: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`wavenet_layer_out` into new tensors."""
    residual, skip = torch.empty_like(x), x.new_empty(x.shape[0], out_weight.shape[0] - x.shape[1], x.shape[2])
    wavenet_layer_out(x, weight, bias, out_weight, out_bias, cond, dilation, residual, skip)
    return residual, skip


def wavenet_layer_backward(
    grad_residual: Tensor, grad_skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor,
    out_bias: Tensor | None, cond: Tensor | None, dilation: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> gradients of x, weight, bias, out_weight, out_bias, cond."""
    if not x.numel():
        of_x, of_weight, of_bias, of_cond = nothing_to_do(x, weight, cond)
        return of_x, of_weight, of_bias, torch.zeros_like(out_weight), out_weight.new_zeros(len(out_weight)), of_cond
    shape, gates = shape_of(x, weight, dilation), out_weight.shape[1]
    grads = (grad_residual, grad_skip)
    with on_device(x):
        of_out_bias = torch.cat([g.sum((0, 2), dtype=torch.float32) for g in grads]).to(out_weight.dtype)
        if gates > MOST_GATES:
            grad = torch.cat(grads, 1)  # (B, C + S, T)
            z = gated_causal_conv1d(x, weight, bias, cond, dilation)
            of_out_weight = torch.einsum("bot,bht->oh", grad, z)
            of_x, of_weight, of_bias, of_cond = gated_causal_conv1d_backward(
                (out_weight.T @ grad).contiguous(), x, weight, bias, cond, dilation
            )
            return of_x + grad_residual, of_weight, of_bias, of_out_weight, of_out_bias, of_cond
        source, last = arranged(x, shape)
        of_sums, z = (x.new_empty(x.shape[0], x.shape[2], n) for n in (2 * gates, gates))
        partial = _run(
            x, source, last, weight, bias, out_weight, out_bias, cond, grad_residual, grad_skip, shape, (of_sums, z)
        )
        one = Shape(1, shape.width, 1, 0, 0, 1)
        parts = [grad_weight(g, z, g.shape[1], gates, one, grad_last=False)[0] for g in grads if g.numel()]
        of_out_weight = torch.cat(parts).to(out_weight.dtype)
        of_x, of_weight, of_bias, of_cond = through_taps(
            of_sums, partial, source, last, x, weight, bias, cond, shape, grad_residual
        )
        return of_x, of_weight, of_bias, of_out_weight, of_out_bias, of_cond
