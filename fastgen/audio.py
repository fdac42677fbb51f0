"""Audio files to tensors and back, and the mu-law companding of ITU-T G.711 as WaveNet uses it.

    y = sign(x) * log(1 + mu |x|) / log(1 + mu)        mu = classes - 1: the standard's 255 for 256 classes
    class = floor((y + 1) / 2 * mu + 1/2)              silence is class classes // 2

Source: van den Oord et al., "WaveNet" (2016), section 2.2.
"""

from __future__ import annotations

import importlib.resources
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.checks import check_integer, readable
from fastgen.files import check_writable, whole_file

SUFFIXES = (".wav", ".flac")
UNKNOWN_SIZES = (0, 0x7FFFF000, 0xFFFFFFFF)  # what encoders write that cannot go back to the header

ZERO_CROSSINGS = 64  # of the resampler's sinc, on each side
ROLLOFF = 0.95  # cutoff as a share of the lower Nyquist frequency; with the window, stops 100 dB at that frequency
KAISER_BETA = 10.0
RESAMPLE_BLOCK = 8192  # outputs at a time, which bounds the memory


def mu_law_encode(x: Tensor, classes: int = 256) -> Tensor:
    """Quantise x (...), floating point in [-1, 1], to int64 classes (...) in [0, classes).

    Raises
    ------
    TypeError, ValueError
        If x is not floating point, or holds NaN or values outside [-1, 1]; if classes < 2.
    """
    mu = _mu("mu_law_encode", classes)
    if not x.is_floating_point():
        raise TypeError(f"mu_law_encode: x must be floating point in [-1, 1], got {x.dtype}")
    if x.numel() and readable(x) and not bool((x.abs() <= 1).all()):
        raise ValueError(f"mu_law_encode: x must lie in [-1, 1], got {float(x.min())} to {float(x.max())}")
    x = x.double()
    y = x.sign() * torch.log1p(mu * x.abs()) / math.log1p(mu)
    return ((y + 1) / 2 * mu + 0.5).floor().long()


def mu_law_decode(x: Tensor, classes: int = 256) -> Tensor:
    """The float32 value in [-1, 1] at the centre of each class: x (...) integers in [0, classes) -> (...).

    Raises
    ------
    TypeError, ValueError
        If x is not of an integer type, or lies outside [0, classes); if classes < 2.
    """
    mu = _mu("mu_law_decode", classes)
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"mu_law_decode: x must be integer classes, got {x.dtype}")
    if x.numel() and readable(x) and not 0 <= int(x.min()) <= int(x.max()) <= mu:
        raise ValueError(f"mu_law_decode: x must lie in [0, {classes}), got {int(x.min())} to {int(x.max())}")
    y = 2 * x.double() / mu - 1
    return (y.sign() * torch.expm1(y.abs() * math.log1p(mu)) / mu).float()


def _mu(op: str, classes: int) -> int:
    check_integer(op, "classes", classes, 2)
    return classes - 1


