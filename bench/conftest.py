"""How benchmarks measure: verify, warm up, then time all contestants in turn, and keep medians.

Timings on a shared machine drift, so the contestants of a case take turns, round by round, and only their ratios are
to be trusted. pytest-benchmark records fastgen's own times; the rest stands in its `extra_info`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgen
from fastgen import backend

torch.set_num_threads(min(2, torch.get_num_threads()))

# without instructions for bfloat16 PyTorch takes minutes for a convolution: nobody computes in it there
DTYPES = (torch.float32, torch.bfloat16) if backend.HAS_BFLOAT16 else (torch.float32,)
SHORTEST = 0.02  # seconds: what takes less is repeated within one measurement
WAKING = 0.01  # seconds that a contestant works unmeasured: after a pause threads, clocks and caches are slow at first


def peak_extra_bytes(call: Callable[[], object]) -> int | None:
    """How far the process grows while `call` runs, its result included."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        return None
    with contextlib.suppress(AttributeError):  # memory that earlier calls left with the allocator would hide the growth
        ctypes.CDLL(None).malloc_trim(0)
    fastgen.release_memory()
    clear.write_text("5")  # forget the peak so far

    def kib(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))

    before = kib("VmRSS")
    result = call()
    grown = 1024 * (kib("VmHWM") - before)
    del result
    return grown


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collector, as in timeit: a collection lands on whoever's turn it is."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def awake(call: Callable[[], object]) -> float:
    """Call until WAKING is over, twice at least -> seconds of the last call."""
    calls, start = 0, time.perf_counter()
    while True:
        begin = time.perf_counter()
        call()
        end, calls = time.perf_counter(), calls + 1
        if calls > 1 and end - start > WAKING:
            return end - begin


@pytest.fixture
def contest(benchmark):
    """contest(contestants, rounds, **facts): median seconds of each, fastgen's recorded by pytest-benchmark."""

    def run(contestants: dict[str, Callable[[], object]], rounds: int = 7, **facts: object) -> dict[str, float]:
        times: dict[str, list[float]] = {name: [] for name in contestants}
        repeats = {}
        with without_collections():
            for name, call in contestants.items():
                repeats[name] = max(1, round(SHORTEST / awake(call)))
            for _ in range(rounds):
                for name, call in contestants.items():
                    time.sleep(0.02)  # other pools' threads spin for a while after their work
                    if repeats[name] > 1:
                        awake(call)
                    start = time.perf_counter()
                    for _ in range(repeats[name]):
                        call()
                    times[name].append((time.perf_counter() - start) / repeats[name])
        medians = {name: statistics.median(t) for name, t in times.items()}
        first = next(iter(contestants))
        benchmark.pedantic(contestants[first], rounds=3)
        benchmark.extra_info.update(facts, seconds=medians, threads=torch.get_num_threads())
        return medians

    return run


@pytest.fixture(scope="session")
def limits() -> dict[str, float]:
    """Measured: GFLOP/s of float32 multiply-adds, GB/s of copying (read and written bytes)."""
    a, b = torch.ones(1 << 26), torch.empty(1 << 26)
    b.copy_(a)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        b.copy_(a)
        times.append(time.perf_counter() - start)
    flops = max(torch.ops.fastgen.fma_peak() for _ in range(3)) if backend.cpu_isa else 0.0
    return {"gflops": flops, "copy_gbs": 2 * a.numel() * 4 / min(times) / 1e9}


@pytest.fixture
def beside_pytorch(contest, limits, benchmark):
    """beside_pytorch(kind, case, op, eager, ...): an op beside what a user writes, and that compiled.

    macs: multiply-adds of a forward pass; a backward pass takes twice as many. tolerance: of gradients, to their
    largest.
    """

    def run(
        kind: str,
        case: str,
        op: Callable[..., torch.Tensor],
        eager: Callable[..., torch.Tensor],
        args: tuple[torch.Tensor, ...],
        macs: int,
        backward: bool,
        tolerance: float,
    ) -> None:
        compiled = torch.compile(eager)
        ways: dict[str, Callable[[], Any]] = {
            "fastgen": lambda: op(*args),
            "eager": lambda: eager(*args),
            "torch.compile": lambda: compiled(*args),
        }
        result = ways["fastgen"]()
        torch.testing.assert_close(result, ways["eager"](), atol=1e-4, rtol=1e-4)
        if backward:
            cotangent = torch.randn_like(result)
            ways = {name: lambda way=way: torch.autograd.grad(way(), args, cotangent) for name, way in ways.items()}
            for a, b in zip(ways["fastgen"](), ways["eager"](), strict=True):
                torch.testing.assert_close(a, b, atol=tolerance * float(b.abs().max()), rtol=1e-3)
        median = contest(ways, rounds=9 if backward else 15)
        benchmark.extra_info.update(
            {kind: True},
            case=f"{case}, {'forward + backward' if backward else 'forward'}",
            of_fma_peak=2 * macs * (3 if backward else 1) / median["fastgen"] / 1e9 / limits["gflops"],
            limits=limits,
            peak_extra_bytes={name: peak_extra_bytes(ways[name]) for name in ("fastgen", "eager")},
        )

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastgen"] = {
        "version": fastgen.__version__, "torch": torch.__version__, "python": platform.python_version(),
        "isa": backend.cpu_isa, "best_isa": backend.runnable_isas()[-1], "threads": torch.get_num_threads(),
    }  # fmt: skip
