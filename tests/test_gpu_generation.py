"""On a GPU (FASTGEN_TEST_DEVICE=cuda): the CUDA kernels of sampling, beside the reference."""

import pytest
import torch
from op_helpers import DEVICE
from wavenet_helpers import network

from fastgen.models import GatedPixelCNN, PixelSNAIL
from fastgen.ops import WaveNetWeights, initial_state
from fastgen.ops.wavenet_generate import Generator


@pytest.fixture(autouse=True)
def _on_a_gpu():
    if DEVICE != "cuda":
        pytest.skip("set FASTGEN_TEST_DEVICE=cuda to run the tests on a GPU")


def generated(which, dtype=torch.float32, streams=1, steps=40, distribution="categorical", layers=6, width=16,
              local=0):  # fmt: skip
    """Samples, parameters and history of a network on the GPU, by `which` backend."""
    outputs = {"categorical": 40, "logistic": 6}[distribution]
    weights = network(layers, width, width, 2 * width, outputs, distribution=distribution)
    dilations = [2 ** (i % 4) for i in range(layers)]
    weights = WaveNetWeights(*(w.cuda() for w in weights))
    kind = torch.int64 if distribution == "categorical" else torch.float32
    state = initial_state(weights, dilations, torch.zeros(streams, dtype=kind, device="cuda"))
    generator = torch.Generator().manual_seed(0)
    pair = () if distribution == "categorical" else (2,)
    uniforms = torch.rand(streams, steps, *pair, generator=generator).cuda()
    bias = torch.zeros(1, layers, 2 * width, device="cuda")
    local_weight = torch.randn(layers, 2 * width, local, generator=generator).cuda() / 10 if local else None
    features = torch.randn(streams, steps, local, generator=generator).cuda() if local else None
    run = Generator(
        weights, dilations, distribution=distribution, local_weight=local_weight, dtype=dtype, backend=which
    ).run
    halves = [slice(0, steps // 2), slice(steps // 2, steps)]
    half = [
        run(state, uniforms[:, h], bias, local=None if features is None else features[:, h], parameters=True)
        for h in halves
    ]
    return *(torch.cat(parts, 1) for parts in zip(*half, strict=True)), state.history


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("streams", [1, 3, 50, 1000])
@pytest.mark.parametrize(
    "size", [{"layers": 6, "width": 16}, {"layers": 20, "width": 64}, {"layers": 9, "width": 32, "local": 80}], ids=str
)
@pytest.mark.parametrize("distribution", ["categorical", "logistic"])
def test_generation(distribution, size, streams, dtype, need):
    need("wavenet_generate", "cuda")
    got, expected = (generated(which, dtype, streams, 12, distribution, **size) for which in ("cuda", "reference"))
    near = (got[0] - expected[0]).abs() <= (0 if distribution == "categorical" else 1e-3)
    assert float(near.all(1).float().mean()) > 0.98  # streams: a uniform may fall at a boundary
    same = near.all(1)
    torch.testing.assert_close(got[1][same], expected[1][same], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got[2][same], expected[2][same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 200])
@pytest.mark.parametrize("model", ["gated", "colors", "attention"])
def test_images(model, batch, dtype, need):
    need("pixelcnn_generate", "cuda")
    models = {
        "gated": lambda: GatedPixelCNN(channels=32, layers=3, levels=4),
        "colors": lambda: GatedPixelCNN(image_channels=3, channels=24, layers=2, levels=8),
        "attention": lambda: PixelSNAIL(channels=16, levels=4),
    }
    torch.manual_seed(0)
    network = models[model]().cuda()
    uniforms = torch.rand(batch, network.image_channels, 7, 9, device="cuda")
    got, expected = (
        network.sample(batch, (7, 9), uniforms=uniforms, dtype=dtype, backend=which) for which in ("cuda", "reference")
    )
    assert float((got == expected).flatten(1).all(1).float().mean()) >= 1 - 1 / max(batch, 20)


def test_generation_smallest(need):
    """For compute-sanitizer."""
    need("wavenet_generate", "cuda")
    for streams in (1, 5):
        for distribution in ("categorical", "logistic"):
            generated("cuda", torch.bfloat16, streams, 6, distribution, layers=3, width=8, local=5)
    generated("cuda", torch.float32, 1, 2, layers=20, width=64)
    need("pixelcnn_generate", "cuda")
    for model in (GatedPixelCNN(channels=8, layers=2), PixelSNAIL(channels=8, levels=4)):
        model.cuda().sample(3, (2, 3), backend="cuda")
