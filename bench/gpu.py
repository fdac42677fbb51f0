"""The GPU kernels beside eager PyTorch and torch.compile: python bench/gpu.py [--out FOLDER] -> FOLDER/<device>.json.

Couplings, actnorm and the first rows of searches are verified first. `of_limit` is the share of the least time that the
hardware could take, from the copy bandwidth and the bfloat16 matrix rate measured in the same run. With --tiny the
sizes are those of a rehearsal, which Triton's interpreter can do on a CPU (TRITON_INTERPRET=1 FASTGEN_BACKEND=triton).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from torch import Tensor

from fastgen.ops import actnorm, affine_coupling, nearest_code, vector_quantize
from fastgen.ops.actnorm import actnorm_reference
from fastgen.ops.affine_coupling import affine_coupling_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@dataclass
class Case:
    """What is timed, and the least that the hardware must do for it."""

    name: str
    ways: dict[str, Callable[[], object]]
    bytes: float = 0
    operations: float = 0
    results: dict[str, float] = field(default_factory=dict)


def seconds(call: Callable[[], object]) -> float:
    """The median, with caches cleared before each call on a GPU."""
    if CUDA:
        return float(triton.testing.do_bench(call, warmup=50, rep=200, return_mode="median")) / 1e3
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured_limits(tiny: bool) -> dict[str, float]:
    n, side = (1 << 16, 256) if tiny else (1 << 28, 8192)
    a, b = torch.empty(n, device=DEVICE), torch.zeros(n, device=DEVICE)
    copy = 8 * n / seconds(lambda: a.copy_(b))
    m = torch.randn(side, side, device=DEVICE, dtype=torch.bfloat16)
    return {"copy_bytes": copy, "bf16_operations": 2 * side**3 / seconds(lambda: m @ m)}


def with_gradients(call: Callable[[], tuple[Tensor, Tensor]], leaves: list[Tensor]) -> Callable[[], object]:
    first, _ = call()
    cotangent = torch.randn_like(first)
    return lambda: torch.autograd.grad(call()[0], leaves, cotangent)


def coupling_cases(tiny: bool) -> list[Case]:
    size = (2, 4, 8, 8) if tiny else (64, 128, 128, 128)  # 256 MiB in bfloat16
    dtype = torch.float32 if tiny else torch.bfloat16
    cases = []
    for scale in ("exp", "tanh"):
        x, params = torch.randn(size, device=DEVICE, dtype=dtype), torch.randn(size, device=DEVICE, dtype=dtype) * 0.3
        compiled = torch.compile(affine_coupling_reference)
        ours, theirs = affine_coupling(x, params, scale=scale), affine_coupling_reference(x, params, scale=scale)
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-2)
        bytes_of_x = x.numel() * x.element_size()
        for leaves in ([], [x.detach().requires_grad_(), params.detach().requires_grad_()]):
            a, b = leaves or (x, params)
            ways = {
                "fastgen": lambda a=a, b=b, s=scale: affine_coupling(a, b, scale=s, backend="triton"),
                "eager": lambda a=a, b=b, s=scale: affine_coupling_reference(a, b, scale=s),
                "torch.compile": lambda a=a, b=b, s=scale, c=compiled: c(a, b, scale=s),
            }
            if leaves:
                ways = {name: with_gradients(way, leaves) for name, way in ways.items()}
            # forward: x and params in, y out; backward: gradient, half of x and params in, two gradients out
            moved = (3 + 4.5 * bool(leaves)) * bytes_of_x
            what = "forward and backward" if leaves else "forward"
            cases.append(Case(f"affine_coupling {scale} {what} {size}", ways, bytes=moved))
    v = torch.randn(size[1], device=DEVICE, dtype=dtype)
    torch.testing.assert_close(actnorm(x, v, v)[0], actnorm_reference(x, v, v)[0])
    compiled_norm = torch.compile(actnorm_reference)
    ways = {
        "fastgen": lambda: actnorm(x, v, v, backend="triton"), "eager": lambda: actnorm_reference(x, v, v),
        "torch.compile": lambda: compiled_norm(x, v, v),
    }  # fmt: skip
    return [*cases, Case(f"actnorm forward {size}", ways, bytes=2 * bytes_of_x)]


def expanded(x: Tensor, codebook: Tensor) -> Tensor:
    return (x.square().sum(1, keepdim=True) - 2 * x @ codebook.T + codebook.square().sum(1)).argmin(1)


def search_cases(tiny: bool) -> list[Case]:
    sizes = [(40, 30, 16)] if tiny else [(65536, 8192, 256), (65536, 1024, 64), (8192, 1024, 128)]
    cases = []
    for rows, codes, dim in sizes:
        x, codebook = torch.randn(rows, dim, device=DEVICE), torch.randn(codes, dim, device=DEVICE)
        if not tiny:
            x, codebook = x.bfloat16(), codebook.bfloat16()
        index, _ = nearest_code(x, codebook, backend="triton", nonfinite="first")
        exact = torch.cdist(x[:256].double(), codebook.double()).square()
        assert bool((exact.gather(1, index[:256, None])[:, 0] <= exact.min(1).values * (1 + 1e-5)).all())
        compiled = torch.compile(expanded)
        ways = {
            "fastgen": lambda x=x, c=codebook: nearest_code(x, c, backend="triton", nonfinite="first"),
            "eager": lambda x=x, c=codebook: expanded(x, c),
            "torch.compile": lambda x=x, c=codebook, f=compiled: f(x, c),
        }
        cases.append(Case(f"nearest_code N{rows} K{codes} D{dim}", ways, operations=2.0 * rows * codes * dim))
        quantize = {"fastgen": lambda x=x, c=codebook: vector_quantize(x, c, backend="triton", nonfinite="first")}
        cases.append(Case(f"vector_quantize N{rows} K{codes} D{dim}", quantize, operations=2.0 * rows * codes * dim))
    return cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="default: bench/results")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    options = parser.parse_args()
    torch.manual_seed(0)
    limits = measured_limits(options.tiny)
    name = torch.cuda.get_device_name() if CUDA else "rehearsal"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    report = {
        "device": name, "torch": torch.__version__, "triton": triton.__version__, "commit": commit.stdout.strip(),
        "limits": limits, "cases": [],
    }  # fmt: skip
    print(f"{name}: copy {limits['copy_bytes'] / 1e9:.0f} GB/s, bf16 {limits['bf16_operations'] / 1e12:.1f} TFLOP/s")
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    for make in (search_cases, coupling_cases):
        for case in make(options.tiny):
            case.results = {way: seconds(call) for way, call in case.ways.items()}
            ours = case.results["fastgen"]
            least = max(case.bytes / limits["copy_bytes"], case.operations / limits["bf16_operations"])
            report["cases"].append(
                {"case": case.name, "seconds": case.results, "least": least, "of_limit": least / ours}
            )
            rest = ", ".join(f"{way} {t / ours:.1f}x" for way, t in case.results.items() if way != "fastgen")
            print(f"{case.name}: {ours * 1e3:.3f} ms, {least / ours:.0%} of the limit; {rest}")
            target.write_text(json.dumps(report, indent=1) + "\n")  # what is measured is kept
    print(target)


if __name__ == "__main__":
    main()
