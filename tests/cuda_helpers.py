"""Programs of tests/emulator, and orders in which the emulator runs threads."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "emulator"
FLAGS = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror"]
FLAGS += [f"-Wno-{name}" for name in ("unused-function", "clobbered", "unknown-pragmas")]
MODES = {
    "plain": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=null", "-fno-sanitize-recover=all"],  # null: ASan tells
    "thread": ["-fsanitize=thread"],
}
TOLD = {"plain": [], "address": ["-DEMULATE_ASAN"], "thread": ["-DEMULATE_TSAN"]}  # of what the scheduler tells
ORDERS = {"forward": (0, 0), "reverse": (1, 0), "random 1": (2, 1), "random 2": (2, 2), "random 3": (2, 3)}


def once(name: str, build: Callable[[Path], None]) -> Path:
    """The file of that name, built by the first process of a run of the tests that asks for it."""
    path = Path(os.environ["FASTGEN_TEST_FOLDER"]) / name
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            part = path.with_name(f"{name}.part")
            build(part)
            part.rename(path)
    return path


def built(source: str, mode: str) -> Path:
    """The program of a source; the scheduler is no part of what a sanitizer watches."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")

    def compiled(*arguments: object) -> None:
        subprocess.run(["g++", *FLAGS, *map(str, arguments)], check=True)

    scheduler = once(f"{mode}.o", lambda path: compiled(*TOLD[mode], "-c", HERE / "emulator.cpp", "-o", path))
    told = [*MODES[mode], "-DFASTGEN_EMULATED", f"-I{HERE}"]
    return once(f"{source}.{mode}", lambda path: compiled(*told, HERE / source, scheduler, "-o", path))


def run(program: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """setarch: ThreadSanitizer needs a layout of memory that randomisation does not always give."""
    command = [str(program), *map(str, words)]
    if program.suffix == ".thread" and shutil.which("setarch"):
        command = ["setarch", "-R", *command]
    return subprocess.run(command, capture_output=True, text=True)
