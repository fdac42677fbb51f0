"""downsample_conv2d, upsample_conv2d and their layers, against the float64 reference, for every ISA."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import DTYPES, STANDS_IN, WIDENED, compare, run

import fastgen
from fastgen import backend
from fastgen.nn import Conv2d, ConvTranspose2d
from fastgen.nn.conv2d import IN_BFLOAT16
from fastgen.ops import downsample_conv2d, upsample_conv2d
from fastgen.ops.resampling_conv2d import downsample_conv2d_reference, upsample_conv2d_reference

OPS = {"down": downsample_conv2d, "up": upsample_conv2d}
REFERENCES = {"down": downsample_conv2d_reference, "up": upsample_conv2d_reference}
LAYERS = {"down": (Conv2d, torch.nn.Conv2d), "up": (ConvTranspose2d, torch.nn.ConvTranspose2d)}
SHAPES = [
    # batch, channels, height and width of the smaller image, outs
    (1, 1, 1, 1, 1),
    (2, 3, 16, 16, 20),
    (3, 5, 4, 7, 33),
    (2, 70, 9, 2, 3),  # more channels than have their gradients summed at once
    (5, 17, 3, 40, 1),
]
each = pytest.mark.parametrize("way", OPS)


def arguments(way, batch, channels, height, width, outs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    larger = 2 if way == "down" else 1

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    return {
        "x": normal(batch, channels, larger * height, larger * width),
        "weight": normal(
            *((outs, channels) if way == "down" else (channels, outs)), 4, 4, scale=(channels * 8) ** -0.5
        ),
        "bias": normal(outs),
    }


def floats(args):
    return {k: v.float() for k, v in args.items()}


@pytest.fixture(autouse=True)
def _needs_kernels(need, one_thread):
    need("upsample_conv2d", "cpu")


@each
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(way, shape, dtype):
    compare(OPS[way], arguments(way, *shape), dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    way=st.sampled_from(list(OPS)), batch=st.integers(0, 4), channels=st.integers(1, 40), height=st.integers(0, 20),
    width=st.integers(1, 20), outs=st.integers(1, 40), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_reference_anywhere(way, batch, channels, height, width, outs, dtype, seed):
    compare(OPS[way], arguments(way, batch, channels, height, width, outs, seed), dtype)


@each
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_is_that_of_the_sums(way, shape):
    """To the bit; and its gradient is that of the convolution where a result is not zero."""
    args = floats(arguments(way, *shape))
    leaves = [v.requires_grad_() for v in args.values()]
    sums = OPS[way](**args, backend="cpu")
    result = OPS[way](**args, relu=True, backend="cpu")
    assert torch.equal(result, F.relu(sums))
    cotangent = torch.randn(result.shape)
    grads = torch.autograd.grad(result, leaves, cotangent)
    masked = torch.autograd.grad(sums, leaves, torch.where(result > 0, cotangent, 0))
    for got, expected in zip(grads, masked, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    run_under(isa, "matches or relu or bits", "resampling_conv2d")


@each
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_any_number_of_threads(way, threads):
    torch.set_num_threads(threads)
    for batch in (1, 2, 7):
        compare(OPS[way], arguments(way, batch, 6, 8, 11, 10), torch.float32)


@each
def test_an_image_larger_than_the_caches(way):
    compare(OPS[way], arguments(way, 1, 40, 61, 70, 64), torch.float32)


@each
def test_errs_little_more_than_a_plain_sum(way):
    """Root mean squares of the errors, beside those of PyTorch's float32."""
    args = arguments(way, 8, 64, 9, 9, 64)
    exact, plain, got = (
        run(OPS[way], args, dtype, which)
        for dtype, which in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "cpu"))
    )
    for name, value in exact.items():
        error, allowed = ((result[name].double() - value).square().mean().sqrt() for result in (got, plain))
        assert error < 2 * allowed, name


@each
def test_two_runs_give_the_same_bits(way):
    args = arguments(way, 3, 20, 9, 11, 40)
    runs = [run(OPS[way], args, torch.float32, "cpu", relu=True) for _ in range(3)]
    for other in runs[1:]:
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), name
    image = OPS[way](**floats(args | {"x": args["x"][1:2]}), relu=True)
    assert torch.equal(image, runs[0]["out[0]"][1:2]), "an image in a batch is the image alone"
    strided = args | {"x": args["x"].contiguous(memory_format=torch.channels_last), "weight": args["weight"].mT.mT}
    assert torch.equal(OPS[way](**floats(strided), relu=True), runs[0]["out[0]"])


