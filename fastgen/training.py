"""Training a WaveNet on audio, and the checkpoints it leaves."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen.audio import mu_law_encode
from fastgen.checkpoints import load_parameters, read_checkpoint, refuse_other_model
from fastgen.checks import check_progress
from fastgen.files import whole_file
from fastgen.loop import Progress, TrainingLog, begin, check_loop, optimise
from fastgen.models import WaveNet

VALIDATION_SEGMENT = 8192  # samples in one forward
VALIDATION_SEGMENTS = 16  # at most, evenly spaced over the held-out audio
ENTRIES = ("config", "state_dict", "optimizer", "step", "rate", "rng")


def train_wavenet(
    model: WaveNet,
    clips: Sequence[Tensor],
    rate: int,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    batch_size: int = 8,
    segment: int = 4096,
    learning_rate: float = 1e-3,
    schedule: str = "constant",
    clip_norm: float = 1.0,
    holdout: float = 0.1,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 500,
    resume: bool = False,
    progress: Progress = True,
) -> TrainingLog:
    """Maximise the likelihood of random segments of audio, with Adam.

    The clips are read as one stream in the order given, so that none is too short for a segment; the stream's tail is
    held out. Ctrl-C lets the step in hand finish and writes the checkpoint before KeyboardInterrupt is raised.

    Parameters
    ----------
    model
        Without local or speaker conditioning; changed in place.
    clips
        Floating point in [-1, 1], each (T,), mono at `rate` Hz.
    steps, seconds
        One of the two: train up to this step, counted from the model's beginning, or for so long.
    batch_size, segment
        Segments in a step, and samples in each.
    learning_rate, clip_norm
        Of Adam; the norm to which the gradient of all parameters is clipped.
    schedule
        Of the learning rate with `steps`: "constant"; or "cosine", which rises over the first twentieth, then falls to
        zero along a cosine, as it always does with `seconds`.
    holdout
        Share of the audio, in [0, 1), or number of samples, kept for validation; 0 for none.
    seed
        Of the choice of segments.
    checkpoint, save_every
        File to write every `save_every` steps and at the end, whole or not at all; validation runs at the same steps.
    resume
        Go on from `checkpoint`. With the same clips and options the losses are those of an uninterrupted run.
    progress
        True for a progress bar, or a function of (step, loss in bits per sample).

    Returns
    -------
    The losses and validation figures of this call.

    Raises
    ------
    ValueError, TypeError
        For an argument outside its range, too little audio, or a checkpoint of another model or rate.
    FileNotFoundError, FileExistsError
        If `checkpoint` is missing with resume, or is there without it.
    FloatingPointError
        If the loss is not finite: the model keeps the parameters of the step before.
    """
    check_progress("train_wavenet", progress)
    if model.local_channels or model.speakers:
        raise ValueError("train_wavenet: trains models without conditioning; got local_channels or speakers > 0")
    counts = {"batch_size": batch_size, "segment": segment, "save_every": save_every}
    check_loop("train_wavenet", steps, seconds, learning_rate, clip_norm, holdout, schedule, counts)
    train, held_out = _split(model, clips, segment, holdout)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    log = TrainingLog()
    begin(
        "train_wavenet", log, checkpoint, resume, steps,
        lambda path: _restore(path, model, rate, optimizer, generator),
    )  # fmt: skip

    def keep() -> None:
        if held_out.numel():
            log.held_out(validate(model, held_out))
        if checkpoint is not None:
            save_checkpoint(
                checkpoint, model, rate, optimizer=optimizer, generator=generator, unit="bits/sample", **log.entries()
            )

    def batch_loss() -> Tensor:
        starts = torch.randint(train.numel() - segment + 1, (batch_size,), generator=generator)
        x = torch.stack([train[i : i + segment] for i in starts.tolist()])  # (B, segment)
        return model.bits_per_sample(x).mean()

    optimise(
        "train_wavenet", model, optimizer, batch_loss, keep, log, steps=steps, seconds=seconds,
        learning_rate=learning_rate, clip_norm=clip_norm, schedule=schedule, save_every=save_every, progress=progress,
        unit="bits/sample",
    )  # fmt: skip
    return log


@torch.no_grad()
def validate(model: WaveNet, x: Tensor) -> float:
    """Bits per sample of x (T,), as the model takes it, read in pieces of at most 8192 samples, each from silence.

    Of long audio, sixteen pieces spread evenly over it stand for the whole.
    """
    pieces = x.split(VALIDATION_SEGMENT)
    if len(pieces) > VALIDATION_SEGMENTS:
        pieces = tuple(pieces[i * len(pieces) // VALIDATION_SEGMENTS] for i in range(VALIDATION_SEGMENTS))
    nats = sum(float(model.log_prob(piece[None])) for piece in pieces)
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
    with whole_file(path) as temporary:
        torch.save(content, temporary)


def load_wavenet(path: str | os.PathLike[str]) -> tuple[WaveNet, int]:
    """The model of a checkpoint, on the CPU, and the sample rate of its audio in Hz.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file does not exist, is not a checkpoint, or its parameters are not exactly those of the model it
        describes: the message names the missing, surplus and misshapen ones.
    """
    content = read_checkpoint(path, ENTRIES, "train_wavenet")
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
    optimizer.load_state_dict(content["optimizer"])
    generator.set_state(content["rng"])
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
