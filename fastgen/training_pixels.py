"""Training PixelCNN and its kin on images or maps of codes, and the checkpoints it leaves."""

from __future__ import annotations

import math
import os
from typing import Unpack

import torch
from torch import Tensor

from fastgen.checkpoints import image_size, load_checkpoint
from fastgen.checks import check_classes, check_tensor
from fastgen.images import save_grid
from fastgen.loop import LoopOptions, TrainingLog, device_of, evenly, fit, loop_options, training_part
from fastgen.models import GatedPixelCNN, GPTPrior, PixelCNN, PixelModel, PixelRNN, PixelSNAIL

MODELS: dict[str, type[PixelModel]] = {
    "PixelCNN": PixelCNN, "GatedPixelCNN": GatedPixelCNN, "PixelSNAIL": PixelSNAIL, "PixelRNN": PixelRNN,
    "GPTPrior": GPTPrior,
}  # fmt: skip
VALIDATION_BATCH = 128  # images in one forward
VALIDATION_IMAGES = 1024  # at most
VALIDATION_SEED = 0


def to_levels(images: Tensor, model: PixelModel, generator: torch.Generator | None = None) -> Tensor:
    """uint8 pixels to the model's int64 levels; codes stay as they are.

    Two levels are drawn, each pixel 1 with probability pixel / 255 (dynamic binarisation); more are bins of one width.
    """
    if model.codes:
        return images
    if model.levels == 2:
        return (torch.rand(images.shape, generator=generator).to(images.device) * 255 < images).long()
    return images.long() * model.levels // 256


def to_pixels(values: Tensor, model: PixelModel) -> Tensor:
    """Levels or codes to float32 in [0, 1], (N, C, H, W), for pictures."""
    return (values[:, None] if model.codes else values).float() / (model.levels - 1)


def train_pixels(
    model: PixelModel,
    images: Tensor,
    *,
    labels: Tensor | None = None,
    cond: Tensor | None = None,
    source: str | None = None,
    **options: Unpack[LoopOptions],
) -> TrainingLog:
    """Maximise the likelihood of random batches, with Adam.

    Parameters
    ----------
    model
        Changed in place.
    images
        uint8 (N, C, H, W); for a model of codes int64 (N, H, W). A model of 2 levels sees pixels that are binarised
        anew each time, each 1 with probability pixel / 255; one of more levels, the bin that a pixel falls into.
    labels, cond
        What a conditional model wants, one for each image: see `PixelModel`.
    source
        Kept in the checkpoint: where the images come from.
    options
        See `fastgen.loop.LoopOptions`, for the errors too; batches are of 32 images by default.

    Returns
    -------
    The losses of this call and the held-out figures, in bits per value.
    """
    op = "train_pixels"
    loop = loop_options(op, options)
    check_data(op, model, images)
    given = {name: rows for name, rows in (("labels", labels), ("cond", cond)) if rows is not None}
    for name, rows in given.items():
        check_tensor(op, name, rows)
        if rows.dim() == 0 or len(rows) != len(images):
            raise ValueError(f"{op}: {name} must be one for each of the {len(images)} images, got {tuple(rows.shape)}")
    # all of them before the training, not each when its turn comes
    model.conditioning.check(op, len(images), (images.shape[-2], images.shape[-1]), labels, cond)
    number = training_part(op, "images", len(images), loop["holdout"])
    dims, device = images[0].numel(), device_of(model)

    def loss() -> Tensor:
        chosen = torch.randint(number, (loop["batch_size"],))
        x = to_levels(images[chosen], model).to(device)
        log_p = model.log_prob(x, **{name: rows[chosen].to(device) for name, rows in given.items()})
        return -log_p.mean() / (math.log(2) * dims)

    def held_out() -> float:
        return validate(model, images[number:], *(None if rows is None else rows[number:] for rows in (labels, cond)))

    return fit(
        op, model, MODELS, loss, held_out if number < len(images) else None, loop,
        unit="bits per value", image_size=list(images.shape[-2:]), source=source,
    )  # fmt: skip


def check_data(op: str, model: PixelModel, images: Tensor) -> None:
    """Raise on images or codes that the model cannot take."""
    if not isinstance(model, PixelModel):
        raise TypeError(f"{op}: model must be one of {', '.join(MODELS)}, got {type(model).__name__}")
    check_tensor(op, "images", images)
    came = f"{images.dtype} {tuple(images.shape)}"
    if model.codes:
        if images.dtype != torch.int64 or images.dim() != 3:
            raise ValueError(f"{op}: images must be maps of codes, int64 (N, H, W), got {came}")
        check_classes(op, "images", images, model.codes)
    elif images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != model.image_channels:
        raise ValueError(f"{op}: images must be uint8 (N, {model.image_channels}, H, W), got {came}")
    if 0 in images.shape[1:]:
        raise ValueError(f"{op}: images must have at least one pixel, got {came}")
    if isinstance(model, GPTPrior):
        model.check_size(images.shape[1:])


@torch.no_grad()
def validate(
    model: PixelModel,
    images: Tensor,
    labels: Tensor | None = None,
    cond: Tensor | None = None,
    *,
    most: int = VALIDATION_IMAGES,
) -> float:
    """Bits per value of at most `most` of the images, spread evenly; binarised the same way each time."""
    given = {name: evenly(rows, most) for name, rows in (("labels", labels), ("cond", cond)) if rows is not None}
    x = to_levels(evenly(images, most), model, torch.Generator().manual_seed(VALIDATION_SEED))
    model.eval()
    total, device = 0.0, device_of(model)
    for i in range(0, len(x), VALIDATION_BATCH):
        batch = {name: rows[i : i + VALIDATION_BATCH].to(device) for name, rows in given.items()}
        total -= float(model.log_prob(x[i : i + VALIDATION_BATCH].to(device), **batch).double().sum())
    return total / (math.log(2) * x.numel())


def load_pixels(path: str | os.PathLike[str]) -> tuple[PixelModel, tuple[int, int]]:
    """The model of a checkpoint, on the CPU, and the (height, width) of the images that it was trained on.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file does not exist, is not such a checkpoint, or its parameters do not fit the model it describes.
    """
    model, content = load_checkpoint(path, MODELS, "train_pixels")
    assert isinstance(model, PixelModel)
    height, width = image_size(path, content, "height, width")
    return model, (height, width)


@torch.no_grad()
def save_samples(
    path: str | os.PathLike[str], model: PixelModel, images: Tensor, labels: Tensor | None = None, *, seed: int = 0
) -> None:
    """Write a grid: samples of the model (two rows), the images (uint8, or codes), and their completions.

    Completed from the upper half; `labels` are the images'. The model must not be conditioned on a map.
    """
    device = device_of(model)
    given = to_levels(images, model, torch.Generator().manual_seed(VALIDATION_SEED)).to(device)
    labels = None if labels is None else labels.to(device)
    number, (height, width) = len(given), given.shape[-2:]
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    drawn = model.sample(
        2 * number, (height, width), labels=None if labels is None else labels.repeat(2), generator=generator
    )
    known = (torch.arange(height, device=device) < height // 2)[:, None]
    completed = model.sample(number, (height, width), given=given, known=known, labels=labels, generator=generator)
    save_grid(path, [to_pixels(v, model) for v in (drawn[:number], drawn[number:], given, completed)])
