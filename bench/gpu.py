"""The GPU kernels beside eager PyTorch and torch.compile: python bench/gpu.py [--out FOLDER] -> FOLDER/<device>.json.

Peers stand beside them where they are installed. Results and gradients are verified first. `least` is the time that
bytes and operations take at the copy bandwidth and the bfloat16 matrix rate measured in the same run, `of_limit` its
share of ours; `peak_bytes` is what a call takes in memory beyond its arguments. With --tiny the sizes are those of a
rehearsal, which Triton's interpreter can do on a CPU (TRITON_INTERPRET=1 FASTGEN_BACKEND=triton).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from torch import Tensor

from fastgen.backend import use_backend, why_not
from fastgen.models import GatedPixelCNN, WaveNet
from fastgen.ops import (
    actnorm,
    affine_coupling,
    gated_masked_conv2d,
    nearest_code,
    vector_quantize,
    wavenet_layer,
)
from fastgen.ops.actnorm import actnorm_reference
from fastgen.ops.affine_coupling import affine_coupling_reference
from fastgen.ops.gated_masked_conv2d import gated_masked_conv2d_reference
from fastgen.ops.masked_conv2d import mask_2d
from fastgen.ops.wavenet_layer import wavenet_layer_reference

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

    def peak_bytes(self) -> dict[str, int]:
        if not CUDA:
            return {}
        peaks = {}
        for way, call in self.ways.items():
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            result = call()
            torch.cuda.synchronize()
            peaks[way] = torch.cuda.max_memory_allocated() - before
            del result
        return peaks


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


def with_gradients(call: Callable[[], object], leaves: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The call and its backward -> gradients of the leaves, for ones as the gradient of every result."""

    def both() -> tuple[Tensor, ...]:
        results = call()
        tensors = [r for r in (results if isinstance(results, tuple) else (results,)) if r.requires_grad]
        return torch.autograd.grad(tensors, leaves, [torch.ones_like(r) for r in tensors])

    return both


def verify(name: str, ours: object, rough: object, exact: object) -> None:
    """Our error is at most a few times that of PyTorch's own arithmetic in the same dtype."""
    for i, triple in enumerate(zip(*(v if isinstance(v, tuple) else (v,) for v in (ours, rough, exact)), strict=True)):
        got, own, truth = (t.detach().double() for t in triple)
        size = truth.norm() + 1e-30
        errors = float((got - truth).norm() / size), float((own - truth).norm() / size)
        if not errors[0] <= 3 * errors[1] + 1e-5:
            raise SystemExit(f"{name}: result {i} is off by {errors[0]:.1e}, PyTorch's own by {errors[1]:.1e}")


def op_cases(
    name: str, op: Callable[..., object], reference: Callable[..., object], args: list[Tensor | None], options: dict,
    bytes_moved: tuple[float, float], operations: tuple[float, float], peers: dict[str, Callable[..., object]],
) -> list[Case]:  # fmt: skip
    """Forward, and forward with backward, of an op; the peers take the same arguments."""
    compiled = torch.compile(reference)
    ways = {
        "fastgen": lambda *a: op(*a, backend="triton", **options), "eager": lambda *a: reference(*a, **options),
        "torch.compile": lambda *a: compiled(*a, **options), **peers,
    }  # fmt: skip
    wide = [None if t is None else t.float() for t in args]
    verify(name, ways["fastgen"](*args), ways["eager"](*args), ways["eager"](*wide))
    cases = [Case(f"{name} forward", {k: lambda f=f: f(*args) for k, f in ways.items()}, bytes_moved[0], operations[0])]
    given = [None if t is None else t.detach().requires_grad_() for t in args]
    leaves = [t for t in given if t is not None]
    both = {k: with_gradients(lambda f=f: f(*given), leaves) for k, f in ways.items()}
    wide = [None if t is None else t.float().requires_grad_() for t in args]
    exact = with_gradients(lambda: ways["eager"](*wide), [t for t in wide if t is not None])
    verify(f"{name}, gradients", both["fastgen"](), both["eager"](), exact())
    return [*cases, Case(f"{name} forward and backward", both, bytes_moved[1], operations[1])]


def normal(*size: int, scale: float = 1.0, dtype: torch.dtype) -> Tensor:
    return (torch.randn(size, device=DEVICE) * scale).to(dtype)


