"""Training a VQ-VAE or a VQ-VAE-2 on images, and the checkpoints it leaves."""

from __future__ import annotations

import os
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.checkpoints import load_checkpoint
from fastgen.checks import check_tensor
from fastgen.loop import LoopOptions, TrainingLog, device_of, evenly, fit, loop_options, training_part
from fastgen.models import VQVAE, VQVAE2
from fastgen.models.vqvae import perplexity

MODELS: dict[str, type[VQVAE] | type[VQVAE2]] = {"VQVAE": VQVAE, "VQVAE2": VQVAE2}
VALIDATION_BATCH = 256  # images in one forward
VALIDATION_IMAGES = 1024  # at most


def as_floats(images: Tensor, device: torch.device | None = None) -> Tensor:
    """uint8 pixels to float32 in [0, 1], there if a device is given."""
    return images.to(device).float() / 255


def train_vqvae(
    model: VQVAE | VQVAE2,
    images: Tensor,
    **options: Unpack[LoopOptions],
) -> TrainingLog:
    """Minimise the model's loss on random batches, with Adam.

    Parameters
    ----------
    model
        Changed in place.
    images
        uint8 (N, C, H, W), sides multiples of `model.factor`.
    options
        See `fastgen.loop.LoopOptions`, for the errors too; batches are of 64 images by default.

    Returns
    -------
    The losses of this call, and the held-out mean squared errors over the model's variance.
    """
    op = "train_vqvae"
    loop = loop_options(op, options, batch_size=64)
    check_images(op, model, images)
    number = training_part(op, "images", len(images), loop["holdout"])
    train, held_out, device = images[:number], images[number:], device_of(model)
    return fit(
        op, model, MODELS, lambda: model.loss(as_floats(train[torch.randint(number, (loop["batch_size"],))], device)),
        (lambda: validate(model, held_out)) if len(held_out) else None, loop, unit="loss",
    )  # fmt: skip


def check_images(op: str, model: VQVAE | VQVAE2, images: Tensor) -> None:
    """Raise on images that the model cannot take."""
    check_tensor(op, "images", images)
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != model.image_channels:
        raise ValueError(
            f"{op}: images must be uint8 (N, {model.image_channels}, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if images.shape[2] % model.factor or images.shape[3] % model.factor:
        raise ValueError(
            f"{op}: images must have sides that are multiples of {model.factor}, got {tuple(images.shape[2:])}"
        )


@torch.no_grad()
def validate(model: VQVAE | VQVAE2, images: Tensor) -> float:
    """Mean squared error over the model's variance, of at most 1024 of the uint8 images, spread evenly."""
    chosen = evenly(images, VALIDATION_IMAGES)
    model.eval()
    total = 0.0
    for batch in chosen.split(VALIDATION_BATCH):
        x = as_floats(batch, device_of(model))
        total += float(F.mse_loss(model(x).reconstruction, x)) * len(x)
    return total / len(chosen) / model.variance


@torch.no_grad()
def code_perplexities(model: VQVAE | VQVAE2, images: Tensor) -> list[float]:
    """Of the codes of each level, the top first, for uint8 images."""
    model.eval()
    batches = [model(as_floats(batch, device_of(model))).codes for batch in images.split(VALIDATION_BATCH)]
    levels = [torch.cat([codes.flatten() for codes in level]) for level in zip(*batches, strict=True)]
    return [float(perplexity(codes, model.codebook_size)) for codes in levels]


def load_vqvae(path: str | os.PathLike[str]) -> VQVAE | VQVAE2:
    """The model of a checkpoint, on the CPU.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file does not exist, is not such a checkpoint, or its parameters do not fit the model it describes.
    """
    return load_checkpoint(path, MODELS, "train_vqvae")[0]  # type: ignore[return-value]
