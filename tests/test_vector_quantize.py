"""The op vector_quantize: values, losses, counts and gradients against the reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import DEVICE, DTYPES, EXACT, EXAMPLES, KERNELS

from fastgen.ops import nearest_code, vector_quantize
from fastgen.ops.vector_quantize import quantize, quantize_reference, rotate

pytestmark = pytest.mark.on_device

ESTIMATORS = ("straight_through", "rotation")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}


def results(x, codebook, mask, metric, estimator, which, dtype, rounded):
    device = "cpu" if which == "reference" else DEVICE
    x, codebook = (t.to(device, dtype).detach().requires_grad_() for t in (x, codebook))
    mask = mask if mask is None else mask.to(device)
    if which == "reference":
        out = quantize_reference(x, codebook, mask, metric=metric, estimator=estimator)
    else:
        out = quantize("test", x, codebook, mask=mask, metric=metric, estimator=estimator, backend=which)
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(x.shape, generator=generator, device="cpu").to(rounded).to(x)
    total = (out.quantized * cotangent).sum() + 3 * out.commitment + 7 * out.codebook_error
    grads = torch.autograd.grad(total, (x, codebook))
    return dict(out._asdict(), grad_x=grads[0], grad_codebook=grads[1])


def compare(n, k, d, masked, metric, estimator, dtype):
    x, codebook = torch.randn(n, d).to(dtype), torch.randn(k, d).to(dtype)
    mask = torch.rand(n) < 0.6 if masked else None
    exact = results(x, codebook, mask, metric, estimator, "reference", torch.float64, dtype)
    got = results(x, codebook, mask, metric, estimator, KERNELS, dtype, dtype)
    got = {name: value.cpu() for name, value in got.items()}
    assert torch.equal(got["indices"], exact["indices"])
    assert torch.equal(got["counts"].double(), exact["counts"])
    assert got["quantized"].dtype == got["grad_x"].dtype == dtype
    assert got["commitment"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for name, value in got.items():
        assert torch.isfinite(value).all(), name
        scale = float(exact[name].double().abs().max()) if value.numel() else 0.0
        error = float((value.double() - exact[name]).abs().max()) if value.numel() else 0.0
        assert error <= TOLERANCE[dtype] * (scale + 1e-30), f"{name}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(0, 2, 3), (1, 1, 1), (7, 3, 5), (31, 33, 16), (211, 40, 33)], ids=str)
def test_matches_reference(size, masked, metric, estimator, dtype, ran):
    with ran("vector_quantize", KERNELS):
        compare(*size, masked, metric, estimator, dtype)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(0, 90), k=st.integers(1, 60), d=st.integers(1, 40), masked=st.booleans(),
    metric=st.sampled_from(["euclidean", "cosine"]), estimator=st.sampled_from(ESTIMATORS), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_reference_anywhere(n, k, d, masked, metric, estimator, seed):
    torch.manual_seed(seed)
    compare(n, k, d, masked, metric, estimator, EXACT)


@pytest.mark.parametrize("which", [KERNELS, "reference"])
def test_loss_is_that_of_the_paper(which):
    x, codebook = torch.randn(50, 6).requires_grad_(), torch.randn(9, 6).requires_grad_()
    quantized, indices, loss = vector_quantize(x, codebook, beta=0.3, backend=which)
    codes = codebook[nearest_code(x, codebook)[0]]
    assert torch.equal(quantized, codes)
    expected = (x.detach() - codes).square().mean() + 0.3 * (x - codes.detach()).square().mean()
    torch.testing.assert_close(loss, expected)
    for a, b in zip(
        torch.autograd.grad(loss, (x, codebook)), torch.autograd.grad(expected, (x, codebook)), strict=True
    ):
        torch.testing.assert_close(a, b)
    quantized, *_ = vector_quantize(x, codebook, backend=which)
    grad = torch.randn(50, 6)
    (grad_x,) = torch.autograd.grad(quantized, x, grad)
    assert torch.equal(grad_x, grad)
    assert torch.equal(indices, nearest_code(x, codebook)[0])


def test_rotation_takes_x_to_its_code():
    x, q = torch.randn(30, 7).double(), torch.randn(30, 7).double()
    torch.testing.assert_close(rotate(x, q), q)
    jacobian = torch.autograd.functional.jacobian(lambda v: rotate(v, q).sum(0), x)  # (7, 30, 7)
    turned = jacobian.movedim(1, 0) / (q.norm(dim=1) / x.norm(dim=1))[:, None, None]
    torch.testing.assert_close(turned @ turned.mT, torch.eye(7).double().expand(30, 7, 7), atol=1e-9, rtol=0)


def test_one_search_and_little_saved():
    """The backward searches nothing, and saves x, its quantization and indices alone."""
    x, codebook = torch.randn(500, 16).requires_grad_(), torch.randn(300, 16).requires_grad_()
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = quantize("test", x, codebook, backend=KERNELS)
    assert sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in saved}.values()) <= 500 * (2 * 64 + 8)
    calls = []
    original = torch.ops.fastgen.nearest_code, torch.ops.fastgen.vector_quantize
    try:
        torch.ops.fastgen.nearest_code = torch.ops.fastgen.vector_quantize = lambda *a: calls.append(a)
        (out.quantized.sum() + out.commitment + out.codebook_error).backward()
    finally:
        torch.ops.fastgen.nearest_code, torch.ops.fastgen.vector_quantize = original
    assert not calls


def test_bits_do_not_depend_on_the_run_or_the_threads():
    x, codebook = torch.randn(700, 20), torch.randn(60, 20)
    runs = []
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        runs.append(results(x, codebook, None, "euclidean", "rotation", KERNELS, torch.float32, torch.float32))
    for other in runs[1:]:
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), name


def test_strided_input_and_gradient():
    x, codebook = torch.randn(40, 9), torch.randn(12, 9)
    wide = torch.stack([x, x], 1).requires_grad_()
    out = quantize("test", wide[:, 1], codebook, backend=KERNELS)
    grad = torch.randn(9, 40).T
    (got,) = torch.autograd.grad(out.quantized, wide, grad)
    assert torch.equal(got[:, 1], grad)
    (expanded,) = torch.autograd.grad(quantize("test", wide[:, 1], codebook).quantized.sum(), wide)
    assert torch.equal(expanded[:, 1], torch.ones(40, 9))


def test_bfloat16_rows_with_a_float32_codebook():
    x, codebook = torch.randn(80, 8).bfloat16().requires_grad_(), torch.randn(20, 8)
    out = quantize("test", x, codebook, backend=KERNELS)
    assert out.quantized.dtype == torch.bfloat16
    assert torch.equal(out.indices, nearest_code(x.float(), codebook)[0])
    assert torch.equal(out.quantized, codebook[out.indices].bfloat16())
    out.commitment.backward()
    assert x.grad.dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"codebook is torch\.float32"):
        vector_quantize(x, codebook)


def test_opcheck_compile_and_export():
    x, codebook = torch.randn(30, 5), torch.randn(9, 5)
    mask = torch.rand(30) < 0.5
    torch.library.opcheck(torch.ops.fastgen.vector_quantize.default, (x, codebook, mask, False, True))
    q = torch.ops.fastgen.vector_quantize(x, codebook, mask, False, True)[0]
    grads = torch.randn(30, 5), torch.ones(())
    torch.library.opcheck(torch.ops.fastgen.vector_quantize_backward.default, (*grads, x, q, mask, True))
    for which in (KERNELS, "reference"):
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, c, b: vector_quantize(x, c, estimator="rotation", backend=b), fullgraph=True, dynamic=True
        )
        with torch._dynamo.config.patch(error_on_recompile=True):
            for n in (30, 17, 55):
                x, codebook = torch.randn(n, 5).requires_grad_(), torch.randn(9, 5).requires_grad_()
                got, plain = compiled(x, codebook, which), vector_quantize(x, codebook, estimator="rotation")
                for a, b in zip(got, plain, strict=True):
                    torch.testing.assert_close(a, b)
                for a, b in zip(
                    *(torch.autograd.grad(o[0].square().sum() + o[2], (x, codebook)) for o in (got, plain)),
                    strict=True,
                ):
                    torch.testing.assert_close(a, b)

    class Quantizer(torch.nn.Module):
        def forward(self, x, codebook):
            return vector_quantize(x, codebook)

    args = torch.randn(30, 5), torch.randn(9, 5)
    program = torch.export.export(Quantizer(), args)
    assert torch.equal(program.module()(*args)[0], vector_quantize(*args)[0])


@pytest.mark.parametrize("which", [KERNELS, "reference"])
def test_bad_input(which):
    x, codebook = torch.randn(6, 3), torch.randn(4, 3)
    for mask in (torch.ones(5, dtype=torch.bool), torch.ones(6), torch.ones(6, 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match=r"vector_quantize: mask must be bool \(6,\)"):
            vector_quantize(x, codebook, mask=mask, backend=which)
    with pytest.raises(ValueError, match="beta must be finite"):
        vector_quantize(x, codebook, beta=-1, backend=which)
    with pytest.raises(ValueError, match="estimator must be"):
        vector_quantize(x, codebook, estimator="gumbel", backend=which)
    x[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"x must be finite.*row 2"):
        vector_quantize(x, codebook, backend=which)
    assert not torch.isfinite(vector_quantize(x, codebook, nonfinite="first", backend=which)[2])
