"""What reaches beyond a thread: memory, copies that end later, barriers, exchanges within a warp."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from .machine import KINDS, PARAMETERS, PATIENCE, Array, Fault, Machine, Mask, handles
from .program import Instruction, Operand

ATOMIC: dict[str, Any] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "exch": lambda before, value: value,
}  # fmt: skip


def places(m: Machine, i: Instruction, operand: Operand, mask: Mask) -> Array:
    if any(part.startswith("shared") for part in i.modifiers):
        return m.shared_address(operand, mask)
    return m.address(operand, "u64")[mask].astype(np.int64)


@handles("ld")
def load(m: Machine, i: Instruction, mask: Mask) -> None:
    if "param" in i.modifiers:
        value = m.arguments[int(i.operands[1].address.text.rpartition("_")[2])]
        if isinstance(value, float):
            bits = np.array([value], "f4").view("u4")
        else:
            bits = np.array([value & ((1 << 64) - 1)], "u8")
        m.write(i.operands[0], bits.astype(KINDS["u" + i.type[1:]]).view(KINDS[i.type]), mask)
        return
    targets = i.operands[0].parts or (i.operands[0],)
    size = np.dtype(KINDS[i.type]).itemsize
    memory = m.of_shared if i.modifiers[0].startswith("shared") else m.memory
    values = memory.load(places(m, i, i.operands[1], mask), size, len(targets))
    full = np.zeros((len(targets), m.lanes), values.dtype)
    full[:, mask] = values.T
    for target, value in zip(targets, full, strict=True):
        m.write(target, value.view(KINDS[i.type]), mask)


@handles("st")
def store(m: Machine, i: Instruction, mask: Mask) -> None:
    sources = i.operands[1].parts or (i.operands[1],)
    kind = f"u{8 * np.dtype(KINDS[i.type]).itemsize}"
    values = np.stack([m.each(m.read(source, kind))[mask] for source in sources], 1)
    memory = m.of_shared if i.modifiers[0].startswith("shared") else m.memory
    memory.store(places(m, i, i.operands[0], mask), values)


@handles("atom", "red")
def atomic(m: Machine, i: Instruction, mask: Mask) -> None:
    """One thread after another, in their order."""
    operation = next(ATOMIC[part] for part in i.modifiers if part in ATOMIC)
    to = i.operands[0] if i.name == "atom" else Operand("_")
    place, value = i.operands[1:3] if i.name == "atom" else i.operands
    addresses = places(m, i, place, mask)
    values = m.each(m.read(value, i.type))[mask]
    memory = m.of_shared if "shared" in i.modifiers else m.memory
    before = np.zeros(len(values), values.dtype)
    for n in range(len(values)):
        at = addresses[n : n + 1]
        before[n] = memory.load(at, values.itemsize).view(values.dtype)[0, 0]
        after = operation(before[n], values[n])
        memory.store(at, np.array([[after]], values.dtype).view(f"u{values.itemsize}"))
    full = np.zeros(m.lanes, values.dtype)
    full[mask] = before
    m.write(to, full, mask)


@handles("cp")
def copy(m: Machine, i: Instruction, mask: Mask) -> None:
    """cp.async: of so many bytes the first, as many as the last operand says, the others are zero."""
    what = i.modifiers[1]
    if what == "bulk":
        tensor_copy(m, i, mask)
    elif what == "commit_group":
        m.group.copies.append(m.group.started)
        m.group.started = []
    elif what in ("wait_group", "wait_all"):
        if what == "wait_all":
            m.group.copies.append(m.group.started)
            m.group.started = []
        left = int(i.operands[0].text) if what == "wait_group" else 0
        while len(m.group.copies) > left:
            for finish in m.group.copies.pop(0):
                finish()
    else:
        size = int(i.operands[2].text, 0)
        to, of = m.shared_address(i.operands[0], mask), m.address(i.operands[1], "u64")[mask].astype(np.int64)
        taken = np.full(m.lanes, size)[mask]
        if len(i.operands) > 3:
            taken = m.each(m.read(i.operands[3], "u32"))[mask]
        if set(np.unique(taken)) - {0, size}:
            raise Fault("a copy of a part of its bytes")

        def finish() -> None:
            values = np.zeros((len(to), size // 4), "u4")
            values[taken > 0] = m.memory.load(of[taken > 0], 4, size // 4)
            m.of_shared.store(to, values)

        finish() if not m.late else m.group.started.append(finish)


@handles("bar")
def warp_barrier(m: Machine, i: Instruction, mask: Mask) -> None:
    """bar.warp.sync; those of a whole block are the machine's."""
    m.whole(mask, 32)


