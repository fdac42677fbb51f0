"""Gradients of the kernels are of first order: a derivative of one raises, wherever it would be dropped in silence."""

import pytest
import torch
from op_helpers import cpu_only
from torch.utils.checkpoint import checkpoint

from fastgen import ops

pytestmark = cpu_only("autograd is the same everywhere")

X = {"image": (2, 4, 5, 5), "audio": (2, 4, 6), "rows": (3, 5), "vectors": (2, 4)}


def _nade(weight):
    x = torch.randint(2, (2, 3))
    return ops.nade(x, weight, torch.zeros(4), torch.ones(3, 1, 4), torch.zeros(3, 1), backend="cpu")


W1, W2, V = torch.randn(6, 4, 2), torch.randn(6, 4, 3, 3), torch.randn(5, 3)
CODES, SIGNS = torch.randn(7, 5), torch.ones(4)
OPS = {
    "gated_causal_conv1d": (X["audio"], lambda x: ops.gated_causal_conv1d(x, W1, backend="cpu")),
    "wavenet_layer": (X["audio"], lambda x: ops.wavenet_layer(x, W1, None, V, None, backend="cpu")[1]),
    "masked_conv2d": (X["image"], lambda x: ops.masked_conv2d(x, W2, mask="B", backend="cpu")),
    "gated_masked_conv2d": (X["image"], lambda x: ops.gated_masked_conv2d(x, W2, mask="A", backend="cpu")),
    "conv2d": (X["image"], lambda x: ops.conv2d(x, W2, relu=True, backend="cpu")),
    "affine_coupling": (X["image"], lambda x: ops.affine_coupling(x, x, scale="tanh", backend="cpu")[0]),
    "actnorm": (X["image"], lambda x: ops.actnorm(x, x[0, :, 0, 0], SIGNS, backend="cpu")[0]),
    "vector_quantize": (X["rows"], lambda x: ops.vector_quantize(x, CODES, backend="cpu")[2]),
    "gaussian_rsample_kl": (X["rows"], lambda x: ops.gaussian_rsample_kl(x, x, x.detach(), backend="cpu")[1]),
    "nade": ((3, 1, 4), _nade),
    "bernoulli_perceptron": (
        (2, 5), lambda x: ops.bernoulli_perceptron(x, torch.ones(2, 7), [CODES], [torch.ones(7)], backend="cpu"),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_kernels(need):
    need("nade", "cpu")


@pytest.mark.parametrize("name", OPS)
def test_a_derivative_of_a_gradient_raises(name):
    shape, op = OPS[name]
    x = torch.randn(shape, requires_grad=True)
    y = op(x).sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        (y + grad.square().sum()).backward()  # the gradient that came in needs none itself
    loss = op(x).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.autograd.grad(loss + grad.square().sum(), x)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: op(x).sum())(x).square().sum())(x.detach())


@pytest.mark.parametrize("name", OPS)
def test_first_order_is_as_it_was(name):
    shape, op = OPS[name]
    x = torch.randn(shape, requires_grad=True)
    torch.manual_seed(0)
    (plain,) = torch.autograd.grad(op(x).square().sum(), x)
    torch.manual_seed(0)
    (kept,) = torch.autograd.grad(op(x).square().sum(), x, create_graph=True)
    torch.manual_seed(0)
    functional = torch.func.grad(lambda x: op(x).square().sum())(x.detach())
    assert torch.equal(plain, kept)
    assert torch.equal(plain, functional)
    with pytest.raises(RuntimeError, match="forward"):
        torch.func.jvp(op, (x.detach(),), (torch.ones(shape),))


@pytest.mark.parametrize("name", OPS)
def test_saved_tensors_are_asked_for_once(name):
    """Checkpointing allows no more."""
    shape, op = OPS[name]
    x = torch.randn(shape, requires_grad=True)
    torch.manual_seed(0)
    (expected,) = torch.autograd.grad(op(x).square().sum(), x)
    torch.manual_seed(0)
    y = checkpoint(lambda x: op(x).square().sum(), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y, x, create_graph=True)[0], expected)
