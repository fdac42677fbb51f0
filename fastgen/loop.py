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
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from fastgen.checkpoints import restore_checkpoint, save_checkpoint
from fastgen.checks import check_integer, check_positive, check_progress
from fastgen.info import processor

Progress = bool | Callable[[int, float], object]
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("float32", "bfloat16")


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
            "threads": torch.get_num_threads(), "machine": processor(),
        }  # fmt: skip


class LoopOptions(TypedDict, total=False):
    """The keyword arguments that every training takes.

    The model is trained where its parameters are; data may stay on the CPU, batches go where the model is. The last
    examples are held out. Ctrl-C lets the step in hand finish and writes the checkpoint before
    KeyboardInterrupt is raised. The global random state is left as it was.

    Parameters
    ----------
    steps, seconds
        One of the two: train up to this step, counted from the model's beginning, or for so long.
    batch_size
        Examples in a step.
    learning_rate, clip_norm
        Of Adam, default 1e-3; the norm to which the gradient of all parameters is clipped.
    schedule
        Of the learning rate with `steps`: "constant", the default; or "cosine", which rises over the first twentieth,
        then falls to zero along a cosine, as it always does with `seconds`.
    precision
        "float32", the default; or "bfloat16": losses are computed under autocast. Parameters and held-out figures are
        float32's.
    holdout
        Share of the examples, in [0, 1), or number of them, kept for validation; 0 for none.
    seed
        Of the batches, and of whatever else is drawn; default 0.
    checkpoint, save_every
        File to write every `save_every` steps, 500 by default, and at the end, whole or not at all; validation runs at
        the same steps.
    resume
        Go on from `checkpoint`. With the same data and options the losses are those of an uninterrupted run.
    progress
        True, the default, for a progress bar; False; or a function of (step, loss).

    Raises
    ------
    ValueError, TypeError
        For an argument outside its range, too few examples, or a checkpoint of another model.
    FileNotFoundError, FileExistsError
        If `checkpoint` is missing with resume, or is there without it.
    FloatingPointError
        If the loss is not finite: the parameters are those of the step before.
    """

    steps: int | None
    seconds: float | None
    batch_size: int
    learning_rate: float
    schedule: str
    precision: str
    clip_norm: float
    holdout: float
    seed: int
    checkpoint: str | os.PathLike[str] | None
    save_every: int
    resume: bool
    progress: Progress


DEFAULTS: LoopOptions = {
    "steps": None, "seconds": None, "batch_size": 32, "learning_rate": 1e-3, "schedule": "constant",
    "precision": "float32", "clip_norm": 1.0, "holdout": 0.05, "seed": 0, "checkpoint": None, "save_every": 500,
    "resume": False, "progress": True,
}  # fmt: skip


def loop_options(op: str, given: LoopOptions, **defaults: Any) -> LoopOptions:
    """The options given, checked, in place of the defaults of a training."""
    unknown = [name for name in given if name not in DEFAULTS]
    if unknown:
        raise TypeError(f"{op}: got an unexpected argument {unknown[0]!r}; the loop takes {', '.join(DEFAULTS)}")
    options: LoopOptions = {**DEFAULTS, **defaults, **given}  # type: ignore[typeddict-item]
    check_progress(op, options["progress"])
    steps, seconds = options["steps"], options["seconds"]
    if options["schedule"] not in SCHEDULES:
        raise ValueError(f"{op}: schedule must be one of {SCHEDULES}, got {options['schedule']!r}")
    if options["precision"] not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {PRECISIONS}, got {options['precision']!r}")
    if (steps is None) == (seconds is None):
        raise ValueError(f"{op}: give steps or seconds, one of the two; got {steps} and {seconds}")
    check_integer(op, "steps", 1 if steps is None else steps)
    check_integer(op, "batch_size", options["batch_size"])
    check_integer(op, "save_every", options["save_every"])
    check_positive(op, "seconds", 1.0 if seconds is None else seconds)
    check_positive(op, "learning_rate", options["learning_rate"])
    check_positive(op, "clip_norm", options["clip_norm"])
    holdout = options["holdout"]
    if isinstance(holdout, int) and not isinstance(holdout, bool):
        check_integer(op, "holdout", holdout, 0)
    elif not 0 <= holdout < 1:
        raise ValueError(f"{op}: holdout must be a number of examples, or a share in [0, 1), got {holdout}")
    return options


