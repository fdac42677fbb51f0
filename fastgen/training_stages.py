"""The second stage of the VQ-VAEs: the data set encoded once, a prior trained for each map of codes.

Beside a quantizer's checkpoint NAME.pt lie NAME.codes.npz and, for each map, NAME.LEVEL.pt; any other suffix belongs to
NAME. Codes and priors remember which quantizer they are of.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.checkpoints import load_checkpoint, read_checkpoint
from fastgen.checks import check_integer
from fastgen.files import whole_file
from fastgen.loop import Progress, TrainingLog, device_of
from fastgen.models import VQVAE, VQVAE2, GatedPixelCNN, GPTPrior, PixelModel, PixelSNAIL, TwoStage
from fastgen.models.speech_vqvae import SpeechVQVAE
from fastgen.training_images import MODELS, as_floats, check_images
from fastgen.training_pixels import load_pixels, train_pixels

LEVELS = {
    "VQVAE": ("codes",),
    "VQVAE2": ("top", "bottom"),
    "SpeechVQVAE": ("codes",),
}  # maps of codes, in the order of their priors
PRIORS: dict[str, type[PixelModel]] = {
    "gated_pixelcnn": GatedPixelCNN, "pixelsnail": PixelSNAIL, "gpt": GPTPrior,
}  # fmt: skip
DEFAULT_PRIORS = {
    "VQVAE": ("gated_pixelcnn",), "VQVAE2": ("pixelsnail", "pixelsnail"), "SpeechVQVAE": ("gpt",),
}  # fmt: skip
Quantizer = VQVAE | VQVAE2 | SpeechVQVAE
QUANTIZERS: dict[str, type[nn.Module]] = {**MODELS, "SpeechVQVAE": SpeechVQVAE}
ENCODING_BATCH = 64


def beside(quantizer: str | os.PathLike[str], level: str, suffix: str = ".pt") -> Path:
    """The file of a map's prior, or of what else belongs to a quantizer."""
    path = Path(quantizer)
    return path.with_name(f"{path.name.removesuffix('.pt')}.{level}{suffix}")


def fingerprint(model: nn.Module) -> str:
    """What tells a model's parameters from any others."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def encode(model: Quantizer, data: Tensor) -> list[Tensor]:
    """uint8 images (N, C, H, W), or int64 clips (N, T) -> int64 (N, h, w) for each map of codes, the top first,
    on the CPU."""
    model.eval()
    device = device_of(model)
    if isinstance(model, SpeechVQVAE):
        clips = [model.encode(part.to(device)) for part in data.split(ENCODING_BATCH)]
        return [torch.cat(clips)[:, None].cpu()]
    check_images("encode", model, data)
    encoded = [model.encode(as_floats(part, device)) for part in data.split(ENCODING_BATCH)]
    return [torch.cat(maps).cpu() for maps in zip(*(e if isinstance(e, tuple) else (e,) for e in encoded), strict=True)]


def encode_once(path: str | os.PathLike[str], model: Quantizer, data: Tensor) -> list[Tensor]:
    """`encode`, or what it gave the last time for this quantizer and these data: kept beside the quantizer."""
    levels, file = LEVELS[type(model).__name__], beside(path, "codes", ".npz")
    made_of = f"{fingerprint(model)} {hashlib.sha256(data.contiguous().numpy().tobytes()).hexdigest()[:16]}"
    damaged = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # then it is made anew
    with contextlib.suppress(*damaged), np.load(file, allow_pickle=False) as archive:
        if str(archive["made_of"]) == made_of:
            return [torch.from_numpy(archive[level].astype(np.int64)) for level in levels]
    codes = encode(model, data)
    small = np.uint16 if model.codebook_size <= 1 << 16 else np.int64
    arrays: dict[str, Any] = {level: c.numpy().astype(small) for level, c in zip(levels, codes, strict=True)}
    with whole_file(file) as temporary:
        np.savez_compressed(temporary, **arrays, made_of=np.array(made_of))
    return codes


def train_priors(
    path: str | os.PathLike[str],
    data: Tensor,
    labels: Tensor | None = None,
    *,
    kinds: Sequence[str] | None = None,
    sizes: dict[str, int] | None = None,
    steps: int,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: Progress = True,
    **options: Any,
) -> dict[str, TrainingLog]:
    """Train a prior for each map of codes, where it has not been trained for so many steps already.

    Parameters
    ----------
    path
        Checkpoint of the quantizer, trained by `train_vqvae` or `train_speech_vqvae`. What this makes is put beside it.
    data, labels
        uint8 images (N, C, H, W), sides multiples of the quantizer's `factor`, or clips (N, T) int64, T a multiple of
        its `downsample`; classes (N,) int64 for class conditioning.
    kinds
        "gated_pixelcnn", "pixelsnail" or "gpt" for each map, the top first; "gpt" takes no map above it. By default
        "gated_pixelcnn" for VQ-VAE, "pixelsnail" twice for VQ-VAE-2, "gpt" for speech.
    sizes
        Parameters of the priors' models.
    steps
        Of each prior.
    device
        To encode and to train on.
    resume
        Go on from priors that are there, or that are cut short; a prior that has its steps is left as it is.
    progress, options
        As in `train_pixels`: batch_size, learning_rate, schedule, precision, clip_norm, holdout, seed, save_every.

    Returns
    -------
    The logs of what was trained now, by map.

    Raises
    ------
    FileNotFoundError
        If there is no quantizer yet.
    FileExistsError
        If a prior is there, without resume.
    ValueError
        For an argument outside its range, and for priors of another codebook.
    """
    op = "train_priors"
    check_integer(op, "steps", steps)
    model = load_quantizer(path)
    levels = LEVELS[type(model).__name__]
    kinds = check_kinds(model, kinds)
    classes = 0 if labels is None else int(labels.max()) + 1
    check_priors(path, model, resume=resume)
    codes = encode_once(path, model.to(device), data)
    logs = {}
    for i, (level, kind, maps) in enumerate(zip(levels, kinds, codes, strict=True)):
        file, source = beside(path, level), f"{fingerprint(model)} {level}"
        if file.exists():
            prior = load_pixels(file)[0]
            if type(prior) is not PRIORS[kind] or any(prior.config[n] != v for n, v in (sizes or {}).items()):
                raise ValueError(
                    f"{file}: is another prior than asked for, a {type(prior).__name__} with "
                    f"channels={prior.config['channels']}, layers={prior.config['layers']}; ask for that, or remove it"
                )
            if prior.config["classes"] != classes:
                raise ValueError(
                    f"{file}: is a prior of {prior.config['classes']} classes, the labels given are of {classes}; give "
                    "the same, or remove it"
                )
            if read_checkpoint(file, ("step",), op)["step"] >= steps:
                continue
        else:
            torch.manual_seed(options.get("seed", 0))
            prior = _prior(model, i, kind, sizes, tuple(maps.shape[1:]), classes)
        logs[level] = train_pixels(
            prior.to(device), maps, labels=labels, cond=codes[i - 1] if i else None, steps=steps, checkpoint=file,
            resume=file.exists(), source=source, progress=progress, **options,
        )  # fmt: skip
    return logs


def _prior(
    model: nn.Module, i: int, kind: str, sizes: dict[str, int] | None, image_size: tuple[int, ...] = (1, 1),
    classes: int = 0,
) -> PixelModel:  # fmt: skip
    """For the quantizer's i-th map of codes, the top first."""
    more: dict[str, Any] = dict(sizes or {})
    if kind == "gpt":
        more["image_size"] = image_size
    more["codes"] = model.codebook_size
    more["cond_codes"] = model.codebook_size if i else 0
    return PRIORS[kind](classes=classes, **more)


