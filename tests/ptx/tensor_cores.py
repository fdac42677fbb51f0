"""Products of matrices that a warp, or four, hold in their registers or in shared memory."""

from __future__ import annotations

import re

import numpy as np

from .arithmetic import widened
from .machine import Array, Machine, Mask, handles
from .memory import swizzled
from .program import Instruction, Operand

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4


def stacked(m: Machine, operand: Operand) -> Array:
    """Registers of 32 bits -> (warps, 32, registers)."""
    return np.stack([m.each(m.read(part, "u32")) for part in operand.parts], 1).reshape(-1, 32, len(operand.parts))


def numbers(registers: Array, kind: str) -> Array:
    """(..., registers) -> (..., numbers) in float32."""
    if kind == "tf32":
        return (registers & np.uint32(0xFFFFE000)).view("f4")
    return widened(np.ascontiguousarray(registers), kind)


def rows_of(registers: Array, kind: str) -> Array:
    """A (16 x K) of each warp, K the 32 bytes of a row: registers hold rows g, g + 8, then the same 16 bytes on."""
    values = numbers(registers, kind)
    each = values.shape[-1] // 4
    a = np.empty((len(values), 16, 8 * each), "f4")
    for register in range(4):
        for n in range(each):
            row, column = GROUP + 8 * (register % 2), (MEMBER + 4 * (register // 2)) * each + n
            a[:, row, column] = values[:, LANE, register * each + n]
    return a


def columns_of(registers: Array, kind: str) -> Array:
    """B (K x 8) of each warp."""
    values = numbers(registers, kind)
    each = values.shape[-1] // 2
    b = np.empty((len(values), 8 * each, 8), "f4")
    for register in range(2):
        for n in range(each):
            b[:, (MEMBER + 4 * register) * each + n, GROUP] = values[:, LANE, register * each + n]
    return b


def sums_of(registers: Array) -> Array:
    """Sums (16 x N) of each warp, two neighbors of row g and of row g + 8 for every 8 columns."""
    values = np.ascontiguousarray(registers).view("f4")
    c = np.empty((len(values), 16, values.shape[-1] * 2), "f4")
    for n in range(values.shape[-1]):
        c[:, GROUP + 8 * (n // 2 % 2), n // 4 * 8 + MEMBER * 2 + n % 2] = values[:, LANE, n]
    return c


def write_sums(m: Machine, operand: Operand, c: Array, mask: Mask) -> None:
    for n, part in enumerate(operand.parts):
        values = c[:, GROUP + 8 * (n // 2 % 2), n // 4 * 8 + MEMBER * 2 + n % 2]
        m.write(part, np.ascontiguousarray(values, "f4").reshape(-1), mask)


@handles("mma")
def product_of_warp(m: Machine, i: Instruction, mask: Mask) -> None:
    """mma.m16n8k16 of 16 bits, or k8 of tf32."""
    m.whole(mask, 32)
    kind = i.modifiers[-2]
    assert ("m16n8k8" if kind == "tf32" else "m16n8k16") in i.modifiers
    a, b = rows_of(stacked(m, i.operands[1]), kind), columns_of(stacked(m, i.operands[2]), kind)
    write_sums(m, i.operands[0], a @ b + sums_of(stacked(m, i.operands[3])), mask)


def matrix_rows(m: Machine, i: Instruction, operand: Operand, mask: Mask) -> tuple[int, Array]:
    """(how many matrices, (warps, matrices, 8) addresses of their rows of 16 bytes)."""
    m.whole(mask, 32)
    count = next(int(part[1:]) for part in i.modifiers if re.fullmatch(r"x\d", part))
    addresses = m.shared_address(operand, mask).reshape(-1, 4, 8)[:, :count]
    return count, addresses


@handles("ldmatrix")
def load_matrices(m: Machine, i: Instruction, mask: Mask) -> None:
    count, addresses = matrix_rows(m, i, i.operands[1], mask)
    loaded = m.of_shared.load(addresses.reshape(-1), 2, 8).reshape(-1, count, 8, 8)
    if "trans" in i.modifiers:
        loaded = loaded.swapaxes(2, 3)
    for n, target in enumerate(i.operands[0].parts):
        pairs = np.ascontiguousarray(loaded[:, n]).reshape(-1, 32, 2).view("u4").reshape(-1)
        full = np.zeros(m.lanes, "u4")
        full[mask] = pairs
        m.write(target, full, mask)


@handles("stmatrix")
def store_matrices(m: Machine, i: Instruction, mask: Mask) -> None:
    count, addresses = matrix_rows(m, i, i.operands[0], mask)
    stored = np.empty((len(addresses), count, 8, 8), "u2")
    for n, source in enumerate(i.operands[1].parts):
        pairs = m.each(m.read(source, "u32"))[mask]
        stored[:, n] = np.ascontiguousarray(pairs).view("u2").reshape(-1, 8, 8)
    if "trans" in i.modifiers:
        stored = stored.swapaxes(2, 3)
    m.of_shared.store(addresses.reshape(-1), np.ascontiguousarray(stored).reshape(-1, 8))


def described(m: Machine, descriptors: Array, block: Array, rows: int, kind: str, along_rows: bool) -> Array:
    """(descriptors, rows, K) of what they say of their blocks' shared memory, K the 32 bytes of a row.

    along_rows: neighbors in memory are those of a column, not of a row. Rows, or columns, come in eights `stride` bytes
    apart, each of as many bytes as are swizzled; what is longer goes on `leading` bytes further.
    """
    size = 4 if kind == "tf32" else 2
    mode = (0, 3, 2, 1)[int(descriptors[0]) >> 62]
    first, leading, stride = (
        (((descriptors >> np.uint64(at)) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)[:, None, None]
        for at in (0, 16, 32)
    )
    row, k = np.arange(rows)[:, None], np.arange(32 // size)[None, :]
    inner, outer = (row, k) if along_rows else (k, row)  # neighbors lie along the first
    width = (16 << mode) // size  # numbers in a swizzled row
    if mode == 0:
        leading, stride = (stride, leading) if along_rows else (leading, stride)
    offset = (outer % 8) * (16 << mode) + (outer // 8) * stride + (inner // width) * leading + (inner % width) * size
    address = swizzled(first + offset, mode)
    block = np.broadcast_to(block[:, None, None], address.shape)
    places = m.in_shared(block.reshape(-1), address.reshape(-1), size)
    values = m.of_shared.load(places, size).reshape(address.shape)
    return numbers(values, kind) if size == 4 else widened(values, kind).reshape(address.shape)


@handles("wgmma")
def product_of_warps(m: Machine, i: Instruction, mask: Mask) -> None:
    """wgmma.m64nNk16 (k8 of tf32) of four warps: sums in registers, B, and perhaps A, in shared memory."""
    m.whole(mask, 128)
    what = i.modifiers[0]
    if what == "commit_group":
        m.group.product_groups.append(m.group.products)
        m.group.products = []
    elif what == "wait_group":
        while len(m.group.product_groups) > int(i.operands[0].text):
            for finish in m.group.product_groups.pop(0):
                finish()
    elif what == "mma_async":
        shape = next(part for part in i.modifiers if part.startswith("m64n"))
        columns, kind = int(shape[4 : shape.index("k")]), i.modifiers[-1]
        sums, a, b, keeps, *flags = i.operands
        turned = [part.text != "0" for part in flags[2:]]  # after the signs
        there = mask[::128]
        block = m.block[::128][there]
        k = 8 if kind == "tf32" else 16
        if a.parts:
            rows = rows_of(stacked(m, a), kind).reshape(-1, 64, k)[there]
        else:
            rows = m.each(m.read(a, "u64"))[::128][there]
        others = m.each(m.read(b, "u64"))[::128][there]
        kept = m.each(m.read(keeps, "pred"))[::32, None, None]

        def finish() -> None:
            left = rows if a.parts else described(m, rows, block, 64, kind, turned[0] if turned else False)
            right = described(m, others, block, columns, kind, turned[-1] if turned else False)
            sum_of = np.where(kept, sums_of(stacked(m, sums)), 0).reshape(-1, 64, columns)
            sum_of[there] += left @ right.swapaxes(1, 2)
            write_sums(m, sums, sum_of.reshape(-1, 16, columns), mask)

        finish() if not m.late else m.group.products.append(finish)
