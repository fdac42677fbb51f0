"""Convolution over live taps, plain or with a gate, of sequences and images, and its gradients.

All are products of weights [rows, channels] with x [channels, positions], a position being a point in time, or a pixel
in raster order. Images get zeros behind each of their rows, as many as taps reach to a side, so that a tap is a shift
along positions there too; what it finds before the beginning and behind the end, the loads fill with zeros. So no
product asks where a tap falls, and GPUs with a copy engine for tiles (TMA) bring them to the tensor cores without the
help of registers. The halves of a gate are two products that share x.

Tiles begin at multiples of 16 bytes of a row. Sequences whose taps are such multiples apart are read as they lie, rows
of time; of all else there is a copy whose rows are channels. Both are tensors (B, C, positions): `is_last` tells them
apart by their strides.

Least work: 2 O C operations for each position and live tap forward, 4 O C backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.ops.masked_conv2d import ALIGNED, aligned, positions

from .functions import sigmoid, sigmoid_bf16, tanh, tanh_bf16
from .launch import (
    MOST_SHARED,
    Plan,
    cdiv,
    fitted,
    planned,
    power_within,
    precision_of,
    shared_memory,
    splits_for,
    staged,
    sum_rows,
    tiles_of,
)
from .tuning import tuned


@triton.jit
def pixels_of(position, height, width, pitch, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where results for positions go in [height][width], and whether there is anything. PACKED: without margins."""
    if PACKED:
        return position, position < height * width
    i, j = position // pitch, position % pitch
    # so that neighbouring threads take neighbouring pixels; single ones, as nothing is said of where pairs begin
    return tl.max_contiguous(i * width + j, 2), (i < height) & (j < width)


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x, out, channels, height, width, pitch, length, stride, column_tiles, tiles,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [image][channel][pixel] -> out [image][position][channel]: zeros where there is no pixel."""
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.program_id(0) // column_tiles
    image, position = (place // tiles).to(tl.int64), place % tiles * ROWS + tl.arange(0, ROWS)
    index, live = pixels_of(position, height, width, pitch, PACKED)
    at = x + ((image * channels + column) * height * width)[None, :] + index[:, None]
    v = tl.load(at, live[:, None] & (column < channels)[None, :], other=0.0)
    to = out + ((image * length + position) * stride)[:, None] + column[None, :]
    tl.store(to, v, (position < length)[:, None] & (column < channels)[None, :])


@triton.jit
def tile_of(tensor, i, j, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """[j, j + ROWS) x [k, k + COLUMNS) of the i-th matrix, zeros outside of it. TURNED: columns lie together."""
    if TURNED:
        return tl.trans(tl.reshape(tensor.load([i, k, j]), [COLUMNS, ROWS]))
    return tl.reshape(tensor.load([i, j, k]), [ROWS, COLUMNS])


@triton.jit
def _within(ahead, length):  # type: ignore[no-untyped-def]
    """A shift that leads beyond all positions may as well lead just beyond them."""
    most = tl.cast(length, tl.int64)
    return tl.minimum(tl.maximum(ahead, -most), most).to(tl.int32)


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, weight, image, start, first, second, channels, length, taps, pitch, above, left, kernel_width, dilation,
    PAIRED: tl.constexpr, FLIP: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums [ROWS, STEPS] over live taps and channels, for rows from `first` on, and PAIRED for those from `second` on.

    weight [tap][row][channel]; FLIP: [tap][channel][row], for what has the position under the tap. LAST: x has its
    channels last.
    """
    a = tl.zeros([ROWS, STEPS], tl.float32)
    b = a
    tap, channel, column = 0, 0, 0
    ahead = -(tl.cast(above, tl.int64) * pitch + left) * dilation
    for _ in range(taps * tl.cdiv(channels, CHUNK)):
        shift = _within(ahead, length)
        v = tile_of(x, image, channel, start - shift if FLIP else start + shift, CHUNK, STEPS, LAST)
        w = tile_of(weight, tap, first, channel, ROWS, CHUNK, FLIP)
        a = tl.dot(w, v, a, input_precision=PRECISION)
        if PAIRED:
            w = tile_of(weight, tap, second, channel, ROWS, CHUNK, FLIP)
            b = tl.dot(w, v, b, input_precision=PRECISION)
        # the next channels, tap and row of taps, without divisions, which take longer than a product
        channel += CHUNK
        over = channel >= channels
        channel = tl.where(over, 0, channel)
        tap += over
        column += over
        end = column == kernel_width
        column = tl.where(end, 0, column)
        ahead += tl.where(over, dilation, 0) + tl.where(end, tl.cast(pitch - kernel_width, tl.int64) * dilation, 0)
    return a, b


