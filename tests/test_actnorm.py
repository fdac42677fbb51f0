"""Activation normalisation against the float64 reference, and its layer's initialisation."""

import pytest
import torch
from op_helpers import DEVICE, DTYPES, KERNELS, compare, cpu_only

from fastgen.nn import ActNorm
from fastgen.ops import actnorm
from fastgen.ops.actnorm import actnorm_reference

pytestmark = pytest.mark.on_device

SIZES = [
    (1, 1, ()),
    (40, 3, ()),
    (3, 7, (5,)),
    (2, 6, (5, 7)),
    (70, 5, (31,)),
    (3, 4, (33, 65)),
    (0, 4, (3,)),
    (2, 4, (0,)),
]


def arguments(batch, channels, size=()):
    return {
        "x": torch.randn(batch, channels, *size, dtype=torch.float64),
        "log_scale": torch.randn(channels, dtype=torch.float64),
        "shift": torch.randn(channels, dtype=torch.float64),
    }


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(sizes, inverse, dtype):
    compare(actnorm, arguments(*sizes), dtype, inverse=inverse)


@cpu_only("float64")
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", [(), (3,), (2, 5)])
def test_gradcheck_and_jacobian(size, inverse):
    args = arguments(2, 3, size)
    leaves = tuple(v.clone().requires_grad_() for v in args.values())
    assert torch.autograd.gradcheck(lambda *v: actnorm(*v, inverse=inverse, backend="cpu"), leaves)
    x, *rest = args.values()
    _, log_det = actnorm(x, *rest, inverse=inverse)
    jacobian = torch.autograd.functional.jacobian(lambda v: actnorm(v[None], *rest, inverse=inverse)[0], x[0])
    n = x[0].numel()
    torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian.reshape(n, n))[1])


def test_same_bits_whatever_the_threads():
    args = {k: v.float().requires_grad_() for k, v in arguments(50, 5, (9, 9)).items()}
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        y, _ = actnorm(**args, backend=KERNELS)
        results.append((y, *torch.autograd.grad(y.square().sum(), list(args.values()))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_opcheck_compile_export_autocast(ran):
    args = {k: v.float() for k, v in arguments(2, 3, (4, 5)).items()}
    x, log_scale, shift = args.values()
    torch.library.opcheck(torch.ops.fastgen.actnorm.default, (x, shift, log_scale.exp(), shift))
    torch.library.opcheck(torch.ops.fastgen.actnorm_backward.default, (x, x, log_scale.exp()))
    torch._dynamo.reset()
    compiled = torch.compile(lambda **a: actnorm(**a), fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(**args), actnorm_reference(**args))
    with torch.autocast(DEVICE, torch.bfloat16), ran("actnorm", KERNELS):
        y, _ = actnorm(x, log_scale.bfloat16(), shift, backend=None)
    assert y.dtype == torch.float32
    with ran("actnorm", "reference"):
        actnorm(**args, backend="reference")


def test_first_batch_is_standardised_and_only_the_first():
    torch.manual_seed(0)
    layer = ActNorm(3)
    x = (
        torch.randn(64, 3, 5, 5) * torch.tensor([0.1, 1, 30])[:, None, None]
        + torch.tensor([5.0, 0, -100])[:, None, None]
    )
    layer.eval()
    assert torch.equal(layer(x)[0], x), "nothing is learned outside training"
    layer.train()
    z, log_det = layer(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(log_det, (25 * layer.log_scale.sum()).expand(64))
    before = layer.log_scale.clone()
    layer(2 * x)
    assert torch.equal(layer.log_scale, before)
    loaded = ActNorm(3)
    loaded.load_state_dict(layer.state_dict())
    loaded(7 * x)
    assert torch.equal(loaded.log_scale, before), "what is loaded is not initialised again"
    x2, undone = layer.inverse(z)
    torch.testing.assert_close(x2, x, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(undone, -log_det)


def test_constant_channels_are_only_shifted():
    layer = ActNorm(2)
    x = torch.randn(16, 2)
    x[:, 1] = 3
    with pytest.warns(UserWarning, match=r"channels \[1\] are constant"):
        z, _ = layer(x)
    assert (z[:, 1] == 0).all()
    assert float(layer.log_scale[1]) == 0


def test_small_channels_are_scaled():
    layer = ActNorm(2)
    z, _ = layer(torch.randn(500, 2) * torch.tensor([1e-12, 1e-3]))
    torch.testing.assert_close(z.std(0), torch.ones(2), atol=1e-2, rtol=0)


def test_nan_at_initialisation_raises():
    with pytest.raises(ValueError, match="x holds NaN or infinity in the batch that initialises"):
        ActNorm(2)(torch.tensor([[1.0, float("nan")], [0.0, 0.0]]))


BAD = {
    "x rank": ({"x": torch.zeros(4)}, ValueError, r"x must have shape \(B, C, \*S\), got \(4,\)"),
    "channels": ({"shift": torch.zeros(3).double()}, ValueError, r"shift must have shape \(4,\), got \(3,\)"),
    "mixed": ({"log_scale": torch.zeros(4)}, TypeError, "log_scale is torch.float32, x is torch.float64"),
    "list": ({"shift": [0.0] * 4}, TypeError, "shift must be a tensor, got list"),
}


@cpu_only("arguments are checked alike everywhere")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        actnorm(**(arguments(2, 4, (3,)) | change))
    with pytest.raises(ValueError, match="channels must be an integer >= 1, got 0"):
        ActNorm(0)


def test_parameters_that_are_copied_in_stay():
    source, layer = ActNorm(3), ActNorm(3)
    source(torch.randn(64, 3) * 5 + 2)
    layer.eval()(torch.randn(4, 3))
    with torch.no_grad():
        for to, value in zip(layer.state_dict().values(), source.state_dict().values(), strict=True):
            to.copy_(value)
    layer.train()(torch.randn(64, 3))
    assert torch.equal(layer.log_scale, source.log_scale)


def test_the_log_det_can_be_added_to():
    _, log_det = ActNorm(3).eval()(torch.randn(4, 3))
    log_det += torch.ones(4)
    assert log_det.tolist() == [1] * 4
