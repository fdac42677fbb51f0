"""The GPU kernels beside eager PyTorch, torch.compile and peers: python bench/gpu.py [--out FOLDER] [--only REGEX].

Writes FOLDER/<device>.json as it goes, then its tables (.md) and plots (.png). Results and gradients are verified
first; what fails is written down, the rest goes on, and the exit status says so. torch.compile is in its default mode
and makes kernels for each case's shapes (dynamic=False), cuDNN chooses its algorithms by trial, and caches are cleared
before each call. `least` is the floor: what bytes and operations take at the copy bandwidth and the bfloat16 matrix
rate measured in the same run, or where steps wait for each other about what they take in turn; `peak_bytes` is what a
call takes in memory beyond its arguments, `graph_seconds` what the GPU takes without the host. Cases are in
gpu_cases.py and gpu_generation.py, the targets in gpu_report.py. With --tiny the sizes are those of a rehearsal, which
Triton's interpreter can do on a CPU (TRITON_INTERPRET=1 FASTGEN_BACKEND=triton).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_cases import Case, Entry, listing
from gpu_generation import generation_listing
from gpu_peers import DEVICE, installed
from gpu_report import judged, plot_cases, plot_sampling, ratios, sampling, text

CUDA = DEVICE == "cuda"
LONG = 0.1  # seconds: what takes longer is called three times


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(call: Callable[[], object]) -> float:
    """The median, with caches cleared before each call; the first call compiles. In a rehearsal that alone."""
    if CUDA:
        call()
    times = []
    for _ in range(3 if CUDA else 1):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    if not CUDA or statistics.median(times) > LONG:
        return statistics.median(times)
    return float(triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median")) / 1e3


def graph_seconds(call: Callable[[], object], count: int = 3) -> float:
    """What the GPU takes, without the host: the median of replays of a graph of `count` calls, caches as they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return float(triton.testing.do_bench(graph.replay, warmup=10, rep=50, return_mode="median")) / 1e3 / count


def peak_bytes(call: Callable[[], object]) -> int:
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak


def measured_limits(tiny: bool) -> dict[str, float]:
    n, side = (1 << 16, 256) if tiny else (1 << 28, 8192)
    a, b = torch.empty(n, device=DEVICE), torch.zeros(n, device=DEVICE)
    copy = 8 * n / seconds(lambda: a.copy_(b))
    m = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    return {"copy_bytes": copy, "bf16_operations": 2 * side**3 / seconds(lambda: m @ m)}


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    except OSError:
        return ""
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """What the figures are of."""
    about: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "rehearsal", "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda, "python": platform.python_version(),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "datetime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if CUDA:
        about["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
        fields = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
        values = output_of("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
        about |= dict(zip(fields, values.split(", "), strict=False))
    return about


def measure(case: Case, limits: dict[str, float], failed: Callable[[str, Exception], None]) -> dict[str, Any]:
    """Time and memory of all ways of a case; `failed` is told of those that raise."""
    times, peaks, graphs = {}, {}, {}
    for way, call in case.ways.items():
        try:
            times[way] = seconds(call) / case.shares.get(way, 1)
            if CUDA:
                peaks[way] = peak_bytes(call)
        except Exception as error:
            failed(way, error)
            continue
        if CUDA and times[way] < LONG:
            with contextlib.suppress(Exception):  # some ways wait for the GPU
                graphs[way] = graph_seconds(call)
    least = max(case.bytes / limits["copy_bytes"], case.operations / limits["bf16_operations"], case.chain)
    of_limit = least / times["fastgen"] if "fastgen" in times else None
    return {
        "case": case.name, "seconds": times, "bytes": case.bytes, "operations": case.operations, "chain": case.chain,
        "least": least, "of_limit": of_limit, "graph_seconds": graphs, "peak_bytes": peaks, **case.facts,
        **sampling(case.facts, times),
    }  # fmt: skip


def line_of(result: dict[str, Any]) -> str:
    ours = result["seconds"].get("fastgen", math.nan)
    rest = ", ".join(f"{way} {times:.1f}x" for way, times in ratios(result).items())
    return f"{result['case']}: {ours * 1e3:.3f} ms, {result['least'] / ours:.0%} of the limit; {rest}".rstrip("; ")


def measure_all(entries: Iterable[Entry], report: dict[str, Any], write: Callable[[], None]) -> None:
    """Into report["cases"] and report["errors"]; nothing that fails keeps the rest from being measured."""

    def note(case: str, way: str, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}".strip()[:500]
        report["errors"].append({"case": case, "way": way, "error": message})
        print(f"{case}{f', {way}' if way else ''} failed: {message}", file=sys.stderr)

    for name, make in entries:
        try:
            for case in make():
                result = measure(case, report["limits"], lambda way, error, of=case.name: note(of, way, error))
                report["cases"].append(result)
                print(line_of(result), flush=True)
                write()
        except Exception as error:
            note(name, "", error)
            write()


def warmed(names: list[str], jobs: int) -> None:
    """What the cases compile is compiled by `jobs` processes at once, whose figures mean nothing, and kept on disk."""
    with tempfile.TemporaryDirectory() as folder:
        shares = ["|".join(f"^{re.escape(name)}$" for name in names[i::jobs]) for i in range(min(jobs, len(names)))]
        command = [sys.executable, __file__, "--warm", "0", "--out", folder, "--only"]
        running = [
            subprocess.Popen([*command, only], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for only in shares
        ]
        for process in running:
            process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="default: bench/results")
    parser.add_argument("--only", default="", help="of the cases those in whose names this regular expression is found")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    parser.add_argument("--warm", type=int, default=8 if CUDA else 0, help="processes that compile first")
    options = parser.parse_args()
    entries = [*listing(options.tiny), *generation_listing(options.tiny)]
    entries = [e for e in entries if re.search(options.only, e[0])]
    if options.warm:
        warmed([name for name, _ in entries], options.warm)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    if not CUDA:
        torch.set_num_threads(1)
    report: dict[str, Any] = machine() | {"limits": measured_limits(options.tiny), "cases": [], "errors": []}
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / (re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-") + ".json")

    def write() -> None:
        report["targets"] = judged(report)
        target.write_text(json.dumps(report, indent=1) + "\n")

    measure_all(entries, report, write)
    write()
    target.with_suffix(".md").write_text(text(report))
    print(f"\n{text(report)}\n{target}")
    if installed("matplotlib"):
        plot_cases(report, target.with_suffix(".png"))
        plot_sampling(report, target.with_suffix(".sampling.png"))
    return 1 if report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
