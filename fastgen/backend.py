"""Which backend runs an op, why another does not, and how to force one.

Order of precedence: the op's `backend=` argument, `fastgen.use_backend(...)`, the environment variable FASTGEN_BACKEND,
then `auto`: the fastest backend that can run the call. An explicit choice never falls back: it raises. `auto` falls
back to the reference with one warning that says why.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

BACKENDS = ("cpu", "triton", "cuda", "reference")
ISAS = ("generic", "avx2", "avx2_vnni", "avx512", "avx512_vnni")  # slowest first
ON_X86 = platform.machine() in ("x86_64", "AMD64")

# Triton's interpreter runs the Triton kernels on the CPU: slow, and for tests of them alone
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

REBUILD = ", or rebuild: pip install --no-build-isolation -e ."

lib = torch.library.Library("fastgen", "FRAGMENT")
lib.define("fma_peak() -> float")
lib.define("keep_buffers(int bytes, bool lasting) -> ()")


class BackendError(RuntimeError):
    """A backend was asked for that cannot run this call."""


class _Forced(threading.local):  # dynamo traces a thread-local attribute, but no ContextVar
    name: str | None

    def __init__(self) -> None:  # an attribute of the class dynamo would take for a constant
        self.name = None


_forced = _Forced()
_warned: set[str] = set()
TRITON_OPS: set[str] = set()  # that have Triton kernels


def has_triton_kernels(op: str, *names: str) -> None:
    """Say that `fastgen.kernels.<op>` holds launchers of `op` and `names` (its backward); imported when called."""
    TRITON_OPS.add(op)
    for name in (op, *names):

        def launch(*args: Any, name: str = name) -> Any:
            return _launcher(op, name)(*args)

        lib.impl(name, launch, "CPU" if INTERPRETED else "CUDA")


@functools.cache
def _launcher(op: str, name: str) -> Callable[..., Any]:
    launcher: Callable[..., Any] = getattr(importlib.import_module(f"fastgen.kernels.{op}"), name)
    return launcher


def _check_name(name: str, source: str) -> str:
    if name not in (*BACKENDS, "auto"):
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)} or auto, got {name!r}")
    return name


def _variable(name: str, allowed: tuple[str, ...]) -> str:
    """An environment variable's value, "" where it is not set."""
    value = os.environ.get(name, "")
    if not value or value in allowed:
        return value
    _refuse(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def _refuse(message: str) -> NoReturn:
    if sys.argv[:1] == ["-m"]:  # `python -m fastgen` imports the package before any of its code could catch this
        print(f"fastgen: {message}", file=sys.stderr)
        raise SystemExit(2)
    raise ValueError(message)


_environment = _variable("FASTGEN_BACKEND", (*BACKENDS, "auto")) or "auto"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every fastgen op of this thread on `name` within the context: cpu, triton, cuda, reference or auto."""
    before, _forced.name = _forced.name, _check_name(name, "use_backend")
    try:
        yield
    finally:
        _forced.name = before


def cpu_features() -> dict[str, bool]:
    """Instruction sets of this machine that fastgen has kernels for; empty without the compiled part."""
    try:
        from fastgen import _host  # type: ignore[attr-defined]
    except ImportError:
        return {}
    return dict(_host.cpu_features())


def runnable_isas() -> list[str]:
    """Instruction sets that this machine and this build both have, the best last; none without the compiled part."""
    features = {"generic": True, **cpu_features()}
    return [isa for isa in ISAS if features.get(isa, False) and _library(isa).exists()]


def _library(isa: str) -> Path:
    return Path(__file__).parent / f"_cpu_{isa}.so"


def _load_cpu() -> tuple[str | None, str | None]:
    """Load the kernels for the best instruction set of this CPU -> (instruction set, reason why none)."""
    if INTERPRETED:
        return None, "TRITON_INTERPRET=1: Triton's interpreter stands in for the C++ kernels"
    wanted = _variable("FASTGEN_CPU_ISA", ISAS)
    if not any(_library(isa).exists() for isa in ISAS):
        return None, "the C++ kernels were not built (no compiler at installation, or FASTGEN_BUILD=none)"
    runnable = runnable_isas()
    if wanted:
        runnable = [isa for isa in runnable if isa == wanted]
    if not runnable:
        return None, f"FASTGEN_CPU_ISA={wanted}, but this {platform.machine()} CPU or this build does not have it"
    try:
        torch.ops.load_library(str(_library(runnable[-1])))
    except OSError as error:
        return None, f"the C++ kernels could not be loaded: {error}"
    megabytes = os.environ.get("FASTGEN_KEEP_MB", "")
    if megabytes:
        if not megabytes.isdecimal():
            _refuse(f"FASTGEN_KEEP_MB: expected a number of megabytes, got {megabytes!r}")
        torch.ops.fastgen.keep_buffers(int(megabytes) << 20, True)
    return runnable[-1], None


def release_memory() -> None:
    """Give back to the system what large results of the C++ kernels have left for the next ones.

    A result of at least a megabyte takes memory that an earlier one has freed, since fresh pages cost more time than
    most kernels. At most a gigabyte lies idle, or FASTGEN_KEEP_MB megabytes.
    """
    if _cpu_reason is None:
        torch.ops.fastgen.keep_buffers(0, False)


def _load_cuda() -> str | None:
    """Load the CUDA kernels; they register themselves under any torch -> the reason why not."""
    library = Path(__file__).parent / "_cuda.so"
    if not library.exists():
        return "the CUDA kernels were not built (no nvcc at installation, a torch without CUDA, or FASTGEN_BUILD)"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA kernels could not be loaded: {error}"
    return None


cpu_isa, _cpu_reason = _load_cpu()
# the C++ kernels take products of bfloat16 two at a time (with_factors in csrc/cpu/elements.h)
_PAIRS = {"avx512_vnni": "avx512_bf16", "generic": "arm_bf16"}  # instruction set: feature
multiplies_pairs = cpu_features().get(_PAIRS.get(cpu_isa or "", ""), False)
HAS_BFLOAT16 = any(cpu_features().get(name, False) for name in ("avx512_bf16", "amx_bf16", "arm_bf16"))
_cuda_reason = _load_cuda()
CUDA_OPS = ("wavenet_generate", "pixelcnn_generate")  # that have CUDA kernels
NO_ROOM = "a block of this GPU has too little shared memory for this network"


@functools.cache
def _has_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgen::{op}", "CPU")


def why_not(op: str, backend: str) -> str | None:
    """The reason why `backend` cannot run `op` on this machine, or None where it can.

    Raises
    ------
    ValueError
        For an op or a backend that does not exist; names those that do.
    """
    if not hasattr(torch.ops.fastgen, op):
        from fastgen.ops import OPS

        raise ValueError(f"why_not: op must be one of {', '.join(OPS)}, got {op!r}")
    if backend not in BACKENDS:
        raise ValueError(f"why_not: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return None
    if backend == "cpu":
        if _cpu_reason:
            return _cpu_reason
        if not _has_kernel(op):
            return "this op has no C++ kernel"
        return None
    if backend == "triton" and op in TRITON_OPS:
        return _why_no_triton()
    if backend == "cuda" and op in CUDA_OPS:
        return _cuda_reason or _why_no_gpu()
    return "this version has no GPU kernel for it"


# torch.compiler.assume_constant_result, without the second that importing the compiler takes
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if INTERPRETED else _why_no_gpu()


@functools.cache
def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU"
    return _too_old(None)


@functools.cache
def _too_old(index: int | None) -> str | None:
    """Of one GPU; None: the current one."""
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, below 8.0"
    return None


def _refuses(name: str, device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Why a backend that is live does not take such tensors."""
    if name == "cpu":
        return None if device.type in ("cpu", "meta") else f"the tensors are on {device}"
    if name == "cuda":
        if device.type not in ("cuda", "meta"):
            return f"the tensors are on {device}"
        return _too_old(device.index) if device.index is not None else None
    return _triton_refuses(device, dtype) if name == "triton" else None


def _triton_refuses(device: torch.device, dtype: torch.dtype | None) -> str | None:
    if INTERPRETED and device.type == "cuda":
        return "TRITON_INTERPRET is set: Triton's interpreter takes tensors on the CPU"
    if device.type not in ("cuda", "meta") and not INTERPRETED:
        return f"the tensors are on {device}"
    if dtype == torch.float64:
        return "float64 has no Triton kernel"
    return _too_old(device.index) if device.type == "cuda" and device.index is not None else None


def resolve(op: str, backend: str | None, device: torch.device, dtype: torch.dtype | None = None) -> str:
    """The backend that runs `op` for tensors on `device`, of `dtype` where that matters.

    Raises
    ------
    BackendError
        If an explicitly chosen backend cannot run; names the op, the reason and what to do.
    """
    asked = _asked(op, backend)
    name = asked
    if name == "auto":
        name = "cpu" if device.type in ("cpu", "meta") else "cuda" if op in CUDA_OPS else "triton"
    reason = why_not(op, name)
    if reason is None:
        reason = _refuses(name, device, dtype)
    return name if reason is None else instead(op, asked, name, device, reason)


def _asked(op: str, backend: str | None) -> str:
    return (_forced.name or _environment) if backend is None else _check_name(backend, f"{op}: backend")


def instead(op: str, backend: str | None, name: str, device: torch.device, reason: str) -> str:
    """What runs `op` where backend `name` cannot, for `reason`: the reference, with a warning.

    Raises
    ------
    BackendError
        If `name` was asked for, not found by "auto".
    """
    if _asked(op, backend) != "auto":
        raise BackendError(
            f"fastgen.{op}: backend {name!r} was requested but cannot run: {reason}. "
            f"Use backend='reference' or 'auto'{REBUILD if name == 'cpu' else ''} "
            "(`python -m fastgen info` lists what is live)"
        )
    if not torch.compiler.is_compiling():
        _warn_once(f"fastgen: {op} runs on the PyTorch reference on {device.type}: {reason}")
    return "reference"


def _warn_once(message: str) -> None:
    reason = message.split(": ", 2)[-1]
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(message, RuntimeWarning, stacklevel=5)
