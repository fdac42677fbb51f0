"""Training a WaveNet on audio, and the checkpoints it leaves."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.audio import mu_law_encode
from fastgen.checks import check_integer, check_positive, check_progress, listed
from fastgen.files import whole_file
from fastgen.models import WaveNet

VALIDATION_SEGMENT = 8192  # samples in one forward
VALIDATION_SEGMENTS = 16  # at most, evenly spaced over the held-out audio
ENTRIES = ("config", "state_dict", "optimizer", "step", "rate", "rng")


@dataclass
class TrainingLog:
    """What a run of `train_wavenet` saw, in bits per sample; a density's for the Gaussian mixture."""

    losses: list[float] = field(default_factory=list)  # of each step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out figure)
    step: int = 0  # steps since the model was made, those of earlier runs included


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
    clip_norm: float = 1.0,
    holdout: float = 0.1,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 500,
    resume: bool = False,
    progress: bool | Callable[[int, float], object] = True,
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
        One of the two. steps: train up to this step, counted from the model's beginning, at a constant learning rate.
        seconds: train for so long; the learning rate rises over the first twentieth, then falls to zero along a cosine.
    batch_size, segment
        Segments in a step, and samples in each.
    learning_rate, clip_norm
        Of Adam; the norm to which the gradient of all parameters is clipped.
    holdout
        Share of the audio, in [0, 1), kept for validation; 0 for none.
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
    _check(model, steps, seconds, batch_size, segment, learning_rate, clip_norm, holdout, save_every)
    train, held_out = _split(model, clips, segment, holdout)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed)
    log = TrainingLog()
    if resume:
        if checkpoint is None:
            raise ValueError("train_wavenet: resume=True needs checkpoint=")
        log.step = _restore(checkpoint, model, rate, optimizer, generator)
        if steps is not None and log.step >= steps:
            raise ValueError(f"{os.fspath(checkpoint)}: is at step {log.step}; steps must be larger, got {steps}")
    elif checkpoint is not None and Path(checkpoint).exists():
        raise FileExistsError(f"{os.fspath(checkpoint)}: exists; resume from it, or choose another file")

    def keep() -> None:
        if held_out.numel():
            log.validation.append((log.step, validate(model, held_out)))
        if checkpoint is not None:
            save_checkpoint(checkpoint, model, rate, optimizer=optimizer, step=log.step, generator=generator)

    model.train()
    began, first = time.monotonic(), log.step
    with _deferred_interrupt() as interrupted, _reporter(progress, steps, seconds) as report:
        while True:
            done = (time.monotonic() - began) / seconds if seconds is not None else 0.0
            if done >= 1 or (steps is not None and log.step >= steps) or interrupted():
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate if seconds is None else learning_rate * _schedule(done)
            starts = torch.randint(train.numel() - segment + 1, (batch_size,), generator=generator)
            x = torch.stack([train[i : i + segment] for i in starts.tolist()])  # (B, segment)
            loss = model.bits_per_sample(x).mean()
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(
                    f"train_wavenet: the loss became {float(loss.detach())} at step {log.step + 1}; lower learning_rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            log.step += 1
            log.losses.append(float(loss.detach()))
            report(log.step, log.losses[-1])
            if log.step % save_every == 0 and log.step != steps:
                keep()
        if log.step > first:
            keep()
        if interrupted():
            raise KeyboardInterrupt
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
    content = _read(path)
    try:
        model = WaveNet(**content["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: config does not describe a WaveNet: {error}") from error
    _load_parameters(path, model, content["state_dict"])
    return model, content["rate"]


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: no such file; expected a checkpoint of train_wavenet")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes break the unpickler in any of its steps
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name}: expected a checkpoint of train_wavenet, unreadable: {first_line}") from error
    if not isinstance(content, dict) or any(entry not in content for entry in ENTRIES):
        came = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{name}: expected a checkpoint with the entries {', '.join(ENTRIES)}; got {came}")
    return content


def _load_parameters(path: str | os.PathLike[str], model: WaveNet, state: dict[str, Tensor]) -> None:
    expected = model.state_dict()
    faults = {
        "missing": [k for k in expected if k not in state],
        "surplus": [k for k in state if k not in expected],
        "misshapen": [
            f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
            for k, v in expected.items()
            if k in state and state[k].shape != v.shape
        ],
    }
    found = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in faults.items() if keys)
    if found:
        raise ValueError(f"{os.fspath(path)}: the parameters do not fit the model of its config: {found}")
    model.load_state_dict(state)


