"""NADE beside PyTorch: a training step, and samples."""

import pytest
import torch
import torch.nn.functional as F

from fastgen.ops import nade, nade_sample
from fastgen.ops.nade import nade_reference

STEPS, HIDDEN, BATCH = 784, 500, 100
CHUNK = 28  # inputs whose states the chunked version has at once: the fastest of 7, 14, 28, 56


def loop(x, in_weight, in_bias, out_weight, out_bias):
    state, out = in_bias.expand(len(x), -1), []
    for d in range(len(in_weight)):
        out.append(torch.sigmoid(state) @ out_weight[d].T + out_bias[d])
        state = state + in_weight[d] * x[:, d, None]
    return torch.stack(out, 1)


def chunked(x, in_weight, in_bias, out_weight, out_bias):
    state, out = in_bias.expand(len(x), -1), []
    for first in range(0, len(in_weight), CHUNK):
        part = slice(first, first + CHUNK)
        added = in_weight[part, 0] * x[:, part, None]
        states = torch.cat([state[:, None], state[:, None] + added.cumsum(1)], 1)
        out.append(torch.einsum("bdh,doh->bdo", torch.sigmoid(states[:, :-1]), out_weight[part]) + out_bias[part])
        state = states[:, -1]
    return torch.cat(out, 1)


def network():
    torch.manual_seed(0)
    weights = (
        torch.randn(STEPS, 1, HIDDEN) * 0.05, torch.zeros(HIDDEN), torch.randn(STEPS, 1, HIDDEN) * 0.05,
        torch.zeros(STEPS, 1),
    )  # fmt: skip
    return [w.requires_grad_() for w in weights]


def test_training_step(contest, limits, benchmark):
    weights = network()
    x = (torch.rand(BATCH, STEPS) < 0.2).long()

    def step(op):
        loss = F.binary_cross_entropy_with_logits(op(x, *weights)[..., 0], x.float(), reduction="sum")
        return torch.autograd.grad(loss, weights)

    compiled = torch.compile(nade_reference)
    ways = {
        "fastgen": lambda: step(lambda *a: nade(*a, backend="cpu")),
        "chunked PyTorch": lambda: step(chunked),
        "torch.compile": lambda: step(compiled),
        "loop over inputs": lambda: step(loop),
    }
    expected = ways["loop over inputs"]()
    for way in ways.values():
        for got, wanted in zip(way(), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))
    contest(ways, likelihood=True, case=f"NADE {STEPS} inputs, {HIDDEN} hidden, batch {BATCH}, training step")


@pytest.mark.parametrize("batch", [1, 100])
def test_sampling(batch, contest, limits, benchmark):
    weights = [w.detach() for w in network()]
    uniforms = torch.rand(batch, STEPS)
    ways = {
        "fastgen": lambda: nade_sample(*weights, uniforms, backend="cpu"),
        "loop over inputs": lambda: nade_sample(*weights, uniforms, backend="reference"),
    }
    assert float((ways["fastgen"]() == ways["loop over inputs"]()).all(1).float().mean()) > 0.9
    contest(ways, likelihood=True, case=f"NADE {STEPS} inputs, {HIDDEN} hidden, {batch} samples")
