"""Reversible sequences: the gradients of the plain pass, and none of its memory."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fastgen.nn import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    ConvConditioner,
    FlowSequence,
    InvertibleConv1x1,
    Permutation,
    Squeeze,
)


class Noisy(nn.Module):
    """A conditioner with dropout, running statistics, and optionally `cond`."""

    def __init__(self, inputs, outputs, dropout=0.3):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(inputs, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout),
            nn.Conv2d(8, outputs, 3, padding=1),
        )  # fmt: skip
        self.context = nn.Linear(3, inputs)

    def forward(self, x, cond=None):
        return 0.3 * self.net(x if cond is None else x + self.context(cond)[..., None, None])


def make(reversible, dropout=0.3, **options):
    torch.manual_seed(0)
    layers = [Squeeze(), ActNorm(8)]
    for i in range(3):
        layers += [InvertibleConv1x1(8, actnorm=True, lu=i != 1), AffineCoupling(Noisy(4, 8, dropout), swap=i == 2)]
    layers += [
        AffineCoupling(Noisy(8, 16, dropout), mask="checkerboard", scale="sigmoid"), Permutation(8, "random"),
        AdditiveCoupling(Noisy(4, 4, dropout)),
    ]  # fmt: skip
    return FlowSequence(*layers, reversible=reversible, **options)


def gradients(flow, x, cond=None, autocast=False):
    leaves = [x, *([] if cond is None else [cond])]
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z, log_det = flow(x, cond)
    drawn = torch.rand(())
    loss = z.square().mean() - log_det.mean() / 100
    for p in flow.parameters():
        p.grad = None
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    found = {name: p.grad for name, p in flow.named_parameters()}
    found |= {f"leaf {i}": leaf.grad for i, leaf in enumerate(leaves)}
    return z.detach(), log_det.detach(), found, drawn


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_plain_pass(conditional, dtype):
    x = torch.randn(4, 2, 8, 8, dtype=dtype)
    cond = torch.randn(4, 3, dtype=dtype).requires_grad_() if conditional else None
    results, states = [], []
    for reversible in (False, True):
        flow = make(reversible).to(dtype).train()
        leaf = x.clone().requires_grad_()
        with torch.no_grad():
            flow(leaf, cond)  # initialises, and moves the running statistics
        results.append(gradients(flow, leaf, cond))
        states.append(flow.state_dict())
    (z, log_det, plain, drawn), (z2, log_det2, found, drawn2) = results
    assert torch.equal(z, z2)
    assert torch.equal(log_det, log_det2)
    assert torch.equal(drawn, drawn2)
    for name, grad in plain.items():
        if grad is None:
            assert found[name] is None, name
            continue
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        error = float((found[name] - grad).norm() / (grad.norm() + 1e-12))
        assert error < tolerance or float(grad.norm()) < 1e-6, f"{name}: {error:.1e}"
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), f"{name}: running twice left a trace"


def test_nested_sequences_replay_their_dropout():
    def coupling():
        return AffineCoupling(Noisy(4, 8, dropout=0.5))

    results = []
    for reversible in (False, True):
        torch.manual_seed(0)
        inner = FlowSequence(coupling(), Permutation(8), FlowSequence(coupling(), reversible=True), coupling())
        flow = FlowSequence(Squeeze(), inner, Permutation(8), reversible=reversible, debug=True)
        results.append(gradients(flow, torch.ones(3, 2, 6, 6).cumsum(-1).div(6).requires_grad_())[2])
    assert all(d < 1e-5 for d in flow.drift)
    for name, grad in results[0].items():
        if grad is not None and float(grad.norm()) > 1e-5:
            assert float((results[1][name] - grad).norm() / grad.norm()) < 1e-3, name


def test_spectral_norm_is_what_it_was_in_the_forward_pass():
    results = []
    for debug in (None, False, True):
        torch.manual_seed(0)
        first = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 16, 3, padding=1))
        net = nn.Sequential(first, nn.Tanh(), nn.Conv2d(16, 8, 3, padding=1))
        flow = FlowSequence(AffineCoupling(net), Permutation(8), reversible=debug is not None, debug=bool(debug))
        x = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            found = gradients(flow, x.clone().requires_grad_())[2]
        results.append((found, flow.state_dict()))
    for found, state in results[1:]:
        for name, grad in results[0][0].items():
            if grad is not None:
                torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(state[k], v) for k, v in results[0][1].items())


def test_random_numbers_after_the_backward_pass_are_those_of_the_plain_one():
    draws = []
    for reversible in (False, True):
        flow = make(reversible).train()
        gradients(flow, torch.randn(4, 2, 8, 8).requires_grad_())
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_autocast():
    x = torch.randn(4, 2, 8, 8)
    results = []
    for reversible in (False, True):
        flow = make(reversible).train()
        with torch.no_grad():
            flow(x)
        results.append(gradients(flow, x.clone().requires_grad_(), autocast=True))
    (z, _, plain, _), (z2, _, found, _) = results
    assert z.dtype == torch.float32
    assert torch.equal(z, z2)
    for name, grad in plain.items():
        if grad is not None and float(grad.norm()) > 1e-5:
            assert found[name] is not None, f"{name} has no gradient"
            assert float((found[name] - grad).norm() / grad.norm()) < 0.05, name


def test_backward_inside_autocast_finds_every_gradient():
    flow = make(True).train()
    x = torch.randn(4, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = flow(x)
        (z.float().square().mean() - log_det.mean()).backward()
        flow.reversible = False  # the plain pass after it, in the same region
        kept = [p.grad.clone() if p.grad is not None else None for p in flow.parameters()]
        z, log_det = flow(x)
        (z.float().square().mean() - log_det.mean()).backward()
    weights = [p for name, p in flow.named_parameters() if "net.net" in name]
    assert all(p.grad is not None for p in weights)
    assert sum(k is not None for k in kept) >= len(weights)


def test_gradcheck():
    flow = make(True, dropout=0.0).double().eval()
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(flow, (x,), atol=1e-6)


class Watched(nn.Module):
    """Notes which hidden activations are alive."""

    def __init__(self, alive):
        super().__init__()
        self.one, self.two, self.alive = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1), alive

    def forward(self, x):
        h = torch.relu(self.one(x))
        self.alive.append(weakref.ref(h))
        return 0.1 * self.two(h)


@pytest.mark.parametrize("reversible", [False, True])
def test_no_activation_outlives_its_layer(reversible):
    alive = []
    flow = FlowSequence(*(AffineCoupling(Watched(alive), swap=i % 2 == 1) for i in range(6)), reversible=reversible)
    z, log_det = flow(torch.randn(2, 8, 4, 4))
    gc.collect()
    assert sum(ref() is not None for ref in alive) == (0 if reversible else 6)
    (z.sum() + log_det.sum()).backward()
    assert len(alive) == (12 if reversible else 6), "one evaluation of each conditioner serves both purposes"


def test_drift_is_reported():
    flow = make(True, dropout=0.0, debug=True).train()
    assert flow.drift == []
    x = torch.randn(4, 2, 8, 8)
    z, log_det = flow(x)
    assert flow.drift == []
    (z.sum() + log_det.sum()).backward()
    assert len(flow.drift) == len(flow.layers)
    assert all(0 <= d < 1e-5 for d in flow.drift)
    assert any(d > 0 for d in flow.drift)


def test_drift_after_two_backward_passes():
    flow = make(True, dropout=0.0, debug=True).train()
    z, _ = flow(torch.randn(4, 2, 8, 8))
    for _ in range(2):
        z.sum().backward(retain_graph=True)
        assert all(0 <= d < 1e-5 for d in flow.drift)


class Liar(nn.Module):
    def forward(self, x):
        return 2 * x, x.new_zeros(len(x))

    def inverse(self, z):
        return z / 2.5, z.new_zeros(len(z))


def test_drift_shows_a_wrong_inverse():
    flow = FlowSequence(Permutation(2), Liar(), Permutation(2), reversible=True, debug=True)
    z, _ = flow(torch.randn(3, 2).requires_grad_())
    z.sum().backward()
    assert flow.drift[2] == 0
    assert flow.drift[1] > 0.1
    assert flow.drift[0] > 0.1


def test_shared_and_frozen_parameters():
    shared = ConvConditioner(4, 8, 8)
    nn.init.normal_(shared.last.weight, 0, 0.1)
    grads = []
    for reversible in (False, True):
        flow = FlowSequence(AffineCoupling(shared), Permutation(8), AffineCoupling(shared), reversible=reversible)
        shared.first.weight.requires_grad_(False)
        flow.zero_grad()
        torch.manual_seed(0)
        z, log_det = flow(torch.randn(2, 8, 4, 4))
        (z.square().sum() + log_det.sum()).backward()
        assert shared.first.weight.grad is None
        grads.append([p.grad.clone() for p in shared.parameters() if p.requires_grad])
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)


def test_without_gradients_it_is_the_plain_pass():
    flow = make(True).eval()
    x = torch.randn(2, 2, 8, 8)
    with torch.no_grad():
        z, log_det = flow(x)
    assert not z.requires_grad
    assert not log_det.requires_grad
    back, _ = flow.inverse(z)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)


def test_twice_backward_raises():
    flow = make(True, dropout=0.0).eval()
    x = torch.randn(2, 2, 8, 8, requires_grad=True)
    z, _ = flow(x)
    (grad,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad.sum().backward()
