"""Vector quantization after the search: gather, error and counts in one pass; the backward in another.

See fastgen/ops/vector_quantize.py. Least traffic, in elements: forward x and the result, beside the search; backward
x, the result, its gradient and x's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device, sum_rows
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
def _dot_rows(a, b):  # type: ignore[no-untyped-def]
    return tl.sum(a * b, 1)[:, None]


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    grad, grad_error, x, quantized, mask, used, grad_x, rows, dim, grad_stride, stride,
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
    of_error = 2 * tl.load(grad_error).to(tl.float32) / tl.load(used)
    at = grad_x + row[:, None] * dim + column[None, :]
    result = tl.where(live, g + of_error * (v - q), 0.0)
    tl.store(at, result.to(grad_x.dtype.element_ty), (row < rows)[:, None] & (column < dim)[None, :])


def _used(x: Tensor, mask: Tensor | None) -> Tensor:
    """How many numbers the error is a mean of: on the GPU, so that the host need not wait."""
    rows = x.new_full((), x.shape[0], dtype=torch.float32) if mask is None else mask.sum().float()
    return (rows * x.shape[1]).clamp(min=1)


def rows_for(dim: int) -> int:
    """Rows of a tile of about 2048 numbers."""
    return int(max(1, 2048 // triton.next_power_of_2(dim)))


def vector_quantize(
    x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool, strict: bool, precision: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> quantized, indices, mean squared error, counts of the codes."""
    rows, dim = x.shape
    index, _ = nearest_code(x, codebook, cosine, strict, precision)
    quantized = x.new_empty(rows, dim)
    counts = x.new_zeros(codebook.shape[0], dtype=torch.int32)
    tile = rows_for(dim)
    programs = triton.cdiv(rows, tile)
    partial = x.new_empty(1, programs, dtype=torch.float32)
    if rows:
        with on_device(x):
            _gather[(programs,)](
                x, codebook, mask, index, quantized, partial, counts, rows, dim, x.stride(0),
                MASKED=mask is not None, ROWS=tile, CHUNK=min(2048, triton.next_power_of_2(dim)), num_warps=4,
            )  # fmt: skip
    with on_device(x):
        return quantized, index, sum_rows(partial)[0] / _used(x, mask), counts.float()


def vector_quantize_backward(
    grad_quantized: Tensor, grad_error: Tensor, x: Tensor, quantized: Tensor, mask: Tensor | None, rotation: bool
) -> Tensor:
    """`grad_error`: of the commitment -> the gradient of x."""
    rows, dim = x.shape
    grad_x = x.new_empty(rows, dim)
    tile = rows_for(dim)
    if rows:
        with on_device(x):
            _backward[(triton.cdiv(rows, tile),)](
                grad_quantized, grad_error, x, quantized, mask, _used(x, mask), grad_x, rows, dim,
                grad_quantized.stride(0), x.stride(0), MASKED=mask is not None, ROTATION=rotation, ROWS=tile,
                WIDTH=triton.next_power_of_2(dim), num_warps=4,
            )  # fmt: skip
    return grad_x
