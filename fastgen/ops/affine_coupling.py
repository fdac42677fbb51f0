"""Affine coupling: a part of x is scaled and shifted by what a network made of the rest; invertible, with its log-det.

    y_a = x_a * e^l + t,   y_p = x_p,   log_det = sum of l over a sample        (forward)
    x_a = (y_a - t) * e^-l,             log_det = -sum of l                     (inverse)

    scale       l from the unconstrained scale s
    "exp"       s
    "tanh"      bound * tanh(s / bound)
    "sigmoid"   log sigmoid(s + 2)
    "none"      0: additive coupling, params hold the shift alone

The transformed part a is the last Da channels (with `swap` the first), or where `mask` is false.

Sources: Dinh et al., "NICE" (2014) and "Density estimation using Real NVP" (2017); Kingma and Dhariwal, "Glow" (2018).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import check, check_positive, check_tensor, differentiates, first_order, keep_dtype, quick_apply

SCALES = ("exp", "tanh", "sigmoid", "none")
LAYOUTS = ("scale_shift", "shift_scale", "interleaved")


def log_scale_of(s: Tensor, scale: str, bound: float) -> Tensor:
    """l from the unconstrained scale."""
    if scale == "tanh":
        return bound * torch.tanh(s / bound)
    return F.logsigmoid(s + 2) if scale == "sigmoid" else s


def split_params(params: Tensor, scale: str, layout: str) -> tuple[Tensor | None, Tensor]:
    """-> (unconstrained scale, shift)."""
    if scale == "none":
        return None, params
    if layout == "interleaved":
        return params[:, 1::2], params[:, ::2]
    first, second = params.chunk(2, 1)
    return (first, second) if layout == "scale_shift" else (second, first)


def affine_coupling_reference(
    x: Tensor,
    params: Tensor,
    *,
    scale: str,
    mask: Tensor | None = None,
    inverse: bool = False,
    bound: float = 1.0,
    layout: str = "scale_shift",
    swap: bool = False,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    kind = torch.promote_types(x.dtype, torch.float32)
    s, shift = split_params(params.to(kind), scale, layout)
    log_scale = torch.zeros_like(shift) if s is None else log_scale_of(s, scale, bound)
    if mask is not None:  # chosen, not multiplied: what is behind the mask stays out, NaN included
        log_scale, shift = torch.where(mask, 0, log_scale), torch.where(mask, 0, shift)
    active, passive = shift.shape[1], x.shape[1] - shift.shape[1]
    v = x.narrow(1, 0 if swap else passive, active).to(kind)
    y = (v - shift) * torch.exp(-log_scale) if inverse else v * torch.exp(log_scale) + shift
    if mask is not None:
        y = torch.where(mask, v, y)
    if passive:
        rest = x.narrow(1, active if swap else 0, passive).to(kind)
        y = torch.cat([y, rest] if swap else [rest, y], 1)
    log_det = log_scale.flatten(1).sum(1)
    return y.to(x.dtype), -log_det if inverse else log_det


lib.define(
    "affine_coupling(Tensor x, Tensor params, Tensor? mask, int scale, float bound, int layout, bool swap, "
    "bool inverse) -> (Tensor, Tensor)"
)
lib.define(
    "affine_coupling_backward(Tensor grad, Tensor grad_log_det, Tensor kept, Tensor params, Tensor? mask, int scale, "
    "float bound, int layout, bool swap, bool inverse) -> (Tensor, Tensor)"
)


@torch.library.register_fake("fastgen::affine_coupling", lib=lib)
def _(x: Tensor, params: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.promote_types(x.dtype, torch.float32))


@torch.library.register_fake("fastgen::affine_coupling_backward", lib=lib)
def _(grad: Tensor, grad_log_det: Tensor, kept: Tensor, params: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(kept), torch.empty_like(params)


has_triton_kernels("affine_coupling", "affine_coupling_backward")


@quick_apply
class _AffineCoupling(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, params: Tensor, mask: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.fastgen.affine_coupling(x, params, mask, *options)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, params, mask, *ctx.options = inputs
        ctx.save_for_backward(output[0] if ctx.options[-1] else x, params, mask)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, grad_log_det: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.fastgen.affine_coupling_backward(
            grad.contiguous(), grad_log_det.contiguous(), *ctx.saved_tensors, *ctx.options
        )
        return *grads, None, None, None, None, None, None


def affine_coupling(
    x: Tensor,
    params: Tensor,
    *,
    scale: str,
    mask: Tensor | None = None,
    inverse: bool = False,
    bound: float = 1.0,
    layout: str = "scale_shift",
    swap: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and shift a part of x, or undo it, and sum the log-determinant, in one pass.

    Parameters
    ----------
    x
        (B, D, *S) float32, bfloat16 or float64; any strides.
    params
        (B, 2 * Da, *S), same dtype (under autocast any): unconstrained scale and shift of the last Da channels; the
        others pass through. With `mask` Da is D. With scale="none" (B, Da, *S), the shift.
    scale
        "exp", "tanh" (log-scales within +-bound), "sigmoid" (scales below 1), or "none": see the head of this module.
        "exp" is not bounded: where e^s overflows, the result is infinite.
    mask
        Broadcasts to x; true (1) where x passes through. Parameters there are never used and have gradient zero.
    inverse
        Undo it, from y and the same parameters.
    bound
        Of the log-scales with scale="tanh", > 0.
    layout
        Of params along the channels: "scale_shift", "shift_scale", or "interleaved" (shift, scale, shift, scale, ...).
    swap
        The first Da channels are transformed, not the last.
    backend
        See `fastgen.backend`.

    Returns
    -------
    y (B, D, *S), dtype of x; log_det (B,) float32 (float64 for float64) of the direction that ran, the same bits in a
    batch of any size.

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.

    Notes
    -----
    Source: Dinh, Sohl-Dickstein and Bengio, "Density estimation using Real NVP" (2017).
    """
    op = "affine_coupling"
    x, params = keep_dtype(op, x, params)  # type: ignore[assignment]
    size = x.shape
    if len(size) < 2:
        raise ValueError(f"{op}: x must have shape (B, D, *S), got {tuple(size)}")
    if scale not in SCALES:
        raise ValueError(f"{op}: scale must be one of {SCALES}, got {scale!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout must be one of {LAYOUTS}, got {layout!r}")
    check_positive(op, "bound", bound)
    check(op, "x", x, x, size)
    check(op, "params", params, x, (size[0], None, *size[2:]))
    width, parts = params.shape[1], 1 if scale == "none" else 2
    if mask is not None:
        if swap:
            raise ValueError(f"{op}: swap is for halves; with mask it must be False")
        mask = _broadcast_mask(op, mask, x)
    if width % parts or width > parts * x.shape[1] or (mask is not None and width != parts * x.shape[1]):
        count = f"{parts} * " if parts > 1 else ""
        wanted = f"{count}{x.shape[1]} channels with mask" if mask is not None else f"{count}Da, Da <= {x.shape[1]}"
        raise ValueError(f"{op}: params must have {wanted}, got {width}")
    if resolve(op, backend, x.device, x.dtype) == "reference":
        return affine_coupling_reference(
            x, params, scale=scale, mask=mask, inverse=inverse, bound=bound, layout=layout, swap=swap
        )
    args = (x.contiguous(), params.contiguous(), None if mask is None else mask.contiguous())
    options = (SCALES.index(scale), float(bound), LAYOUTS.index(layout), swap, inverse)
    if differentiates(*args[:2]):
        return _AffineCoupling.apply(*args, *options)  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.fastgen.affine_coupling(*args, *options)  # type: ignore[no-any-return]


def _broadcast_mask(op: str, mask: Tensor, x: Tensor) -> Tensor:
    """-> bool, (B or 1, D, *S)."""
    check_tensor(op, "mask", mask)
    if mask.device != x.device:
        raise ValueError(f"{op}: mask is on {mask.device}, x is on {x.device}")
    batch = mask.shape[0] if mask.dim() == x.dim() else 1
    try:
        return mask.bool().expand(batch if batch == x.shape[0] else 1, *x.shape[1:])
    except RuntimeError:
        raise ValueError(f"{op}: mask must broadcast to x, {tuple(x.shape)}, got {tuple(mask.shape)}") from None