@each
@pytest.mark.parametrize("which", ["cpu", "reference"])
@pytest.mark.parametrize("sizes", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty(way, which, sizes):
    batch, height, width = sizes
    args = {k: v.requires_grad_() for k, v in floats(arguments(way, batch, 3, height, width, 6)).items()}
    y = OPS[way](**args, relu=True, backend=which)
    larger = 1 if way == "down" else 2
    assert y.shape == (batch, 6, larger * height, larger * width)
    y.sum().backward()
    assert args["x"].grad.shape == args["x"].shape
    assert torch.equal(args["weight"].grad, torch.zeros_like(args["weight"]))


@each
@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(way, relu):
    args = tuple(v.requires_grad_() for v in arguments(way, 2, 2, 2, 4, 3).values())
    assert torch.autograd.gradcheck(lambda *v: OPS[way](*v, relu=relu, backend="cpu"), args)


@each
def test_nan_reaches_what_sees_it(way):
    args = floats(arguments(way, 1, 4, 10, 12, 6))
    args["x"][0, 2, 7, 6] = float("nan")
    expected = REFERENCES[way](**args).isnan()
    got = OPS[way](**args, relu=True, backend="cpu").isnan()
    assert got[expected].all()
    assert got.sum() < got.numel() / 2


@each
def test_opcheck(way):
    x, weight, bias = floats(arguments(way, 2, 3, 3, 2, 4)).values()
    op = getattr(torch.ops.fastgen, OPS[way].__name__)
    backward = getattr(torch.ops.fastgen, f"{OPS[way].__name__}_backward")
    for relu in (False, True):
        torch.library.opcheck(op.default, (x, weight, bias, relu))
        y = op(x, weight, None, relu)
        for need_x in (True, False):
            torch.library.opcheck(backward.default, (y, y if relu else None, x, weight, need_x))


@each
def test_compile_fullgraph_forward_backward_and_dynamic(way):
    layer = LAYERS[way][0](3, 4, 4, 2, 1, relu=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((6, 8), (10, 4), (12, 14)):
            x = torch.randn(2, 3, *size)
            (grad,) = torch.autograd.grad(compiled(x).sum(), layer.weight)
            exact = REFERENCES[way](x, layer.weight, layer.bias, relu=True)
            torch.testing.assert_close(grad, *torch.autograd.grad(exact.sum(), layer.weight), atol=1e-4, rtol=1e-4)


@each
def test_export_meta_and_functional_grad(way):
    layer = LAYERS[way][0](3, 4, 4, 2, 1, relu=True)
    x = torch.randn(2, 3, 6, 8)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
    assert OPS[way](x.to("meta"), layer.weight.to("meta")).shape == layer(x).shape
    grads = [
        torch.func.grad(lambda w: op(x, w, relu=True).square().sum())(layer.weight)  # noqa: B023
        for op in (OPS[way], REFERENCES[way])
    ]
    torch.testing.assert_close(*grads)


OPTIONS = {
    "resamples": ((4, 2, 1), {}),
    "no bias": ((4, 2, 1), {"bias": False}),
    "3x3": ((3, 2, 1), {}),
    "padded more": ((4, 2, 2), {}),
    "stride 4": ((4, 4, 1), {}),
    "grouped": ((4, 2, 1), {"groups": 2}),
    "dilated": ((4, 2, 1), {"dilation": 2}),
}


@each
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_layer_is_that_of_pytorch(way, relu, name, ran):
    args, options = OPTIONS[name]
    layer, of_pytorch = LAYERS[way]
    theirs, ours = of_pytorch(6, 8, *args, **options), layer(6, 8, *args, **options, relu=relu)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), strict=True)
    x = torch.randn(2, 6, 12, 14)
    expected = F.relu(theirs(x)) if relu else theirs(x)
    with ran(OPS[way].__name__, STANDS_IN if name in ("resamples", "no bias") else "reference"):
        got = ours(x)
    torch.testing.assert_close(got, expected)
    if name != "resamples":
        return
    torch.testing.assert_close(ours(x[0]), expected[0])  # without a batch, as theirs
    odd = F.relu(theirs(x[..., :11, :])) if relu else theirs(x[..., :11, :])
    torch.testing.assert_close(ours(x[..., :11, :]), odd)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), ours(x))
    in_bfloat16 = "cpu" if way == "up" and IN_BFLOAT16 else WIDENED
    with torch.autocast("cpu"), ran(OPS[way].__name__, in_bfloat16):
        halves = ours(x)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), expected, atol=0.03, rtol=0.03)
    if way == "up":
        larger = theirs(x, output_size=(25, 28))
        assert torch.equal(ours(x, output_size=(25, 28)), F.relu(larger) if relu else larger)
    with ran(OPS[way].__name__, in_bfloat16):
        halves = ours.to(torch.bfloat16)(x.bfloat16())
    torch.testing.assert_close(halves.float(), expected, atol=0.03, rtol=0.03)


BAD = {
    "x list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x rank": ({"x": torch.zeros(3, 4, 4).double()}, ValueError, r"x must have shape .*any.*, got \(3, 4, 4\)"),
    "weight channels": ({"weight": torch.zeros(5, 5, 4, 4).double()}, ValueError, "x must have 5 channels, .*got 3"),
    "kernel": ({"weight": torch.zeros(3, 3, 3, 3).double()}, ValueError, r"weight must have shape .*4, 4\), got"),
    "bias": ({"bias": torch.zeros(3).double()}, ValueError, r"bias must have shape \(8,\), got \(3,\)"),
    "dtype": ({"bias": torch.zeros(8)}, TypeError, "bias is torch.float32, x is torch.float64"),
    "half": ({"x": torch.zeros(2, 3, 4, 4).half()}, TypeError, "x must be float32, bfloat16 or float64, got"),
    "relu": ({"relu": 1}, TypeError, "relu must be True or False, got 1"),
    "backend": ({"backend": "gpu"}, ValueError, "backend: expected one of cpu"),
    "no kernel": ({"backend": "triton"}, fastgen.BackendError, "'triton' was requested but cannot run"),
}


@each
@pytest.mark.parametrize("case", BAD)
def test_bad_input(way, case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        OPS[way](**(arguments(way, 2, 3, 2, 2, 8) | change))


def test_odd_sides_and_no_outputs_are_refused():
    args = arguments("down", 2, 3, 2, 2, 8)
    with pytest.raises(ValueError, match=r"x needs even height and width, got \(4, 3\)"):
        downsample_conv2d(**args | {"x": args["x"][..., :3]})
    with pytest.raises(ValueError, match="at least one channel"):
        downsample_conv2d(args["x"], args["weight"][:0])
