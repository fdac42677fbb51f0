"""conv2d and nn.Conv2d: values and gradients against the float64 reference, for every ISA."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import DTYPES, STANDS_IN, WIDENED, compare, run

import fastgen
from fastgen import backend
from fastgen.nn import Conv1d, Conv2d, ConvTranspose2d, Linear
from fastgen.nn.conv2d import IN_BFLOAT16
from fastgen.ops import conv2d
from fastgen.ops.conv2d import conv2d_reference

SHAPES = [
    # batch, channels, height, width, outs, kernel
    (1, 1, 1, 1, 1, (1, 1)),
    (2, 3, 32, 32, 64, (3, 3)),
    (3, 130, 7, 7, 33, (1, 1)),
    (1, 17, 13, 31, 5, (5, 3)),
    (2, 4, 3, 2, 8, (7, 9)),  # a kernel larger than the image
    (1, 16, 300, 3, 16, (1, 1)),
    (3, 4, 9, 5, 70, (3, 3)),  # an odd number of pixels each way
    (2, 150, 8, 6, 3, (3, 3)),  # more channels than have their gradients summed at once
]


def arguments(batch, channels, height, width, outs, kernel=(3, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    return {
        "x": normal(batch, channels, height, width),
        "weight": normal(outs, channels, *kernel, scale=(channels * kernel[0] * kernel[1]) ** -0.5),
        "bias": normal(outs),
    }


def floats(args):
    return {k: v.float() for k, v in args.items()}


@pytest.fixture(autouse=True)
def _needs_kernels(need, one_thread):
    need("conv2d", "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype):
    compare(conv2d, arguments(*shape), dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(0, 4), channels=st.integers(1, 40), height=st.integers(1, 30), width=st.integers(1, 40),
    outs=st.integers(1, 40), kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 7])),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_reference_anywhere(batch, channels, height, width, outs, kernel, dtype, seed):
    compare(conv2d, arguments(batch, channels, height, width, outs, kernel, seed), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_is_that_of_the_sums(shape, dtype):
    """To the bit; and its gradient is that of the convolution where a result is not zero."""
    args = {k: v.to(dtype) for k, v in arguments(*shape).items()}
    leaves = [v.requires_grad_() for v in args.values()]
    sums = conv2d(**args, backend="cpu")
    result = conv2d(**args, relu=True, backend="cpu")
    assert torch.equal(result, F.relu(sums))
    cotangent = torch.randn(result.shape).to(dtype)
    grads = torch.autograd.grad(result, leaves, cotangent)
    masked = torch.autograd.grad(sums, leaves, torch.where(result > 0, cotangent, 0))
    for got, expected in zip(grads, masked, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    run_under(isa, "matches or relu or bits or nan", "conv2d")


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_number_of_threads(threads, batch):
    torch.set_num_threads(threads)
    compare(conv2d, arguments(batch, 6, 17, 12, 10, (5, 3)), torch.float32)


def test_an_image_larger_than_the_caches():
    compare(conv2d, arguments(1, 64, 120, 130, 64), torch.float32)
    compare(conv2d, arguments(1, 64, 60, 70, 64, (5, 3)), torch.float32)


@pytest.mark.skipif(not backend.ON_X86, reason="PyTorch adds one product after another there, and not everywhere")
@pytest.mark.parametrize("kernel", [(3, 3), (5, 3)])
def test_errs_no_more_than_a_plain_sum(kernel):
    """Root mean squares of the errors, beside those of PyTorch's float32."""
    args = arguments(8, 64, 16, 16, 64, kernel)
    exact, plain, got = (
        run(op, args, dtype, backend) for op, dtype, backend in (
            (conv2d, torch.float64, "reference"), (conv2d, torch.float32, "reference"), (conv2d, torch.float32, "cpu"),
        )
    )  # fmt: skip
    for name, value in exact.items():
        error, allowed = ((result[name].double() - value).square().mean().sqrt() for result in (got, plain))
        assert error < 2 * allowed, name


