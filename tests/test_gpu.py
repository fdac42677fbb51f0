"""On a GPU (FASTGEN_TEST_DEVICE=cuda): streams, graphs, autocast, other devices, offsets beyond 32 bits, sanitizers."""

import pytest
import torch
from op_helpers import DEVICE
from test_triton import OPS

from fastgen import backend
from fastgen.ops import (
    actnorm,
    affine_coupling,
    code_statistics,
    gated_causal_conv1d,
    gated_masked_conv2d,
    gaussian_rsample_kl,
    image_lstm,
    masked_conv2d,
    nade,
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
    torch.cuda.empty_cache()


def statistics(x, codebook):
    indices = torch.arange(len(x), device=x.device) % (len(codebook) + 1) - 1
    return code_statistics(x, indices, len(codebook), backend="triton")


def of_bits(in_weight, *weights):
    x = torch.arange(9 * len(in_weight), device=in_weight.device).view(9, -1) % 2
    return nade(x, in_weight, *weights, backend="triton")


CALLS = {
    "affine_coupling": lambda *a: affine_coupling(*a, scale="tanh", backend="triton"),
    "actnorm": lambda *a: actnorm(*a, backend="triton"),
    "nearest_code": lambda *a: nearest_code(*a, backend="triton"),
    "vector_quantize": lambda *a: vector_quantize(*a, backend="triton"),
    "code_statistics": statistics,
    "gated_causal_conv1d": lambda *a: gated_causal_conv1d(*a, dilation=16, backend="triton"),
    "wavenet_layer": lambda *a: wavenet_layer(*a, dilation=4, backend="triton"),
    "masked_conv2d": lambda *a: masked_conv2d(*a, mask="B", backend="triton"),
    "gated_masked_conv2d": lambda *a: gated_masked_conv2d(*a, mask="B", backend="triton"),
    "image_lstm": lambda *a: image_lstm(*a, backend="triton"),
    "nade": of_bits,
    "gaussian_rsample_kl": lambda *a: gaussian_rsample_kl(*a, backend="triton"),
}
SIZES = {
    "affine_coupling": [(3, 6, 33, 7), (3, 6, 33, 7)],
    "actnorm": [(3, 6, 33, 7), (6,), (6,)],
    "nearest_code": [(500, 40), (300, 40)],
    "vector_quantize": [(500, 40), (300, 40)],
    "code_statistics": [(500, 40), (300, 40)],
    "gated_causal_conv1d": [(2, 16, 64), (32, 16, 2), (32,), (2, 32, 64)],
    "wavenet_layer": [(2, 16, 61), (32, 16, 2), (32,), (24, 16), (24,), (2, 32, 1)],
    "masked_conv2d": [(2, 16, 6, 8), (32, 16, 3, 3), (32,)],
    "gated_masked_conv2d": [(2, 16, 6, 8), (32, 16, 3, 3), (32,), (2, 32, 6, 8)],
    "image_lstm": [(2, 64, 6, 8), (64, 16, 3)],
    "nade": [(70, 1, 40), (40,), (70, 1, 40), (70, 1)],
    "gaussian_rsample_kl": [(3, 5000), (3, 5000), (3, 5000)],
}
LONG = (1 << 31) // 48 // 16 * 16 + 16  # of 3 x 16 channels
SIDE = 6690  # of an image with a bit more pixels than that
BEYOND = {  # more than 2^31 numbers, in samples of which the last is looked at
    "affine_coupling": [(3, 16, LONG), (3, 16, LONG)],
    "actnorm": [(3, 16, LONG), (16,), (16,)],
    "gaussian_rsample_kl": [(3, 16 * LONG), (3, 16 * LONG), (3, 16 * LONG)],
    "nearest_code": [(3 * LONG // 4, 64), (7, 64)],
    "vector_quantize": [(3 * LONG // 4, 64), (7, 64)],
    "code_statistics": [(3 * LONG // 4, 64), (7, 64)],
    "gated_causal_conv1d": [(3, 16, LONG), (32, 16, 2), (32,)],
    "wavenet_layer": [(3, 16, LONG + 1), (32, 16, 2), (32,), (32, 16), (32,)],
    "masked_conv2d": [(3, 16, SIDE, SIDE), (16, 16, 3, 3), (16,)],
    "gated_masked_conv2d": [(3, 16, SIDE, SIDE), (32, 16, 3, 3), (32,)],
}


def inputs_of(sizes, dtype=torch.float32, device="cuda"):
    return [torch.randn(size, device=device, dtype=dtype) for size in sizes]


def results(op, inputs):
    """Outputs, then the gradients that there are, in memory that a graph may hold."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outs = CALLS[op](*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    trained = [o for o in outs if o.requires_grad]
    ones = [torch.ones_like(o) for o in trained]
    grads = torch.autograd.grad(trained, leaves, ones, allow_unused=True) if trained else ()
    return [*(o.detach() for o in outs), *(g for g in grads if g is not None)]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.to(b.device), b)


@pytest.mark.parametrize("op", CALLS)
def test_a_graph_sees_new_inputs(op):
    inputs = inputs_of(SIZES[op])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiled before the capture
        results(op, inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = results(op, inputs)
    for _ in range(2):
        for t in inputs:
            t.normal_()
        graph.replay()
        assert_same(held, results(op, inputs))


@pytest.mark.parametrize("op", CALLS)
def test_a_side_stream(op):
    inputs = inputs_of(SIZES[op])
    expected = results(op, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        got = results(op, [t + 0 for t in inputs])
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(got, expected)


@pytest.mark.parametrize("op", CALLS)
def test_a_second_device(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    inputs = inputs_of(SIZES[op])
    assert_same(results(op, [t.to("cuda:1") for t in inputs]), results(op, inputs))


@pytest.mark.parametrize("op", CALLS)
def test_autocast(op):
    """Convolutions take bfloat16, as PyTorch's do; what else there is stays exact. Gradients are the leaves'."""
    inputs = inputs_of(SIZES[op])
    expected = results(op, inputs)
    with torch.autocast("cuda", torch.bfloat16):
        got = results(op, inputs)
    if "conv" not in op and op != "wavenet_layer":
        assert_same(got, expected)
        return
    assert got[0].dtype == torch.bfloat16
    for a, b in zip(got, expected, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 0.03
    assert [g.dtype for g in got[-len(inputs) :]] == [torch.float32] * len(inputs)


@pytest.mark.parametrize("op", BEYOND)
def test_offsets_beyond_32_bits(op):
    """The last sample, forward and backward, is what it is alone."""
    if torch.cuda.mem_get_info()[0] < 64 << 30:
        pytest.skip("needs 64 GiB of GPU memory")
    inputs = inputs_of(BEYOND[op], torch.bfloat16)
    samples = len(inputs[0])
    assert inputs[0].numel() > 1 << 31
    rows = 1 if samples == 3 else 5
    if op == "code_statistics":
        indices = torch.full((samples,), -1, device="cuda")
        indices[-rows:] = torch.arange(rows, device="cuda")
        _, sums = code_statistics(inputs[0], indices, rows, backend="triton")
        assert torch.equal(sums, inputs[0][-rows:].float())
        return
    alone = [t[-rows:].clone() if len(t) == samples else t for t in inputs]
    got = [t[-rows:].clone() for t in results(op, inputs) if t.ndim and len(t) == samples]
    expected = [t for t in results(op, alone) if t.ndim and len(t) == rows]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=5e-2)


def test_is_what_auto_chooses():
    assert backend.resolve("affine_coupling", None, torch.device("cuda"), torch.bfloat16) == "triton"


def test_the_lowest_of_equal_codes():
    codebook = torch.randn(50, 48, device="cuda").repeat(6, 1)
    x = codebook[:50] + 0.01 * torch.randn(50, 48, device="cuda")
    assert nearest_code(x, codebook, backend="triton")[0].tolist() == list(range(50))


def test_smallest():
    """Of each kernel, for compute-sanitizer: sizes that end within a tile."""
    x, params = (t.requires_grad_() for t in inputs_of([(2, 6, 5, 3)] * 2))
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
        nearest_code(*(torch.randn(n, 300, device="cuda") for n in (37, 70)), metric=metric, backend="triton")
        near = torch.cat([rows[:1] + 1e-5 * torch.randn(100, 20, device="cuda"), codebook])
        nearest_code(rows, torch.cat([near, near]), metric=metric, backend="triton")  # which the scan leaves undecided
        assert code_statistics(rows, indices, 70, backend="triton")[0].sum() == 37

    for dilation in (1, 16):  # taps that are aligned, and that are not
        rows = torch.randn(2, 5, 48, device="cuda", requires_grad=True)
        weights = [torch.randn(n, device="cuda", requires_grad=True) for n in ((8, 5, 2), (12, 4), (2, 8, 48))]
        residual, skip = wavenet_layer(
            rows, weights[0], None, weights[1], None, weights[2], dilation=dilation, backend="triton"
        )
        torch.autograd.grad(residual.sum() + skip.sum(), [rows, *weights])
        for cond in (None, weights[2], weights[2][..., :1]):
            gate = gated_causal_conv1d(rows, weights[0], None, cond, dilation=dilation, backend="triton")
            torch.autograd.grad(gate.sum(), [rows, weights[0]])
    image, cond = (torch.randn(2, n, 5, 7, device="cuda", requires_grad=True) for n in (6, 12))
    kernel = torch.randn(12, 6, 3, 3, device="cuda", requires_grad=True)
    for mask in ("A", "vertical"):
        torch.autograd.grad(masked_conv2d(image, kernel, mask=mask, backend="triton").sum(), [image, kernel])
        gated = gated_masked_conv2d(image, kernel, None, cond, mask=mask, backend="triton")
        torch.autograd.grad(gated.sum(), [image, kernel, cond])


def test_same_bits_twice_and_in_any_batch():
    x, params = inputs_of([(64, 8, 65, 64)] * 2)
    whole = affine_coupling(x, params, scale="sigmoid", backend="triton")
    one = affine_coupling(x[5:6], params[5:6], scale="sigmoid", backend="triton")
    assert all(torch.equal(a[5:6], b) for a, b in zip(whole, one, strict=True))
    v = torch.randn(8, device="cuda", requires_grad=True)
    grads = [torch.autograd.grad(actnorm(x, v, v, backend="triton")[0].square().sum(), v)[0] for _ in range(2)]
    assert torch.equal(*grads)