@handles("fence", "membar", "prefetch", "griddepcontrol")
def nothing(m: Machine, i: Instruction, mask: Mask) -> None:
    """Memory is always up to date here."""


@handles("shfl")
def shuffle(m: Machine, i: Instruction, mask: Mask) -> None:
    m.whole(mask, 32)
    value = m.each(m.read(i.operands[1], "u32"))
    by, clamp = (m.each(m.read(operand, "u32")).astype(np.int64) for operand in i.operands[2:4])
    if ((clamp >> 8) & 31).any() or (clamp & 31 != (0 if i.modifiers[1] == "up" else 31)).any():
        raise Fault("exchange within a part of a warp")
    lane = m.thread % 32
    of = {"bfly": lane ^ (by & 31), "idx": by & 31, "up": lane - by, "down": lane + by}[i.modifiers[1]]
    of = np.where((of >= 0) & (of < 32), of, lane)
    out = np.take_along_axis(value.reshape(-1, 32), of.reshape(-1, 32), 1).reshape(-1)
    m.write(i.operands[0], out, mask)


@handles("elect")
def elect(m: Machine, i: Instruction, mask: Mask) -> None:
    m.whole(mask, 32)
    leader, chosen = i.operands[0].parts
    m.write(leader, np.zeros(1, "u4"), mask)
    m.write(chosen, m.thread % 32 == 0, mask)


@handles("vote")
def vote(m: Machine, i: Instruction, mask: Mask) -> None:
    m.whole(mask, 32)
    warps = m.each(m.read(i.operands[1], "pred")).reshape(-1, 32)
    if "ballot" in i.modifiers:
        out = (warps.astype("u4") << np.arange(32, dtype="u4")).sum(1, dtype="u4")
    else:
        out = warps.all(1) if "all" in i.modifiers else warps.any(1)
    m.write(i.operands[0], np.repeat(out, 32), mask)


@handles("redux")
def reduce(m: Machine, i: Instruction, mask: Mask) -> None:
    m.whole(mask, 32)
    warps = m.each(m.read(i.operands[1], i.type)).reshape(-1, 32)
    m.write(i.operands[0], np.repeat(ATOMIC[i.modifiers[1]].reduce(warps, 1, dtype=warps.dtype), 32), mask)


