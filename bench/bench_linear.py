"""A linear layer, as in transformers and perceptrons, beside PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from conftest import peak_extra_bytes

from fastgen.ops import linear

SHAPES = {  # rows, inputs, outputs
    "4096 rows, 128 to 512": (4096, 128, 512), "4096 rows, 512 to 128": (4096, 512, 128),
    "100 rows, 784 to 500": (100, 784, 500), "2048 rows, 2048 to 2048": (2048, 2048, 2048),
}  # fmt: skip


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape, backward, contest, limits, benchmark):
    rows, inputs, outputs = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).requires_grad_(backward)

    args = normal(rows, inputs), normal(outputs, inputs, scale=inputs**-0.5), normal(outputs)
    cotangent = torch.randn(rows, outputs)
    compiled = torch.compile(F.linear)
    ways = {
        "fastgen": lambda: linear(*args, backend="cpu"),
        "eager": lambda: F.linear(*args),
        "torch.compile": lambda: compiled(*args),
    }
    torch.testing.assert_close(ways["fastgen"](), ways["eager"](), atol=1e-4, rtol=1e-4)
    if backward:
        ways = {name: lambda way=way: torch.autograd.grad(way(), args, cotangent) for name, way in ways.items()}
        for a, b in zip(ways["fastgen"](), ways["eager"](), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-3)
    median = contest(ways, rounds=9 if backward else 15)
    benchmark.extra_info.update(
        case=f"{shape}, {'forward + backward' if backward else 'forward'}",
        linear=True,
        of_fma_peak=2 * rows * inputs * outputs * (3 if backward else 1) / median["fastgen"] / 1e9 / limits["gflops"],
        limits=limits,
        peak_extra_bytes={name: peak_extra_bytes(ways[name]) for name in ("fastgen", "eager")},
    )
