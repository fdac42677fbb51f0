"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

PNG = b"\x89PNG\r\n\x1a\n"


def check_writable(path: str | os.PathLike[str]) -> None:
    """OSError where no file could be written: to be asked before the work whose result goes there."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write to, got a folder")
    folder = next(p for p in path.absolute().parents if p.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{path}: cannot be written, {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path}: cannot be written, no permission to write into {folder}")


def check_picture(path: str | os.PathLike[str]) -> None:
    """`check_writable` for a PNG; ValueError for another suffix, FileExistsError for a file that is no PNG."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: is where a picture goes; expected a name that ends in .png")
    check_writable(path)
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(PNG)) not in (PNG, b""):
                raise FileExistsError(f"{path}: exists and is no PNG; remove it, or choose another name")


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` only if the block ends without error.

    The parent folder is made. The temporary name keeps the suffix, by which many writers choose a format.
    """
    path = Path(path)
    check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.stem}.", dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)
