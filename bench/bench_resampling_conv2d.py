"""Convolutions of 4x4 that halve images, their transposes and the ReLU, beside eager PyTorch and torch.compile."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastgen.ops import downsample_conv2d, upsample_conv2d

SHAPES = {
    # batch, channels, outs, side of the smaller image
    "64 to 128, B32 16x16 to 8x8": (downsample_conv2d, 32, 64, 128, 8),
    "128 to 128, B8 64x64 to 32x32": (downsample_conv2d, 8, 128, 128, 32),
    "3 to 64, B32 32x32 to 16x16": (downsample_conv2d, 32, 3, 64, 16),
    "128 to 64, B32 8x8 to 16x16": (upsample_conv2d, 32, 128, 64, 8),
    "128 to 128, B8 32x32 to 64x64": (upsample_conv2d, 8, 128, 128, 32),
    "64 to 3, B32 16x16 to 32x32": (upsample_conv2d, 32, 64, 3, 16),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_resampling_conv2d(shape, backward, beside_pytorch):
    op, batch, channels, outs, side = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).requires_grad_(backward)

    down = op is downsample_conv2d
    before, first, second = (2 * side, outs, channels) if down else (side, channels, outs)
    args = (
        normal(batch, channels, before, before),
        normal(first, second, 4, 4, scale=(8 * channels) ** -0.5),
        normal(outs),
    )
    plain = F.conv2d if down else F.conv_transpose2d

    def eager(x, weight, bias):
        """What a user writes."""
        return F.relu(plain(x, weight, bias, stride=2, padding=1))

    ours = functools.partial(op, relu=True, backend="cpu")
    macs = batch * side * side * outs * channels * 16
    beside_pytorch("resampling", shape, ours, eager, args, macs, backward, tolerance=2e-3)
