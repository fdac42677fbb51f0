"""The gated residual layer beside eager PyTorch and torch.compile, with fresh and with reused outputs."""

import pytest
import torch
from conftest import DTYPES, peak_extra_bytes

from fastgen.ops import wavenet_layer
from fastgen.ops.wavenet_layer import wavenet_layer_reference

SHAPES = {
    f"B{batch} T{steps} R64 S{skip} K2{' bfloat16' * (dtype == torch.bfloat16)}": (batch, steps, 64, skip, dtype)
    for dtype in DTYPES
    for batch, steps, skip in ((8, 8192, 256), (1, 16000, 128))
}
DILATION = 4


def arguments(batch, steps, channels, skip, dtype, grad=False):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).requires_grad_(grad)

    return (
        normal(batch, channels, steps), normal(2 * channels, channels, 2, scale=(2 * channels) ** -0.5),
        normal(2 * channels), normal(channels + skip, channels, scale=channels**-0.5), normal(channels + skip),
    )  # fmt: skip


def facts(name, limits, seconds, flops, moved):
    return {
        "case": name,
        "gflops": flops / seconds / 1e9,
        "of_fma_peak": flops / seconds / 1e9 / limits["gflops"],
        "of_copy_bandwidth": moved / seconds / 1e9 / limits["copy_gbs"],
        "limits": limits,
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, contest, limits, benchmark):
    batch, steps, channels, skip, dtype = sizes = SHAPES[shape]
    halves = dtype == torch.bfloat16
    args = arguments(*sizes)
    compiled = torch.compile(wavenet_layer_reference)
    out = wavenet_layer(*args, dilation=DILATION, backend="cpu")
    with torch.no_grad():
        for a, b in zip(out, wavenet_layer_reference(*args, dilation=DILATION), strict=True):
            torch.testing.assert_close(a, b, atol=0.05 if halves else 2e-4, rtol=0.02 if halves else 1e-4)
        contestants = {
            "fastgen": lambda: wavenet_layer(*args, dilation=DILATION, backend="cpu"),
            "fastgen, reused outputs": lambda: wavenet_layer(*args, dilation=DILATION, out=out, backend="cpu"),
            "eager": lambda: wavenet_layer_reference(*args, dilation=DILATION),
            "torch.compile": lambda: compiled(*args, dilation=DILATION),
        }
        median = contest(contestants, rounds=15)
        memory = {name: peak_extra_bytes(contestants[name]) for name in contestants}
    macs = batch * steps * (2 * channels * 2 * channels + (channels + skip) * channels)
    moved = dtype.itemsize * batch * steps * (2 * channels + skip)
    benchmark.extra_info.update(
        facts(f"layer {shape}, forward", limits, median["fastgen"], 2 * macs, moved), peak_extra_bytes=memory
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_backward(shape, contest, limits, benchmark):
    batch, steps, channels, skip, dtype = sizes = SHAPES[shape]
    halves = dtype == torch.bfloat16
    args = arguments(*sizes, grad=True)
    cotangents = tuple(torch.randn(batch, rows, steps).to(dtype) for rows in (channels, skip))
    compiled = torch.compile(wavenet_layer_reference)

    def train(op, **options):
        return torch.autograd.grad(op(*args, dilation=DILATION, **options), args, cotangents)

    for a, b in zip(train(wavenet_layer, backend="cpu"), train(wavenet_layer_reference), strict=True):
        atol = (0.02 if halves else 2e-3) * float(b.abs().max())
        torch.testing.assert_close(a, b, atol=atol, rtol=0.02 if halves else 1e-3)
    contestants = {
        "fastgen": lambda: train(wavenet_layer, backend="cpu"),
        "eager": lambda: train(wavenet_layer_reference),
        "torch.compile": lambda: train(compiled),
    }
    median = contest(contestants, rounds=9)
    memory = {name: peak_extra_bytes(contestants[name]) for name in contestants}
    conv, outs = 2 * channels * 2 * channels, (channels + skip) * channels
    moved = dtype.itemsize * batch * steps * (5 * channels + 2 * skip)
    benchmark.extra_info.update(
        facts(
            f"layer {shape}, forward + backward", limits, median["fastgen"],
            2 * batch * steps * (4 * conv + 3 * outs), moved,
        ),
        peak_extra_bytes=memory,
    )  # fmt: skip
