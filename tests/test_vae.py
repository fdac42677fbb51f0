"""The VAE: its bounds against numerical integration, its three likelihoods, and what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastgen.models import VAE


def small(distribution="bernoulli", inputs=3, **options):
    torch.manual_seed(0)
    model = VAE(inputs, latent=1, hidden=8, layers=1, distribution=distribution, **options)
    with torch.no_grad():
        model.decoder[2].weight.mul_(4)
        model.encoder[2].bias[1] += 0.7  # wide enough to reach where the posterior lies
    return model


def exact_log_prob(model, x, cells=4001):
    """log of the integral of p(x | z) p(z) over a latent line."""
    z = torch.linspace(-8, 8, cells)[:, None]
    log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0]) + math.log(16 / (cells - 1))
    return torch.stack([
        torch.logsumexp(model._log_likelihood(row.expand(cells, -1), z).double() + log_p, 0) for row in x
    ])  # fmt: skip


def data(distribution, batch=4, inputs=3):
    torch.manual_seed(1)
    if distribution == "gaussian":
        return torch.randn(batch, inputs) * 0.3
    return torch.randint(2 if distribution == "bernoulli" else 8, (batch, inputs))


@pytest.mark.parametrize("distribution", ["bernoulli", "gaussian", "logistic"])
@torch.no_grad()
def test_bounds_rise_to_the_integral(distribution):
    model, x = small(distribution, levels=8), data(distribution)
    exact = exact_log_prob(model, x)
    elbo = torch.stack([model.elbo(x) for _ in range(2000)]).double().mean(0)
    iwae = torch.stack([model.iwae_bound(x, 5) for _ in range(2000)]).double().mean(0)
    assert bool((elbo < iwae + 0.02).all())
    assert bool((iwae < exact + 0.02).all())
    estimate = model.importance_log_prob(x, 400_000, chunk=20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate.double(), exact, atol=0.03, rtol=0)


@torch.no_grad()
def test_probabilities_sum_to_one():
    model = small()
    everything = torch.tensor(list(itertools.product([0, 1], repeat=3)))
    assert abs(float(exact_log_prob(model, everything).exp().sum()) - 1) < 1e-4
    logistic = small("logistic", inputs=2, levels=6)
    pairs = torch.tensor(list(itertools.product(range(6), repeat=2)))
    assert abs(float(exact_log_prob(logistic, pairs).exp().sum()) - 1) < 1e-4


@pytest.mark.parametrize("distribution", ["bernoulli", "gaussian", "logistic"])
@torch.no_grad()
def test_samples_follow_the_likelihood(distribution):
    model = small(distribution, inputs=2, levels=5)
    noise = torch.tensor([[0.7]]).expand(50_000, 1)
    x = model.sample(50_000, noise=noise, generator=torch.Generator().manual_seed(0))
    if distribution == "gaussian":
        mean, log_scale = model.decode(noise[:1])[0].unbind(-1)
        torch.testing.assert_close(x.mean(0), mean, atol=0.02, rtol=0.02)
        torch.testing.assert_close(x.std(0), log_scale.exp(), atol=0.02, rtol=0.02)
        return
    values = 2 if distribution == "bernoulli" else 5
    pairs = torch.tensor(list(itertools.product(range(values), repeat=2)))
    p = model._log_likelihood(pairs, noise[: len(pairs)]).exp()
    counts = torch.bincount(x @ torch.tensor([values, 1]), minlength=values**2) / len(x)
    torch.testing.assert_close(counts, p, atol=0.01, rtol=0)


def test_loss_is_the_bound_with_beta_and_free_bits():
    x, noise = data("bernoulli"), torch.randn(4, 1)
    model = small()
    torch.testing.assert_close(model.loss(x, noise=noise), -model.elbo(x, noise=noise).mean())
    mean, s = model.encode(x)
    kl = (0.5 * (mean**2 + (2 * s).exp() - 1) - s).mean(0)
    likelihood = -model.loss(x, noise=noise) + kl.sum()
    model.beta = 3.0
    torch.testing.assert_close(model.loss(x, noise=noise), 3 * kl.sum() - likelihood)
    for free in (1e-6, 50.0):
        model.free_bits = free
        torch.testing.assert_close(model.loss(x, noise=noise), 3 * kl.clamp(min=free).sum() - likelihood)


def test_chunks_do_not_change_the_estimate():
    model, x = small(), data("bernoulli")
    draws = [model.importance_log_prob(x, 100, chunk=c, generator=torch.Generator().manual_seed(0)) for c in (100, 20)]
    torch.testing.assert_close(*draws, atol=1e-5, rtol=1e-5)
    noise = torch.randn(100, 4, 1)
    one = model.iwae_bound(x, 1, noise=noise[:1])
    mean, s = model.encode(x)
    z = mean + s.exp() * noise[0]
    normal = torch.distributions.Normal
    by_hand = normal(0.0, 1.0).log_prob(z) - normal(mean, s.exp()).log_prob(z)
    torch.testing.assert_close(one, model._log_likelihood(x, z) + by_hand[:, 0])


def test_learns_with_modules_of_ones_own_and_is_saved():
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(4, 4), nn.Linear(2, 4)
    model = VAE(4, latent=2, encoder=encoder, decoder=decoder)
    x = torch.randint(2, (512, 1)).expand(-1, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(300):
        loss = model.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(-model.importance_log_prob(x, 500).mean()) < 1.1  # of 4 log 2 = 2.77, and log 2 at the least
    first = VAE(4, latent=2, hidden=3)
    again = VAE(**first.config)
    again.load_state_dict(first.state_dict())
    noise = torch.randn(512, 2)
    assert torch.equal(again.elbo(x, noise=noise), first.elbo(x, noise=noise))


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda: VAE(0), ValueError, "inputs must be"),
    (lambda: VAE(3, distribution="poisson"), ValueError, "distribution must be one of"),
    (lambda: VAE(3, beta=-1), ValueError, "beta must be finite and >= 0"),
    (lambda: VAE(3, free_bits=math.nan), ValueError, "free_bits must be finite"),
    (lambda: VAE(3).elbo(torch.rand(2, 3)), ValueError, r"x must be 0 or 1, got 0\.\d+; binarise images first"),
    (lambda: VAE(3).elbo(torch.zeros(2, 4)), ValueError, r"x must be \(B, 3\), got \(2, 4\)"),
    (lambda: VAE(3).elbo([1]), TypeError, "x must be a tensor"),
    (lambda: VAE(3, distribution="logistic").elbo(torch.zeros(2, 3)), TypeError, "x must be int64 levels"),
    (lambda: VAE(3, distribution="logistic", levels=4).elbo(torch.full((2, 3), 4)), ValueError, r"must lie in \[0, 4"),
    (lambda: VAE(3, distribution="gaussian").elbo(torch.full((2, 3), math.nan)), ValueError, "x holds NaN"),
    (lambda: VAE(3, distribution="gaussian").elbo(torch.zeros(2, 3).long()), TypeError, "x must be floating point"),
    (lambda: VAE(3).iwae_bound(torch.zeros(2, 3), 0), ValueError, "samples must be"),
    (lambda: VAE(3).iwae_bound(torch.zeros(2, 3), 2, noise=torch.zeros(2, 2)), ValueError, r"noise must be \(2, 2, 40"),
    (lambda: VAE(3).importance_log_prob(torch.zeros(2, 3), 5, chunk=0), ValueError, "chunk must be"),
    (lambda: VAE(3).sample(-1), ValueError, "batch_size must be"),
    (lambda: VAE(3).decode(torch.zeros(2, 39)), ValueError, r"z must be \(B, 40\), got \(2, 39\)"),
    (lambda: VAE(16, image_size=4), ValueError, "image_size must be two multiples of 4, got 4"),
    (lambda: VAE(3).sample(2, temperature=0), ValueError, "temperature"),
    (lambda: VAE(3).sample(2, uniforms=torch.ones(2, 3)), ValueError, r"uniforms must lie in \[0, 1\)"),
    (lambda: VAE(3).sample(2, noise=torch.ones(2, 3)), ValueError, r"noise must be \(2, 40\)"),
])  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_empty_batches():
    for model in (VAE(6, latent=2, hidden=4), VAE(6, latent=2, hidden=4, distribution="gaussian")):
        for x in (torch.zeros(0, 6), torch.zeros(2, 6)):
            with torch.no_grad():
                assert model.elbo(x).shape == model.importance_log_prob(x, 3, chunk=2).shape == (len(x),)
            assert model.elbo(x).shape == model.iwae_bound(x, 3).shape == (len(x),)


def test_float64_stays_float64():
    model = VAE(6, latent=2, hidden=4).double()
    x, noise = torch.ones(3, 6, dtype=torch.float64), torch.randn(1, 3, 2, dtype=torch.float64)
    mean, log_deviation = model.encode(x)
    z = mean + log_deviation.exp() * noise[0]
    exact = F.logsigmoid(model.decode(z)[..., 0]).sum(1)
    exact = exact + ((noise[0].square() - z.square()) / 2 + log_deviation).sum(1)
    torch.testing.assert_close(model.iwae_bound(x, 1, noise=noise), exact, rtol=1e-13, atol=0)