@triton.jit
def with_added(  # type: ignore[no-untyped-def]
    a, b, bias, cond, image, row, index, live, rows, cond_stride, cond_step,
    BIASED: tl.constexpr, CONDITIONED: tl.constexpr,
):  # fmt: skip
    """Bias (2 rows) and cond [image][2 rows][pixel] added to both halves."""
    if BIASED:
        a += tl.load(bias + row, row < rows, other=0.0).to(tl.float32)[:, None]
        b += tl.load(bias + rows + row, row < rows, other=0.0).to(tl.float32)[:, None]
    if CONDITIONED:
        at = cond + ((image.to(tl.int64) * 2 * rows + row) * cond_stride)[:, None] + index[None, :] * cond_step
        known = (row < rows)[:, None] & live[None, :]
        a += tl.load(at, known, other=0.0).to(tl.float32)
        b += tl.load(at + tl.cast(rows, tl.int64) * cond_stride, known, other=0.0).to(tl.float32)
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
    index, live = pixels_of(start + tl.arange(0, STEPS), height, width, pitch, PACKED)
    known = (row < rows)[:, None] & live[None, :]
    at = ((image.to(tl.int64) * rows + row) * height * width)[:, None] + index[None, :]
    if BIASED:
        sums += tl.load(bias + row, row < rows, other=0.0).to(tl.float32)[:, None]
    if ADDED:
        sums += tl.load(added + at, known, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), known)