@pytest.mark.parametrize("far", [1e8, float("nan"), float("inf")])
def test_no_output_depends_on_what_it_does_not_see(far):
    args = floats(arguments(1, 16, 12, 12, 16))
    before = conv2d(**args, backend="cpu")
    for y, x in ((5, 6), (6, 5), (11, 0)):
        changed = args["x"].clone()
        changed[0, 3, y, x] = far
        unseen = torch.ones(12, 12, dtype=torch.bool)
        unseen[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = False
        after = conv2d(**args | {"x": changed}, backend="cpu")
        assert torch.equal(before[..., unseen], after[..., unseen])


def test_strided_and_expanded_inputs():
    args = floats(arguments(3, 6, 8, 9, 10))
    plain = conv2d(**args, backend="cpu")
    x = args["x"].contiguous(memory_format=torch.channels_last)
    weight = args["weight"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not x.is_contiguous()
    assert not weight.is_contiguous()
    assert torch.equal(plain, conv2d(x, weight, args["bias"], backend="cpu"))
    one = args["x"][:1].expand(3, -1, -1, -1)
    assert torch.equal(conv2d(one, *list(args.values())[1:], backend="cpu")[2], plain[0])


@pytest.mark.parametrize("which", ["cpu", "reference"])
@pytest.mark.parametrize("sizes", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty(sizes, which):
    for kernel in ((3, 3), (1, 1), (5, 1)):
        args = {k: v.requires_grad_() for k, v in floats(arguments(*sizes, 40, kernel)).items()}
        y = conv2d(**args, relu=True, backend=which)
        assert y.shape == (sizes[0], 40, *sizes[2:])
        y.sum().backward()
        assert args["x"].grad.shape == sizes
        assert torch.equal(args["weight"].grad, torch.zeros_like(args["weight"]))


def test_two_runs_give_the_same_bits():
    args = arguments(3, 20, 19, 21, 40)
    runs = [run(conv2d, args, torch.float32, "cpu", relu=True) for _ in range(3)]
    for other in runs[1:]:
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), name
    image = conv2d(**floats(args | {"x": args["x"][1:2]}), relu=True)
    assert torch.equal(image, runs[0]["out[0]"][1:2]), "an image in a batch is the image alone"


def test_nan_stays_and_reaches_only_what_sees_it():
    args = floats(arguments(1, 4, 20, 30, 6))
    args["x"][0, 2, 7, 11] = float("nan")
    got = conv2d(**args, relu=True, backend="cpu").isnan().all(1)[0]
    expected = torch.zeros(20, 30, dtype=torch.bool)
    expected[6:9, 10:13] = True
    assert torch.equal(got, expected)


def test_gradients_of_a_relu_that_holds_nan():
    x = torch.tensor([float("nan"), 1.0, -1.0]).view(1, 1, 1, 3).requires_grad_()
    bias = torch.zeros(1, requires_grad=True)
    conv2d(x, torch.ones(1, 1, 1, 1), bias, relu=True, backend="cpu").sum().backward()
    assert x.grad.flatten().tolist() == [1, 1, 0]
    assert float(bias.grad) == 2


@pytest.mark.parametrize("relu", [False, True])
def test_gradcheck(relu):
    args = tuple(v.requires_grad_() for v in arguments(2, 2, 4, 3, 3).values())
    assert torch.autograd.gradcheck(lambda *v: conv2d(*v, relu=relu, backend="cpu"), args)


def test_opcheck():
    x, weight, bias = floats(arguments(2, 3, 5, 6, 4)).values()
    ops = torch.ops.fastgen
    for relu in (False, True):
        torch.library.opcheck(ops.conv2d.default, (x, weight, bias, relu))
        y = ops.conv2d(x, weight, None, relu)
        for need_x in (True, False):
            torch.library.opcheck(ops.conv2d_backward.default, (y, y if relu else None, x, weight, need_x))


def test_compile_fullgraph_forward_backward_and_dynamic():
    layer = Conv2d(3, 4, 3, padding=1, relu=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((6, 7), (9, 5), (11, 13)):
            x = torch.randn(2, 3, *size)
            (grad,) = torch.autograd.grad(compiled(x).sum(), layer.weight)
            exact = conv2d_reference(x, layer.weight, layer.bias, relu=True)
            torch.testing.assert_close(grad, *torch.autograd.grad(exact.sum(), layer.weight), atol=1e-4, rtol=1e-4)


def test_export_meta_and_functional_grad():
    layer = Conv2d(3, 4, 3, padding=1, relu=True)
    x = torch.randn(2, 3, 5, 6)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
    assert conv2d(x.to("meta"), layer.weight.to("meta")).shape == (2, 4, 5, 6)
    grads = [
        torch.func.grad(lambda w: op(x, w, relu=True).square().sum())(layer.weight)  # noqa: B023
        for op in (conv2d, conv2d_reference)
    ]
    torch.testing.assert_close(*grads)


LAYERS = {
    "3x3": ((6, 8, 3), {"padding": 1}),
    "same": ((6, 8, (1, 5)), {"padding": "same", "bias": False}),
    "1x1": ((6, 8, 1), {}),
    "strided": ((6, 8, 4), {"stride": 2, "padding": 1}),
    "valid": ((6, 8, 3), {}),
    "grouped": ((6, 8, 3), {"padding": 1, "groups": 2}),
    "dilated": ((6, 8, 3), {"padding": 2, "dilation": 2}),
    "reflected": ((6, 8, 3), {"padding": 1, "padding_mode": "reflect"}),
    "even": ((6, 8, 2), {"padding": "same"}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_that_of_pytorch(name, relu, ran):
    args, options = LAYERS[name]
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(*args, **options)
    torch.manual_seed(0)
    ours = Conv2d(*args, **options, relu=relu)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), strict=True)
    x = torch.randn(2, 6, 11, 12)
    expected = F.relu(theirs(x)) if relu else theirs(x)
    with ran("conv2d", STANDS_IN if name in ("3x3", "same", "1x1") else "reference"):
        got = ours(x)
    torch.testing.assert_close(got, expected)
    if name in ("3x3", "valid"):
        torch.testing.assert_close(ours(x[0]), expected[0])  # without a batch, as theirs
    in_bfloat16 = "reference"
    if name in ("3x3", "same", "1x1"):
        in_bfloat16 = "cpu" if IN_BFLOAT16 else WIDENED
    with torch.autocast("cpu"), ran("conv2d", in_bfloat16):
        halves = ours(x)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), expected, atol=0.03, rtol=0.03)
    with ran("conv2d", in_bfloat16):
        halves = copy.deepcopy(ours).bfloat16()(x.bfloat16())
    torch.testing.assert_close(halves.float(), expected, atol=0.03, rtol=0.03)
    if name == "3x3":
        torch.testing.assert_close(torch.jit.trace(ours, x)(x), ours(x))


@pytest.mark.parametrize(("channels", "side", "fast"), [(4, 6, False), (4, 7, True), (193, 7, False), (192, 7, True)])
def test_layer_in_bfloat16_leaves_to_pytorch_what_is_faster_there(channels, side, fast, ran, monkeypatch):
    monkeypatch.setattr("fastgen.checks.HAS_BFLOAT16", True)
    layer, x = Conv2d(channels, 4, 3, padding=1), torch.randn(1, channels, side, side)
    with torch.autocast("cpu"), ran("conv2d", "cpu" if fast and IN_BFLOAT16 else "reference"):
        layer(x)
    with ran("conv2d", STANDS_IN):
        layer(x)


@pytest.mark.skipif(not backend.ON_X86, reason="layers stand in for PyTorch's on x86 alone")
@pytest.mark.parametrize(
    ("op", "layer", "shape"),
    [
        ("conv2d", Conv2d(6, 8, 3, padding=1), (2, 6, 12, 14)),
        ("conv2d", Conv1d(6, 8, 1), (2, 6, 200)),
        ("downsample_conv2d", Conv2d(6, 8, 4, stride=2, padding=1), (2, 6, 12, 14)),
        ("upsample_conv2d", ConvTranspose2d(6, 8, 4, stride=2, padding=1), (2, 6, 12, 14)),
        ("linear", Linear(96, 120), (300, 96)),
    ],
)
def test_layers_take_bfloat16_where_the_processor_has_no_instructions_for_it(op, layer, shape, ran, monkeypatch):
    monkeypatch.setattr("fastgen.checks.HAS_BFLOAT16", False)
    x = torch.randn(shape)
    with torch.autocast("cpu"), ran(op, "cpu"):
        halves = layer(x)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), layer(x), atol=0.03, rtol=0.03)


