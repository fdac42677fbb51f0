"""A whole layer beside vector-quantize-pytorch's: a step of training, and evaluation."""

import pytest
import torch
from bench_nearest_code import SHAPES
from conftest import peak_extra_bytes

from fastgen import backend
from fastgen.nn import VectorQuantize


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer(shape, mode, contest, benchmark):
    peer = pytest.importorskip("vector_quantize_pytorch", reason="pip install vector-quantize-pytorch==1.32")
    rows, codes, features = shape
    torch.manual_seed(0)
    theirs = peer.VectorQuantize(features, codes, decay=0.99)
    ours = VectorQuantize(features, codes, decay=0.99)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(1, rows, features, requires_grad=True)
    grad = torch.randn(1, rows, features)

    def train(layer):
        quantized, _, loss = layer(x)
        return torch.autograd.grad([quantized, loss], x, [grad, torch.ones(())])[0]

    def evaluate(layer):
        with torch.no_grad():
            return layer(x)[0]

    call = train if mode == "training" else evaluate
    for layer in (theirs, ours):
        layer.train(mode == "training")
    codebook = ours.codebook.clone()
    chosen = [layer(x)[1][0] for layer in (theirs, ours)]
    apart = (chosen[0] != chosen[1]).nonzero()[:, 0]  # theirs compares roots of distances in float32
    assert len(apart) < 0.005 * rows
    far, near = ((x.detach()[0, apart] - codebook[c[apart]]).double().square().sum(1) for c in chosen)
    assert bool((near <= far * (1 + 1e-6)).all())
    contestants = {"fastgen": lambda: call(ours), "vector-quantize-pytorch": lambda: call(theirs)}
    contest(contestants, rounds=5)
    benchmark.extra_info.update(
        case=f"{mode} N{rows} K{codes} D{features}",
        layer=True,
        peak_extra_bytes={name: peak_extra_bytes(f) for name, f in contestants.items()},
        isa=backend.cpu_isa,
    )
