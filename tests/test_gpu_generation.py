"""On a GPU (FASTGEN_TEST_DEVICE=cuda): the CUDA kernels of sampling, beside the CPU's.

With bfloat16 weights, and where there are no CPU kernels, beside the reference: the CPU rounds the vectors too.
"""

import pytest
import torch
from op_helpers import DEVICE
from wavenet_helpers import network

from fastgen.backend import why_not
from fastgen.models import GatedPixelCNN, GPTPrior, PixelCNN, PixelRNN, PixelSNAIL, WaveNet
from fastgen.ops import WaveNetWeights, initial_state
from fastgen.ops.wavenet_generate import Generator

HAS_CPU = why_not("wavenet_generate", "cpu") is None
OUTPUTS = {"categorical": 40, "logistic": 6, "gaussian": 2}


@pytest.fixture(autouse=True)
def _on_a_gpu(need):
    if DEVICE != "cuda":
        pytest.skip("set FASTGEN_TEST_DEVICE=cuda to run the tests on a GPU")
    for op in ("wavenet_generate", "pixelcnn_generate"):
        need(op, "cuda")


def generated(which, dtype=torch.float32, streams=1, steps=40, distribution="categorical", layers=6, width=16, local=0,
              kernel_size=2, given=0, dilate=4, gain=1.0, **drawing):  # fmt: skip
    """Samples, parameters and history of a network that runs in two calls, by `which` backend; results on the CPU."""
    device = "cuda" if which == "cuda" else "cpu"
    random = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (scale * torch.randn(*size, generator=random)).to(device)

    weights = network(
        layers,
        width,
        width,
        2 * width,
        OUTPUTS[distribution],
        kernel_size=kernel_size,
        distribution=distribution,
        gain=gain,
    )
    weights = WaveNetWeights(*(w.to(device) for w in weights))
    dilations = [2 ** (i % dilate) for i in range(layers)]
    classes = distribution == "categorical"
    last = torch.zeros(streams, dtype=torch.int64 if classes else torch.float32, device=device)
    state = initial_state(weights, dilations, last)
    uniforms = torch.rand(streams, steps, *(() if classes else (2,)), generator=random).to(device)
    bias = normal(streams if given else 1, layers, 2 * width, scale=0.3)
    features = normal(streams, steps, local) if local else None
    known = last[:, None].expand(-1, given).contiguous() if given else None
    run = Generator(
        weights, dilations, distribution=distribution, dtype=dtype, backend=which,
        local_weight=normal(layers, 2 * width, local, scale=0.1) if local else None,
    ).run  # fmt: skip
    halves = [slice(0, steps // 2), slice(steps // 2, steps)]
    parts = [
        run(
            state, uniforms[:, half], bias, local=None if features is None else features[:, half],
            given=known if half.start == 0 else None, parameters=True, **drawing,
        )
        for half in halves
    ]  # fmt: skip
    return *(torch.cat(part, 1).cpu() for part in zip(*parts, strict=True)), state.history.cpu()


def yardstick(dtype):
    return "cpu" if HAS_CPU and dtype == torch.float32 else "reference"


def compare(dtype=torch.float32, **how):
    got, expected = (generated(which, dtype, **how) for which in ("cuda", yardstick(dtype)))
    near = (got[0] - expected[0]).abs() <= (0 if got[0].dtype == torch.int64 else 1e-3)
    same = near.all(1)
    assert float(same.float().mean()) > 0.98  # streams: a uniform may fall at a boundary
    for ours, theirs in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours[same], theirs[same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("streams", [1, 3, 50, 1000])
@pytest.mark.parametrize(
    "size", [{"layers": 6, "width": 16}, {"layers": 20, "width": 64}, {"layers": 9, "width": 32, "local": 80}], ids=str
)
@pytest.mark.parametrize("distribution", OUTPUTS)
def test_generation(distribution, size, streams, dtype):
    compare(dtype, streams=streams, steps=12, distribution=distribution, **size)


@pytest.mark.parametrize(
    "how",
    [
        {"layers": 30, "width": 128, "kernel_size": 3, "streams": 9},
        {"layers": 600, "width": 32, "streams": 2, "gain": 0.4},
        {"given": 3, "temperature": 0.7, "streams": 5, "distribution": "logistic"}, {"given": 5, "temperature": 1.3},
        {"top_k": 9, "streams": 3}, {"top_p": 0.7}, {"top_k": 100, "top_p": 0.9, "streams": 300},
        {"layers": 1, "width": 3, "kernel_size": 1}, {"layers": 9, "dilate": 9, "steps": 700},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_networks(how, dtype):
    compare(dtype, **{"steps": 12} | how)


def test_generation_on_a_side_stream_and_a_second_device():
    expected = generated("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        assert all(map(torch.equal, generated("cuda"), expected))
    if torch.cuda.device_count() > 1:
        with torch.cuda.device(1):
            assert all(map(torch.equal, generated("cuda"), expected))


def test_history_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of GPU memory")
    torch.manual_seed(0)
    model = WaveNet(10, 1, residual_channels=32, skip_channels=32).cuda()  # 1023 rows of 32 floats for each stream
    streams = (1 << 31) // (1023 * 32) + 40
    uniforms = torch.rand(1, 4, device="cuda").expand(streams, 4).contiguous()
    samples = model.generate(4, batch_size=streams, uniforms=uniforms, backend="cuda")
    assert bool((samples == samples[:1]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 200])
@pytest.mark.parametrize(
    "model", ["gated", "colors", "attention", "plain", "logistic", "transformer", "row", "diagonal"]
)
def test_images(model, batch, dtype):
    models = {
        "gated": lambda: GatedPixelCNN(channels=32, layers=3, levels=4),
        "colors": lambda: GatedPixelCNN(image_channels=3, channels=24, layers=2, levels=8),
        "attention": lambda: PixelSNAIL(channels=16, levels=4),
        "plain": lambda: PixelCNN(channels=16, layers=2),
        "logistic": lambda: GatedPixelCNN(channels=16, layers=2, levels=16, distribution="logistic", mixtures=3),
        "transformer": lambda: GPTPrior(20, (7, 9), channels=48, layers=2),
        "row": lambda: PixelRNN(channels=48, layers=3, kind="row", levels=4),
        "diagonal": lambda: PixelRNN(channels=48, layers=3, kind="diagonal", levels=4),
    }
    torch.manual_seed(0)
    network = models[model]()
    uniforms = torch.rand(batch, network.image_channels, 7, 9)
    expected = network.sample(batch, (7, 9), uniforms=uniforms, dtype=dtype, backend=yardstick(dtype))
    got = network.cuda().sample(batch, (7, 9), uniforms=uniforms.cuda(), dtype=dtype, backend="cuda").cpu()
    assert float((got == expected).flatten(1).all(1).float().mean()) >= 1 - 1 / max(batch, 20)


@pytest.mark.parametrize("how", [{"top_k": 5}, {"top_p": 0.5}, {"top_k": 100, "top_p": 0.8}], ids=str)
def test_images_of_the_most_probable_codes(how):
    torch.manual_seed(0)
    model, uniforms = GatedPixelCNN(codes=200, channels=32, layers=2), torch.rand(20, 7, 9)
    expected = model.sample(20, (7, 9), uniforms=uniforms, backend=yardstick(torch.float32), **how)
    got = model.cuda().sample(20, (7, 9), uniforms=uniforms.cuda(), backend="cuda", **how).cpu()
    assert float((got == expected).flatten(1).all(1).float().mean()) >= 0.95


def test_attention_over_more_pixels_than_shared_memory_has_scores_for():
    torch.manual_seed(0)
    model = PixelSNAIL(channels=8, levels=2)
    uniforms = torch.rand(1, 1, 96, 96)
    expected = model.sample(1, (96, 96), uniforms=uniforms, backend=yardstick(torch.float32))
    got = model.cuda().sample(1, (96, 96), uniforms=uniforms.cuda(), backend="cuda").cpu()
    assert float((got == expected).float().mean()) > 0.99


def test_generation_smallest():
    """For compute-sanitizer."""
    for streams in (1, 5):
        for distribution in ("categorical", "logistic"):
            generated("cuda", torch.bfloat16, streams, 6, distribution, layers=3, width=8, local=5)
    for dtype in (torch.float32, torch.bfloat16):  # a cluster with its weights on the chips
        generated("cuda", dtype, 1, 2, layers=20, width=64)
    generated("cuda", torch.float32, 1, 2, layers=600, width=32)
    for model in (
        GatedPixelCNN(channels=8, layers=2), PixelSNAIL(channels=8, levels=4), PixelRNN(channels=8, layers=2),
    ):  # fmt: skip
        model.cuda().sample(3, (2, 3), backend="cuda")
