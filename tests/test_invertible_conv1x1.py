"""The invertible 1x1 convolution against the float64 reference and the determinant; its layer's two forms."""

import pytest
import torch
from op_helpers import DTYPES, compare

from fastgen.nn import InvertibleConv1x1
from fastgen.ops import invertible_conv1x1
from fastgen.ops.invertible_conv1x1 import invertible_conv1x1_reference, lu_inverse, lu_weight

CHANNELS = [1, 3, 4, 6, 7, 12, 13, 48]


def arguments(batch, channels, size=(), norm=False):
    double = {"dtype": torch.float64}
    args = {
        "x": torch.randn(batch, channels, *size, **double),
        "lower": 0.3 * torch.randn(channels, channels, **double) / channels**0.5,
        "upper": 0.3 * torch.randn(channels, channels, **double) / channels**0.5,
        "log_diagonal": 0.3 * torch.randn(channels, **double),
    }
    if norm:
        args |= {"log_scale": 0.3 * torch.randn(channels, **double), "shift": torch.randn(channels, **double)}
    return args


def fixed(channels):
    return {"sign": torch.randn(channels).sign(), "permutation": torch.randperm(channels)}


def with_fixed(channels):
    kept = fixed(channels)

    def op(x, lower, upper, log_diagonal, **more):
        return invertible_conv1x1(x, lower, upper, log_diagonal, kept["sign"].to(x), kept["permutation"], **more)

    return op


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(channels, inverse, dtype):
    for batch, size, norm in ((3, (), True), (2, (5, 31), False), (5, (64,), True)):
        compare(with_fixed(channels), arguments(batch, channels, size, norm), dtype, inverse=inverse)


def test_many_pixels_and_none():
    compare(with_fixed(12), arguments(3, 12, (50, 51)), torch.float32)
    for batch, size in ((0, (4, 4)), (2, (0, 4))):
        compare(with_fixed(4), arguments(batch, 4, size, True), torch.float32)


def test_weight_inverse_and_log_det():
    args, kept = arguments(2, 9, (4,), True), fixed(9)
    factors = [args[k] for k in ("lower", "upper", "log_diagonal")] + [kept["sign"].double(), kept["permutation"]]
    weight = lu_weight(*factors)
    torch.testing.assert_close(lu_inverse(*factors) @ weight, torch.eye(9).double())
    op = lambda **a: invertible_conv1x1(sign=factors[3], permutation=factors[4], **a)  # noqa: E731
    z, log_det = op(**args)
    exact = 4 * (torch.linalg.slogdet(weight)[1] + args["log_scale"].sum())
    torch.testing.assert_close(log_det, exact.expand(2))
    x, undone = op(**(args | {"x": z}), inverse=True)
    torch.testing.assert_close(x, args["x"])
    torch.testing.assert_close(undone, -log_det)


def test_an_image_in_a_batch_is_the_image_alone():
    args, kept = {k: v.float() for k, v in arguments(7, 13, (5, 9)).items()}, fixed(13)
    y, log_det = invertible_conv1x1(**args, **kept, backend="cpu")
    alone = invertible_conv1x1(**(args | {"x": args["x"][4:5]}), **kept, backend="cpu")
    assert torch.equal(alone[0], y[4:5])
    assert torch.equal(alone[1], log_det[4:5])


