"""Dilated causal convolution with a gate: the heart of a WaveNet layer.

    a_t = sum_k W_k x_{t - (K-1-k) d} + b + c_t        (2H)     x is zero before its first sample
    z_t = tanh(a_t[:H]) * sigmoid(a_t[H:])             (H)

Source: van den Oord et al., "WaveNet: A Generative Model for Raw Audio" (2016), equations 2 and 5.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import autocast, check, check_channels, check_integer, differentiates, first_order, quick_apply

MOST_DILATION = 2**31 - 1  # (K - 1) * dilation stays far within 64 bits


def gated_causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, cond: Tensor | None = None, *, dilation: int = 1
) -> Tensor:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    if x.shape[2] == 0:
        return x.new_zeros(x.shape[0], weight.shape[0] // 2, 0) + 0 * (x.sum() + weight.sum())
    dilation = min(dilation, x.shape[2])  # taps farther back see nothing but zeros
    a = F.conv1d(F.pad(x, ((weight.shape[2] - 1) * dilation, 0)), weight, bias, dilation=dilation)  # (B, 2H, T)
    if cond is not None:
        a = a + cond
    tanh, sigmoid = a.chunk(2, 1)
    return torch.tanh(tanh) * torch.sigmoid(sigmoid)


lib.define("gated_causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? cond, int dilation) -> Tensor")
lib.define(
    "gated_causal_conv1d_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? cond, int dilation) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("fastgen::gated_causal_conv1d", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] // 2, x.shape[2])


@torch.library.register_fake("fastgen::gated_causal_conv1d_backward", lib=lib)
def _(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int
) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), x.new_empty(weight.shape), x.new_empty(weight.shape[0]), empty_cond_grad(x, cond)


def empty_cond_grad(x: Tensor, cond: Tensor | None) -> Tensor:
    """What a backward kernel returns for `cond`: its gradient, or nothing (0 elements)."""
    return x.new_empty(0 if cond is None else cond.shape)


has_triton_kernels("gated_causal_conv1d", "gated_causal_conv1d_backward")


@quick_apply
class _GatedCausalConv1d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int) -> Tensor:
        return torch.ops.fastgen.gated_causal_conv1d(x, weight, bias, cond, dilation)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.dilation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, cond = ctx.saved_tensors
        grads = torch.ops.fastgen.gated_causal_conv1d_backward(
            grad.contiguous(), x, weight, bias, cond, ctx.dilation
        )  # fmt: skip
        return grads[0], grads[1], None if bias is None else grads[2], None if cond is None else grads[3], None


def check_gate(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, dilation: int) -> None:
    """Raise on arguments that do not fit together, naming the argument, what was expected and what came."""
    check(op, "x", x, x, (None, None, None))
    check(op, "weight", weight, x, (None, None, None))
    check_channels(op, x, weight)
    rows = weight.shape[0]
    if rows % 2 or rows == 0:
        raise ValueError(f"{op}: weight needs an even number of rows (tanh half, sigmoid half), got {rows}")
    if weight.shape[2] < 1:
        raise ValueError(f"{op}: weight needs a kernel size >= 1, got 0")
    if bias is not None:
        check(op, "bias", bias, x, (rows,))
    if cond is not None:
        steps = cond.shape[2] if cond.dim() == 3 and cond.shape[2] == 1 else x.shape[2]
        check(op, "cond", cond, x, (x.shape[0], rows, steps))
    check_integer(op, "dilation", dilation)
    if dilation > MOST_DILATION:
        raise ValueError(f"{op}: dilation must be < 2**31, got {dilation}")


def gated_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cond: Tensor | None = None,
    *,
    dilation: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Dilated causal convolution, tanh times sigmoid.

    Parameters
    ----------
    x
        (B, C, T) float32, bfloat16 or float64; any strides.
    weight
        (2H, C, K), same dtype: the first H rows feed tanh, the last H the sigmoid; the last tap is the current sample.
    bias
        (2H,).
    cond
        (B, 2H, T), or (B, 2H, 1) for conditioning that is constant in time; added inside the gate.
    dilation
        Distance between taps, in [1, 2**31).
    backend
        See `fastgen.backend`.

    Returns
    -------
    (B, H, T), dtype of x. Sums are float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.

    Notes
    -----
    Source: van den Oord et al., "WaveNet" (2016).
    """
    op = "gated_causal_conv1d"
    x, weight, bias, cond = autocast(op, x, weight, bias, cond)  # type: ignore[assignment]
    check_gate(op, x, weight, bias, cond, dilation)
    if resolve(op, backend, x.device, x.dtype) == "reference":
        return gated_causal_conv1d_reference(x, weight, bias, cond, dilation=dilation)
    args = (x.contiguous(), weight.contiguous(), *(None if t is None else t.contiguous() for t in (bias, cond)))
    if differentiates(*args):
        return _GatedCausalConv1d.apply(*args, dilation)  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.fastgen.gated_causal_conv1d(*args, dilation)  # type: ignore[no-any-return]
