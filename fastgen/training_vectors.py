"""Training FVSBN, NADE and the VAE on binarised images, and the checkpoints it leaves."""

from __future__ import annotations

import os
from typing import Unpack

import torch
from torch import Tensor, nn

from fastgen.checkpoints import image_size, load_checkpoint
from fastgen.checks import check_tensor
from fastgen.images import save_grid
from fastgen.loop import LoopOptions, TrainingLog, device_of, evenly, fit, loop_options, training_part
from fastgen.models import FVSBN, NADE, VAE

MODELS: dict[str, type[nn.Module]] = {"FVSBN": FVSBN, "NADE": NADE, "VAE": VAE}
VALIDATION_BATCH = 256  # images in one forward
VALIDATION_IMAGES = 1024  # at most
VALIDATION_SEED = 0


def binarised(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """uint8 (N, C, H, W) -> int64 (N, C H W), each pixel 1 with probability pixel / 255."""
    return (torch.rand(images.shape, generator=generator).to(images.device) * 255 < images).flatten(1).long()


def train_vectors(
    model: FVSBN | NADE | VAE,
    images: Tensor,
    **options: Unpack[LoopOptions],
) -> TrainingLog:
    """Maximise the likelihood, or its bound, of random batches, binarised anew each time, with Adam.

    Parameters
    ----------
    model
        Changed in place; of binary values, as many as an image has.
    images
        uint8 (N, C, H, W).
    options
        See `fastgen.loop.LoopOptions`, for the errors too; batches are of 100 images by default, and only gradients of
        a norm above 1000 are clipped.

    Returns
    -------
    The losses of this call and the held-out figures, in nats per image; for the VAE of the negative bound.
    """
    op = "train_vectors"
    loop = loop_options(op, options, batch_size=100, clip_norm=1000.0)
    if type(model).__name__ not in MODELS:
        raise TypeError(f"{op}: model must be one of {', '.join(MODELS)}, got {type(model).__name__}")
    if getattr(model, "values", 2) != 2 or getattr(model, "distribution", "bernoulli") != "bernoulli":
        raise ValueError(f"{op}: model must be one of binary values")
    check_tensor(op, "images", images)
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(f"{op}: images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
    if images[0:1].numel() != (model.inputs if len(images) else 0):
        raise ValueError(
            f"{op}: images must have {model.inputs} values each, as the model has inputs, got {tuple(images.shape)}"
        )
    number, device = training_part(op, "images", len(images), loop["holdout"]), device_of(model)

    def loss() -> Tensor:
        x = binarised(images[torch.randint(number, (loop["batch_size"],))]).to(device)
        return model.loss(x) if isinstance(model, VAE) else -model.log_prob(x).mean()

    return fit(
        op, model, MODELS, loss, (lambda: validate(model, images[number:])) if number < len(images) else None,
        loop, unit="nats per image", image_size=list(images.shape[1:]),
    )  # fmt: skip


@torch.no_grad()
def validate(model: FVSBN | NADE | VAE, images: Tensor, *, most: int = VALIDATION_IMAGES) -> float:
    """Nats per image of at most `most` of the images, spread evenly; the same binarisation, and noise, each time."""
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    x = binarised(evenly(images, most), generator).to(device_of(model))
    model.eval()
    total = 0.0
    for part in x.split(VALIDATION_BATCH):
        if isinstance(model, VAE):
            noise = torch.randn(len(part), model.latent, generator=generator)
            log_p = model.elbo(part, noise=noise.to(part.device))
        else:
            log_p = model.log_prob(part)
        total -= float(log_p.double().sum())
    return total / len(x)


def load_vectors(path: str | os.PathLike[str]) -> tuple[FVSBN | NADE | VAE, tuple[int, int, int]]:
    """The model of a checkpoint, on the CPU, and the (channels, height, width) of the images that it was trained on.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file does not exist, is not such a checkpoint, or its parameters do not fit the model it describes.
    """
    model, content = load_checkpoint(path, MODELS, "train_vectors")
    assert isinstance(model, FVSBN | NADE | VAE)
    channels, height, width = image_size(path, content, "channels, height, width")
    return model, (channels, height, width)


@torch.no_grad()
def save_samples(path: str | os.PathLike[str], model: FVSBN | NADE | VAE, images: Tensor, *, seed: int = 0) -> None:
    """Write a grid: samples of the model (two rows), the binarised images, and their completions from the upper half,
    or of the VAE their reconstructions' probabilities."""
    number, shape = len(images), images.shape
    generator = torch.Generator().manual_seed(seed)
    given = binarised(images, torch.Generator().manual_seed(VALIDATION_SEED)).to(device_of(model))
    model.eval()
    drawn = model.sample(2 * number, generator=generator).view(2, *shape)
    if isinstance(model, VAE):
        last = torch.sigmoid(model.decode(model.encode(given)[0]))
    else:
        known = torch.zeros(shape[1:], dtype=torch.bool)
        known[:, : shape[2] // 2] = True
        last = model.sample(number, given=given, known=known.flatten().to(given.device), generator=generator)
    save_grid(path, [drawn[0].float(), drawn[1].float(), given.view(shape).float(), last.view(shape).float()])
