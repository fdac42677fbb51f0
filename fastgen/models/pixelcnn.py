"""PixelCNN: residual blocks of masked convolutions.

Source: van den Oord et al., "Pixel Recurrent Neural Networks" (2016). Here the colors of a pixel are ordered in the
head rather than in every layer.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.models.pixels import PixelModel
from fastgen.nn.masked_conv2d import MaskedConv2d
from fastgen.ops.pixel_program import PixelProgram


class PixelCNNBlock(nn.Module):
    """ReLU, 1x1 (2h -> h), ReLU, masked k x k (h -> h), ReLU, 1x1 (h -> 2h), added to the input.

    Shapes: forward(x (B, 2h, H, W), context (B, context_channels, H or 1, W or 1)) -> (B, 2h, H, W).
    """

    def __init__(self, channels: int, kernel_size: int, context_channels: int = 0) -> None:
        super().__init__()
        half = channels // 2
        self.reduce = MaskedConv2d(channels, half, 1, relu=True)
        self.conv = MaskedConv2d(half, half, kernel_size, relu=not context_channels)
        self.expand = MaskedConv2d(half, channels, 1)
        self.context = MaskedConv2d(context_channels, half, 1, bias=False) if context_channels else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        u = self.conv(self.reduce(F.relu(x)))
        if self.context is not None:
            u = F.relu(u if context is None else u + self.context(context))
        return x + self.expand(u)  # type: ignore[no-any-return]

    def emit(self, p: PixelProgram, x: int, context: Tensor | None) -> int:
        """Append the block to a sampling program; context as in `PixelModel.emit_trunk`."""
        bias, add = self.conv.bias, -1
        assert bias is not None
        if self.context is not None:
            if context is None:
                add = self.context.emit(p, p.context)
            else:
                bias = bias + context[:, :, 0, 0] @ self.context.weight[:, :, 0, 0].T
        u = self.reduce.emit(p, p.relu(x))
        u = p.relu(p.conv(u, self.conv.weight, bias, mask="B", add=add))
        return self.expand.emit(p, u, add=x)


class PixelCNN(PixelModel):
    """PixelCNN over images or maps of codes.

    Parameters
    ----------
    image_channels, levels, classes
        And all further options: see `PixelModel`.
    channels, layers
        Channels 2h between the blocks (even), and their number.
    kernel_size, first_kernel_size
        Of the blocks' masked convolutions, and of the layer before them.

    Raises
    ------
    ValueError
        For a parameter outside its range; the message names it.

    Notes
    -----
    Its receptive field has a blind spot to the right above each pixel; `GatedPixelCNN` has none.
    """

    def __init__(
        self,
        image_channels: int = 1,
        levels: int = 2,
        channels: int = 128,
        layers: int = 12,
        classes: int = 0,
        *,
        kernel_size: int = 3,
        first_kernel_size: int = 7,
        **options: Any,
    ) -> None:
        sizes = {
            "channels": channels, "layers": layers, "kernel_size": kernel_size, "first_kernel_size": first_kernel_size,
        }  # fmt: skip
        for name, size in sizes.items():
            check_integer("PixelCNN", name, size)
        if channels % 2:
            raise ValueError(f"PixelCNN: channels must be even, got {channels}")
        if first_kernel_size < 2:
            raise ValueError(f"PixelCNN: first_kernel_size must be at least 2, got {first_kernel_size}")
        super().__init__(channels, image_channels=image_channels, levels=levels, classes=classes, **options)
        self.config |= sizes
        self.first = MaskedConv2d(self.inputs, channels, first_kernel_size, "A")
        self.blocks = nn.ModuleList(PixelCNNBlock(channels, kernel_size, self.context_channels) for _ in range(layers))

    def trunk(self, e: Tensor, context: Tensor | None) -> Tensor:
        h = self.first(e)
        for block in self.blocks:
            h = block(h, context)
        return h  # type: ignore[no-any-return]

    def emit_trunk(self, p: PixelProgram, context: Tensor | None) -> int:
        h = self.first.emit(p, p.input)
        for block in self.blocks:
            assert isinstance(block, PixelCNNBlock)
            h = block.emit(p, h, context)
        return h
