"""Backpropagation through a sequence of invertible layers that keeps only its output.

Going back, each layer's input is reconstructed from its output. A coupling's conditioner reads the part that passes
through, which is in the output as it was in the input: one evaluation of it serves the reconstruction and the gradient,
so that a step costs a third more than the plain one (forward again, beside forward and twice that for backward). Any
other layer is inverted, then run again. Random numbers, autocast and buffers are as they were in the forward pass.

Sources: Gomez et al., "The Reversible Residual Network" (2017); Kingma and Dhariwal, "Glow" (2018).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checks import first_order
from fastgen.nn.coupling import AffineCoupling


class _Circumstances:
    """Random state, autocast and a layer's buffers at one point, to be met again."""

    def __init__(self, device: torch.device, layer: nn.Module) -> None:
        self.device = device
        self.rng = torch.get_rng_state()
        self.device_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        kind = device.type
        known = torch.amp.is_autocast_available(kind)
        self.autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) if known else None
        self.buffers = _snapshot(layer)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Within it, random numbers are drawn as they were then; afterwards as if nothing had been drawn."""
        devices = [self.device] if self.device_rng is not None else []
        with torch.random.fork_rng(devices=devices), self.uncached():
            torch.set_rng_state(self.rng)
            if self.device_rng is not None:
                torch.cuda.set_rng_state(self.device_rng, self.device)
            yield

    def uncached(self) -> contextlib.AbstractContextManager[object]:
        """The autocast of then; what is cast without a graph must not be found, in a cache, by what needs one."""
        if self.autocast is None or (not self.autocast[0] and not torch.is_autocast_enabled(self.device.type)):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast[1], self.autocast[0], cache_enabled=False)


Snapshot = list[tuple[Tensor, Tensor]]  # buffers and their values


def _snapshot(layer: nn.Module) -> Snapshot:
    """Masks aside, which do not change."""
    return [(b, b.clone()) for b in layer.buffers() if b.dtype != torch.bool] if layer.training else []


def _changed(snapshot: Snapshot) -> Snapshot:
    """The buffers that have been written to since; where asking would make the host wait, all of them.

    Version counters do not tell: batch normalisation writes without counting.
    """
    return [(b, value) for b, value in snapshot if b.device.type != "cpu" or not torch.equal(b, value)]


@contextlib.contextmanager
def buffers_kept(layer: nn.Module, as_then: Snapshot | None = None) -> Iterator[None]:
    """Evaluating a layer once more leaves no trace in its buffers; within it they are `as_then`."""
    before = _snapshot(layer)
    for buffer, value in as_then or ():
        buffer.copy_(value)
    try:
        yield
    finally:
        for buffer, value in _changed(before):
            buffer.copy_(value)


def call(layer: nn.Module, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
    """Forward; layers that know of no `cond` need not take it."""
    return layer(x) if cond is None else layer(x, cond)  # type: ignore[no-any-return]


def call_inverse(layer: nn.Module, z: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
    """`call`, the other way."""
    inverse: Any = layer.inverse
    return inverse(z) if cond is None else inverse(z, cond)  # type: ignore[no-any-return]


def _step_back(
    layer: nn.Module, z: Tensor, cond: Tensor | None, grads: tuple[Tensor, Tensor], then: _Circumstances,
    parameters: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:  # fmt: skip
    """Output of a layer and the gradients of its outputs -> its input, and the gradients of x, cond, the parameters."""
    leaf = cond.detach().requires_grad_(cond.is_floating_point()) if cond is not None else None
    wanted = [leaf] if leaf is not None and leaf.requires_grad else []
    part = None
    with buffers_kept(layer, then.buffers):
        if isinstance(layer, AffineCoupling) and type(layer).forward is AffineCoupling.forward:
            with then.again():
                with torch.enable_grad():
                    part = layer.passive(z).detach().requires_grad_()
                    params = layer.parameters_of(part, leaf)
                x = layer.transform(z, params.detach(), inverse=True)[0].requires_grad_()
                with torch.enable_grad():
                    out = layer.transform(x, params)
        else:
            with then.again():
                x = call_inverse(layer, z, cond)[0].detach().requires_grad_()
            with then.again(), torch.enable_grad():
                out = call(layer, x, leaf)
        pairs = [(o, g) for o, g in zip(out, grads, strict=True) if o.requires_grad]
        leaves = [x, *([] if part is None else [part]), *wanted, *parameters]
        found = list(torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True))
    grad_x = found.pop(0)
    if part is not None:
        of_part = found.pop(0)
        if of_part is not None:
            layer.add_to_passive(grad_x, of_part)  # type: ignore[operator]
    return x.detach(), [grad_x, found.pop(0) if wanted else None, *found]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layers: Sequence[nn.Module], inputs: list[Tensor] | None, drift: list[float], x: Tensor,
        cond: Tensor | None, *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.layers, ctx.inputs, ctx.drift, ctx.then = layers, inputs, drift, []
        log_det = x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))
        z = x
        for layer in layers:
            then = _Circumstances(x.device, layer)
            ctx.then.append(then)
            with then.uncached():
                z, of_layer = call(layer, z, cond)
            then.buffers = _changed(then.buffers)
            log_det = log_det + of_layer
        z = z.view_as(z) if z is x else z
        ctx.save_for_backward(z, cond)
        return z, log_det

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_z: Tensor, grad_log_det: Tensor) -> tuple[Any, ...]:
        z, cond = ctx.saved_tensors
        grad_cond: Tensor | None = None
        of_parameters: dict[int, Tensor | None] = {}
        every = [[p for p in layer.parameters() if p.requires_grad] for layer in ctx.layers]
        drift = []
        for i in reversed(range(len(ctx.layers))):
            z, (grad_z, of_cond, *found) = _step_back(  # type: ignore[assignment]
                ctx.layers[i], z, cond, (grad_z, grad_log_det), ctx.then[i], every[i]
            )
            if of_cond is not None:
                grad_cond = of_cond if grad_cond is None else grad_cond + of_cond
            for p, g in zip(every[i], found, strict=True):
                before = of_parameters.get(id(p))  # a parameter may serve several layers
                of_parameters[id(p)] = g if before is None else before if g is None else before + g
            if ctx.inputs is not None:
                true = ctx.inputs[i]
                drift.append(float((z - true).abs().max() / true.abs().max().clamp(min=1e-12)) if true.numel() else 0.0)
        ctx.drift[:] = reversed(drift)
        unique = list({id(p): None for layer in every for p in layer})
        return None, None, None, grad_z, grad_cond, *(of_parameters[k] for k in unique)


def run_reversibly(
    layers: Sequence[nn.Module], x: Tensor, cond: Tensor | None, inputs: list[Tensor] | None, drift: list[float]
) -> tuple[Tensor, Tensor]:
    """All layers -> output, log_det.

    `inputs`, where given, are the layers' true ones; the backward pass leaves in `drift` how far its reconstructions
    were off, relative to the largest value.
    """
    parameters = list({id(p): p for layer in layers for p in layer.parameters() if p.requires_grad}.values())
    return _Reversible.apply(layers, inputs, drift, x, cond, *parameters)  # type: ignore[no-any-return,no-untyped-call]
