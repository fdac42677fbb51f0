"""linear and nn.Linear: values and gradients against the float64 reference, for every ISA."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import DTYPES, STANDS_IN, compare, run

import fastgen
from fastgen import backend
from fastgen.nn import Linear
from fastgen.ops import linear
from fastgen.ops.linear import linear_reference

SHAPES = [
    # rows, inputs, outputs
    ((1,), 1, 1),
    ((100,), 784, 500),
    ((7, 31), 33, 65),
    ((400,), 300, 17),
    ((2, 3, 5), 1, 40),
    ((13,), 700, 32),
    # rows, or in the backward pass terms, that lie more than a page apart: they are packed for so many columns
    ((200,), 1061, 577),
    ((67,), 520, 1061),
]


def arguments(rows, inputs, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    return {
        "x": normal(*rows, inputs), "weight": normal(outputs, inputs, scale=max(inputs, 1) ** -0.5),
        "bias": normal(outputs),
    }  # fmt: skip


def floats(args):
    return {k: v.float() for k, v in args.items()}


@pytest.fixture(autouse=True)
def _needs_kernels(need, one_thread):
    need("linear", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, ran):
    args = arguments(*shape)
    compare(linear, args, dtype)
    compare(linear, args | {"bias": None}, dtype)
    for which in ("cpu", "reference"):
        with ran("linear", which):
            linear(**floats(args), backend=which)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.integers(1, 300), inputs=st.integers(1, 300), outputs=st.integers(1, 100), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_reference_anywhere(rows, inputs, outputs, dtype, seed):
    compare(linear, arguments((rows,), inputs, outputs, seed), dtype)


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    run_under(isa, "matches or bits or nan", "linear")


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("outputs", [1, 40, 200])
def test_any_number_of_threads(threads, outputs):
    torch.set_num_threads(threads)
    compare(linear, arguments((50,), 270, outputs), torch.float32)


def test_strided_and_expanded_inputs():
    args = floats(arguments((6, 8), 40, 30))
    plain = linear(**args, backend="cpu")
    x, weight = args["x"].mT.contiguous().mT, args["weight"].T.contiguous().T
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    assert torch.equal(plain, linear(x, weight, args["bias"].repeat_interleave(2)[::2], backend="cpu"))
    one = args["x"][:1].expand(6, -1, -1)
    assert torch.equal(linear(one, args["weight"], args["bias"], backend="cpu")[3], plain[0])
    alone = linear(args["x"][2, 3], args["weight"], args["bias"], backend="cpu")
    assert torch.equal(alone, plain[2, 3]), "a row in a batch is the row alone"


@pytest.mark.parametrize("which", ["cpu", "reference"])
@pytest.mark.parametrize("sizes", [((0,), 3, 4), ((2, 0), 3, 4), ((2,), 0, 4), ((2,), 3, 0), ((0,), 0, 4)])
def test_empty(sizes, which):
    args = {k: v.requires_grad_() for k, v in floats(arguments(*sizes)).items()}
    y = linear(**args, backend=which)
    assert y.shape == (*sizes[0], sizes[2])
    assert torch.equal(y, linear_reference(**args))
    y.sum().backward()
    assert args["x"].grad.shape == args["x"].shape
    assert torch.equal(args["weight"].grad, torch.zeros_like(args["weight"]))


def test_two_runs_give_the_same_bits():
    args = arguments((301,), 290, 77)
    runs = [run(linear, args, torch.float32, "cpu") for _ in range(3)]
    for other in runs[1:]:
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), name


def test_nan_reaches_only_its_row():
    args = floats(arguments((40,), 50, 60))
    args["x"][17, 3] = float("nan")
    got = linear(**args, backend="cpu").isnan()
    assert got[17].all()
    assert int(got.sum()) == 60


def test_gradcheck():
    args = tuple(v.requires_grad_() for v in arguments((3, 2), 5, 4).values())
    assert torch.autograd.gradcheck(lambda *v: linear(*v, backend="cpu"), args)


def test_opcheck():
    x, weight, bias = floats(arguments((7,), 5, 4)).values()
    ops = torch.ops.fastgen
    torch.library.opcheck(ops.linear.default, (x, weight, bias))
    for need_x in (True, False):
        torch.library.opcheck(ops.linear_backward.default, (ops.linear(x, weight, None), x, weight, need_x))


def test_compile_fullgraph_forward_backward_and_dynamic():
    layer = Linear(5, 4)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (6, 9, 40):
            x = torch.randn(rows, 3, 5)
            (grad,) = torch.autograd.grad(compiled(x).square().sum(), layer.weight)
            exact = linear_reference(x, layer.weight, layer.bias)
            (expected,) = torch.autograd.grad(exact.square().sum(), layer.weight)
            torch.testing.assert_close(grad, expected, atol=1e-4, rtol=1e-4)


def test_export_meta_and_functional_grad():
    layer = Linear(5, 4)
    x = torch.randn(2, 3, 5)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
    assert linear(x.to("meta"), layer.weight.to("meta")).shape == (2, 3, 4)
    grads = [
        torch.func.grad(lambda w: op(x, w).square().sum())(layer.weight)  # noqa: B023
        for op in (linear, linear_reference)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_that_of_pytorch(bias, ran):
    torch.manual_seed(0)
    theirs = torch.nn.Linear(96, 120, bias=bias)
    torch.manual_seed(0)
    ours = Linear(96, 120, bias=bias)
    assert torch.equal(ours.weight, theirs.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for rows, which in ((300, STANDS_IN), (2, "reference")):
        x = torch.randn(rows, 96)
        with ran("linear", which):
            got = ours(x)
        torch.testing.assert_close(got, theirs(x))
    x = torch.randn(300, 96)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), ours(x))
    with torch.autocast("cpu"):
        assert ours(x).dtype == torch.bfloat16
    assert ours.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


BAD = {
    "x list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x scalar": ({"x": torch.tensor(1.0).double()}, ValueError, r"x must be \(\.\.\., C\), got \(\)"),
    "weight": (
        {"weight": torch.zeros(4, 6).double()},
        ValueError,
        "x must have 6 channels, .*got 5",
    ),
    "bias": ({"bias": torch.zeros(3).double()}, ValueError, r"bias must have shape \(4,\), got \(3,\)"),
    "dtype": ({"bias": torch.zeros(4)}, TypeError, "bias is torch.float32, x is torch.float64"),
    "half": ({"x": torch.zeros(2, 5).half()}, TypeError, "x must be float32, bfloat16 or float64, got"),
    "backend": ({"backend": "triton"}, fastgen.BackendError, "'triton' was requested but cannot run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        linear(**(arguments((2,), 5, 4) | change))


def test_a_sum_of_many_rows_keeps_its_digits():
    x = torch.ones(200_000, 3)
    weight = torch.zeros(2, 3, requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    cotangent = torch.full((200_000, 2), 0.1)
    grads = torch.autograd.grad(linear(x, weight, bias, backend="cpu"), (weight, bias), cotangent)
    for grad in grads:
        torch.testing.assert_close(grad, torch.full_like(grad, 20_000.0), rtol=1e-5, atol=0)
    assert torch.equal(F.linear(x[:2], weight), linear(x[:2], weight, backend="cpu"))
