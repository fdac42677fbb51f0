"""Training a VQ-VAE or a VQ-VAE-2 on images, and the checkpoints it leaves."""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.checkpoints import load_checkpoint
from fastgen.checks import check_progress, check_tensor
from fastgen.loop import Progress, TrainingLog, check_loop, fit, training_part
from fastgen.models import VQVAE, VQVAE2
from fastgen.models.vqvae import perplexity

MODELS: dict[str, type[VQVAE] | type[VQVAE2]] = {"VQVAE": VQVAE, "VQVAE2": VQVAE2}
VALIDATION_BATCH = 256  # images in one forward
VALIDATION_IMAGES = 1024  # at most


def as_floats(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [0, 1]."""
    return images.float() / 255


def train_vqvae(
    model: VQVAE | VQVAE2,
    images: Tensor,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    schedule: str = "constant",
    clip_norm: float = 1.0,
    holdout: float = 0.05,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 500,
    resume: bool = False,
    progress: Progress = True,
) -> TrainingLog:
    """Minimise the model's loss on random batches, with Adam.

    The last images are held out. Ctrl-C lets the step in hand finish and writes the checkpoint before KeyboardInterrupt
    is raised. The global random state is left as it was.

    Parameters
    ----------
    model
        Changed in place.
    images
        uint8 (N, C, H, W), sides multiples of `model.factor`.
    steps, seconds
        One of the two: train up to this step, counted from the model's beginning, or for so long.
    batch_size, learning_rate, clip_norm
        Images in a step; of Adam; the norm to which the gradient of all parameters is clipped.
    schedule
        Of the learning rate with `steps`: "constant"; or "cosine", which rises over the first twentieth, then falls to
        zero along a cosine, as it always does with `seconds`.
    holdout
        Share of the images, in [0, 1), or number of them, kept for validation; 0 for none.
    seed
        Of the batches, and of the codes that replace dead ones.
    checkpoint, save_every
        File to write every `save_every` steps and at the end, whole or not at all; validation runs at the same steps.
    resume
        Go on from `checkpoint`. With the same images and options the losses are those of an uninterrupted run.
    progress
        True for a progress bar, or a function of (step, loss).

    Returns
    -------
    The losses of this call, and the held-out mean squared errors over the model's variance.

    Raises
    ------
    ValueError, TypeError
        For an argument outside its range, too few images, or a checkpoint of another model.
    FileNotFoundError, FileExistsError
        If `checkpoint` is missing with resume, or is there without it.
    FloatingPointError
        If the loss is not finite: the parameters are those of the step before.
    """
    op = "train_vqvae"
    check_progress(op, progress)
    check_loop(
        op,
        steps,
        seconds,
        learning_rate,
        clip_norm,
        holdout,
        schedule,
        {"batch_size": batch_size, "save_every": save_every},
    )
    check_images(op, model, images)
    number = training_part(op, "images", len(images), holdout)
    train, held_out = images[:number], images[number:]
    return fit(
        op, model, MODELS, lambda: model.loss(as_floats(train[torch.randint(number, (batch_size,))])),
        (lambda: validate(model, held_out)) if len(held_out) else None, steps=steps, seconds=seconds,
        learning_rate=learning_rate, clip_norm=clip_norm, schedule=schedule, seed=seed,
        checkpoint=checkpoint, save_every=save_every, resume=resume, progress=progress, unit="loss",
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
    chosen = images[:: max(1, len(images) // VALIDATION_IMAGES)][:VALIDATION_IMAGES]
    model.eval()
    total = 0.0
    for batch in chosen.split(VALIDATION_BATCH):
        x = as_floats(batch)
        total += float(F.mse_loss(model(x).reconstruction, x)) * len(x)
    return total / len(chosen) / model.variance


@torch.no_grad()
def code_perplexities(model: VQVAE | VQVAE2, images: Tensor) -> list[float]:
    """Of the codes of each level, the top first, for uint8 images."""
    model.eval()
    batches = [model(as_floats(batch)).codes for batch in images.split(VALIDATION_BATCH)]
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
