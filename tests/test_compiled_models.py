"""Losses of models compile as one graph, checks of values and all: what cannot be read there is not asked for."""

import pytest
import torch

from fastgen.models import FVSBN, NADE, VAE, VQVAE, GatedPixelCNN, Glow, RealNVP, SpeechVQVAE, WaveNet


def _flow(kind, **options):
    model = kind((1, 8, 8), scales=1, hidden=8, **options)
    x = torch.randint(256, (2, 1, 8, 8))
    uniforms = torch.rand(x.shape)
    model.log_prob(x)  # the first batch sets what actnorm starts with
    return model, lambda: -model.log_prob(x, uniforms=uniforms).mean()


def _vector(kind, *sizes):
    model, x = kind(16, *sizes), torch.randint(2, (8, 16))
    return model, lambda: -model.log_prob(x).mean()


def _vae():
    model, x, noise = VAE(16, latent=2, hidden=8, layers=1), torch.randint(2, (8, 16)).float(), torch.randn(8, 2)
    return model, lambda: -model.elbo(x, noise=noise).mean()


def _vqvae():
    model, x = VQVAE(1, 8, codebook_size=8, code_dim=4).eval(), torch.rand(2, 1, 16, 16)
    return model, lambda: model.loss(x)


def _pixels():
    model, x = GatedPixelCNN(1, 2, 8, 2), torch.randint(2, (2, 1, 8, 8))
    return model, lambda: -model.log_prob(x).mean()


def _wavenet():
    model, x = WaveNet(layers=2, cycles=1, residual_channels=8, skip_channels=8), torch.randint(256, (2, 40))
    return model, lambda: -model.log_prob(x).mean()


def _speech():
    model = SpeechVQVAE(
        hidden_channels=8, codebook_size=6, code_dim=4, downsample=8, layers=2, cycles=1, residual_channels=8,
        skip_channels=8,
    ).eval()  # fmt: skip
    x = torch.randint(256, (2, 64))
    return model, lambda: model.loss(x)


MODELS = {
    "FVSBN": lambda: _vector(FVSBN), "NADE": lambda: _vector(NADE, 8), "VAE": _vae, "VQVAE": _vqvae,
    "GatedPixelCNN": _pixels, "WaveNet": _wavenet, "SpeechVQVAE": _speech, "RealNVP": lambda: _flow(RealNVP),
    "Glow": lambda: _flow(Glow, steps=1),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_one_graph(name, one_thread):
    torch._dynamo.reset()
    model, loss = MODELS[name]()
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")()
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    expected = loss()
    torch.testing.assert_close(value, expected)
    for got, exact in zip(
        grads, torch.autograd.grad(expected, list(model.parameters()), allow_unused=True), strict=True
    ):
        torch.testing.assert_close(got, exact)
