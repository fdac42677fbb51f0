"""Dilated causal convolution with its gate, forward and backward (see fastgen/ops/gated_causal_conv1d.py).

A program computes ROWS gates for COLUMNS samples of one sequence: both halves of the product in registers, the taps as
one loop over (tap, channels), and the gate behind it. The backward computes the gate again, writes the gradient of what
goes into it, and multiplies that twice more: with the weights for x's gradient, with x for the weights'.

Least work: 4 H C K operations for each sample forward, 12 H C K backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functions import sigmoid, tanh
from .launch import on_device, sum_rows


@triton.jit
def _gate(  # type: ignore[no-untyped-def]
    x, weight, bias, cond, grad, out, partial, channels, halves, steps, time_tiles, cond_stride, cond_step, dilation,
    TAPS: tl.constexpr, BIASED: tl.constexpr, CONDITIONED: tl.constexpr, BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """weight [tap][row][channel]. Forward: out = gates. Backward: out = gradients of both halves, and their sums."""
    sample = (tl.program_id(0) // time_tiles).to(tl.int64)
    time = (tl.program_id(0) % time_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, CHUNK)
    x += sample * channels * steps
    a = tl.zeros([ROWS, COLUMNS], tl.float32)
    b = tl.zeros([ROWS, COLUMNS], tl.float32)
    parts = tl.cdiv(channels, CHUNK)
    for step in range(TAPS * parts):
        tap = step // parts
        channel = step % parts * CHUNK + inner
        known = (row < halves)[:, None] & (channel < channels)[None, :]
        at = weight + (tap * 2 * halves + row[:, None]) * channels + channel[None, :]
        first = tl.load(at, known, other=0.0)
        second = tl.load(at + halves * channels, known, other=0.0)
        when = time - (TAPS - 1 - tap) * dilation
        seen = (channel < channels)[:, None] & ((when >= 0) & (time < steps))[None, :]
        v = tl.load(x + channel.to(tl.int64)[:, None] * steps + when[None, :], seen, other=0.0)
        a = tl.dot(first, v, a, input_precision=PRECISION)
        b = tl.dot(second, v, b, input_precision=PRECISION)
    live = (row < halves)[:, None] & (time < steps)[None, :]
    if BIASED:
        a += tl.load(bias + row, row < halves, other=0.0).to(tl.float32)[:, None]
        b += tl.load(bias + halves + row, row < halves, other=0.0).to(tl.float32)[:, None]
    if CONDITIONED:
        at = cond + (sample * 2 * halves + row[:, None]) * cond_stride + time[None, :] * cond_step
        a += tl.load(at, live, other=0.0).to(tl.float32)
        b += tl.load(at + halves.to(tl.int64) * cond_stride, live, other=0.0).to(tl.float32)
    t, s = tanh(a), sigmoid(b)
    at_gate = (sample * halves + row[:, None]) * steps + time[None, :]
    if BACKWARD:
        g = tl.load(grad + at_gate, live, other=0.0).to(tl.float32)
        of_a = g * s * (1 - t * t)
        of_b = g * t * s * (1 - s)
        at = out + (sample * 2 * halves + row[:, None]) * steps + time[None, :]
        tl.store(at, of_a.to(out.dtype.element_ty), live)
        tl.store(at + halves.to(tl.int64) * steps, of_b.to(out.dtype.element_ty), live)
        if BIASED:
            programs = tl.num_programs(0)
            tl.store(partial + row.to(tl.int64) * programs + tl.program_id(0), tl.sum(of_a, 1), row < halves)
            at_sum = partial + (halves + row).to(tl.int64) * programs + tl.program_id(0)
            tl.store(at_sum, tl.sum(of_b, 1), row < halves)
    else:
        tl.store(out + at_gate, (t * s).to(out.dtype.element_ty), live)


@triton.jit
def _grad_x(  # type: ignore[no-untyped-def]
    grad, weight, out, channels, rows, steps, time_tiles, dilation,
    TAPS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each sample's share in those that saw it. weight [tap][channel][row]."""
    sample = (tl.program_id(0) // time_tiles).to(tl.int64)
    time = (tl.program_id(0) % time_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    channel = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inner = tl.arange(0, CHUNK)
    grad += sample * rows * steps
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    parts = tl.cdiv(rows, CHUNK)
    for step in range(TAPS * parts):
        tap = step // parts
        row = step % parts * CHUNK + inner
        known = (channel < channels)[:, None] & (row < rows)[None, :]
        w = tl.load(weight + (tap * channels + channel[:, None]) * rows + row[None, :], known, other=0.0)
        left = steps - (TAPS - 1 - tap) * dilation  # samples that far from the end are seen by none
        seen = (row < rows)[:, None] & (time < left)[None, :]
        when = time + (TAPS - 1 - tap) * dilation
        g = tl.load(grad + row.to(tl.int64)[:, None] * steps + when[None, :], seen, other=0.0)
        sums = tl.dot(w, g, sums, input_precision=PRECISION)
    live = (channel < channels)[:, None] & (time < steps)[None, :]
    at = out + (sample * channels + channel[:, None]) * steps + time[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), live)


@triton.jit
def _grad_weight(  # type: ignore[no-untyped-def]
    grad, x, partial, channels, rows, steps, time_tiles, tiles, share, channel_tiles, dilation,
    TAPS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """partial [split][tap][row][channel]: sums over the split's share of all tiles of CHUNK samples."""
    row = tl.program_id(0) // channel_tiles * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % channel_tiles * COLUMNS + tl.arange(0, COLUMNS)
    tap = tl.program_id(1)
    split = tl.program_id(2)
    shift = (TAPS - 1 - tap) * dilation
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(split * share, min((split + 1) * share, tiles)):
        sample = (tile // time_tiles).to(tl.int64)
        time = tile % time_tiles * CHUNK + tl.arange(0, CHUNK)
        when = time - shift
        of_row = (row < rows)[:, None] & (time < steps)[None, :]
        g = tl.load(grad + (sample * rows + row[:, None]) * steps + time[None, :], of_row, other=0.0)
        seen = ((time < steps) & (when >= 0))[:, None] & (channel < channels)[None, :]
        v = tl.load(x + (sample * channels + channel[None, :]) * steps + when[:, None], seen, other=0.0)
        sums = tl.dot(g, v, sums, input_precision=PRECISION)
    live = (row < rows)[:, None] & (channel < channels)[None, :]
    at = ((split * TAPS + tap).to(tl.int64) * rows + row[:, None]) * channels + channel[None, :]
    tl.store(partial + at, sums, live)


def precision_of(x: Tensor) -> str:
    """Products of float32 are exact unless PyTorch's own may be rounded to TF32; those of 16 bits always are."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def tile_for(rows: int, columns: int, inner: int) -> dict[str, int]:
    """ROWS, COLUMNS and CHUNK of a product: powers of two within what the tensor cores want and registers hold."""
    return {
        "ROWS": int(min(64, max(16, triton.next_power_of_2(rows)))),
        "COLUMNS": int(min(128, max(16, triton.next_power_of_2(columns)))),
        "CHUNK": int(min(64, max(16, triton.next_power_of_2(inner)))),
    }


def splits_for(programs: int, tiles: int) -> tuple[int, int]:
    """Tiles for each split of a sum, and the splits: about 512 programs in all."""
    share = triton.cdiv(tiles, min(tiles, 64, triton.cdiv(512, programs)))
    return int(share), int(triton.cdiv(tiles, share))


def _options(tile: dict[str, int]) -> dict[str, int]:
    return tile | {"num_warps": 8 if tile["ROWS"] * tile["COLUMNS"] > 4096 else 4, "num_stages": 3}


def _run_gate(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int, grad: Tensor | None
) -> tuple[Tensor, Tensor]:
    """-> gates (B, H, T); or, for their gradient, that of both halves (B, 2H, T), and its sums (2H,)."""
    (batch, channels, steps), (rows, _, taps) = x.shape, weight.shape
    out = x.new_empty(batch, rows // 2 if grad is None else rows, steps)
    tile = tile_for(rows // 2, steps, channels)
    time_tiles = triton.cdiv(steps, tile["COLUMNS"])
    partial = x.new_empty(rows, batch * time_tiles, dtype=torch.float32)
    if out.numel():
        _gate[(batch * time_tiles, triton.cdiv(rows // 2, tile["ROWS"]))](
            x, weight.permute(2, 0, 1).contiguous(), bias, cond, grad, out, partial, channels, rows // 2, steps,
            time_tiles, 0 if cond is None else cond.shape[2], int(cond is not None and cond.shape[2] > 1), dilation,
            TAPS=taps, BIASED=bias is not None, CONDITIONED=cond is not None, BACKWARD=grad is not None,
            PRECISION=precision_of(x), **_options(tile),
        )  # fmt: skip
    return out, partial


def gated_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int) -> Tensor:
    """Contiguous x (B, C, T), weight (2H, C, K), bias (2H,), cond (B, 2H, T or 1) -> (B, H, T)."""
    with on_device(x):
        return _run_gate(x, weight, bias, cond, min(dilation, max(x.shape[2], 1)), None)[0]


def gated_causal_conv1d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of x, weight, bias and cond; of the last two nothing that means anything where there are none."""
    (batch, channels, steps), (rows, _, taps) = x.shape, weight.shape
    dilation = min(dilation, max(steps, 1))
    no_cond = x.new_empty(0)
    if not x.numel():
        of_cond = no_cond if cond is None else torch.zeros_like(cond)
        return torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(rows), of_cond
    with on_device(x):
        of_halves, partial = _run_gate(x, weight, bias, cond, dilation, grad)
        grad_x = torch.empty_like(x)
        tile = tile_for(channels, steps, rows)
        time_tiles = triton.cdiv(steps, tile["COLUMNS"])
        _grad_x[(batch * time_tiles, triton.cdiv(channels, tile["ROWS"]))](
            of_halves, weight.permute(2, 1, 0).contiguous(), grad_x, channels, rows, steps, time_tiles, dilation,
            TAPS=taps, PRECISION=precision_of(x), **_options(tile),
        )  # fmt: skip
        tile = tile_for(rows, channels, steps)
        time_tiles, channel_tiles = triton.cdiv(steps, tile["CHUNK"]), triton.cdiv(channels, tile["COLUMNS"])
        programs = triton.cdiv(rows, tile["ROWS"]) * channel_tiles
        share, splits = splits_for(programs * taps, batch * time_tiles)
        sums = x.new_empty(splits, taps, rows, channels, dtype=torch.float32)
        _grad_weight[(programs, taps, splits)](
            of_halves, x, sums, channels, rows, steps, time_tiles, batch * time_tiles, share, channel_tiles, dilation,
            TAPS=taps, PRECISION=precision_of(x), **_options(tile),
        )  # fmt: skip
        of_weight = sums.sum(0).permute(1, 2, 0).to(weight.dtype).contiguous()
        of_bias = weight.new_zeros(rows) if bias is None else sum_rows(partial).to(bias.dtype)
        if cond is None:
            return grad_x, of_weight, of_bias, no_cond
        if cond.shape[2] == steps:
            return grad_x, of_weight, of_bias, of_halves
        return grad_x, of_weight, of_bias, of_halves.float().sum(2, keepdim=True).to(cond.dtype)
