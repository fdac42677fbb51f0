"""A convolution and its ReLU, as in conditioners of Glow and elsewhere, beside eager PyTorch and torch.compile."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastgen.ops import conv2d

SHAPES = {
    "6 to 128 3x3, B8 32x32": (8, 6, 128, 32, 3),
    "128 to 128 1x1, B8 32x32": (8, 128, 128, 32, 1),
    "128 to 12 3x3, B8 32x32": (8, 128, 12, 32, 3),
    "64 to 64 3x3, B16 28x28": (16, 64, 64, 28, 3),
    "128 to 128 3x3, B8 32x32": (8, 128, 128, 32, 3),
    "256 to 256 3x3, B8 16x16": (8, 256, 256, 16, 3),
    "128 to 32 3x3, B32 8x8": (32, 128, 32, 8, 3),
}


def eager(x, weight, bias):
    """What a user writes."""
    return F.relu(F.conv2d(x, weight, bias, padding=weight.shape[2] // 2))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_conv2d(shape, backward, beside_pytorch):
    batch, channels, outs, side, kernel = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).requires_grad_(backward)

    args = (
        normal(batch, channels, side, side),
        normal(outs, channels, kernel, kernel, scale=(channels * kernel * kernel) ** -0.5),
        normal(outs),
    )
    ours = functools.partial(conv2d, relu=True, backend="cpu")
    macs = batch * side * side * outs * channels * kernel * kernel
    beside_pytorch("conv2d", shape, ours, eager, args, macs, backward, tolerance=2e-3)
