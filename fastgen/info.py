"""The report of `python -m fastgen info`: versions, the machine, which backend runs each op. Needs only torch."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import fastgen
from fastgen import backend

VARIABLES = ("FASTGEN_BACKEND", "FASTGEN_CPU_ISA", "FASTGEN_KEEP_MB")


def processor() -> str:
    """The processor's name."""
    try:
        line = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
    return line.split(":", 1)[1].strip()


def report() -> str:
    """The report, several lines of plain text."""
    build = _build_info()
    features = [name for name, present in backend.cpu_features().items() if present]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    facts = {
        "fastgen": fastgen.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
        "GPU": gpu,
        "compiler": build.get("compiler", "none: the C++ kernels were not built"),
        "compiled for": build.get("isas", "nothing"),
        "CPU features": " ".join(features) or "unknown without the compiled part",
        "in use": backend.cpu_isa or f"none: {backend.why_not('wavenet_generate', 'cpu')}",
        **({} if backend.ON_X86 else {"tested": "on this kind of processor in emulation alone, and not measured"}),
        **{name: os.environ.get(name) or "not set" for name in VARIABLES},
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    for op in fastgen.ops.OPS:
        reasons = {name: backend.why_not(op, name) for name in backend.BACKENDS}
        live = [name for name, reason in reasons.items() if reason is None]
        lines += ["", f"{op}: {', '.join(live)}"]
        lines += [f"    not {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    return "\n".join(lines)


def _build_info() -> dict[str, str]:
    try:
        from fastgen import _host  # type: ignore[attr-defined]
    except ImportError:
        return {}
    return {str(name): str(value) for name, value in _host.build_info().items()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
