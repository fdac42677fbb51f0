"""The nearest code of each row: a scan on tensor cores, then the float32 answer (see fastgen/ops/nearest_code.py).

|x - c|^2 is least where the score <x, c> - |c|^2 / 2 is largest, both measured from a point amid the codes. The scan
scores all codes from bfloat16 roundings xh and ch. With a for what accumulation rounds, a score is off by at most

    e = (|x - xh| + a |x|) |c| + |x| |c - ch| + a |c|^2,

so the scan computes score + e, above which no code can be; what a code is sure to reach is 2 e below that. In each of
CODES lanes it keeps the best and the second best. Candidates are the leading lanes' codes that reach what some code is
sure to; if the second of a lane does too, all codes of the lane. They are measured in float32, as sum (x - c)^2. Rows
where a lane beyond the KEEP leading ones reaches it as well are listed, and measured against all codes.
No N x K is ever in memory.

Least work: 2 N K D operations at the rate of bfloat16; 2 N D bytes written and read beside x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgen.ops.nearest_code import PRECISIONS

from .launch import INTERPRETED, MOST_SHARED, fitted, on_device, shared_memory, staged
from .tuning import tuned

NO_DIRECTION = tl.constexpr(1e-30)  # vectors no longer than this are zero to the cosine
UNSETTLED = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def _centre(codes, centre, count, dim, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The middle one of some codes' values in each coordinate: whatever a few of them are, near the most."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, SAMPLES)
    code = place.to(tl.int64) * count // SAMPLES
    v = tl.load(codes + code[None, :] * dim + column[:, None], (column < dim)[:, None], other=0.0).to(tl.float32)
    v = tl.sort(tl.where(v - v == 0, v, 0.0), 1)
    middle = tl.sum(tl.where((place == SAMPLES // 2)[None, :], v, 0.0), 1)
    tl.store(centre + column, tl.where(tl.abs(middle) < 1e18, middle, 0.0), column < dim)


@triton.jit
def _part(x, row, live, start, dim, stride, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]
    """CHUNK coordinates of some rows, from `start` on; zeros beyond."""
    column = start + tl.arange(0, CHUNK)
    at = row[:, None] * stride + column[None, :]
    return tl.load(x + at, live[:, None] & (column < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _round(  # type: ignore[no-untyped-def]
    x, centre, rounded, norm, lost, length, offset, rows, dim, width, stride, accumulated,
    ARE_CODES: tl.constexpr, COSINE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Rows less the centre (for cosine, of unit length) rounded, their norms, and the norms of what is lost.

    Of x, `accumulated` times the norm is added to that. Codes get offsets, their part of the score: minus infinity
    where they are not finite, and then zeros for the rest.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    finite = live
    scale = tl.full([ROWS], 1.0, tl.float32)
    if COSINE or ARE_CODES:
        most = tl.zeros([ROWS], tl.float32)
        for start in range(0, dim, CHUNK):
            v = tl.abs(_part(x, row, live, start, dim, stride, CHUNK))
            most = tl.maximum(most, tl.max(tl.where(v - v == 0, v, float("inf")), 1))
        finite = live & (most < 1.8e19)  # so that squares are finite
        shrink = tl.where(finite & (most > 1e-36), 1 / most, 0.0)  # so that no square vanishes
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, dim, CHUNK):
            v = _part(x, row, live, start, dim, stride, CHUNK) * shrink[:, None]
            squares += tl.sum(v * v, 1)
        own = tl.sqrt(squares) * most
        finite = finite & (own < 1.8e19)
        if COSINE:
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
            v = tl.where((column < dim)[None, :], v - tl.load(centre + column, column < dim, other=0.0)[None, :], 0.0)
        if ARE_CODES:
            v = tl.where(finite[:, None], v, 0.0)
        short = v.to(rounded.dtype.element_ty)
        tl.store(rounded + row[:, None] * width + column[None, :], short, live[:, None])
        loss = v - short.to(tl.float32)
        squares += tl.sum(v * v, 1)
        losses += tl.sum(loss * loss, 1)
    tl.store(norm + row, tl.sqrt(squares), live)
    if ARE_CODES:
        tl.store(lost + row, tl.sqrt(losses), live)
        score = accumulated * squares
        if not COSINE:
            score -= 0.5 * squares
        tl.store(offset + row, tl.where(finite & (squares < 3e38), score, float("-inf")), live)
    else:
        tl.store(lost + row, tl.sqrt(losses) + accumulated * tl.sqrt(squares), live)


@triton.jit
def _dot(x, codes, sums, FLOATS: tl.constexpr):  # type: ignore[no-untyped-def]
    if FLOATS:  # for the interpreter, whose products of bfloat16 are wrong
        return tl.dot(x.to(tl.float32), codes.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(x, codes, sums, input_precision="tf32")  # of float32; bfloat16 is what it is


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    x, codes, norm, lost, offset, code_norm, code_lost, value, candidate, behind, rest, rows, count, width, tiles,
    splits,
    ROWS: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, KEEP: tl.constexpr,
    FLOATS: tl.constexpr,
):  # fmt: skip
    """The KEEP leading lanes of ROWS rows among a split's codes: best, its code, second best; and the best beyond."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = tl.program_id(1)
    lane = tl.arange(0, CODES)
    column = tl.arange(0, CHUNK)
    live = row < rows
    own = tl.load(norm + row, live, other=0.0)[:, None]
    doubt = tl.load(lost + row, live, other=0.0)[:, None]
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
        sums = doubt * tl.load(code_norm + code, known, other=0.0)[None, :]
        sums += tl.load(offset + code, known, other=float("-inf"))[None, :]
        sums += own * tl.load(code_lost + code, known, other=0.0)[None, :]
        if WHOLE:
            sums = _dot(held, tl.load(at_code, known[None, :], other=0.0), sums, FLOATS)
        else:
            for start in range(0, width, CHUNK):
                part = tl.load(at_row + start, live[:, None], other=0.0)
                sums = _dot(part, tl.load(at_code + start, known[None, :], other=0.0), sums, FLOATS)
        second = tl.maximum(second, tl.minimum(best, sums))
        tile = tl.where(sums > best, t, tile)
        best = tl.maximum(best, sums)
    code = tile * CODES + lane[None, :]
    place = (row * splits + split) * KEEP
    for k in tl.static_range(KEEP):
        top = tl.max(best, 1)
        first = tl.min(tl.where(best == top[:, None], code, 0x7FFFFFFF), 1)  # the lowest of equal codes
        chosen = code == first[:, None]
        tl.store(value + place + k, top, live)
        tl.store(candidate + place + k, first, live)
        tl.store(behind + place + k, tl.max(tl.where(chosen, second, float("-inf")), 1), live)
        best = tl.where(chosen, float("-inf"), best)
    tl.store(rest + row * splits + split, tl.max(best, 1), live)


