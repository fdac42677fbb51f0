"""Coupling layers, sequences, and the layers that only move values."""

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
    MLPConditioner,
    MultiScale,
    Permutation,
    ResidualConditioner,
    Split,
    Squeeze,
    checkerboard,
)


def shaken(module, scale=0.2):
    """Conditioners end in zeros: give them something to say."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module.double()


LAYERS = {
    "affine": lambda: AffineCoupling(ConvConditioner(3, 6, 8)),
    "swapped": lambda: AffineCoupling(ConvConditioner(3, 6, 8), swap=True, scale="exp"),
    "sigmoid": lambda: AffineCoupling(ResidualConditioner(3, 6, 8), scale="sigmoid"),
    "additive": lambda: AdditiveCoupling(ConvConditioner(3, 3, 8)),
    "checkerboard": lambda: AffineCoupling(ResidualConditioner(6, 12, 8, 1), mask="checkerboard", bound=2.0),
    "other squares": lambda: AffineCoupling(ConvConditioner(6, 12, 8), mask="checkerboard_inverse"),
    "any mask": lambda: AffineCoupling(ConvConditioner(6, 12, 8), mask=torch.rand(6, 4, 4) < 0.5),
    "additive mask": lambda: AdditiveCoupling(ConvConditioner(6, 6, 8), mask="checkerboard"),
    "actnorm": lambda: ActNorm(6).eval(),
    "conv": lambda: InvertibleConv1x1(6),
    "conv with norm": lambda: InvertibleConv1x1(6, actnorm=True).eval(),
    "dense": lambda: InvertibleConv1x1(6, lu=False),
    "squeeze": Squeeze,
    "reverse": lambda: Permutation(6),
    "permutation": lambda: Permutation(6, "random"),
}


@pytest.mark.parametrize("name", LAYERS)
def test_inverse_undoes_and_log_det_is_the_jacobians(name):
    layer = shaken(LAYERS[name]())
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    z, log_det = layer(x)
    assert log_det.shape == (2,)
    assert log_det.dtype == torch.float64
    back, undone = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(undone, -log_det)
    for b in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: layer(v[None])[0][0], x[b]).reshape(96, 96)
        torch.testing.assert_close(log_det[b], torch.linalg.slogdet(jacobian)[1], atol=1e-9, rtol=1e-9)


def test_coupling_changes_only_its_part():
    x = torch.randn(2, 6, 4, 4).double()
    channel = torch.arange(6)[:, None, None]
    for name, kept in (
        ("affine", channel < 3), ("swapped", channel >= 3), ("checkerboard", checkerboard((4, 4))),
        ("other squares", checkerboard((4, 4), True)),
    ):  # fmt: skip
        z, _ = shaken(LAYERS[name]())(x)
        assert torch.equal(z == x, kept.expand_as(x))


def test_checkerboards_are_each_others_complement():
    a, b = checkerboard((3, 4)), checkerboard((3, 4), inverse=True)
    assert a.shape == (1, 3, 4)
    assert bool(a[0, 0, 0])
    assert torch.equal(a, ~b)
    assert not bool(a[0, 0, 1])


def test_squeeze_puts_blocks_where_glow_does():
    x = torch.arange(32).float().reshape(1, 2, 4, 4)
    z, log_det = Squeeze()(x)
    exact = x.reshape(1, 2, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 8, 2, 2)
    assert torch.equal(z, exact)
    assert (log_det == 0).all()
    assert Squeeze(4)(x)[0].shape == (1, 32, 1, 1)


def sequence(**options):
    return FlowSequence(
        Squeeze(), InvertibleConv1x1(8, actnorm=True), AffineCoupling(ConvConditioner(4, 8, 8)), Permutation(8),
        AffineCoupling(ConvConditioner(8, 16, 8), mask="checkerboard"), ActNorm(8), **options,
    )  # fmt: skip


def test_sequence_and_multi_scale():
    first, second = shaken(sequence().eval()), shaken(FlowSequence(Squeeze(), InvertibleConv1x1(16)).eval())
    x = torch.randn(3, 2, 8, 8).double()
    for split in (Split(), shaken(Split(ConvConditioner(4, 8, 8)))):
        flow = MultiScale([first, second], [split])
        parts, log_det = flow(x)
        assert [tuple(p.shape) for p in parts] == [(3, 4, 4, 4), (3, 16, 2, 2)]
        back, undone = flow.inverse(parts)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(undone, -log_det)

        def flat(v, flow=flow):
            return torch.cat([p.flatten() for p in flow(v[None])[0]])

        jacobian = torch.autograd.functional.jacobian(flat, x[0]).reshape(128, 128)
        torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian)[1], atol=1e-8, rtol=1e-8)


def test_thirty_two_steps_in_float32():
    torch.manual_seed(0)
    layers = []
    for _ in range(32):
        layers += [InvertibleConv1x1(12, actnorm=True), AffineCoupling(ConvConditioner(6, 12, 16), scale="tanh")]
    flow = FlowSequence(*layers)
    x = torch.randn(4, 12, 8, 8)
    flow(x)
    with torch.no_grad():
        for layer in layers[1::2]:
            layer.net.last.weight.normal_(0, 0.05)
    z, log_det = flow(x)
    assert float(log_det.abs().max()) > 10, "the couplings must do something"
    back, undone = flow.inverse(z)
    assert float((back - x).abs().max() / x.abs().max()) < 1e-5
    torch.testing.assert_close(undone, -log_det, rtol=1e-5, atol=1e-3)


def test_log_det_within_1e_5_of_the_float64_jacobian():
    flow = shaken(sequence().eval())
    x = torch.randn(2, 2, 4, 4)
    jacobians = [torch.autograd.functional.jacobian(lambda v: flow(v[None])[0].flatten(), v.double()) for v in x]
    exact = torch.stack([torch.linalg.slogdet(j.reshape(32, 32))[1] for j in jacobians])
    _, log_det = flow.float()(x)
    assert log_det.dtype == torch.float32
    torch.testing.assert_close(log_det.double(), exact, rtol=1e-5, atol=1e-5)


class Conditional(nn.Module):
    """A user's own conditioner, on vectors."""

    def __init__(self, inputs, outputs, cond):
        super().__init__()
        self.net = nn.Linear(inputs + cond, outputs)

    def forward(self, x, cond):
        return self.net(torch.cat([x, cond], 1))


