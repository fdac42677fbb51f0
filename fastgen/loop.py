"""The loop that every training shares: steps or seconds, learning rate, interruption, progress."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checkpoints import restore_checkpoint, save_checkpoint
from fastgen.checks import check_integer, check_positive

Progress = bool | Callable[[int, float], object]
SCHEDULES = ("constant", "cosine")


@dataclass
class TrainingLog:
    """What a run of training saw, in the units of its model."""

    losses: list[float] = field(default_factory=list)  # of each step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, held-out figure)
    step: int = 0  # steps since the model was made, those of earlier runs included
    seconds: float = 0.0  # of training since the model was made, validation included
    history: list[list[float]] = field(default_factory=list)  # [step, held-out figure] since the model was made

    def held_out(self, figure: float) -> None:
        """Note a held-out figure at the present step."""
        self.validation.append((self.step, figure))
        self.history.append([self.step, figure])

    def entries(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "step": self.step, "seconds": self.seconds, "validation": self.history,
            "threads": torch.get_num_threads(),
        }  # fmt: skip


def check_loop(
    op: str,
    steps: int | None,
    seconds: float | None,
    learning_rate: float,
    clip_norm: float,
    holdout: float,
    schedule: str,
    counts: dict[str, int],
) -> None:
    """Raise on options outside their range; `counts` are integers of at least 1."""
    if schedule not in SCHEDULES:
        raise ValueError(f"{op}: schedule must be one of {SCHEDULES}, got {schedule!r}")
    if (steps is None) == (seconds is None):
        raise ValueError(f"{op}: give steps or seconds, one of the two; got {steps} and {seconds}")
    for name, count in {"steps": 1 if steps is None else steps, **counts}.items():
        check_integer(op, name, count)
    for name, value in (("seconds", seconds), ("learning_rate", learning_rate), ("clip_norm", clip_norm)):
        if value is not None:
            check_positive(op, name, value)
    if isinstance(holdout, int) and not isinstance(holdout, bool):
        check_integer(op, "holdout", holdout, 0)
    elif not 0 <= holdout < 1:
        raise ValueError(f"{op}: holdout must be a number of examples, or a share in [0, 1), got {holdout}")


def training_part(op: str, name: str, number: int, holdout: float) -> int:
    """How many of `number` examples, the first ones, are not held out: at least one. `name` is the argument's."""
    training = number - (holdout if isinstance(holdout, int) else int(number * holdout))
    if training < 1:
        raise ValueError(f"{op}: {name} must hold at least one to train on, got {number} less {holdout:g} held out")
    return training


def begin(
    op: str,
    log: TrainingLog,
    checkpoint: str | os.PathLike[str] | None,
    resume: bool,
    steps: int | None,
    restore: Callable[[str | os.PathLike[str]], dict[str, Any]],
) -> None:
    """Go on from the checkpoint, or see to it that there is none; `restore` loads it and gives its content."""
    if resume:
        if checkpoint is None:
            raise ValueError(f"{op}: resume=True needs checkpoint=")
        content = restore(checkpoint)
        log.step, log.seconds = content["step"], content.get("seconds", 0.0)
        log.history = content.get("validation", [])
        if steps is not None and log.step >= steps:
            raise ValueError(f"{os.fspath(checkpoint)}: is at step {log.step}; steps must be larger, got {steps}")
    elif checkpoint is not None and Path(checkpoint).exists():
        raise FileExistsError(f"{os.fspath(checkpoint)}: exists; resume from it, or choose another file")


def fit(
    op: str,
    model: nn.Module,
    models: Mapping[str, type[nn.Module]],
    batch_loss: Callable[[], Tensor],
    held_out: Callable[[], float] | None,
    *,
    steps: int | None,
    seconds: float | None,
    learning_rate: float,
    clip_norm: float,
    schedule: str,
    seed: int,
    checkpoint: str | os.PathLike[str] | None,
    save_every: int,
    resume: bool,
    progress: Progress,
    unit: str,
    **more: Any,
) -> TrainingLog:
    """Train a model that describes itself by `config`, with Adam, from the beginning or from its checkpoint.

    `models` are those that a checkpoint may hold; `held_out()` is recorded, and a checkpoint with the entries `more`
    written, every `save_every` steps and at the end. The global random state is left as it was. See `optimise`.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    log = TrainingLog()

    def keep() -> None:
        if held_out is not None:
            log.held_out(held_out())
            model.train()
        if checkpoint is not None:
            save_checkpoint(checkpoint, model, optimizer=optimizer, unit=unit, **log.entries(), **more)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        begin(op, log, checkpoint, resume, steps, lambda path: restore_checkpoint(path, models, op, model, optimizer))
        optimise(
            op, model, optimizer, batch_loss, keep, log, steps=steps, seconds=seconds, learning_rate=learning_rate,
            clip_norm=clip_norm, schedule=schedule, save_every=save_every, progress=progress, unit=unit,
        )  # fmt: skip
    return log


def optimise(
    op: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_loss: Callable[[], Tensor],
    keep: Callable[[], None],
    log: TrainingLog,
    *,
    steps: int | None,
    seconds: float | None,
    learning_rate: float,
    clip_norm: float,
    schedule: str,
    save_every: int,
    progress: Progress,
    unit: str,
) -> None:
    """Take steps on `batch_loss()` up to step `steps`, at the rates of `schedule`, or for `seconds`, along a cosine.

    `keep()` is called every `save_every` steps and at the end. The first Ctrl-C lets the step in hand finish and `keep`
    run before KeyboardInterrupt is raised. A loss that is not finite raises FloatingPointError before the step.
    """
    model.train()
    began, first, earlier = time.monotonic(), log.step, log.seconds
    with _deferred_interrupt() as interrupted, _reporter(op, progress, steps, seconds, unit) as report:
        while True:
            done = (time.monotonic() - began) / seconds if seconds is not None else 0.0
            if done >= 1 or (steps is not None and log.step >= steps) or interrupted():
                break
            if steps is not None and schedule == "cosine":
                done = log.step / steps
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1.0 if steps is not None and schedule == "constant" else _cosine(done))
            loss = batch_loss()
            if not bool(torch.isfinite(loss)):
                raise FloatingPointError(
                    f"{op}: the loss became {float(loss.detach())} at step {log.step + 1}; lower learning_rate"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            log.step += 1
            log.losses.append(float(loss.detach()))
            report(log.step, log.losses[-1])
            log.seconds = earlier + time.monotonic() - began
            if log.step % save_every == 0 and log.step != steps:
                keep()
        if log.step > first:
            keep()
        if interrupted():
            raise KeyboardInterrupt


def _cosine(done: float) -> float:
    """Share of the learning rate when a share `done` of the training is over."""
    return min(1.0, 20 * done + 0.05) * 0.5 * (1 + math.cos(math.pi * done))


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
    op: str, progress: Progress, steps: int | None, seconds: float | None, unit: str
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
        raise ImportError(f"{op}: progress=True needs rich: pip install fastgen-kernels[demo]") from error
    began = time.monotonic()
    columns = (
        TextColumn("training"), BarColumn(), TextColumn("step {task.fields[step]}"),
        TextColumn("{task.fields[loss]:.3f} " + unit), TimeElapsedColumn(), TimeRemainingColumn(),
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
