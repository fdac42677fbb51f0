"""A step of a codebook's moving averages, in place (see fastgen/ops/code_statistics.py)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, cdiv, on_device, planned, power_within


@triton.jit
def _sizes(cluster_size, counts, total, codes, gain, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of all codes in one program: their sum is in an order that depends on their number alone."""
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, codes, BLOCK):
        live = lane < codes - start
        old = tl.load(cluster_size + start + lane, live, other=0.0)
        new = old + gain * (tl.load(counts + start + lane, live, other=0.0) - old)
        tl.store(cluster_size + start + lane, new, live)
        sums += new
    tl.store(total, tl.sum(sums))


@triton.jit
def _codes(  # type: ignore[no-untyped-def]
    cluster_size, embed_avg, embed, sums, total, codes, dim, gain, eps,
    COSINE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    live = (code < codes)[:, None] & (column < dim)[None, :]
    at = code[:, None] * dim + column[None, :]
    old = tl.load(embed_avg + at, live, other=0.0)
    new = old + gain * (tl.load(sums + at, live, other=0.0) - old)
    tl.store(embed_avg + at, new, live)
    n = tl.load(total)
    size = n * (tl.load(cluster_size + code, code < codes, other=1.0) + eps) / (n + codes * eps)
    new = new / size[:, None]
    if COSINE:
        new = new / tl.maximum(tl.sqrt(tl.sum(new * new, 1)), 1e-6)[:, None]
    if n != 0:  # else the codes stay
        tl.store(embed + at, new, live)


def update_codebook(
    cluster_size: Tensor, embed_avg: Tensor, embed: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float,
    cosine: bool,
) -> None:  # fmt: skip
    codes, dim = embed.shape
    gain, total = 1 - decay, embed.new_empty(())

    def plan() -> Plan:
        width = power_within(dim, 1, 1 << 20)
        rows = max(1, 2048 // width)
        options = {"COSINE": cosine, "ROWS": rows, "WIDTH": width, "num_warps": 4}
        return Plan(_codes, cdiv(codes, rows), (codes, dim, gain, eps), options)

    with on_device(embed):
        sizes = planned(_sizes, (codes, gain), lambda: Plan(_sizes, 1, (codes, gain), {"BLOCK": 1024, "num_warps": 4}))
        sizes.run(cluster_size, counts, total)
        planned(_codes, (codes, dim, gain, eps, cosine), plan).run(cluster_size, embed_avg, embed, sums, total)
