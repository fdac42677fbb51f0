"""Checks of arguments: the errors name the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LISTED = 8  # names in one message


def check_integer(op: str, name: str, value: Any, least: int = 1, *, unit: str = "") -> None:
    """An int (SymInt while tracing) >= `least`; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < least:
        raise ValueError(f"{op}: {name} must be an integer >= {least}{unit}, got {value!r}")


def is_finite(value: Any) -> bool:
    """Whether `value` is a finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_positive(op: str, name: str, value: Any) -> None:
    if not (is_finite(value) and value > 0):
        raise ValueError(f"{op}: {name} must be finite and > 0, got {value!r}")


def check_tensor(op: str, name: str, value: Any, wanted: str = "") -> None:
    """`wanted` says in words what the tensor should hold."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor{wanted and ' '}{wanted}, got {type(value).__name__}")


def check_unit_range(op: str, name: str, x: Tensor) -> None:
    """Values in [-1, 1]; NaN is outside."""
    if x.numel() and not bool((x.detach().abs() <= 1).all()):
        raise ValueError(f"{op}: {name} must lie in [-1, 1], got {float(x.min())} to {float(x.max())}")


def check_classes(op: str, name: str, x: Tensor, classes: int) -> None:
    """Integers in [0, classes)."""
    if x.numel() and not 0 <= int(x.min()) <= int(x.max()) < classes:
        raise ValueError(f"{op}: {name} must lie in [0, {classes}), got {int(x.min())} to {int(x.max())}")


def check_progress(op: str, progress: Any) -> None:
    if not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"{op}: progress must be True, False or a function, got {progress!r}")


def listed(names: Sequence[str]) -> str:
    """The names, or the first few and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")
