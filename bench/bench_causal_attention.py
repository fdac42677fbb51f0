"""Causal attention as in PixelSNAIL and transformers, beside PyTorch's fused attention."""

import pytest
import torch
from conftest import peak_extra_bytes

from fastgen.ops import causal_attention
from fastgen.ops.causal_attention import causal_attention_reference

SHAPES = {
    # batch, heads, places, channels of keys, of values, own
    "PixelSNAIL B8 28x28, 4 heads of 8 and 16": (8, 4, 784, 8, 16, False),
    "B16 T256, 4 heads of 32": (16, 4, 256, 32, 32, True),
    "B8 T1024, 4 heads of 64": (8, 4, 1024, 64, 64, True),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_causal_attention(shape, backward, contest, limits, benchmark):
    batch, heads, time, keys, values, own = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def normal(channels):
        if own:  # as a transformer has them
            return torch.randn(batch, time, heads, channels, generator=generator).transpose(1, 2)
        return torch.randn(batch, heads, channels, time, generator=generator).mT

    args = tuple(normal(c).requires_grad_(backward) for c in (keys, keys, values))
    cotangent = normal(values)
    compiled = torch.compile(lambda *v: causal_attention_reference(*v, own=own))
    ways = {
        "fastgen": lambda: causal_attention(*args, own=own, backend="cpu"),
        "eager": lambda: causal_attention_reference(*args, own=own),
        "torch.compile": lambda: compiled(*args),
    }
    torch.testing.assert_close(ways["fastgen"](), ways["eager"](), atol=1e-5, rtol=1e-4)
    if backward:
        ways = {name: lambda way=way: torch.autograd.grad(way(), args, cotangent) for name, way in ways.items()}
        for a, b in zip(ways["fastgen"](), ways["eager"](), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    median = contest(ways, rounds=9 if backward else 15)
    # the backward pass computes the scores again
    flops = batch * heads * time * time * (keys + values + (3 * keys + 2 * values if backward else 0))
    benchmark.extra_info.update(
        case=f"{shape}, {'forward + backward' if backward else 'forward'}",
        attention=True,
        of_fma_peak=flops / median["fastgen"] / 1e9 / limits["gflops"],
        limits=limits,
        peak_extra_bytes={name: peak_extra_bytes(ways[name]) for name in ("fastgen", "eager")},
    )
