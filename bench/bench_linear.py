"""A linear layer, as in transformers and perceptrons, beside PyTorch's."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastgen.ops import linear

SHAPES = {  # rows, inputs, outputs
    "4096 rows, 128 to 512": (4096, 128, 512), "4096 rows, 512 to 128": (4096, 512, 128),
    "100 rows, 784 to 500": (100, 784, 500), "2048 rows, 2048 to 2048": (2048, 2048, 2048),
}  # fmt: skip


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(shape, backward, beside_pytorch):
    rows, inputs, outputs = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(*size, generator=generator) * scale).requires_grad_(backward)

    args = normal(rows, inputs), normal(outputs, inputs, scale=inputs**-0.5), normal(outputs)
    ours = functools.partial(linear, backend="cpu")
    beside_pytorch("linear", shape, ours, F.linear, args, rows * inputs * outputs, backward, tolerance=1e-4)
