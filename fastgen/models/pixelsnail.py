"""PixelSNAIL: masked residual convolutions and causal attention over all pixels before.

Source: Chen et al., "PixelSNAIL: An Improved Autoregressive Generative Model" (2018). Here the colors of a pixel are
ordered in the head rather than in every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.models.pixels import PixelModel
from fastgen.nn.masked_conv2d import MaskedConv2d
from fastgen.nn.pixelsnail import PixelSNAILBlock
from fastgen.ops.pixel_program import PixelProgram


class PixelSNAIL(PixelModel):
    """PixelSNAIL over images or maps of codes.

    Parameters
    ----------
    image_channels, levels, classes
        And all further options: see `PixelModel`.
    channels, layers
        Channels of the features, and the number of blocks.
    residual_layers, hidden_channels
        In each block, and the channels within them (channels by default).
    heads, key_channels, value_channels
        Of each block's attention; the channels are those of all heads together.
    kernel_size, first_kernel_size
        Of the blocks' masked convolutions, and of the layer before them.

    Raises
    ------
    ValueError
        For a parameter outside its range; the message names it.
    """

    def __init__(
        self,
        image_channels: int = 1,
        levels: int = 2,
        channels: int = 64,
        layers: int = 4,
        classes: int = 0,
        *,
        residual_layers: int = 2,
        hidden_channels: int | None = None,
        heads: int = 4,
        key_channels: int = 32,
        value_channels: int = 64,
        kernel_size: int = 3,
        first_kernel_size: int = 5,
        **options: Any,
    ) -> None:
        hidden_channels = channels if hidden_channels is None else hidden_channels
        sizes = {
            "channels": channels, "layers": layers, "residual_layers": residual_layers, "heads": heads,
            "hidden_channels": hidden_channels, "key_channels": key_channels, "value_channels": value_channels,
            "kernel_size": kernel_size, "first_kernel_size": first_kernel_size,
        }  # fmt: skip
        for name, size in sizes.items():
            check_integer("PixelSNAIL", name, size, 0 if name == "residual_layers" else 1)
        if first_kernel_size < 2:
            raise ValueError(f"PixelSNAIL: first_kernel_size must be at least 2, got {first_kernel_size}")
        super().__init__(channels, image_channels=image_channels, levels=levels, classes=classes, **options)
        self.config |= sizes
        self.first = MaskedConv2d(self.inputs, channels, first_kernel_size, "A")
        self.blocks = nn.ModuleList(
            PixelSNAILBlock(
                channels, hidden_channels, residual_layers, kernel_size, key_channels, value_channels, heads,
                2, self.inputs, self.context_channels,
            )
            for _ in range(layers)
        )  # fmt: skip

    def trunk(self, e: Tensor, context: Tensor | None) -> Tensor:
        h, where = self.first(e), positions(e)
        if context is not None:
            context = context.expand(-1, -1, *e.shape[2:])
        for block in self.blocks:
            h = block(h, where, e, context)
        return h  # type: ignore[no-any-return]

    def plane(self, size: tuple[int, int], context: Tensor | None) -> Tensor:
        """Where each pixel is, and the context."""
        like = self.head.out.weight if context is None else context
        where = positions(like.new_empty(1, 1, *size))
        if context is None:
            return where
        return torch.cat([where.expand(len(context), -1, -1, -1), context.expand(-1, -1, *size)], 1)

    def emit_trunk(self, p: PixelProgram, context: Tensor | None) -> int:
        h = self.first.emit(p, p.input)
        for block in self.blocks:
            assert isinstance(block, PixelSNAILBlock)
            h = block.emit(p, h, p.context)
        return h


def positions(like: Tensor) -> Tensor:
    """(1, 2, H, W): row and column of each pixel, from -0.5 to 0.5."""
    height, width = like.shape[2:]
    rows = torch.linspace(-0.5, 0.5, height, dtype=like.dtype, device=like.device)
    columns = torch.linspace(-0.5, 0.5, width, dtype=like.dtype, device=like.device)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]
