"""PixelRNN's recurrence, along rows and along diagonals, beside PyTorch's loops over lines."""

import pytest
import torch
from conftest import peak_extra_bytes

from fastgen.ops import image_lstm
from fastgen.ops.image_lstm import image_lstm_reference


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("diagonal", [False, True], ids=["rows", "diagonals"])
def test_image_lstm(diagonal, backward, contest, limits, benchmark):
    batch, states, side, taps = 8, 64, 28, 2 if diagonal else 3
    generator = torch.Generator().manual_seed(0)
    gates = torch.randn(batch, 4 * states, side, side, generator=generator).requires_grad_(backward)
    weight = torch.randn(4 * states, states, taps, generator=generator) * (states * taps) ** -0.5
    args = gates, weight.requires_grad_(backward)
    cotangent = torch.randn(batch, states, side, side)
    ways = {
        "fastgen": lambda: image_lstm(*args, diagonal=diagonal, backend="cpu"),
        "eager": lambda: image_lstm_reference(*args, diagonal=diagonal),
    }
    torch.testing.assert_close(ways["fastgen"](), ways["eager"](), atol=1e-5, rtol=1e-4)
    if backward:
        ways = {name: lambda way=way: torch.autograd.grad(way(), args, cotangent) for name, way in ways.items()}
        for a, b in zip(ways["fastgen"](), ways["eager"](), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    median = contest(ways, rounds=9)
    flops = 2 * batch * side * side * 4 * states * states * taps * (3 if backward else 1)
    benchmark.extra_info.update(
        case=f"{'diagonals' if diagonal else 'rows'}, B8 64 states 28x28, forward{' + backward' * backward}",
        lstm=True,
        of_fma_peak=flops / median["fastgen"] / 1e9 / limits["gflops"],
        limits=limits,
        peak_extra_bytes={name: peak_extra_bytes(ways[name]) for name in ("fastgen", "eager")},
    )
