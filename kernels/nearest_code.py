"""The nearest code of each row: a scan on tensor cores, then the float32 answer (see fastgen/ops/nearest_code.py).

|x - c|^2 is least where <x, c> - |c|^2 / 2 is largest, both measured from the codebook's mean. The scan scores all
codes from bfloat16 roundings, and keeps for each row KEPT candidates and the best score that it let go. Rounding
changes a score by at most

    B = |x - xh| max |c| + |x| max |c - ch| + what accumulation rounds,         xh, ch: the roundings

so no code scored below the best by more than 2 B can be nearest. The candidates above that are measured in float32; a
row that let go of a score above it is measured against all codes. No N x K is ever in memory.

Least work: 2 N K D operations at the rate of bfloat16; 2 N D bytes written and read beside x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, on_device

KEPT = 4  # candidates of a row, of a split
NO_DIRECTION = tl.constexpr(1e-30)  # vectors no longer than this are zero to the cosine


@triton.jit
def _part(x, row, live, start, dim, stride, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """CHUNK coordinates of some rows, from `start` on; zeros beyond."""
    column = start + tl.arange(0, CHUNK)
    at = row[:, None] * stride + column[None, :]
    return tl.load(x + at, live[:, None] & (column < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _round(  # type: ignore[no-untyped-def]
    x, mean, rounded, norm, lost, length, rows, dim, width, stride,
    COSINE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Rows less the mean (for cosine, of unit length) in bfloat16, their norms, and the norms of what is lost."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    scale = tl.full([ROWS], 1.0, tl.float32)
    if COSINE:
        most = tl.zeros([ROWS], tl.float32)
        for start in range(0, dim, CHUNK):
            most = tl.maximum(most, tl.max(tl.abs(_part(x, row, live, start, dim, stride, CHUNK)), 1))
        shrink = tl.where(most > 1e-36, 1 / most, 0.0)  # so that no square vanishes
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, dim, CHUNK):
            v = _part(x, row, live, start, dim, stride, CHUNK) * shrink[:, None]
            squares += tl.sum(v * v, 1)
        own = tl.sqrt(squares) * most
        scale = tl.where(own > NO_DIRECTION, 1 / own, 0.0)
        tl.store(length + row, scale, live)
    squares = tl.zeros([ROWS], tl.float32)
    losses = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, CHUNK):
        column = start + tl.arange(0, CHUNK)
        v = _part(x, row, live, start, dim, stride, CHUNK)
        if COSINE:
            v = v * scale[:, None]
        else:
            v = tl.where((column < dim)[None, :], v - tl.load(mean + column, column < dim, other=0.0)[None, :], 0.0)
        short = v.to(tl.bfloat16)
        tl.store(rounded + row[:, None] * width + column[None, :], short, live[:, None])
        loss = v - short.to(tl.float32)
        squares += tl.sum(v * v, 1)
        losses += tl.sum(loss * loss, 1)
    tl.store(norm + row, tl.sqrt(squares), live)
    tl.store(lost + row, tl.sqrt(losses), live)


@triton.jit
def _dot(x, codes, sums, FLOATS: tl.constexpr):  # type: ignore[no-untyped-def]
    if FLOATS:  # for the interpreter, whose products of bfloat16 are wrong
        return tl.dot(x.to(tl.float32), codes.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(x, codes, sums)


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    x, codes, offset, value, candidate, rest, rows, count, width, tiles, splits,
    ROWS: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, KEEP: tl.constexpr,
    FLOATS: tl.constexpr,
):  # fmt: skip
    """The leaders of ROWS rows among a split's codes: in each lane the best score, its tile, and the second best."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    lane = tl.arange(0, CODES)
    column = tl.arange(0, CHUNK)
    live = row < rows
    at_row = x + row[:, None] * width + column[None, :]
    best = tl.full([ROWS, CODES], float("-inf"), tl.float32)
    second = best
    tile = tl.zeros([ROWS, CODES], tl.int32)
    if WHOLE:
        held = tl.load(at_row, live[:, None], other=0.0)
    for t in range(split * tiles, min((split + 1) * tiles, tl.cdiv(count, CODES))):
        code = t * CODES + lane
        known = code < count
        at_code = codes + code.to(tl.int64)[None, :] * width + column[:, None]
        sums = tl.zeros([ROWS, CODES], tl.float32) + tl.load(offset + code, known, other=float("-inf"))[None, :]
        if WHOLE:
            sums = _dot(held, tl.load(at_code, known[None, :], other=0.0), sums, FLOATS)
        else:
            for start in range(0, width, CHUNK):
                part = tl.load(at_row + start, live[:, None], other=0.0)
                sums = _dot(part, tl.load(at_code + start, known[None, :], other=0.0), sums, FLOATS)
        second = tl.maximum(second, tl.minimum(best, sums))
        tile = tl.where(sums > best, t, tile)
        best = tl.maximum(best, sums)
    left = tl.max(second, 1)
    place = (row * splits + split) * KEEP
    for k in tl.static_range(KEEP):
        top = tl.max(best, 1)
        at = tl.argmax(best, 1)
        chosen = lane[None, :] == at[:, None]
        tl.store(value + place + k, top, live)
        tl.store(candidate + place + k, tl.sum(tl.where(chosen, tile, 0), 1) * CODES + at, live)
        best = tl.where(chosen, float("-inf"), best)
    tl.store(rest + row * splits + split, tl.maximum(left, tl.max(best, 1)), live)


