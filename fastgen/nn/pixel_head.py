"""From a PixelCNN's features to the parameters of each color's distribution, the colors of a pixel in order."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn.masked_conv2d import MaskedConv2d
from fastgen.ops.pixel_program import PixelProgram


class PixelHead(nn.Module):
    """ReLU, 1x1, ReLU, 1x1; each color also sees the colors of its pixel that come before it.

    Parameters
    ----------
    channels
        Of the features h, which know only pixels before.
    hidden
        Channels in between; rounded up to a multiple of colors.
    colors
        Values of a pixel, drawn one after another.
    outputs
        Parameters of each.
    inputs
        Channels that a pixel's values have as input; a multiple of colors.

    Shapes: forward(h (B, channels, H, W), x (B, inputs, H, W)) -> (B, colors, outputs, H, W).
    """

    def __init__(self, channels: int, hidden: int, colors: int, outputs: int, inputs: int) -> None:
        super().__init__()
        hidden = -(-hidden // colors) * colors
        self.colors = colors
        self.hidden = MaskedConv2d(channels, hidden, 1, relu=colors == 1)
        self.color = MaskedConv2d(inputs, hidden, 1, "A", colors=colors, bias=False) if colors > 1 else None
        self.out = MaskedConv2d(hidden, colors * outputs, 1, "B", colors=colors)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        u = self.hidden(F.relu(h))
        if self.color is not None:
            u = F.relu(u + self.color(x))
        return self.out(u).unflatten(1, (self.colors, -1))  # type: ignore[no-any-return]

    def emit(self, p: PixelProgram, h: int) -> None:
        """Append the head to a sampling program, and the drawing of each color."""
        hidden = self.hidden.emit(p, p.relu(h))
        assert self.out.bias is not None
        for color, (weight, bias) in enumerate(
            zip(self.out.weight.chunk(self.colors), self.out.bias.chunk(self.colors), strict=True)
        ):
            u = hidden
            if self.color is not None:
                u = p.relu(self.color.emit(p, p.input, add=hidden) if color > 0 else hidden)
            group = weight.shape[1] // self.colors
            seen = weight.detach().clone()
            seen[:, (color + 1) * group :] = 0
            p.sample(p.conv(u, seen, bias), color)
