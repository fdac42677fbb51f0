"""The reparameterised sample and its divergence against the float64 reference and torch.distributions."""

import pytest
import torch
from op_helpers import DEVICE, DTYPES, KERNELS, compare, cpu_only
from torch.distributions import Normal, kl_divergence

from fastgen.ops import gaussian_rsample_kl
from fastgen.ops.gaussian_rsample_kl import gaussian_rsample_kl_reference

SIZES = [(1,), (0, 3), (3, 0), (1, 1), (5, 7), (2, 3, 31), (33, 33), (3, 4099), (2, 3, 64, 65)]


def arguments(*size):
    names = ("mean", "log_deviation", "noise")
    return {name: torch.randn(size, dtype=torch.float64) for name in names}


def floats(*size):
    return {k: v.to(DEVICE, torch.float32) for k, v in arguments(*size).items()}


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(size, dtype):
    compare(gaussian_rsample_kl, arguments(*size), dtype)


def test_divergence_is_that_of_torch_distributions():
    args = arguments(5, 9)
    _, kl = gaussian_rsample_kl_reference(**args)
    exact = kl_divergence(Normal(args["mean"], args["log_deviation"].exp()), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(kl, exact)


@cpu_only("in float64")
@pytest.mark.parametrize("used", ["z", "kl", "both"])
def test_gradcheck(used):
    leaves = tuple(v.requires_grad_() for v in arguments(3, 5).values())

    def call(*v):
        z, kl = gaussian_rsample_kl(*v, backend="cpu")
        return {"z": z, "kl": kl, "both": (z, kl)}[used]

    assert torch.autograd.gradcheck(call, leaves[: 2 if used == "kl" else 3] + (() if used != "kl" else leaves[2:]))


def test_strided_and_expanded():
    args = floats(6, 4, 10)
    strided = {k: v.transpose(1, 2) for k, v in args.items()}
    expected = gaussian_rsample_kl(**{k: v.contiguous() for k, v in strided.items()}, backend=KERNELS)
    assert all(map(torch.equal, gaussian_rsample_kl(**strided, backend=KERNELS), expected))
    one = args | {"log_deviation": torch.zeros(1, 1, 1, device=DEVICE).expand(6, 4, 10)}
    torch.testing.assert_close(gaussian_rsample_kl(**one, backend=KERNELS), gaussian_rsample_kl_reference(**one))


def test_extremes():
    mean, noise = torch.zeros(2, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    s = torch.tensor([[-200.0, 0.0, 100.0], [0.0, float("nan"), 0.0]], device=DEVICE)
    z, kl = gaussian_rsample_kl(mean, s, noise, backend=KERNELS)
    expected_z, expected_kl = gaussian_rsample_kl_reference(mean, s, noise)
    assert torch.equal(z.isnan(), expected_z.isnan())
    assert z[0].tolist() == [0.0, 1.0, float("inf")]
    assert kl[0] == expected_kl[0] == float("inf")
    assert kl[1].isnan()


def test_same_bits_whatever_the_threads():
    args = {k: v.requires_grad_() for k, v in floats(3, 20_001).items()}
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        z, kl = gaussian_rsample_kl(**args, backend=KERNELS)
        results.append((z, kl, *torch.autograd.grad(z.square().sum() + kl.sum(), list(args.values()))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_opcheck_compile_autocast(ran):
    args = floats(3, 5)
    torch.library.opcheck(torch.ops.fastgen.gaussian_rsample_kl.default, tuple(args.values()))
    backward = torch.ops.fastgen.gaussian_rsample_kl_backward.default
    for grad_z in (None, torch.randn(3, 5, device=DEVICE)):
        torch.library.opcheck(backward, (grad_z, torch.randn(3, device=DEVICE), *args.values()))
    torch._dynamo.reset()
    compiled = torch.compile(lambda **a: gaussian_rsample_kl(**a), fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(**args), gaussian_rsample_kl_reference(**args))
    with torch.autocast(DEVICE, torch.bfloat16), ran("gaussian_rsample_kl", KERNELS):
        z, kl = gaussian_rsample_kl(args["mean"], args["log_deviation"].bfloat16())
    assert z.dtype == kl.dtype == torch.float32
    with ran("gaussian_rsample_kl", "reference"):
        gaussian_rsample_kl(**args, backend="reference")


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"log_deviation": torch.zeros(2, 4)}, ValueError, r"log_deviation must have shape \(2, 3\), got \(2, 4\)"),
    ({"noise": torch.zeros(3)}, ValueError, r"noise must have shape \(2, 3\), got \(3,\)"),
    ({"noise": torch.zeros(2, 3).double()}, TypeError, "noise is torch.float64"),
    ({"mean": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "mean"),
    ({"mean": 3.0}, TypeError, "mean must be a tensor"),
])  # fmt: skip
def test_bad_input(changes, error, message):
    args = {name: torch.zeros(2, 3) for name in ("mean", "log_deviation", "noise")} | changes
    with pytest.raises(error, match=message):
        gaussian_rsample_kl(**args)
