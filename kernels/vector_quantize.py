"""Vector quantization after the search: gather, error and counts in one pass; the backward in another.

See fastgen/ops/vector_quantize.py. Least traffic, in elements: forward x and the result, beside the search; backward
x, the result, its gradient and x's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, cdiv, on_device, planned, power_within
from .nearest_code import nearest_code


@triton.jit
def _gather(  # type: ignore[no-untyped-def]
    x, codebook, mask, index, quantized, partial, counts, rows, dim, stride,
    MASKED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    kept = row < rows
    if MASKED:
        kept = kept & (tl.load(mask + row, row < rows, other=0) != 0)
    code = tl.load(index + row, row < rows, other=0)
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, dim, CHUNK):
        column = start + tl.arange(0, CHUNK)
        inside = (column < dim)[None, :]
        q = tl.load(codebook + code[:, None] * dim + column[None, :], kept[:, None] & inside, other=0.0).to(tl.float32)
        v = tl.load(x + row[:, None] * stride + column[None, :], kept[:, None] & inside, other=0.0).to(tl.float32)
        squares += tl.sum((v - q) * (v - q), 1)
        at = quantized + row[:, None] * dim + column[None, :]
        tl.store(at, q.to(quantized.dtype.element_ty), (row < rows)[:, None] & inside)
    tl.store(partial + tl.program_id(0), tl.sum(squares))
    tl.atomic_add(counts + code, 1, kept)  # of integers: the same in any order
    tl.store(index + row, tl.where(kept, code, -1), row < rows)


@triton.jit
def _summarize(  # type: ignore[no-untyped-def]
    partial, hits, error, counts, programs, rows, codes, dim, MASKED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The mean error, summed in an order that depends on sizes alone; and counts as floats."""
    lane = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, programs, BLOCK):
            squares += tl.load(partial + start + lane, lane < programs - start, other=0.0)
        used = rows * 1.0
        if MASKED:
            kept = tl.zeros([BLOCK], tl.int64)
            for start in range(0, codes, BLOCK):
                kept += tl.load(hits + start + lane, lane < codes - start, other=0)
            used = tl.sum(kept) * 1.0
        tl.store(error, tl.sum(squares) / tl.maximum(used * dim, 1.0))
    else:
        code = (tl.program_id(0) - 1) * BLOCK + lane
        tl.store(counts + code, tl.load(hits + code, code < codes, other=0).to(tl.float32), code < codes)


@triton.jit
def _dot_rows(a, b):  # type: ignore[no-untyped-def]
    return tl.sum(a * b, 1)[:, None]


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, grad_error, x, quantized, mask, used, grad_x, elements, rows, dim, grad_stride, stride,
    MASKED: tl.constexpr, ROTATION: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    kept = row < rows
    if MASKED:
        kept = kept & (tl.load(mask + row, row < rows, other=0) != 0)
    live = kept[:, None] & (column < dim)[None, :]
    g = tl.load(grad + row[:, None] * grad_stride + column[None, :], live, other=0.0).to(tl.float32)
    v = tl.load(x + row[:, None] * stride + column[None, :], live, other=0.0).to(tl.float32)
    q = tl.load(quantized + row[:, None] * dim + column[None, :], live, other=0.0).to(tl.float32)
    if ROTATION:  # R^T: w and u are those of `rotate`
        x_norm = tl.maximum(tl.sqrt(_dot_rows(v, v)), 1e-6)
        q_norm = tl.sqrt(_dot_rows(q, q))
        u = v / x_norm
        to = q / tl.maximum(q_norm, 1e-6)
        w = u + to
        w = w / tl.maximum(tl.sqrt(_dot_rows(w, w)), 1e-6)
        g = (g - 2 * _dot_rows(g, w) * w + 2 * _dot_rows(g, to) * u) * (q_norm / x_norm)
    if MASKED:
        elements = tl.load(used)
    of_error = 2 * tl.load(grad_error).to(tl.float32) / elements
    at = grad_x + row[:, None] * dim + column[None, :]
    result = tl.where(live, g + of_error * (v - q), 0.0)
    tl.store(at, result.to(grad_x.dtype.element_ty), (row < rows)[:, None] & (column < dim)[None, :])


def rows_for(dim: int) -> int:
    """Rows of a tile of about 2048 numbers."""
    return 2048 // power_within(dim, 1, 2048)


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool, strict: bool, precision: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> quantized, indices, mean squared error, counts of the codes."""
    (rows, dim), codes, masked = x.shape, len(codebook), mask is not None
    index, _ = nearest_code(x, codebook, cosine, strict, precision)
    quantized = x.new_empty(rows, dim)
    tile = rows_for(dim)
    programs = cdiv(rows, tile)
    hits = x.new_zeros(codes, dtype=torch.int32)
    partial, counts, error = (x.new_empty(size, dtype=torch.float32) for size in ((programs,), (codes,), ()))
    key = x.shape, x.stride(0), codes, x.dtype, codebook.dtype, masked

    def gather() -> Plan:
        options = {"MASKED": masked, "ROWS": tile, "CHUNK": power_within(dim, 1, 2048), "num_warps": 4}
        return Plan(_gather, programs, (rows, dim, x.stride(0)), options)

    def summarize() -> Plan:
        numbers, options = (programs, rows, codes, dim), {"MASKED": masked, "BLOCK": 1024, "num_warps": 4}
        return Plan(_summarize, 1 + cdiv(codes, 1024), numbers, options)

    with on_device(x):
        if rows:
            planned(_gather, key, gather).run(x, codebook, mask, index, quantized, partial, hits)
        planned(_summarize, key, summarize).run(partial, hits, error, counts)
    return quantized, index, error, counts


def vector_quantize_backward(
    grad_quantized: Tensor, grad_error: Tensor, x: Tensor, quantized: Tensor, mask: Tensor | None, rotation: bool
) -> Tensor:
    """`grad_error`: of the commitment -> the gradient of x."""
    rows, dim = x.shape
    grad_x = x.new_empty(rows, dim)
    # how many numbers the error is a mean of: with a mask on the GPU, so that the host need not wait
    used = None if mask is None else (mask.sum() * float(dim)).clamp(min=1)

    def backward() -> Plan:
        tile = rows_for(dim)
        options = {
            "MASKED": mask is not None,
            "ROTATION": rotation,
            "ROWS": tile,
            "WIDTH": power_within(dim, 1, 1 << 20),
        }
        numbers = float(rows * dim), rows, dim, grad_quantized.stride(0), x.stride(0)
        return Plan(_backward, cdiv(rows, tile), numbers, options | {"num_warps": 4})

    if rows:
        with on_device(x):
            key = x.shape, x.stride(0), grad_quantized.stride(0), x.dtype, grad_error.dtype, mask is None, rotation
            plan = planned(_backward, key, backward)
            plan.run(grad_quantized, grad_error, x, quantized, mask, used, grad_x)
    return grad_x
