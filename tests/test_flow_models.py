"""RealNVP and Glow: their density, exact round trips, sampling, labels, and what they refuse."""

import math

import pytest
import torch

from fastgen.models import Glow, RealNVP

MODELS = {"RealNVP": RealNVP, "Glow": Glow}


def shaken(model, scale=0.1):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model.eval()


def small(kind, shape=(1, 4, 4), **options):
    torch.manual_seed(0)
    sizes = {"steps": 2} if kind == "Glow" else {"couplings": 2, "blocks": 1}
    return shaken(MODELS[kind](shape, hidden=8, **sizes, **options))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 4), (2,), (5,)])
def test_log_prob_is_the_change_of_variables(kind, shape):
    image = len(shape) == 3
    model = small(kind, shape, **({"levels": 16} if image else {})).double()
    x = torch.randint(0, 16, (3, *shape)) if image else torch.randn(3, *shape, dtype=torch.float64)
    uniforms = torch.rand(3, *shape, dtype=torch.float64) if image else None
    z, log_p = model.encode(x, uniforms=uniforms)
    assert z.shape == (3, math.prod(shape))
    assert log_p.shape == (3,)
    assert log_p.dtype == torch.float64
    for b in range(3):
        if image:  # as a function of the continuous values x + u

            def of_one(u, b=b):
                return model.encode(x[b : b + 1], uniforms=u[None])[0][0]

            point = uniforms[b]
        else:

            def of_one(v):
                return model.encode(v[None])[0][0]

            point = x[b]
        n = math.prod(shape)
        jacobian = torch.autograd.functional.jacobian(of_one, point).reshape(n, n)
        exact = -0.5 * (z[b].square().sum() + n * math.log(2 * math.pi)) + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(log_p[b], exact, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", MODELS)
def test_density_sums_to_one_over_the_plane(kind):
    model = small(kind, (2,))
    with torch.no_grad():
        side = torch.linspace(-15, 15, 601)
        grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).reshape(-1, 2)
        mass = float(model.log_prob(grid).double().exp().sum()) * (30 / 600) ** 2
    assert abs(mass - 1) < 0.01


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("levels", [2, 32, 256])
def test_encode_then_decode_gives_back_every_pixel(kind, alpha, levels):
    model = small(kind, (3, 8, 8), levels=levels, alpha=alpha)
    x = torch.randint(0, levels, (5, 3, 8, 8))
    x[0], x[1] = 0, levels - 1
    with torch.no_grad():
        assert torch.equal(model.decode(model.encode(x)[0]), x)
        lower = model.log_prob(x, uniforms=torch.rand(x.shape))
        assert torch.isfinite(lower).all()
        bits = model.bits_per_dim(x, uniforms=torch.full(x.shape, 0.5))
        torch.testing.assert_close(bits, -model.encode(x)[1] / (math.log(2) * 192))


@pytest.mark.parametrize("kind", MODELS)
def test_vectors_round_trip(kind):
    model = small(kind, (5,))
    x = torch.randn(7, 5)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(model.encode(x)[0]), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_sampling(kind):
    model = small(kind, (3, 8, 8))
    x = model.sample(4, generator=torch.Generator().manual_seed(0))
    assert x.shape == (4, 3, 8, 8)
    assert x.dtype == torch.int64
    assert 0 <= int(x.min()) <= int(x.max()) < 256
    assert torch.equal(x, model.sample(4, generator=torch.Generator().manual_seed(0)))
    uniforms = torch.rand(4, 192).clamp(1e-6, 1 - 1e-6)
    assert torch.equal(model.sample(4, uniforms=uniforms), model.sample(4, uniforms=uniforms))
    middle = model.sample(2, temperature=0.0)
    assert torch.equal(middle[0], middle[1])
    assert torch.equal(middle, model.sample(2, uniforms=torch.full((2, 192), 0.5)))
    assert model.sample(0).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("kind", MODELS)
def test_interpolation_keeps_its_ends(kind):
    model = small(kind, (1, 8, 8))
    a, b = torch.randint(0, 256, (2, 3, 1, 8, 8))
    way = model.interpolate(a, b, 5)
    assert way.shape == (3, 5, 1, 8, 8)
    assert torch.equal(way[:, 0], a)
    assert torch.equal(way[:, -1], b)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shape", [(1, 4, 4), (2,)])
