"""PixelRNN: LSTMs over the pixels of an image, along its rows or its diagonals.

Source: van den Oord et al., "Pixel Recurrent Neural Networks" (2016). Here the colors of a pixel are ordered in the
head rather than in every layer, and the second LSTM of a pair reads the pixels of its row as well.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.models.pixels import PixelModel
from fastgen.nn.conv2d import Conv2d
from fastgen.nn.masked_conv2d import MaskedConv2d
from fastgen.nn.pixel_lstm import DiagonalBiLSTM, RowLSTM
from fastgen.ops.pixel_program import PixelProgram

KINDS = ("row", "diagonal")


class PixelRNN(PixelModel):
    """PixelRNN over images or maps of codes.

    Parameters
    ----------
    image_channels, levels, classes
        And all further options: see `PixelModel`.
    channels, layers
        Channels of the features, even, and the number of LSTMs; each has half as many channels and a residual
        connection around it.
    kind
        "row": Row LSTMs, whose view is a triangle. "diagonal": Diagonal BiLSTMs, which see all pixels before.
    kernel_size, first_kernel_size
        Of Row LSTMs, odd, and of the convolution before them, odd.

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
        layers: int = 7,
        classes: int = 0,
        *,
        kind: str = "diagonal",
        kernel_size: int = 3,
        first_kernel_size: int = 7,
        **options: Any,
    ) -> None:
        sizes = {
            "channels": channels, "layers": layers, "kernel_size": kernel_size, "first_kernel_size": first_kernel_size,
        }  # fmt: skip
        for name, size in sizes.items():
            check_integer("PixelRNN", name, size)
            if (size % 2 == 0) == name.endswith("kernel_size") and name != "layers":
                wanted = "odd" if name.endswith("kernel_size") else "even"
                raise ValueError(f"PixelRNN: {name} must be {wanted}, got {size}")
        if first_kernel_size < 3:
            raise ValueError(f"PixelRNN: first_kernel_size must be at least 3, got {first_kernel_size}")
        if kind not in KINDS:
            raise ValueError(f"PixelRNN: kind must be one of {KINDS}, got {kind!r}")
        super().__init__(channels, image_channels=image_channels, levels=levels, classes=classes, **options)
        self.config |= sizes | {"kind": kind}
        self.first = MaskedConv2d(self.inputs, channels, first_kernel_size, "A")
        hidden, context = channels // 2, self.context_channels
        self.lstms = nn.ModuleList(
            RowLSTM(channels, hidden, kernel_size, context)
            if kind == "row"
            else DiagonalBiLSTM(channels, self.inputs, hidden, context)
            for _ in range(layers)
        )
        self.outs = nn.ModuleList(Conv2d(hidden, channels, 1) for _ in range(layers))

    def trunk(self, e: Tensor, context: Tensor | None) -> Tensor:
        h: Tensor = self.first(e)
        for lstm, out in zip(self.lstms, self.outs, strict=True):
            h = h + out(lstm(h, context) if isinstance(lstm, RowLSTM) else lstm(h, e, context))
        return h

    def emit_trunk(self, p: PixelProgram, context: Tensor | None) -> int:
        h = self.first.emit(p, p.input)
        for lstm, out in zip(self.lstms, self.outs, strict=True):
            assert isinstance(lstm, RowLSTM | DiagonalBiLSTM)
            assert isinstance(out, nn.Conv2d)
            h = p.linear(lstm.emit(p, h, context), out.weight[:, :, 0, 0], out.bias, add=h)
        return h
