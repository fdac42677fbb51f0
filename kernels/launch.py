"""What the launchers of several kernels share."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tuning

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


class Tiles(NamedTuple):
    """A tensor (n, R, C) from which a kernel takes tiles: what Triton's own descriptor says, whose checks take time."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"
    round_f32_to_tf32: bool = False  # which later Tritons than 3.6 ask for


def tiles_of(x: Tensor) -> Tiles:
    """x (n, R, C), where rows or columns lie together; rows of tiles are what does."""
    x = x.clone() if x.data_ptr() % 16 else x
    if x.stride(2) != 1:
        x = x.transpose(1, 2)
    shape, across = x.shape, x.stride(1)
    return Tiles(x, tuple(shape), (shape[1] * across, across, 1))


Argument = Tensor | Tiles | None


@dataclass
class Plan:
    """All of a launch but its tensors: Triton takes longer to look at the arguments than most kernels run.

    blocks: the sides of tiles, for each argument that they are taken from. sizes: what else the launcher wants to know.
    """

    kernel: Any
    grid: int
    numbers: tuple[int | float, ...]
    options: dict[str, Any]
    blocks: tuple[tuple[int, int], ...] = ()
    sizes: tuple[int, ...] = ()
    ready: dict[tuple[bool, ...], tuple[Any, list[Any]]] = field(default_factory=dict)

    def run(self, *tensors: Argument) -> None:
        """kernel[grid](*tensors, *numbers, **options), by the code that such an alignment of the tensors was given."""
        aligned = tuple([t is None or isinstance(t, Tiles) or t.data_ptr() % 16 == 0 for t in tensors])
        known = self.ready.get(aligned)
        if known is not None:
            known[0](*tensors, *known[1])
            return
        sides = iter(self.blocks)
        given = [
            TensorDescriptor(t.base, list(t.shape), list(t.strides), [1, *next(sides)]) if isinstance(t, Tiles) else t
            for t in tensors
        ]
        compiled = self.kernel[(self.grid,)](*given, *self.numbers, **self.options)
        if isinstance(self.kernel, JITFunction):  # neither the interpreter nor a test's stand-in
            constants = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            rest = [*self.numbers, *(self.options[name] for name in constants)]
            self.ready[aligned] = compiled[(self.grid, 1, 1)], rest


_plans: dict[Hashable, Plan] = {}
MOST_PLANS = 4096


def planned(kernel: Any, key: Hashable, make: Callable[[], Plan]) -> Plan:
    """What `make` returns, which is called once for each key: all that it and the kernel's code depend on."""
    key = (
        id(kernel),
        torch.cuda.current_device() if not INTERPRETED and torch.cuda.is_available() else -1,
        tuning.trials,
        key,
    )
    plan = _plans.get(key)
    if plan is None or plan.kernel is not kernel:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = make()
    return plan


@triton.jit
def _sum_rows(x, total, columns, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        sums += tl.load(x + row * columns + start + lane, lane < columns - start, other=0.0)
    tl.store(total + row, tl.sum(sums).to(total.dtype.element_ty))


def sum_rows(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n, m) float32 -> (n,), each row in an order that depends on m alone."""
    rows, columns = x.shape
    total = x.new_empty(rows, dtype=dtype)
    if rows:
        options = {"BLOCK": power_within(columns, 1, 1024), "num_warps": 4}
        plan = planned(_sum_rows, (rows, columns, dtype), lambda: Plan(_sum_rows, rows, (columns,), options))
        plan.run(x, total)
    return total


def power_within(n: int, least: int, most: int) -> int:
    """The power of two from n on, within bounds."""
    return min(most, max(least, 1 << max(n - 1, 0).bit_length()))


def precision_of(x: Tensor) -> str:
    """Products of float32 are exact unless PyTorch's own may be rounded to TF32; those of 16 bits always are."""
    return (
        "tf32"
        if x.dtype == torch.float32 and x.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
        else "ieee"
    )


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


def splits_for(programs: int, tiles: int, wanted: int = 264) -> tuple[int, int]:
    """Tiles for each split of a sum, and the splits: so many that there are about as many programs as wanted."""
    share = cdiv(tiles, min(tiles, max(1, (8 if INTERPRETED else wanted) // programs)))
    return share, cdiv(tiles, share)
