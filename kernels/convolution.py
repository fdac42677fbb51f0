"""Convolution over live taps, plain or with a gate, by the products of tiles.py, and the gradient of the gate.

The halves of a gate are two products that share x.

Least work: 2 O C operations for each position and live tap forward, as many for the gradient of x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functions import sigmoid, sigmoid_bf16, tanh, tanh_bf16
from .launch import Plan, cdiv, planned, power_within, precision_of, shared_memory, sum_rows, tiles_of
from .tiles import (
    Shape,
    block_of,
    channels_last,
    cond_kind,
    is_last,
    is_short,
    is_spread,
    pixels_of,
    product,
    steps_of,
    tile_for,
)
from .tuning import tuned


@triton.jit
def with_added(  # type: ignore[no-untyped-def]
    a, b, bias, cond, image, row, index, beyond, rows, size, BIASED: tl.constexpr, CONDITIONED: tl.constexpr
):  # fmt: skip
    """Bias (2 rows) and cond added to both halves: CONDITIONED 1, [image][2 rows]; 2, [image][2 rows][size pixels]."""
    if BIASED:
        a += tl.load(bias + row, row < rows, other=0.0).to(tl.float32)[:, None]
        b += tl.load(bias + rows + row, row < rows, other=0.0).to(tl.float32)[:, None]
    if CONDITIONED == 1:
        at = cond + image.to(tl.int64) * 2 * rows + row
        a += tl.load(at, row < rows, other=0.0).to(tl.float32)[:, None]
        b += tl.load(at + rows, row < rows, other=0.0).to(tl.float32)[:, None]
    if CONDITIONED == 2:
        at = cond + ((image.to(tl.int64) * 2 * rows + row) * size)[:, None] + index[None, :]
        known = (row < rows)[:, None] & (beyond[None, :] < 0)
        a += tl.load(at, known, other=0.0).to(tl.float32)
        b += tl.load(at + tl.cast(rows, tl.int64) * size, known, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def gate(a, b, SHORT: tl.constexpr):  # type: ignore[no-untyped-def]
    """-> tanh(a), sigmoid(b)."""
    if SHORT:
        return tanh_bf16(a), sigmoid_bf16(b)
    return tanh(a), sigmoid(b)


@triton.jit
def gate_gradients(g, a, b, SHORT: tl.constexpr):  # type: ignore[no-untyped-def]
    t, s = gate(a, b, SHORT)
    return g * s * (1 - t * t), g * t * s * (1 - s)


@triton.jit
def store_halves(  # type: ignore[no-untyped-def]
    out, a, b, image, row, position, rows, length, image_step, row_step, step
):  # fmt: skip
    """To out [image][2 rows][position], which lie so far apart."""
    at = out + (image.to(tl.int64) * image_step + row.to(tl.int64) * row_step)[:, None]
    at += (position.to(tl.int64) * step)[None, :]
    live = (row < rows)[:, None] & (position < length)[None, :]
    tl.store(at, a.to(out.dtype.element_ty), live)
    tl.store(at + tl.cast(rows, tl.int64) * row_step, b.to(out.dtype.element_ty), live)


@triton.jit
def store_sums(partial, a, b, row, rows, programs, program):  # type: ignore[no-untyped-def]
    """Sums over a program's positions, to partial [2 rows][program]."""
    at = partial + row.to(tl.int64) * programs + program
    tl.store(at, tl.sum(a, 1), row < rows)
    tl.store(at + tl.cast(rows, tl.int64) * programs, tl.sum(b, 1), row < rows)


