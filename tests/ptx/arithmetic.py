"""What a thread does by itself: arithmetic, choices, conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .machine import KINDS, Array, Fault, Machine, Mask, handles
from .program import Instruction

UNARY: dict[str, Callable[[Array], Array]] = {
    "not": np.invert, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2,
    "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "rcp": np.reciprocal, "rsqrt": lambda a: 1 / np.sqrt(a),
    "cvta": lambda a: a,
}  # fmt: skip
BINARY: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
ORDER = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}  # other names for unsigned numbers
FLOATS = {"f16", "f32", "f64"}


def widened(value: Array, kind: str) -> Array:
    """Numbers of 16 bits, in float32, in which sums and products of two are exact enough to be rounded once."""
    if kind in ("bf16", "bf16x2"):
        halves = value.view("u2").astype("u4") << 16
        return halves.view("f4")
    return value.view("f2").astype("f4")


def rounded(value: Array, kind: str) -> Array:
    """float32 to numbers of 16 bits, to the nearest, ties to even."""
    if kind.startswith("f16"):
        return value.astype("f2").view("u2")
    bits = np.ascontiguousarray(value, "f4").view("u4")
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, up).astype("u2")


def arguments(m: Machine, i: Instruction, kind: str) -> list[Array]:
    return [m.read(operand, kind) for operand in i.operands[1:]]


def computed(m: Machine, i: Instruction, mask: Mask, function: Callable[..., Array]) -> None:
    """The function of the operands in the instruction's type; narrow floats are computed in float32 and rounded."""
    if "sat" in i.modifiers:
        raise Fault("results that are clamped")
    kind = i.type
    values = arguments(m, i, kind)
    if kind in ("bf16", "bf16x2", "f16", "f16x2"):
        lanes = [m.each(v).copy() for v in values]
        out = rounded(function(*(widened(v, kind) for v in lanes)), kind).view(KINDS[kind])
    else:
        out = function(*values)
    m.write(i.operands[0], out.astype(KINDS[kind], copy=False), mask)


@handles(*UNARY)
def unary(m: Machine, i: Instruction, mask: Mask) -> None:
    computed(m, i, mask, UNARY[i.name])


@handles(*BINARY)
def binary(m: Machine, i: Instruction, mask: Mask) -> None:
    computed(m, i, mask, BINARY[i.name])


@handles("min", "max")
def extreme(m: Machine, i: Instruction, mask: Mask) -> None:
    """Of floats the one that is a number, unless .NaN is asked for."""
    least = i.name == "min"
    if i.type in ("f16", "f32", "f64", "bf16", "bf16x2", "f16x2") and "NaN" not in i.modifiers:
        computed(m, i, mask, np.fmin if least else np.fmax)
    else:
        computed(m, i, mask, np.minimum if least else np.maximum)


def product(a: Array, b: Array, i: Instruction) -> Array:
    if "wide" in i.modifiers:
        wide = f"{a.dtype.kind}{2 * a.itemsize}"
        return a.astype(wide) * b.astype(wide)
    if "hi" not in i.modifiers:
        return a * b
    exact = a.astype(object) * b.astype(object) >> 8 * a.itemsize
    return np.array(exact, a.dtype)


@handles("mul")
def multiply(m: Machine, i: Instruction, mask: Mask) -> None:
    if i.type in FLOATS or ("16" in i.type and "f" in i.type):
        computed(m, i, mask, np.multiply)
    else:
        m.write(i.operands[0], product(*arguments(m, i, i.type), i), mask)


@handles("mad")
def multiply_add(m: Machine, i: Instruction, mask: Mask) -> None:
    a, b = (m.read(operand, i.type) for operand in i.operands[1:3])
    ab = product(a, b, i)
    m.write(i.operands[0], ab + m.read(i.operands[3], f"{i.type[0]}{8 * ab.itemsize}"), mask)