def coupling_peer(scale: str) -> dict[str, Callable[..., object]]:
    if scale != "exp" or importlib.util.find_spec("normflows") is None:
        return {}
    import normflows

    class Given(torch.nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return self.params  # type: ignore[no-any-return]

    given = Given()
    block = normflows.flows.AffineCouplingBlock(given, split_mode="channel")

    def run(x: Tensor, params: Tensor) -> object:
        given.params = params
        return block(x)

    return {"normflows": run}


def coupling_cases(tiny: bool) -> list[Case]:
    size = (2, 4, 8, 8) if tiny else (64, 128, 128, 128)  # 256 MiB in bfloat16
    dtype = torch.float32 if tiny else torch.bfloat16
    bytes_of_x = math.prod(size) * dtype.itemsize
    cases = []
    for scale in ("exp", "tanh"):
        x, params = normal(*size, dtype=dtype), normal(*size, scale=0.3, dtype=dtype)
        # forward: x and params in, y out; backward: gradient, half of x and params in, two gradients out
        cases += op_cases(
            f"affine_coupling {scale} {size}", affine_coupling, affine_coupling_reference, [x, params],
            {"scale": scale}, (3 * bytes_of_x, 7.5 * bytes_of_x), (0, 0), coupling_peer(scale),
        )  # fmt: skip
    args = [normal(*size, dtype=dtype), *(normal(size[1], dtype=dtype) for _ in range(2))]
    cases += op_cases(
        f"actnorm {size}", actnorm, actnorm_reference, args, {}, (2 * bytes_of_x, 5 * bytes_of_x), (0, 0), {}
    )  # fmt: skip
    return cases


def convolution_cases(tiny: bool) -> list[Case]:
    dtype = torch.float32 if tiny else torch.bfloat16
    batch, channels, side, kernel = (1, 4, 5, 3) if tiny else (64, 128, 32, 5)
    taps = int(mask_2d("B", (kernel, kernel)).sum())
    args: list[Tensor | None] = [
        normal(batch, channels, side, side, dtype=dtype),
        normal(2 * channels, channels, kernel, kernel, scale=(channels * taps) ** -0.5, dtype=dtype),
        normal(2 * channels, dtype=dtype), normal(batch, 2 * channels, 1, 1, dtype=dtype),
    ]  # fmt: skip
    of_x, pixels = args[0].numel() * dtype.itemsize, batch * side * side
    products = 2.0 * pixels * 2 * channels * channels * taps
    cases = op_cases(
        f"gated_masked_conv2d B{batch} C{channels} {side}x{side} k{kernel}", gated_masked_conv2d,
        gated_masked_conv2d_reference, args, {"mask": "B"}, (2 * of_x, 5 * of_x), (products, 3 * products), {},
    )  # fmt: skip
    sizes = [(1, 40, 4, 3, 2)] if tiny else [(16, 16384, 128, 256, 2), (16, 16384, 64, 128, 2)]
    for batch, steps, width, skips, kernel in sizes:
        args = [
            normal(batch, width, steps, dtype=dtype),
            normal(2 * width, width, kernel, scale=(width * kernel) ** -0.5, dtype=dtype),
            normal(2 * width, dtype=dtype), normal(width + skips, width, scale=width**-0.5, dtype=dtype),
            normal(width + skips, dtype=dtype), None,
        ]  # fmt: skip
        one = batch * steps * dtype.itemsize
        gate, outs = (2.0 * batch * steps * n for n in (2 * width * width * kernel, (width + skips) * width))
        cases += op_cases(
            f"wavenet_layer B{batch} T{steps} R{width} S{skips} K{kernel}", wavenet_layer, wavenet_layer_reference,
            args, {"dilation": 16}, (one * (2 * width + skips), one * (5 * width + 2 * skips)),
            (gate + outs, 4 * gate + 3 * outs), {},
        )  # fmt: skip
    return cases


def generation_cases(tiny: bool) -> list[Case]:
    """Samples of 20 layers 64/128/256, 30 layers 128/256/256 and kernel 3, for 1 to 1024 streams; nothing beside."""
    if why_not("wavenet_generate", "cuda") is not None:
        return []
    cases = []
    for layers, width, skip, kernel in ((20, 64, 128, 2), (30, 128, 256, 2), (20, 64, 128, 3)):
        model = WaveNet(layers, layers // 10, residual_channels=width, skip_channels=skip, kernel_size=kernel).to(
            DEVICE
        )
        operations = 2.0 * layers * width * (2 * width * kernel + width + skip) + 2.0 * skip * (skip + 256)
        for streams in (1, 16, 128, 1024):
            for dtype in (torch.bfloat16, torch.float32):
                steps = 1000
                options = {"batch_size": streams, "uniforms": torch.rand(streams, steps, device=DEVICE), "dtype": dtype}
                name = f"wavenet_generate L{layers} R{width} S{skip} K{kernel} B{streams} {dtype}, {steps} steps"
                ways = {"fastgen": lambda m=model, o=options: m.generate(1000, backend="cuda", **o)}
                cases.append(Case(name, ways, operations=operations * streams * steps))
    model = GatedPixelCNN(channels=128, layers=10).to(DEVICE)
    for images in (1, 16, 256):
        uniforms = torch.rand(images, 1, 28, 28, device=DEVICE)
        drawn = model.sample(images, (28, 28), uniforms=uniforms, backend="cuda")
        for dtype in (torch.bfloat16, torch.float32):
            ways = {
                "fastgen": lambda d=dtype, u=uniforms: model.sample(
                    len(u), (28, 28), uniforms=u, dtype=d, backend="cuda"
                ),
                "eager forward pass": lambda x=drawn: forward_pass(model, x),
            }
            cases.append(Case(f"pixelcnn_generate 10 x 128, 28x28, {images} images {dtype}", ways))
    return cases


@torch.no_grad()
def forward_pass(model: GatedPixelCNN, x: Tensor) -> object:
    with use_backend("reference"):
        return model(x)


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
            "fastgen, bf16": lambda x=x, c=codebook: nearest_code(
                x, c, backend="triton", nonfinite="first", precision="bf16"
            ),
        }
        cases.append(Case(f"nearest_code N{rows} K{codes} D{dim}", ways, operations=2.0 * rows * codes * dim))
        quantize = {
            "fastgen": lambda x=x, c=codebook: vector_quantize(x, c, backend="triton", nonfinite="first"),
            "eager": lambda x=x, c=codebook: vector_quantize(x, c, backend="reference", nonfinite="first"),
        }
        ours, theirs = quantize["fastgen"](), quantize["eager"]()
        assert torch.equal(ours[0], codebook[ours[1]])
        torch.testing.assert_close(ours[2], theirs[2], rtol=1e-3, atol=1e-5)
        cases.append(Case(f"vector_quantize N{rows} K{codes} D{dim}", quantize, operations=2.0 * rows * codes * dim))
    return cases


