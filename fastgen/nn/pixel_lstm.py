"""The two-dimensional LSTMs of PixelRNN.

Source: van den Oord et al., "Pixel Recurrent Neural Networks" (2016).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.nn.conv2d import Conv2d
from fastgen.nn.masked_conv2d import MaskedConv2d
from fastgen.ops.image_lstm import image_lstm
from fastgen.ops.pixel_program import PixelProgram


def _remembering(bias: Tensor | None) -> None:
    """A forget gate that begins open."""
    assert bias is not None
    with torch.no_grad():
        bias.chunk(4)[1].add_(1.0)


def _conditioned(
    p: PixelProgram, bias: Tensor | None, layer: Conv2d | None, context: Tensor | None, *, add: int,
    row_above: bool = False,
) -> tuple[Tensor | None, int]:  # fmt: skip
    """A context's part of the gates: in the bias, or in the sum `add` where it is a plane."""
    if layer is None:
        return bias, add
    weight = layer.weight[:, :, 0, 0]
    if context is None:
        return bias, p.linear(p.context, weight, add=add, halves=4, row_above=row_above)
    assert bias is not None
    return bias + context[:, :, 0, 0] @ weight.T, add


class RowLSTM(nn.Module):
    """An LSTM that goes down the rows, all pixels of a row at once; (B, C, H, W) -> (B, hidden_channels, H, W).

        gates of row i = masked convolution along row i of x  +  convolution along row i - 1 of h

    A pixel sees itself in x (mask B), and of what lies before it a triangle that widens upwards.

    Parameters
    ----------
    in_channels, hidden_channels
        C, and channels of the state.
    kernel_size
        Odd; of both convolutions.
    context_channels
        Of a context (B, context_channels, H or 1, W or 1) that is added inside the gates; 0 for none.
    """

    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int = 3, context_channels: int = 0) -> None:
        super().__init__()
        for name, size in (("hidden_channels", hidden_channels), ("kernel_size", kernel_size)):
            check_integer("RowLSTM", name, size)
        if kernel_size % 2 == 0:
            raise ValueError(f"RowLSTM: kernel_size must be odd, got {kernel_size}")
        self.hidden_channels, self.reach = hidden_channels, kernel_size // 2
        self.input = MaskedConv2d(in_channels, 4 * hidden_channels, (1, kernel_size), "B")
        self.state = nn.Conv1d(hidden_channels, 4 * hidden_channels, kernel_size, padding=self.reach, bias=False)
        self.context = Conv2d(context_channels, 4 * hidden_channels, 1, bias=False) if context_channels else None
        _remembering(self.input.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        gates = self.input(x)
        if self.context is not None and context is not None:
            gates = gates + self.context(context)
        return image_lstm(gates, self.state.weight)

    def emit(self, p: PixelProgram, x: int, context: Tensor | None = None) -> int:
        """Append the layer to a sampling program; context: (B, context_channels, 1, 1), or None where the program has a
        plane of it."""
        h, c = p.state(self.hidden_channels), p.state(self.hidden_channels)
        above = F.pad(self.state.weight[:, :, None], (0, 0, 0, 2))
        gates = p.conv(h, above, mask="vertical", halves=4)
        bias, gates = _conditioned(p, self.input.bias, self.context, context, add=gates)
        return p.lstm(p.conv(x, self.input.weight, bias, add=gates, halves=4), h, c, dy=-1)


class DiagonalLSTM(nn.Module):
    """An LSTM that goes along the diagonals from the upper left; (B, C, H, W) -> (B, hidden_channels, H, W).

        gates of (i, j) = linear map of x(i, j)  +  of h(i, j - 1)  +  of h(i - 1, j)

    All pixels of a diagonal are done at once.
    """

    def __init__(self, in_channels: int, hidden_channels: int, context_channels: int = 0) -> None:
        super().__init__()
        check_integer("DiagonalLSTM", "hidden_channels", hidden_channels)
        self.hidden_channels = hidden_channels
        self.input = Conv2d(in_channels, 4 * hidden_channels, 1)
        self.state = nn.Linear(2 * hidden_channels, 4 * hidden_channels, bias=False)
        self.context = Conv2d(context_channels, 4 * hidden_channels, 1, bias=False) if context_channels else None
        _remembering(self.input.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        gates: Tensor = self.input(x)
        if self.context is not None and context is not None:
            gates = gates + self.context(context)
        left, above = self.state.weight.chunk(2, 1)
        return image_lstm(gates, torch.stack((above, left), 2), diagonal=True)

    def emit(self, p: PixelProgram, x: int, context: Tensor | None = None) -> int:
        """Append the layer to a sampling program; context as that of a `RowLSTM`."""
        h, c = p.state(self.hidden_channels), p.state(self.hidden_channels)
        left, above = self.state.weight.chunk(2, 1)
        bias, gates = _conditioned(
            p, self.input.bias, self.context, context, add=p.linear(h, above, halves=4, row_above=True)
        )
        gates = p.linear(x, self.input.weight[:, :, 0, 0], bias, add=gates, halves=4)
        gates = p.conv(h, F.pad(left[:, :, None, None], (0, 2)), mask="A", add=gates, halves=4)
        return p.lstm(gates, h, c, dx=-1)

    def emit_mirrored(self, p: PixelProgram, inputs: list[int], context: Tensor | None = None) -> int:
        """The layer from the right along the row above, its result one row further down; `inputs`: the planes of x."""
        h, c = p.state(self.hidden_channels, "back"), p.state(self.hidden_channels, "back")
        right, above = self.state.weight.chunk(2, 1)
        bias, gates = _conditioned(
            p, self.input.bias, self.context, context, row_above=True,
            add=p.linear(h, above, halves=4, row_above=True),
        )  # fmt: skip
        weights = self.input.weight[:, :, 0, 0].split([p.planes[x].channels for x in inputs], 1)
        for x, weight in zip(inputs, weights, strict=True):
            gates, bias = p.linear(x, weight, bias, add=gates, halves=4, row_above=True), None
        return p.lstm(p.right(h, right, gates), h, c, dx=1)


class DiagonalBiLSTM(nn.Module):
    """Two `DiagonalLSTM`s, from the upper left and from the upper right, that see all pixels before.

    x (B, C, H, W), e (B, pixel_channels, H, W) -> (B, hidden_channels, H, W). x, the features, know only pixels before;
    e are the pixels themselves. The second LSTM is read one row further up, where all is known, e too: without e, the
    last pixels of a row would be out of sight of the beginning of the next.

    Parameters
    ----------
    in_channels, pixel_channels, hidden_channels
        Of x, of e and of each state.
    context_channels
        Of a context (B, context_channels, H or 1, W or 1) that is added inside the gates; 0 for none.
    """

    def __init__(self, in_channels: int, pixel_channels: int, hidden_channels: int, context_channels: int = 0) -> None:
        super().__init__()
        self.left = DiagonalLSTM(in_channels, hidden_channels, context_channels)
        self.right = DiagonalLSTM(in_channels + pixel_channels, hidden_channels, context_channels)

    def forward(self, x: Tensor, e: Tensor, context: Tensor | None = None) -> Tensor:
        mirrored = None if context is None else context.flip(3)
        right = self.right(torch.cat((x, e), 1).flip(3), mirrored).flip(3)
        return self.left(x, context) + F.pad(right[:, :, :-1], (0, 0, 1, 0))  # type: ignore[no-any-return]

    def emit(self, p: PixelProgram, x: int, context: Tensor | None = None) -> int:
        """Append the layer to a sampling program, whose input is e; context as that of a `RowLSTM`."""
        return p.add(self.left.emit(p, x, context), self.right.emit_mirrored(p, [x, p.input], context))
