"""Checkpoints: read whole, understood, and fitting the model, or refused with the reason."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checks import listed
from fastgen.files import whole_file

ENTRIES = ("model", "config", "state_dict", "optimizer", "step", "rng")


def read_checkpoint(path: str | os.PathLike[str], entries: Sequence[str], made_by: str) -> dict[str, Any]:
    """The content of a checkpoint with these entries, on the CPU; `made_by` is named in errors."""
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: no such file; expected a checkpoint of {made_by}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch says of other people's pickles
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes break the unpickler in any of its steps
        raise ValueError(f"{name}: expected a checkpoint of {made_by}, {_unreadable(Path(path), error)}") from error
    if not isinstance(content, dict) or any(entry not in content for entry in entries):
        came = f"entries {listed(sorted(map(str, content)))}" if isinstance(content, dict) else type(content).__name__
        kind = content.get("model", "WaveNet" if "rate" in content else None) if isinstance(content, dict) else None
        raise ValueError(f"{name}: expected a checkpoint of {made_by}, got {f'one of a {kind}' if kind else came}")
    return content


def _unreadable(path: Path, error: Exception) -> str:
    if path.stat().st_size == 0:
        return "the file is empty"
    if "allowed global" in str(error):
        return "it holds more than tensors and plain data"
    return "it is cut short, damaged, or no file that torch.save wrote"


def write_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write it whole or not at all; makes the folder."""
    with whole_file(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # PyTorch's writer says no more of a full disk
            raise OSError(f"{os.fspath(path)}: could not be written whole; is the disk full?") from error


def load_parameters(path: str | os.PathLike[str], model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load all parameters, or raise ValueError, naming the missing, surplus and misshapen ones."""
    expected = model.state_dict()
    faults = {
        "missing": [k for k in expected if k not in state],
        "surplus": [k for k in state if k not in expected],
        "misshapen": [
            f"{k} {tuple(state[k].shape)} for {tuple(v.shape)}"
            for k, v in expected.items()
            if isinstance(state.get(k), Tensor) and state[k].shape != v.shape
        ],
        "no tensors": [k for k in expected if k in state and not isinstance(state[k], Tensor)],
    }
    found = "; ".join(f"{kind}: {listed(keys)}" for kind, keys in faults.items() if keys)
    if found:
        raise ValueError(f"{os.fspath(path)}: the parameters do not fit the model of its config: {found}")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # what a layer refuses: singular matrices, NaN
        reason = " ".join(str(error).split("\n\t", 1)[-1].split())
        raise ValueError(f"{os.fspath(path)}: holds parameters that a layer refuses: {reason}") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state, but for how the optimizer goes over the parameters; ValueError for one that does not fit them."""
    fused = optimizer.param_groups[0].get("fused")
    optimizer.load_state_dict(state | {"param_groups": [group | {"fused": fused} for group in state["param_groups"]]})
    for parameter, moments in optimizer.state.items():
        wrong = [k for k, v in moments.items() if v.shape != (() if k == "step" else parameter.shape)]
        if wrong:
            raise ValueError(f"{listed(wrong)} of another shape than the parameter, {tuple(parameter.shape)}")


def refuse_other_model(path: str | os.PathLike[str], ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise ValueError where the configurations differ, naming what does."""
    different = [name for name in ours if theirs.get(name) != ours[name]]
    if different:
        pairs = ", ".join(f"{name}={theirs.get(name)!r} (model: {ours[name]!r})" for name in different)
        raise ValueError(f"{os.fspath(path)}: is of another model: {pairs}")


def save_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    step: int = 0,
    **more: Any,
) -> None:
    """Write a model that has a `config`, and what training needs to go on exactly, whole or not at all.

    Makes the folder. Without the optimizer the checkpoint cannot be trained on. `more` entries stand beside the others.
    """
    device = next(model.parameters()).device
    content = {
        "model": type(model).__name__,
        "config": model.config,
        "state_dict": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "step": step,
        "rng": torch.get_rng_state(),
        "device_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        **more,
    }
    write_checkpoint(path, content)


def load_checkpoint(
    path: str | os.PathLike[str], models: Mapping[str, type[nn.Module]], made_by: str
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint, one of `models` by name, on the CPU, and the checkpoint's content.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file does not exist, is not such a checkpoint, or its parameters do not fit the model it describes.
    """
    content = _read_model(path, models, made_by)
    try:
        model = models[content["model"]](**content["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: config does not describe a {content['model']}: {error}") from error
    load_parameters(path, model, content["state_dict"])
    return model, content


def image_size(path: str | os.PathLike[str], content: dict[str, Any], names: str) -> list[int]:
    """The sizes, `names`, of the images that a checkpoint's model was trained on."""
    size, number = content.get("image_size"), names.count(",") + 1
    if not isinstance(size, list) or len(size) != number or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(f"{os.fspath(path)}: image_size must be [{names}], got {size!r}")
    return size


def restore_checkpoint(
    path: str | os.PathLike[str],
    models: Mapping[str, type[nn.Module]],
    made_by: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Put a checkpoint's parameters, optimizer and random state in place, if it is of the same model -> its content."""
    content = _read_model(path, models, made_by)
    if content["optimizer"] is None:
        raise ValueError(f"{os.fspath(path)}: holds no training state to resume from, only the model")
    ours: dict[str, Any] = model.config  # type: ignore[assignment]
    refuse_other_model(path, {"model": type(model).__name__, **ours}, content | content["config"])
    load_parameters(path, model, content["state_dict"])
    try:
        load_optimizer(optimizer, content["optimizer"])
        torch.set_rng_state(content["rng"])
        device, state = next(model.parameters()).device, content.get("device_rng")
        if device.type == "cuda" and state is not None:
            torch.cuda.set_rng_state(state, device)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)}: holds a damaged training state: {error!r}") from error
    return content


def _read_model(path: str | os.PathLike[str], models: Mapping[str, type[nn.Module]], made_by: str) -> dict[str, Any]:
    content = read_checkpoint(path, ENTRIES, made_by)
    for entry, kind in (("model", str), ("config", dict), ("state_dict", dict), ("step", int)):
        if not isinstance(content[entry], kind):
            came = type(content[entry]).__name__
            raise ValueError(f"{os.fspath(path)}: {entry} must be a {kind.__name__}, got a {came}")
    if content["model"] not in models:
        raise ValueError(f"{os.fspath(path)}: expected a checkpoint of {' or '.join(models)}, got {content['model']!r}")
    return content