def test_labels_matter(kind, shape):
    model = small(kind, shape, classes=3)
    x = torch.randint(0, 256, (3, *shape)) if len(shape) == 3 else torch.randn(3, *shape)
    with torch.no_grad():
        z, _log_p = model.encode(x, torch.tensor([0, 1, 2]))
        other = model.encode(x, torch.tensor([1, 1, 0]))
        assert torch.equal(z[1], other[0][1])
        assert not torch.equal(z[0], other[0][0])
        back = model.decode(z, torch.tensor([0, 1, 2]))
        assert model.sample(2, labels=torch.tensor([0, 2])).shape == (2, *shape)
        assert model.interpolate(x[:1], x[1:2], 3, torch.tensor([1])).shape == (1, 3, *shape)
    assert torch.equal(back, x) if len(shape) == 3 else torch.allclose(back, x, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_reversible_trains_as_the_plain_one(kind):
    grads = []
    for reversible in (False, True):
        model = small(kind, (1, 8, 8), reversible=reversible).train()
        x = torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.log_prob(x)
        loss = -model.log_prob(x, generator=torch.Generator().manual_seed(1)).mean()
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 * float(a.abs().max() + 1e-6), rtol=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_state_dict_loads_strictly_and_config_describes_the_model(kind):
    model = small(kind, (3, 4, 4), classes=2)
    copy = MODELS[kind](**model.config).eval()
    copy.load_state_dict(model.state_dict())
    x, labels = torch.randint(0, 256, (2, 3, 4, 4)), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.equal(copy.encode(x, labels)[0], model.encode(x, labels)[0])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shape", [(3, 8, 8), (4,)])
@pytest.mark.parametrize("reversible", [False, True])
def test_empty_batches(kind, shape, reversible):
    options = {} if len(shape) == 1 else {"scales": 2}
    model = small(kind, shape, classes=2, reversible=reversible, **options)
    x = torch.zeros(0, *shape) if len(shape) == 1 else torch.zeros(0, *shape).long()
    labels = torch.zeros(0).long()
    log_p = model.log_prob(x, labels)
    assert log_p.shape == (0,)
    log_p.sum().backward()
    assert model.sample(0, labels=labels).shape == (0, *shape)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (4,), (5,)])
def test_additive_couplings(kind, shape):
    model = small(kind, shape, scale="none")
    x = torch.randint(0, 256, (3, *shape)) if len(shape) == 3 else torch.randn(3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(model.encode(x)[0]), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.4])
def test_every_level_has_a_finite_density(alpha):
    model = small("RealNVP", (1, 4, 4), levels=2, alpha=alpha)
    x = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)]).long()
    for u in (0.0, 1 - 2**-24):
        assert torch.isfinite(model.log_prob(x, uniforms=torch.full(x.shape, u))).all()


BAD = {
    "shape": (lambda m: m((3, 4)), ValueError, r"shape must be \(C, H, W\) or \(D,\), got \(3, 4\)"),
    "scales": (lambda m: m((1, 6, 6), scales=2), ValueError, "scales 2 needs height and width divisible by 4"),
    "scales of vectors": (lambda m: m((4,), scales=2), ValueError, "scales must be 1 for vectors, got 2"),
    "one value": (lambda m: m((1,)), ValueError, r"shape must be at least \(2,\)"),
    "levels": (lambda m: m((1, 4, 4), levels=1), ValueError, "levels must be 0 .* got 1"),
    "alpha": (lambda m: m((1, 4, 4), alpha=0.5), ValueError, r"alpha must be 0 or lie in \[1e-06, 0.5\), got 0.5"),
    "hidden": (lambda m: m((1, 4, 4), hidden=0), ValueError, "hidden must be an integer >= 1, got 0"),
    "x shape": (
        lambda m: m((1, 4, 4)).log_prob(torch.zeros(2, 1, 4, 5).long()),
        ValueError,
        r"x must have shape .*got \(2, 1, 4, 5\)",
    ),
    "x floats": (
        lambda m: m((1, 4, 4)).log_prob(torch.zeros(2, 1, 4, 4)),
        TypeError,
        r"integers in \[0, 256\), got torch.float32",
    ),
    "x values": (
        lambda m: m((1, 4, 4), levels=4).log_prob(torch.full((2, 1, 4, 4), 4)),
        ValueError,
        r"x must lie in \[0, 4\), got 4 to 4",
    ),
    "x integers": (lambda m: m((2,)).log_prob(torch.zeros(2, 2).long()), TypeError, "floating point, got torch.int64"),
    "labels": (lambda m: m((2,)).log_prob(torch.zeros(2, 2), torch.zeros(2).long()), ValueError, "labels must be None"),
    "no labels": (lambda m: m((2,), classes=2).log_prob(torch.zeros(2, 2)), ValueError, "labels must be given"),
    "label range": (
        lambda m: m((2,), classes=2).log_prob(torch.zeros(2, 2), torch.tensor([0, 2])),
        ValueError,
        r"labels must lie in \[0, 2\)",
    ),
    "uniforms": (
        lambda m: m((1, 4, 4)).log_prob(torch.zeros(2, 1, 4, 4).long(), uniforms=torch.zeros(2)),
        ValueError,
        "uniforms must have shape",
    ),
    "sample uniforms": (
        lambda m: m((2,)).sample(2, uniforms=torch.zeros(2, 2)),
        ValueError,
        r"uniforms must lie in \(0, 1\)",
    ),
    "temperature": (
        lambda m: m((2,)).sample(2, temperature=-1.0),
        ValueError,
        "temperature must be finite and >= 0, got -1.0",
    ),
    "batch": (lambda m: m((2,)).sample(-1), ValueError, "batch_size must be an integer >= 0, got -1"),
    "x list": (lambda m: m((2,)).log_prob([1]), TypeError, "x must be a tensor"),
    "end list": (lambda m: m((2,)).interpolate([1], [2], 3), TypeError, "a must be a tensor, got list"),
    "z": (lambda m: m((2,)).decode(torch.zeros(2, 3)), ValueError, r"z must have shape \(B, 2\), got \(2, 3\)"),
    "ends": (
        lambda m: m((2,)).interpolate(torch.zeros(2, 2), torch.zeros(1, 2), 3),
        ValueError,
        "a and b must have one shape",
    ),
    "scale": (lambda m: m((2,), scale="log"), ValueError, "scale must be one of"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("case", BAD)
def test_bad_input(kind, case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(MODELS[kind])
