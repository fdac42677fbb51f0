"""WaveNet sampling beside wavenet_vocoder's incremental_forward, which it is loaded from, and the PyTorch queue."""

import os
import warnings

import pytest
import torch
from conftest import peak_extra_bytes

from fastgen import backend
from fastgen.models import WaveNet

vocoder = pytest.importorskip("wavenet_vocoder", reason="pip install wavenet_vocoder==0.1.1")

NETWORKS = {  # layers, cycles, residual, gate and skip channels, kernel size; and steps to generate
    "20 layers R64 S128 K2": (20, 2, 64, 128, 128, 2, 16000),
    "30 layers R64 S256 K2": (30, 3, 64, 128, 256, 2, 16000),
    "24 layers R512 S256 K3": (24, 4, 512, 512, 256, 3, 400),  # of wavenet_vocoder's speech; 120 MB in float32
}


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def networks(name):
    layers, cycles, residual, gate, skip, kernel_size, _ = NETWORKS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = vocoder.WaveNet(
            out_channels=256, layers=layers, stacks=cycles, residual_channels=residual, gate_channels=gate,
            skip_out_channels=skip, kernel_size=kernel_size, dropout=0.0,
        ).eval()  # fmt: skip
        model = WaveNet.from_wavenet_vocoder(peer, stacks=cycles)
        peer.make_generation_fast_()
    return model, peer


def verify(model, peer):
    """The same network: equal logits for the same samples."""
    x = model.generate(200, backend="cpu")
    shifted = torch.cat([torch.full((1, 1), 127), x[:, :-1]], 1)
    with torch.no_grad():
        ours, theirs = model(x), peer(torch.nn.functional.one_hot(shifted, 256).float().mT)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_batch_1(network, threads, contest, benchmark):
    model, peer = networks(network)
    verify(model, peer)
    all_steps = NETWORKS[network][-1]
    uniforms = torch.rand(1, all_steps)

    def ours(dtype):
        return lambda: model.generate(all_steps, uniforms=uniforms, dtype=dtype, backend="cpu")

    few, slow = 200, 100

    def theirs():
        with torch.no_grad():
            return peer.incremental_forward(T=few)

    median = contest(
        {
            "float32": ours(torch.float32),
            "bfloat16": ours(torch.bfloat16),
            "wavenet_vocoder": theirs,
            "PyTorch queue": lambda: model.generate(slow, uniforms=uniforms[:, :slow], backend="reference"),
        },
        rounds=7,
    )
    steps = {"wavenet_vocoder": few, "PyTorch queue": slow}
    benchmark.extra_info.update(
        case=f"generate {network}, batch 1, {threads} thread{'s' * (threads > 1)}",
        samples_per_second={name: steps.get(name, all_steps) / s for name, s in median.items()},
        peak_extra_bytes={"float32": peak_extra_bytes(ours(torch.float32))},
        isa=backend.cpu_isa,
        isa_forced=bool(os.environ.get("FASTGEN_CPU_ISA")),
    )


@pytest.mark.parametrize("batch", [16, 64])
@pytest.mark.parametrize("name", ["20 layers R64 S128 K2", "24 layers R512 S256 K3"])
def test_batches(name, batch, contest, benchmark):
    model, _ = networks(name)
    steps = NETWORKS[name][-1] // 8
    uniforms = torch.rand(batch, steps)
    one = model.generate(steps, uniforms=uniforms[:1], backend="cpu")
    many = model.generate(steps, uniforms=uniforms, batch_size=batch, backend="cpu")
    assert float((one[0] == many[0]).float().mean()) > 0.5  # equal up to a first near-tie

    def ours(dtype):
        return lambda: model.generate(steps, uniforms=uniforms, batch_size=batch, dtype=dtype, backend="cpu")

    median = contest({"float32": ours(torch.float32), "bfloat16": ours(torch.bfloat16)}, rounds=5)
    benchmark.extra_info.update(
        case=f"generate {name}, batch {batch}, {torch.get_num_threads()} threads",
        samples_per_second={name: batch * steps / s for name, s in median.items()},
        isa=backend.cpu_isa,
    )
