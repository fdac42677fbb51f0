"""Convolution over live taps, plain or with a gate, in one or two dimensions, and its gradients.

A sequence is an image one pixel high. Live taps are the first ones in raster order, so a loop over (tap, channels)
computes them alone: ROWS pixels by COLUMNS results are in registers, as one product on tensor cores. Whatever the tap,
memory is read 16 bytes at a time: along the channels of a pixel where x has its channels last, along the pixels where
it does not and shifts leave them aligned. Of a gate the two halves are neighbours among the weights' columns, so both
are one product and come apart in registers.

Least work: 2 O C operations for each pixel and live tap forward, 4 O C backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functions import sigmoid, tanh
from .launch import MOST_SHARED, fitted, precision_of, shared_memory, splits_for, staged
from .tuning import tuned


@triton.jit
def _neighbour(  # type: ignore[no-untyped-def]
    pixel, pixels, height, width, tap, above, left, kernel_width, dilation, ALIGNED: tl.constexpr, FLIP: tl.constexpr
):  # fmt: skip
    """How far ahead the pixel under a tap lies (FLIP: the one that has this pixel under the tap), and if it exists.

    ALIGNED: sequences and the distances of taps are multiples of 16, so 16 neighbours share the second answer.
    """
    down = tl.cast(tap // kernel_width - above, tl.int64) * dilation
    right = tl.cast(tap % kernel_width - left, tl.int64) * dilation
    if FLIP:
        down, right = -down, -right
    in_image = pixel % (tl.cast(height, tl.int64) * width)
    i = in_image // width + down
    j = in_image % width + right
    inside = (pixel < pixels) & (i >= 0) & (i < height) & (j >= 0) & (j < width)
    if ALIGNED:
        inside = tl.max_constancy(inside, [16])
    return down * width + right, inside


@triton.jit
def _places(pixel, channel, size, channels, LAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """Offsets [pixel, channel] into [image][pixel][channel], or without LAST into [image][channel][pixel]."""
    if LAST:
        return pixel[:, None] * channels + channel[None, :]
    return (pixel // size * channels * size + pixel % size)[:, None] + channel.to(tl.int64)[None, :] * size


@triton.jit
def product(  # type: ignore[no-untyped-def]
    x, weight, pixel, column, pixels, height, width, channels, columns, taps, above, left, kernel_width, dilation,
    LAST: tl.constexpr, FLIP: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """weight [tap][channel][column] -> sums [ROWS, COLUMNS] over live taps and channels."""
    inner = tl.arange(0, CHUNK)
    parts = tl.cdiv(channels, CHUNK)
    size = tl.cast(height, tl.int64) * width
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in range(taps * parts):
        tap = step // parts
        channel = step % parts * CHUNK + inner
        ahead, inside = _neighbour(
            pixel, pixels, height, width, tap, above, left, kernel_width, dilation, not LAST, FLIP
        )  # fmt: skip
        seen = inside[:, None] & (channel < channels)[None, :]
        at = x + _places(pixel, channel, size, channels, LAST) + ahead * (channels if LAST else 1)
        v = tl.load(at, seen, other=0.0)
        known = (channel < channels)[:, None] & (column < columns)[None, :]
        at = weight + (tap * channels + channel).to(tl.int64)[:, None] * columns + column[None, :]
        sums = tl.dot(v, tl.load(at, known, other=0.0), sums, input_precision=PRECISION)
    return sums


@triton.jit
def both_halves(  # type: ignore[no-untyped-def]
    sums, bias, cond, pixel, pair, pixels, size, pairs, cond_stride, cond_step,
    BIASED: tl.constexpr, CONDITIONED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Of sums [ROWS, 2 PAIRS] what goes into tanh and into the sigmoid, with bias (2 pairs) and cond added."""
    a, b = tl.split(tl.reshape(sums, [ROWS, PAIRS, 2]))
    if BIASED:
        a += tl.load(bias + pair, pair < pairs, other=0.0).to(tl.float32)[None, :]
        b += tl.load(bias + pairs + pair, pair < pairs, other=0.0).to(tl.float32)[None, :]
    if CONDITIONED:
        live = (pixel < pixels)[:, None] & (pair < pairs)[None, :]
        image, in_image = pixel // size, pixel % size
        at = cond + (image[:, None] * 2 * pairs + pair[None, :]) * cond_stride + in_image[:, None] * cond_step
        a += tl.load(at, live, other=0.0).to(tl.float32)
        b += tl.load(at + tl.cast(pairs, tl.int64) * cond_stride, live, other=0.0).to(tl.float32)
    return a, b


