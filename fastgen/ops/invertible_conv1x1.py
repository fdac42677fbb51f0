"""Invertible 1x1 convolution in LU form, with the actnorm before it folded in.

    W = P L (U + diag(sign * e^d))       L unit lower, U strictly upper triangular, P a permutation of rows
    y = W (x * e^l + t)                  at every pixel
    log_det = number of pixels * (sum of d + sum of l)

Neither a determinant nor, going forward, an inverse is computed; backward in time, two triangular systems of C x C are
solved in float64.

Source: Kingma and Dhariwal, "Glow: Generative Flow with Invertible 1x1 Convolutions" (2018), section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.backend import lib, resolve
from fastgen.checks import (
    check,
    check_tensor,
    differentiates,
    first_order,
    keep_dtype,
    quick_apply,
    refused,
    without_autocast,
)


def lu_weight(lower: Tensor, upper: Tensor, log_diagonal: Tensor, sign: Tensor, permutation: Tensor) -> Tensor:
    """W (C, C); of `lower` and `upper` only what lies strictly below and above the diagonal is used."""
    unit = torch.eye(len(log_diagonal), dtype=lower.dtype, device=lower.device)
    with without_autocast(lower):
        product = (lower.tril(-1) + unit) @ (upper.triu(1) + torch.diag(sign * torch.exp(log_diagonal)))
    return product[permutation]


def lu_inverse(lower: Tensor, upper: Tensor, log_diagonal: Tensor, sign: Tensor, permutation: Tensor) -> Tensor:
    """The inverse of `lu_weight`, by substitution in float64."""
    lower, upper, log_diagonal, sign = (t.double() for t in (lower, upper, log_diagonal, sign))
    rows = torch.eye(len(sign), dtype=lower.dtype, device=lower.device)[:, permutation]  # P^T
    half = torch.linalg.solve_triangular(lower.tril(-1), rows, upper=False, unitriangular=True)
    whole = upper.triu(1) + torch.diag(sign * torch.exp(log_diagonal))
    return torch.linalg.solve_triangular(whole, half, upper=True)  # type: ignore[no-any-return]


def mix_channels_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y[b, o, ...] = bias[o] + sum_c weight[o, c] x[b, c, ...]."""
    kind = torch.promote_types(x.dtype, torch.float32)
    flat = x.to(kind).reshape(*x.shape[:2], x.shape[2:].numel())
    with without_autocast(x):
        return (weight.to(kind) @ flat + bias.to(kind)[:, None]).reshape(x.shape).to(x.dtype)


