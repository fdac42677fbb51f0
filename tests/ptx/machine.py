"""Carries out a kernel's PTX on the CPU: all threads of some blocks in lockstep, a register an array of theirs.

Threads that part are carried on where they are least far in the program, and so meet again where their ways do. What
a GPU would punish raises a Fault: addresses outside of tensors or of shared memory, or not aligned; barriers, exchanges
between threads that have parted; waiting for what never comes.

A GPU may do things sooner or later. Here copies and products that end later than they start are carried out at once;
or, `late`, when they are waited for, and then threads do not go in lockstep: a group of a block's warps goes on to the
next barrier before the group in front of it sets out. Where a wait or a barrier is missing, one of both shows it.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .program import SIZES, Instruction, Operand, Program

Array = NDArray[Any]
Mask = NDArray[np.bool_]
KINDS = {
    "pred": np.bool_, "f16": np.float16, "f32": np.float32, "f64": np.float64,
    **{f"{k}{8 * n}": np.dtype(f"{'i' if k == 's' else 'u'}{n}") for k in "bsu" for n in (1, 2, 4, 8)},
}  # fmt: skip
KINDS |= {"bf16": KINDS["u16"], "bf16x2": KINDS["u32"], "f16x2": KINDS["u32"], "tf32": KINDS["f32"]}
PARAMETERS = 7 << 28  # addresses of parameters, 256 bytes apart, which some take for numbers of 32 bits
UNWRITTEN = np.full(1, (1 << 64) - 1, np.uint64)  # what a register holds before: NaN, whatever it is taken for
PATIENCE = 1000  # turns of a loop that waits
Handler = Callable[["Machine", Instruction, Mask], None]
HANDLERS: dict[str, Handler] = {}


def load_handlers() -> None:
    """The modules that say what instructions do, by `handles`."""
    for name in ("arithmetic", "memory", "tensor_cores"):
        importlib.import_module(f"{__package__}.{name}")


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Fault(Exception):
    """What a GPU would stop at, or compute nonsense after."""


class Memory:
    """The bytes of some tensors, at the addresses that they have."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for begin, end in sorted(ranges):
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            elif end > begin:
                merged.append([begin, end])
        self.pieces = [
            (begin, end, np.ctypeslib.as_array((ctypes.c_uint8 * (end - begin)).from_address(begin)))
            for begin, end in merged
        ]

    def _piece(self, addresses: Array, size: int) -> tuple[int, Array]:
        first, last = int(addresses.min()), int(addresses.max()) + size
        for begin, end, piece in self.pieces:
            if begin <= first and last <= end:
                return begin, piece
        raise Fault(f"bytes {first:#x} to {last:#x} are in no tensor")

    def words(self, addresses: Array, size: int, count: int) -> list[tuple[Array, Array, Array]]:
        """(which of the addresses, words of `size` bytes, index among them) of the first of `count` at each address."""
        if (addresses % (size * count)).any():
            raise Fault(f"an address is not a multiple of {size * count}")
        places = [np.arange(len(addresses))]
        if len(self.pieces) > 1:  # of one instruction they are seldom in several
            of = np.searchsorted([begin for begin, _, _ in self.pieces], addresses, side="right")
            places = [np.flatnonzero(of == piece) for piece in np.unique(of)]
        found = []
        for which in places:
            begin, piece = self._piece(addresses[which], size * count)
            skipped = -begin % size
            words = piece[skipped : skipped + (len(piece) - skipped) // size * size].view(f"u{size}")
            found.append((which, words, (addresses[which] - begin - skipped) // size))
        return found

    def load(self, addresses: Array, size: int, count: int = 1) -> Array:
        """(addresses, count) words."""
        out = np.empty((len(addresses), count), f"u{size}")
        if len(addresses):
            for which, words, index in self.words(addresses, size, count):
                out[which] = words[index][:, None] if count == 1 else words[index[:, None] + np.arange(count)]
        return out

    def store(self, addresses: Array, values: Array) -> None:
        if len(addresses):
            size, count = values.itemsize, values.shape[1]
            for which, words, index in self.words(addresses, size, count):
                words[index[:, None] + np.arange(count)] = values[which]


@dataclass
class Group:
    """Threads that go in lockstep, of every block, and what they have started: in no group of copies or products yet,
    and in those.
    """

    lanes: Mask
    started: list[Callable[[], None]] = field(default_factory=list)
    copies: list[list[Callable[[], None]]] = field(default_factory=list)
    products: list[Callable[[], None]] = field(default_factory=list)
    product_groups: list[list[Callable[[], None]]] = field(default_factory=list)


class Machine:
    """Some blocks of a grid.

    arguments: what each parameter is, a number, or an object that stands for a tensor map. shared: bytes a block.
    """

    def __init__(
        self, program: Program, arguments: list[Any], blocks: range, grid: int, shared: int, memory: Memory, late: bool
    ) -> None:
        load_handlers()
        self.program, self.arguments, self.memory, self.late = program, arguments, memory, late
        threads, self.grid, self.shared_bytes = program.threads, grid, -(-shared // 16) * 16
        self.lanes = len(blocks) * threads
        self.block = np.repeat(np.arange(len(blocks)), threads)
        self.thread = np.tile(np.arange(threads), len(blocks))
        self.special = {
            "%tid.x": self.thread, "%ctaid.x": self.block + blocks.start, "%nctaid.x": grid, "%ntid.x": threads,
            "%laneid": self.thread % 32, "%warpid": self.thread // 32,
            **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), 0),
            **dict.fromkeys(("%nctaid.y", "%nctaid.z", "%ntid.y", "%ntid.z"), 1),
        }  # fmt: skip
        # shared memory is NaN until it is written, whatever is read from it
        self.shared = np.full(len(blocks) * self.shared_bytes, 0xFF, np.uint8)
        self.of_shared = Memory([(self.shared.ctypes.data, self.shared.ctypes.data + self.shared.nbytes)])
        self.registers: dict[str, Array] = {}  # a number for each thread, or one for all
        self.unwritten: dict[str, Array] = {}
        self.constants: dict[tuple[str, str], Array] = {}
        self.place = np.zeros(self.lanes, np.int64)  # in the program, where threads have parted
        self.held = np.zeros(self.lanes, np.bool_)  # at a barrier
        four = threads > 128 or any(i.name == "wgmma" for i in program.instructions)  # warps, that multiply together
        size = threads if not late else 128 if four else 32
        first = range(threads - size, -1, -size)  # the last threads go first
        self.groups = [Group((self.thread >= n) & (self.thread < n + size)) for n in first]
        self.group = self.groups[0]
        self.barriers: dict[tuple[int, int], Any] = {}
        self.waits, self.waited = False, 0  # whether the group must wait for another; how often it has

    def run(self) -> None:
        end, threads = len(self.program.instructions), self.program.threads
        with np.errstate(all="ignore"):
            while (self.place < end).any():
                for group in self.groups:
                    self.group = group
                    self._carry_on(group.lanes & ~self.held & (self.place < end))
                places, held = self.place.reshape(-1, threads), self.held.reshape(-1, threads)
                stopped = (held | (places == end)).all(1) & held.any(1)
                if (places[stopped] != places[stopped, :1]).any():
                    raise Fault("threads have parted at a barrier")
                released = np.repeat(stopped, threads)
                self.place[released] += 1
                self.held[released] = False

    def _carry_on(self, going: Mask) -> None:
        """The threads that are going, to the next barrier, or to where they wait for others."""
        code, self.waits = self.program.instructions, False
        while going.any() and not self.waits:
            here = int(self.place[going].min())
            if here == len(code):
                return
            present = going & (self.place == here)
            together = bool((present == going).all())
            while True:
                instruction = code[here]
                mask = present
                if instruction.guard:
                    asked = self.registers.get(instruction.guard, np.ones(1, np.bool_))
                    mask = present & (~asked if instruction.negated else asked)
                if instruction.name == "bar" and "warp" not in instruction.modifiers:
                    self.place[present] = here
                    self.held |= present
                    going = going & ~present
                    break
                if instruction.name in ("bra", "ret"):
                    target = instruction.target if instruction.name == "bra" else len(code)
                    if mask.any() and (mask != present).any():
                        self.place[present] = here + 1
                        self.place[mask] = target
                        break
                    here = target if mask.any() else here + 1
                else:
                    try:
                        HANDLERS[instruction.name](self, instruction, mask)
                    except Exception as error:
                        raise Fault(f"{instruction.text}: {error}") from error
                    here += 1
                if here == len(code) or not together or self.waits:
                    self.place[present] = here
                    break

    def whole(self, mask: Mask, of: int) -> None:
        """Groups of `of` threads take part as a whole or not at all."""
        groups = mask.reshape(-1, of)
        if (groups.any(1) != groups.all(1)).any():
            raise Fault(f"threads of a group of {of} have parted")

    def read(self, operand: Operand, kind: str) -> Array:
        """The operand in each thread, or one number for all."""
        dtype = np.dtype(KINDS[kind])
        if operand.register:
            value = self.registers.get(operand.register, UNWRITTEN)
            if value.itemsize != dtype.itemsize:
                value = value.astype(f"u{dtype.itemsize}")
            return value.view(dtype)
        if operand.text in self.special:
            return np.atleast_1d(self.special[operand.text]).astype(dtype)
        key = operand.text, kind
        if key not in self.constants:
            self.constants[key] = self._constant(operand.text, dtype)
        return self.constants[key]

    def _constant(self, text: str, dtype: np.dtype[Any]) -> Array:
        if text == "global_smem":
            return np.zeros(1, dtype)
        if "_param_" in text:
            return np.full(1, PARAMETERS + 256 * int(text.rpartition("_")[2]), dtype)
        if text[:2] in ("0f", "0d"):
            bits = np.array([int(text[2:], 16)], "u4" if text[1] == "f" else "u8")
            return bits.view("f4" if text[1] == "f" else "f8").astype(dtype)
        if dtype == np.bool_:
            return np.array([int(text, 0) != 0])
        number = int(text.rstrip("U"), 0) & ((1 << 8 * dtype.itemsize) - 1)
        return np.array([number], f"u{dtype.itemsize}").view(dtype)

    def write(self, operand: Operand, value: Array, mask: Mask) -> None:
        """To the register in the threads of the mask; of fewer bits than it has: extended as its type says."""
        if operand.text == "_":
            return
        if not operand.register:
            raise Fault(f"{operand.text} is no register")
        unwritten = self.unwritten.get(operand.register)
        if unwritten is None:
            kind = self.program.type_of(operand.register)
            unwritten = np.ones(1, np.bool_) if kind == "pred" else UNWRITTEN.astype(f"u{SIZES[kind]}")
            self.unwritten[operand.register] = unwritten
        if value.itemsize != unwritten.itemsize:
            value = value.astype(unwritten.dtype)
        value = value.view(unwritten.dtype)
        if np.count_nonzero(mask) < self.lanes:
            value = np.where(mask, value, self.registers.get(operand.register, unwritten))
        self.registers[operand.register] = value

    def address(self, operand: Operand, kind: str) -> Array:
        assert operand.address is not None
        address = self.read(operand.address, kind)
        if operand.offset:  # numpy adds unsigned numbers as a GPU does
            address = address + address.dtype.type(operand.offset % (1 << 8 * address.itemsize))
        return self.each(address)

    def each(self, value: Array) -> Array:
        """A number for all threads as one for each of them."""
        return value if len(value) == self.lanes else np.broadcast_to(value, self.lanes)

    def shared_address(self, operand: Operand, mask: Mask) -> Array:
        """Addresses in the CPU's memory, of the threads of the mask."""
        return self.in_shared(self.block[mask], self.address(operand, "u32")[mask])

    def in_shared(self, block: Array, address: Array, size: int = 1) -> Array:
        if len(address) and int(address.max()) + size > self.shared_bytes:
            raise Fault(f"byte {int(address.max())} of {self.shared_bytes} of shared memory")
        return self.shared.ctypes.data + block * self.shared_bytes + address.astype(np.int64)
