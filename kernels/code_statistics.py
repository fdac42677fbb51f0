"""Statistics of a codebook's use, without float atomics (see fastgen/ops/code_statistics.py).

Rows are sorted by code, stably, so that those of a code are one segment in their own order; programs sum shares of a
segment, and their sums are added in order. Least traffic: x once, its order twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, cdiv, on_device, planned, power_within


@triton.jit
def _sum_segments(  # type: ignore[no-untyped-def]
    x, minus, order, begin, counts, partial, codes, dim, stride, minus_stride, shares,
    SUBTRACT: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    code = tl.program_id(0) % codes
    share = (tl.program_id(0) // codes % shares).to(tl.int64)
    first_column = tl.program_id(0) // codes // shares * CHUNK
    column = first_column + tl.arange(0, CHUNK)
    first, last = tl.load(begin + code), tl.load(begin + code + 1)
    if (share == 0) & (first_column == 0):
        tl.store(counts + code, (last - first).to(tl.float32))
    start = first + (last - first) * share // shares
    end = first + (last - first) * (share + 1) // shares
    sums = tl.zeros([ROWS, CHUNK], tl.float32)
    for at in range(start, end, ROWS):
        place = at + tl.arange(0, ROWS)
        row = tl.load(order + place, place < end, other=0)
        live = (place < end)[:, None] & (column < dim)[None, :]
        v = tl.load(x + row[:, None] * stride + column[None, :], live, other=0.0).to(tl.float32)
        if SUBTRACT:
            v -= tl.load(minus + row[:, None] * minus_stride + column[None, :], live, other=0.0).to(tl.float32)
        sums += v
    tl.store(partial + (share * codes + code) * dim + column, tl.sum(sums, 0), column < dim)


def shares_for(codes: int, rows: int) -> int:
    """Programs for each segment: about 2048 in all, 4 at least lest all rows be of one code, 256 rows or more each."""
    return int(max(1, min(max(4, 2048 // codes), cdiv(rows, 256), 64)))


def code_statistics(x: Tensor, minus: Tensor | None, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Sums of x (less minus) over the rows of each code; rows of index -1 are left out."""
    (rows, dim), subtract = x.shape, minus is not None
    shares = shares_for(num_codes, rows)
    counts = x.new_empty(num_codes, dtype=torch.float32)
    partial = x.new_empty(shares, num_codes, dim, dtype=torch.float32)
    short = torch.int16 if num_codes < 1 << 15 else torch.int32 if num_codes < 1 << 31 else torch.int64
    steps = x.stride(0), minus.stride(0) if minus is not None else 0

    def plan() -> Plan:
        chunk = power_within(dim, 1, 128)
        options = {"SUBTRACT": subtract, "ROWS": 1024 // chunk, "CHUNK": chunk, "num_warps": 4}
        return Plan(
            _sum_segments, num_codes * shares * max(1, cdiv(dim, chunk)), (num_codes, dim, *steps, shares), options
        )

    with on_device(x):
        # sorted in fewer passes; what is no code's goes to either end
        ordered, order = torch.sort(indices.clamp(-1, num_codes).to(short), stable=True)
        begin = torch.searchsorted(ordered, torch.arange(num_codes + 1, device=x.device, dtype=short))
        key = num_codes, x.shape, steps, x.dtype, subtract
        planned(_sum_segments, key, plan).run(x, minus, order, begin, counts, partial)
        return counts, partial[0] if shares == 1 else partial.sum(0)
