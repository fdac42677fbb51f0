"""The gated masked convolution beside eager PyTorch, the same one cropped to its live rows, and torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from conftest import DTYPES, peak_extra_bytes

from fastgen.ops import gated_masked_conv2d
from fastgen.ops.masked_conv2d import mask_2d

SHAPES = {
    "7x7 B16 C64 28x28": (7, 16, 64, 28),
    "5x5 B16 C128 32x32": (5, 16, 128, 32),
    "3x3 B32 C64 28x28": (3, 32, 64, 28),
}


def arguments(kernel, batch, channels, side, dtype, grad=False):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_(grad)

    fan = channels * kernel * kernel // 2
    return (
        normal(batch, channels, side, side),
        normal(2 * channels, channels, kernel, kernel, scale=fan**-0.5),
        normal(2 * channels),
    )


def eager(x, weight, bias, mask):
    """What a user writes."""
    a = F.conv2d(x, weight * mask, bias, padding=weight.shape[2] // 2)
    tanh, sigmoid = a.chunk(2, 1)
    return torch.tanh(tanh) * torch.sigmoid(sigmoid)


def cropped(x, weight, bias, mask):
    """What a careful user writes: the rows below are not computed."""
    half = weight.shape[2] // 2
    a = F.conv2d(F.pad(x, (half, half, half, 0)), (weight * mask)[:, :, : half + 1], bias)
    tanh, sigmoid = a.chunk(2, 1)
    return torch.tanh(tanh) * torch.sigmoid(sigmoid)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated(dtype, shape, backward, contest, limits, benchmark):
    kernel, batch, channels, side = sizes = SHAPES[shape]
    args = arguments(*sizes, dtype, grad=backward)
    mask = mask_2d("B", (kernel, kernel)).to(dtype)
    cotangent = torch.randn(batch, channels, side, side).to(dtype)
    halves = dtype == torch.bfloat16
    compiled = torch.compile(eager)
    ways = {
        "fastgen": lambda: gated_masked_conv2d(*args, mask="B", backend="cpu"),
        "eager": lambda: eager(*args, mask),
        "cropped": lambda: cropped(*args, mask),
        "torch.compile": lambda: compiled(*args, mask),
    }
    if backward:
        contestants = {name: lambda way=way: torch.autograd.grad(way(), args, cotangent) for name, way in ways.items()}
        for a, b in zip(contestants["fastgen"](), contestants["eager"](), strict=True):
            atol = (0.02 if halves else 2e-3) * float(b.abs().max())
            torch.testing.assert_close(a, b, atol=atol, rtol=0.02 if halves else 1e-3)
    else:
        contestants, exact = ways, {"atol": 0.02, "rtol": 0.02} if halves else {"atol": 1e-4, "rtol": 1e-4}
        torch.testing.assert_close(ways["fastgen"](), ways["eager"](), **exact)
        torch.testing.assert_close(ways["cropped"](), ways["eager"](), **exact)
    median = contest(contestants, rounds=9 if backward else 15)
    flops = 2 * batch * side * side * 2 * channels * channels * int(mask.sum()) * (3 if backward else 1)
    benchmark.extra_info.update(
        case=f"{shape}{' bfloat16' * halves}, {'forward + backward' if backward else 'forward'}",
        masked=True,
        of_fma_peak=flops / median["fastgen"] / 1e9 / limits["gflops"],
        limits=limits,
        peak_extra_bytes={name: peak_extra_bytes(contestants[name]) for name in ("fastgen", "eager")},
    )
