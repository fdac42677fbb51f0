"""What the launchers of several kernels share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
MOST_SHARED = 227 << 10  # bytes of shared memory for a program, on Hopper and Blackwell
BARRIERS = 2048  # bytes of it beside the tiles


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Within it, kernels are launched on x's device; Triton takes the current one, and its current stream."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def cdiv(a: int, b: int) -> int:
    """The quotient rounded up; triton.cdiv takes the host 5 us."""
    return -(-a // b)


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


@functools.cache
def _shared_memory(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def shared_memory(x: Tensor) -> int:
    """Bytes of shared memory that a program may take on x's device."""
    return _shared_memory(x.device) if x.is_cuda else MOST_SHARED


def staged(bytes_of_tile: int, stages: int, limit: int) -> int:
    """Shared memory of a loop over tiles. Tensor cores before Hopper's take the last one from registers."""
    return bytes_of_tile * (stages if limit >= MOST_SHARED else max(1, stages - 1))


def fitted(
    tile: dict[str, int], limit: int, needed: Callable[[dict[str, int]], int], smaller: str = "CHUNK"
) -> dict[str, int]:
    """The tile with as many stages, and then of one side as much, as leave `needed` bytes of it within the limit."""
    while needed(tile) + BARRIERS > limit and tile[smaller] > 16:
        less = {"num_stages": tile["num_stages"] - 1} if tile["num_stages"] > 2 else {smaller: tile[smaller] // 2}
        tile = tile | less
    return tile


def splits_for(programs: int, tiles: int, most: int = 64) -> tuple[int, int]:
    """Tiles for each split of a sum, and the splits: about 256 programs in all, at most `most` splits."""
    share = triton.cdiv(tiles, min(tiles, most, max(1, (8 if INTERPRETED else 264) // programs)))
    return int(share), int(triton.cdiv(tiles, share))
