"""Training a WaveNet on audio, and the checkpoints it leaves."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from fastgen.audio import mu_law_encode
from fastgen.checkpoints import (
    load_optimizer,
    load_parameters,
    read_checkpoint,
    refuse_other_model,
    write_checkpoint,
)
from fastgen.checks import check_integer
from fastgen.loop import LoopOptions, TrainingLog, adam, begin, device_of, loop_options, optimise
from fastgen.models import WaveNet

VALIDATION_SEGMENT = 8192  # samples in one forward
VALIDATION_SEGMENTS = 16  # at most, evenly spaced over the held-out audio
ENTRIES = ("config", "state_dict", "optimizer", "step", "rate", "rng")


def train_wavenet(
    model: WaveNet,
    clips: Sequence[Tensor],
    rate: int,
    *,
    segment: int = 4096,
    **options: Unpack[LoopOptions],
) -> TrainingLog:
    """Maximise the likelihood of random segments of audio, with Adam.

    The clips are read as one stream in the order given, so that none is too short for a segment; the stream's tail is
    held out.

    Parameters
    ----------
    model
        Without local or speaker conditioning; changed in place.
    clips
        Floating point in [-1, 1], each (T,), mono at `rate` Hz.
    segment
        Samples in each of the segments of a step.
    options
        See `fastgen.loop.LoopOptions`, for the errors too; batches are of 8 segments by default, and a tenth of the
        audio is held out. As a number, `holdout` counts samples.

    Returns
    -------
    The losses and validation figures of this call, in bits per sample.
    """
    op = "train_wavenet"
    loop = loop_options(op, options, batch_size=8, holdout=0.1)
    check_integer(op, "segment", segment)
    if model.local_channels or model.speakers:
        raise ValueError(f"{op}: trains models without conditioning; got local_channels or speakers > 0")
    train, held_out = _split(model, clips, segment, loop["holdout"])
    optimizer, device = adam(model, loop), device_of(model)
    generator = torch.Generator().manual_seed(loop["seed"])
    log, checkpoint = TrainingLog(), loop["checkpoint"]
    begin(op, log, loop, lambda path: _restore(path, model, rate, optimizer, generator))

    def keep() -> None:
        if held_out.numel():
            log.held_out(validate(model, held_out))
        if checkpoint is not None:
            save_checkpoint(
                checkpoint, model, rate, optimizer=optimizer, generator=generator, unit="bits/sample", **log.entries()
            )

    def batch_loss() -> Tensor:
        starts = torch.randint(train.numel() - segment + 1, (loop["batch_size"],), generator=generator)
        x = torch.stack([train[i : i + segment] for i in starts.tolist()])  # (B, segment)
        return model.bits_per_sample(x.to(device)).mean()

    optimise(op, model, optimizer, batch_loss, keep, log, loop, "bits/sample")
    return log


@torch.no_grad()
def validate(model: WaveNet, x: Tensor) -> float:
    """Bits per sample of x (T,), as the model takes it, read in pieces of at most 8192 samples, each from silence.

    Of long audio, sixteen pieces spread evenly over it stand for the whole.
    """
    pieces = x.split(VALIDATION_SEGMENT)
    if len(pieces) > VALIDATION_SEGMENTS:
        pieces = tuple(pieces[i * len(pieces) // VALIDATION_SEGMENTS] for i in range(VALIDATION_SEGMENTS))
    nats = sum(float(model.log_prob(piece[None].to(device_of(model)))) for piece in pieces)
    return -nats / (math.log(2) * sum(len(piece) for piece in pieces))


def save_checkpoint(
    path: str | os.PathLike[str],
    model: WaveNet,
    rate: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    step: int = 0,
    generator: torch.Generator | None = None,
    **more: Any,
) -> None:
    """Write the model, and what training needs to go on exactly, whole or not at all; makes the folder.

    Parameters
    ----------
    rate
        Of the audio, in Hz.
    optimizer, step, generator
        State of the training; without the optimizer the checkpoint can be sampled from, but not trained on.
    """
    content = {
        "config": model.config,
        "state_dict": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "step": step,
        "rate": rate,
        "rng": None if generator is None else generator.get_state(),
        **more,
    }
    write_checkpoint(path, content)


def load_wavenet(path: str | os.PathLike[str]) -> tuple[WaveNet, int]:
    """The model of a checkpoint, on the CPU, and the sample rate of its audio in Hz.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file does not exist, is not a checkpoint, or its parameters are not exactly those of the model it
        describes: the message names the missing, surplus and misshapen ones.
    """
    content = read_checkpoint(path, ENTRIES, "train_wavenet")
    for entry, kind in (("config", dict), ("state_dict", dict), ("rate", int)):
        if not isinstance(content[entry], kind):
            came = type(content[entry]).__name__
            raise ValueError(f"{os.fspath(path)}: {entry} must be a {kind.__name__}, got a {came}")
    try:
        model = WaveNet(**content["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: config does not describe a WaveNet: {error}") from error
    load_parameters(path, model, content["state_dict"])
    return model, content["rate"]


def _restore(
    path: str | os.PathLike[str],
    model: WaveNet,
    rate: int,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> dict[str, Any]:
    content = read_checkpoint(path, ENTRIES, "train_wavenet")
    name = os.fspath(path)
    if content["optimizer"] is None or content["rng"] is None:
        raise ValueError(f"{name}: holds no training state to resume from, only the model")
    if content["rate"] != rate:
        raise ValueError(f"{name}: was trained on audio of {content['rate']} Hz, got {rate} Hz")
    refuse_other_model(path, model.config, content["config"])
    load_parameters(path, model, content["state_dict"])
    try:
        load_optimizer(optimizer, content["optimizer"])
        generator.set_state(content["rng"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: holds a damaged training state: {error!r}") from error
    return content


def _split(model: WaveNet, clips: Sequence[Tensor], segment: int, holdout: float) -> tuple[Tensor, Tensor]:
    """The clips as one stream of what the model reads: (training, held out)."""
    for i, clip in enumerate(clips):
        if clip.dim() != 1 or not clip.is_floating_point():
            raise ValueError(
                f"train_wavenet: clips[{i}] must be (T,) floating point, got {tuple(clip.shape)} {clip.dtype}"
            )
    x = torch.cat([clip.float() for clip in clips]) if clips else torch.empty(0)
    training = x.numel() - (holdout if isinstance(holdout, int) else int(x.numel() * holdout))
    if training < segment:
        raise ValueError(
            f"train_wavenet: clips must hold at least one segment of {segment} samples to train on, got {training} "
            f"({x.numel()} less {holdout:g} held out)"
        )
    if model.distribution == "categorical":
        x = mu_law_encode(x, model.classes)
    return x[:training], x[training:]
