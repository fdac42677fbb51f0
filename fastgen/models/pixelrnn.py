"""PixelRNN: LSTMs over the pixels of an image, along its rows or its diagonals.

Source: van den Oord et al., "Pixel Recurrent Neural Networks" (2016). Here the colors of a pixel are ordered in the
head rather than in every layer, and the second LSTM of a pair reads the pixels of its row as well.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.models.stepwise import StepwiseModel
from fastgen.nn.conv2d import Conv2d
from fastgen.nn.masked_conv2d import MaskedConv2d
from fastgen.nn.pixel_lstm import DiagonalBiLSTM, DiagonalSteps, RowLSTM, RowSteps
from fastgen.ops.masked_conv2d import weight_mask

KINDS = ("row", "diagonal")


class PixelRNN(StepwiseModel):
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

    def stepper(self, batch: int, size: tuple[int, int], context: Tensor | None) -> PixelRNNSteps:
        return PixelRNNSteps(self, batch, size, context)


class PixelRNNSteps:
    """A `Stepper`."""

    def __init__(self, model: PixelRNN, batch: int, size: tuple[int, int], context: Tensor | None) -> None:
        weight = model.first.weight
        self.model, kernel = model, weight.shape[2]
        self.weight = weight.where(weight_mask(weight, "A", 1, 1), 0)[:, :, : kernel // 2 + 1].flatten(1)
        self.kernel, reach = kernel, kernel // 2
        self.plane = weight.new_zeros(batch, model.inputs, reach + size[0], size[1] + 2 * reach)
        self.lstms: list[RowSteps | DiagonalSteps] = [lstm.steps(batch, size, context) for lstm in model.lstms]  # type: ignore[operator]

    def features(self, i: int, j: int) -> Tensor:
        window = self.plane[:, :, i : i + self.kernel // 2 + 1, j : j + self.kernel].flatten(1)
        h = F.linear(window, self.weight, self.model.first.bias)
        for lstm, out in zip(self.lstms, self.model.outs, strict=True):
            assert isinstance(out, nn.Conv2d)
            h = h + F.linear(lstm(i, j, h), out.weight[:, :, 0, 0], out.bias)
        return h

    def put(self, i: int, j: int, e: Tensor) -> None:
        reach = self.kernel // 2
        self.plane[:, :, i + reach, j + reach] = e
        for lstm in self.lstms:
            if isinstance(lstm, DiagonalSteps):
                lstm.put(j, e)
