"""Training RealNVP and Glow on images or on points, and the checkpoints it leaves."""

from __future__ import annotations

import math
import os
from typing import Unpack

import torch
from torch import Tensor

from fastgen.checkpoints import load_checkpoint
from fastgen.checks import check_tensor
from fastgen.images import save_grid
from fastgen.loop import LoopOptions, TrainingLog, device_of, fit, loop_options, training_part
from fastgen.models import FlowModel, Glow, RealNVP

MODELS: dict[str, type[FlowModel]] = {"RealNVP": RealNVP, "Glow": Glow}
VALIDATION_BATCH = 256  # examples in one forward
VALIDATION_EXAMPLES = 4096  # at most
VALIDATION_SEED = 0


def to_levels(images: Tensor, model: FlowModel) -> Tensor:
    """uint8 pixels to the model's levels, in bins of one width, int64; continuous data stay as they are."""
    if images.dtype != torch.uint8 or model.levels == 0:
        return images
    return images.long() * model.levels // 256


def train_flow(
    model: FlowModel,
    data: Tensor,
    *,
    labels: Tensor | None = None,
    source: str | None = None,
    **options: Unpack[LoopOptions],
) -> TrainingLog:
    """Maximise the likelihood of random batches, with Adam.

    Parameters
    ----------
    model
        Changed in place.
    data
        (N, *model.shape): uint8 images for a model with levels, else floating point.
    labels
        (N,) int64, for a model with classes.
    source
        What the data are, in words that the checkpoint keeps.
    options
        See `fastgen.loop.LoopOptions`, for the errors too; batches are of 64 examples by default, and only gradients of
        a norm above 50 are clipped.

    Returns
    -------
    The losses of this call and the held-out figures, in bits per dimension; without levels, in nats an example.
    """
    op = "train_flow"
    loop = loop_options(op, options, batch_size=64, clip_norm=50.0)
    check_data(op, model, data, labels)
    number = training_part(op, "data", len(data), loop["holdout"])
    unit, device = _unit(model), device_of(model)

    def loss() -> Tensor:
        chosen = torch.randint(number, (loop["batch_size"],))
        x = to_levels(data[chosen], model).to(device)
        of_chosen = None if labels is None else labels[chosen].to(device)
        return -model.log_prob(x, of_chosen).mean() / unit

    def held_out() -> float:
        return validate(model, data[number:], None if labels is None else labels[number:])

    return fit(
        op, model, MODELS, loss, held_out if number < len(data) else None, loop,
        unit="bits per dimension" if model.levels else "nats", source=source,
    )  # fmt: skip


def _unit(model: FlowModel) -> float:
    """Nats in the unit of the losses."""
    return math.log(2) * model.dims if model.levels else 1.0


def check_data(op: str, model: FlowModel, data: Tensor, labels: Tensor | None) -> None:
    """Raise on data that the model cannot take."""
    if not isinstance(model, FlowModel):
        raise TypeError(f"{op}: model must be one of {', '.join(MODELS)}, got {type(model).__name__}")
    check_tensor(op, "data", data)
    right = data.dtype == torch.uint8 if model.levels else data.is_floating_point()
    if not right or tuple(data.shape[1:]) != model.shape:
        wanted = f"{'uint8' if model.levels else 'floating point'} {('N', *model.shape)}"
        raise ValueError(f"{op}: data must be {wanted}, got {data.dtype} {tuple(data.shape)}")
    if not model.levels and not bool(torch.isfinite(data).all()):
        raise ValueError(f"{op}: data holds NaN or infinity")
    if (labels is None) == bool(model.classes):
        raise ValueError(f"{op}: labels {'are missing' if model.classes else 'must be None: the model has no classes'}")
    if labels is not None:
        check_tensor(op, "labels", labels)
        if labels.shape != data.shape[:1]:
            raise ValueError(
                f"{op}: labels must be one for each of the {len(data)} examples, got {tuple(labels.shape)}"
            )
        if labels.dtype != torch.int64 or not 0 <= int(labels.min()) <= int(labels.max()) < model.classes:
            raise ValueError(f"{op}: labels must be int64 in [0, {model.classes}), got {labels.dtype}")


@torch.no_grad()
def validate(model: FlowModel, data: Tensor, labels: Tensor | None = None, *, most: int = VALIDATION_EXAMPLES) -> float:
    """The losses' figure on at most `most` of the examples, spread evenly; dequantised the same way each time."""
    every = max(1, len(data) // most)
    data, labels = data[::every][:most], None if labels is None else labels[::every][:most]
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    model.eval()
    total, device = 0.0, device_of(model)
    for i in range(0, len(data), VALIDATION_BATCH):
        x = to_levels(data[i : i + VALIDATION_BATCH], model).to(device)
        of_batch = None if labels is None else labels[i : i + VALIDATION_BATCH].to(device)
        total -= float(model.log_prob(x, of_batch, generator=generator).double().sum())
    return total / _unit(model) / len(data)


def load_flow(path: str | os.PathLike[str]) -> FlowModel:
    """The model of a checkpoint, on the CPU.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file does not exist, is not such a checkpoint, or its parameters do not fit the model it describes.
    """
    return read_flow(path)[0]


def read_flow(path: str | os.PathLike[str]) -> tuple[FlowModel, str | None]:
    """`load_flow`, and the `source` that `train_flow` was given."""
    model, content = load_checkpoint(path, MODELS, "train_flow")
    return model, content.get("source")  # type: ignore[return-value]


@torch.no_grad()
def save_samples(
    path: str | os.PathLike[str], model: FlowModel, images: Tensor, labels: Tensor | None = None,
    *, temperature: float = 0.8, seed: int = 0,
) -> None:  # fmt: skip
    """Write a grid: samples of the model (two rows), the images (uint8), and a way from the first to the last."""
    model.eval()
    images, labels = images.to(device_of(model)), None if labels is None else labels.to(device_of(model))
    number, generator = len(images), torch.Generator().manual_seed(seed)
    twice = None if labels is None else labels.repeat(2)
    drawn = model.sample(2 * number, labels=twice, temperature=temperature, generator=generator)
    x = to_levels(images, model)
    of_first = None if labels is None else labels[:1]
    between = model.interpolate(x[:1], x[-1:], number, of_first)[0] if number > 1 else x
    save_grid(path, [v.float() / (model.levels - 1) for v in (drawn[:number], drawn[number:], x, between)])
