"""Conditioning features from frames to samples: (B, channels, frames) -> (B, channels, frames * product of scales)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer


class TransposedUpsample(nn.Module):
    """Transposed convolutions over time and feature, one for each scale; each frame becomes samples of its own.

    Parameters
    ----------
    scales
        Factors, for example (4, 4, 4, 4) for a hop of 256 samples.
    freq_kernel_size
        Odd width of each kernel over the feature axis.
    relu
        Whether a ReLU follows each convolution, which suits features scaled to [0, 1].
    """

    context = 0  # frames before and after that a frame's samples depend on

    def __init__(self, scales: Sequence[int], freq_kernel_size: int = 3, relu: bool = False) -> None:
        super().__init__()
        check_integer("TransposedUpsample", "freq_kernel_size", freq_kernel_size)
        if freq_kernel_size % 2 == 0:
            raise ValueError(f"TransposedUpsample: freq_kernel_size must be odd, got {freq_kernel_size}")
        self.scale = math.prod(scales)
        self.relu = relu
        self.convs = nn.ModuleList(
            nn.ConvTranspose2d(1, 1, (freq_kernel_size, s), stride=(1, s), padding=(freq_kernel_size // 2, 0))
            for s in scales
        )
        for name, parameter in self.convs.named_parameters():
            nn.init.constant_(parameter, 1.0 / freq_kernel_size if name.endswith("weight") else 0.0)

    def forward(self, local: Tensor) -> Tensor:
        x = local[:, None]  # (B, 1, channels, frames)
        for conv in self.convs:
            x = conv(x)
            x = F.relu(x) if self.relu else x
        return x[:, 0]


class StretchUpsample(nn.Module):
    """Nearest-neighbour stretching, each step smoothed by a convolution; optionally a convolution over frames first.

    Parameters
    ----------
    scales
        Factors; each is smoothed over 2 * scale + 1 steps.
    freq_kernel_size
        Odd width of each smoothing kernel over the feature axis.
    channels, pad
        With channels > 0 a convolution over 2 * pad + 1 frames comes first and consumes `pad` frames at either end;
        without, the samples of `pad` frames at either end are cut off at the end.
    """

    def __init__(self, scales: Sequence[int], freq_kernel_size: int = 1, *, channels: int = 0, pad: int = 0) -> None:
        super().__init__()
        check_integer("StretchUpsample", "freq_kernel_size", freq_kernel_size)
        if freq_kernel_size % 2 == 0:
            raise ValueError(f"StretchUpsample: freq_kernel_size must be odd, got {freq_kernel_size}")
        self.scales = tuple(scales)
        self.scale = math.prod(scales)
        self.pad = pad
        self.context = pad + 2
        self.conv_in = nn.Conv1d(channels, channels, 2 * pad + 1, bias=False) if channels else None
        self.convs = nn.ModuleList(
            nn.Conv2d(1, 1, (freq_kernel_size, 2 * s + 1), padding=((freq_kernel_size - 1) // 2, s), bias=False)
            for s in scales
        )
        for weight in self.convs.parameters():
            nn.init.constant_(weight, 1.0 / weight.numel())

    def forward(self, local: Tensor) -> Tensor:
        if self.conv_in is not None:
            local = self.conv_in(local)
        x = local[:, None]  # (B, 1, channels, frames)
        for scale, conv in zip(self.scales, self.convs, strict=True):
            x = conv(torch.repeat_interleave(x, scale, dim=-1))
        cut = 0 if self.conv_in is not None else self.pad * self.scale
        return x[:, 0, :, cut : x.shape[3] - cut]
