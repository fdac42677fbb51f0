"""`nade`: inputs in chunks, which run at once; what the inputs before a chunk add to its state is summed beforehand.

Forward: the sums of each chunk, running sums over the chunks, then the outputs of each chunk from its first state.
Backward, in shorter chunks: the states again; what each chunk passes back to the inputs before it, and running sums of
that from the end; then each chunk from its last input to its first, which a program does for a part of the rows, one
after another, so that it adds to gradients that it alone writes. States within a chunk are computed anew for each of
its inputs: to subtract what was added would lose small numbers beside large ones. Of inputs times hidden units nothing
is kept but the states at chunks' ends.

Least work: 2 H (O + 1) operations and a sigmoid for each input forward, three times as much backward.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functions import sigmoid
from .launch import Plan, cdiv, on_device, planned, power_within, precision_of, splits_for

FORWARD, BACKWARD = 32, 8  # inputs of a chunk
MOST_COPIES = 64 << 20  # bytes of gradients of the weights that programs may share, beyond the gradients themselves


@triton.jit
def _added(x, in_weight, row, d, unit, live, steps, hidden, columns, BINARY: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the inputs d of some rows add to the states; a value that has no row of weights adds nothing."""
    value = tl.load(x + row * steps + d, live, other=0)
    if BINARY:
        w = tl.load(in_weight + d * hidden + unit, unit < hidden, other=0.0)
        return value.to(tl.float32)[:, None] * w[None, :]
    at = in_weight + (d * columns + value)[:, None] * hidden + unit[None, :]
    there = live & (value >= 0) & (value < columns)
    return tl.load(at, there[:, None] & (unit < hidden)[None, :], other=0.0)


