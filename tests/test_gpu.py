"""On a GPU (FASTGEN_TEST_DEVICE=cuda): the ops' own tests there, streams, graphs, autocast, offsets beyond 32 bits."""

import pytest
import torch
from op_helpers import DEVICE
from test_triton import OPS

from fastgen import backend
from fastgen.ops import (
    actnorm,
    affine_coupling,
    code_statistics,
    gated_masked_conv2d,
    masked_conv2d,
    nearest_code,
    vector_quantize,
    wavenet_layer,
)


@pytest.fixture(autouse=True)
def _on_a_gpu(need):
    if DEVICE != "cuda":
        pytest.skip("set FASTGEN_TEST_DEVICE=cuda to run the tests on a GPU")
    for op in OPS:
        need(op, "triton")


def coupling(batch=3, channels=6, size=(33, 7), dtype=torch.float32):
    x = torch.randn(batch, channels, *size, device="cuda", dtype=dtype)
    return x, torch.randn(batch, channels, *size, device="cuda", dtype=dtype)


@pytest.mark.parametrize("op", OPS)
def test_the_tests_of_the_ops(op, again):
    file, selection = OPS[op]
    again(selection, file, check="import torch; assert torch.cuda.is_available()", FASTGEN_BACKEND="triton")


def test_is_what_auto_chooses():
    assert backend.resolve("affine_coupling", None, torch.device("cuda"), torch.bfloat16) == "triton"


def searches():
    """Calls of several kernels each, and their inputs."""
    x, codebook = torch.randn(500, 40, device="cuda"), torch.randn(300, 40, device="cuda")
    indices = torch.randint(-1, 300, (500,), device="cuda")
    return {
        "nearest_code": lambda: nearest_code(x, codebook, backend="triton"),
        "vector_quantize": lambda: vector_quantize(x, codebook, backend="triton"),
        "code_statistics": lambda: code_statistics(x, indices, 300, backend="triton"),
    }, (x, codebook)


@pytest.mark.parametrize("name", ["nearest_code", "vector_quantize", "code_statistics"])
def test_searches_in_a_graph_and_on_a_side_stream(name):
    calls, inputs = searches()
    call = calls[name]
    assert all(map(torch.equal, call(), call()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for t in inputs:
        t.normal_()
    graph.replay()
    expected = call()
    assert all(map(torch.equal, results, expected))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        results = call()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, results, expected))


def test_the_lowest_of_equal_codes():
    codebook = torch.randn(50, 48, device="cuda").repeat(6, 1)
    x = codebook[:50] + 0.01 * torch.randn(50, 48, device="cuda")
    assert nearest_code(x, codebook, backend="triton")[0].tolist() == list(range(50))


def test_smallest():
    """Of each kernel, for compute-sanitizer: sizes that end within a tile."""
    x, params = (t.requires_grad_() for t in coupling(2, 6, (5, 3)))
    mask = torch.rand(6, 5, 3, device="cuda") < 0.5
    wide = torch.randn(2, 12, 5, 3, device="cuda", requires_grad=True)
    for scale in ("exp", "tanh", "sigmoid"):
        for layout in ("scale_shift", "interleaved"):
            options = {"scale": scale, "layout": layout, "inverse": scale == "exp", "backend": "triton"}
            y, log_det = affine_coupling(x, params, swap=scale == "tanh", **options)
            torch.autograd.grad([y.sum(), log_det.sum()], [x, params])
            y, log_det = affine_coupling(x, wide, mask=mask, **options)
            torch.autograd.grad([y.sum(), log_det.sum()], [x, wide])
    torch.autograd.grad(affine_coupling(x, params, scale="none", backend="triton")[0].sum(), [x, params])
    v = torch.randn(6, device="cuda", requires_grad=True)
    torch.autograd.grad(actnorm(x, v, v, backend="triton")[0].sum(), [x, v])
    rows, codebook = (torch.randn(n, 20, device="cuda", requires_grad=True) for n in (37, 70))
    layer = [
        torch.randn(s, device="cuda", requires_grad=True)
        for s in ((2, 5, 37), (6, 5, 2), (6,), (9, 3), (9,), (2, 6, 37))
    ]
    torch.autograd.grad(sum(r.sum() for r in wavenet_layer(*layer, dilation=4, backend="triton")), layer)
    for metric in ("euclidean", "cosine"):
        quantized, indices, loss = vector_quantize(rows, codebook, metric=metric, backend="triton")
        torch.autograd.grad(loss + quantized.sum(), [rows, codebook])
        turned, _, loss = vector_quantize(rows, codebook, estimator="rotation", metric=metric, backend="triton")
        torch.autograd.grad(loss + turned.sum(), [rows, codebook])
        nearest_code(*(torch.randn(n, 150, device="cuda") for n in (37, 70)), metric=metric, backend="triton")
        assert code_statistics(rows, indices, 70, backend="triton")[0].sum() == 37

    for dilation in (1, 16):  # taps that are aligned, and that are not
        rows = torch.randn(2, 5, 48, device="cuda", requires_grad=True)
        weights = [torch.randn(n, device="cuda", requires_grad=True) for n in ((8, 5, 2), (12, 4), (2, 8, 48))]
        residual, skip = wavenet_layer(
            rows, weights[0], None, weights[1], None, weights[2], dilation=dilation, backend="triton"
        )
        torch.autograd.grad(residual.sum() + skip.sum(), [rows, *weights])
    image, cond = (torch.randn(2, n, 5, 7, device="cuda", requires_grad=True) for n in (6, 12))
    kernel = torch.randn(12, 6, 3, 3, device="cuda", requires_grad=True)
    for mask in ("A", "vertical"):
        torch.autograd.grad(masked_conv2d(image, kernel, mask=mask, backend="triton").sum(), [image, kernel])
        gated = gated_masked_conv2d(image, kernel, None, cond, mask=mask, backend="triton")
        torch.autograd.grad(gated.sum(), [image, kernel, cond])