def test_cond_reaches_every_conditioner_and_old_layers_need_none():
    flow = shaken(
        FlowSequence(AffineCoupling(Conditional(2, 4, 3)), Permutation(4), AffineCoupling(Conditional(2, 4, 3)))
    )
    x, cond = torch.randn(5, 4).double(), torch.randn(5, 3).double().requires_grad_()
    z, log_det = flow(x, cond)
    back, _ = flow.inverse(z, cond)
    torch.testing.assert_close(back, x)
    (grad,) = torch.autograd.grad(z.sum() + log_det.sum(), cond)
    assert (grad != 0).all()
    assert not torch.allclose(flow(x, cond + 1)[0], z)


def test_conditioners_begin_at_zero_and_take_a_vector():
    x, v = torch.randn(2, 3, 4, 4), torch.randn(2, 3)
    for net, inputs in ((ConvConditioner(3, 6, 8, 5), x), (ResidualConditioner(3, 6, 8, 1, 5), x),
                        (MLPConditioner(3, 6, 8, cond_channels=5), v)):  # fmt: skip
        out = net(inputs, torch.randn(2, 5))
        assert out.shape == (2, 6, *inputs.shape[2:])
        assert (out == 0).all()
        with pytest.raises(ValueError, match=r"cond must be \(B, 5\), got nothing"):
            net(inputs)