@triton.jit
def _conv(  # type: ignore[no-untyped-def]
    x, weight, bias, added, out, channels, rows, length, row_tiles, tiles, height, width, taps, pitch, above, left,
    kernel_width, dilation,
    PACKED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr, FLIP: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out [image][row][pixel] = sums + bias + added."""
    first = tl.program_id(0) % row_tiles * ROWS
    place = tl.program_id(0) // row_tiles
    image, start = place // tiles, place % tiles * STEPS
    sums, _ = product(
        x, weight, image, start, first, first, channels, length, taps, pitch, above, left, kernel_width, dilation,
        False, FLIP, LAST, PRECISION, ROWS, STEPS, CHUNK,
    )  # fmt: skip
    row = first + tl.arange(0, ROWS)
    index, beyond = pixels_of(start + tl.arange(0, STEPS), height, width, pitch, PACKED)
    known = (row < rows)[:, None] & (beyond[None, :] < 0)
    at = ((image.to(tl.int64) * rows + row) * height * width)[:, None] + index[None, :]
    if BIASED:
        sums += tl.load(bias + row, row < rows, other=0.0).to(tl.float32)[:, None]
    if ADDED:
        sums += tl.load(added + at, known, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), known)


@triton.jit
def _gated_conv(  # type: ignore[no-untyped-def]
    x, weight, bias, cond, grad, out, kept, partial, channels, pairs, length, row_tiles, tiles, height, width,
    image_step, row_step, step, taps, pitch, above, left, kernel_width, dilation,
    PACKED: tl.constexpr, BIASED: tl.constexpr, CONDITIONED: tl.constexpr, KEEP: tl.constexpr, BACKWARD: tl.constexpr,
    SHORT: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Forward: out [image][pair][pixel], and kept [image][row][position]: the sums before the gate. Backward: kept,
    their gradients.
    """
    first = tl.program_id(0) % row_tiles * ROWS
    place = tl.program_id(0) // row_tiles
    image, start = place // tiles, place % tiles * STEPS
    a, b = product(
        x, weight, image, start, first, pairs + first, channels, length, taps, pitch, above, left, kernel_width,
        dilation, True, False, LAST, PRECISION, ROWS, STEPS, CHUNK,
    )  # fmt: skip
    pair = first + tl.arange(0, ROWS)
    position = start + tl.arange(0, STEPS)
    index, beyond = pixels_of(position, height, width, pitch, PACKED)
    size = height * width
    a, b = with_added(a, b, bias, cond, image, pair, index, beyond, pairs, size, BIASED, CONDITIONED)
    if KEEP and not BACKWARD:
        store_halves(kept, a, b, image, pair, position, pairs, length, image_step, row_step, step)
    known = (pair < pairs)[:, None] & (beyond[None, :] < 0)
    at = ((image.to(tl.int64) * pairs + pair) * height * width)[:, None] + index[None, :]
    if BACKWARD:
        a, b = gate_gradients(tl.load(grad + at, known, other=0.0).to(tl.float32), a, b, SHORT)
        store_sums(partial, a, b, pair, pairs, tl.num_programs(0) // row_tiles, place)
        store_halves(kept, a, b, image, pair, position, pairs, length, image_step, row_step, step)
    else:
        t, s = gate(a, b, SHORT)
        tl.store(out + at, (t * s).to(out.dtype.element_ty), known)


@triton.jit
def _gate_grad(  # type: ignore[no-untyped-def]
    grad, kept, out, of_cond, partial, pairs, length, row_tiles, tiles, image_step, row_step, step, to_image, to_row,
    to_step, height, width, pitch,
    PACKED: tl.constexpr, SPREAD: tl.constexpr, SHORT: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """grad [image][pair][pixel], kept [image][row][position] -> gradients of kept, and their sums over a tile."""
    place = tl.program_id(0) // row_tiles
    image, position = place // tiles, place % tiles * STEPS + tl.arange(0, STEPS)
    pair = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    index, beyond = pixels_of(position, height, width, pitch, PACKED)
    known = (pair < pairs)[:, None] & (beyond[None, :] < 0)
    size, half = tl.cast(height, tl.int64) * width, tl.cast(pairs, tl.int64)
    at = kept + (image.to(tl.int64) * image_step + pair.to(tl.int64) * row_step)[:, None]
    at += (position.to(tl.int64) * step)[None, :]
    a = tl.load(at, known, other=0.0).to(tl.float32)
    b = tl.load(at + half * row_step, known, other=0.0).to(tl.float32)
    g = tl.load(grad + ((image * half + pair) * size)[:, None] + index[None, :], known, other=0.0).to(tl.float32)
    a, b = gate_gradients(g, a, b, SHORT)
    store_halves(out, a, b, image, pair, position, pairs, length, to_image, to_row, to_step)
    if SPREAD:
        at = of_cond + ((image * 2 * half + pair) * size)[:, None] + index[None, :]
        tl.store(at, a.to(of_cond.dtype.element_ty), known)
        tl.store(at + half * size, b.to(of_cond.dtype.element_ty), known)
    store_sums(partial, a, b, pair, pairs, tl.num_programs(0) // row_tiles, place)


def conv(
    x: Tensor, weight: Tensor, out: Tensor, shape: Shape, *, bias: Tensor | None = None, added: Tensor | None = None,
    flip: bool = False,
) -> None:  # fmt: skip
    """weight (taps, O, C), or to flip (taps, C, O) -> out (B, O, pixels), of x (B, C, length)."""
    flags = {
        "PACKED": not shape.margin, "BIASED": bias is not None, "ADDED": added is not None, "FLIP": flip,
        "LAST": is_last(x), "PRECISION": precision_of(x),
    }  # fmt: skip

    def plan() -> Plan:
        (batch, channels, length), rows = x.shape, out.shape[1]
        sizes = rows, length, channels
        options = tuned("conv", x, sizes, tile_for(*sizes, 8 * x.element_size(), shared_memory(x)))
        side, steps, chunk = options["ROWS"], options["STEPS"], options["CHUNK"]
        row_tiles, tiles = cdiv(rows, side), cdiv(shape.height * shape.pitch, steps)
        numbers = channels, rows, length, row_tiles, tiles, shape.height, shape.width, *shape.tap_arguments()
        blocks = block_of(x, chunk, steps), (chunk, side) if flip else (side, chunk)
        return Plan(_conv, row_tiles * tiles * batch, numbers, flags | options, blocks)

    key = x.shape, x.dtype, out.shape[1], shape, *flags.values()
    planned(_conv, key, plan).run(tiles_of(x), tiles_of(weight), bias, added, out)


def gated_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, out: Tensor | None, kept: Tensor | None,
    shape: Shape, *, grad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`conv` and the gate -> out (B, O/2, pixels); kept (B, O, length). With `grad`, that of out: kept is the gradient
    of what goes into the gate. Returns the sums of that, (O, programs) float32.
    """
    pairs, conditioned = weight.shape[1] // 2, cond_kind(cond, shape)
    flags = {
        "PACKED": not shape.margin, "BIASED": bias is not None, "CONDITIONED": conditioned,
        "KEEP": kept is not None, "BACKWARD": grad is not None, "SHORT": is_short(x), "LAST": is_last(x),
        "PRECISION": precision_of(x),
    }  # fmt: skip

    def plan() -> Plan:
        batch, channels, length = x.shape
        sizes = pairs, length, channels
        light = grad is None and kept is None and conditioned < 2
        heuristic = tile_for(*sizes, 8 * x.element_size(), shared_memory(x), paired=True, light=light)
        kind = "gated_conv" if light else "gated_conv_kept" if grad is None else "gated_conv_backward"
        options = tuned(kind, x, sizes, heuristic)
        side, steps, chunk = options["ROWS"], options["STEPS"], options["CHUNK"]
        # all of kept is written
        row_tiles, tiles = cdiv(pairs, side), cdiv(length if flags["KEEP"] else shape.height * shape.pitch, steps)
        numbers = (
            channels, pairs, length, row_tiles, tiles, shape.height, shape.width, *steps_of(kept),
            *shape.tap_arguments(),
        )  # fmt: skip
        blocks = block_of(x, chunk, steps), (side, chunk)
        return Plan(_gated_conv, row_tiles * tiles * batch, numbers, flags | options, blocks, (batch * tiles,))

    made = planned(_gated_conv, (x.shape, x.dtype, pairs, shape, steps_of(kept), *flags.values()), plan)
    partial = x.new_empty(2 * pairs, made.sizes[0] if grad is not None else 0, dtype=torch.float32)
    made.run(tiles_of(x), tiles_of(weight), bias, cond, grad, out, kept, partial)
    return partial


def gate_grad(grad: Tensor, kept: Tensor, cond: Tensor | None, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """grad (B, O/2, ...), kept of the forward -> gradients of it (B, O, length), of bias (O,) float32, and of cond."""
    batch, pairs, length = grad.shape[0], grad.shape[1], kept.shape[2]
    out = channels_last(kept, 2 * pairs, length)
    every = is_spread(cond, shape)
    of_cond = torch.empty_like(cond) if cond is not None and every else None

    def plan() -> Plan:
        rows = power_within(pairs, 1, 64)
        steps = power_within(length, 16, 2048 // rows)
        row_tiles, tiles = cdiv(pairs, rows), cdiv(length, steps)
        numbers = (
            pairs, length, row_tiles, tiles, *kept.stride(), *out.stride(), shape.height, shape.width, shape.pitch,
        )  # fmt: skip
        options = {
            "PACKED": not shape.margin, "SPREAD": every, "SHORT": is_short(grad), "ROWS": rows, "STEPS": steps,
            "num_warps": 4,
        }  # fmt: skip
        return Plan(_gate_grad, row_tiles * tiles * batch, numbers, options, (), (tiles,))

    made = planned(_gate_grad, (grad.shape, grad.dtype, kept.stride(), shape, every), plan)
    tiles = made.sizes[0]
    partial = kept.new_empty(2 * pairs, batch * tiles, dtype=torch.float32)
    made.run(grad, kept, out, of_cond, partial)
    if cond is None or every:
        return out, sum_rows(partial), kept.new_empty(0) if of_cond is None else of_cond
    of_images = sum_rows(partial.view(2 * pairs * batch, tiles)).view(2 * pairs, batch)
    return out, of_images.sum(1), of_images.T.to(cond.dtype).reshape(cond.shape)