def resample(x: Tensor, rate: int, new_rate: int) -> Tensor:
    """Band-limited resampling of x (T,) from `rate` to `new_rate` Hz -> (ceil(T * new_rate / rate),), same dtype.

    Output n lies at time n * rate / new_rate of the input. It is a sum of 128 or more neighbours with a Kaiser-windowed
    sinc; outputs whose time has the same fraction share their taps.
    """
    check_integer("resample", "rate", rate, unit=", in Hz")
    check_integer("resample", "new_rate", new_rate, unit=", in Hz")
    if x.dim() != 1 or not x.is_floating_point():
        raise ValueError(f"resample: x must be (T,) floating point, got {tuple(x.shape)} {x.dtype}")
    if rate == new_rate or not x.numel():
        return x.clone()
    common = math.gcd(rate, new_rate)
    stride, phases = rate // common, new_rate // common
    cutoff = ROLLOFF * min(1.0, new_rate / rate)  # as a share of the input's Nyquist frequency
    reach = math.ceil(ZERO_CROSSINGS / cutoff)  # taps on each side
    distance = torch.arange(-reach, reach + 1).double() - torch.arange(phases).double()[:, None] / phases
    window = torch.special.i0(KAISER_BETA * (1 - (distance / (reach + 1)) ** 2).clamp(min=0).sqrt())
    taps = torch.sinc(cutoff * distance) * window  # (phases, 2 * reach + 1)
    taps = (taps / taps.sum(1, keepdim=True)).to(x)
    windows = F.pad(x, (reach, reach)).unfold(0, taps.shape[1], 1)  # (T, 2 * reach + 1), a view
    times = torch.arange(-(-x.shape[0] * phases // stride)) * stride
    parts = [(windows[t // phases] * taps[t % phases]).sum(1) for t in times.split(RESAMPLE_BLOCK)]
    return torch.cat(parts)


def load_audio(path: str | os.PathLike[str], rate: int) -> Tensor:
    """Read a WAV or FLAC file of any sample rate -> mono float32 (T,) in [-1, 1] at `rate` Hz.

    Channels are averaged. Values that resampling lifts over full scale are clipped to it.

    Raises
    ------
    FileNotFoundError, ValueError
        If the file does not exist, cannot be read as audio, is cut short, holds no samples, or values that are NaN or
        beyond [-1, 1].
    """
    check_integer("load_audio", "rate", rate, unit=", in Hz")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected a WAV or FLAC file")
    soundfile = _soundfile()
    try:
        samples, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, TypeError) as error:  # TypeError: a suffix that means headerless data
        size = f"a folder, {path}" if path.is_dir() else f"a file of {path.stat().st_size} bytes"
        other = path.suffix.lower() not in SUFFIXES  # libsndfile's words for these help nobody
        reason = (
            f"the formats are {' and '.join(SUFFIXES)}, not {path.suffix or 'a name without suffix'}"
            if other
            else error
        )
        raise ValueError(f"{path}: expected a WAV or FLAC file, got {size}, unreadable: {reason}") from error
    missing = _missing_bytes(path)
    if missing:
        size = f"a file of {path.stat().st_size} bytes"
        raise ValueError(f"{path}: expected a whole WAV file, got {size}, cut short: {missing} bytes are missing")
    if not samples.shape[0]:
        raise ValueError(f"{path}: expected at least one sample of audio, got none")
    x = torch.from_numpy(samples).mean(1)
    if not bool((x.abs() <= 1).all()):
        raise ValueError(f"{path}: expected samples in [-1, 1], got {float(x.min())} to {float(x.max())}")
    return resample(x, file_rate, rate).clamp_(-1, 1)


def _missing_bytes(path: Path) -> int:
    """By how many bytes a WAV file is shorter than its header says; 0 for other files and for sizes left open.

    libsndfile reads what is there without a word. It refuses FLAC files that are cut short.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if head[:4] not in (b"RIFF", b"RIFX") or head[8:] != b"WAVE":
            return 0
        order: Literal["little", "big"] = "little" if head[:4] == b"RIFF" else "big"
        while len(chunk := file.read(8)) == 8:
            size = int.from_bytes(chunk[4:], order)
            if chunk[:4] == b"data":
                return 0 if size in UNKNOWN_SIZES else max(0, file.tell() + size - path.stat().st_size)
            file.seek(size + size % 2, os.SEEK_CUR)
    return 0


def load_folder(
    path: str | os.PathLike[str], rate: int, *, include: str | None = None, exclude: str | None = None
) -> list[Tensor]:
    """`load_audio` for one file, or for every WAV and FLAC file in a folder and below it, sorted by name.

    `include` and `exclude` are patterns of the names of files in a folder, such as "*_[0-4].wav".

    Raises
    ------
    FileNotFoundError, ValueError
        As `load_audio`; FileNotFoundError also for a folder without such files.
    """
    return [load_audio(file, rate) for file in audio_files(path, include=include, exclude=exclude)]


def audio_files(path: str | os.PathLike[str], *, include: str | None = None, exclude: str | None = None) -> list[Path]:
    """The files that `load_folder` reads, in its order."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
    if not files:
        raise FileNotFoundError(f"{path}: expected WAV or FLAC files in this folder, got none")
    files = [f for f in files if f.match(include or "*") and not (exclude and f.match(exclude))]
    if not files:
        raise ValueError(f"{path}: no file is left by include={include!r} and exclude={exclude!r}")
    return files


def save_audio(path: str | os.PathLike[str], x: Tensor, rate: int) -> None:
    """Write x (T,), floating point in [-1, 1], as a 16-bit mono WAV file, whole or not at all; makes its folder.

    Raises
    ------
    ValueError
        If the name does not end in .wav; if x is not (T,), empty, or holds NaN or values outside [-1, 1].
    """
    check_integer("save_audio", "rate", rate, unit=", in Hz")
    check_output(path)
    if x.dim() != 1 or not x.numel() or not x.is_floating_point():
        raise ValueError(f"save_audio: x must be (T,) floating point, T >= 1, got {tuple(x.shape)} {x.dtype}")
    if not bool((x.abs() <= 1).all()):
        raise ValueError(f"save_audio: x must lie in [-1, 1], got {float(x.min())} to {float(x.max())}")
    soundfile = _soundfile()
    with whole_file(path) as temporary:
        soundfile.write(temporary, x.detach().float().cpu().numpy(), rate, format="WAV", subtype="PCM_16")


def check_output(path: str | os.PathLike[str]) -> None:
    """ValueError or OSError unless `save_audio` could write there."""
    path = Path(path)
    if path.suffix.lower() != ".wav":
        raise ValueError(f"save_audio: path must end in .wav, got {path}")
    if path.is_dir():
        raise ValueError(f"save_audio: path must be a file, {path} is a folder")
    check_writable(path)


def speech_path() -> Path:
    """About ten seconds of synthetic English speech, 16 kHz mono FLAC, that comes with fastgen."""
    return Path(str(importlib.resources.files("fastgen").joinpath("data", "speech.flac")))


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: the package is there, its C library is not
        raise ImportError(
            "fastgen.audio: reading and writing audio needs soundfile: pip install fastgen-kernels[demo]"
        ) from error
    return soundfile