def test_debug_names_the_layer_that_fails():
    flow = sequence(debug=True).eval()
    x = torch.randn(2, 2, 4, 4)
    flow(x)
    with pytest.raises(FloatingPointError, match="FlowSequence: x holds NaN or infinity"):
        flow(torch.where(x > 1, float("inf"), x))
    with pytest.raises(FloatingPointError, match="FlowSequence: z holds NaN or infinity"):
        flow.inverse(torch.full((2, 8, 2, 2), float("nan")))
    with torch.no_grad():
        flow.layers[1].log_diagonal[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"what layer 1 \(InvertibleConv1x1\) returns holds NaN"):
        flow(x)


BAD = {
    "odd channels": (
        lambda: AffineCoupling(nn.Identity())(torch.zeros(2, 3)),
        ValueError,
        r"even number of channels.*\(2, 3\)",
    ),
    "width": (
        lambda: AffineCoupling(nn.Identity())(torch.zeros(2, 4)),
        ValueError,
        r"net must map \(2, 2\) to \(2, 4\), got \(2, 2\)",
    ),
    "no net": (lambda: AffineCoupling(None), TypeError, "net must be a module, got NoneType"),
    "scale": (lambda: AffineCoupling(nn.Identity(), scale="log"), ValueError, "scale must be one of"),
    "mask": (lambda: AffineCoupling(nn.Identity(), mask="stripes"), ValueError, "mask must be one of .*got 'stripes'"),
    "board of vectors": (
        lambda: AffineCoupling(nn.Identity(), mask="checkerboard")(torch.zeros(2, 4)),
        ValueError,
        "needs images",
    ),
    "squeeze": (
        lambda: Squeeze()(torch.zeros(1, 1, 5, 4)),
        ValueError,
        r"2 must divide x's height and width, got \(1, 1, 5",
    ),
    "unsqueeze": (
        lambda: Squeeze().inverse(torch.zeros(1, 3, 2, 2)),
        ValueError,
        r"must divide z's channels, got \(1, 3",
    ),
    "permutation": (lambda: Permutation(3, torch.tensor([0, 0, 1])), ValueError, "each of 0 to 2 once"),
    "permutation name": (lambda: Permutation(3, "swap"), ValueError, "order must be 'reverse', 'random'"),
    "split": (lambda: Split()(torch.zeros(2, 3)), ValueError, "even number of channels"),
    "split width": (
        lambda: Split(nn.Conv2d(2, 2, 1))(torch.randn(2, 4, 3, 3)),
        ValueError,
        r"Split: net must map \(2, 2, 3, 3\) to \(2, 4, 3, 3\), got \(2, 2, 3, 3\)",
    ),
    "scales": (
        lambda: MultiScale([Squeeze()], [Split()]),
        ValueError,
        "splits must be one fewer than flows, got 1 for 1",
    ),
    "parts": (lambda: MultiScale([Squeeze()], []).inverse([]), ValueError, "z must be 1 parts, got 0"),
    "layer": (lambda: FlowSequence(nn.ReLU()), TypeError, "layer 0 must be a module with an inverse, got ReLU"),
    "order": (lambda: Permutation(3)(torch.randn(2, 5)), ValueError, r"x must have shape \(B, 3, \*S\), got \(2, 5\)"),
    "plain 1x1": (
        lambda: InvertibleConv1x1(2, lu=False)(torch.ones(1, 64, 1)),
        ValueError,
        r"mix_channels: weight must have shape \(64, 64\), got \(2, 2\)",
    ),
    "integers": (lambda: InvertibleConv1x1(2, lu=False)(torch.ones(1, 2, 1).int()), TypeError, "x must be float"),
    "actnorm": (lambda: ActNorm(3)(torch.randn(2, 5)), ValueError, r"x must have shape \(B, 3, \*S\), got \(2, 5\)"),
    "x": (lambda: FlowSequence()([1.0]), TypeError, "x must be a tensor, got list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call()
