"""Running a script as two processes that meet under gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run_two(folder: Path, script: str) -> None:
    """Run `script` twice, with the arguments rank and rendezvous file; both must end well and print "done"."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    path = folder / "worker.py"
    path.write_text(script)
    commands = [[sys.executable, str(path), str(rank), str(folder / "rendezvous")] for rank in range(2)]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (out, err) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, err[-3000:]
        assert "done" in out
