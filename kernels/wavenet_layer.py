"""A WaveNet layer in one kernel each way (see fastgen/ops/wavenet_layer.py).

A program has all gates of ROWS samples on chip and multiplies them with the 1x1 convolutions there: nothing but the
results goes to memory. The backward computes the gates again; it writes them, for the gradient of the 1x1 convolutions,
and the gradient of what goes into them, which convolution.py and grad_weight.py take further. Layers with more than
MOST_GATES gates have them in memory, and PyTorch's products for the 1x1 convolutions.

Least work: 2 H (2 C K + C + S) operations for each sample forward, three times that backward and the gates again.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from fastgen.ops.masked_conv2d import ALIGNED

from .convolution import gate, gate_gradients, store_halves, store_sums, with_added
from .gated_causal_conv1d import (
    gated_causal_conv1d,
    gated_causal_conv1d_backward,
    nothing_to_do,
    shape_of,
    sums_for,
    through_taps,
)
from .grad_weight import grad_weight
from .launch import (
    MOST_SHARED,
    Plan,
    cdiv,
    fitted,
    on_device,
    planned,
    power_within,
    precision_of,
    shared_memory,
    staged,
    sum_rows,
    tiles_of,
)
from .tiles import Shape, arranged, block_of, by_tap, cond_kind, is_last, is_short, product, steps_of, tile_of
from .tuning import tuned

MOST_GATES = 256  # of a sample, on chip


@triton.jit
def _project(  # type: ignore[no-untyped-def]
    z, weight, bias, x, out, sequence, position, first, outs, steps,
    BIASED: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, GATES: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """out [sequence][outs][time] = rows of weight from `first` on, times z; and x where that is the residual."""
    for start in range(0, outs, OUTS):
        row = start + tl.arange(0, OUTS)
        sums = tl.dot(tile_of(weight, 0, first + start, 0, OUTS, GATES, False), z, input_precision=PRECISION)
        if BIASED:
            sums += tl.load(bias + first + row, row < outs, other=0.0).to(tl.float32)[:, None]
        at = ((sequence.to(tl.int64) * outs + row) * steps)[:, None] + position[None, :]
        live = (row < outs)[:, None] & (position < steps)[None, :]
        if ADD:
            sums += tl.load(x + at, live, other=0.0).to(tl.float32)
        tl.store(out + at, sums.to(out.dtype.element_ty), live)


@triton.jit
def _back(  # type: ignore[no-untyped-def]
    g, grad, weight, sums, sequence, start, first, outs,
    SUM: tl.constexpr, PRECISION: tl.constexpr, GATES: tl.constexpr, STEPS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """g + rows of weight from `first` on, turned, times grad: what reaches the gates from it. SUM: grad over time."""
    for row in range(0, outs, OUTS):
        v = tile_of(grad, sequence, row, start, OUTS, STEPS, False)
        if SUM:
            of = row + tl.arange(0, OUTS)
            at = sums + of.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
            tl.store(at, tl.sum(v.to(tl.float32), 1), of < outs)
        g = tl.dot(tile_of(weight, 0, 0, first + row, GATES, OUTS, True), v, g, input_precision=PRECISION)
    return g


@triton.jit
def _layer(  # type: ignore[no-untyped-def]
    x, source, weight, bias, cond, out_weight, out_bias, residual, skip, gate_grads, gates_out, partial,
    steps, tiles, channels, gates, skips, image_step, row_step, step, taps, pitch,
    above, left, kernel_width, dilation,
    BIASED: tl.constexpr, CONDITIONED: tl.constexpr, OUT_BIASED: tl.constexpr, BACKWARD: tl.constexpr,
    SHORT: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, GATES: tl.constexpr, STEPS: tl.constexpr,
    CHUNK: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """source: x as `product` takes it. Backward: residual and skip are gradients that come in, gate_grads
    [sequence][half gate][time] and gates_out [sequence][gate][time] go out, with sums of the former in partial,
    and behind those of residual and skip.
    """
    sequence, start = tl.program_id(0) // tiles, tl.program_id(0) % tiles * STEPS
    gate_row = tl.arange(0, GATES)
    position = start + tl.arange(0, STEPS)
    if BACKWARD:
        out_sums = partial + 2 * tl.cast(gates, tl.int64) * tl.num_programs(0)
        g = tl.zeros([GATES, STEPS], tl.float32)
        g = _back(
            g, residual, out_weight, out_sums, sequence, start, 0, channels, OUT_BIASED, PRECISION, GATES, STEPS, OUTS
        )  # fmt: skip
        sums = out_sums + tl.cast(channels, tl.int64) * tl.num_programs(0)
        g = _back(
            g, skip, out_weight, sums, sequence, start, channels, skips, OUT_BIASED, PRECISION, GATES, STEPS, OUTS
        )
        g = g.to(x.dtype.element_ty)  # half the registers while the gate is computed
    a, b = product(
        source, weight, sequence, start, 0, gates, channels, steps, taps, pitch, above, left, kernel_width, dilation,
        True, False, LAST, PRECISION, GATES, STEPS, CHUNK,
    )  # fmt: skip
    a, b = with_added(
        a, b, bias, cond, sequence, gate_row, position, position - steps, gates, steps, BIASED, CONDITIONED
    )  # fmt: skip
    if BACKWARD:
        t, s = gate(a, b, SHORT)
        at = ((sequence.to(tl.int64) * gates + gate_row) * steps)[:, None] + position[None, :]
        known = (gate_row < gates)[:, None] & (position < steps)[None, :]
        tl.store(gates_out + at, (t * s).to(x.dtype.element_ty), known)
        a, b = gate_gradients(tl.where(known, g.to(tl.float32), 0.0), a, b, SHORT)
        store_halves(gate_grads, a, b, sequence, gate_row, position, gates, steps, image_step, row_step, step)
        store_sums(partial, a, b, gate_row, gates, tl.num_programs(0), tl.program_id(0))
    else:
        t, s = gate(a, b, SHORT)
        z = tl.where((gate_row < gates)[:, None], t * s, 0.0).to(x.dtype.element_ty)
        _project(
            z, out_weight, out_bias, x, residual, sequence, position, 0, channels, steps,
            OUT_BIASED, True, PRECISION, GATES, OUTS,
        )  # fmt: skip
        _project(
            z, out_weight, out_bias, x, skip, sequence, position, channels, skips, steps,
            OUT_BIASED, False, PRECISION, GATES, OUTS,
        )  # fmt: skip


def shared_by(tile: dict[str, int], bits: int, limit: int) -> int:
    """Of the larger product; gates that both 1x1 convolutions take are there beside it."""
    inner = (2 * tile["GATES"] + tile["STEPS"]) * tile["CHUNK"]
    outs = (tile["GATES"] + tile["STEPS"]) * tile["OUTS"]
    return staged(max(inner, outs) * bits // 8, tile["num_stages"], limit) + tile["GATES"] * tile["STEPS"] * bits // 8


def options_for(
    gates: int, channels: int, bits: int, limit: int = MOST_SHARED, *, backward: bool = False
) -> dict[str, int]:
    """Tile of a program: as many samples as leave both halves of their gates, and a gradient's, in registers."""
    across = power_within(gates, 16, MOST_GATES)
    plain = limit < MOST_SHARED  # before Hopper a tile's addresses take registers
    steps = min(128, (4096 if bits == 32 else 8192 if backward else 16384) // across) // (1 + plain)
    few = 2048 if bits == 16 else 4096  # gates, which four warps have registers for
    tile = {
        "GATES": across, "STEPS": steps, "CHUNK": power_within(channels, 16, 1024 // bits // (1 + plain)),
        "OUTS": 1024 // bits // (1 + plain),
        "num_warps": 8 if steps * across > few else 4, "num_stages": 3 if across < 256 else 2,
    }  # fmt: skip
    needed = functools.partial(shared_by, bits=bits, limit=limit)
    return fitted(fitted(tile, limit, needed, smaller="STEPS"), limit, needed)


def _run(
    x: Tensor, source: Tensor, live: Tensor, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None,
    cond: Tensor | None, residual: Tensor, skip: Tensor, shape: Shape, backward: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """Forward; or for `backward`, (gate_grads, gates): those, and the sums of the former, and with out_bias of the
    gradients that come in, (2H + C + S, programs). live: weights by tap.
    """
    gates, (batch, channels, steps) = out_weight.shape[1], x.shape
    skips = len(out_weight) - channels
    gate_grads, gates_out = backward or (None, None)
    flags = {
        "BIASED": bias is not None, "CONDITIONED": cond_kind(cond, shape), "OUT_BIASED": out_bias is not None,
        "BACKWARD": backward is not None, "SHORT": is_short(x), "LAST": is_last(source), "PRECISION": precision_of(x),
    }  # fmt: skip

    def plan() -> Plan:
        kernel = "layer" if backward is None else "layer_backward"
        heuristic = options_for(gates, channels, 8 * x.element_size(), shared_memory(x), backward=backward is not None)
        options = tuned(kernel, x, (gates, channels, skips), heuristic)
        if backward and options["num_stages"] == 2 and shared_memory(x) >= MOST_SHARED:
            # with two stages Triton has one place for the gradient that is summed too: the copy engine would write the
            # next tile there while tensor cores still read this one
            options = options | {"num_stages": 3}
        across, outs, chunk, columns = options["GATES"], options["OUTS"], options["CHUNK"], options["STEPS"]
        tiles = cdiv(steps, columns)
        numbers = (
            steps, tiles, channels, gates, skips, *steps_of(gate_grads), *shape.tap_arguments(),
        )  # fmt: skip
        blocks = [block_of(source, chunk, columns), (across, chunk), (outs, across)]
        blocks += [(outs, columns)] * 2 if backward else []
        return Plan(_layer, batch * tiles, numbers, flags | options, tuple(blocks), (batch * tiles,))

    key = x.shape, x.dtype, out_weight.shape, shape, steps_of(gate_grads), *flags.values()
    made = planned(_layer, key, plan)
    partial = x.new_empty(2 * gates + len(out_weight), made.sizes[0] if backward else 0, dtype=torch.float32)
    ends = [tiles_of(t) if backward else t for t in (residual, skip)]
    made.run(
        x, tiles_of(source), tiles_of(live), bias, cond, tiles_of(by_tap(out_weight.unsqueeze(2), 1)), out_bias, *ends,
        gate_grads, gates_out, partial,
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
        if gates <= MOST_GATES:
            live = by_tap(weight, shape.taps)
            _run(x, arranged(x, shape), live, bias, out_weight, out_bias, cond, residual, skip, shape)
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
    steps = x.shape[2]
    if more := -steps % ALIGNED:
        grads = [functional.pad(t, (0, more)) for t in (grad_residual, grad_skip, x)]
        cond = functional.pad(cond, (0, more)) if cond is not None and cond.shape[2] == steps else cond
        of_x, *of_weights, of_cond = wavenet_layer_backward(
            grads[0], grads[1], grads[2], weight, bias, out_weight, out_bias, cond, dilation
        )
        return of_x[..., :steps].contiguous(), *of_weights, of_cond[..., :steps].contiguous()
    shape, gates = shape_of(x, weight, dilation), out_weight.shape[1]
    with on_device(x):
        if gates > MOST_GATES:
            grad = torch.cat([grad_residual, grad_skip], 1)  # (B, C + S, T)
            of_out_bias = grad.sum((0, 2), dtype=torch.float32).to(x.dtype)
            z = gated_causal_conv1d(x, weight, bias, cond, dilation)
            of_out_weight = torch.einsum("bot,bht->oh", grad, z)
            of_x, of_weight, of_bias, of_cond = gated_causal_conv1d_backward(
                (out_weight.T @ grad).contiguous(), x, weight, bias, cond, dilation
            )
            return of_x + grad_residual, of_weight, of_bias, of_out_weight, of_out_bias, of_cond
        source = arranged(x, shape)
        of_sums, z = sums_for(source, 2 * gates), x.new_empty(x.shape[0], gates, x.shape[2])
        skip = grad_skip if grad_skip.numel() else x  # of an empty one there is nothing to take tiles from
        live = by_tap(weight, shape.taps)
        partial = _run(x, source, live, bias, out_weight, out_bias, cond, grad_residual, skip, shape, (of_sums, z))
        of_bias, of_out_bias = sum_rows(partial, x.dtype).split([2 * gates, len(out_weight)])
        one = shape._replace(taps=1, left=0, kernel_width=1)
        other = grad_skip if grad_skip.numel() else None
        of_out_weight = grad_weight(grad_residual, z, out_weight, one, other)
        of_x, of_weight, of_bias, of_cond = through_taps(
            of_sums, of_bias, source, x, live, cond, weight, shape, grad_residual
        )
        return of_x, of_weight, of_bias, of_out_weight, of_out_bias, of_cond