def convolutions():
    """Calls with gradients, and their inputs."""
    x, weight, out_weight = (
        torch.randn(n, device="cuda", requires_grad=True) for n in ((2, 16, 64), (32, 16, 2), (24, 16))
    )
    image, kernel = (torch.randn(n, device="cuda", requires_grad=True) for n in ((2, 16, 6, 8), (32, 16, 3, 3)))

    def layer():
        outs = wavenet_layer(x, weight, None, out_weight, None, dilation=4, backend="triton")
        return torch.autograd.grad([o.square().sum() for o in outs], [x, weight, out_weight])

    def masked():
        out = gated_masked_conv2d(image, kernel, mask="B", backend="triton")
        return torch.autograd.grad(out.square().sum(), [image, kernel])

    return {"wavenet_layer": layer, "gated_masked_conv2d": masked}, [x, image]


@pytest.mark.parametrize("name", ["wavenet_layer", "gated_masked_conv2d"])
def test_convolutions_in_a_graph_and_on_a_side_stream(name):
    calls, inputs = convolutions()
    call = calls[name]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        first = call()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, call(), first))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    with torch.no_grad():
        for t in inputs:
            t.normal_()
    graph.replay()
    assert all(map(torch.equal, results, call()))


def test_side_stream_and_second_device():
    x, params = coupling()
    expected = affine_coupling(x, params, scale="tanh", backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x + 0
        results = affine_coupling(late, params, scale="tanh", backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, results, expected))
    if torch.cuda.device_count() > 1:
        results = affine_coupling(x.to("cuda:1"), params.to("cuda:1"), scale="tanh", backend="triton")
        assert all(torch.equal(a.to("cuda:0"), b) for a, b in zip(results, expected, strict=True))


def test_a_graph_sees_new_inputs():
    x, params = coupling()
    affine_coupling(x, params, scale="exp", backend="triton")  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = affine_coupling(x, params, scale="exp", backend="triton")
    for _ in range(2):
        x.normal_()
        params.normal_()
        graph.replay()
        assert all(map(torch.equal, results, affine_coupling(x, params, scale="exp", backend="triton")))


def test_autocast_keeps_the_dtype_of_x():
    x, params = coupling()
    with torch.autocast("cuda", torch.bfloat16):
        y, log_det = affine_coupling(x, params.bfloat16(), scale="tanh", backend="triton")
    assert y.dtype == log_det.dtype == torch.float32


def test_same_bits_twice_and_in_any_batch():
    x, params = coupling(64, 8, (65, 64))
    whole = affine_coupling(x, params, scale="sigmoid", backend="triton")
    one = affine_coupling(x[5:6], params[5:6], scale="sigmoid", backend="triton")
    assert all(torch.equal(a[5:6], b) for a, b in zip(whole, one, strict=True))
    v = torch.randn(8, device="cuda", requires_grad=True)
    grads = [torch.autograd.grad(actnorm(x, v, v, backend="triton")[0].square().sum(), v)[0] for _ in range(2)]
    assert torch.equal(*grads)


def test_offsets_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of GPU memory")
    channels = (1 << 31) // (1 << 20) + 4
    x = torch.zeros(2, channels // 2, 1 << 20, device="cuda", dtype=torch.bfloat16)
    x[-1, -1, -5:] = 3
    y, _ = affine_coupling(x, torch.full_like(x[:, :4], 0.5), scale="none", backend="triton")
    assert y[-1, -1, -5:].tolist() == [3.5] * 5
    assert y[-1, -1, :-5].unique().tolist() == [0.5]
    ones = torch.ones(x.shape[1], device="cuda", dtype=x.dtype)
    assert actnorm(x, 0 * ones, ones, backend="triton")[0][-1, -1, -5:].tolist() == [4.0] * 5


def test_offsets_of_images_beyond_32_bits():
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.zeros(3, 16, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    x[-1, -1, -1, -2] = 3
    kernel = torch.ones(1, 16, 1, 3, device="cuda", dtype=x.dtype)
    y = masked_conv2d(x, kernel, mask="A", backend="triton")
    assert float(y[-1, -1, -1, -1]) == 3
    assert float(y.sum()) == 3
