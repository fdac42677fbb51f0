"""masked_conv2d and gated_masked_conv2d: values and gradients against the float64 reference, for every ISA."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import DEVICE, DTYPES, EXACT, EXAMPLES, KERNELS, compare, cpu_only, run

import fastgen
from fastgen import backend
from fastgen.ops import gated_masked_conv2d, masked_conv2d
from fastgen.ops.gated_masked_conv2d import gated_masked_conv2d_reference
from fastgen.ops.masked_conv2d import MASKS, mask_2d, masked_conv2d_reference, weight_mask

pytestmark = pytest.mark.on_device

OPS = {"plain": masked_conv2d, "gated": gated_masked_conv2d}


def arguments(batch, channels, height, width, outs, kernel=(3, 3), cond="none", seed=0):
    """float64 arguments of gated_masked_conv2d (outs: both halves); without `cond` those of masked_conv2d."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    args = {
        "x": normal(batch, channels, height, width),
        "weight": normal(outs, channels, *kernel, scale=(channels * kernel[0] * kernel[1]) ** -0.5),
        "bias": normal(outs),
    }
    if cond != "none":
        args["cond"] = normal(batch, outs, *((height, width) if cond == "position" else (1, 1)))
    return args


def floats(args, dtype=torch.float32):
    return {k: v.to(DEVICE, dtype) for k, v in args.items()}


@pytest.fixture(autouse=True)
def _needs_kernels(need):
    need("gated_masked_conv2d", KERNELS)


SHAPES = [
    # batch, channels, height, width, outs, kernel, colors
    (1, 1, 1, 1, 2, (1, 1), 1),
    (2, 1, 28, 28, 64, (7, 7), 1),
    (1, 64, 13, 28, 96, (3, 3), 1),
    (3, 7, 5, 33, 14, (2, 2), 1),
    (2, 6, 11, 7, 12, (3, 5), 3),
    (1, 3, 4, 61, 6, (1, 4), 3),
    (2, 33, 9, 16, 34, (4, 1), 1),
    (5, 17, 31, 3, 66, (5, 3), 1),
    (2, 4, 3, 2, 8, (7, 9), 2),  # a kernel larger than the image
    (2, 150, 7, 4, 64, (3, 3), 1),  # more channels than have their gradients summed at once
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, mask, dtype):
    *sizes, colors = shape
    compare(masked_conv2d, arguments(*sizes), dtype, mask=mask, colors=colors)
    cond = ("none", "position", "image")[(sum(sizes[:4]) + MASKS.index(mask)) % 3]
    compare(gated_masked_conv2d, arguments(*sizes, cond), dtype, mask=mask, colors=colors)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 4), colors=st.integers(1, 3), groups=st.integers(1, 14), height=st.integers(1, 20),
    width=st.integers(1, 40), outs=st.integers(1, 20), kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    mask=st.sampled_from(MASKS), cond=st.sampled_from(["none", "position", "image"]), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_reference_anywhere(
    batch, colors, groups, height, width, outs, kernel, mask, cond, dtype, seed
):  # fmt: skip
    args = arguments(batch, colors * groups, height, width, 2 * colors * outs, kernel, cond, seed)
    compare(gated_masked_conv2d, args, dtype, mask=mask, colors=colors)
    args.pop("cond", None)
    compare(masked_conv2d, args, dtype, mask=mask, colors=colors)


@pytest.mark.parametrize("cond", ["none", "position", "image"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vertical_stacks_with_conditioning(dtype, cond):
    compare(gated_masked_conv2d, arguments(3, 20, 7, 9, 64, (3, 3), cond), dtype, mask="vertical_B")


@pytest.mark.parametrize("far", [1e8, float("nan"), float("inf")])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float32, 16), *((dtype, 15) for dtype in DTYPES[1:2])], ids=str)
def test_no_pixel_depends_on_what_it_does_not_see(dtype, channels, mask, far):
    args = floats(arguments(1, channels, 9, 10, 64), dtype)
    seen = mask_2d(mask, (3, 3)).flip(0, 1)  # of the outputs around an input, those that see it
    before = gated_masked_conv2d(**args, mask=mask, backend=KERNELS)
    for y, x in ((4, 5), (5, 4), (7, 8)):
        changed = args["x"].clone()
        changed[0, 3, y, x] = far
        unseen = torch.ones(11, 12, dtype=torch.bool)  # with a margin
        unseen[y : y + 3, x : x + 3] = ~seen
        unseen = unseen[1:-1, 1:-1].to(DEVICE)
        after = gated_masked_conv2d(**args | {"x": changed}, mask=mask, backend=KERNELS)
        assert torch.equal(before[..., unseen], after[..., unseen])


