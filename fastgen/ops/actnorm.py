"""Activation normalisation: a scale and a shift for each channel, with its log-det.

    y = x * e^l + t,           log_det = number of pixels * sum of l        (forward)
    x = (y - t) * e^-l,        log_det = -number of pixels * sum of l       (inverse)

Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), section 3.1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import check, differentiates, first_order, keep_dtype, quick_apply


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (C, 1, ...), which broadcasts to x (B, C, *S)."""
    return v.reshape(-1, *(1,) * (x.dim() - 2))


def actnorm_reference(x: Tensor, log_scale: Tensor, shift: Tensor, *, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    kind = torch.promote_types(x.dtype, torch.float32)
    v, factor, t = x.to(kind), per_channel(log_scale.to(kind), x), per_channel(shift.to(kind), x)
    y = (v - t) * torch.exp(-factor) if inverse else v * torch.exp(factor) + t
    log_det = math.prod(x.shape[2:]) * log_scale.to(kind).sum()
    return y.to(x.dtype), (-log_det if inverse else log_det).repeat(x.shape[0])


lib.define("actnorm(Tensor x, Tensor before, Tensor factor, Tensor after) -> Tensor")
lib.define("actnorm_backward(Tensor grad, Tensor kept, Tensor factor) -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake("fastgen::actnorm", lib=lib)
def _(x: Tensor, before: Tensor, factor: Tensor, after: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("fastgen::actnorm_backward", lib=lib)
def _(grad: Tensor, kept: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(grad), torch.empty_like(factor), torch.empty_like(factor)


has_triton_kernels("actnorm", "actnorm_backward")


@quick_apply
class _Actnorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, log_scale: Tensor, shift: Tensor, inverse: bool) -> Tensor:
        return _normalise(x, log_scale, shift, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, log_scale, _, ctx.inverse = inputs
        ctx.save_for_backward(output if ctx.inverse else x, log_scale)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, log_scale = ctx.saved_tensors
        factor = torch.exp(-log_scale if ctx.inverse else log_scale)
        grad_x, sums, products = torch.ops.fastgen.actnorm_backward(grad.contiguous(), kept, factor)
        if ctx.inverse:
            return grad_x, -products, -sums * factor, None
        return grad_x, products * factor, sums, None


def _normalise(x: Tensor, log_scale: Tensor, shift: Tensor, inverse: bool) -> Tensor:
    zero = torch.zeros_like(shift)
    before, after = (-shift, zero) if inverse else (zero, shift)
    return torch.ops.fastgen.actnorm(x, before, torch.exp(-log_scale if inverse else log_scale), after)  # type: ignore[no-any-return]


def actnorm(
    x: Tensor, log_scale: Tensor, shift: Tensor, *, inverse: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and shift every channel, or undo it.

    Parameters
    ----------
    x
        (B, C, *S) float32, bfloat16 or float64; any strides.
    log_scale, shift
        (C,), same dtype (under autocast any).
    inverse
        Undo it, from y and the same parameters.
    backend
        See `fastgen.backend`.

    Returns
    -------
    y (B, C, *S), dtype of x; log_det (B,) float32 (float64 for float64) of the direction that ran.

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.

    Notes
    -----
    Source: Kingma and Dhariwal, "Glow" (2018).
    """
    op = "actnorm"
    x, log_scale, shift = keep_dtype(op, x, log_scale, shift)  # type: ignore[assignment]
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape (B, C, *S), got {tuple(x.shape)}")
    check(op, "x", x, x, (None,) * x.dim())
    for name, v in (("log_scale", log_scale), ("shift", shift)):
        check(op, name, v, x, (x.shape[1],))
    if resolve(op, backend, x.device, x.dtype) == "reference":
        return actnorm_reference(x, log_scale, shift, inverse=inverse)
    kind = torch.promote_types(x.dtype, torch.float32)
    args = (x.contiguous(), log_scale.to(kind).contiguous(), shift.to(kind).contiguous())
    y = _Actnorm.apply(*args, inverse) if differentiates(*args) else _normalise(*args, inverse)  # type: ignore[no-untyped-call]
    log_det = math.prod(x.shape[2:]) * args[1].sum()
    return y, (-log_det if inverse else log_det).repeat(x.shape[0])
