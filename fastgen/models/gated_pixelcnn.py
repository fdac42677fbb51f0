"""Gated PixelCNN: two stacks of gated masked convolutions, without a blind spot.

Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (2016). Here both stacks have
residual connections, the link from the vertical to the horizontal stack starts behind the gate, and the colors of a
pixel are ordered in the head rather than in every layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.models.pixels import PixelModel
from fastgen.nn.masked_conv2d import GatedPixelCNNBlock, MaskedConv2d
from fastgen.ops.pixel_program import PixelProgram


class GatedPixelCNN(PixelModel):
    """Gated PixelCNN over images or maps of codes.

    Parameters
    ----------
    image_channels, levels, classes
        And all further options: see `PixelModel`.
    channels, layers
        Of each stack, and the number of blocks.
    kernel_size, first_kernel_size
        Odd; of the blocks, and of the layer before them.

    Raises
    ------
    ValueError
        For a parameter outside its range; the message names it.
    """

    def __init__(
        self,
        image_channels: int = 1,
        levels: int = 2,
        channels: int = 128,
        layers: int = 10,
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
            check_integer("GatedPixelCNN", name, size)
            if name.endswith("kernel_size") and size % 2 == 0:
                raise ValueError(f"GatedPixelCNN: {name} must be odd, got {size}")
        if first_kernel_size < 3:
            raise ValueError(f"GatedPixelCNN: first_kernel_size must be at least 3, got {first_kernel_size}")
        super().__init__(channels, image_channels=image_channels, levels=levels, classes=classes, **options)
        self.config |= sizes
        self.vertical = MaskedConv2d(self.inputs, channels, first_kernel_size, "vertical")
        self.horizontal = MaskedConv2d(self.inputs, channels, (1, first_kernel_size), "A")
        self.blocks = nn.ModuleList(
            GatedPixelCNNBlock(channels, kernel_size, self.context_channels, last=layer == layers - 1)
            for layer in range(layers)
        )

    def trunk(self, e: Tensor, context: Tensor | None) -> Tensor:
        v, h = self.vertical(e), self.horizontal(e)
        for block in self.blocks:
            v, h = block(v, h, context)
        return h  # type: ignore[no-any-return]

    def emit_trunk(self, p: PixelProgram, context: Tensor | None) -> int:
        v, h = self.vertical.emit(p, p.input), self.horizontal.emit(p, p.input)
        for block in self.blocks:
            assert isinstance(block, GatedPixelCNNBlock)
            v, h = block.emit(p, v, h, context)
        return h
