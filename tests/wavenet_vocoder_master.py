"""wavenet_vocoder's later layout, by its keys and arithmetic, for tests: it was never released as a package.

The 1x1 convolutions of conditions have no bias, and skips are scaled together.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normed(module: nn.Module) -> nn.Module:
    return nn.utils.weight_norm(module)


class Layer(nn.Module):
    """One gated layer; conv is padded on both sides and cut, and the conditions' convolutions have no bias."""

    def __init__(
        self, residual: int, gates: int, skip: int, kernel_size: int, dilation: int, cin: int, gin: int
    ) -> None:
        super().__init__()
        padding = (kernel_size - 1) * dilation
        self.conv = normed(nn.Conv1d(residual, gates, kernel_size, padding=padding, dilation=dilation))
        self.conv1x1c = normed(nn.Conv1d(cin, gates, 1, bias=False)) if cin else None
        self.conv1x1g = normed(nn.Conv1d(gin, gates, 1, bias=False)) if gin else None
        self.conv1x1_out = normed(nn.Conv1d(gates // 2, residual, 1))
        self.conv1x1_skip = normed(nn.Conv1d(gates // 2, skip, 1))

    def forward(self, x: Tensor, c: Tensor | None, g: Tensor | None) -> tuple[Tensor, Tensor]:
        a = self.conv(x)[:, :, : x.shape[2]]
        if self.conv1x1c is not None:
            a = a + self.conv1x1c(c)
        if self.conv1x1g is not None:
            a = a + self.conv1x1g(g)
        tanh, sigmoid = a.split(a.shape[1] // 2, 1)
        z = torch.tanh(tanh) * torch.sigmoid(sigmoid)
        return (self.conv1x1_out(z) + x) * math.sqrt(0.5), self.conv1x1_skip(z)


class Stretch(nn.Module):
    def __init__(self, scale: int) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=(1, self.scale), mode="nearest")


class Upsample(nn.Module):
    """Stretching and smoothing in turn; without a convolution over frames, cin_pad frames are cut at either end."""

    def __init__(self, scales: tuple[int, ...], freq: int, cin_pad: int = 0) -> None:
        super().__init__()
        self.indent = cin_pad * math.prod(scales)
        self.up_layers = nn.ModuleList()
        for s in scales:
            self.up_layers.append(Stretch(s))
            conv = nn.Conv2d(1, 1, (freq, 2 * s + 1), padding=((freq - 1) // 2, s), bias=False)
            self.up_layers.append(normed(conv))

    def forward(self, c: Tensor) -> Tensor:
        c = c[:, None]
        for layer in self.up_layers:
            c = layer(c)
        c = c[:, 0]
        return c[:, :, self.indent : -self.indent] if self.indent else c


class ConvInUpsample(nn.Module):
    def __init__(self, scales: tuple[int, ...], freq: int, cin: int, cin_pad: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv1d(cin, cin, 2 * cin_pad + 1, bias=False)
        self.upsample = Upsample(scales, freq)

    def forward(self, c: Tensor) -> Tensor:
        return self.upsample(self.conv_in(c))


class Master(nn.Module):
    """The network of later versions, by its keys and arithmetic."""

    def __init__(
        self, out_channels: int = 256, layers: int = 6, stacks: int = 2, kernel_size: int = 3, cin: int = 0,
        gin: int = 0, speakers: int = 0, scalar_input: bool = False, upsample_net: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_channels, self.skip_scale = out_channels, math.sqrt(1 / layers)
        residual, gates, skip = 12, 20, 14
        self.first_conv = normed(nn.Conv1d(1 if scalar_input else out_channels, residual, 1))
        self.conv_layers = nn.ModuleList(
            Layer(residual, gates, skip, kernel_size, 2 ** (i % (layers // stacks)), cin, gin) for i in range(layers)
        )
        last = (nn.ReLU(), normed(nn.Conv1d(skip, skip, 1)), nn.ReLU(), normed(nn.Conv1d(skip, out_channels, 1)))
        self.last_conv_layers = nn.ModuleList(last)
        self.embed_speakers = nn.Embedding(speakers, gin) if speakers else None
        self.upsample_net = upsample_net

    def forward(self, x: Tensor, c: Tensor | None = None, g: Tensor | None = None) -> Tensor:
        if self.embed_speakers is not None:
            g = self.embed_speakers(g).mT.expand(-1, -1, x.shape[2])
        if self.upsample_net is not None:
            c = self.upsample_net(c)
            assert c.shape[2] == x.shape[2]
        x, skips = self.first_conv(x), 0
        for layer in self.conv_layers:
            x, skip = layer(x, c, g)
            skips = skips + skip
        x = skips * self.skip_scale
        for layer in self.last_conv_layers:
            x = layer(x)
        return x
