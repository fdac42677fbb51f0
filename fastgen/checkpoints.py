"""Checkpoints: read whole, understood, and fitting the model, or refused with the reason."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checks import listed


def read_checkpoint(path: str | os.PathLike[str], entries: Sequence[str], made_by: str) -> dict[str, Any]:
    """The content of a checkpoint with these entries, on the CPU; `made_by` is named in errors."""
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: no such file; expected a checkpoint of {made_by}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes break the unpickler in any of its steps
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name}: expected a checkpoint of {made_by}, unreadable: {first_line}") from error
    if not isinstance(content, dict) or any(entry not in content for entry in entries):
        came = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{name}: expected a checkpoint with the entries {', '.join(entries)}; got {came}")
    return content


def load_parameters(path: str | os.PathLike[str], model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load all parameters, or raise ValueError, naming the missing, surplus and misshapen ones."""
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


def refuse_other_model(path: str | os.PathLike[str], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise ValueError where the configurations differ, naming what does."""
    different = [name for name in ours if theirs.get(name) != ours[name]]
    if different:
        pairs = ", ".join(f"{name}={theirs.get(name)!r} (model: {ours[name]!r})" for name in different)
        raise ValueError(f"{os.fspath(path)}: is of another model: {pairs}")