@triton.jit
def _gated_conv(  # type: ignore[no-untyped-def]
    x, weight, bias, cond, grad, out, kept, partial, channels, pairs, length, row_tiles, tiles, height, width,
    cond_stride, cond_step, image_step, row_step, step, taps, pitch, above, left, kernel_width, dilation,
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
    index, live = pixels_of(position, height, width, pitch, PACKED)
    a, b = with_added(a, b, bias, cond, image, pair, index, live, pairs, cond_stride, cond_step, BIASED, CONDITIONED)
    if KEEP and not BACKWARD:
        store_halves(kept, a, b, image, pair, position, pairs, length, image_step, row_step, step)
    known = (pair < pairs)[:, None] & live[None, :]
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
    index, live = pixels_of(position, height, width, pitch, PACKED)
    known = (pair < pairs)[:, None] & live[None, :]
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
    ahead = _within((down + tap % kernel_width - left) * dilation, length)
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
            sums += tl.load(at, (split < splits)[:, None] & (i < count)[None, :], other=0.0)
    tl.store(out + i.to(tl.int64) * kernel + tap, tl.sum(sums, 0).to(out.dtype.element_ty), i < count)


class Shape(NamedTuple):
    """Of a convolution: the image, and where its taps lie."""

    height: int
    width: int
    taps: int  # that are live: the first ones in raster order
    above: int
    left: int
    kernel_width: int
    dilation: int = 1
    margin: int = 0  # zeros behind each row

    @property
    def pitch(self) -> int:
        return self.width + self.margin

    @property
    def length(self) -> int:
        """Of a row of channels: its positions, and what makes the next row start where a tile may."""
        return positions(self.height, self.width, self.margin)

    def is_aligned(self) -> bool:
        """Whether tiles may begin at all positions under taps."""
        return not self.margin and self.width % ALIGNED == 0 and (self.taps == 1 or self.dilation % ALIGNED == 0)

    def tap_arguments(self) -> tuple[int, ...]:
        return self.taps, self.pitch, self.above, self.left, self.kernel_width, self.dilation


def shared_by(tile: dict[str, int], bits: int, limit: int, paired: bool = False) -> int:
    """Of what is multiplied, and of float32 what is turned on the way."""
    rows, columns = (
        tile["ROWS"] * (1 + paired) * tile["CHUNK"],
        tile.get("STEPS", tile.get("COLUMNS", 0)) * tile["CHUNK"],
    )
    return staged((rows + columns) * bits // 8, tile["num_stages"], limit) + (4 * (rows + columns) if bits == 32 else 0)


def tile_for(
    rows: int, columns: int, inner: int, bits: int, limit: int = MOST_SHARED, *, paired: bool = False,
    across: str = "STEPS",
) -> dict[str, int]:  # fmt: skip
    """Sides of a product's tile, and how it is run: what tensor cores want and shared memory holds."""
    exact, plain = bits == 32, limit < MOST_SHARED  # before Hopper a tile's addresses take registers
    most = 32 if paired and exact else 64 if paired or plain else 128
    tile = {
        "ROWS": power_within(rows, 16, most), across: power_within(columns, 16, 64 if paired and exact else 128),
        "CHUNK": power_within(inner, 16, 1024 // bits),
    }  # fmt: skip
    few = 4096 if bits == 16 else 1024  # results, whose operands four warps have registers for
    results = tile["ROWS"] * tile[across] * (1 + paired)
    tile |= {"num_warps": 8 if results > few else 4, "num_stages": 3}
    return fitted(tile, limit, lambda t: shared_by(t, bits, limit, paired))


def is_last(x: Tensor) -> bool:
    """Whether of x (B, C, positions) the channels of a position lie together."""
    return x.stride(2) != 1


def block_of(x: Tensor, rows: int, columns: int) -> tuple[int, int]:
    """Of tiles of x (B, rows, columns), as `tiles_of` has them."""
    return (columns, rows) if is_last(x) else (rows, columns)


def channels_last(x: Tensor, channels: int, positions: int) -> Tensor:
    """A new (B, channels, positions) like x, with its channels last."""
    rows = x.new_empty(x.shape[0], positions, aligned(channels))
    return rows.transpose(1, 2)[:, :channels]


def arranged(x: Tensor, shape: Shape) -> Tensor:
    """x (B, C, ...), contiguous -> as the products take it, (B, C, length)."""
    if shape.is_aligned():
        return x.flatten(2)
    channels, length = x.shape[1], shape.length
    out = channels_last(x, channels, length)

    def plan() -> Plan:
        rows, columns = power_within(length, 16, 64), power_within(channels, 16, 64)
        column_tiles, tiles = cdiv(channels, columns), cdiv(length, rows)
        numbers = channels, shape.height, shape.width, shape.pitch, length, out.stride(2), column_tiles, tiles
        options = {"PACKED": not shape.margin, "ROWS": rows, "COLUMNS": columns, "num_warps": 4}
        return Plan(_turn, column_tiles * tiles * x.shape[0], numbers, options)

    planned(_turn, (x.shape, x.dtype, shape), plan).run(x, out)
    return out


def by_tap(weight: Tensor, taps: int) -> Tensor:
    """Live weights of (O, C, ...) -> (taps, O, C), with rows that tiles can be cut from."""
    channels = weight.shape[1]
    live = weight.flatten(2).permute(2, 0, 1)[:taps]
    if channels % ALIGNED == 0 and taps:
        return live.contiguous()
    out = weight.new_zeros(max(taps, 1), len(weight), aligned(channels))
    out[:taps, :, :channels] = live
    return out


def is_spread(cond: Tensor | None, shape: Shape) -> bool:
    """Whether cond (B, O, ...) has a value for each pixel, rather than one for an image."""
    return cond is not None and cond[0, 0].numel() == shape.height * shape.width


def is_short(x: Tensor) -> bool:
    """Whether a gate's functions may be as rough as bfloat16."""
    return x.dtype == torch.bfloat16


def steps_of(x: Tensor | None) -> tuple[int, ...]:
    """How far images, rows and positions of x lie apart."""
    return (0, 0, 0) if x is None else x.stride()


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
    pairs, every = weight.shape[1] // 2, is_spread(cond, shape)
    flags = {
        "PACKED": not shape.margin, "BIASED": bias is not None, "CONDITIONED": cond is not None,
        "KEEP": kept is not None, "BACKWARD": grad is not None, "SHORT": is_short(x), "LAST": is_last(x),
        "PRECISION": precision_of(x),
    }  # fmt: skip

    def plan() -> Plan:
        batch, channels, length = x.shape
        sizes = pairs, length, channels
        heuristic = tile_for(*sizes, 8 * x.element_size(), shared_memory(x), paired=True)
        options = tuned("gated_conv" if grad is None else "gated_conv_backward", x, sizes, heuristic)
        side, steps, chunk = options["ROWS"], options["STEPS"], options["CHUNK"]
        # all of kept is written
        row_tiles, tiles = cdiv(pairs, side), cdiv(length if flags["KEEP"] else shape.height * shape.pitch, steps)
        numbers = (
            channels, pairs, length, row_tiles, tiles, shape.height, shape.width,
            shape.height * shape.width if every else 1, int(every), *steps_of(kept), *shape.tap_arguments(),
        )  # fmt: skip
        blocks = block_of(x, chunk, steps), (side, chunk)
        return Plan(_gated_conv, row_tiles * tiles * batch, numbers, flags | options, blocks, (batch * tiles,))

    made = planned(_gated_conv, (x.shape, x.dtype, pairs, shape, every, steps_of(kept), *flags.values()), plan)
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
