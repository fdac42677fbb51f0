"""How a program lies in memory for the kernels (csrc/pixel_layout.h), and what the CUDA kernel cannot run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops.pixel_program import BLOCK, KINDS, PHASES, PixelProgram


def layout_of(
    program: PixelProgram, height: int, width: int, ahead: int, halved: bool = False
) -> tuple[list[int], list[int], int]:
    """How the kernel lays the planes of one image: their numbers, the offset of each cache, and floats in all.

    Planes that are read at their own pixel alone have room for `ahead` pixels. Planes that live only within a row phase
    share memory where their lives do not overlap. halved: keys and values are kept in 16 bits, with a unit of each.
    """
    lives: dict[int, list[int]] = {}
    by_pixel: set[int] = {program.input, program.context}
    for i, instruction in enumerate(program.instructions):
        for used in (instruction.dst, instruction.src, instruction.other):
            lives.setdefault(used, []).append(i)
            if instruction.phase != "row":
                by_pixel.add(used)
    free: list[tuple[int, int, int]] = []  # (size, offset, last use)
    numbers, end = [], 0
    for index, plane in enumerate(program.planes):
        padded, row = plane.padded, (plane.left + width + plane.right) * plane.padded
        if plane.phase == "pixel" and not plane.apart and index != program.input:
            numbers += [padded, plane.halves, 1, 0, 0, padded if ahead > 1 else 0, end]
            end += padded * ahead
            continue
        size, life = plane.rows * row, lives.get(index, [0])
        offset = end
        if index not in by_pixel and plane.rows == 1 and not (plane.left or plane.right):
            for slot, (room, where, last) in enumerate(free):
                if room == size and last < life[0]:
                    offset, free[slot] = where, (room, where, life[-1])
                    break
            else:
                free.append((size, offset, life[-1]))
        numbers += [padded, plane.halves, plane.rows, row, plane.left * padded, padded, offset]
        end = max(end, offset + size)
    caches = []
    room = -(-height * width // BLOCK) * BLOCK
    for cache in program.caches:  # each head's values are padded to whole blocks
        caches.append(end)
        numbers_kept = cache.keys + cache.heads * -(-cache.values // cache.heads // BLOCK) * BLOCK
        end += room * numbers_kept // 2 + 2 * room * cache.heads if halved else room * numbers_kept
    return numbers, caches, -(-end // 32) * 32


def bias_places(program: PixelProgram, device: torch.device) -> tuple[list[int], Tensor]:
    """How biases are stored, as their planes are: the offset of each, and where each number lies among all biases, one
    after another and a zero behind them."""
    halves = {
        i.bias: 2 if i.kind == "norm" else program.planes[i.dst].halves for i in program.instructions if i.bias >= 0
    }
    sizes = [bias.shape[-1] for bias in program.biases]
    offsets, parts, begin = [], [torch.zeros(0, dtype=torch.int64)], 0
    for index, size in enumerate(sizes):
        places = torch.arange(begin, begin + size).unflatten(0, (halves[index], -1))
        padded = F.pad(places, (0, -places.shape[1] % BLOCK), value=sum(sizes)).unflatten(1, (-1, BLOCK))
        offsets.append(sum(map(len, parts)))
        parts.append(padded.transpose(0, 1).flatten())  # a gate's halves in alternating blocks
        begin += size
    return offsets, torch.cat(parts).to(device)


def encoded(program: PixelProgram, offsets: list[int], caches: list[int]) -> list[int]:
    """The instructions as the kernel reads them."""
    encoded: list[int] = []
    for i in program.instructions:
        bias, matrix, dy, dx, extra = (offsets[i.bias] if i.bias >= 0 else -1), i.matrix, i.dy, i.dx, i.extra
        if i.kind in ("attention", "remember"):
            matrix = i.dx
            dy, dx, bias = program.caches[i.extra]
            extra = caches[i.extra]
        encoded += [
            KINDS.index(i.kind), PHASES.index(i.phase), i.dst, i.src, i.other, matrix, bias, dy, dx, extra,
        ]  # fmt: skip
    return encoded


def not_on_cuda(program: PixelProgram) -> str:
    """Why the CUDA kernel cannot run a program; "" where it can."""
    run = program.instructions
    if any((i.kind, i.phase) == ("norm", "row") for i in run):
        return "the kernel's layer norms are of single pixels"
    cells = {i.other for i in run if i.kind == "lstm"}
    if any(sum(c in (i.dst, i.src, i.other) for i in run) > 1 for c in cells):
        return "the kernel's LSTMs have cells of their own"
    for n, i in enumerate(run):
        if i.phase == "row" or i.kind not in ("conv", "previous"):
            continue
        if program.planes[i.src].phase == "row":
            return "along a row the kernel's convolutions are of planes that grow there"
        # a pixel's planes lie where those of the last one did, and take their part in later pixels' sums when they are
        # read: each is to be whole then
        beside = i.kind == "previous" or (i.dx if i.phase == "back" else i.dx + i.extra - 1) != 0
        makes = [m for m, j in enumerate(run) if j.phase == i.phase and j.dst == i.src]
        if beside and any(m < n for m in makes):
            return "the kernel reads a plane beside the pixel before it makes it there"
        if not beside and i.extra > 1 and any(m > n for m in makes):
            return "the kernel's windows end at a pixel that is whole"
    return ""
