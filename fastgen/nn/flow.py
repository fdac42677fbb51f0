"""Sequences of invertible layers, and the layers that only move values: squeeze, permutation, split, multi-scale.

Every layer of a flow is a module with `forward(x) -> (z, log_det)` and `inverse(z) -> (x, log_det)`, log_det (B,) in
float32 (float64 for float64) of the direction that ran; with `cond`, `forward(x, cond)` and `inverse(z, cond)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer, check_tensor, permutation_fault, refuses_order
from fastgen.nn.reversible import buffers_kept, call, call_inverse, run_reversibly
from fastgen.ops.affine_coupling import affine_coupling


def zero_log_det(x: Tensor) -> Tensor:
    """(B,) zeros, in the dtype of log-determinants."""
    return x.new_zeros(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


class FlowSequence(nn.Module):
    """Invertible layers one after another.

    Parameters
    ----------
    layers
        Modules as described at the head of this module.
    reversible
        Keep no activations for the backward pass: they are reconstructed from the output, layer by layer. Memory then
        does not grow with the number of layers, and a training step takes about a third longer. Gradients are those of
        the plain pass, within the rounding of the reconstruction. Differentiable once. Layers must not be changed
        between forward and backward.
    debug
        Check that every layer's output is finite (FloatingPointError names the layer), and with `reversible` keep the
        true inputs all the same: after the backward pass `drift` holds, for each layer, the largest difference between
        the reconstructed input and the true one, relative to the largest value.
    """

    def __init__(self, *layers: nn.Module, reversible: bool = False, debug: bool = False) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            if not isinstance(layer, nn.Module) or not callable(getattr(layer, "inverse", None)):
                raise TypeError(f"FlowSequence: layer {i} must be a module with an inverse, got {type(layer).__name__}")
        self.layers = nn.ModuleList(layers)
        self.reversible, self.debug = reversible, debug
        self._drift: list[float] = []

    @property
    def drift(self) -> list[float]:
        """Of each layer, after a backward pass with `reversible` and `debug`, empty before: see the class."""
        return self._drift

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, ...) -> z, log_det (B,)."""
        check_tensor("FlowSequence", "x", x)
        inputs = self._check(x, cond, False) if self.debug else None
        recorded = torch.is_grad_enabled() and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        if self.reversible and self.layers and recorded:
            self._drift = []
            return run_reversibly(self._flat(), x, cond, inputs, self._drift)
        log_det = zero_log_det(x)
        for layer in self.layers:
            x, of_layer = call(layer, x, cond)
            log_det = log_det + of_layer
        return x, log_det

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        check_tensor("FlowSequence", "z", z)
        if self.debug:
            self._check(z, cond, True)
        log_det = zero_log_det(z)
        for layer in reversed(self.layers):
            z, of_layer = call_inverse(layer, z, cond)
            log_det = log_det + of_layer
        return z, log_det

    def _flat(self) -> list[nn.Module]:
        """The layers, those of sequences within it among them: each is to be undone on its own."""
        return [inner for layer in self.layers for inner in (layer._flat() if type(layer) is FlowSequence else [layer])]

    @torch.no_grad()
    def _check(self, x: Tensor, cond: Tensor | None, inverse: bool) -> list[Tensor]:
        """Every layer's input; raises where one is not finite."""
        layers = self._flat()
        layers, step = (layers[::-1], call_inverse) if inverse else (layers, call)
        inputs: list[Tensor] = []
        name = "z" if inverse else "x"
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            for layer in [*layers, None]:
                if not bool(torch.isfinite(x).all()):
                    raise FloatingPointError(f"FlowSequence: {name} holds NaN or infinity")
                if layer is None:
                    return inputs
                inputs.append(x.clone())
                with buffers_kept(layer):
                    x, _ = step(layer, x, cond)
                i = len(inputs) - 1
                where = len(layers) - 1 - i if inverse else i
                name = f"what layer {where} ({type(layer).__name__}) returns"
        return inputs


