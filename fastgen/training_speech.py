"""Training a VQ-VAE of speech, and the checkpoints it leaves; its prior is `fastgen.training_stages`'."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.audio import mu_law_encode
from fastgen.checkpoints import load_checkpoint
from fastgen.checks import check_integer
from fastgen.loop import LoopOptions, TrainingLog, device_of, evenly, fit, loop_options, training_part
from fastgen.models.speech_vqvae import SpeechVQVAE

MODELS: dict[str, type[SpeechVQVAE]] = {"SpeechVQVAE": SpeechVQVAE}
VALIDATION_CLIPS = 64  # at most
VALIDATION_BATCH = 16


def clips_of(clips: Sequence[Tensor], length: int, classes: int = 256) -> Tensor:
    """Clips (T,) in [-1, 1] -> (N, length) int64 mu-law classes, ended by silence or cut off."""
    check_integer("clips_of", "length", length)
    rows = [F.pad(clip[:length].float(), (0, length - len(clip[:length]))) for clip in clips]
    return mu_law_encode(torch.stack(rows), classes) if rows else torch.empty(0, length, dtype=torch.int64)


def labels_of(files: Sequence[Path]) -> Tensor:
    """Classes (N,) int64 by what stands before the first _ of each file's name, in order of that."""
    words = [file.stem.split("_")[0] for file in files]
    known = sorted(set(words))
    return torch.tensor([known.index(word) for word in words])


def train_speech_vqvae(
    model: SpeechVQVAE,
    clips: Tensor,
    rate: int,
    *,
    segment: int = 2048,
    **options: Unpack[LoopOptions],
) -> TrainingLog:
    """Minimise the model's loss on random segments of random clips, with Adam.

    Parameters
    ----------
    model
        Changed in place.
    clips, rate
        (N, T) int64 classes, as `clips_of` makes them, and their sample rate in Hz, kept in the checkpoint.
    segment
        Samples in a step's clips, a multiple of the model's downsample, at most T.
    options
        See `fastgen.loop.LoopOptions`, for the errors too; batches are of 8 segments by default.

    Returns
    -------
    The losses of this call, and the held-out bits per sample given the codes.
    """
    op = "train_speech_vqvae"
    loop = loop_options(op, options, batch_size=8)
    check_integer(op, "segment", segment)
    if clips.dim() != 2 or clips.dtype != torch.int64:
        raise ValueError(f"{op}: clips must be int64 (N, T), got {clips.dtype} {tuple(clips.shape)}")
    if segment % model.downsample or segment > clips.shape[1]:
        raise ValueError(
            f"{op}: segment must be a multiple of {model.downsample} of at most {clips.shape[1]}, got {segment}"
        )
    number, device = training_part(op, "clips", len(clips), loop["holdout"]), device_of(model)

    def loss() -> Tensor:
        chosen = clips[torch.randint(number, (loop["batch_size"],))]
        starts = torch.randint(clips.shape[1] - segment + 1, (len(chosen),))
        return model.loss(chosen.gather(1, starts[:, None] + torch.arange(segment)).to(device))

    return fit(
        op, model, MODELS, loss, (lambda: validate(model, clips[number:])) if number < len(clips) else None,
        loop, unit="bits/sample", rate=rate, length=clips.shape[1],
    )  # fmt: skip


@torch.no_grad()
def validate(model: SpeechVQVAE, clips: Tensor) -> float:
    """Bits per sample given the codes, of at most 64 of the clips, spread evenly."""
    chosen = evenly(clips, VALIDATION_CLIPS)
    chosen = chosen[:, : chosen.shape[1] // model.downsample * model.downsample]
    model.eval()
    parts = (part.to(device_of(model)) for part in chosen.split(VALIDATION_BATCH))
    nats = sum(-float(model(part)[0].double().sum()) for part in parts)
    return nats / (math.log(2) * chosen.numel())


def load_speech_vqvae(path: str | os.PathLike[str]) -> tuple[SpeechVQVAE, int, int]:
    """The model of a checkpoint, on the CPU, the sample rate of its audio in Hz, and the samples in a clip.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file does not exist, is not such a checkpoint, or its parameters do not fit the model it describes.
    """
    model, content = load_checkpoint(path, MODELS, "train_speech_vqvae")
    for name in ("rate", "length"):
        if not isinstance(content.get(name), int) or content[name] < 1:
            raise ValueError(f"{os.fspath(path)}: {name} must be a whole number, got {content.get(name)!r}")
    assert isinstance(model, SpeechVQVAE)
    return model, content["rate"], content["length"]