@handles("fma")
def fused(m: Machine, i: Instruction, mask: Mask) -> None:
    """float32's in float64, where the product is exact."""
    if i.type == "f32":
        a, b, c = (v.astype("f8") for v in arguments(m, i, "f32"))
        m.write(i.operands[0], (a * b + c).astype("f4"), mask)
    else:
        computed(m, i, mask, lambda a, b, c: a * b + c)


@handles("div", "rem")
def divide(m: Machine, i: Instruction, mask: Mask) -> None:
    """Of integers towards zero."""
    a, b = arguments(m, i, i.type)
    if i.type in FLOATS:
        m.write(i.operands[0], a / b, mask)
        return
    a, b = np.broadcast_arrays(a, b)
    if a.dtype.kind == "u":
        quotient = np.floor_divide(a, np.where(b == 0, 1, b).astype(b.dtype))
    else:
        down = np.floor_divide(a, np.where(b == 0, 1, b).astype(b.dtype))
        quotient = down + ((down < 0) & (down * b != a)).astype(a.dtype)
    quotient = np.where(b == 0, np.array(-1).astype(a.dtype), quotient)
    m.write(i.operands[0], quotient if i.name == "div" else a - quotient * b, mask)


@handles("shl", "shr")
def shift(m: Machine, i: Instruction, mask: Mask) -> None:
    """By all bits or more: zero, or the sign."""
    a, by = m.read(i.operands[1], i.type), m.read(i.operands[2], "u32")
    bits = 8 * a.itemsize
    within = np.minimum(by, bits - 1).astype(a.dtype)
    out = a << within if i.name == "shl" else a >> within
    if a.dtype.kind == "u":
        out = np.where(by < bits, out, np.zeros(1, a.dtype))
    m.write(i.operands[0], out, mask)


@handles("shf")
def funnel(m: Machine, i: Instruction, mask: Mask) -> None:
    """The upper half of (b, a) shifted to the left, or the lower half of it shifted to the right."""
    a, b, by = (m.read(operand, "u32").astype("u8") for operand in i.operands[1:])
    by = by & 31 if "wrap" in i.modifiers else np.minimum(by, 32)
    both = (b << 32) | a
    out = (both << by) >> 32 if i.modifiers[0] == "l" else both >> by
    m.write(i.operands[0], out.astype("u4"), mask)


@handles("bfe")
def field(m: Machine, i: Instruction, mask: Mask) -> None:
    a = m.read(i.operands[1], i.type)
    at, length = (m.read(operand, "u32") & 0xFF for operand in i.operands[2:])
    bits = 8 * a.itemsize
    wide = a.astype(object)
    low = np.where(length == 0, 0, (wide >> np.minimum(at, bits)) & ((1 << length.astype(object)) - 1))
    if a.dtype.kind == "i":
        top = np.where(length == 0, 0, (wide >> np.minimum(at + length - 1, bits - 1)) & 1)
        low = low - top * (1 << length.astype(object))
    m.write(i.operands[0], np.array(low, a.dtype), mask)


@handles("popc")
def ones(m: Machine, i: Instruction, mask: Mask) -> None:
    a = m.read(i.operands[1], i.type)
    bits = np.unpackbits(m.each(a).copy().view("u1").reshape(m.lanes, -1), axis=1)
    m.write(i.operands[0], bits.sum(1, dtype="u4"), mask)


@handles("prmt")
def permute(m: Machine, i: Instruction, mask: Mask) -> None:
    """Bytes of a and b in the order of the third operand's digits; of one from 8 on only its sign."""
    a, b, order = (m.each(m.read(operand, "u32")) for operand in i.operands[1:])
    source = np.stack([a, b], 1).copy().view("u1").reshape(m.lanes, 8)
    digits = np.stack([(order >> 4 * n) & 15 for n in range(4)], 1)
    chosen = np.take_along_axis(source, (digits & 7).astype(np.intp), 1)
    chosen = np.where(digits & 8, np.where(chosen & 128, 255, 0), chosen).astype("u1")
    m.write(i.operands[0], chosen.view("u4")[:, 0], mask)