def plot(report: dict, path: Path) -> None:
    """How much longer the others take, case by case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = report["cases"][::-1]
    figure, axes = plt.subplots(figsize=(10, 1 + 0.45 * len(cases)), layout="constrained")
    for i, way in enumerate(("eager", "torch.compile")):
        ratios = [case["seconds"].get(way, math.nan) / case["seconds"]["fastgen"] for case in cases]
        axes.barh([n + 0.18 - 0.36 * i for n in range(len(cases))], ratios, 0.34, label=way)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), [f"{case['case']}\n{case['of_limit']:.0%} of the limit" for case in cases])
    axes.set(xscale="log", xlabel="time, in times of fastgen's", title=report["device"])
    axes.legend()
    figure.savefig(path, dpi=120)


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
    for make in (search_cases, convolution_cases, coupling_cases, generation_cases):
        for case in make(options.tiny):
            case.results = {way: seconds(call) for way, call in case.ways.items()}
            ours = case.results["fastgen"]
            least = max(case.bytes / limits["copy_bytes"], case.operations / limits["bf16_operations"])
            report["cases"].append({
                "case": case.name, "seconds": case.results, "bytes": case.bytes, "operations": case.operations,
                "least": least, "of_limit": least / ours, "peak_bytes": case.peak_bytes(),
            })  # fmt: skip
            rest = ", ".join(f"{way} {t / ours:.1f}x" for way, t in case.results.items() if way != "fastgen")
            print(f"{case.name}: {ours * 1e3:.3f} ms, {least / ours:.0%} of the limit; {rest}")
            target.write_text(json.dumps(report, indent=1) + "\n")  # what is measured is kept
    print(target)
    if importlib.util.find_spec("matplotlib") is not None:
        plot(report, target.with_suffix(".png"))


if __name__ == "__main__":
    main()
