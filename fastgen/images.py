"""Images: MNIST's IDX files, npz archives, folders of pictures, the digits that scikit-learn ships; grids as PNG."""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.checks import check_integer
from fastgen.files import whole_file

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
NAMES = {  # of an array of images in an npz, the first that is there
    "train": ("train", "images", "x_train", "x"),
    "test": ("test", "test_images", "x_test"),
}
ARRAYS = (".npz", ".npy")
MNIST = {"train": "train", "test": "t10k"}


def load_images(path: str | os.PathLike[str] | None = None, *, size: int | None = None, part: str = "train") -> Tensor:
    """Images as uint8 (N, C, H, W).

    Parameters
    ----------
    path
        An IDX file of images (.gz or not), a folder that holds MNIST's `train-images-idx3-ubyte`, an npz archive or npy
        file with a uint8 array (N, H, W), (N, H, W, C) or (N, C, H, W), or a folder of pictures, searched with its
        subfolders and read in the order of their names. None: the 1797 digits of 8 x 8 pixels that come with
        scikit-learn.
    size
        Side to which pictures of a folder are cropped and resized; without it they must all have one size. Gray
        pictures of 16 bits are scaled to 8.
    part
        "train", or "test": MNIST's `t10k` files of a folder, the array `test` of an archive. Files and folders that
        have no parts are read as a whole.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it does not hold images: the message says what was expected and what came.
    ImportError
        Where pillow (folders) or scikit-learn (digits) is missing.
    """
    if size is not None:
        check_integer("load_images", "size", size)
    _check_part("load_images", part)
    if path is None:
        return _digits()
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder; expected IDX, npz, or a folder of pictures")
    if path.is_dir():
        found = _idx_of(path, "images-idx3", part)
        return _folder(path, size) if found is None else _idx(found)
    if path.suffix in ARRAYS:
        return _npz(path, part)
    return _idx(path)


def _check_part(op: str, part: str) -> None:
    if part not in NAMES:
        raise ValueError(f"{op}: part must be one of {', '.join(NAMES)}, got {part!r}")


def _idx_of(folder: Path, kind: str, part: str) -> Path | None:
    """The file of MNIST's that is there."""
    names = [folder / f"{MNIST[part]}-{kind}-ubyte{suffix}" for suffix in ("", ".gz")]
    return next((p for p in names if p.is_file()), None)


def _digits() -> Tensor:
    return torch.from_numpy(_sklearn_digits().images * (255 / 16)).round().to(torch.uint8)[:, None]


def _sklearn_digits() -> Any:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "load_images: the default digits need scikit-learn: pip install fastgen-kernels[demo]"
        ) from error
    return load_digits()


def _bytes(path: Path) -> bytes:
    """Of a file that may be gzipped."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: expected a gzip file, unreadable: {error}") from error


def _arrays(path: Path) -> dict[str, Any]:
    """Of an npz archive, or of an npy file the one there is."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected an npz archive")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {path.stem: loaded}
        with loaded as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path}: expected an npz archive, unreadable: {error}") from error


def _idx(path: Path) -> Tensor:
    data = _bytes(path)
    if len(data) < 16 or data[:4] != b"\0\0\x08\x03":
        raise ValueError(
            f"{path}: expected an IDX file of images (uint8, three dimensions), an npz archive or a folder; "
            f"it begins with {data[:4].hex(' ') or 'nothing'}"
        )
    number, height, width = struct.unpack(">III", data[4:16])
    if len(data) != 16 + number * height * width:
        raise ValueError(
            f"{path}: expected {number} images of {height} x {width}, {16 + number * height * width} bytes in all, "
            f"got {len(data)}"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=16).copy()).reshape(number, 1, height, width)


def _npz(path: Path, part: str) -> Tensor:
    shapes = _arrays(path)
    images = {name: a for name, a in shapes.items() if a.dtype == np.uint8 and a.ndim in (3, 4)}
    if not images:
        came = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in shapes.items()) or "nothing"
        raise ValueError(f"{path}: expected a uint8 array (N, H, W), (N, H, W, C) or (N, C, H, W), got {came}")
    name = next((n for n in NAMES[part] if n in images), None)
    if name is None and part == "test" and len(images) > 1:
        raise ValueError(f"{path}: expected an array of {' or '.join(NAMES[part])}, got {', '.join(images)}")
    name = next(iter(images)) if name is None else name
    x = torch.from_numpy(images[name])
    if x.dim() == 3:
        return x[:, None]
    if x.shape[3] in (1, 3):
        return x.movedim(3, 1).contiguous()
    if x.shape[1] not in (1, 3):
        raise ValueError(f"{path}: expected 1 or 3 channels, got {name} {tuple(x.shape)}")
    return x


def _folder(path: Path, size: int | None) -> Tensor:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("load_images: folders need pillow: pip install fastgen-kernels[demo]") from error
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())
    if not files:
        raise ValueError(f"{path}: expected pictures ({', '.join(PICTURES)}) or MNIST's IDX files, found none")
    images: list[Tensor] = []
    for file in files:
        try:
            with Image.open(file) as picture:
                picture.load()
                converted = _eight_bits(file, ImageOps.exif_transpose(picture))
        except OSError as error:
            raise ValueError(f"{file}: expected a picture, unreadable: {error}") from error
        if size is not None:
            converted = ImageOps.fit(converted, (size, size))
        x = torch.from_numpy(np.asarray(converted).copy())
        images.append(x[None] if x.dim() == 2 else x.movedim(2, 0))
        if images[-1].shape[1:] != images[0].shape[1:]:
            raise ValueError(
                f"{file}: is {images[-1].shape[2]} x {images[-1].shape[1]} pixels, {files[0]} is "
                f"{images[0].shape[2]} x {images[0].shape[1]}; give a size to crop and resize to"
            )
    channels = max(x.shape[0] for x in images)
    return torch.stack([x.expand(channels, -1, -1) for x in images])