class Squeeze(nn.Module):
    """Trade space for channels: (B, C, H, W) -> (B, C * factor**2, H / factor, W / factor).

    Channel c * factor**2 + row * factor + column holds pixel (row, column) of each block of channel c, as in Glow.
    """

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        check_integer("Squeeze", "factor", factor)
        self.factor = factor

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> (B, C * factor**2, H / factor, W / factor), zeros (B,)."""
        check_tensor("Squeeze", "x", x)
        if x.dim() != 4 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(f"Squeeze: factor {self.factor} must divide x's height and width, got {tuple(x.shape)}")
        if not x.numel():  # which PyTorch leaves in its shape
            batch, channels, height, width = x.shape
            size = (batch, channels * self.factor**2, height // self.factor, width // self.factor)
            return x.reshape(size), zero_log_det(x)
        return F.pixel_unshuffle(x, self.factor), zero_log_det(x)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        check_tensor("Squeeze", "z", z)
        if z.dim() != 4 or z.shape[1] % self.factor**2:
            raise ValueError(f"Squeeze: {self.factor}**2 must divide z's channels, got {tuple(z.shape)}")
        if not z.numel():
            batch, channels, height, width = z.shape
            size = (batch, channels // self.factor**2, height * self.factor, width * self.factor)
            return z.reshape(size), zero_log_det(z)
        return F.pixel_shuffle(z, self.factor), zero_log_det(z)


class Permutation(nn.Module):
    """A fixed order of the channels.

    Parameters
    ----------
    channels
        C of the input (B, C, *S).
    order
        "reverse", "random", or int64 (C,): channel i of the output is channel order[i] of the input.
    """

    order: Tensor

    def __init__(self, channels: int, order: Tensor | str = "reverse") -> None:
        super().__init__()
        check_integer("Permutation", "channels", channels)
        if isinstance(order, str):
            if order not in ("reverse", "random"):
                raise ValueError(f"Permutation: order must be 'reverse', 'random' or a tensor, got {order!r}")
            order = torch.randperm(channels) if order == "random" else torch.arange(channels).flip(0)
        check_tensor("Permutation", "order", order)
        if fault := permutation_fault(order, channels):
            raise ValueError(f"Permutation: order {fault}")
        self.register_buffer("order", order.clone())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not refuses_order("Permutation", self.order, state_dict, prefix, args[-1]):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, *S) -> the same shape, zeros (B,)."""
        return self._ordered(x, self.order), zero_log_det(x)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        return self._ordered(z, self.order.argsort()), zero_log_det(z)

    def _ordered(self, x: Tensor, order: Tensor) -> Tensor:
        check_tensor("Permutation", "x", x)
        if x.dim() < 2 or x.shape[1] != len(order):
            raise ValueError(f"Permutation: x must have shape (B, {len(order)}, *S), got {tuple(x.shape)}")
        return x[:, order]


class Split(nn.Module):
    """Factor out half the channels, standardised by a prior that is learned from the other half.

    Parameters
    ----------
    net
        Maps the half that goes on, (B, C - C // 2, *S), to log standard deviation and mean of the other,
        (B, 2 * (C // 2), *S); called as net(part) or net(part, cond). None: a standard normal prior.
    """

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C, *S) -> the half that goes on, the standardised other half, log_det (B,)."""
        check_tensor("Split", "x", x)
        if x.dim() < 2 or x.shape[1] % 2 or not x.shape[1]:
            raise ValueError(f"Split: x needs an even number of channels, got {tuple(x.shape)}")
        kept, other = x.chunk(2, 1)
        if self.net is None:
            return kept, other, zero_log_det(x)
        other, log_det = affine_coupling(other, self._prior(kept, cond), scale="exp", inverse=True)
        return kept, other, log_det

    def inverse(self, kept: Tensor, other: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo `forward` -> x, log_det."""
        if self.net is None:
            return torch.cat([kept, other], 1), zero_log_det(kept)
        other, log_det = affine_coupling(other, self._prior(kept, cond), scale="exp")
        return torch.cat([kept, other], 1), log_det

    def _prior(self, kept: Tensor, cond: Tensor | None) -> Tensor:
        assert self.net is not None
        params: Tensor = self.net(kept) if cond is None else self.net(kept, cond)
        check_tensor("Split", "what net returns", params)
        wanted = (kept.shape[0], 2 * kept.shape[1], *kept.shape[2:])
        if tuple(params.shape) != wanted:
            raise ValueError(f"Split: net must map {tuple(kept.shape)} to {wanted}, got {tuple(params.shape)}")
        return params


class MultiScale(nn.Module):
    """Flows one after another, with a split between each two: forward(x) -> (list of z, log_det).

    Parameters
    ----------
    flows
        Layers or sequences, the finest scale first.
    splits
        One fewer, `Split` or modules called like it.
    """

    def __init__(self, flows: Sequence[nn.Module], splits: Sequence[nn.Module]) -> None:
        super().__init__()
        if not flows or len(splits) != len(flows) - 1:
            raise ValueError(
                f"MultiScale: splits must be one fewer than flows, got {len(splits)} for {len(flows)} flows"
            )
        self.flows, self.splits = nn.ModuleList(flows), nn.ModuleList(splits)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """x (B, ...) -> the factored parts, the finest scale first, and what is left; log_det (B,)."""
        log_det, parts = zero_log_det(x), []
        for i, flow in enumerate(self.flows):
            x, of_flow = call(flow, x, cond)
            log_det = log_det + of_flow
            if i < len(self.splits):
                split = self.splits[i]
                x, other, of_split = split(x) if cond is None else split(x, cond)
                log_det = log_det + of_split
                parts.append(other)
        return [*parts, x], log_det

    def inverse(self, z: Sequence[Tensor], cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        if len(z) != len(self.flows):
            raise ValueError(f"MultiScale: z must be {len(self.flows)} parts, got {len(z)}")
        x, log_det = z[-1], zero_log_det(z[-1])
        for i in reversed(range(len(self.flows))):
            if i < len(self.splits):
                inverse = self.splits[i].inverse
                x, of_split = inverse(x, z[i]) if cond is None else inverse(x, z[i], cond)  # type: ignore[operator]
                log_det = log_det + of_split
            x, of_flow = call_inverse(self.flows[i], x, cond)
            log_det = log_det + of_flow
        return x, log_det
