"""Tiles that were measured to be faster than the heuristics': a table for each device, which bench/tune.py writes."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor

FOLDER = Path(__file__).parent / "tuned"
Options = dict[str, int]

asked: dict[str, Options] = {}  # of the launches since `forget`: key -> options
trials = 0  # launches planned before another number are planned again
_trial: dict[str, Options] = {}


def forget() -> None:
    """Whatever was asked."""
    global trials
    asked.clear()
    trials += 1


def file_for(device: str) -> Path:
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


@functools.cache
def table_for(device: str) -> dict[str, Options]:
    """Key -> options; none where the device was not tuned."""
    path = file_for(device)
    return dict(json.loads(path.read_text())) if path.exists() else {}


@functools.cache
def _table_of(device: torch.device) -> dict[str, Options]:
    return table_for(torch.cuda.get_device_name(device))


@functools.cache
def key_for(kernel: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """Sizes that share a power of two share their tiles."""
    return " ".join([kernel, str(dtype).split(".")[1], *(str(triton.next_power_of_2(max(n, 1))) for n in sizes)])


def tuned(kernel: str, x: Tensor, sizes: tuple[int, ...], options: Options) -> Options:
    """The heuristic's options, or what was measured to be faster for such sizes on x's device."""
    key = key_for(kernel, x.dtype, sizes)
    if x.is_cuda:
        options = options | _table_of(x.device).get(key, {})
    options = options | _trial.get(key, {})
    asked[key] = options
    return options


@contextlib.contextmanager
def trial(key: str, options: Options) -> Iterator[None]:
    """Within it, launches with that key take these options."""
    global trials
    _trial[key] = options
    trials += 1
    try:
        yield
    finally:
        del _trial[key]
        trials += 1