def _eight_bits(file: Path, picture: Any) -> Any:
    """Of a picture of pillow's, in gray or RGB; 16 bits of gray become 8."""
    from PIL import Image

    if picture.mode == "F":
        raise ValueError(f"{file}: holds floating point pixels; expected 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return picture.convert("L" if picture.mode in ("1", "L") else "RGB")
    values = np.asarray(picture).astype(np.int64)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise ValueError(f"{file}: gray values must lie in [0, 65535], got {values.min()} to {values.max()}")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def load_codes(path: str | os.PathLike[str]) -> Tensor:
    """Maps of codes, int64 (N, H, W), from an npz archive or npy file with an array of integers of that shape.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or no such array in it.
    """
    arrays = _arrays(Path(path))
    maps = {name: a for name, a in arrays.items() if np.issubdtype(a.dtype, np.integer) and a.ndim == 3}
    if not maps:
        came = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in arrays.items()) or "nothing"
        raise ValueError(f"{path}: expected an array of integers (N, H, W), got {came}")
    codes = maps.get("codes", next(iter(maps.values())))
    if codes.size and codes.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{path}: codes must be below 2^63, got {codes.max()}")
    return torch.from_numpy(codes.astype(np.int64))


def load_labels(path: str | os.PathLike[str] | None = None, *, part: str = "train") -> Tensor:
    """The labels, int64 (N,), that belong to what `load_images` finds there.

    Parameters
    ----------
    path
        A folder that holds MNIST's `train-labels-idx1-ubyte` (.gz or not), such a file, or an npz archive with an array
        of integers (N,). None: those of scikit-learn's digits.
    part
        As in `load_images`; of an archive the array `train_labels` or `test_labels`.

    Raises
    ------
    FileNotFoundError, ValueError
        If there are none.
    """
    _check_part("load_labels", part)
    if path is None:
        return torch.from_numpy(_sklearn_digits().target.astype(np.int64))
    path = Path(path)
    if path.is_dir():
        found = _idx_of(path, "labels-idx1", part)
        if found is None:
            name = f"{MNIST[part]}-labels-idx1-ubyte"
            raise FileNotFoundError(f"{path}: expected {name} (.gz or not) in the folder, found none")
        path = found
    if path.suffix in ARRAYS:
        arrays = _arrays(path)
        rows = {name: a for name, a in arrays.items() if np.issubdtype(a.dtype, np.integer) and a.ndim == 1}
        if not rows:
            raise ValueError(f"{path}: expected an array of integers (N,) as labels, got {', '.join(arrays)}")
        name = next((n for n in (f"{part}_labels", "labels") if n in rows), next(iter(rows)))
        return torch.from_numpy(rows[name].astype(np.int64))
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected IDX or npz with labels")
    data = _bytes(path)
    if data[:4] != b"\0\0\x08\x01" or len(data) != 8 + struct.unpack(">I", data[4:8])[0]:
        raise ValueError(f"{path}: expected an IDX file of labels, it begins with {data[:4].hex(' ') or 'nothing'}")
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=8).astype(np.int64))


def pad_to_multiple(x: Tensor, factor: int) -> Tensor:
    """(N, C, H, W) with zeros around it, so that `factor` divides H and W."""
    height, width = -x.shape[2] % factor, -x.shape[3] % factor
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))


def save_grid(path: str | os.PathLike[str], rows: Sequence[Tensor], *, scale: int | None = None) -> None:
    """Write images as a PNG grid, whole or not at all.

    Parameters
    ----------
    rows
        Each (n, C, H, W) floating point in [0, 1] (what lies outside is clipped), C = 1 or 3, all of one shape.
    scale
        Pixels of the PNG for each of the images'; by default what makes images at least 48 pixels high.

    Raises
    ------
    ValueError
        If shapes differ, or are none of images.
    ImportError
        Where pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("save_grid: needs pillow: pip install fastgen-kernels[demo]") from error
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 4 or shape[1] not in (1, 3):
        raise ValueError(
            f"save_grid: rows must be images of one shape (n, 1 or 3, H, W), got {sorted(map(str, shapes))}"
        )
    if scale is None:
        scale = max(1, -(-48 // shape[2]))
    check_integer("save_grid", "scale", scale)
    x = torch.stack(list(rows)).detach().cpu().float().clamp(0, 1)  # (rows, n, C, H, W)
    x = x.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    x = F.pad(x, (1, 1, 1, 1), value=1.0)
    grid = x.permute(0, 3, 1, 4, 2).reshape(len(rows) * x.shape[3], shape[0] * x.shape[4], shape[1])
    pixels: Any = (grid * 255).round().to(torch.uint8).numpy()
    with whole_file(path) as temporary:
        Image.fromarray(pixels[:, :, 0] if shape[1] == 1 else pixels).save(temporary, format="PNG")
