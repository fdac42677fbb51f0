"""What the launchers of several kernels share."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Within it, kernels are launched on x's device; Triton takes the current one, and its current stream."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
def _sum_rows(x, total, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        sums += tl.load(x + row * columns + start + lane, lane < columns - start, other=0.0)
    tl.store(total + row, tl.sum(sums))


def sum_rows(x: Tensor) -> Tensor:
    """(n, m) float32 -> (n,), each row in an order that depends on m alone."""
    rows, columns = x.shape
    if columns == 1:
        return x[:, 0]
    total = x.new_empty(rows)
    if rows:
        _sum_rows[(rows,)](x, total, columns, BLOCK=min(1024, triton.next_power_of_2(max(columns, 1))), num_warps=4)
    return total


def precision_of(x: Tensor) -> str:
    """Products of float32 are exact unless PyTorch's own may be rounded to TF32; those of 16 bits always are."""
    return "tf32" if x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def splits_for(programs: int, tiles: int, most: int = 64) -> tuple[int, int]:
    """Tiles for each split of a sum, and the splits: about 512 programs in all, at most `most` splits."""
    share = triton.cdiv(tiles, min(tiles, most, triton.cdiv(8 if INTERPRETED else 512, programs)))
    return int(share), int(triton.cdiv(tiles, share))