BAD = {
    "x list": ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    "x rank": ({"x": torch.zeros(3, 4, 4).double()}, ValueError, r"x must have shape .*any.*, got \(3, 4, 4\)"),
    "weight channels": ({"weight": torch.zeros(4, 2, 3, 3).double()}, ValueError, "x must have 2 channels, .*got 3"),
    "even kernel": ({"weight": torch.zeros(8, 3, 2, 3).double()}, ValueError, r"odd kernel sizes, got \(2, 3\)"),
    "no outputs": ({"weight": torch.zeros(0, 3, 3, 3).double()}, ValueError, "at least one channel"),
    "bias": ({"bias": torch.zeros(3).double()}, ValueError, r"bias must have shape \(8,\), got \(3,\)"),
    "dtype": ({"bias": torch.zeros(8)}, TypeError, "bias is torch.float32, x is torch.float64"),
    "half": ({"x": torch.zeros(2, 3, 4, 4).half()}, TypeError, "x must be float32, bfloat16 or float64, got"),
    "relu": ({"relu": 1}, TypeError, "relu must be True or False, got 1"),
    "backend": ({"backend": "gpu"}, ValueError, "backend: expected one of cpu"),
    "no kernel": ({"backend": "triton"}, fastgen.BackendError, "'triton' was requested but cannot run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        conv2d(**(arguments(2, 3, 4, 4, 8) | change))


LAYERS_1D = {
    "1": ((6, 8, 1), {}), "1 same": ((6, 8, 1), {"padding": "same", "bias": False}), "3": ((6, 8, 3), {"padding": 1}),
    "5 same": ((6, 8, 5), {"padding": "same"}), "valid": ((6, 8, 3), {}), "even": ((6, 8, 4), {"padding": 2}),
    "strided": ((6, 8, 1), {"stride": 2}), "grouped": ((6, 8, 1), {"groups": 2}),
    "dilated": ((6, 8, 3), {"padding": 2, "dilation": 2}),
}  # fmt: skip


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", LAYERS_1D)
def test_one_dimensional_layer_is_that_of_pytorch(name, relu, ran):
    args, options = LAYERS_1D[name]
    theirs = torch.nn.Conv1d(*args, **options)
    ours = Conv1d(*args, **options, relu=relu)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()), strict=True)
    x = torch.randn(2, 6, 301, requires_grad=True)
    expected = F.relu(theirs(x)) if relu else theirs(x)
    with ran("conv2d", STANDS_IN if name[0].isdigit() else "reference"):
        got = ours(x)
    torch.testing.assert_close(got, expected)
    cotangent = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, [x, *ours.parameters()], cotangent),
        torch.autograd.grad(expected, [x, *theirs.parameters()], cotangent), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert torch.equal(ours.to(torch.bfloat16)(x.bfloat16()).isnan().any(), torch.tensor(False))


def test_pointwise_convolutions_of_many_images_and_pixels():
    """More pixels than are summed at once, and images that end within a vector."""
    for shape in ((2, 70, 23, 29, 40), (9, 5, 7, 7, 130), (1, 3, 1, 1000, 1)):
        compare(conv2d, arguments(*shape, (1, 1)), torch.float32)
        compare(conv2d, arguments(*shape, (1, 1)), torch.float64)