@dataclass
class Barrier:
    """Of mbarrier: it turns to the next phase when all have arrived and all bytes have come."""

    count: int
    missing: int
    bytes: int = 0
    phase: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)  # that are put off until they are waited for

    def turn(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase ^= 1
            self.missing = self.count


def barriers_of(m: Machine, operand: Operand, mask: Mask) -> list[tuple[int, int]]:
    address = m.address(operand, "u32")
    return [(int(m.block[n]), int(address[n])) for n in np.flatnonzero(mask)]


@handles("mbarrier")
def mbarrier(m: Machine, i: Instruction, mask: Mask) -> None:
    what = i.modifiers[0]
    if what == "try_wait":
        wait(m, i, mask)
        return
    place = next(operand for operand in i.operands if operand.address)
    for key in barriers_of(m, place, mask):
        if what == "init":
            count = int(i.operands[1].text)
            m.barriers[key] = Barrier(count, count)
        elif what == "inval":
            if m.barriers.pop(key).bytes:
                raise Fault("a barrier ends before its bytes have come")
        else:
            barrier = m.barriers[key]
            if "expect_tx" in i.modifiers:
                barrier.bytes += int(i.operands[-1].text, 0)
            barrier.missing -= 1
            if barrier.missing < 0:
                raise Fault("more have arrived at a barrier than it counts")
            barrier.turn()


def wait(m: Machine, i: Instruction, mask: Mask) -> None:
    done = np.zeros(m.lanes, np.bool_)
    parity = m.each(m.read(i.operands[2], "u32"))
    for n, key in zip(np.flatnonzero(mask), barriers_of(m, i.operands[1], mask), strict=True):
        barrier = m.barriers[key]
        if barrier.phase == parity[n]:
            while barrier.copies:
                barrier.copies.pop(0)()
        done[n] = barrier.phase != parity[n]
    m.waits = not done[mask].all()
    m.waited = m.waited + 1 if m.waits else 0
    if m.waited > PATIENCE:
        raise Fault("waits for what never comes")
    m.write(i.operands[0], done, mask)


def swizzled(address: Array, mode: int) -> Array:
    """Where shared memory keeps a byte: 16-byte pieces of rows of 16 << mode bytes change places, row by row."""
    return address ^ (((address >> 7) & ((1 << mode) - 1)) << 4)


@dataclass
class TensorMap:
    """What the copy engine knows of a tensor: where it lies, the box of a copy, the rows of that in shared memory."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    itemsize: int
    swizzle: int
    filled_with_nan: bool

    def check(self) -> None:
        rows = [stride * self.itemsize for stride in self.strides[:-1]]
        if self.base % 16 or any(stride % 16 for stride in rows) or self.strides[-1] != 1:
            raise Fault(f"the copy engine takes multiples of 16 bytes, not {self.base:#x}, {rows}")
        if any(not 1 <= n <= 256 for n in self.box) or any(not 1 <= n < 1 << 32 for n in self.shape):
            raise Fault(f"the copy engine takes no box {self.box} of {self.shape}")
        if self.swizzle and self.box[-1] * self.itemsize > 16 << self.swizzle:
            raise Fault(f"rows of {self.box[-1] * self.itemsize} bytes, swizzle {self.swizzle}")


def tensor_copy(m: Machine, i: Instruction, mask: Mask) -> None:
    """A box from global to shared memory, zero outside of the tensor."""
    target, source, signal = i.operands[:3]
    assert source.address is not None
    to = m.address(target, "u32")
    tensor = m.each(m.read(source.address, "u64"))
    at = [m.each(m.read(part, "s32")) for part in reversed(source.parts)]
    for n, key in zip(np.flatnonzero(mask), barriers_of(m, signal, mask), strict=True):
        tensor_map = m.arguments[(int(tensor[n]) - PARAMETERS) // 256]
        barrier = m.barriers[key]
        finish = partial(box, m, tensor_map, int(m.block[n]), int(to[n]), [int(a[n]) for a in at], barrier)
        barrier.copies.append(finish) if m.late else finish()


def box(m: Machine, tensor: TensorMap, block: int, first: int, begin: list[int], barrier: Barrier) -> None:
    tensor.check()
    if first % 128:
        raise Fault("a box begins at no multiple of 128 bytes")
    index = np.meshgrid(*(np.arange(n) for n in tensor.box), indexing="ij")
    place = [i.reshape(-1) + b for i, b in zip(index, begin, strict=True)]
    inside = np.logical_and.reduce([(p >= 0) & (p < n) for p, n in zip(place, tensor.shape, strict=True)])
    offset = sum(p * s for p, s in zip(place, tensor.strides, strict=True))
    if tensor.filled_with_nan:
        raise Fault("a tensor map that fills with NaN")
    values = np.zeros((len(inside), 1), f"u{tensor.itemsize}")
    values[inside] = m.memory.load(tensor.base + offset[inside] * tensor.itemsize, tensor.itemsize)
    to = swizzled(first + np.arange(len(inside)) * tensor.itemsize, tensor.swizzle)
    m.of_shared.store(m.in_shared(np.full(len(to), block), to, tensor.itemsize), values)
    barrier.bytes -= values.nbytes
    barrier.turn()
