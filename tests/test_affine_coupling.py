"""The affine coupling against the float64 reference and the Jacobian, and on all that a caller can do to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_helpers import DEVICE, DTYPES, EXACT, EXAMPLES, KERNELS, compare, cpu_only, run

import fastgen
from fastgen import backend
from fastgen.nn import checkerboard
from fastgen.ops import affine_coupling
from fastgen.ops.affine_coupling import LAYOUTS, SCALES, affine_coupling_reference

pytestmark = pytest.mark.on_device


def arguments(batch, channels, size=(), active=None, scale="exp", spread=1.0):
    """float64; `active` channels are transformed, half of them by default."""
    active = channels // 2 if active is None else active
    parts = 1 if scale == "none" else 2
    return {
        "x": torch.randn(batch, channels, *size, dtype=torch.float64),
        "params": spread * torch.randn(batch, parts * active, *size, dtype=torch.float64),
    }


def floats(args):
    return {k: v.float() for k, v in args.items()}


SIZES = [
    (1, 2, ()),
    (3, 6, ()),
    (2, 4, (7,)),
    (3, 6, (5, 31)),
    (2, 2, (33,)),
    (2, 10, (13, 41)),
    (0, 4, (3,)),
    (2, 4, (0,)),
]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(sizes, scale, inverse, dtype):
    compare(affine_coupling, arguments(*sizes, scale=scale), dtype, scale=scale, inverse=inverse)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("size", [(), (5,), (9, 9)])
def test_layouts_and_halves(layout, swap, size, inverse):
    for scale in ("exp", "none"):
        args = arguments(3, 7, size, active=4, scale=scale)
        compare(affine_coupling, args, torch.float32, scale=scale, layout=layout, swap=swap, inverse=inverse, bound=0.7)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masks(scale, inverse, dtype):
    args = arguments(3, 5, (6, 7), active=5, scale=scale)
    for mask in (
        checkerboard((6, 7)),
        torch.rand(3, 5, 6, 7) < 0.5,
        torch.arange(5)[:, None, None] < 2,
        torch.ones(1).bool(),
    ):
        compare(affine_coupling, args, dtype, scale=scale, mask=mask, inverse=inverse)


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    chosen = "values_and_gradients or test_masks or saturated or eager_gives"
    run_under(isa, chosen, "affine_coupling", "actnorm", "invertible_conv1x1")


def test_a_mask_of_halves_is_the_split():
    args = {k: v.to(DEVICE) for k, v in floats(arguments(2, 6, (3, 5))).items()}
    split = affine_coupling(**args, scale="tanh", backend=KERNELS)
    wide = torch.zeros(2, 2, 6, 3, 5, device=DEVICE)
    wide[:, :, 3:] = args["params"].unflatten(1, (2, 3))
    mask = torch.arange(6, device=DEVICE)[:, None, None] < 3
    masked = affine_coupling(args["x"], wide.flatten(1, 2), scale="tanh", mask=mask, backend=KERNELS)
    for a, b in zip(split, masked, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_behind_the_mask_stays_out():
    args = floats(arguments(2, 4, (5, 5), active=4))
    mask = checkerboard((5, 5))
    clean = run(affine_coupling, args, torch.float32, KERNELS, torch.float32, scale="exp", mask=mask)
    args["params"] = torch.where(mask, float("nan"), args["params"])
    for which in (KERNELS, "reference"):
        dirty = run(affine_coupling, args, torch.float32, which, torch.float32, scale="exp", mask=mask)
        for name, value in dirty.items():
            torch.testing.assert_close(value, clean[name])
        assert (dirty["grad params"][mask.expand(2, 8, 5, 5)] == 0).all()


@settings(deadline=None, max_examples=EXAMPLES)
@given(data=st.data())
def test_any_shape_and_option(data):
    size = tuple(data.draw(st.lists(st.integers(1, 40), max_size=2)))
    batch, channels = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    scale = data.draw(st.sampled_from(SCALES))
    masked = data.draw(st.booleans())
    active = channels if masked else data.draw(st.integers(0, channels))
    options = {
        "scale": scale, "inverse": data.draw(st.booleans()), "layout": data.draw(st.sampled_from(LAYOUTS)),
        "swap": not masked and data.draw(st.booleans()), "bound": data.draw(st.floats(0.1, 4)),
        "mask": torch.rand(channels, *size) < 0.5 if masked else None,
    }  # fmt: skip
    args = arguments(batch, channels, size, active, scale)
    compare(affine_coupling, args, data.draw(st.sampled_from(DTYPES)), **options)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("masked", [False, True])
def test_inverse_undoes_and_log_det_is_the_jacobians(scale, masked):
    args = {k: v.to(EXACT) for k, v in arguments(2, 4, (3,), active=4 if masked else None, scale=scale).items()}
    tolerance = 1e-9 if KERNELS == "cpu" else 1e-4
    close = {"atol": tolerance, "rtol": tolerance}
    options = {"scale": scale, "bound": 1.5, "mask": torch.tensor([[1], [0], [1], [0]]) if masked else None}
    for backward in (False, True):
        y, log_det = affine_coupling(**args, inverse=backward, **options)
        x, undone = affine_coupling(y, args["params"], inverse=not backward, **options)
        torch.testing.assert_close(x, args["x"], **close)
        torch.testing.assert_close(undone, -log_det, **close)
        for b in range(2):

            def of_one(x, b=b, backward=backward):
                params = args["params"][b : b + 1]
                return affine_coupling(x[None], params, inverse=backward, **options)[0][0]

            jacobian = torch.autograd.functional.jacobian(of_one, args["x"][b]).reshape(12, 12)
            torch.testing.assert_close(log_det[b], torch.linalg.slogdet(jacobian)[1], **close)


@pytest.mark.parametrize("scale", SCALES)
def test_large_scales_take_the_stable_form(scale):
    s = torch.tensor([-300.0, -120.0, -89.0, -87.0, -40.0, -1e-8, 0.0, 1e-8, 20.0, 60.0, 87.0, 88.5])
    parts = [] if scale == "none" else [s]
    args = {"x": torch.randn(1, 12).double(), "params": torch.cat([*parts, torch.randn(12)])[None].double()}
    if scale == "exp":
        args["params"][:, :12].clamp_(-80, 80)
    compare(affine_coupling, args, torch.float32, scale=scale, mask=torch.zeros(12).bool())
    _, log_det = affine_coupling(**floats(args), scale=scale, backend=KERNELS)
    assert bool(log_det.isfinite())


def test_saturated_sigmoids_keep_their_small_log():
    x, s = torch.randn(1, 64), torch.full((1, 64), 15.0)
    _, log_det = affine_coupling(x, torch.cat([s, x], 1), scale="sigmoid", backend=KERNELS)
    exact = 64 * torch.nn.functional.logsigmoid(torch.tensor(17.0, dtype=torch.float64))
    torch.testing.assert_close(log_det.double()[0], exact, rtol=1e-5, atol=0)


def test_overflow_and_nan_are_what_eager_gives():
    s = torch.tensor([[88.0, 89.0, 200.0, -200.0, float("inf"), float("-inf"), float("nan"), 0.0]])
    params = torch.cat([s, torch.zeros(1, 8)], 1)
    x = torch.full((1, 8), 2.0)
    for inverse in (False, True):
        got = affine_coupling(x, params, scale="exp", backend=KERNELS, inverse=inverse)[0]
        exact = affine_coupling_reference(x, params, scale="exp", inverse=inverse)[0]
        torch.testing.assert_close(got, exact, equal_nan=True, rtol=1e-5, atol=1e-37)


def test_log_det_has_the_same_bits_in_any_batch():
    args = floats(arguments(1000, 6, (9, 11)))
    for scale in SCALES[:3]:
        y, log_det = affine_coupling(**args, scale=scale, backend=KERNELS)
        again = affine_coupling(**args, scale=scale, backend=KERNELS)
        assert torch.equal(y, again[0])
        assert torch.equal(log_det, again[1])
        for part in (slice(0, 1), slice(499, 500), slice(3, 20)):
            alone = affine_coupling(**{k: v[part].clone() for k, v in args.items()}, scale=scale, backend=KERNELS)
            assert torch.equal(alone[0], y[part])
            assert torch.equal(alone[1], log_det[part])
        torch.set_num_threads(1)
        single = affine_coupling(**args, scale=scale, backend=KERNELS)
        torch.set_num_threads(2)
        assert torch.equal(single[1], log_det)


def test_large_tensors_written_past_the_caches():
    args = floats(arguments(3, 24, (512, 300)))
    for inverse in (False, True):
        got = run(affine_coupling, args, torch.float32, KERNELS, torch.float32, scale="sigmoid", inverse=inverse)
        exact = run(affine_coupling, args, torch.float32, "reference", torch.float32, scale="sigmoid", inverse=inverse)
        for name, value in got.items():
            torch.testing.assert_close(value, exact[name], atol=1e-3 if name == "out[1]" else 1e-5, rtol=1e-5)


def test_strides_expansion_and_untouched_inputs():
    args = floats(arguments(3, 6, (5, 9)))
    plain = affine_coupling(**args, scale="exp", backend=KERNELS)
    strided = {k: v.permute(3, 0, 2, 1).clone().permute(1, 3, 2, 0) for k, v in args.items()}
    for a, b in zip(affine_coupling(**strided, scale="exp", backend=KERNELS), plain, strict=True):
        assert torch.equal(a, b)
    one = args | {"x": args["x"][:1].expand(3, -1, -1, -1)}
    got, exact = affine_coupling(**one, scale="exp", backend=KERNELS), affine_coupling_reference(**one, scale="exp")
    torch.testing.assert_close(got, exact)
    before = {k: v.clone() for k, v in args.items()}
    run(affine_coupling, args, torch.float32, KERNELS, scale="exp")
    assert all(torch.equal(args[k], before[k]) for k in args)


@cpu_only("float64")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(scale, inverse):
    args = tuple(v.requires_grad_() for v in arguments(2, 3, (2,), active=2, scale=scale).values())
    assert torch.autograd.gradcheck(
        lambda x, p: affine_coupling(x, p, scale=scale, inverse=inverse, bound=0.8, backend=KERNELS), args
    )


def test_one_gradient_alone():
    args = {k: v.requires_grad_() for k, v in floats(arguments(2, 4, (5,))).items()}
    for output in (0, 1):
        for name, leaf in args.items():
            for inverse in (False, True):
                grads = [
                    torch.autograd.grad(
                        affine_coupling(**args, scale="tanh", inverse=inverse, backend=which)[output].sum(), leaf,
                        allow_unused=True,
                    )[0]
                    for which in (KERNELS, "reference")
                ]  # fmt: skip
                grads = [torch.zeros_like(leaf) if g is None else g for g in grads]
                torch.testing.assert_close(*grads, msg=f"{name} of output {output}")


def test_second_derivative_and_forward_mode_raise():
    args = floats(arguments(1, 4))
    x = args["x"].requires_grad_()
    y, _ = affine_coupling(x, args["params"], scale="exp", backend=KERNELS)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="forward"):
        torch.func.jvp(lambda x: affine_coupling(x, args["params"], scale="exp", backend=KERNELS), (x,), (x,))


def test_opcheck():
    args = floats(arguments(2, 4, (3, 5)))
    x, params = args["x"], args["params"]
    mask = torch.rand(1, 4, 3, 5) < 0.5
    ops = torch.ops.fastgen
    for inverse in (False, True):
        options = (1, 1.0, 0, False, inverse)
        torch.library.opcheck(ops.affine_coupling.default, (x, params, None, *options))
        torch.library.opcheck(ops.affine_coupling.default, (x, params.repeat(1, 2, 1, 1), mask, *options))
        y, log_det = ops.affine_coupling(x, params, None, *options)
        torch.library.opcheck(ops.affine_coupling_backward.default, (y, log_det, x, params, None, *options))


def test_compile_fullgraph_forward_backward_and_dynamic():
    torch._dynamo.reset()
    compiled = torch.compile(lambda **a: affine_coupling(**a, scale="tanh"), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((6, 7), (9, 5), (11, 13)):
            args = {k: v.requires_grad_() for k, v in floats(arguments(2, 4, size)).items()}
            leaves = list(args.values())
            grads = [
                torch.autograd.grad(sum(o.sum() for o in way(args)), leaves)
                for way in (lambda a: compiled(**a), lambda a: affine_coupling_reference(**a, scale="tanh"))
            ]
            torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_export_and_meta():
    class Layer(torch.nn.Module):
        def forward(self, x, params):
            return affine_coupling(x, params, scale="exp")

    args = tuple(floats(arguments(2, 4, (3,))).values())
    program = torch.export.export(Layer(), args)
    torch.testing.assert_close(program.module()(*args), Layer()(*args))
    y, log_det = Layer()(*(t.to("meta") for t in args))
    assert y.shape == (2, 4, 3)
    assert log_det.shape == (2,)


def test_functional_grad_and_vmap():
    args = {k: v.to(EXACT) for k, v in arguments(3, 4, (5,)).items()}

    def loss(params, op):
        y, log_det = op(args["x"], params, scale="exp")
        return y.square().sum() + log_det.sum()

    exact = torch.func.grad(lambda p: loss(p, affine_coupling_reference))(args["params"])
    torch.testing.assert_close(torch.func.grad(lambda p: loss(p, affine_coupling))(args["params"]), exact)


def test_autocast_keeps_x_exact():
    x, params = floats(arguments(2, 4, (5,))).values()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, log_det = affine_coupling(x, params.bfloat16(), scale="exp", backend=KERNELS)
    assert y.dtype == log_det.dtype == torch.float32
    assert torch.equal(y, affine_coupling(x, params.bfloat16().float(), scale="exp", backend=KERNELS)[0])


def test_backend_that_runs(ran):
    args = floats(arguments(1, 4, (5,)))
    for which in (None, KERNELS):
        with ran("affine_coupling", KERNELS):
            affine_coupling(**args, scale="exp", backend=which)
    with ran("affine_coupling", "reference"):
        affine_coupling(**args, scale="exp", backend="reference")


BAD = {
    "x rank": ({"x": torch.zeros(4)}, ValueError, r"x must have shape \(B, D, \*S\), got \(4,\)"),
    "x dtype": ({"x": torch.zeros(2, 4, 3, dtype=torch.int64)}, TypeError, "x must be float32.*got torch.int64"),
    "mixed": ({"x": torch.zeros(2, 4, 3)}, TypeError, "params is torch.float64, x is torch.float32"),
    "batch": ({"params": torch.zeros(3, 4, 3).double()}, ValueError, r"params must have shape .*got \(3, 4, 3\)"),
    "size": ({"params": torch.zeros(2, 4, 4).double()}, ValueError, r"params must have shape .*got \(2, 4, 4\)"),
    "odd": ({"params": torch.zeros(2, 3, 3).double()}, ValueError, r"params must have 2 \* Da, Da <= 4, got 3"),
    "wide": ({"params": torch.zeros(2, 10, 3).double()}, ValueError, r"params must have 2 \* Da, Da <= 4, got 10"),
    "mask width": ({"mask": torch.ones(3)}, ValueError, r"params must have 2 \* 4 channels with mask, got 4"),
    "mask": ({"mask": torch.ones(5, 3)}, ValueError, r"mask must broadcast to x, \(2, 4, 3\), got \(5, 3\)"),
    "mask list": ({"mask": [1]}, TypeError, "mask must be a tensor, got list"),
    "scale": ({"scale": "softplus"}, ValueError, "scale must be one of .*got 'softplus'"),
    "layout": ({"layout": "ts"}, ValueError, "layout must be one of .*got 'ts'"),
    "bound": ({"bound": 0.0}, ValueError, "bound must be finite and > 0, got 0.0"),
    "list": ({"params": [1.0]}, TypeError, "params must be a tensor, got list"),
    "device": ({"params": torch.zeros(2, 4, 3, device="meta").double()}, ValueError, "params is on meta, x is on"),
    "no triton": ({"backend": "triton"}, fastgen.BackendError, "'triton' was requested but cannot run"),
}


@cpu_only("arguments are checked alike everywhere")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        affine_coupling(**(arguments(2, 4, (3,)) | {"scale": "exp"} | change))
