"""The affine coupling, and a step of Glow without conditioner, beside eager PyTorch, torch.compile and the peers."""

import pytest
import torch
from conftest import peak_extra_bytes
from torch import nn

from fastgen.nn import InvertibleConv1x1
from fastgen.ops import affine_coupling
from fastgen.ops.affine_coupling import affine_coupling_reference

SHAPES = {"64x48x16x16": (64, 48, 16, 16), "64x12x32x32": (64, 12, 32, 32), "64x96x64x64": (64, 96, 64, 64)}


class Given(nn.Module):
    """A conditioner that costs nothing."""

    def __init__(self, params):
        super().__init__()
        self.params = params

    def forward(self, x, context=None):
        return self.params


def gradients(call, leaves, cotangent, total):
    y, log_det = call()
    return torch.autograd.grad([y, log_det], leaves, [cotangent, total.expand_as(log_det)])


def interleaved(params):
    s, t = params.chunk(2, 1)
    return torch.stack([t, s], 2).flatten(1, 2).detach().requires_grad_()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("scale", ["tanh", "exp"])
@pytest.mark.parametrize("shape", SHAPES)
def test_coupling(shape, scale, backward, contest, limits, benchmark):
    size = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(size).requires_grad_(backward)
    params = torch.randn(size).mul(0.3).requires_grad_(backward)
    cotangent, total = torch.randn(size), torch.ones(())
    compiled = torch.compile(affine_coupling_reference)
    ways = {
        "fastgen": (lambda: affine_coupling(x, params, scale=scale, backend="cpu"), params),
        "eager": (lambda: affine_coupling_reference(x, params, scale=scale), params),
        "torch.compile": (lambda: compiled(x, params, scale=scale), params),
    }
    if scale == "exp":
        normflows = pytest.importorskip("normflows", reason="pip install normflows")
        theirs = interleaved(params)
        peer = normflows.flows.AffineCouplingBlock(Given(theirs), split_mode="channel")
        ways["normflows"] = (lambda: peer(x), theirs)
    else:
        nflows = pytest.importorskip("nflows.transforms", reason="pip install nflows")
        half = size[1] // 2
        other = nflows.AffineCouplingTransform([0] * half + [1] * half, lambda a, b: Given(params))
        ways["nflows"] = (lambda: other(x), params)
    if backward:
        calls = {
            name: lambda way=way, leaf=leaf: gradients(way, (x, leaf), cotangent, total)
            for name, (way, leaf) in ways.items()
        }
    else:
        calls = {name: way for name, (way, _) in ways.items()}
    torch.testing.assert_close(calls["fastgen"]()[0], calls["eager"]()[0], atol=1e-4, rtol=1e-4)
    if scale == "exp":
        torch.testing.assert_close(calls["fastgen"]()[0], calls["normflows"]()[0], atol=1e-4, rtol=1e-4)
    median = contest(calls, rounds=9 if x.numel() > 1e7 else 31)
    # forward: x and params in, y out. Backward: y's gradient, half of x, the scales in; two gradients out.
    moved = x.numel() * 4 * (3 + (4 if backward else 0))
    benchmark.extra_info.update(
        case=f"{shape} {scale}, {'forward + backward' if backward else 'forward'}",
        coupling=True,
        of_copy=moved / median["fastgen"] / 1e9 / limits["copy_gbs"],
        limits=limits,
        peak_extra_bytes={name: peak_extra_bytes(calls[name]) for name in ("fastgen", "eager")},
    )


def test_glow_step(contest, limits, benchmark):
    """Actnorm, 1x1 convolution and coupling, forward and backward; the conditioner's parameters are given."""
    normflows = pytest.importorskip("normflows", reason="pip install normflows")
    nflows = pytest.importorskip("nflows.transforms", reason="pip install nflows")
    size = SHAPES["64x48x16x16"]
    torch.manual_seed(0)
    x = torch.randn(size).requires_grad_()
    params = torch.randn(size).mul(0.3).requires_grad_()
    theirs = interleaved(params)
    cotangent, total = torch.randn(size), torch.ones(())
    ours = InvertibleConv1x1(48, actnorm=True)

    def fastgen_step():
        h, one = ours(x)
        y, two = affine_coupling(h, params, scale="sigmoid", backend="cpu")
        return y, one + two

    peers = {
        "normflows": (
            normflows.flows.ActNorm((48, 1, 1)), normflows.flows.Invertible1x1Conv(48, True),
            normflows.flows.AffineCouplingBlock(Given(theirs), scale_map="sigmoid"),
        ),
        "nflows": (
            nflows.ActNorm(48), nflows.OneByOneConvolution(48),
            nflows.AffineCouplingTransform([0] * 24 + [1] * 24, lambda a, b: Given(params)),
        ),
    }  # fmt: skip

    def step(layers, inverse):
        def call():
            h, log_det = x, 0
            for layer in layers:
                h, of_layer = layer.inverse(h) if inverse else layer(h)
                log_det = log_det + of_layer
            return h, log_det

        return call

    def leaves(layers, last):
        return [x, last, *(p for layer in layers for p in layer.parameters() if p is not last)]

    of_ours = [x, params, *ours.parameters()]
    calls = {"fastgen": lambda: gradients(fastgen_step, of_ours, cotangent, total)}
    for name, layers in peers.items():
        last = theirs if name == "normflows" else params
        way, of_peer = step(layers, inverse=name == "normflows"), leaves(layers, last)  # from data to noise
        calls[name] = lambda way=way, of_peer=of_peer: gradients(way, of_peer, cotangent, total)
    contest(calls, rounds=21)
    benchmark.extra_info.update(
        case="Glow step without conditioner, 64x48x16x16, forward + backward",
        glow_step=True,
        peak_extra_bytes={name: peak_extra_bytes(calls[name]) for name in calls},
    )