@triton.jit
def _nearer(distance, code, least, index):  # type: ignore[no-untyped-def]
    """The nearer of two, and the lower index of two as near."""
    better = (distance < least) | ((distance == least) & (code < index))
    return tl.where(better, distance, least), tl.where(better, code, index)


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    x, codes, length, code_length, offset, value, candidate, rest, norm, lost, bounds, index, distance, rows, count,
    dim, stride, slots, splits,
    COSINE: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """The nearest in float32 among the candidates that can be, or among all codes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    column = tl.arange(0, CHUNK)
    slot = tl.arange(0, SLOTS)
    of_slots = live[:, None] & (slot < slots)[None, :]
    values = tl.load(value + row[:, None] * slots + slot[None, :], of_slots, other=float("-inf"))
    of_splits = live[:, None] & (slot < splits)[None, :]
    left = tl.max(tl.load(rest + row[:, None] * splits + slot[None, :], of_splits, other=float("-inf")), 1)
    best = tl.max(values, 1)
    own = tl.load(norm + row, live, other=0.0)
    longest, most_lost = tl.load(bounds), tl.load(bounds + 1)
    accumulated = (dim + 16) * 2.4e-7 * (own * longest + longest * longest)
    doubt = tl.load(lost + row, live, other=0.0) * longest + own * most_lost + accumulated
    limit = best - 2.001 * doubt
    # not (below): so that what is not a number stays open
    undecided = live & ((left < limit) == 0)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if COSINE:
        scale = tl.load(length + row, live, other=0.0)
    least = tl.full([ROWS], float("inf"), tl.float32)
    nearest = tl.zeros([ROWS], tl.int32) + count
    for s in range(slots):
        score = tl.load(value + row * slots + s, live, other=float("-inf"))
        wanted = live & (score >= limit) & (score > float("-inf"))
        if tl.max(wanted.to(tl.int32), 0) > 0:
            code = tl.load(candidate + row * slots + s, wanted, other=0)
            squares = tl.zeros([ROWS], tl.float32)
            code_scale = tl.full([ROWS], 1.0, tl.float32)
            if COSINE:
                code_scale = tl.load(code_length + code, wanted, other=0.0)
            for start in range(0, dim, CHUNK):
                inside = wanted[:, None] & (start + column < dim)[None, :]
                v = tl.load(x + row[:, None] * stride + start + column[None, :], inside, other=0.0).to(tl.float32)
                c = tl.load(codes + code.to(tl.int64)[:, None] * dim + start + column[None, :], inside, other=0.0)
                d = v * scale[:, None] - c.to(tl.float32) * code_scale[:, None]
                squares += tl.sum(d * d, 1)
            if COSINE:
                squares = tl.where((scale == 0) | (code_scale == 0), 2.0, squares)
            nearer, which = _nearer(squares, code, least, nearest)
            least = tl.where(wanted, nearer, least)
            nearest = tl.where(wanted, which, nearest)
    if tl.max(undecided.to(tl.int32), 0) > 0:
        least = tl.where(undecided, float("inf"), least)  # sums in one order only, so that equal codes are equal
        nearest = tl.where(undecided, count, nearest)
        for first in range(0, count, CODES):
            code = first + tl.arange(0, CODES)
            known = (code < count) & (tl.load(offset + code, code < count, other=float("-inf")) > float("-inf"))
            squares = tl.zeros([ROWS, CODES], tl.float32)
            code_scale = tl.full([CODES], 1.0, tl.float32)
            if COSINE:
                code_scale = tl.load(code_length + code, known, other=0.0)
            for start in range(0, dim, CHUNK):
                inside = start + column < dim
                at = row[:, None] * stride + start + column[None, :]
                v = tl.load(x + at, undecided[:, None] & inside[None, :], other=0.0).to(tl.float32) * scale[:, None]
                at = code.to(tl.int64)[:, None] * dim + start + column[None, :]
                c = tl.load(codes + at, known[:, None] & inside[None, :], other=0.0).to(tl.float32)
                d = v[:, None, :] - (c * code_scale[:, None])[None, :, :]
                squares += tl.sum(d * d, 2)
            if COSINE:
                squares = tl.where((scale == 0)[:, None] | (code_scale == 0)[None, :], 2.0, squares)
            squares = tl.where(known[None, :], squares, float("inf"))
            near = tl.min(squares, 1)
            at = tl.min(tl.where((squares == near[:, None]) & known[None, :], code[None, :], count), 1)
            nearer, which = _nearer(near, at, least, nearest)
            least = tl.where(undecided, nearer, least)
            nearest = tl.where(undecided, which, nearest)
    lost_row = (own - own != 0) | (nearest >= count)  # not finite, or no code can be chosen
    tl.store(index + row, tl.where(lost_row, 0, nearest).to(tl.int64), live)
    tl.store(distance + row, tl.where(lost_row, float("nan"), least), live)


def chunk_for(dim: int) -> int:
    """Coordinates that are multiplied at once; rows of the roundings are padded to a multiple of it."""
    return int(min(128, max(16, triton.next_power_of_2(dim))))


def splits_for(rows: int, codes: int, tile_rows: int, tile_codes: int, processors: int) -> tuple[int, int]:
    """Tiles of codes for each split, and the splits: as many programs as fill the GPU twice, up to 16 splits."""
    tiles = triton.cdiv(codes, tile_codes)
    wanted = min(16, tiles, triton.cdiv(2 * processors, max(1, triton.cdiv(rows, tile_rows))))
    share = triton.cdiv(tiles, wanted)
    return share, triton.cdiv(tiles, share)


def _rounded(x: Tensor, mean: Tensor, cosine: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> roundings (n, width) bfloat16, norms (n,), norms of what was lost (n,), 1 / length for cosine (n,)."""
    rows, dim = x.shape
    chunk = chunk_for(dim)
    width = triton.cdiv(dim, chunk) * chunk
    rounded = x.new_empty(rows, width, dtype=torch.bfloat16)
    norm, lost, length = (x.new_empty(rows, dtype=torch.float32) for _ in range(3))
    tile = max(1, 2048 // chunk)
    _round[(triton.cdiv(rows, tile),)](
        x, mean, rounded, norm, lost, length, rows, dim, width, x.stride(0), COSINE=cosine, ROWS=tile, CHUNK=chunk,
        num_warps=4,
    )  # fmt: skip
    return rounded, norm, lost, length


def _processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def nearest_code(x: Tensor, codebook: Tensor, cosine: bool, strict: bool) -> tuple[Tensor, Tensor]:
    """x (N, D) with rows any distance apart, codebook (K, D) contiguous -> indices (N,) int64, distances (N,) float32.

    `strict` is the caller's to see to: finding out here would make the host wait.
    """
    (rows, dim), count = x.shape, codebook.shape[0]
    index, distance = x.new_empty(rows, dtype=torch.int64), x.new_empty(rows, dtype=torch.float32)
    if not rows:
        return index, distance
    with on_device(x):
        wide = codebook.float()
        absent = ~torch.isfinite(wide.square().sum(1))
        present = torch.where(absent[:, None], 0, wide)
        mean = torch.zeros_like(wide[0]) if cosine else present.sum(0) / (~absent).sum().clamp(min=1)
        codes, norms, code_lost, code_length = _rounded(present, mean, cosine)
        norms, code_lost = torch.where(absent, 0, norms), torch.where(absent, 0, code_lost)
        offset = torch.zeros_like(norms) if cosine else norms.square() * -0.5
        offset = torch.where(absent, -torch.inf, offset)
        bounds = torch.stack([norms.max(), code_lost.max()])
        short, norm, lost, length = _rounded(x, mean, cosine)
        chunk, width = chunk_for(dim), short.shape[1]
        tile_rows, tile_codes = (16, 16) if INTERPRETED else (128, 64)
        tiles, splits = splits_for(rows, count, tile_rows, tile_codes, _processors(x))
        slots = KEPT * splits
        value, rest = x.new_empty(rows, slots, dtype=torch.float32), x.new_empty(rows, splits, dtype=torch.float32)
        candidate = x.new_empty(rows, slots, dtype=torch.int32)
        _scan[(triton.cdiv(rows, tile_rows), splits)](
            short, codes, offset, value, candidate, rest, rows, count, width, tiles, splits,
            ROWS=tile_rows, CODES=tile_codes, CHUNK=chunk, WHOLE=width == chunk, KEEP=KEPT, FLOATS=INTERPRETED,
            num_warps=8, num_stages=3,
        )  # fmt: skip
        _measure[(triton.cdiv(rows, 8),)](
            x, codebook, length, code_length, offset, value, candidate, rest, norm, lost, bounds, index, distance, rows,
            count, dim, x.stride(0), slots, splits, COSINE=cosine, ROWS=8, CODES=16, CHUNK=min(chunk, 64),
            SLOTS=triton.next_power_of_2(slots), num_warps=4,
        )  # fmt: skip
    return index, distance
