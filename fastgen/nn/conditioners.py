"""The networks inside couplings: they end in zeros, so that a fresh flow is the identity but for its mixing."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.nn.conv2d import Conv2d
from fastgen.nn.linear import Linear


def _zero(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class _Conditioner(nn.Module):
    """What the three share: sizes, and a vector `cond` (B, cond_channels) that joins the first hidden features."""

    def __init__(self, inputs: int, outputs: int, hidden: int, cond_channels: int) -> None:
        super().__init__()
        name = type(self).__name__
        for label, size, least in (
            ("inputs", inputs, 1), ("outputs", outputs, 1), ("hidden", hidden, 1), ("cond_channels", cond_channels, 0),
        ):  # fmt: skip
            check_integer(name, label, size, least)
        self.context = nn.Linear(cond_channels, hidden) if cond_channels else None

    def _add(self, h: Tensor, cond: Tensor | None) -> Tensor:
        if (cond is None) != (self.context is None):
            came = "nothing" if cond is None else tuple(cond.shape)
            wanted = "None" if self.context is None else f"(B, {self.context.in_features})"
            raise ValueError(f"{type(self).__name__}: cond must be {wanted}, got {came}")
        if self.context is None or cond is None:
            return h
        return h + self.context(cond)[(..., *(None,) * (h.dim() - 2))]  # type: ignore[no-any-return]


class ConvConditioner(_Conditioner):
    """Glow's: 3x3, 1x1 and 3x3 convolution with ReLU between; (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 128, cond_channels: int = 0) -> None:
        super().__init__(inputs, outputs, hidden, cond_channels)
        self.first = Conv2d(inputs, hidden, 3, padding=1, relu=not cond_channels)
        self.middle = Conv2d(hidden, hidden, 1, relu=True)
        self.last = _zero(Conv2d(hidden, outputs, 3, padding=1))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W), (B, cond_channels) -> (B, outputs, H, W)."""
        h = self._add(self.first(x), cond)
        return self.last(self.middle(h if self.context is None else F.relu(h)))  # type: ignore[no-any-return]


class ResidualConditioner(_Conditioner):
    """RealNVP's: residual blocks of two 3x3 convolutions; (B, inputs, H, W) -> (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 64, blocks: int = 2, cond_channels: int = 0) -> None:
        super().__init__(inputs, outputs, hidden, cond_channels)
        check_integer("ResidualConditioner", "blocks", blocks, 0)
        self.first = Conv2d(inputs, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(Conv2d(hidden, hidden, 3, padding=1, relu=relu) for relu in (True, False))
            for _ in range(blocks)
        )
        self.last = _zero(Conv2d(hidden, outputs, 3, padding=1))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B, inputs, H, W), (B, cond_channels) -> (B, outputs, H, W)."""
        h = self._add(self.first(x), cond)
        for block in self.blocks:
            one, two = cast(nn.ModuleList, block)
            h = h + two(one(F.relu(h)))
        return self.last(F.relu(h))  # type: ignore[no-any-return]


class MLPConditioner(_Conditioner):
    """For vectors: linear layers with `activation` between; (B, inputs) -> (B, outputs)."""

    def __init__(
        self, inputs: int, outputs: int, hidden: int = 64, layers: int = 3, cond_channels: int = 0,
        activation: Callable[[Tensor], Tensor] = F.silu,
    ) -> None:  # fmt: skip
        super().__init__(inputs, outputs, hidden, cond_channels)
        check_integer("MLPConditioner", "layers", layers, 2)
        self.activation = activation
        self.first = Linear(inputs, hidden)
        self.middle = nn.ModuleList(Linear(hidden, hidden) for _ in range(layers - 2))
        self.last = _zero(Linear(hidden, outputs))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """(B, inputs), (B, cond_channels) -> (B, outputs)."""
        h = self.activation(self._add(self.first(x), cond))
        for layer in self.middle:
            h = self.activation(layer(h))
        return self.last(h)  # type: ignore[no-any-return]