@handles("selp")
def select(m: Machine, i: Instruction, mask: Mask) -> None:
    kind = "u" + i.type[1:]
    a, b = (m.read(operand, kind) for operand in i.operands[1:3])
    if any(operand.text.startswith("0f") for operand in i.operands[1:3]):
        a, b = (m.read(operand, "f32").view("u4") for operand in i.operands[1:3])
    m.write(i.operands[0], np.where(m.read(i.operands[3], "pred"), a, b), mask)


@handles("setp")
def compare(m: Machine, i: Instruction, mask: Mask) -> None:
    a, b = (m.read(operand, i.type) for operand in i.operands[1:3])
    if "bf16" in i.type:
        a, b = widened(a, i.type), widened(b, i.type)
    name = i.modifiers[0]
    if name in ("num", "nan"):
        out = np.isnan(a) | np.isnan(b)
        out = ~out if name == "num" else out
    else:
        unordered = name.endswith("u") and name[:-1] in COMPARE  # true where one is NaN
        out = COMPARE[name[:-1] if unordered else ORDER.get(name, name)](a, b)
        if a.dtype.kind == "f" and (unordered or name == "ne"):
            strange = np.isnan(a) | np.isnan(b)
            out = out | strange if unordered else out & ~strange
    if len(i.operands) > 3:
        other = m.read(i.operands[3], "pred")
        out = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[i.modifiers[1]](out, other)
    m.write(i.operands[0], out, mask)


@handles("mov")
def move(m: Machine, i: Instruction, mask: Mask) -> None:
    """Also from a register to several that it is made of, and back."""
    to, value = i.operands
    size = np.dtype(KINDS[i.type]).itemsize
    if to.parts:
        pieces = m.each(m.read(value, f"u{8 * size}")).copy()
        pieces = pieces.view(f"u{size // len(to.parts)}").reshape(m.lanes, -1)
        for n, part in enumerate(to.parts):
            m.write(part, pieces[:, n].copy(), mask)
    elif value.parts:
        kind = f"u{8 * size // len(value.parts)}"
        parts = np.stack([m.each(m.read(part, kind)) for part in value.parts], 1)
        m.write(to, parts.view(f"u{size}")[:, 0].copy(), mask)
    elif value.text.startswith(("0f", "0d")):
        m.write(to, m.read(value, f"f{8 * size}"), mask)
    else:
        m.write(to, m.read(value, i.type), mask)


@handles("cvt")
def convert(m: Machine, i: Instruction, mask: Mask) -> None:
    kinds = [part for part in i.modifiers if part in KINDS]
    to, of = kinds
    if to in ("bf16x2", "f16x2"):
        high, low = (m.each(m.read(operand, of)) for operand in i.operands[1:])
        out: Any = rounded(np.stack([low, high], 1), to).view("u4")[:, 0].copy()
    else:
        value = m.read(i.operands[1], of)
        if of in ("bf16", "f16"):
            value = widened(value, of)
        if to in ("bf16", "f16"):
            out = rounded(value.astype("f4"), to)
        elif to == "tf32":
            bits = m.each(value).copy().view("u4")
            out = np.where(np.isnan(value), bits, (bits + 0x1000) & 0xFFFFE000).astype("u4")
        elif value.dtype.kind == "f" and np.dtype(KINDS[to]).kind != "f":
            how = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
            whole = next(how[part] for part in i.modifiers if part in how)(value.astype("f8"))
            limits = np.iinfo(KINDS[to])
            out = np.clip(np.nan_to_num(whole), limits.min, limits.max).astype(KINDS[to])
        else:
            out = value.astype(KINDS[to])
    m.write(i.operands[0], out, mask)
