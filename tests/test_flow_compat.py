"""The layers that stand in for those of nflows, normflows and FrEIA: same weights, same answers."""

import pytest
import torch
from torch import nn

from fastgen.compat import freia as our_freia
from fastgen.compat import nflows as our_nflows
from fastgen.compat import normflows as our_normflows

IMAGE, VECTOR = (3, 4, 5, 6), (7, 4)


def moved(module):
    """Not as it was born."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p) / max(1, p[0].numel() if p.dim() > 1 else 1) ** 0.5)
    return module


class Net(nn.Module):
    """(inputs, outputs) for vectors and images, with an optional context."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x, context=None):
        y = self.linear(x.movedim(1, -1)).movedim(-1, 1)
        return y if context is None else y + context.reshape(len(y), 1, *(1,) * (y.dim() - 2))


def agree(ours, theirs, x, forwards, backwards, context=()):
    """Outputs, log-dets, and gradients of the input and every parameter, in both directions."""
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for way in (forwards, backwards):
        results = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y, log_det = way(module, leaf, *context)
            weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
            total = (y * weight).sum() + torch.as_tensor(log_det).sum()
            parameters = [p for p in module.parameters() if p.requires_grad]
            grads = torch.autograd.grad(total, [leaf, *parameters], allow_unused=True)
            results.append((y, log_det, grads))
        (y, log_det, grads), (y2, log_det2, grads2) = results
        torch.testing.assert_close(y, y2, atol=2e-5, rtol=2e-5)
        if isinstance(log_det2, torch.Tensor):
            assert log_det.shape == log_det2.shape
        torch.testing.assert_close(log_det, torch.as_tensor(log_det2).expand_as(log_det), atol=1e-4, rtol=1e-4)
        names = ["x", *(n for n, p in ours.named_parameters() if p.requires_grad)]
        theirs_by_name = dict(
            zip(["x", *(n for n, p in theirs.named_parameters() if p.requires_grad)], grads2, strict=True)
        )
        for name, grad in zip(names, grads, strict=True):
            other = theirs_by_name[name]
            if grad is None or other is None:
                assert not any(g is not None and g.any() for g in (grad, other)), name
                continue
            torch.testing.assert_close(grad, other, atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def both_ways(module_call):
    return module_call, lambda m, x, *c: m.inverse(x, *c)


NFLOWS = {
    "last half": lambda lib: lib.AffineCouplingTransform([0, 0, 1, 1], Net),
    "first half": lambda lib: lib.AffineCouplingTransform([1, 1, 0, 0], Net),
    "alternating": lambda lib: lib.AffineCouplingTransform(torch.tensor([1, -1, 1, -1]), Net),
    "additive": lambda lib: lib.AdditiveCouplingTransform([0, 1, 1, 0], Net),
}


@pytest.mark.parametrize("shape", [IMAGE, VECTOR])
@pytest.mark.parametrize("name", NFLOWS)
@pytest.mark.parametrize("conditional", [False, True])
def test_nflows_couplings(name, shape, conditional):
    theirs = pytest.importorskip("nflows.transforms", reason="pip install nflows")
    modules = [moved(NFLOWS[name](lib)) for lib in (our_nflows, theirs)]
    context = (torch.randn(shape[0]),) if conditional else ()
    agree(*modules, torch.randn(shape), *both_ways(lambda m, x, *c: m(x, *c)), context)


def test_nflows_actnorm_and_linear():
    theirs = pytest.importorskip("nflows.transforms", reason="pip install nflows")
    ways = both_ways(lambda m, x: m(x))
    for shape in (IMAGE, VECTOR):
        agree(our_nflows.ActNorm(4).eval(), moved(theirs.ActNorm(4)).eval(), torch.randn(shape), *ways)
    fresh = our_nflows.ActNorm(4)
    z, _ = fresh(5 * torch.randn(IMAGE) + 1)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    x = 5 * torch.randn(20, 4) + 1
    results = [lib.ActNorm(4)(x) for lib in (our_nflows, theirs)]
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
    from nflows.transforms.lu import LULinear

    agree(our_nflows.LULinear(4), moved(LULinear(4, identity_init=False)), torch.randn(VECTOR), *ways)
    ours, peer = our_nflows.LULinear(4), moved(LULinear(4, identity_init=False))
    ours.load_state_dict(peer.state_dict())
    ours.use_cache()
    for name in ("weight", "weight_inverse", "logabsdet"):
        torch.testing.assert_close(getattr(ours, name)(), getattr(peer, name)(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.upper_diag, peer.upper_diag)
    ours, peer = our_nflows.OneByOneConvolution(4), moved(theirs.OneByOneConvolution(4, identity_init=False))
    agree(ours, peer, torch.randn(IMAGE), *ways)


@pytest.mark.parametrize("shape", [IMAGE, VECTOR])
@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv", None])
@pytest.mark.parametrize("mode", ["channel", "channel_inv", "checkerboard", "checkerboard_inv"])
def test_normflows_coupling_block(mode, scale_map, shape):
    theirs = pytest.importorskip("normflows.flows", reason="pip install normflows")
    inputs = shape[1] // 2 if "channel" in mode or len(shape) == 2 else shape[1]
    scaled = scale_map is not None
    outputs = 2 * inputs if scaled else inputs
    modules = [
        moved(lib.AffineCouplingBlock(Net(inputs, outputs), scaled, scale_map or "exp", mode))
        for lib in (our_normflows, theirs)
    ]
    agree(*modules, torch.randn(shape), *both_ways(lambda m, x: m(x)))


def test_normflows_coupling_on_lists():
    theirs = pytest.importorskip("normflows.flows", reason="pip install normflows")
    from normflows.flows.affine.coupling import AffineCoupling

    ours, peer = our_normflows.AffineCoupling(Net(2, 4)), moved(AffineCoupling(Net(2, 4)))
    del theirs

    def call(method):
        def way(m, x):
            (z1, z2), log_det = getattr(m, method)([x[:, :2], x[:, 2:]])
            return torch.cat([z1, z2], 1), log_det

        return way

    agree(ours, peer, torch.randn(VECTOR), call("forward"), call("inverse"))


@pytest.mark.parametrize("given", [("s", "t"), ("s",), ("t",), ()])
def test_normflows_masked(given):
    theirs = pytest.importorskip("normflows.flows", reason="pip install normflows")
    for shape in (VECTOR, IMAGE):
        b = (torch.arange(torch.Size(shape[1:]).numel()) % 2).float().reshape(shape[1:])
        nets = {k: Net(4, 4) for k in given}
        modules = [moved(lib.MaskedAffineFlow(b, **nets)) for lib in (our_normflows, theirs)]
        if given:
            agree(*modules, torch.randn(shape), *both_ways(lambda m, x: m(x)))
        else:
            x = torch.randn(shape)
            torch.testing.assert_close(modules[0](x), modules[1](x))


def test_normflows_actnorm_and_conv():
    theirs = pytest.importorskip("normflows.flows", reason="pip install normflows")
    ways = both_ways(lambda m, x: m(x))
    for shape, size in ((IMAGE, (4, 1, 1)), (VECTOR, (4,))):
        for direction in ("forward", "inverse"):  # either initialises
            x = 3 * torch.randn(shape) + 2
            results = [getattr(lib.ActNorm(size), direction)(x) for lib in (our_normflows, theirs)]
            torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)
        peer = moved(theirs.ActNorm(size))
        peer.data_dep_init_done.fill_(1.0)
        agree(our_normflows.ActNorm(size), peer, torch.randn(shape), *ways)
    for use_lu in (False, True):
        peer = moved(theirs.Invertible1x1Conv(4, use_lu))
        agree(our_normflows.Invertible1x1Conv(4, use_lu), peer, torch.randn(IMAGE), *ways)


def freia_ways():
    def forwards(m, x, *c):
        (y,), log_det = m([x], *([list(c)] if c else []))
        return y, log_det

    def backwards(m, x, *c):
        (y,), log_det = m([x], *([list(c)] if c else []), rev=True)
        return y, log_det

    return forwards, backwards


@pytest.mark.parametrize("shape", [IMAGE, VECTOR])
@pytest.mark.parametrize("clamp", ["ATAN", "TANH", "SIGMOID"])
@pytest.mark.parametrize("kind", ["GLOWCouplingBlock", "RNVPCouplingBlock", "AffineCouplingOneSided"])
@pytest.mark.parametrize("conditional", [False, True])
def test_freia_couplings(kind, clamp, shape, conditional):
    theirs = pytest.importorskip("FrEIA.modules", reason="pip install FrEIA")
    dims_c = [(2, *shape[2:])] if conditional else []
    options = {"subnet_constructor": Net, "clamp": 1.5, "clamp_activation": clamp, "split_len": 0.25}
    modules = [moved(getattr(lib, kind)([shape[1:]], dims_c, **options)) for lib in (our_freia, theirs)]
    context = (torch.randn(shape[0], 2, *shape[2:]),) if conditional else ()
    agree(*modules, torch.randn(shape), *freia_ways(), context)


@pytest.mark.parametrize("shape", [IMAGE, VECTOR])
def test_freia_nice_and_actnorm(shape):
    theirs = pytest.importorskip("FrEIA.modules", reason="pip install FrEIA")
    modules = [moved(lib.NICECouplingBlock([shape[1:]], subnet_constructor=Net)) for lib in (our_freia, theirs)]
    agree(*modules, torch.randn(shape), *freia_ways())
    x = 3 * torch.randn(shape) + 2
    results = [lib.ActNorm([shape[1:]])([x]) for lib in (our_freia, theirs)]
    torch.testing.assert_close(results[0][0][0], results[1][0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-4, rtol=1e-4)
    peer = moved(theirs.ActNorm([shape[1:]]))
    peer.init_on_next_batch = False

    def forwards(m, x):
        out, log_det = m([x])
        return out[0], log_det

    def backwards(m, x):
        out, log_det = m([x], rev=True)
        return out[0], log_det

    agree(our_freia.ActNorm([shape[1:]]), peer, torch.randn(shape), forwards, backwards)


class NoInPlace(Net):
    """FrEIA 0.2 changes the subnet's output in place."""

    def forward(self, x, context=None):
        return super().forward(x) * 1.0


@pytest.mark.parametrize("shape", [IMAGE, VECTOR])
@pytest.mark.parametrize("affine", ["SIGMOID", "SOFTPLUS", "EXP"])
@pytest.mark.parametrize("options", [{}, {"permute_soft": True}, {"reverse_permutation": True}])
def test_freia_all_in_one(shape, affine, options):
    theirs = pytest.importorskip("FrEIA.modules", reason="pip install FrEIA")
    modules = [
        moved(lib.AllInOneBlock([shape[1:]], subnet_constructor=NoInPlace, global_affine_type=affine, **options))
        for lib in (our_freia, theirs)
    ]
    fresh = our_freia.AllInOneBlock([shape[1:]], subnet_constructor=NoInPlace, global_affine_type=affine, **options)
    torch.testing.assert_close(fresh._global_scale(), torch.ones_like(fresh.global_scale))
    torch.testing.assert_close(fresh.w_perm.flatten(1) @ fresh.w_perm_inv.flatten(1), torch.eye(4))
    agree(*modules, torch.randn(shape), *freia_ways())


def test_what_is_not_offered_says_so():
    for call, message in (
        (
            lambda: our_nflows.AffineCouplingTransform([0, 1], Net, nn.Identity()),
            "unconditional_transform is not offered",
        ),
        (lambda: our_nflows.AffineCouplingTransform([[0, 1]], Net), "mask must have one dimension"),
        (lambda: our_nflows.AffineCouplingTransform([0, 1], Net)(torch.zeros(3, 3)), r"inputs must be \(B, 2\)"),
        (lambda: our_nflows.OneByOneConvolution(3)(torch.zeros(2, 3)), r"inputs must have shape \('B', 3, 'H', 'W'\)"),
        (lambda: our_normflows.AffineCouplingBlock(Net(1, 2), split_mode="rows"), "split_mode must be one of"),
        (lambda: our_normflows.AffineCoupling(Net(1, 2), scale_map="tanh"), "scale_map must be one of"),
        (lambda: our_normflows.ActNorm((3, 4, 4)), r"for shapes \(C, 1, ...\), got \(3, 4, 4\)"),
        (lambda: our_normflows.AffineCouplingBlock(Net(2, 2))(torch.zeros(3, 4)), "must give 4 channels, got 2"),
        (lambda: our_normflows.MaskedAffineFlow(torch.full((4,), 0.5)), "b must hold zeros and ones alone"),
        (lambda: our_freia.AllInOneBlock([(4,)], subnet_constructor=Net, gin_block=True), "gin_block is not offered"),
        (lambda: our_freia.GLOWCouplingBlock([(4,)]), "subnet_constructor must be given"),
        (lambda: our_freia.GLOWCouplingBlock([(4,)], subnet_constructor=Net, split_len=5), "split_len must lie in"),
        (lambda: our_freia.GLOWCouplingBlock([(4, 2)], [(1, 3)], subnet_constructor=Net), "do not fit dims_in"),
        (lambda: our_freia.ActNorm([(2,)])([torch.ones(3, 2)]), "have no variance"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
