"""A training step's gradients for each model, beside the same model in plain PyTorch: what its parts add up to.

Once in float32, once under autocast to bfloat16.
"""

import pytest
import torch
from conftest import DTYPES, peak_extra_bytes

import fastgen
from fastgen.models import (
    FVSBN,
    NADE,
    VAE,
    VQVAE,
    GatedPixelCNN,
    GPTPrior,
    PixelCNN,
    PixelRNN,
    PixelSNAIL,
    RealNVP,
    SpeechVQVAE,
    WaveNet,
)


def integers(levels, *size):
    return torch.randint(levels, size, generator=torch.Generator().manual_seed(0))


def floats(*size):
    return torch.rand(size, generator=torch.Generator().manual_seed(0))


DIGITS, VECTORS, CODES = integers(2, 16, 1, 28, 28), integers(2, 100, 784), integers(512, 16, 16, 16)
CASES = {
    "WaveNet, 20 layers R64 S128, B2 T8000": (WaveNet, integers(256, 2, 8000)),
    "PixelCNN, 12 layers x 128, B16 28x28": (PixelCNN, DIGITS),
    "Gated PixelCNN, 10 layers x 128, B16 28x28": (GatedPixelCNN, DIGITS),
    "PixelSNAIL, 4 blocks x 64, B16 28x28": (PixelSNAIL, DIGITS),
    "PixelRNN, 7 row LSTMs x 64, B16 28x28": (lambda: PixelRNN(kind="row"), DIGITS),
    "PixelRNN, 7 diagonal BiLSTMs x 64, B16 28x28": (PixelRNN, DIGITS),
    "GPT, 4 blocks x 128, B16, 16x16 of 512 codes": (lambda: GPTPrior(image_size=(16, 16)), CODES),
    "NADE, 784 inputs, 500 hidden, B100": (lambda: NADE(784), VECTORS),
    "FVSBN, 784 inputs, B100": (lambda: FVSBN(784), VECTORS.float()),
    "VAE, 784 inputs, 40 latent, B100": (lambda: VAE(784, latent=40), VECTORS.float()),
    "RealNVP, B8 3x32x32": (lambda: RealNVP((3, 32, 32)), integers(256, 8, 3, 32, 32)),
    "VQ-VAE, B32 3x32x32": (VQVAE, floats(32, 3, 32, 32)),
    "speech VQ-VAE, B2 T6400": (lambda: SpeechVQVAE(codebook_size=128, downsample=64), integers(256, 2, 6400)),
}


@pytest.mark.parametrize("case", CASES)
def test_training(case, contest, benchmark):
    make, x = CASES[case]
    torch.manual_seed(0)
    model = make().train()
    parameters = list(model.parameters())

    def loss():
        torch.manual_seed(0)
        return model.loss(x) if hasattr(model, "loss") else -model.log_prob(x).mean()

    def step(backend, halves=False):
        def call():
            with fastgen.use_backend(backend):
                with torch.autocast("cpu", torch.bfloat16, enabled=halves):
                    value = loss()
                return torch.autograd.grad(value, parameters)

        return call

    with torch.no_grad():
        loss()  # what the first batch initialises
        frozen = {k: v.clone() for k, v in model.state_dict().items()}
        ours = loss()
        model.load_state_dict(frozen)  # a codebook moves
        with fastgen.use_backend("reference"):
            torch.testing.assert_close(ours, loss(), atol=1e-3, rtol=1e-3)
    ways = {"fastgen": step("auto"), "eager": step("reference")}
    halves = {"fastgen bfloat16": step("auto", True), "eager bfloat16": step("reference", True)}
    contest(ways | (halves if torch.bfloat16 in DTYPES else {}), rounds=5)
    benchmark.extra_info.update(
        case=case, training=True, peak_extra_bytes={name: peak_extra_bytes(way) for name, way in ways.items()}
    )
