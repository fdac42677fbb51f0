"""A VAE's importance-weighted likelihood, beside the plain loop over chunks of samples."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import peak_extra_bytes

from fastgen.models import VAE

IMAGES, SAMPLES, CHUNK = 100, 5000, 50


@torch.no_grad()
def plain(model: VAE, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The estimate as it is commonly written."""
    mean, log_deviation = model.encoder(x).chunk(2, 1)
    parts = []
    for _ in range(SAMPLES // CHUNK):
        noise = torch.randn(CHUNK, *mean.shape, generator=generator)
        z = mean + log_deviation.exp() * noise
        logits = model.decoder(z)
        log_p = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        ratio = (0.5 * (noise.square() - z.square()) + log_deviation).sum(-1)
        parts.append(log_p + ratio)
    return torch.logsumexp(torch.cat(parts), 0) - math.log(SAMPLES)


@pytest.mark.parametrize("hidden", [500])
def test_importance_weighted_likelihood(hidden, contest, limits, benchmark):
    torch.manual_seed(0)
    model = VAE(784, latent=40, hidden=hidden).eval()
    x = torch.randint(2, (IMAGES, 784)).float()
    ways = {
        "fastgen": lambda: model.importance_log_prob(
            x, SAMPLES, chunk=CHUNK, generator=torch.Generator().manual_seed(1)
        ),
        "eager": lambda: plain(model, x, torch.Generator().manual_seed(1)),
    }
    torch.testing.assert_close(ways["fastgen"](), ways["eager"](), rtol=1e-5, atol=1e-3)
    memory = {name: peak_extra_bytes(way) for name, way in ways.items()}
    contest(
        ways, rounds=3, likelihood=True, peak_extra_bytes=memory,
        case=f"importance-weighted likelihood, {SAMPLES} samples for {IMAGES} digits, hidden {hidden}",
    )  # fmt: skip