def training_part(op: str, name: str, number: int, holdout: float) -> int:
    """How many of `number` examples, the first ones, are not held out: at least one. `name` is the argument's."""
    training = number - (holdout if isinstance(holdout, int) else int(number * holdout))
    if training < 1:
        raise ValueError(f"{op}: {name} must hold at least one to train on, got {number} less {holdout:g} held out")
    return training


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters are."""
    return next(model.parameters()).device


def adam(model: nn.Module, options: LoopOptions) -> torch.optim.Adam:
    """The optimizer of every training: one pass over the parameters, where PyTorch has that for their device."""
    fused = device_of(model).type in ("cpu", "cuda")
    return torch.optim.Adam(model.parameters(), lr=options["learning_rate"], fused=fused)


def evenly(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows, spread evenly over them."""
    return rows[:: max(1, len(rows) // most)][:most]


def begin(
    op: str,
    log: TrainingLog,
    options: LoopOptions,
    restore: Callable[[str | os.PathLike[str]], dict[str, Any]],
) -> None:
    """Go on from the checkpoint, or see to it that there is none; `restore` loads it and gives its content."""
    checkpoint, steps = options["checkpoint"], options["steps"]
    if options["resume"]:
        if checkpoint is None:
            raise ValueError(f"{op}: resume=True needs checkpoint=")
        content = restore(checkpoint)
        log.step, log.seconds = content["step"], content.get("seconds", 0.0)
        log.history = content.get("validation", [])
        if not isinstance(log.history, list) or not isinstance(log.seconds, int | float):
            raise ValueError(f"{os.fspath(checkpoint)}: holds a damaged training state: its validation or seconds")
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
    options: LoopOptions,
    *,
    unit: str,
    **more: Any,
) -> TrainingLog:
    """Train a model that describes itself by `config`, with Adam, from the beginning or from its checkpoint.

    `models` are those that a checkpoint may hold; `held_out()` is recorded, and a checkpoint with the entries `more`
    written, every `save_every` steps and at the end. The global random state is left as it was. See `optimise`.
    """
    optimizer, device = adam(model, options), device_of(model)
    log, checkpoint = TrainingLog(), options["checkpoint"]

    def keep() -> None:
        if held_out is not None:
            log.held_out(held_out())
            model.train()
        if checkpoint is not None:
            save_checkpoint(checkpoint, model, optimizer=optimizer, unit=unit, **log.entries(), **more)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options["seed"])
        begin(op, log, options, lambda path: restore_checkpoint(path, models, op, model, optimizer))
        optimise(op, model, optimizer, batch_loss, keep, log, options, unit)
    return log


def optimise(
    op: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch_loss: Callable[[], Tensor],
    keep: Callable[[], None],
    log: TrainingLog,
    options: LoopOptions,
    unit: str,
) -> None:
    """Take steps on `batch_loss()` up to step `steps`, at the rates of `schedule`, or for `seconds`, along a cosine.

    `keep()` is called every `save_every` steps and at the end. The first Ctrl-C lets the step in hand finish and `keep`
    run before KeyboardInterrupt is raised. A loss that is not finite raises FloatingPointError before the step.
    """
    model.train()
    steps, seconds, learning_rate = options["steps"], options["seconds"], options["learning_rate"]
    constant = steps is not None and options["schedule"] == "constant"
    halves = options["precision"] == "bfloat16"
    began, first, earlier = time.monotonic(), log.step, log.seconds
    with _deferred_interrupt() as interrupted, _reporter(op, options["progress"], steps, seconds, unit) as report:
        while True:
            done = (time.monotonic() - began) / seconds if seconds is not None else 0.0
            if done >= 1 or (steps is not None and log.step >= steps) or interrupted():
                break
            if steps is not None:
                done = log.step / steps
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1.0 if constant else _cosine(done))
            with torch.autocast(device_of(model).type, torch.bfloat16) if halves else contextlib.nullcontext():
                loss = batch_loss()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise FloatingPointError(f"{op}: the loss became {value} at step {log.step + 1}; lower learning_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip_norm"])
            optimizer.step()
            log.step += 1
            log.losses.append(value)
            report(log.step, value)
            log.seconds = earlier + time.monotonic() - began
            if log.step % options["save_every"] == 0 and log.step != steps:
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