@triton.jit
def _of_state(  # type: ignore[no-untyped-def]
    grad, out_weight, h, row, d, unit, live, steps, hidden, outputs,
    SINGLE: tl.constexpr, OUTPUTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the states before the inputs d."""
    if SINGLE:
        g = tl.load(grad + row * steps + d, live, other=0.0)
        u = tl.load(out_weight + d * hidden + unit, unit < hidden, other=0.0)
        of_h = g[:, None] * u[None, :]
    else:
        of_h = tl.zeros_like(h)
        for first in range(0, outputs, OUTPUTS):
            o = first + tl.arange(0, OUTPUTS)
            g = tl.load(
                grad + (row * steps + d)[:, None] * outputs + o[None, :],
                live[:, None] & (o < outputs)[None, :], other=0.0,
            )  # fmt: skip
            u = tl.load(
                out_weight + (d * outputs + o)[:, None] * hidden + unit[None, :],
                (o < outputs)[:, None] & (unit < hidden)[None, :], other=0.0,
            )  # fmt: skip
            of_h = tl.dot(g, u, of_h, input_precision=PRECISION)
    return of_h * h * (1 - h)


@triton.jit
def _chunk(parts, chunks, batch, steps, LENGTH: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's chunk, its first input and its end, its rows, whether there are such, and its hidden units."""
    program = tl.program_id(0)
    chunk = program // parts % chunks
    row = (program // parts // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = (chunk * LENGTH).to(tl.int64)
    end = tl.minimum(begin + LENGTH, steps)
    return chunk, begin, end, row, row < batch, program % parts * UNITS + tl.arange(0, UNITS)


@triton.jit
def _sum_added(  # type: ignore[no-untyped-def]
    x, in_weight, sums, batch, steps, hidden, columns, outputs, chunks, parts, share,
    BINARY: tl.constexpr, SINGLE: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sums [row][chunk + 1][unit]."""
    chunk, begin, end, row, live, unit = _chunk(parts, chunks, batch, steps, LENGTH, ROWS, UNITS)
    total = tl.zeros([ROWS, UNITS], tl.float32)
    for d in range(begin, end):
        total += _added(x, in_weight, row, d, unit, live, steps, hidden, columns, BINARY)
    at = sums + (row * (chunks + 1) + chunk + 1)[:, None] * hidden + unit[None, :]
    tl.store(at, total, live[:, None] & (unit < hidden)[None, :])


@triton.jit
def _scan(  # type: ignore[no-untyped-def]
    sums, first, hidden, entries, parts, BACK: tl.constexpr, ENTRIES: tl.constexpr, UNITS: tl.constexpr
):  # fmt: skip
    """An entry becomes the sum of itself and all before it, of which the first is `first`; with BACK of itself and all
    behind it, of which the last is zero."""
    row, unit = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts * UNITS + tl.arange(0, UNITS)
    carried = tl.zeros([UNITS], tl.float32)
    begin = tl.zeros([UNITS], tl.float32) if BACK else tl.load(first + unit, unit < hidden, other=0.0)
    for block in range(tl.cdiv(entries, ENTRIES)):
        start = tl.cdiv(entries, ENTRIES) - 1 - block if BACK else block
        entry = start * ENTRIES + tl.arange(0, ENTRIES)
        live = (entry < entries)[:, None] & (unit < hidden)[None, :]
        at = sums + (row * entries + entry)[:, None] * hidden + unit[None, :]
        own = tl.load(at, live, other=0.0)
        own = tl.where((entry == (entries - 1 if BACK else 0))[:, None], begin[None, :], own)
        tl.store(at, tl.cumsum(own, 0, reverse=BACK) + carried[None, :], live)
        carried += tl.sum(own, 0)


@triton.jit
def _outputs(  # type: ignore[no-untyped-def]
    x, in_weight, out_weight, out_bias, states, out, batch, steps, hidden, columns, outputs, chunks, parts,
    share,
    BINARY: tl.constexpr, SINGLE: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    chunk, begin, end, row, live, unit = _chunk(parts, chunks, batch, steps, LENGTH, ROWS, UNITS)
    for least in range(0, hidden, UNITS):
        unit = least + tl.arange(0, UNITS)
        held = unit < hidden
        place = (row * (chunks + 1) + chunk)[:, None] * hidden + unit[None, :]
        state = tl.load(states + place, live[:, None] & held[None, :], other=0.0)
        for d in range(begin, end):
            h = sigmoid(state)
            if SINGLE:
                u = tl.load(out_weight + d * hidden + unit, held, other=0.0)
                to = out + row * steps + d
                before = tl.load(to, live & (least > 0), other=0.0)
                before = tl.where(least > 0, before, tl.load(out_bias + d))
                tl.store(to, before + tl.sum(h * u[None, :], 1), live)
            else:
                for first in range(0, outputs, OUTPUTS):
                    o = first + tl.arange(0, OUTPUTS)
                    u = tl.load(
                        out_weight + (d * outputs + o)[None, :] * hidden + unit[:, None],
                        held[:, None] & (o < outputs)[None, :], other=0.0,
                    )  # fmt: skip
                    at = out + (row * steps + d)[:, None] * outputs + o[None, :]
                    there = live[:, None] & (o < outputs)[None, :]
                    before = tl.load(at, there & (least > 0), other=0.0)
                    bias = tl.load(out_bias + d * outputs + o, o < outputs, other=0.0)
                    before = tl.where(least > 0, before, bias[None, :])
                    tl.store(at, tl.dot(h, u, before, input_precision=PRECISION), there)
            state += _added(x, in_weight, row, d, unit, live, steps, hidden, columns, BINARY)
        tl.debug_barrier()  # what these threads have stored others may read


@triton.jit
def _sum_passed(  # type: ignore[no-untyped-def]
    grad, x, in_weight, out_weight, states, sums, batch, steps, hidden, columns, outputs, chunks, parts,
    share,
    BINARY: tl.constexpr, SINGLE: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the inputs of a chunk pass back to each one before them; sums [row][chunk][unit], one more at the end."""
    chunk, begin, end, row, live, unit = _chunk(parts, chunks, batch, steps, LENGTH, ROWS, UNITS)
    held = live[:, None] & (unit < hidden)[None, :]
    place = (row * (chunks + 1) + chunk)[:, None] * hidden + unit[None, :]
    state = tl.load(states + place, held, other=0.0)
    total = tl.zeros([ROWS, UNITS], tl.float32)
    for d in range(begin, end):
        total += _of_state(
            grad, out_weight, sigmoid(state), row, d, unit, live, steps, hidden, outputs, SINGLE, OUTPUTS, PRECISION
        )
        state += _added(x, in_weight, row, d, unit, live, steps, hidden, columns, BINARY)
    tl.store(sums + place, total, held)


@triton.jit
def _add(to, v, there, again):  # type: ignore[no-untyped-def]
    tl.store(to, v + tl.load(to, there & again, other=0.0), there)


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    grad, x, in_weight, out_weight, states, passed, of_in, of_out, batch, steps, hidden, columns, outputs, chunks,
    parts, share,
    BINARY: tl.constexpr, SINGLE: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    OUTPUTS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """of_in and of_out [split][...]: the gradients of both weights, of `share` tiles of rows."""
    chunk, begin, end, row, live, unit = _chunk(parts, chunks, batch, steps, LENGTH, ROWS, UNITS)
    held = unit < hidden
    split = (tl.program_id(0) // parts // chunks).to(tl.int64)
    of_in += split * steps * columns * hidden
    of_out += split * steps * outputs * hidden
    for tile in range(share):
        row = (split * share + tile) * ROWS + tl.arange(0, ROWS)
        live = row < batch
        there = live[:, None] & held[None, :]
        place = (row * (chunks + 1) + chunk)[:, None] * hidden + unit[None, :]
        state = tl.load(states + place, there, other=0.0)
        behind = tl.load(passed + place + hidden, there, other=0.0)
        for n in range(end - begin):
            d = end - 1 - n
            before = state
            for known in range(begin, d):
                before += _added(x, in_weight, row, known, unit, live, steps, hidden, columns, BINARY)
            h = sigmoid(before)
            value = tl.load(x + row * steps + d, live, other=0)
            if BINARY:
                of_added = tl.sum(value.to(tl.float32)[:, None] * behind, 0)
                _add(of_in + d * hidden + unit, of_added, held, tile > 0)
            else:
                for first in range(0, columns, VALUES):
                    v = first + tl.arange(0, VALUES)
                    chosen = (value[None, :] == v[:, None]).to(tl.float32)
                    of_added = tl.dot(chosen, behind, input_precision=PRECISION)
                    at = of_in + (d * columns + v)[:, None] * hidden + unit[None, :]
                    _add(at, of_added, (v < columns)[:, None] & held[None, :], tile > 0)
            if SINGLE:
                g = tl.load(grad + row * steps + d, live, other=0.0)
                _add(of_out + d * hidden + unit, tl.sum(g[:, None] * h, 0), held, tile > 0)
            else:
                for first in range(0, outputs, OUTPUTS):
                    o = first + tl.arange(0, OUTPUTS)
                    g = tl.load(
                        grad + (row * steps + d)[None, :] * outputs + o[:, None],
                        live[None, :] & (o < outputs)[:, None], other=0.0,
                    )  # fmt: skip
                    at = of_out + (d * outputs + o)[:, None] * hidden + unit[None, :]
                    of_u = tl.dot(g, h, input_precision=PRECISION)
                    _add(at, of_u, (o < outputs)[:, None] & held[None, :], tile > 0)
            behind += _of_state(
                grad, out_weight, h, row, d, unit, live, steps, hidden, outputs, SINGLE, OUTPUTS, PRECISION
            )
        tl.debug_barrier()


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    in_weight, in_bias, out_weight, out_bias, uniforms, x, logits, steps, hidden, columns, outputs, temperature,
    BINARY: tl.constexpr, SINGLE: tl.constexpr, UNITS: tl.constexpr, OUTPUTS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A program draws a row. Weights that do not depend on what is drawn are on their way an input ahead."""
    row = tl.program_id(0).to(tl.int64)
    unit = tl.arange(0, UNITS)
    held = unit < hidden
    state = tl.load(in_bias + unit, held, other=0.0)
    w, u = tl.load(in_weight + unit, held, other=0.0), tl.load(out_weight + unit, held, other=0.0)
    for step in range(steps):
        d = tl.cast(step, tl.int64)
        more = held & (d + 1 < steps)
        next_w = tl.load(in_weight + (d + 1) * hidden + unit, more, other=0.0)
        next_u = tl.load(out_weight + (d + 1) * hidden + unit, more, other=0.0)
        uniform = tl.load(uniforms + row * steps + d)
        known = tl.load(x + row * steps + d)
        h = sigmoid(state)
        if SINGLE:  # the logit of 1 against 0
            logit = (tl.sum(h * u) + tl.load(out_bias + d)) / temperature
            top = tl.maximum(logit, 0.0)
            zero = tl.exp(-top)
            drawn = (zero <= uniform * (zero + tl.exp(logit - top))).to(tl.int64)
        else:
            for first in range(0, outputs, AT_ONCE):
                o = first + tl.arange(0, AT_ONCE)
                rows = tl.load(
                    out_weight + (d * outputs + o)[:, None] * hidden + unit[None, :],
                    (o < outputs)[:, None] & held[None, :], other=0.0,
                )  # fmt: skip
                bias = tl.load(out_bias + d * outputs + o, o < outputs, other=0.0)
                tl.store(logits + row * outputs + o, (tl.sum(rows * h[None, :], 1) + bias) / temperature, o < outputs)
            tl.debug_barrier()
            o = tl.arange(0, OUTPUTS)
            of_all = tl.load(logits + row * outputs + o, o < outputs, other=float("-inf"))
            p = tl.exp(of_all - tl.max(of_all))
            below = (tl.cumsum(p) <= uniform * tl.sum(p)) & (o < outputs)
            drawn = tl.minimum(tl.sum(below.to(tl.int32)), outputs - 1).to(tl.int64)
            tl.debug_barrier()  # all have read
        value = tl.where(known < 0, drawn, known)
        tl.store(x + row * steps + d, value)
        if BINARY:
            state += value.to(tl.float32) * w
        else:
            state += tl.load(in_weight + (d * columns + value) * hidden + unit, held & (value < columns), other=0.0)
        w, u = next_w, next_u


def _plan(kernel: Any, x: Tensor, in_weight: Tensor, outputs: int, length: int) -> Plan:
    (batch, steps), (_, columns, hidden) = x.shape, in_weight.shape

    def make() -> Plan:
        single, weights = outputs == 1, kernel is _weights
        rows = (32 if weights else 8) if single else 16
        units = power_within(hidden, 16, 64 if weights or not single else 512)
        chunks, parts, tiles, share = cdiv(steps, length), cdiv(hidden, units), cdiv(batch, rows), 1
        if weights:
            copies = 1 + MOST_COPIES // (4 * steps * (columns + outputs) * hidden)
            share, tiles = splits_for(chunks * parts, tiles, min(264, copies * chunks * parts))
        if kernel is _outputs:
            parts = 1
        options = {
            "BINARY": columns == 1, "SINGLE": single, "LENGTH": length, "ROWS": rows, "UNITS": units,
            "OUTPUTS": power_within(outputs, 16, 64), "VALUES": power_within(columns, 16, 64),
            "PRECISION": precision_of(in_weight), "num_warps": 4, "num_stages": 1,
        }  # fmt: skip
        numbers = batch, steps, hidden, columns, outputs, chunks, parts, share
        return Plan(kernel, tiles * chunks * parts, numbers, options, sizes=(tiles,))

    return planned(kernel, (x.shape, in_weight.shape, outputs, length, precision_of(in_weight)), make)


def _scanned(sums: Tensor, first: Tensor, back: bool) -> None:
    """sums (B, chunks + 1, H), in place."""
    batch, entries, hidden = sums.shape
    parts = cdiv(hidden, 64)
    options = {"BACK": back, "ENTRIES": power_within(entries, 1, 32), "UNITS": 64, "num_warps": 4}
    plan = planned(_scan, (sums.shape, back), lambda: Plan(_scan, batch * parts, (hidden, entries, parts), options))
    plan.run(sums, first)


def _states(x: Tensor, in_weight: Tensor, in_bias: Tensor, length: int) -> Tensor:
    """(B, chunks + 1, H): before each chunk, and behind the last."""
    (batch, steps), hidden = x.shape, in_weight.shape[2]
    states = in_weight.new_empty(batch, cdiv(steps, length) + 1, hidden)
    _plan(_sum_added, x, in_weight, 1, length).run(x, in_weight, states)
    _scanned(states, in_bias, back=False)
    return states


def nade(x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """Contiguous float32 weights."""
    out = in_weight.new_empty(*x.shape, out_weight.shape[1])
    if not out.numel() or not in_weight.shape[2]:
        return out.copy_(out_bias)
    with on_device(x):
        states = _states(x, in_weight, in_bias, FORWARD)
        plan = _plan(_outputs, x, in_weight, out.shape[2], FORWARD)
        plan.run(x, in_weight, out_weight, out_bias, states, out)
    return out


def nade_backward(
    grad: Tensor, x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous grad (B, D, O) -> gradients of in_weight, in_bias and out_weight."""
    outputs = out_weight.shape[1]
    if not grad.numel() or not in_weight.numel():
        return torch.zeros_like(in_weight), torch.zeros_like(in_bias), torch.zeros_like(out_weight)
    with on_device(x):
        states = _states(x, in_weight, in_bias, BACKWARD)
        passed = torch.empty_like(states)
        plan = _plan(_sum_passed, x, in_weight, outputs, BACKWARD)
        plan.run(grad, x, in_weight, out_weight, states, passed)
        _scanned(passed, in_bias, back=True)
        plan = _plan(_weights, x, in_weight, outputs, BACKWARD)
        of_in, of_out = (w.new_empty(*plan.sizes, *w.shape) for w in (in_weight, out_weight))
        plan.run(grad, x, in_weight, out_weight, states, passed, of_in, of_out)
    of_in, of_out = (g.sum(0) if len(g) > 1 else g[0] for g in (of_in, of_out))
    return of_in, passed[:, 0].sum(0), of_out


def nade_sample(
    in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, uniforms: Tensor, temperature: float,
    x: Tensor,
) -> None:  # fmt: skip
    """Contiguous float32 weights; x (B, D) int64, of which what is below 0 is drawn."""
    (batch, steps), (_, columns, hidden), outputs = x.shape, in_weight.shape, out_weight.shape[1]
    if not x.numel():
        return
    logits = uniforms.new_empty(batch, outputs)
    units = power_within(hidden, 32, 1 << 20)
    options = {
        "BINARY": columns == 1, "SINGLE": outputs == 1, "UNITS": units, "OUTPUTS": power_within(outputs, 1, 1 << 20),
        "AT_ONCE": power_within(outputs, 1, max(1, 4096 // units)), "num_warps": power_within(units // 128, 1, 8),
        "num_stages": 1,
    }  # fmt: skip
    numbers = steps, hidden, columns, outputs, temperature
    with on_device(x):
        plan = planned(
            _draw, (x.shape, in_weight.shape, outputs, temperature), lambda: Plan(_draw, batch, numbers, options)
        )
        plan.run(in_weight, in_bias, out_weight, out_bias, uniforms, x, logits)
