"""The reparameterised sample with its divergence, beside eager PyTorch and torch.compile."""

import pytest
import torch

from fastgen.ops import gaussian_rsample_kl
from fastgen.ops.gaussian_rsample_kl import gaussian_rsample_kl_reference


@pytest.mark.parametrize("shape", [(256, 65536), (256, 64)], ids=str)
def test_forward_and_backward(shape, contest, limits, benchmark):
    torch.manual_seed(0)
    mean, s = (torch.randn(shape).mul(0.5).requires_grad_() for _ in range(2))
    noise, of_z, of_kl = torch.randn(shape), torch.randn(shape), torch.ones(shape[0])
    compiled = torch.compile(gaussian_rsample_kl_reference)

    def step(op):
        z, kl = op(mean, s, noise)
        return torch.autograd.grad([z, kl], [mean, s], [of_z, of_kl])

    ways = {
        "fastgen": lambda: step(lambda *a: gaussian_rsample_kl(*a, backend="cpu")),
        "eager": lambda: step(gaussian_rsample_kl_reference),
        "torch.compile": lambda: step(compiled),
    }
    expected = ways["eager"]()
    for way in ways.values():
        torch.testing.assert_close(way(), expected, rtol=1e-4, atol=1e-4)
    contest(ways, likelihood=True, case=f"Gaussian sample and KL {shape[0]}x{shape[1]}, forward + backward")