@triton.jit
def _nearer(distance, code, least, index):  # type: ignore[no-untyped-def]
    """The nearer of two, and the lower index of two as near."""
    better = (distance < least) | ((distance == least) & (code < index))
    return tl.where(better, distance, least), tl.where(better, code, index)


@triton.jit
def _closest(  # type: ignore[no-untyped-def]
    x, codes, scale, code_length, code, wanted, least, nearest, dim,
    COSINE: tl.constexpr, KEEP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """In each of KEEP places the nearer in float32 of a code that is wanted and of what was there. x: of one row."""
    column = tl.arange(0, CHUNK)
    squares = tl.zeros([KEEP], tl.float32)
    if COSINE:
        code_scale = tl.load(code_length + code, wanted, other=0.0)
    for start in range(0, dim, CHUNK):
        inside = start + column < dim
        v = tl.load(x + start + column, inside, other=0.0).to(tl.float32)[None, :]
        at = code.to(tl.int64)[:, None] * dim + (start + column)[None, :]
        c = tl.load(codes + at, wanted[:, None] & inside[None, :], other=0.0).to(tl.float32)
        d = v * scale - c * code_scale[:, None] if COSINE else v - c
        squares += tl.sum(d * d, 1)
    if COSINE:
        squares = tl.where(code_scale * scale == 0, 2.0, squares)
    nearer, which = _nearer(squares, code, least, nearest)
    return tl.where(wanted, nearer, least), tl.where(wanted, which, nearest)


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    x, codes, length, code_length, norm, lost, offset, code_norm, code_lost, value, candidate, behind, rest, listed,
    waiting, index, distance, count, dim, stride, tiles, splits, accumulated,
    COSINE: tl.constexpr, CERTAIN: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The nearest in float32 among a row's candidates; rows that have too many are listed. CERTAIN: or the leader."""
    row = tl.program_id(0).to(tl.int64)
    own, doubt = tl.load(norm + row), tl.load(lost + row)
    kept = tl.arange(0, KEEP)
    limit = float("-inf")  # what some code is sure to reach
    left = float("-inf")
    for split in range(splits):
        place = row * splits + split
        score = tl.load(value + place * KEEP + kept)
        if CERTAIN:
            real = score > float("-inf")
            code = tl.load(candidate + place * KEEP + kept, real, other=0)
            size = tl.load(code_norm + code, real, other=0.0)
            error = doubt * size + own * tl.load(code_lost + code, real, other=0.0) + accumulated * size * size
            score = tl.where(real, score - 2.001 * error, float("-inf"))
            left = tl.maximum(left, tl.load(rest + place))
        limit = tl.maximum(limit, tl.max(score, 0))
    scale = 1.0
    if COSINE:
        scale = tl.load(length + row)
    least = tl.full([KEEP], float("inf"), tl.float32)
    nearest = tl.zeros([KEEP], tl.int32) + count
    x += row * stride
    for split in range(splits):
        place = (row * splits + split) * KEEP + kept
        score = tl.load(value + place)
        wanted = (score >= limit) & (score > float("-inf"))
        if tl.max(wanted.to(tl.int32), 0) > 0:
            code = tl.load(candidate + place, wanted, other=0)
            least, nearest = _closest(
                x, codes, scale, code_length, code, wanted, least, nearest, dim, COSINE, KEEP, CHUNK
            )  # fmt: skip
            if CERTAIN:
                crowded = wanted & (tl.load(behind + place) >= limit)
                if tl.max(crowded.to(tl.int32), 0) > 0:
                    end = min((split + 1) * tiles, tl.cdiv(count, CODES))
                    for k in range(KEEP):
                        lane = tl.sum(tl.where(crowded & (kept == k), code % CODES + 1, 0), 0) - 1
                        if lane >= 0:
                            for first in range(split * tiles, end, KEEP):
                                code_of_lane = (first + kept) * CODES + lane
                                known = (first + kept < end) & (code_of_lane < count)
                                known = known & (tl.load(offset + code_of_lane, known, other=0.0) > float("-inf"))
                                least, nearest = _closest(
                                    x, codes, scale, code_length, code_of_lane, known, least, nearest, dim,
                                    COSINE, KEEP, CHUNK,
                                )  # fmt: skip
    near = tl.min(least, 0)
    which = tl.min(tl.where(least == near, nearest, count), 0).to(tl.int64)
    missing = (own - own != 0) | (which >= count)  # not finite, or no code can be chosen
    unsettled = False
    if CERTAIN:
        unsettled = (left >= limit) & (missing == 0)
        if unsettled:
            tl.store(listed + tl.atomic_add(waiting, 1), row.to(tl.int32))
    tl.store(index + row, tl.where(unsettled, UNSETTLED, tl.where(missing, 0, which)))
    tl.store(distance + row, tl.where(missing, float("nan"), near))


@triton.jit
def _compare(  # type: ignore[no-untyped-def]
    x, codes, length, code_length, offset, listed, waiting, index, count, dim, stride, share, splits,
    COSINE: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Listed rows against all codes in float32: index gets the least (distance, code) of all splits, in 64 bits."""
    rows = tl.load(waiting)
    column = tl.arange(0, CHUNK)
    for item in range(tl.program_id(0), tl.cdiv(rows, ROWS) * splits, tl.num_programs(0)):
        place = item // splits * ROWS + tl.arange(0, ROWS)
        live = place < rows
        row = tl.load(listed + place, live, other=0).to(tl.int64)
        scale = tl.full([ROWS], 1.0, tl.float32)
        if COSINE:
            scale = tl.load(length + row, live, other=0.0)
        least = tl.full([ROWS], float("inf"), tl.float32)
        nearest = tl.zeros([ROWS], tl.int32) + count
        start_code = item % splits * share
        for first in range(start_code, min(start_code + share, count), CODES):
            code = first + tl.arange(0, CODES)
            known = (code < count) & (tl.load(offset + code, code < count, other=float("-inf")) > float("-inf"))
            squares = tl.zeros([ROWS, CODES], tl.float32)
            code_scale = tl.full([CODES], 1.0, tl.float32)
            if COSINE:
                code_scale = tl.load(code_length + code, known, other=0.0)
            for start in range(0, dim, CHUNK):
                inside = start + column < dim
                at = row[:, None] * stride + start + column[None, :]
                v = tl.load(x + at, live[:, None] & inside[None, :], other=0.0).to(tl.float32) * scale[:, None]
                at = code.to(tl.int64)[:, None] * dim + start + column[None, :]
                c = tl.load(codes + at, known[:, None] & inside[None, :], other=0.0).to(tl.float32)
                d = v[:, None, :] - (c * code_scale[:, None])[None, :, :]
                squares += tl.sum(d * d, 2)
            if COSINE:
                squares = tl.where((scale == 0)[:, None] | (code_scale == 0)[None, :], 2.0, squares)
            squares = tl.where(known[None, :], squares, float("inf"))
            near = tl.min(squares, 1)
            which = tl.min(tl.where((squares == near[:, None]) & known[None, :], code[None, :], count), 1)
            least, nearest = _nearer(near, which, least, nearest)
        key = (least.to(tl.int32, bitcast=True).to(tl.int64) << 32) | nearest.to(tl.int64)
        tl.atomic_min(index + row, key, live)


@triton.jit
def _settle(listed, waiting, index, distance, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Listed rows' least (distance, code) apart."""
    rows = tl.load(waiting)
    for first in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        place = first + tl.arange(0, BLOCK)
        row = tl.load(listed + place, place < rows, other=0).to(tl.int64)
        key = tl.load(index + row, place < rows, other=0)
        tl.store(index + row, key & 0xFFFFFFFF, place < rows)
        tl.store(distance + row, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), place < rows)


def chunk_for(dim: int) -> int:
    """Coordinates that are multiplied at once: all, where a tile of rows then stays on chip through the scan.

    Rows of the roundings are padded to a multiple of it.
    """
    return int(max(16, triton.next_power_of_2(dim))) if dim <= 256 else 128


def keep_for(codes: int) -> int:
    """Leading lanes that are kept: of more codes, more come close."""
    return 4 if codes <= 2048 else 8


def shared_by(tile: dict[str, int], chunk_bytes: int, whole: bool, limit: int) -> int:
    """Rows that are held whole are in shared memory once."""
    rows, codes = tile["ROWS"] * chunk_bytes, tile["CODES"] * chunk_bytes
    stages = tile["num_stages"]
    return rows + staged(codes, stages, limit) if whole else staged(rows + codes, stages, limit)


def scan_options(chunk_bytes: int, whole: bool = True, limit: int = MOST_SHARED) -> dict[str, int]:
    """Tile of the scan, and how it is run: as many rows as leave their leaders in registers."""
    rows, codes = (16, 16) if INTERPRETED else (128, 64)
    tile = {"ROWS": rows, "CODES": codes, "num_warps": 8, "num_stages": 3 if chunk_bytes <= 256 else 2}
    return fitted(tile, limit, lambda t: shared_by(t, chunk_bytes, whole, limit), smaller="ROWS")


def splits_for(rows: int, codes: int, tile_rows: int, tile_codes: int, processors: int) -> tuple[int, int]:
    """Tiles of codes for each split, and the splits: as many programs as fill the GPU twice, up to 16 splits."""
    tiles = triton.cdiv(codes, tile_codes)
    wanted = min(16, tiles, triton.cdiv(2 * processors, max(1, triton.cdiv(rows, tile_rows))))
    share = triton.cdiv(tiles, wanted)
    return share, triton.cdiv(tiles, share)


def accumulation_error(dim: int) -> float:
    """Of a score, in units of |x| |c|: what float32 sums of `dim` products round, however they are ordered."""
    return (dim + 32) * 1.2e-7


def _rounded(
    x: Tensor, centre: Tensor | None, dtype: torch.dtype, cosine: bool, codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> roundings (n, width), norms (n,), what was lost (n,), 1 / length for cosine (n,), of codes their offsets."""
    rows, dim = x.shape
    chunk = chunk_for(dim)
    width = triton.cdiv(dim, chunk) * chunk
    rounded = x.new_empty(rows, width, dtype=dtype)
    norm, lost, length, offset = (x.new_empty(rows, dtype=torch.float32) for _ in range(4))
    tile = max(1, 2048 // chunk)
    _round[(triton.cdiv(rows, tile),)](
        x, centre, rounded, norm, lost, length, offset, rows, dim, width, x.stride(0), accumulation_error(dim),
        ARE_CODES=codes, COSINE=cosine, ROWS=tile, CHUNK=chunk, num_warps=4,
    )  # fmt: skip
    return rounded, norm, lost, length, offset


def processors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def nearest_code(x: Tensor, codebook: Tensor, cosine: bool, strict: bool, precision: int = 0) -> tuple[Tensor, Tensor]:
    """x (N, D) with rows any distance apart, codebook (K, D) contiguous -> indices (N,) int64, distances (N,) float32.

    `strict` is the caller's to see to: finding out here would make the host wait. `precision`: of PRECISIONS.
    """
    (rows, dim), count = x.shape, codebook.shape[0]
    index, distance = x.new_empty(rows, dtype=torch.int64), x.new_empty(rows, dtype=torch.float32)
    if not rows:
        return index, distance
    certain = PRECISIONS[precision] == "ieee"
    dtype = torch.float32 if PRECISIONS[precision] == "tf32" else torch.bfloat16
    with on_device(x):
        centre = None if cosine else x.new_empty(dim, dtype=torch.float32)
        if centre is not None:
            _centre[(triton.cdiv(dim, 32),)](
                codebook, centre, count, dim, SAMPLES=8 if INTERPRETED else 64, COLUMNS=32, num_warps=4
            )
        codes, code_norm, code_lost, code_length, offset = _rounded(codebook, centre, dtype, cosine, True)
        short, norm, lost, length, _ = _rounded(x, centre, dtype, cosine, False)
        chunk, width, keep = min(chunk_for(dim), 512 // dtype.itemsize), short.shape[1], keep_for(count)
        heuristic = scan_options(chunk * dtype.itemsize, width == chunk, shared_memory(x))
        options = tuned("scan", short, (rows, count, width), heuristic)
        tile_rows, tile_codes = options["ROWS"], options["CODES"]
        tiles, splits = splits_for(rows, count, tile_rows, tile_codes, processors(x))
        value, behind = (x.new_empty(rows, splits, keep, dtype=torch.float32) for _ in range(2))
        candidate, rest = torch.empty_like(value, dtype=torch.int32), x.new_empty(rows, splits, dtype=torch.float32)
        _scan[(triton.cdiv(rows, tile_rows), splits)](
            short, codes, norm, lost, offset, code_norm, code_lost, value, candidate, behind, rest, rows, count, width,
            tiles, splits, CHUNK=chunk, WHOLE=width == chunk, KEEP=keep, FLOATS=INTERPRETED, **options,
        )  # fmt: skip
        listed, waiting = x.new_empty(rows, dtype=torch.int32), x.new_zeros(1, dtype=torch.int32)
        _measure[(rows,)](
            x, codebook, length, code_length, norm, lost, offset, code_norm, code_lost, value, candidate, behind, rest,
            listed, waiting, index, distance, count, dim, x.stride(0), tiles, splits, accumulation_error(dim),
            COSINE=cosine, CERTAIN=certain, CODES=tile_codes, CHUNK=min(chunk_for(dim), 128), KEEP=keep, num_warps=1,
        )  # fmt: skip
        if certain:
            share = triton.cdiv(triton.cdiv(count, min(16, triton.cdiv(count, 512))), 16) * 16
            parts = triton.cdiv(count, share)
            programs = min(triton.cdiv(rows, 4) * parts, 8 * processors(x))
            _compare[(programs,)](
                x, codebook, length, code_length, offset, listed, waiting, index, count, dim, x.stride(0), share, parts,
                COSINE=cosine, ROWS=4, CODES=16, CHUNK=min(chunk_for(dim), 64), num_warps=4,
            )  # fmt: skip
            _settle[(min(triton.cdiv(rows, 1024), processors(x)),)](
                listed, waiting, index, distance, BLOCK=1024, num_warps=4
            )
    return index, distance
