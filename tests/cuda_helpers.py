"""Programs of tests/emulator, and orders in which the emulator runs threads."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "emulator"
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
FLAGS += [f"-Wno-{name}" for name in ("unused-function", "clobbered", "unknown-pragmas")]
MODES = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
TOLD = {"plain": [], "address": ["-DEMULATE_ASAN"], "thread": ["-DEMULATE_TSAN"]}  # of what the scheduler tells
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "random 1": (2, 1), "random 2": (2, 2), "random 3": (2, 3)}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


@functools.cache
def built(source: str, mode: str) -> Path:
    """The program of a source, compiled once; the scheduler is no part of what a sanitizer watches."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    scheduler, program = (Path(_folder().name) / name for name in (f"{mode}.o", f"{source}.{mode}"))
    if not scheduler.exists():
        flags = [*FLAGS, *TOLD[mode], "-c", str(HERE / "emulator.cpp"), "-o", str(scheduler)]
        subprocess.run(["g++", *flags], check=True)
    flags = [*FLAGS, *MODES[mode], "-DFASTGEN_EMULATED", f"-I{HERE}"]
    subprocess.run(["g++", *flags, str(HERE / source), str(scheduler), "-o", str(program)], check=True)
    return program


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """setarch: ThreadSanitizer needs a layout of memory that randomisation does not always give."""
    command = [str(program), *map(str, words)]
    if program.suffix == ".thread" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]
    return subprocess.run(command, capture_output=True, text=True)