def _restore(
    path: str | os.PathLike[str],
    model: WaveNet,
    rate: int,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    content = _read(path)
    name = os.fspath(path)
    if content["optimizer"] is None or content["rng"] is None:
        raise ValueError(f"{name}: holds no training state to resume from, only the model")
    if content["rate"] != rate:
        raise ValueError(f"{name}: was trained on audio of {content['rate']} Hz, got {rate} Hz")
    different = [k for k in model.config if content["config"].get(k) != model.config[k]]
    if different:
        pairs = ", ".join(f"{k}={content['config'].get(k)!r} (model: {model.config[k]!r})" for k in different)
        raise ValueError(f"{name}: is of another model: {pairs}")
    _load_parameters(path, model, content["state_dict"])
    optimizer.load_state_dict(content["optimizer"])
    generator.set_state(content["rng"])
    return int(content["step"])


def _schedule(done: float) -> float:
    """Share of the learning rate when a share `done` of the time is over."""
    return min(1.0, 20 * done + 0.05) * 0.5 * (1 + math.cos(math.pi * done))


def _split(model: WaveNet, clips: Sequence[Tensor], segment: int, holdout: float) -> tuple[Tensor, Tensor]:
    """The clips as one stream of what the model reads: (training, held out)."""
    for i, clip in enumerate(clips):
        if clip.dim() != 1 or not clip.is_floating_point():
            raise ValueError(
                f"train_wavenet: clips[{i}] must be (T,) floating point, got {tuple(clip.shape)} {clip.dtype}"
            )
    x = torch.cat([clip.float() for clip in clips]) if clips else torch.empty(0)
    training = x.numel() - int(x.numel() * holdout)
    if training < segment:
        raise ValueError(
            f"train_wavenet: clips must hold at least one segment of {segment} samples to train on, got {training} "
            f"({x.numel()} less the held-out share of {holdout:g})"
        )
    if model.distribution == "categorical":
        x = mu_law_encode(x, model.classes)
    return x[:training], x[training:]


def _check(
    model: WaveNet,
    steps: int | None,
    seconds: float | None,
    batch_size: int,
    segment: int,
    learning_rate: float,
    clip_norm: float,
    holdout: float,
    save_every: int,
) -> None:
    if model.local_channels or model.speakers:
        raise ValueError("train_wavenet: trains models without conditioning; got local_channels or speakers > 0")
    if (steps is None) == (seconds is None):
        raise ValueError(f"train_wavenet: give steps or seconds, one of the two; got {steps} and {seconds}")
    for name, count in (("steps", steps), ("batch_size", batch_size), ("segment", segment), ("save_every", save_every)):
        if count is not None:
            check_integer("train_wavenet", name, count)
    for name, value in (("seconds", seconds), ("learning_rate", learning_rate), ("clip_norm", clip_norm)):
        if value is not None:
            check_positive("train_wavenet", name, value)
    if not 0 <= holdout < 1:
        raise ValueError(f"train_wavenet: holdout must lie in [0, 1), got {holdout}")


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within it, the first Ctrl-C is only noted, so that no step is cut in two; a second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    noted = False
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        nonlocal noted
        noted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _reporter(
    progress: bool | Callable[[int, float], object], steps: int | None, seconds: float | None
) -> Iterator[Callable[[int, float], object]]:
    """A function of (step, loss): a progress bar, the caller's function, or nothing."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda step, loss: None
        return
    try:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError as error:
        raise ImportError("train_wavenet: progress=True needs rich: pip install fastgen-kernels[demo]") from error
    began = time.monotonic()
    columns = (
        TextColumn("training"), BarColumn(), TextColumn("step {task.fields[step]}"),
        TextColumn("{task.fields[loss]:.3f} bits/sample"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns) as bar:
        task = bar.add_task("training", total=steps if steps is not None else seconds, step=0, loss=math.nan)
        smoothed = math.nan

        def report(step: int, loss: float) -> None:
            nonlocal smoothed
            smoothed = loss if math.isnan(smoothed) else 0.9 * smoothed + 0.1 * loss
            done = step if steps is not None else time.monotonic() - began
            bar.update(task, completed=done, step=step, loss=smoothed)

        yield report
