"""The nearest code of each row: a scan on tensor cores, then the float32 answer (see fastgen/ops/nearest_code.py).

|x - c|^2 is least where the score <x, c> - |c|^2 / 2 is largest, both measured from a point amid the codes. The scan
scores all codes from bfloat16 roundings xh and ch. With a for what accumulation rounds, a score is off by at most

    e = (|x - xh| + a |x|) |c| + |x| |c - ch| + a |c|^2,

so the scan computes score + e, above which no code can be; what a code is sure to reach is 2 e below that. Numbers that
are bfloat16 to begin with are measured from the origin, since then they need no rounding.

Of UNIT codes that are neighbours in a thread's registers only the largest is looked at. A tile's units are the lanes:
in each the best unit and the second best are kept. The codes of units that reach what some code is sure to are measured
in float32, as sum (x - c)^2; where the second of a lane does too, all codes of the lane, and where more lanes do than
KEEP, or two have such seconds, all codes. No N x K is ever in memory.

Least work: 2 N K D operations at the rate of bfloat16; x and the results once.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents as launch_next
from triton.language.extra.cuda import gdc_wait as wait_for_last

from fastgen.ops.nearest_code import PRECISIONS

from .launch import INTERPRETED, MOST_SHARED, Plan, cdiv, fitted, on_device, planned, shared_memory
from .tuning import tuned

DTYPES = (torch.bfloat16, torch.float32, torch.bfloat16)  # of the roundings, for each of PRECISIONS
NO_DIRECTION = tl.constexpr(1e-30)  # vectors no longer than this are zero to the cosine
KEEP = tl.constexpr(8)
SAMPLES = tl.constexpr(16)
NOTHING = tl.constexpr(0x7FFFFFFFFFFFFFFF)  # no (distance, code)


@triton.jit
def _sample(codes, number, column, count, dim):  # type: ignore[no-untyped-def]
    """Coordinates of one of SAMPLES codes, zero where they are not finite."""
    v = tl.load(codes + number * count // SAMPLES * dim + column, column < dim, other=0.0).to(tl.float32)
    return tl.where(v - v == 0, v, 0.0)


@triton.jit
def _middle(codes, column, count, dim):  # type: ignore[no-untyped-def]
    """The middle one of some codes' values in each coordinate: whatever a few of them are, near the most."""
    number = tl.arange(0, SAMPLES).to(tl.int64)[None, :]
    v = _sample(codes, number, column[:, None], count, dim)
    rank = tl.zeros(v.shape, tl.int32)
    for other in tl.static_range(SAMPLES):
        w = _sample(codes, tl.full([1], other, tl.int64), column, count, dim)[:, None]
        rank += ((w < v) | ((w == v) & (other < number))).to(tl.int32)
    middle = tl.sum(tl.where(rank == SAMPLES // 2, v, 0.0), 1)
    return tl.where(tl.abs(middle) < 1e18, middle, 0.0)


@triton.jit
def _part(x, row, live, start, dim, stride, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """PART coordinates of some rows, from `start` on; zeros beyond."""
    column = start + tl.arange(0, PART)
    at = row[:, None] * stride + column[None, :]
    return tl.load(x + at, live[:, None] & (column < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _round(  # type: ignore[no-untyped-def]
    x, centre, rounded, row, live, within, rows, dim, width, stride,
    ARE_CODES: tl.constexpr, COSINE: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Rows less the centre (for cosine, of unit length) rounded -> squares, squares of what is lost, scale, if finite.

    Codes that are not finite become zeros.
    """
    finite = live
    scale = tl.full([ROWS], 1.0, tl.float32)
    if COSINE or ARE_CODES:
        most = tl.zeros([ROWS], tl.float32)
        for start in range(0, dim, PART):
            v = tl.abs(_part(x, row, live, start, dim, stride, PART))
            most = tl.maximum(most, tl.max(tl.where(v - v == 0, v, float("inf")), 1))
        finite = live & (most < 1.8e19)  # so that squares are finite
        shrink = tl.where(finite & (most > 1e-36), 1 / most, 0.0)  # so that no square vanishes
        squares = tl.zeros([ROWS], tl.float32)
        for start in range(0, dim, PART):
            v = _part(x, row, live, start, dim, stride, PART) * shrink[:, None]
            squares += tl.sum(v * v, 1)
        length = tl.sqrt(squares) * most
        finite = finite & (length < 1.8e19)
        if COSINE:
            scale = tl.where(length > NO_DIRECTION, 1 / length, 0.0)
    squares = tl.zeros([ROWS], tl.float32)
    losses = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, PART):
        column = start + tl.arange(0, PART)
        v = _part(x, row, live, start, dim, stride, PART)
        if COSINE:
            v = v * scale[:, None]
        elif CENTRED:
            if ARE_CODES:
                middle = _middle(x, column, rows, dim)
                tl.store(centre + column, middle, (column < width) & (tl.program_id(0) == 0))
            else:
                middle = tl.load(centre + column)
            v = v - middle[None, :]
        if ARE_CODES:
            v = tl.where(finite[:, None], v, 0.0)
        short = v.to(rounded.dtype.element_ty)
        tl.store(rounded + row[:, None] * width + column[None, :], short, within[:, None])
        loss = v - short.to(tl.float32)
        squares += tl.sum(v * v, 1)
        losses += tl.sum(loss * loss, 1)
    return squares, losses, scale, finite


@triton.jit
def _prepare(  # type: ignore[no-untyped-def]
    codebook, codes, facts, count, padded, dim, width, accumulated,
    COSINE: tl.constexpr, CENTRED: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Codes rounded, and of each the norm, the norm of what is lost, its part of the score, for cosine 1 / length.

    That part is minus infinity for codes that are not finite, and for those that fill the last tile.
    """
    if EARLY:
        launch_next()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    within = row < padded
    squares, losses, scale, finite = _round(
        codebook, facts + 4 * padded, codes, row, row < count, within, count, dim, width, dim, True, COSINE, CENTRED,
        ROWS, PART,
    )  # fmt: skip
    score = accumulated * squares
    if not COSINE:
        score -= 0.5 * squares
    tl.store(facts + row, tl.sqrt(squares), within)
    tl.store(facts + padded + row, tl.sqrt(losses), within)
    tl.store(facts + 2 * padded + row, tl.where(finite & (squares < 3e38), score, float("-inf")), within)
    tl.store(facts + 3 * padded + row, scale, within)


@triton.jit
def _dot(x, codes, sums, FLOATS: tl.constexpr):  # type: ignore[no-untyped-def]
    if FLOATS:  # for the interpreter, whose products of bfloat16 are wrong
        return tl.dot(x.to(tl.float32), codes.to(tl.float32), sums, input_precision="ieee")
    return tl.dot(x, codes, sums, input_precision="tf32")  # of float32; bfloat16 is what it is


@triton.jit
def _nearer(distance, code, least, nearest):  # type: ignore[no-untyped-def]
    """The nearer of two, and the lower index of two as near."""
    better = (distance < least) | ((distance == least) & (code < nearest))
    return tl.where(better, distance, least), tl.where(better, code, nearest)


@triton.jit
def _closest(  # type: ignore[no-untyped-def]
    x, codebook, scales, row, scale, code, penalty, count, dim, stride, COSINE: tl.constexpr, PART: tl.constexpr
):  # fmt: skip
    """Of each row's codes (ROWS, UNIT) the nearest in float32, and how far it is. penalty: 0 or, for others, infinity.

    No mask is taken from one layout to another, since Triton 3.6 mixes them up on the way.
    """
    at = tl.minimum(code, count - 1)
    squares = tl.zeros(code.shape, tl.float32)
    if COSINE:
        code_scale = tl.load(scales + at)
    for start in range(0, dim, PART):
        column = start + tl.arange(0, PART)[None, None, :]
        v = tl.load(x + row[:, None, None] * stride + column, column < dim, other=0.0).to(tl.float32)
        c = tl.load(codebook + at.to(tl.int64)[:, :, None] * dim + column, column < dim, other=0.0).to(tl.float32)
        d = v * scale[:, None, None] - c * code_scale[:, :, None] if COSINE else v - c
        squares += tl.sum(d * d, 2)
    if COSINE:
        nothing = tl.where(code_scale * scale[:, None] == 0, 1.0, 0.0)
        squares = squares * (1 - nothing) + 2 * nothing
    squares = tl.minimum(squares, 3e38) + penalty
    near = tl.min(squares, 1)
    return near, tl.min(tl.where((squares == near[:, None]) & (squares <= 3e38), code, count), 1)


@triton.jit
def _penalty(offsets, code):  # type: ignore[no-untyped-def]
    """Infinity for codes that cannot be chosen."""
    return tl.where(tl.load(offsets + code) > float("-inf"), 0.0, float("inf"))


@triton.jit
def _member(lane, n, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The n-th code of a lane's unit in a tile: two neighbours in each of some groups of 8, which one thread has."""
    return lane // 4 * (4 * UNIT) + lane % 4 * 2 + n % 2 + n // 2 * 8


@triton.jit
def _search(  # type: ignore[no-untyped-def]
    x, codebook, short, codes, facts, index, distance, rows, count, padded, dim, width, stride, tiles, splits,
    accumulated,
    PLAIN: tl.constexpr, COSINE: tl.constexpr, CENTRED: tl.constexpr, CERTAIN: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, CODES: tl.constexpr, UNIT: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr,
    WHOLE: tl.constexpr, STAGES: tl.constexpr, FLOATS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The nearest of a split's codes to ROWS rows. PLAIN: x needs no rounding. CERTAIN: or the scan's leading unit.

    EARLY: while _prepare still runs.
    """
    LANES: tl.constexpr = CODES // UNIT
    place = tl.arange(0, ROWS)
    first_row = (tl.program_id(0) // splits).to(tl.int64) * ROWS
    row = first_row + place
    live = row < rows
    column = tl.arange(0, CHUNK)
    norms, losses, offsets, scales = facts, facts + padded, facts + 2 * padded, facts + 3 * padded
    scale = tl.full([ROWS], 1.0, tl.float32)
    lost = tl.zeros([ROWS], tl.float32)
    squares = tl.zeros([ROWS], tl.float32)
    if PLAIN:
        row = tl.minimum(row, rows - 1)
        at_row = x + row[:, None] * stride + column[None, :]
        if not WHOLE:
            for start in range(0, dim, CHUNK):
                v = tl.load(at_row + start).to(tl.float32)
                squares += tl.sum(v * v, 1)
    else:
        if EARLY:
            wait_for_last()
        squares, lost, scale, _ = _round(
            x, facts + 4 * padded, short, row, live, live, rows, dim, width, stride, False, COSINE, CENTRED, ROWS, PART
        )
        tl.debug_barrier()  # other threads read what one has written
        row = tl.minimum(row, rows - 1)
        at_row = short + row[:, None] * width + column[None, :]
    if WHOLE:
        held = tl.load(at_row)
        if PLAIN:
            v = held.to(tl.float32)
            squares = tl.sum(v * v, 1)
    if EARLY and PLAIN:
        wait_for_last()
    own = tl.sqrt(squares)
    doubt = tl.sqrt(lost) + accumulated * own
    best = tl.full([ROWS, LANES // 4, 4], float("-inf"), tl.float32)
    second = best
    tile = tl.zeros([ROWS, LANES // 4, 4], tl.int32)
    begin = tl.program_id(0) % splits * tiles
    end = min(begin + tiles, padded // CODES)
    for t in tl.range(begin, end, num_stages=STAGES):
        code = t * CODES + tl.arange(0, CODES)
        at_code = codes + code.to(tl.int64)[None, :] * width + column[:, None]
        sums = tl.broadcast_to(tl.load(offsets + code)[None, :], [ROWS, CODES])
        if PLAIN:
            sums = doubt[:, None] * tl.load(norms + code)[None, :] + sums
        if WHOLE:
            sums = _dot(held, tl.load(at_code), sums, FLOATS)
        else:
            for start in range(0, width, CHUNK):
                sums = _dot(tl.load(at_row + start), tl.load(at_code + start), sums, FLOATS)
        if not PLAIN:  # where the products are, lest what is known of rows be brought there anew for each tile
            sums += doubt[:, None] * tl.load(norms + code)[None, :]
            sums += own[:, None] * tl.load(losses + code)[None, :]
        sums = tl.max(tl.max(tl.reshape(sums, [ROWS, LANES // 4, UNIT // 2, 4, 2]), 4), 2)
        second = tl.maximum(second, tl.minimum(best, sums))
        tile = tl.where(sums > best, t, tile)
        best = tl.maximum(best, sums)
    best, second = tl.reshape(best, [ROWS, LANES]), tl.reshape(second, [ROWS, LANES])
    tile = tl.reshape(tile, [ROWS, LANES])

    lane = tl.arange(0, LANES)[None, :]
    member = tl.arange(0, UNIT)[None, :]
    limit = tl.full([ROWS], float("-inf"), tl.float32)  # what some code is sure to reach
    crowd = limit  # the best second of a lane, of lane `crowded`; and what else was not looked at
    left = limit
    crowded = tl.zeros([ROWS], tl.int32)
    least = tl.full([ROWS], float("inf"), tl.float32)
    nearest = tl.zeros([ROWS], tl.int32) + count
    top = tl.max(best, 1)
    wanted = live.to(tl.int32)
    more = 1
    while more > 0:
        which = tl.min(tl.where(best == top[:, None], lane, LANES), 1)
        chosen = lane == which[:, None]
        unit = (tl.sum(tl.where(chosen, tile, 0), 1) * CODES + _member(which, 0, UNIT)) * wanted
        code = unit[:, None] + _member(0, member, UNIT)
        wanted = wanted > 0
        penalty = _penalty(offsets, code) + tl.where(wanted, 0.0, float("inf"))[:, None]
        near, its = _closest(x, codebook, scales, row, scale, code, penalty, count, dim, stride, COSINE, PART)
        least, nearest = _nearer(near, its, least, nearest)
        best = tl.where(chosen, float("-inf"), best)
        if CERTAIN:
            size = tl.load(norms + code)
            error = doubt[:, None] * size + own[:, None] * tl.load(losses + code)
            error = tl.max(error + accumulated * size * size, 1)
            limit = tl.where(wanted, tl.maximum(limit, top - 2.001 * error), limit)
            behind = tl.where(wanted, tl.max(tl.where(chosen, second, float("-inf")), 1), float("-inf"))
            left = tl.maximum(left, tl.minimum(crowd, behind))
            crowded = tl.where(behind > crowd, which, crowded)
            crowd = tl.maximum(crowd, behind)
            top = tl.max(best, 1)
            wanted = (live & (top >= limit) & (top > float("-inf"))).to(tl.int32)
            more = tl.where(more < KEEP, tl.max(wanted, 0) * (more + 1), 0)
        else:
            wanted = wanted.to(tl.int32)
            more = 0
    if CERTAIN:
        whole = tl.maximum(left, top) >= limit
        again = live & (limit > float("-inf")) & (whole | (crowd >= limit))
        while tl.max(again.to(tl.int32), 0) > 0:
            first = tl.min(tl.where(again, place, ROWS), 0)
            this = place == first
            alone = tl.max(tl.where(this & (whole == 0), crowded, -1), 0)  # the lane to be measured; -1: all
            its_row = tl.zeros([ROWS], tl.int64) + tl.minimum(first_row + first, rows - 1)
            its_scale = tl.zeros([ROWS], tl.float32) + tl.sum(tl.where(this, scale, 0.0), 0)
            closest = tl.full([ROWS], float("inf"), tl.float32)
            its = tl.zeros([ROWS], tl.int32) + count
            for start in range(0, (end - begin) * tl.where(alone < 0, CODES, UNIT), ROWS * UNIT):
                n = start + place[:, None] * UNIT + member
                n = tl.where(alone < 0, n, n // UNIT * CODES + _member(alone, member, UNIT))
                code = tl.minimum(begin * CODES + n, end * CODES - 1)  # the last one again and again
                near, code = _closest(
                    x, codebook, scales, its_row, its_scale, code, _penalty(offsets, code), count, dim, stride, COSINE,
                    PART,
                )  # fmt: skip
                closest, its = _nearer(near, code, closest, its)
            near = tl.min(closest, 0)
            code = tl.min(tl.where(closest == near, its, count), 0)
            near, code = tl.where(this, near, float("inf")), tl.where(this, code, count)
            least, nearest = _nearer(near, code, least, nearest)
            again = again & (this == 0)
    least += own - own  # NaN where the row is not finite
    missing = (least != least) | (nearest >= count)
    if SPLIT:
        key = (least.to(tl.int32, bitcast=True).to(tl.int64) << 32) | nearest.to(tl.int64)
        tl.atomic_min(index + row, tl.where(missing, NOTHING, key), live)
    else:
        tl.store(index + row, tl.where(missing, 0, nearest).to(tl.int64), live)
        tl.store(distance + row, tl.where(missing, float("nan"), least), live)


@triton.jit
def _settle(index, distance, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least (distance, code) of all splits apart."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(index + row, row < rows, other=0)
    missing = key == NOTHING
    near = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(index + row, tl.where(missing, 0, key & 0xFFFFFFFF), row < rows)
    tl.store(distance + row, tl.where(missing, float("nan"), near), row < rows)


@functools.cache
def chunk_for(dim: int) -> int:
    """Coordinates that are multiplied at once: all, where a tile of rows then stays on chip through the scan.

    Rows of the roundings are padded to a multiple of it.
    """
    return int(max(16, triton.next_power_of_2(dim))) if dim <= 256 else 128


def shared_by(tile: dict[str, int], chunk_bytes: int, whole: bool, plain: bool) -> int:
    """Rows that are held whole are in shared memory once; they are rounded and measured by way of it."""
    rows, codes, stages = tile["ROWS"] * chunk_bytes, tile["CODES"] * chunk_bytes, tile["num_stages"]
    scan = (0 if plain else 8 << 10) + (rows + stages * codes if whole else stages * (rows + codes))
    return max(scan, 40 << 10)


@functools.cache
def scan_options(
    rows: int, chunk_bytes: int, whole: bool = True, plain: bool = True, limit: int = MOST_SHARED, processors: int = 132
) -> dict[str, int]:
    """Tile of the scan, and how it is run: warps that do not wait for each other, where registers suffice for them."""
    if INTERPRETED:
        return {"ROWS": 32, "CODES": 64, "UNIT": 4, "PART": 64, "num_warps": 4, "num_stages": 2}
    codes = 64 if limit > 64 << 10 else 16
    tile = {"ROWS": 128, "CODES": codes, "UNIT": 4, "PART": 16, "num_warps": 8, "num_stages": 2}
    if limit >= MOST_SHARED:  # Hopper's products
        if chunk_bytes > 256 and rows > 64 * processors:  # each program reads all codes: the fewer, the less
            tile |= {"ROWS": 256, "num_stages": 3}
        else:
            tile |= {"ROWS": 64, "CODES": 128, "PART": 32 if plain else 16, "num_warps": 4, "num_stages": 3}
    return fitted(tile, limit, lambda t: shared_by(t, chunk_bytes, whole, plain), smaller="ROWS")


def splits_for(rows: int, codes: int, tile_rows: int, tile_codes: int, processors: int) -> tuple[int, int]:
    """Tiles of codes for each split, and the splits, at most 16: more than one where half the GPU would be idle."""
    tiles = cdiv(codes, tile_codes)
    share = cdiv(tiles, min(16, tiles, max(1, processors // cdiv(max(rows, 1), tile_rows))))
    return share, cdiv(tiles, share)


def accumulation_error(dim: int) -> float:
    """Of a score, in units of |x| |c|: what float32 sums of `dim` products round, however they are ordered."""
    return (dim + 32) * 1.2e-7


@functools.cache
def _early(device: torch.device) -> dict[str, bool]:
    """Launch options by which a kernel starts before the last one has ended, where a GPU can."""
    early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": early} | ({"launch_pdl": True} if early else {})


@functools.cache
def _processors(device: torch.device) -> int:
    """A GPU's; without one those of an H100, in the interpreter so many that few rows are searched in splits."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 8 if INTERPRETED else 132


def _plans(x: Tensor, codebook: Tensor, cosine: bool, precision: int) -> tuple[Plan, Plan]:
    """Of both launches. Sizes: codes with those that fill tiles, the width of roundings, splits, if x needs none."""
    (rows, dim), count = x.shape, codebook.shape[0]
    dtype = DTYPES[precision]
    chunk = min(chunk_for(dim), 512 // dtype.itemsize)
    width = cdiv(dim, chunk) * chunk
    exact = not cosine and x.dtype == codebook.dtype == dtype
    plain, processors = exact and width == dim, _processors(x.device)
    heuristic = scan_options(rows, chunk * dtype.itemsize, width == chunk, plain, shared_memory(x), processors)
    options = tuned("scan", x, (rows, count, width), heuristic)
    tile_rows, tile_codes = options["ROWS"], options["CODES"]
    tiles, splits = splits_for(rows, count, tile_rows, tile_codes, processors)
    padded, block, error = cdiv(count, tile_codes) * tile_codes, max(1, 2048 // chunk), accumulation_error(dim)
    kind = {"COSINE": cosine, "CENTRED": not (cosine or exact)}
    early = _early(x.device)
    own = {
        "PLAIN": plain, "CERTAIN": PRECISIONS[precision] == "ieee", "SPLIT": splits > 1, "CHUNK": chunk,
        "WHOLE": width == chunk, "STAGES": options["num_stages"], "FLOATS": INTERPRETED,
        "PART": min(chunk, options["PART"]),
    }  # fmt: skip
    numbers = rows, count, padded, dim, width, x.stride(0), tiles, splits, error
    prepare = {"ROWS": block, "PART": chunk, "EARLY": early["EARLY"], "num_warps": 4}
    return (
        Plan(_prepare, cdiv(padded, block), (count, padded, dim, width, error), kind | prepare),
        Plan(
            _search, cdiv(rows, tile_rows) * splits, numbers, options | kind | own | early,
            sizes=(padded, width, splits, plain),
        ),
    )  # fmt: skip


def nearest_code(x: Tensor, codebook: Tensor, cosine: bool, strict: bool, precision: int = 0) -> tuple[Tensor, Tensor]:
    """x (N, D) with rows any distance apart, codebook (K, D) contiguous -> indices (N,) int64, distances (N,) float32.

    `strict` is the caller's to see to: finding out here would make the host wait. `precision`: of PRECISIONS.
    """
    rows, dtype = x.shape[0], DTYPES[precision]
    distance = x.new_empty(rows, dtype=torch.float32)
    if not rows:
        return x.new_empty(rows, dtype=torch.int64), distance
    key = x.shape, x.stride(0), len(codebook), x.dtype, codebook.dtype, cosine, precision
    with on_device(x):
        prepare = planned(_prepare, key, lambda: _plans(x, codebook, cosine, precision)[0])
        search = planned(_search, key, lambda: _plans(x, codebook, cosine, precision)[1])
        padded, width, splits, plain = search.sizes
        codes, facts = x.new_empty(padded, width, dtype=dtype), x.new_empty(4 * padded + width, dtype=torch.float32)
        short = x if plain else x.new_empty(rows, width, dtype=dtype)
        if splits == 1:
            index = x.new_empty(rows, dtype=torch.int64)
        else:
            index = x.new_full((rows,), NOTHING.value, dtype=torch.int64)
        prepare.run(codebook, codes, facts)
        search.run(x, codebook, short, codes, facts, index, distance)
        if splits > 1:
            settle = planned(
                _settle, rows, lambda: Plan(_settle, cdiv(rows, 1024), (rows,), {"BLOCK": 1024, "num_warps": 4})
            )
            settle.run(index, distance)
    return index, distance