@triton.jit
def store_halves(a, b, out, pixel, column, pixels, columns, ROWS: tl.constexpr, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def]
    """To out [pixel][column], the halves in turns again."""
    both = tl.reshape(tl.join(a, b), [ROWS, 2 * PAIRS]).to(out.dtype.element_ty)
    live = (pixel < pixels)[:, None] & (column < columns)[None, :]
    tl.store(out + pixel[:, None] * columns + column[None, :], both, live)


@triton.jit
def gate_gradients(g, a, b):  # type: ignore[no-untyped-def]
    t, s = tanh(a), sigmoid(b)
    return g * s * (1 - t * t), g * t * s * (1 - s)


@triton.jit
def store_sums(a, b, partial, pair, pairs):  # type: ignore[no-untyped-def]
    """Sums over a program's pixels, to partial [half][pair][program]."""
    programs = tl.num_programs(0)
    at = partial + pair.to(tl.int64) * programs + tl.program_id(0)
    tl.store(at, tl.sum(a, 0), pair < pairs)
    tl.store(at + tl.cast(pairs, tl.int64) * programs, tl.sum(b, 0), pair < pairs)


@triton.jit
def _conv(  # type: ignore[no-untyped-def]
    x, weight, bias, added, out, pixels, height, width, channels, columns, taps, above, left, kernel_width, dilation,
    BIASED: tl.constexpr, ADDED: tl.constexpr, LAST: tl.constexpr, FLIP: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out [image][column][pixel] = sums + bias + added."""
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    sums = product(
        x, weight, pixel, column, pixels, height, width, channels, columns, taps, above, left, kernel_width, dilation,
        LAST, FLIP, PRECISION, ROWS, COLUMNS, CHUNK,
    )  # fmt: skip
    live = (pixel < pixels)[:, None] & (column < columns)[None, :]
    at = _places(pixel, column, tl.cast(height, tl.int64) * width, columns, False)
    if BIASED:
        sums += tl.load(bias + column, column < columns, other=0.0).to(tl.float32)[None, :]
    if ADDED:
        sums += tl.load(added + at, live, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), live)


@triton.jit
def _gated_conv(  # type: ignore[no-untyped-def]
    x, weight, bias, cond, grad, out, kept, partial, pixels, height, width, channels, columns, cond_stride, cond_step,
    taps, above, left, kernel_width, dilation,
    BIASED: tl.constexpr, CONDITIONED: tl.constexpr, KEEP: tl.constexpr, BACKWARD: tl.constexpr, LAST: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Forward: out [image][pair][pixel], and kept: the sums before the gate. Backward: kept, their gradients."""
    PAIRS: tl.constexpr = COLUMNS // 2
    pixel = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    size, pairs = tl.cast(height, tl.int64) * width, columns // 2
    sums = product(
        x, weight, pixel, column, pixels, height, width, channels, columns, taps, above, left, kernel_width, dilation,
        LAST, False, PRECISION, ROWS, COLUMNS, CHUNK,
    )  # fmt: skip
    a, b = both_halves(
        sums, bias, cond, pixel, pair, pixels, size, pairs, cond_stride, cond_step, BIASED, CONDITIONED, ROWS, PAIRS
    )
    live = (pixel < pixels)[:, None] & (pair < pairs)[None, :]
    at = _places(pixel, pair, size, pairs, False)
    if BACKWARD:
        a, b = gate_gradients(tl.load(grad + at, live, other=0.0).to(tl.float32), a, b)
        store_sums(a, b, partial, pair, pairs)
    else:
        tl.store(out + at, (tanh(a) * sigmoid(b)).to(out.dtype.element_ty), live)
    if KEEP:
        store_halves(a, b, kept, pixel, column, pixels, columns, ROWS, PAIRS)


@triton.jit
def _gate_grad(  # type: ignore[no-untyped-def]
    grad, kept, out, of_cond, partial, pairs, size, tiles, SPREAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad [image][pair][pixel], kept [pixel][column] -> gradients of kept, and their sums over tiles of an image."""
    PAIRS: tl.constexpr = COLUMNS // 2
    image = (tl.program_id(0) // tiles).to(tl.int64)
    in_image = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    pixel, end = image * size + in_image, (image + 1) * size
    pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (in_image < size)[:, None] & (column < 2 * pairs)[None, :]
    sums = tl.load(kept + pixel[:, None] * (2 * pairs) + column[None, :], inside, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(sums, [ROWS, PAIRS, 2]))
    live = (in_image < size)[:, None] & (pair < pairs)[None, :]
    g = tl.load(grad + (image * pairs + pair[None, :]) * size + in_image[:, None], live, other=0.0).to(tl.float32)
    a, b = gate_gradients(g, a, b)
    store_halves(a, b, out, pixel, column, end, 2 * pairs, ROWS, PAIRS)
    if SPREAD:
        at = of_cond + (image * 2 * pairs + pair[None, :]) * size + in_image[:, None]
        tl.store(at, a.to(of_cond.dtype.element_ty), live)
        tl.store(at + tl.cast(pairs, tl.int64) * size, b.to(of_cond.dtype.element_ty), live)
    store_sums(a, b, partial, pair, pairs)


@triton.jit
def _grad_weight(  # type: ignore[no-untyped-def]
    grad, x, partial, pixels, height, width, channels, columns, channel_tiles, share, above, left, kernel_width,
    dilation,
    GRAD_LAST: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """partial [split][tap][column][channel]: sums over the split's share of all tiles of CHUNK pixels."""
    column = tl.program_id(0) // channel_tiles * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % channel_tiles * COLUMNS + tl.arange(0, COLUMNS)
    tap = tl.program_id(1)
    split = tl.program_id(2).to(tl.int64)
    size = tl.cast(height, tl.int64) * width
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(split * share, min((split + 1) * share, tl.cdiv(pixels, CHUNK))):
        pixel = tile * CHUNK + tl.arange(0, CHUNK)
        live = (pixel < pixels)[:, None] & (column < columns)[None, :]
        g = tl.load(grad + _places(pixel, column, size, columns, GRAD_LAST), live, other=0.0)
        ahead, inside = _neighbour(
            pixel, pixels, height, width, tap, above, left, kernel_width, dilation, not LAST, False
        )  # fmt: skip
        seen = inside[:, None] & (channel < channels)[None, :]
        at = x + _places(pixel, channel, size, channels, LAST) + ahead * (channels if LAST else 1)
        sums = tl.dot(tl.trans(g), tl.load(at, seen, other=0.0), sums, input_precision=PRECISION)
    known = (column < columns)[:, None] & (channel < channels)[None, :]
    at = ((split * tl.num_programs(1) + tap) * columns + column[:, None]) * channels + channel[None, :]
    tl.store(partial + at, sums, known)


class Shape(NamedTuple):
    """Of a convolution: the image, and where its taps lie."""

    height: int
    width: int
    taps: int
    above: int
    left: int
    kernel_width: int
    dilation: int = 1

    def tap_arguments(self) -> tuple[int, ...]:
        return self.above, self.left, self.kernel_width, self.dilation


def is_aligned(shape: Shape) -> bool:
    """Whether pixels under every tap start at multiples of 16, so that x can be read with its channels first."""
    return shape.height == 1 and shape.width % 16 == 0 and (shape.taps == 1 or shape.dilation % 16 == 0)


def power_within(n: int, least: int, most: int) -> int:
    """The power of two from n on, within bounds."""
    return int(min(most, max(least, triton.next_power_of_2(n))))


def shared_by(tile: dict[str, int], bits: int, limit: int) -> int:
    operands = (tile["ROWS"] + tile["COLUMNS"]) * tile["CHUNK"] * bits // 8
    return staged(operands, tile["num_stages"], limit)


def tile_for(rows: int, columns: int, inner: int, bits: int, limit: int = MOST_SHARED) -> dict[str, int]:
    """ROWS, COLUMNS and CHUNK of a product, and how it is run: what tensor cores want and shared memory holds."""
    tile = {
        "ROWS": power_within(rows, 16, 128), "COLUMNS": power_within(columns, 16, 128),
        "CHUNK": power_within(inner, 16, 1024 // bits),
    }  # fmt: skip
    few = 4096 if bits == 16 else 1024  # results, whose operands four warps have registers for
    tile |= {"num_warps": 8 if tile["ROWS"] * tile["COLUMNS"] > few else 4, "num_stages": 3}
    return fitted(tile, limit, lambda t: shared_by(t, bits, limit))


def channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) -> [image][pixel][channel]."""
    return x.permute(0, 2, 3, 1).contiguous()


def by_tap(weight: Tensor, taps: int, halves: int, *, flip: bool = False) -> Tensor:
    """Live weights (O, C, KH, KW) -> (taps, C, O), or to flip (taps, O, C); the halves of a gate in turns."""
    rows, channels = weight.shape[:2]
    of_taps: Tensor = weight.flatten(2)[:, :, :taps].unflatten(
        0, (halves, rows // halves)
    )  # (halves, O / halves, C, taps)
    if flip:
        return of_taps.permute(3, 1, 0, 2).contiguous().view(taps, rows, channels)
    return of_taps.permute(3, 2, 1, 0).contiguous().view(taps, channels, rows)


def from_taps(weight: Tensor, size: torch.Size, halves: int) -> Tensor:
    """(taps, O, C), the halves of a gate in turns -> (O, C, KH, KW), zeros for taps that are not live."""
    taps, rows, channels = weight.shape
    out = weight.new_zeros(rows, channels, size[2] * size[3])
    of_taps = weight.unflatten(1, (rows // halves, halves)).permute(2, 1, 3, 0)
    out[:, :, :taps] = of_taps.reshape(rows, channels, taps)
    return out.view(size)


def is_spread(cond: Tensor | None, shape: Shape) -> bool:
    """Whether cond (B, O, ...) has a value for each pixel, rather than one for an image."""
    return cond is not None and cond[0, 0].numel() == shape.height * shape.width


def conv(
    x: Tensor, weight: Tensor, out: Tensor, shape: Shape, *, bias: Tensor | None = None, added: Tensor | None = None,
    last: bool = True, flip: bool = False,
) -> None:  # fmt: skip
    """weight (taps, C, O) -> out [image][O][pixel], of x [image][pixel][C].

    With last=False x is [image][C][pixel]: only sequences, and only where `is_aligned`.
    """
    _, channels, columns = weight.shape
    pixels = x.numel() // channels
    sizes = pixels, columns, channels
    options = tuned("conv", x, sizes, tile_for(*sizes, 8 * x.element_size(), shared_memory(x)))
    _conv[(triton.cdiv(pixels, options["ROWS"]), triton.cdiv(columns, options["COLUMNS"]))](
        x, weight, bias, added, out, pixels, shape.height, shape.width, channels, columns, shape.taps,
        *shape.tap_arguments(), BIASED=bias is not None, ADDED=added is not None, LAST=last, FLIP=flip,
        PRECISION=precision_of(x), **options,
    )  # fmt: skip


def gated_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, out: Tensor | None, kept: Tensor | None,
    shape: Shape, *, last: bool = True, grad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`conv` and the gate -> out [image][O/2][pixel]; kept [pixel][O]. With `grad`, that of out: kept is the gradient
    of what goes into the gate. Returns the sums of that, (O, programs) float32.
    """
    _, channels, columns = weight.shape
    pixels = x.numel() // channels
    sizes = pixels, columns, channels
    options = tuned("gated_conv", x, sizes, tile_for(*sizes, 8 * x.element_size(), shared_memory(x)))
    tiles = triton.cdiv(pixels, options["ROWS"])
    partial = x.new_empty(columns, tiles if grad is not None else 0, dtype=torch.float32)
    spread = is_spread(cond, shape)
    _gated_conv[(tiles, triton.cdiv(columns, options["COLUMNS"]))](
        x, weight, bias, cond, grad, out, kept, partial, pixels, shape.height, shape.width, channels, columns,
        shape.height * shape.width if spread else 1, int(spread), shape.taps, *shape.tap_arguments(),
        BIASED=bias is not None, CONDITIONED=cond is not None, KEEP=kept is not None, BACKWARD=grad is not None,
        LAST=last, PRECISION=precision_of(x), **options,
    )  # fmt: skip
    return partial


def gate_grad(grad: Tensor, kept: Tensor, cond: Tensor | None, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """grad (B, O/2, ...), kept from the forward -> gradients of it [pixel][O], of bias (O,) float32, and of cond."""
    (batch, pairs), size = grad.shape[:2], shape.height * shape.width
    out = torch.empty_like(kept)
    spread = is_spread(cond, shape)
    of_cond = torch.empty_like(cond) if cond is not None and spread else kept.new_empty(0)
    columns, tiles = power_within(2 * pairs, 16, 64), triton.cdiv(size, 64)
    partial = kept.new_empty(2 * pairs, batch * tiles, dtype=torch.float32)
    _gate_grad[(batch * tiles, triton.cdiv(2 * pairs, columns))](
        grad, kept, out, of_cond, partial, pairs, size, tiles, SPREAD=spread, ROWS=64, COLUMNS=columns, num_warps=4
    )
    of_images = partial.view(2 * pairs, batch, tiles).sum(2)  # (O, B)
    if cond is not None and not spread:
        of_cond = of_images.T.to(cond.dtype).reshape(cond.shape)
    return out, of_images.sum(1), of_cond


def grad_weight(
    grad: Tensor, x: Tensor, rows: int, channels: int, shape: Shape, *, grad_last: bool = True, last: bool = True
) -> Tensor:
    """-> (taps, rows, C) float32, of grad [image][pixel][rows] and x [image][pixel][C], or channels before pixels."""
    pixels = x.numel() // channels
    sizes = rows, channels, pixels
    options = tuned("grad_weight", x, sizes, tile_for(*sizes, 8 * x.element_size(), shared_memory(x)))
    channel_tiles = triton.cdiv(channels, options["COLUMNS"])
    programs = triton.cdiv(rows, options["ROWS"]) * channel_tiles
    share, splits = splits_for(programs * max(shape.taps, 1), triton.cdiv(pixels, options["CHUNK"]))
    partial = x.new_empty(splits, shape.taps, rows, channels, dtype=torch.float32)
    if shape.taps:
        _grad_weight[(programs, shape.taps, splits)](
            grad, x, partial, pixels, shape.height, shape.width, channels, rows, channel_tiles, share,
            *shape.tap_arguments(), GRAD_LAST=grad_last, LAST=last, PRECISION=precision_of(x), **options,
        )  # fmt: skip
    return partial.sum(0)
