"""Log-probabilities of the distributions: they sum or integrate to one, and their gradients are right."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen.ops import distributions


@pytest.mark.parametrize("levels", [2, 256, 65536])
@pytest.mark.parametrize("log_scale", [-40.0, -7.0, -3.0, 0.0, 4.0, 12.0, 40.0])
@pytest.mark.parametrize("mean", [-1.0, 0.0, 0.3, 1.0, -9.0, 50.0])
def test_logistic_sums_to_one(levels: int, log_scale: float, mean: float) -> None:
    """The discretised logistic's levels sum to 1 and gradients are finite, at the edges and for extreme scales too."""
    x = torch.linspace(-1, 1, levels, dtype=torch.float64).float()
    parameters = torch.tensor([0.3, -0.4, mean, -mean / 3, log_scale, log_scale + 1]).requires_grad_()
    log_p = distributions.log_prob("logistic", parameters.expand(levels, 6), x, levels=levels)
    assert log_p.dtype == torch.float32
    assert bool((log_p <= 1e-6).all())
    assert float(log_p.double().logsumexp(0)) == pytest.approx(0, abs=2e-3 if levels == 65536 else 2e-4)
    for value in (log_p.mean(), log_p[0], log_p[-1], log_p[levels // 2]):
        (gradient,) = torch.autograd.grad(value, parameters, retain_graph=True)
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("levels", [256, 65536])
def test_logistic_gradient_is_that_of_float64(levels: int) -> None:
    """log_prob of the logistic mixture and its gradient, against the distribution function in float64."""
    g = torch.Generator().manual_seed(3)
    parameters = torch.randn(400, 9, generator=g)
    parameters[:, 6:] = parameters[:, 6:] * 2 - 3
    x = (torch.randint(0, levels, (400,), generator=g).double() / (levels - 1) * 2 - 1).float()
    x[:20], x[20:40] = -1.0, 1.0
    parameters[:, 3:6] = x[:, None] + torch.randn(400, 3, generator=g) * parameters[:, 6:].exp() * 2
    single = parameters.clone().requires_grad_()
    log_p = distributions.log_prob("logistic", single, x, levels=levels)
    double = parameters.double().requires_grad_()
    logits, means, log_scales = double.chunk(3, -1)
    scale = log_scales.clamp(min=-7.0).exp()
    half, at = 1 / (levels - 1), x.double()[:, None]
    upper = torch.where(at > 1 - half, 1.0, torch.sigmoid((at + half - means) / scale))
    lower = torch.where(at < -1 + half, 0.0, torch.sigmoid((at - half - means) / scale))
    expected = (torch.softmax(logits, -1) * (upper - lower)).sum(-1).log()
    torch.testing.assert_close(log_p.double(), expected, rtol=1e-4, atol=1e-4)
    log_p.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("mixtures", [1, 3])
@pytest.mark.parametrize("log_scale", [-20.0, -6.0, -2.0, 0.5])
def test_gaussian_integrates_to_one(mixtures: int, log_scale: float) -> None:
    """The trapezoid rule over all reals that matter gives 1; log_scale_min widens what is narrower."""
    if mixtures == 1:
        parameters = torch.tensor([0.2, log_scale])
    else:
        parameters = torch.tensor([0.1, -0.5, 0.4, 0.2, -0.3, 0.6, log_scale, log_scale + 0.5, log_scale + 1])
    assert parameters.numel() == distributions.output_channels("gaussian", 0, mixtures)
    width = 12 * math.exp(max(log_scale + 1, -7))
    x = torch.cat([torch.linspace(m - width, m + width, 20001) for m in (-0.3, 0.2, 0.6)]).double().sort().values
    p = distributions.log_prob("gaussian", parameters.expand(len(x), -1), x).exp().double()
    assert float(torch.trapezoid(p, x.float().double())) == pytest.approx(1, abs=2e-3)
