"""The gradient of a convolution's weights: products of what comes in with shifted x, summed over positions.

Sums are split over programs, whose parts are added in one order.

Least work: 2 O C operations for each position and live tap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, cdiv, planned, power_within, precision_of, shared_memory, splits_for, tiles_of
from .tiles import Shape, block_of, is_last, tile_for, tile_of, within
from .tuning import tuned


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    grad, x, tile, tiles, first, second, ahead, length,
    GRAD_LAST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums over tiles of CHUNK positions."""
    parts = tl.cdiv(length, CHUNK)
    image, start = tile // parts, tile % parts * CHUNK
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for _ in range(tiles):
        g = tile_of(grad, image, first, start, ROWS, CHUNK, GRAD_LAST)
        sums = tl.dot(
            g, tile_of(x, image, start + ahead, second, CHUNK, COLUMNS, not LAST), sums, input_precision=PRECISION
        )
        start += CHUNK
        over = start >= length
        start = tl.where(over, 0, start)
        image += over
    return sums


@triton.jit
def _grad_weight(  # type: ignore[no-untyped-def]
    grad, other, x, partial, rows, others, channels, images, length, own_tiles, row_tiles, channel_tiles, share, taps,
    pitch, above, left, kernel_width, dilation,
    OTHER: tl.constexpr, GRAD_LAST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """partial [split][tap][row][channel]: sums over the split's share of positions. OTHER: grad has further rows."""
    tile = tl.program_id(0) % row_tiles
    second = tl.program_id(0) // row_tiles % channel_tiles * COLUMNS
    place = tl.program_id(0) // row_tiles // channel_tiles
    tap, split = place % taps, place // taps
    down = (tap // kernel_width - above).to(tl.int64) * pitch
    ahead = within((down + tap % kernel_width - left) * dilation, length)
    begin = split * share
    tiles = min(share, images * tl.cdiv(length, CHUNK) - begin)
    row = tile * ROWS + tl.arange(0, ROWS)
    known = row < rows
    if OTHER:
        if tile < own_tiles:
            sums = _products(
                grad, x, begin, tiles, tile * ROWS, second, ahead, length, GRAD_LAST, LAST, PRECISION, ROWS, COLUMNS,
                CHUNK,
            )  # fmt: skip
        else:
            sums = _products(
                other, x, begin, tiles, (tile - own_tiles) * ROWS, second, ahead, length, GRAD_LAST, LAST, PRECISION,
                ROWS, COLUMNS, CHUNK,
            )  # fmt: skip
            row += rows - own_tiles * ROWS
            known = row < rows + others
    else:
        sums = _products(
            grad, x, begin, tiles, tile * ROWS, second, ahead, length, GRAD_LAST, LAST, PRECISION, ROWS, COLUMNS, CHUNK
        )  # fmt: skip
    channel = second + tl.arange(0, COLUMNS)
    at = partial + ((place.to(tl.int64) * (rows + others) + row) * channels)[:, None] + channel[None, :]
    tl.store(at, sums, known[:, None] & (channel < channels)[None, :])


@triton.jit
def _collect(  # type: ignore[no-untyped-def]
    partial, out, count, splits, taps, kernel, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """partial [split][tap][i] -> out [i][kernel]: sums over splits, zeros for taps that are not live."""
    tap = tl.program_id(0) % kernel
    i = tl.program_id(0) // kernel * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([SPLITS, BLOCK], tl.float32)
    if tap < taps:
        for first in range(0, splits, SPLITS):
            split = first + tl.arange(0, SPLITS)
            at = partial + ((split.to(tl.int64) * taps + tap) * count)[:, None] + i[None, :]
            sums += tl.load(at, (split[:, None] < splits) & (i[None, :] < count), other=0.0)
    tl.store(out + i.to(tl.int64) * kernel + tap, tl.sum(sums, 0).to(out.dtype.element_ty), i < count)


def grad_weight(grad: Tensor, x: Tensor, weight: Tensor, shape: Shape, other: Tensor | None = None) -> Tensor:
    """-> the gradient of weight (R, C, ...), of grad (B, R, length), or that and other's rows, and x (B, C, length)."""
    (batch, rows, length), channels, taps = grad.shape, x.shape[1], shape.taps
    others = len(weight) - rows
    flags = {
        "OTHER": other is not None, "GRAD_LAST": is_last(grad), "LAST": is_last(x), "PRECISION": precision_of(x),
    }  # fmt: skip

    def plan() -> Plan:
        sizes = rows + others, channels, length
        heuristic = tile_for(*sizes, 8 * x.element_size(), shared_memory(x), across="COLUMNS")
        options = tuned("grad_weight", x, sizes, heuristic)
        side, columns, chunk = options["ROWS"], options["COLUMNS"], options["CHUNK"]
        own_tiles, channel_tiles = cdiv(rows, side), cdiv(channels, columns)
        row_tiles = own_tiles + cdiv(others, side)
        programs = row_tiles * channel_tiles * max(taps, 1)
        share, splits = splits_for(programs, batch * cdiv(length, chunk))
        numbers = (
            rows, others, channels, batch, length, own_tiles, row_tiles, channel_tiles, share, *shape.tap_arguments(),
        )  # fmt: skip
        blocks = [block_of(grad, side, chunk)] * (1 if other is None else 2) + [block_of(x, columns, chunk)]
        return Plan(_grad_weight, programs * splits, numbers, flags | options, tuple(blocks), (splits,))

    made = planned(_grad_weight, (grad.shape, others, channels, grad.dtype, shape, *flags.values()), plan)
    (splits,) = made.sizes
    partial = x.new_empty(splits, taps, rows + others, channels, dtype=torch.float32)
    if taps:
        made.run(tiles_of(grad), None if other is None else tiles_of(other), tiles_of(x), partial)
    out = weight.new_empty(weight.shape)

    def collect() -> Plan:
        count, kernel = (rows + others) * channels, weight[0, 0].numel()
        block = power_within(count, 16, 128)
        options = {"SPLITS": power_within(splits, 1, 16), "BLOCK": block, "num_warps": 4}
        return Plan(_collect, cdiv(count, block) * kernel, (count, splits, taps, kernel), options)

    planned(_collect, (weight.shape, weight.dtype, splits, taps), collect).run(partial, out)
    return out