def test_same_bits_whatever_the_threads():
    args = {k: v.float().requires_grad_() for k, v in arguments(9, 7, (30, 31), True).items()}
    op, results = with_fixed(7), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        y, _ = op(**args, backend="cpu")
        results.append((y, *torch.autograd.grad(y.square().sum(), list(args.values()))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(inverse):
    args = arguments(2, 3, (2, 2), True)
    op = with_fixed(3)
    leaves = tuple(v.requires_grad_() for v in args.values())
    names = list(args)
    assert torch.autograd.gradcheck(
        lambda *v: op(**dict(zip(names, v, strict=True)), inverse=inverse, backend="cpu"), leaves
    )


def test_opcheck_compile_export(ran):
    args, kept = {k: v.float() for k, v in arguments(2, 3, (4, 5)).items()}, fixed(3)
    weight, bias = torch.randn(3, 3), torch.randn(3)
    ops = torch.ops.fastgen
    torch.library.opcheck(ops.mix_channels.default, (args["x"], weight, bias))
    torch.library.opcheck(ops.mix_channels_backward.default, (args["x"], args["x"], weight))
    factors = [args[k] for k in ("lower", "upper", "log_diagonal")] + [kept["sign"], kept["permutation"]]
    for inverse in (False, True):
        for norm in ((None, None), (bias, bias)):
            y, log_det, mixed = ops.invertible_conv1x1(args["x"], *factors, *norm, inverse)
            torch.library.opcheck(ops.invertible_conv1x1.default, (args["x"], *factors, *norm, inverse))
            torch.library.opcheck(
                ops.invertible_conv1x1_backward.default, (y, log_det, args["x"], mixed, *factors, *norm, inverse)
            )
    torch._dynamo.reset()
    compiled = torch.compile(lambda **a: invertible_conv1x1(**a), fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(**args, **kept), invertible_conv1x1_reference(**args, **kept))
    with ran("invertible_conv1x1", "cpu"):
        invertible_conv1x1(**args, **kept)
    with ran("invertible_conv1x1", "reference"):
        invertible_conv1x1(**args, **kept, backend="reference")


@pytest.mark.parametrize("norm", [False, True])
def test_layer_in_its_two_forms(norm):
    lu = InvertibleConv1x1(6, actnorm=norm)
    dense = InvertibleConv1x1(6, lu=False, actnorm=norm)
    with torch.no_grad():
        dense.weight.copy_(lu.matrix())
    torch.testing.assert_close(dense.weight @ dense.weight.T, torch.eye(6), atol=1e-5, rtol=0)
    x = 3 * torch.randn(4, 6, 5, 5) + 1
    results = [layer(x) for layer in (lu, dense)]
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
    if norm:
        torch.testing.assert_close(results[0][0].mean((0, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    for layer in (lu, dense):
        z, log_det = layer(x)
        back, undone = layer.inverse(z)
        torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(undone, -log_det)
        copy = InvertibleConv1x1(6, lu=layer.lu, actnorm=norm)
        copy.load_state_dict(layer.state_dict())
        assert torch.equal(copy(x)[0], z)


def test_singular_weights_are_refused_on_loading():
    dense = InvertibleConv1x1(3, lu=False)
    with pytest.raises(RuntimeError, match="weight is of a singular matrix"):
        dense.load_state_dict({"weight": torch.ones(3, 3)})
    lu = InvertibleConv1x1(3)
    for name, value, message in (
        ("log_diagonal", torch.tensor([0.0, float("-inf"), 0.0]), "log_diagonal holds NaN or infinity"),
        ("log_diagonal", torch.tensor([0.0, -200.0, 0.0]), r"log_diagonal must lie within \+-80"),
        ("lower", torch.full((3, 3), torch.nan), "lower holds NaN or infinity"),
        ("sign", torch.tensor([1.0, 0.0, -1.0]), "sign must hold 1 and -1 alone"),
        ("permutation", torch.tensor([0, 0, 2]), "permutation must hold each of 0 to 2 once"),
    ):
        with pytest.raises(RuntimeError, match=message):
            lu.load_state_dict(lu.state_dict() | {name: value})
    wrapped = torch.nn.ModuleDict({"flow": torch.nn.Sequential(dense)})
    with pytest.raises(RuntimeError, match=r"flow\.0\.weight is of a singular matrix"):
        wrapped.load_state_dict({"flow.0.weight": torch.zeros(3, 3)})


BAD = {
    "x rank": ({"x": torch.zeros(4)}, ValueError, r"x must have shape \(B, C, \*S\)"),
    "lower": ({"lower": torch.zeros(3, 4).double()}, ValueError, r"lower must have shape \(4, 4\), got \(3, 4\)"),
    "log_diagonal": ({"log_diagonal": torch.zeros(3).double()}, ValueError, r"log_diagonal must have shape \(4,\)"),
    "half a norm": ({"shift": torch.zeros(4).double()}, ValueError, "log_scale and shift come together; log_scale is"),
    "permutation": ({"permutation": torch.zeros(3).long()}, ValueError, r"permutation must be int64 \(4,\), got"),
    "mixed": ({"sign": torch.ones(4)}, TypeError, "sign is torch.float32, x is torch.float64"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, message = BAD[case]
    args = arguments(2, 4, (3,)) | {"sign": torch.ones(4).double(), "permutation": torch.arange(4)} | change
    with pytest.raises(kind, match=message):
        invertible_conv1x1(**args)


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_autocast_keeps_all_of_it_exact(which):
    args, kept = {k: v.float() for k, v in arguments(2, 6, (4, 5), True).items()}, fixed(6)
    for inverse in (False, True):
        exact = invertible_conv1x1(**args, **kept, inverse=inverse, backend=which)
        with torch.autocast("cpu", torch.bfloat16):
            got = invertible_conv1x1(**args, **kept, inverse=inverse, backend=which)
        assert torch.equal(got[0], exact[0])
        assert torch.equal(got[1], exact[1])


def test_gradient_of_the_shift_where_the_scale_vanishes():
    args, kept = {k: v.float() for k, v in arguments(2, 3, (4,), True).items()}, fixed(3)
    args["log_scale"].fill_(-110)
    args["shift"].requires_grad_()
    grads = []
    for which in ("cpu", "reference"):
        z, _ = invertible_conv1x1(**args, **kept, backend=which)
        grads.append(torch.autograd.grad(z.sum(), args["shift"])[0])
    torch.testing.assert_close(*grads)
