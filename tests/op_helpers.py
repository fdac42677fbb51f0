"""How tests of ops hold a kernel's results and gradients against the float64 reference."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.backend import HAS_BFLOAT16, INTERPRETED, ON_X86

DEVICE = os.environ.get("FASTGEN_TEST_DEVICE", "cpu")
KERNELS = "triton" if DEVICE == "cuda" or INTERPRETED else "cpu"  # the backend that is tested
if "FASTGEN_TEST_PTX" in os.environ:  # tensors on the CPU, where float16 is not taken
    DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
elif INTERPRETED:  # which computes nothing else rightly
    DTYPES = (torch.float32,)
elif DEVICE == "cuda":
    DTYPES = (torch.float32, torch.bfloat16, torch.float16)
else:
    DTYPES = (torch.float32, torch.bfloat16, torch.float64)
STANDS_IN = "cpu" if ON_X86 else "reference"  # what layers run that stand in for PyTorch's
WIDENED = "reference" if HAS_BFLOAT16 else STANDS_IN  # in bfloat16, where fastgen has no products of its own
EXACT = torch.float64 if KERNELS == "cpu" else torch.float32  # the most precise that the kernels take
EXAMPLES = 60 if KERNELS == "cpu" else 6  # of hypothesis: new shapes are new kernels to compile
# what may come on top of a multiple of the reference's own error, which in a small sum can be near zero by chance
FLOOR = {torch.float64: 3e-15, torch.float32: 1.5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
INF = torch.tensor(torch.inf, dtype=torch.float64)
Arguments = dict[str, Tensor | None]


def cpu_only(reason: str) -> pytest.MarkDecorator:
    """A test that means something with the C++ kernels alone."""
    return pytest.mark.skipif(KERNELS != "cpu", reason=f"with C++ kernels only: {reason}")


def run(
    op: Callable[..., Any],
    args: Arguments,
    dtype: torch.dtype,
    which: str,
    rounded: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, Tensor]:
    """Outputs and gradients of every argument, for random cotangents rounded to `rounded`."""
    leaves = {k: v.to(DEVICE, dtype).detach().requires_grad_() for k, v in args.items() if v is not None}
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    out = op(**{k: leaves.get(k) for k in args}, backend=which, **options)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(o.shape, generator=generator, device="cpu").to(rounded).to(o) for o in out]
    pairs = [(o, c) for o, c in zip(out, cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [c for _, c in pairs])
    names = [f"out[{i}]" for i in range(len(out))] + [f"grad {k}" for k in leaves]
    return dict(zip(names, [*out, *grads], strict=True))


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double().to(exact.device) - exact).detach().norm() / (exact.detach().norm() + 1e-300))


def compare(op: Callable[..., Any], args: Arguments, dtype: torch.dtype, **options: Any) -> None:
    """The kernel's error is at most a small multiple of the reference's own error in the same dtype.

    There is no better answer than float64's, so there the own error is what the last bit of the arguments makes: where
    terms cancel that is more than an ulp of the result. Bits of one direction may cancel as the terms do, those of
    random ones seldom do three times.
    """
    args = {k: v if v is None else v.to(dtype).double() for k, v in args.items()}
    exact = run(op, args, torch.float64, "reference", dtype, **options)
    roughs = [run(op, args, dtype, "reference", dtype, **options)]
    if dtype == torch.float64:
        given = {k: v for k, v in args.items() if v is not None}
        nudged = [{k: v.nextafter(2 * v)} for k, v in given.items()]
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            up = {k: torch.rand(v.shape, generator=generator) < 0.5 for k, v in given.items()}
            nudged.append({k: torch.where(up[k], v.nextafter(INF), v.nextafter(-INF)) for k, v in given.items()})
        roughs += [run(op, args | moved, dtype, "reference", dtype, **options) for moved in nudged]
    result = run(op, args, dtype, KERNELS, dtype, **options)
    for name, value in result.items():
        assert value.dtype == roughs[0][name].dtype
        assert torch.isfinite(value).all(), f"{name} holds NaN or infinity"
        got, own = error(value, exact[name]), max(error(rough[name], exact[name]) for rough in roughs)
        assert got <= 3 * own + FLOOR[dtype], f"{name}: error {got:.2e}, the reference's own is {own:.2e}"
