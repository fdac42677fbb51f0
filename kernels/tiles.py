"""How convolutions of sequences and images become products of tiles.

All are products of weights [rows, channels] with x [channels, positions], a position being a point in time, or a pixel
in raster order. Images get zeros behind each of their rows, as many as taps reach to a side, so that a tap is a shift
along positions there too; what it finds before the beginning and behind the end, the loads fill with zeros. So no
product asks where a tap falls, and GPUs with a copy engine for tiles (TMA) bring them to the tensor cores without the
help of registers.

Tiles begin at multiples of 16 bytes of a row. Sequences whose taps are such multiples apart are read as they lie, rows
of time; of all else there is a copy whose rows are channels. Both are tensors (B, C, positions): `is_last` tells them
apart by their strides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.ops.masked_conv2d import ALIGNED, aligned, positions

from .launch import MOST_SHARED, Plan, cdiv, fitted, planned, power_within, staged


@triton.jit
def pixels_of(position, height, width, pitch, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where results for positions go in [height][width], and what is below 0 where there is a pixel: a number, since
    Triton 3.6 mixes up masks that change their layout. PACKED: without margins.
    """
    if PACKED:
        return position, position - height * width
    i, j = position // pitch, position % pitch
    # so that neighbouring threads take neighbouring pixels; single ones, as nothing is said of where pairs begin
    index = tl.max_contiguous(i * width + j, 2)
    return index, tl.where((i < height) & (j < width), -1, 0)


@triton.jit
def _turn(  # type: ignore[no-untyped-def]
    x, out, channels, height, width, pitch, length, stride, column_tiles, tiles,
    PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [image][channel][pixel] -> out [image][position][channel]: zeros where there is no pixel."""
    column = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.program_id(0) // column_tiles
    image, position = (place // tiles).to(tl.int64), place % tiles * ROWS + tl.arange(0, ROWS)
    index, beyond = pixels_of(position, height, width, pitch, PACKED)
    at = x + ((image * channels + column) * height * width)[None, :] + index[:, None]
    v = tl.load(at, (beyond[:, None] < 0) & (column < channels)[None, :], other=0.0)
    to = out + ((image * length + position) * stride)[:, None] + column[None, :]
    tl.store(to, v, (position < length)[:, None] & (column < channels)[None, :])


@triton.jit
def tile_of(tensor, i, j, k, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """[j, j + ROWS) x [k, k + COLUMNS) of the i-th matrix, zeros outside of it. TURNED: columns lie together."""
    if TURNED:
        return tl.trans(tl.reshape(tensor.load([i, k, j]), [COLUMNS, ROWS]))
    return tl.reshape(tensor.load([i, j, k]), [ROWS, COLUMNS])


@triton.jit
def within(ahead, length):  # type: ignore[no-untyped-def]
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
        shift = within(ahead, length)
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
    light: bool = False, across: str = "STEPS",
) -> dict[str, int]:  # fmt: skip
    """Sides of a product's tile, and how it is run: what tensor cores want and shared memory holds.

    light: what follows a paired product leaves registers for twice the rows. Four warps then have 64 rows of each half
    for all columns, and read three quarters of the shared memory for a product; tiles do of the cache.
    """
    exact, plain = bits == 32, limit < MOST_SHARED  # before Hopper a tile's addresses take registers
    most = 32 if paired and exact else 64 if plain or (paired and not light) else 128
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


def cond_kind(cond: Tensor | None, shape: Shape) -> int:
    """Of cond (B, O, ...): 0, there is none; 1, a value for an image; 2, for each pixel."""
    return 0 if cond is None else 1 + is_spread(cond, shape)


def is_short(x: Tensor) -> bool:
    """Whether a gate's functions may be as rough as bfloat16."""
    return x.dtype == torch.bfloat16


def steps_of(x: Tensor | None) -> tuple[int, ...]:
    """How far images, rows and positions of x lie apart."""
    return (0, 0, 0) if x is None else x.stride()
