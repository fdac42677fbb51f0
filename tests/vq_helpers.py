"""What the tests of quantizing layers share: a layer beside the one of vector-quantize-pytorch, step by step."""

import pytest
import torch

from fastgen.nn import VectorQuantize

peer = pytest.importorskip("vector_quantize_pytorch", reason="pip install vector-quantize-pytorch==1.32")


def pair(options, dim=32, size=64, ours=VectorQuantize, theirs=None, **more):
    a = (theirs or peer.VectorQuantize)(dim=dim, codebook_size=size, **options, **more)
    b = ours(dim=dim, codebook_size=size, **options, **more)
    b.load_state_dict(a.state_dict(), strict=True)
    a.load_state_dict(b.state_dict(), strict=True)
    return a, b


def close(a, b, scale=1.0):
    if a.is_floating_point():
        torch.testing.assert_close(a, b, atol=2e-5 * scale, rtol=1e-4)
    else:
        assert torch.equal(a, b)


def follow(a, b, shape, steps=4, **call):
    """The same outputs, gradients and states through some steps of training, then in evaluation."""
    for step in range(steps + 1):
        training = step < steps
        a.train(training)
        b.train(training)
        x = torch.randn(shape)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outs = [m(i, **call) for m, i in zip((a, b), inputs, strict=True)]
        for u, v in zip(*outs, strict=True):
            assert u.shape == v.shape
            assert u.dtype == v.dtype
            close(u, v)
        if training:
            cotangent = torch.randn(outs[0][0].shape)
            grads = []
            for module, i, out in zip((a, b), inputs, outs, strict=True):
                module.zero_grad()
                ((out[0] * cotangent).sum() + 3 * out[2].sum()).backward()
                grads.append([i.grad, *(p.grad for p in module.parameters())])
            for u, v in zip(*grads, strict=True):
                if u is not None and v is not None:
                    close(u, v, scale=float(u.abs().max()) + 1)
        for key, value in a.state_dict().items():
            close(value, b.state_dict()[key])
