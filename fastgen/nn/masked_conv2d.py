"""Masked convolutions with parameters, and the block of a Gated PixelCNN."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checks import check_integer, check_tensor
from fastgen.ops.gated_masked_conv2d import gated_masked_conv2d
from fastgen.ops.masked_conv2d import MASKS, masked_conv2d, weight_mask
from fastgen.ops.pixel_program import PixelProgram

KernelSize = int | tuple[int, int]


def _pair(name: str, kernel_size: KernelSize) -> tuple[int, int]:
    pair = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    if len(pair) != 2:
        raise ValueError(f"{name}: kernel_size must be an integer or a pair, got {kernel_size!r}")
    for size in pair:
        check_integer(name, "kernel_size", size)
    return pair


class _Masked(nn.Module):
    """Weight and bias of a masked convolution, initialised by the number of live taps."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: KernelSize, mask: str, colors: int, bias: bool,
        halves: int,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        check_integer(name, "colors", colors)
        for size_name, size in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_integer(name, size_name, size)
            if size % colors:
                raise ValueError(f"{name}: colors must divide {size_name}, got {colors} for {size}")
        if mask not in MASKS:
            raise ValueError(f"{name}: mask must be one of {MASKS}, got {mask!r}")
        self.mask, self.colors, self.halves = mask, colors, halves
        self.weight = nn.Parameter(torch.empty(halves * out_channels, in_channels, *_pair(name, kernel_size)))
        self.bias: Tensor | None = nn.Parameter(torch.empty(halves * out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in torch.nn.Conv2d, but with the fan-in of the live taps."""
        taps = torch.zeros((), device="cpu").expand_as(self.weight)  # readable where the weight is not, on "meta"
        live = weight_mask(taps, self.mask, self.colors, self.halves).expand_as(taps)
        bound = 1 / math.sqrt(max(1.0, float(live.sum((1, 2, 3)).float().mean())))
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        outs, ins, *kernel = self.weight.shape
        colors = f", colors={self.colors}" if self.colors > 1 else ""
        return f"{ins}, {outs // self.halves}, kernel_size={tuple(kernel)}, mask={self.mask!r}{colors}"


class MaskedConv2d(_Masked):
    """Convolution whose pixels see only pixels before them: (B, C, H, W) -> (B, out_channels, H, W).

    Parameters
    ----------
    in_channels, out_channels
        Multiples of colors.
    kernel_size
        An integer or (height, width), odd or even; the pixel itself is at (height // 2, width // 2).
    mask
        "A", "B", "vertical" or "vertical_B": see `fastgen.ops.masked_conv2d`.
    colors
        Groups of channels that are ordered within a pixel.
    bias
        Whether there is one.
    relu
        Whether max(., 0) follows.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: KernelSize = 3, mask: str = "B", *, colors: int = 1,
        bias: bool = True, relu: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, mask, colors, bias, 1)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        return masked_conv2d(x, self.weight, self.bias, mask=self.mask, colors=self.colors, relu=self.relu)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', relu=True' if self.relu else ''}"

    def emit(self, p: PixelProgram, x: int, *, add: int = -1, halves: int = 1) -> int:
        """Append the layer to a sampling program: plane of x -> plane of the result, plane `add` among the sums.

        halves: 2 where a gate follows.
        """
        y = p.conv(x, self.weight, self.bias, mask=self.mask, colors=self.colors, add=add, halves=halves)
        return p.relu(y) if self.relu else y


class GatedMaskedConv2d(_Masked):
    """Masked convolution, tanh times sigmoid: (B, C, H, W) -> (B, out_channels, H, W).

    Parameters as those of `MaskedConv2d`. forward(x, cond): cond (B, 2 out_channels, H, W) or (B, 2 out_channels, 1, 1)
    is added inside the gate.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: KernelSize = 3, mask: str = "B", *, colors: int = 1,
        bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, out_channels, kernel_size, mask, colors, bias, 2)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        return gated_masked_conv2d(x, self.weight, self.bias, cond, mask=self.mask, colors=self.colors)

    def emit(self, p: PixelProgram, x: int, *, add: int = -1) -> int:
        """Append the layer to a sampling program: plane of x -> plane of the result; `add` enters the gate."""
        return p.gate(p.conv(x, self.weight, self.bias, mask=self.mask, colors=self.colors, add=add, halves=2))


class GatedPixelCNNBlock(nn.Module):
    """A vertical stack, which sees the rows above, and a horizontal one, which sees that and the row to the left.

    The vertical input at a row already holds only what lies above that row, so its convolution may look at the row
    itself: there is no blind spot.

    Parameters
    ----------
    channels
        Of both stacks.
    kernel_size
        Odd; the vertical convolution is kernel_size x kernel_size without the rows below, the horizontal one 1 x
        kernel_size without the pixels to the right.
    context_channels
        Channels of the conditioning, 0 for none.
    last
        Whether no further block reads v, which is then returned as it came.

    Shapes: forward(v (B, C, H, W), h (B, C, H, W), context (B, context_channels, H or 1, W or 1)) -> v, h.
    """

    def __init__(
        self, channels: int, kernel_size: int = 3, context_channels: int = 0, *, last: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        check_integer("GatedPixelCNNBlock", "channels", channels)
        check_integer("GatedPixelCNNBlock", "kernel_size", kernel_size)
        check_integer("GatedPixelCNNBlock", "context_channels", context_channels, 0)
        if kernel_size % 2 == 0:
            raise ValueError(f"GatedPixelCNNBlock: kernel_size must be odd, got {kernel_size}")
        self.context_channels = context_channels
        self.vertical = GatedMaskedConv2d(channels, channels, kernel_size, "vertical_B")
        self.vertical_out = None if last else MaskedConv2d(channels, channels, 1)
        self.link = MaskedConv2d(channels, 2 * channels, 1, bias=False)
        self.horizontal = GatedMaskedConv2d(channels, channels, (1, kernel_size), "B")
        self.horizontal_out = MaskedConv2d(channels, channels, 1)
        self.context = MaskedConv2d(context_channels, 4 * channels, 1, bias=False) if context_channels else None

    def forward(self, v: Tensor, h: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_input("GatedPixelCNNBlock", "context", context, self.context_channels, h)
        if v.shape != h.shape:
            raise ValueError(f"GatedPixelCNNBlock: v and h must have one shape, got {tuple(v.shape)}, {tuple(h.shape)}")
        vertical = horizontal = None
        if context is not None and self.context is not None:
            vertical, horizontal = self.context(context).chunk(2, 1)
        z = self.vertical(v, vertical)
        link = self.link(z)
        z_h = self.horizontal(h, link if horizontal is None else link + horizontal)
        return v if self.vertical_out is None else v + self.vertical_out(z), h + self.horizontal_out(z_h)

    def emit(self, p: PixelProgram, v: int, h: int, context: Tensor | None = None) -> tuple[int, int]:
        """Append the block to a sampling program; context: (B, context_channels, 1, 1), or None where the program has a
        plane of it."""
        biases: list[Any] = [self.vertical.bias, self.horizontal.bias]
        added = [-1, -1]
        for i, weight in enumerate(() if self.context is None else self.context.weight.chunk(2)):
            if context is None:
                added[i] = p.conv(p.context, weight, halves=2)
            else:
                biases[i] = biases[i] + context[:, :, 0, 0] @ weight[:, :, 0, 0].T
        z = p.gate(p.conv(v, self.vertical.weight, biases[0], mask="vertical_B", add=added[0], halves=2))
        link = self.link.emit(p, z, add=added[1], halves=2)
        z_h = p.gate(p.conv(h, self.horizontal.weight, biases[1], mask="B", add=link, halves=2))
        v = v if self.vertical_out is None else self.vertical_out.emit(p, z, add=v)
        return v, self.horizontal_out.emit(p, z_h, add=h)


def check_input(name: str, what: str, value: Tensor | None, channels: int, x: Tensor) -> None:
    """Raise unless `value` is there exactly where a layer was made for it, and can be added to what comes of x."""
    if (value is None) != (channels == 0):
        was = "is needed" if value is None else "was given"
        raise ValueError(f"{name}: {what} {was}, the layer has {what}_channels={channels}")
    if value is not None:
        check_tensor(name, what, value, f"(B, {channels}, H, W)")
        if value.dim() != 4 or value.shape[1] != channels:
            raise ValueError(f"{name}: {what} must be (B, {channels}, H, W), got {tuple(value.shape)}")
        check_tensor(name, "x", x, "(B, C, H, W)")
        if x.dim() != 4:
            raise ValueError(f"{name}: x must be (B, C, H, W), got {tuple(x.shape)}")
        wanted = (len(x), channels, *x.shape[2:])
        if any(n not in (1, m) for n, m in zip(value.shape, wanted, strict=True)):
            fits = f"({len(x)}, {channels}, {x.shape[2]}, {x.shape[3]})"
            raise ValueError(f"{name}: {what} must broadcast to {fits}, got {tuple(value.shape)}")