def check_sizes(model: nn.Module, kinds: Sequence[str], sizes: dict[str, int] | None) -> None:
    """ValueError where priors of these kinds cannot have those sizes."""
    with torch.random.fork_rng(devices=()):
        for i, kind in enumerate(kinds):
            _prior(model, i, kind, sizes)


def check_kinds(model: nn.Module, kinds: Sequence[str] | None) -> Sequence[str]:
    """The kinds of priors for a quantizer, the default ones where none are named; ValueError where they do not fit."""
    name = type(model).__name__
    levels, kinds = LEVELS[name], kinds or DEFAULT_PRIORS[name]
    if len(kinds) != len(levels) or not all(kind in PRIORS for kind in kinds):
        raise ValueError(f"train_priors: kinds must be {len(levels)} of {', '.join(PRIORS)}, got {', '.join(kinds)}")
    if "gpt" in kinds[1:]:
        raise ValueError("train_priors: kinds must have 'gpt' for the top map alone: pixelsnail sees the map above")
    return kinds


def load_quantizer(path: str | os.PathLike[str]) -> Quantizer:
    """The first stage, which must have been trained."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{os.fspath(path)}: no such file; train the quantizer first: "
            f"python -m fastgen train vqvae (or vqvae2, speech_vqvae) --steps N --out {os.fspath(path)}"
        )
    return load_checkpoint(path, QUANTIZERS, "train_vqvae or train_speech_vqvae")[0]  # type: ignore[return-value]


def check_priors(path: str | os.PathLike[str], model: Quantizer, *, resume: bool) -> None:
    """Raise where a prior is there that would be written over, or that is of other codes."""
    for level in LEVELS[type(model).__name__]:
        file = beside(path, level)
        if not file.exists():
            continue
        if not resume:
            raise FileExistsError(
                f"{file}: exists; resume from it, or remove it: a quantizer that is trained further makes other codes"
            )
        _check_source(path, model, level)


def _check_source(path: str | os.PathLike[str], model: Quantizer, level: str) -> None:
    file = beside(path, level)
    if read_checkpoint(file, ("step",), "train_priors").get("source") != f"{fingerprint(model)} {level}":
        raise ValueError(
            f"{file}: is a prior over other codes than those of this quantizer, which has changed since or is another; "
            "remove it and train it again: python -m fastgen train prior --steps N --of "
            f"{os.fspath(path)}"
        )


def load_priors(path: str | os.PathLike[str]) -> tuple[Quantizer, list[PixelModel], tuple[int, int]]:
    """A quantizer and the priors beside it, on the CPU, and the (height, width) of the first one's map.

    Raises
    ------
    FileNotFoundError
        If a stage has not been trained; the message says by which command it is.
    ValueError
        If a file is damaged, or a prior is of other codes than the quantizer's.
    """
    model = load_quantizer(path)
    priors, sizes = [], []
    for level in LEVELS[type(model).__name__]:
        file = beside(path, level)
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; train the prior first: python -m fastgen train prior --steps N --of "
                f"{os.fspath(path)}"
            )
        _check_source(path, model, level)
        prior, size = load_pixels(file)
        priors.append(prior)
        sizes.append(size)
    return model, priors, sizes[0]


def load_two_stage(path: str | os.PathLike[str]) -> tuple[TwoStage, tuple[int, int]]:
    """`load_priors` of images, as one model, and the (height, width) of the images."""
    model, priors, size = load_priors(path)
    if isinstance(model, SpeechVQVAE):
        raise ValueError(f"{os.fspath(path)}: is of speech, not of images")
    return TwoStage(model, priors), (size[0] * model.factor, size[1] * model.factor)