def invertible_conv1x1_reference(
    x: Tensor, lower: Tensor, upper: Tensor, log_diagonal: Tensor, sign: Tensor, permutation: Tensor,
    log_scale: Tensor | None = None, shift: Tensor | None = None, *, inverse: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    kind = torch.promote_types(x.dtype, torch.float32)
    factors = (*(t.to(kind) for t in (lower, upper, log_diagonal, sign)), permutation)
    log_det = factors[2].sum()
    if log_scale is None or shift is None:
        log_scale = shift = torch.zeros_like(factors[2])
    else:
        log_scale, shift = log_scale.to(kind), shift.to(kind)
        log_det = log_det + log_scale.sum()
    log_det = (x.shape[2:].numel() * log_det).repeat(x.shape[0])
    if inverse:
        weight = (torch.exp(-log_scale.double())[:, None] * lu_inverse(*factors)).to(kind)
        return mix_channels_reference(x, weight, -shift * torch.exp(-log_scale)), -log_det
    with without_autocast(x):
        weight = lu_weight(*factors)
        return mix_channels_reference(x, weight * torch.exp(log_scale), weight @ shift), log_det


lib.define("mix_channels(Tensor x, Tensor weight, Tensor bias) -> Tensor")
lib.define("mix_channels_backward(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)")
PARAMETERS = (
    "Tensor lower, Tensor upper, Tensor log_diagonal, Tensor sign, Tensor permutation, Tensor? log_scale, "
    "Tensor? shift, bool inverse"
)
lib.define(f"invertible_conv1x1(Tensor x, {PARAMETERS}) -> (Tensor, Tensor, Tensor)")
lib.define(
    f"invertible_conv1x1_backward(Tensor grad, Tensor grad_log_det, Tensor x, Tensor weight, {PARAMETERS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("fastgen::mix_channels", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("fastgen::mix_channels_backward", lib=lib)
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), weight.new_empty(x.shape[1])


@torch.library.register_fake("fastgen::invertible_conv1x1", lib=lib)
def _(x: Tensor, lower: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), lower.new_empty(x.shape[0]), torch.empty_like(lower)


@torch.library.register_fake("fastgen::invertible_conv1x1_backward", lib=lib)
def _(
    grad: Tensor, grad_log_det: Tensor, x: Tensor, weight: Tensor, lower: Tensor, upper: Tensor, log_diagonal: Tensor,
    *_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    vectors = (torch.empty_like(log_diagonal) for _ in range(3))
    return torch.empty_like(x), torch.empty_like(lower), torch.empty_like(upper), *vectors


@quick_apply
class _MixChannels(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.fastgen.mix_channels(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.ops.fastgen.mix_channels_backward(grad.contiguous(), *ctx.saved_tensors)  # type: ignore[no-any-return]


@quick_apply
class _InvertibleConv1x1(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *parameters: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.fastgen.invertible_conv1x1(x, *parameters)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, *parameters, ctx.inverse = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(x, output[2], *parameters)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, *matrices, log_diagonal, log_scale, shift = torch.ops.fastgen.invertible_conv1x1_backward(
            grad.contiguous(), grad_log_det.contiguous(), *saved, ctx.inverse
        )
        norm = (log_scale, shift) if saved[-1] is not None else (None, None)
        return x, *matrices, log_diagonal, None, None, *norm, None


def mix_channels(x: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """y[b, o, ...] = bias[o] + sum_c weight[o, c] x[b, c, ...], differentiable.

    x (B, C, *S); weight (C, C) and bias (C,) float32 (float64 for float64). TypeError or ValueError where they are not.
    """
    op = "mix_channels"
    check_tensor(op, "x", x, "(B, C, *S)")
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape (B, C, *S), got {tuple(x.shape)}")
    check(op, "x", x, x, (None,) * x.dim())
    like = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    for name, v, size in (("weight", weight, (x.shape[1],) * 2), ("bias", bias, (x.shape[1],))):
        check(op, name, v, like, size)
    if resolve(op, backend, x.device) == "reference":
        return mix_channels_reference(x, weight, bias)
    args = (x.contiguous(), weight.contiguous(), bias.contiguous())
    if differentiates(*args):
        return _MixChannels.apply(*args)  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.fastgen.mix_channels(*args)  # type: ignore[no-any-return]


def invertible_conv1x1(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    log_scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    inverse: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply the channels of every pixel by an invertible matrix, or by its inverse.

    Parameters
    ----------
    x
        (B, C, *S) float32, bfloat16 or float64; any strides.
    lower, upper
        (C, C), same dtype (under autocast any); of them only what lies strictly below and above the diagonal is used.
    log_diagonal, sign
        (C,): the diagonal of the upper factor is sign * e^log_diagonal; signs are 1 or -1.
    permutation
        (C,) int64: row i of W is row permutation[i] of the product of the factors.
    log_scale, shift
        (C,), both or none: of an actnorm of x that comes first.
    inverse
        Undo all of it, from y and the same parameters.
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
    op = "invertible_conv1x1"
    x, lower, upper, log_diagonal, sign, log_scale, shift = keep_dtype(  # type: ignore[assignment]
        op, x, lower, upper, log_diagonal, sign, log_scale, shift
    )
    if x.dim() < 2 or x.shape[1] < 1:
        raise ValueError(f"{op}: x must have shape (B, C, *S), C >= 1, got {tuple(x.shape)}")
    channels = x.shape[1]
    check(op, "x", x, x, (None,) * x.dim())
    if (log_scale is None) != (shift is None):
        raise ValueError(
            f"{op}: log_scale and shift come together; {'shift' if shift is None else 'log_scale'} is None"
        )
    vectors = {"log_diagonal": log_diagonal, "sign": sign, "log_scale": log_scale, "shift": shift}
    for name, v in {"lower": lower, "upper": upper, **vectors}.items():
        if v is not None:
            check(op, name, v, x, (channels,) if name in vectors else (channels, channels))
    check_tensor(op, "permutation", permutation)
    if permutation.dtype != torch.int64 or permutation.shape != (channels,):
        came = f"{permutation.dtype} {tuple(permutation.shape)}"
        raise ValueError(f"{op}: permutation must be int64 ({channels},), got {came}")
    if permutation.device != x.device:
        raise ValueError(f"{op}: permutation is on {permutation.device}, x is on {x.device}")
    if resolve(op, backend, x.device) == "reference":
        return invertible_conv1x1_reference(
            x, lower, upper, log_diagonal, sign, permutation, log_scale, shift, inverse=inverse
        )
    floats = [t if t is None else t.contiguous() for t in (lower, upper, log_diagonal, sign, log_scale, shift)]
    if x.dtype == torch.bfloat16:
        floats = [t if t is None else t.float() for t in floats]
    args = (x.contiguous(), *floats[:4], permutation.contiguous(), *floats[4:])
    run = _InvertibleConv1x1.apply if differentiates(*args) else torch.ops.fastgen.invertible_conv1x1
    with refused():
        return run(*args, inverse)[:2]  # type: ignore[no-any-return,no-untyped-call]