@pytest.mark.parametrize("width", [1, 2, 7, 8])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_gradients_of_weights_leave_out_pixels_that_their_taps_do_not_reach(dtype, mask, width):
    """A NaN in the last column reaches the gradients of those taps alone that some output has on it."""
    args = floats(arguments(1, 3, 5, width, 6, (3, 5)), dtype)
    args["x"][0, 1, 2, width - 1] = float("nan")
    args["weight"].requires_grad_()
    out = masked_conv2d(**args, mask=mask, backend=KERNELS)
    (grad,) = torch.autograd.grad(out, args["weight"], torch.ones_like(out))
    live = mask_2d(mask, (3, 5))
    for row in range(3):
        for column in range(5):
            reached = bool(live[row, column]) and 0 <= width - 1 - (column - 2) < width
            assert bool(grad[:, 1, row, column].isnan().all()) == reached, (row, column)
            assert bool(grad[:, 1, row, column].isnan().any()) == reached, (row, column)
    assert not bool(grad[:, [0, 2]].isnan().any())


@cpu_only("rows of tiles that leave the caches are left to the other kernel")
def test_an_image_of_long_rows():
    compare(gated_masked_conv2d, arguments(2, 20, 2, 3000, 32), torch.float32, mask="vertical_B")
    compare(masked_conv2d, arguments(2, 20, 2, 3000, 32), torch.float32, mask="B")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_relu_is_that_of_the_sums(mask, dtype):
    """To the bit; and its gradient is that of the convolution where a result is not zero."""
    for kernel in ((3, 3), (1, 1)):
        args = {k: v.to(DEVICE, dtype) for k, v in arguments(2, 6, 7, 9, 12, kernel).items()}
        leaves = [v.requires_grad_() for v in args.values()]
        sums = masked_conv2d(**args, mask=mask, colors=3, backend=KERNELS)
        result = masked_conv2d(**args, mask=mask, colors=3, relu=True, backend=KERNELS)
        assert torch.equal(result, F.relu(sums))
        assert torch.equal(result, masked_conv2d(**args, mask=mask, colors=3, relu=True, backend=KERNELS).detach())
        cotangent = torch.randn_like(result)
        grads = torch.autograd.grad(result, leaves, cotangent)
        masked = torch.autograd.grad(sums, leaves, torch.where(result > 0, cotangent, 0))
        for got, expected in zip(grads, masked, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    """The same tests under each instruction set that this CPU has."""
    run_under(isa, "matches_reference or behind or bits or vertical or relu", "masked_conv2d")


@cpu_only("threads")
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_number_of_threads(threads, batch):
    torch.set_num_threads(threads)
    compare(gated_masked_conv2d, arguments(batch, 6, 17, 12, 10, (5, 3)), torch.float32, mask="B")


def test_an_image_larger_than_the_caches():
    compare(gated_masked_conv2d, arguments(1, 64, 120, 130, 64), torch.float32, mask="A")


@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 5), (4, 1)])
@pytest.mark.parametrize("mask", MASKS)
def test_sees_what_the_mask_says(mask, kernel):
    """Pixel by pixel: a changed input changes exactly the outputs that have a live tap on it."""
    args = floats(arguments(1, 2, 9, 9, 4, kernel))
    before = gated_masked_conv2d(**args, mask=mask, backend=KERNELS)
    above, left = kernel[0] // 2, kernel[1] // 2
    live = mask_2d(mask, kernel)
    for i, j in ((4, 4), (0, 8), (8, 0)):
        x = args["x"].clone()
        x[0, :, i, j] += 1
        changed = (gated_masked_conv2d(**(args | {"x": x}), mask=mask, backend=KERNELS) != before).any(1)[0]
        for a in range(9):
            for b in range(9):
                tap = (i - a + above, j - b + left)
                inside = 0 <= tap[0] < kernel[0] and 0 <= tap[1] < kernel[1]
                assert bool(changed[a, b]) == (inside and bool(live[tap])), (i, j, a, b)
                ordered = i <= a if mask == "vertical_B" else (i, j) <= (a, b)
                assert ordered or not changed[a, b], "a pixel that comes before saw one that comes after"


