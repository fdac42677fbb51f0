"""`image_lstm`: lines of pixels one after the other, rows or diagonals; the pixels of a line at once.

A program has an image, so what it has stored of one line it finds when it comes to the next. Gradients of the weights
are products over all pixels, which PyTorch computes afterwards.

Least work: 8 K H^2 operations for each pixel forward, 16 backward; the chain is one line after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from fastgen.ops.image_lstm import kept_values

from .functions import sigmoid, tanh
from .launch import Plan, on_device, planned, power_within, precision_of


@triton.jit
def _pixel(line, place, lines, places, width, DIAGONAL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pixels at places of a line, and whether there are such: columns of a row, or rows of a diagonal."""
    if DIAGONAL:
        column = line - place
        return place * width + column, (place >= 0) & (place < places) & (column >= 0) & (column < width)
    return line * width + place, (place >= 0) & (place < places) & (line >= 0) & (line < lines)


@triton.jit
def _lstm(  # type: ignore[no-untyped-def]
    gates, weight, out, kept, cell, hidden, lines, places, width, size, taps, reach, kept_size,
    DIAGONAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, PLACES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """weight [tap][gate][state seen][state]; kept [image][o, f, i, g, c, h][state][pixel]; cell
    [image][parity of the line][place][state].
    """
    image = tl.program_id(0).to(tl.int64)
    seen_by, gate = out + image * hidden * size, tl.cast(hidden, tl.int64) * size
    for line in range(lines):
        for first in range(0, places, PLACES):
            place = first + tl.arange(0, PLACES)
            pixel, there = _pixel(line, place, lines, places, width, DIAGONAL)
            _, before = _pixel(line - 1, place, lines, places, width, DIAGONAL)
            for least in range(0, hidden, UNITS):
                unit = least + tl.arange(0, UNITS)
                o = tl.zeros([PLACES, UNITS], tl.float32)
                f, i, g = o, o, o
                for tap in range(taps):
                    seen, known = _pixel(line - 1, place + tap - reach, lines, places, width, DIAGONAL)
                    for start in range(0, hidden, UNITS):
                        other = start + tl.arange(0, UNITS)
                        at = seen_by + other.to(tl.int64)[None, :] * size + seen[:, None]
                        h = tl.load(at, known[:, None] & (other < hidden)[None, :], other=0.0)
                        at = weight + (tl.cast(tap * 4, tl.int64) * hidden + other)[:, None] * hidden + unit[None, :]
                        held = (other < hidden)[:, None] & (unit < hidden)[None, :]
                        step = tl.cast(hidden, tl.int64) * hidden
                        o = tl.dot(h, tl.load(at, held, other=0.0), o, input_precision=PRECISION)
                        f = tl.dot(h, tl.load(at + step, held, other=0.0), f, input_precision=PRECISION)
                        i = tl.dot(h, tl.load(at + 2 * step, held, other=0.0), i, input_precision=PRECISION)
                        g = tl.dot(h, tl.load(at + 3 * step, held, other=0.0), g, input_precision=PRECISION)
                live = there[:, None] & (unit < hidden)[None, :]
                own = unit.to(tl.int64)[None, :] * size + pixel[:, None]
                at = gates + image * 4 * gate + own
                o = sigmoid(o + tl.load(at, live, other=0.0).to(tl.float32))
                f = sigmoid(f + tl.load(at + gate, live, other=0.0).to(tl.float32))
                i = sigmoid(i + tl.load(at + 2 * gate, live, other=0.0).to(tl.float32))
                g = tanh(g + tl.load(at + 3 * gate, live, other=0.0).to(tl.float32))
                at = cell + ((image * 2 + (line + 1) % 2) * places + place)[:, None] * hidden + unit[None, :]
                c = f * tl.load(at, live & before[:, None], other=0.0) + i * g
                h = (o * tanh(c)).to(out.dtype.element_ty)
                tl.store(cell + ((image * 2 + line % 2) * places + place)[:, None] * hidden + unit[None, :], c, live)
                tl.store(seen_by + own, h, live)
                if KEEP:
                    at = kept + image * kept_size + own
                    tl.store(at, o, live)
                    tl.store(at + gate, f, live)
                    tl.store(at + 2 * gate, i, live)
                    tl.store(at + 3 * gate, g, live)
                    tl.store(at + 4 * gate, c, live)
                    tl.store(at + 5 * gate, h.to(tl.float32), live)
        tl.debug_barrier()  # other threads read what these have stored


@triton.jit
def _lstm_backward(  # type: ignore[no-untyped-def]
    grad, weight, kept, of_gates, of_cell, hidden, lines, places, width, size, taps, reach, kept_size,
    DIAGONAL: tl.constexpr, PRECISION: tl.constexpr, PLACES: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """weight [tap][4 gates][state seen]; of_cell [image][parity of the line][place][state]: what cells pass back."""
    image = tl.program_id(0).to(tl.int64)
    gate = tl.cast(hidden, tl.int64) * size
    own_gates = of_gates + image * 4 * gate
    for back in range(lines):
        line = lines - 1 - back
        for first in range(0, places, PLACES):
            place = first + tl.arange(0, PLACES)
            pixel, there = _pixel(line, place, lines, places, width, DIAGONAL)
            earlier, before = _pixel(line - 1, place, lines, places, width, DIAGONAL)
            _, after = _pixel(line + 1, place, lines, places, width, DIAGONAL)
            for least in range(0, hidden, UNITS):
                unit = least + tl.arange(0, UNITS)
                live = there[:, None] & (unit < hidden)[None, :]
                row = unit.to(tl.int64)[None, :] * size
                dh = tl.load(grad + image * gate + row + pixel[:, None], live, other=0.0).to(tl.float32)
                for tap in range(taps):
                    seer, known = _pixel(line + 1, place - tap + reach, lines, places, width, DIAGONAL)
                    for start in range(0, 4 * hidden, UNITS):
                        sums = start + tl.arange(0, UNITS)
                        at = own_gates + sums.to(tl.int64)[None, :] * size + seer[:, None]
                        z = tl.load(at, known[:, None] & (sums < 4 * hidden)[None, :], other=0.0)
                        at = weight + (tl.cast(tap * 4, tl.int64) * hidden + sums)[:, None] * hidden + unit[None, :]
                        w = tl.load(at, (sums < 4 * hidden)[:, None] & (unit < hidden)[None, :], other=0.0)
                        dh = tl.dot(z, w, dh, input_precision=PRECISION)
                at = kept + image * kept_size + row + pixel[:, None]
                o, f = tl.load(at, live, other=0.0), tl.load(at + gate, live, other=0.0)
                i, g = tl.load(at + 2 * gate, live, other=0.0), tl.load(at + 3 * gate, live, other=0.0)
                of_c = tanh(tl.load(at + 4 * gate, live, other=0.0))
                at = kept + image * kept_size + 4 * gate + row + earlier[:, None]
                c_before = tl.load(at, live & before[:, None], other=0.0)
                at = of_cell + ((image * 2 + (line + 1) % 2) * places + place)[:, None] * hidden + unit[None, :]
                dc = tl.load(at, live & after[:, None], other=0.0) + dh * o * (1 - of_c * of_c)
                at = of_cell + ((image * 2 + line % 2) * places + place)[:, None] * hidden + unit[None, :]
                tl.store(at, dc * f, live)
                at = own_gates + row + pixel[:, None]
                kind = of_gates.dtype.element_ty
                tl.store(at, (dh * of_c * o * (1 - o)).to(kind), live)
                tl.store(at + gate, (dc * c_before * f * (1 - f)).to(kind), live)
                tl.store(at + 2 * gate, (dc * g * i * (1 - i)).to(kind), live)
                tl.store(at + 3 * gate, (dc * i * (1 - g * g)).to(kind), live)
        tl.debug_barrier()


def _plan(kernel: Any, x: Tensor, weight: Tensor, kept_size: int, diagonal: bool, **flags: bool) -> Plan:
    """x (B, H, height, width)."""
    batch, hidden, height, width = x.shape
    lines, places = (height + width - 1, height) if diagonal else (height, width)
    taps = weight.shape[2]
    reach = 1 if diagonal else taps // 2  # diagonals: the pixel above has the place before, that to the left the same
    options = {
        "DIAGONAL": diagonal, **flags, "PRECISION": precision_of(x), "PLACES": power_within(places, 16, 32),
        "UNITS": power_within(hidden, 16, 32 if x.dtype == torch.float32 else 64), "num_warps": 8, "num_stages": 1,
    }  # fmt: skip
    return Plan(kernel, batch, (hidden, lines, places, width, height * width, taps, reach, kept_size), options)


def image_lstm(gates: Tensor, weight: Tensor, diagonal: bool, keep: bool) -> tuple[Tensor, Tensor]:
    """Contiguous gates (B, 4 H, height, width), weight (4 H, H, K) -> h (B, H, height, width), and for the backward
    o, f, i, g, c and h of each image.
    """
    batch, channels, height, width = gates.shape
    hidden, places = channels // 4, height if diagonal else width
    out = gates.new_empty(batch, hidden, height, width)
    kept = gates.new_empty(batch, kept_values(weight, height, width, diagonal) * keep, dtype=torch.float32)
    cell = kept.new_empty(batch, 2, places, hidden)
    by_tap = weight.view(4, hidden, hidden, -1).permute(3, 0, 2, 1).contiguous()
    with on_device(gates):
        key = out.shape, out.dtype, weight.shape[2], diagonal, keep
        plan = planned(_lstm, key, lambda: _plan(_lstm, out, weight, kept.shape[1], diagonal, KEEP=keep))
        plan.run(gates, by_tap, out, kept, cell)
    return out, kept


def image_lstm_backward(grad: Tensor, weight: Tensor, kept: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """Contiguous grad (B, H, height, width) -> gradients of gates and weight."""
    batch, hidden, height, width = grad.shape
    of_gates = grad.new_empty(batch, 4 * hidden, height, width)
    of_cell = kept.new_empty(batch, 2, height if diagonal else width, hidden)
    with on_device(grad):
        key = grad.shape, grad.dtype, weight.shape[2], diagonal
        plan = planned(_lstm_backward, key, lambda: _plan(_lstm_backward, grad, weight, kept.shape[1], diagonal))
        plan.run(grad, weight.permute(2, 0, 1).contiguous(), kept, of_gates, of_cell)
    h = kept[:, : 6 * grad[0].numel()].view(batch, 6, hidden, height, width)[:, 5].to(grad.dtype)
    reach = weight.shape[2] // 2
    if diagonal:
        seen = [functional.pad(h, (0, 0, 1, 0))[:, :, :-1], functional.pad(h, (1, 0))[..., :-1]]
    else:
        above = functional.pad(h, (reach, reach, 1, 0))[:, :, :-1]
        seen = [above[..., k : k + width] for k in range(weight.shape[2])]
    of_weight = [torch.einsum("bohw,bvhw->ov", of_gates, other) for other in seen]
    return of_gates, torch.stack(of_weight, 2)