@pytest.mark.parametrize("which", [KERNELS, "reference"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mask", ["A", "B"])
def test_colors_are_ordered_within_a_pixel(mask, op, which):
    halves = 2 if op == "gated" else 1
    args = floats(arguments(1, 6, 5, 5, 6 * halves))
    before = OPS[op](**args, mask=mask, colors=3, backend=which)
    for color in range(3):
        x = args["x"].clone()
        x[0, 2 * color : 2 * color + 2, 2, 2] += 1
        changed = (OPS[op](**(args | {"x": x}), mask=mask, colors=3, backend=which) != before)[0, :, 2, 2]
        sees = [bool(changed[2 * g : 2 * g + 2].all()) for g in range(3)]
        assert sees == [g > color or (mask == "B" and g == color) for g in range(3)]
        assert sees == [bool(changed[2 * g : 2 * g + 2].any()) for g in range(3)]


@pytest.mark.parametrize("which", [KERNELS, "reference"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("colors", [1, 3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_weights_behind_the_mask_do_nothing(dtype, mask, colors, op, which):
    """Whatever they hold, NaN included; their gradient is exactly zero."""
    args = floats(arguments(2, 6, 7, 6, 12, (3, 4)))
    live = weight_mask(args["weight"], mask, colors, 2 if op == "gated" else 1).expand_as(args["weight"])
    clean = run(OPS[op], args, dtype, which, mask=mask, colors=colors)
    for poison in (float("nan"), float("inf"), 1e30):
        weight = torch.where(live, args["weight"], poison)
        got = run(OPS[op], args | {"weight": weight}, dtype, which, mask=mask, colors=colors)
        for name, value in got.items():
            assert torch.equal(value, clean[name]), name
        assert not bool(got["grad weight"][~live].any())
        assert bool((got["grad weight"][live] != 0).all())


def test_live_taps_of_a_mask():
    assert int(mask_2d("A", (7, 7)).sum()) == 24
    assert int(mask_2d("B", (7, 7)).sum()) == 25
    assert int(mask_2d("vertical", (3, 3)).sum()) == 3
    assert int(mask_2d("vertical_B", (3, 3)).sum()) == 6
    assert mask_2d("B", (2, 2)).tolist() == [[True, True], [True, True]]


def test_reference_is_conv2d_with_a_masked_weight():
    args = arguments(2, 3, 6, 5, 4)
    mask = torch.ones(3, 3, dtype=torch.float64)
    mask[1, 2] = mask[2] = 0
    exact = F.conv2d(args["x"], args["weight"] * mask, args["bias"], padding=1)
    torch.testing.assert_close(masked_conv2d_reference(**args, mask="B"), exact)
    mask[1, 1] = 0
    tanh, sigmoid = F.conv2d(args["x"], args["weight"] * mask, args["bias"], padding=1).chunk(2, 1)
    got = gated_masked_conv2d_reference(**args, mask="A")
    torch.testing.assert_close(got, torch.tanh(tanh) * torch.sigmoid(sigmoid))


def test_strided_and_expanded_inputs():
    args = floats(arguments(3, 6, 8, 9, 10, (3, 3), "position"))
    plain = gated_masked_conv2d(**args, mask="B", backend=KERNELS)
    strided = args | {
        "x": args["x"].contiguous(memory_format=torch.channels_last),
        "weight": args["weight"].permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "cond": torch.stack([args["cond"]] * 2, -1)[..., 0],
    }
    assert not any(strided[k].is_contiguous() for k in ("x", "weight", "cond"))
    assert torch.equal(plain, gated_masked_conv2d(**strided, mask="B", backend=KERNELS))
    one = args | {"x": args["x"][:1].expand(3, -1, -1, -1)}
    torch.testing.assert_close(
        gated_masked_conv2d(**one, mask="B", backend=KERNELS), gated_masked_conv2d_reference(**one, mask="B")
    )


@pytest.mark.parametrize("which", [KERNELS, "reference"])
@pytest.mark.parametrize("sizes", [(0, 5, 4, 4), (2, 5, 0, 4), (2, 5, 4, 0)])
def test_empty(sizes, which):
    for op in OPS.values():
        for mask, outs in (("A", 6), ("B", 64), ("vertical_B", 64)):
            args = {k: v.requires_grad_() for k, v in floats(arguments(*sizes, outs)).items()}
            y = op(**args, mask=mask, backend=which)
            assert y.shape == (sizes[0], outs if op is masked_conv2d else outs // 2, *sizes[2:])
            y.sum().backward()
            assert args["x"].grad.shape == sizes
            for name in ("weight", "bias"):
                assert torch.equal(args[name].grad, torch.zeros_like(args[name]))


def test_no_live_tap_leaves_the_bias():
    args = floats(arguments(2, 3, 4, 5, 6, (1, 1)))
    got = masked_conv2d(**args, mask="A", backend=KERNELS)
    assert torch.equal(got, args["bias"][:, None, None].expand(2, 6, 4, 5))


def test_without_bias_and_with_x_that_needs_no_gradient():
    args = arguments(2, 5, 7, 8, 6, (3, 3), "image") | {"bias": None}
    compare(gated_masked_conv2d, args, torch.float32, mask="B")
    args = floats(arguments(2, 5, 7, 8, 6))
    args["weight"].requires_grad_()
    grads = []
    for which in (KERNELS, "reference"):
        args["weight"].grad = None
        gated_masked_conv2d(**args, mask="B", backend=which).sum().backward()
        grads.append(args["weight"].grad)
    torch.testing.assert_close(*grads)


def test_two_runs_give_the_same_bits():
    args = arguments(3, 20, 19, 21, 40, (3, 3), "position")
    runs = [run(gated_masked_conv2d, args, torch.float32, KERNELS, mask="B") for _ in range(3)]
    for other in runs[1:]:
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), name
    alone = gated_masked_conv2d(**floats({k: v[1:2] if k in ("x", "cond") else v for k, v in args.items()}), mask="B")
    image = runs[0]["out[0]"][1:2]
    if backend.INTERPRETED:  # numpy multiplies there, and its sums depend on where a row lies in a tile
        torch.testing.assert_close(alone, image, atol=1e-6, rtol=1e-6)
    else:
        assert torch.equal(alone, image), "an image in a batch is the image alone"


def test_inputs_are_left_alone():
    args = floats(arguments(2, 5, 6, 7, 6, (3, 3), "position"))
    before = {k: v.clone() for k, v in args.items()}
    run(gated_masked_conv2d, args, torch.float32, KERNELS, mask="B")
    assert all(torch.equal(args[k], before[k]) for k in args)


def test_nan_reaches_only_what_sees_it():
    args = floats(arguments(1, 4, 20, 30, 6))
    args["x"][0, 2, 7, 11] = float("nan")
    for mask in MASKS:
        got = gated_masked_conv2d(**args, mask=mask, backend=KERNELS).isnan().any(1)[0]
        expected = torch.zeros(20, 30, dtype=torch.bool)
        expected[6:9, 10:13] = mask_2d(mask, (3, 3)).flip(0, 1)
        assert torch.equal(got, expected)


def test_second_derivative_raises():
    args = floats(arguments(1, 2, 3, 4, 4))
    args["x"].requires_grad_()
    out = gated_masked_conv2d(**args, mask="B", backend=KERNELS).square().sum()
    (grad,) = torch.autograd.grad(out, args["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad.sum().backward()


@cpu_only("float64")
@pytest.mark.parametrize("mask", MASKS)
def test_gradcheck(mask):
    for cond in ("position", "image"):
        args = {k: v.requires_grad_() for k, v in arguments(2, 2, 4, 3, 4, (3, 3), cond).items()}
        gated = lambda *v: gated_masked_conv2d(*v, mask=mask, colors=2, backend=KERNELS)  # noqa: E731
        assert torch.autograd.gradcheck(gated, tuple(args.values()))
    plain = tuple(args[k] for k in ("x", "weight", "bias"))
    assert torch.autograd.gradcheck(lambda *v: masked_conv2d(*v, mask=mask, colors=2, backend=KERNELS), plain)


def test_opcheck():
    args = floats(arguments(2, 3, 5, 6, 4, (3, 3), "position"))
    x, weight, bias, cond = args.values()
    ops = torch.ops.fastgen
    for relu in (False, True):
        torch.library.opcheck(ops.masked_conv2d.default, (x, weight, bias, 1, 1, relu))
    torch.library.opcheck(ops.gated_masked_conv2d.default, (x, weight, bias, cond, 0, 1, True))
    torch.library.opcheck(ops.gated_masked_conv2d.default, (x, weight, None, None, 3, 1, False))
    z, kept = ops.gated_masked_conv2d(x, weight, bias, cond, 1, 1, True)
    for need_x in (True, False):
        torch.library.opcheck(ops.masked_conv2d_backward.default, (z, kept, x, weight, cond, 1, 1, False, need_x))
        for relu in (False, True):
            given = (cond, cond.clone() if relu else None, x, weight, None, 1, 1, relu, need_x)
            torch.library.opcheck(ops.masked_conv2d_backward.default, given)


@pytest.mark.parametrize("op", OPS)
def test_compile_fullgraph_forward_backward_and_dynamic(op):
    args = floats(arguments(2, 3, 6, 7, 4))
    args["weight"].requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(lambda **a: OPS[op](**a, mask="B"), fullgraph=True, dynamic=True)
    reference = {"plain": masked_conv2d_reference, "gated": gated_masked_conv2d_reference}[op]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((6, 7), (9, 5), (11, 13)):
            a = args | {"x": torch.randn(2, 3, *size)}
            (grad,) = torch.autograd.grad(compiled(**a).sum(), args["weight"])
            (exact,) = torch.autograd.grad(reference(**a, mask="B").sum(), args["weight"])
            torch.testing.assert_close(grad, exact, atol=1e-4, rtol=1e-4)


def test_export_and_meta():
    class Layer(torch.nn.Module):
        def forward(self, x, weight):
            return masked_conv2d(gated_masked_conv2d(x, weight, mask="B"), weight[:, :2], mask="A")

    args = floats(arguments(2, 3, 6, 7, 4))
    inputs = (args["x"], args["weight"])
    program = torch.export.export(Layer(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))
    assert Layer()(*(t.to("meta") for t in inputs)).shape == (2, 4, 6, 7)


def test_functional_grad():
    args = {k: v.to(EXACT) for k, v in arguments(2, 3, 5, 6, 4).items()}

    def loss(weight, op):
        return op(args["x"], weight, args["bias"], mask="B").square().sum()

    for op, reference in (
        (masked_conv2d, masked_conv2d_reference), (gated_masked_conv2d, gated_masked_conv2d_reference),
    ):  # fmt: skip
        exact = torch.func.grad(lambda w: loss(w, reference))(args["weight"])  # noqa: B023
        torch.testing.assert_close(torch.func.grad(lambda w: loss(w, op))(args["weight"]), exact)  # noqa: B023


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused_not_wrong(op):
    args = floats(arguments(1, 2, 4, 4, 4))
    with pytest.raises(RuntimeError, match="forward"):
        torch.func.jvp(lambda x: OPS[op](**(args | {"x": x}), mask="B", backend=KERNELS), (args["x"],), (args["x"],))


def test_autocast():
    args = floats(arguments(2, 3, 6, 7, 4))
    with torch.autocast(DEVICE, torch.bfloat16):
        z = gated_masked_conv2d(**args, mask="B", backend=KERNELS)
    assert z.dtype == torch.bfloat16
    exact = gated_masked_conv2d_reference(**args, mask="B")
    assert float((z - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("op", OPS)
def test_backend_that_runs(op, ran):
    args = floats(arguments(1, 3, 4, 5, 4))
    name = {"plain": "masked_conv2d", "gated": "gated_masked_conv2d"}[op]
    for which in (None, KERNELS):
        with ran(name, KERNELS):
            OPS[op](**args, mask="A", backend=which)
    with ran(name, "reference"):
        OPS[op](**args, mask="A", backend="reference")
    with ran(name, "reference"), fastgen.use_backend("reference"):
        OPS[op](**args, mask="A")


BAD = {
    "x rank": ({"x": torch.zeros(3, 4)}, ValueError, r"x must have shape .* got \(3, 4\)"),
    "x dtype": ({"x": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, TypeError, "x must be float32.*got torch.int64"),
    "mixed": ({"x": torch.zeros(2, 3, 4, 4)}, TypeError, "weight is torch.float64, x is torch.float32"),
    "channels": ({"weight": torch.zeros(8, 4, 3, 3).double()}, ValueError, "x must have 4 channels, .*got 3"),
    "no rows": ({"weight": torch.zeros(0, 3, 3, 3).double(), "bias": None}, ValueError, "row.*got 0"),
    "no taps": ({"weight": torch.zeros(8, 3, 0, 3).double()}, ValueError, r"kernel size >= 1, got \(0, 3\)"),
    "bias": ({"bias": torch.zeros(7).double()}, ValueError, r"bias must have shape \(8,\), got \(7,\)"),
    "mask": ({"mask": "C"}, ValueError, "mask must be one of .*'vertical_B'.*got 'C'"),
    "mask type": ({"mask": 1}, ValueError, "mask must be one of .*got 1"),
    "colors": ({"colors": 0}, ValueError, "colors must be an integer >= 1, got 0"),
    "input groups": ({"colors": 2}, ValueError, "colors must divide x's channels, got 2 for 3"),
    "output groups": ({"colors": 3}, ValueError, "colors must divide weight's output channels, got 3 for [84]"),
    "device": ({"weight": torch.zeros(8, 3, 3, 3, device="meta").double()}, ValueError, "weight is on meta, x is on"),
    "a list": ({"bias": [0.0] * 8}, TypeError, "bias must be a tensor, got list"),
    "backend": ({"backend": "gpu"}, ValueError, "expected one of cpu, triton"),
    "no triton": ({"backend": "triton"}, fastgen.BackendError, "'triton' was requested but cannot run"),
}
BAD_GATE = {
    "odd rows": ({"weight": torch.zeros(7, 3, 3, 3).double()}, ValueError, "even number of rows.*got 7"),
    "cond": ({"cond": torch.zeros(2, 8, 4, 5).double()}, ValueError, r"cond must have shape \(2, 8, 4, 4\), got"),
    "cond batch": ({"cond": torch.zeros(1, 8, 1, 1).double()}, ValueError, r"cond must have shape \(2, 8, 1, 1\)"),
    "cond list": ({"cond": [1.0]}, TypeError, "cond must be a tensor, got list"),
    "cond rank": ({"cond": torch.zeros(2, 8).double()}, ValueError, r"cond must have shape \(2, 8, 4, 4\), got"),
}


@cpu_only("arguments are checked alike everywhere")
@pytest.mark.parametrize(("op", "case"), [(op, case) for op in OPS for case in BAD] + [("gated", c) for c in BAD_GATE])
def test_bad_input(op, case):
    change, kind, message = (BAD | BAD_GATE)[case]
    args = arguments(2, 3, 4, 4, 8) | {"mask": "A"} | change
    with pytest.raises(kind, match=message):
        OPS[op](**args)
