"""A linear layer: y = x Wᵀ + b, and its gradients.

PyTorch's products of matrices reach half of what some processors can do; these reach most of it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import lib, resolve
from fastgen.checks import autocast, check, check_channels, differentiates, first_order, quick_apply


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    return F.linear(x, weight, bias)


lib.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
lib.define("linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_x) -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake("fastgen::linear", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("fastgen::linear_backward", lib=lib)
def _(grad: Tensor, x: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape if need_x else 0), x.new_empty(weight.shape), x.new_empty(weight.shape[0])


@quick_apply
class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.fastgen.linear(x, weight, bias)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, (x, weight) = ctx.needs_input_grad[0], ctx.saved_tensors
        grads = torch.ops.fastgen.linear_backward(grad.contiguous(), x, weight, need_x)
        return grads[0] if need_x else None, grads[1], grads[2] if ctx.has_bias else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = x Wᵀ + b.

    Parameters
    ----------
    x
        (..., C) float32, bfloat16 or float64; any strides.
    weight
        (O, C), same dtype.
    bias
        (O,).
    backend
        See `fastgen.backend`.

    Returns
    -------
    (..., O), dtype of x. Sums are float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.
    """
    op = "linear"
    x, weight, bias = autocast(op, x, weight, bias)  # type: ignore[assignment]
    if x.dim() < 1:
        raise ValueError(f"{op}: x must be (..., C), got {tuple(x.shape)}")
    check(op, "x", x, x, (None,) * x.dim())
    check(op, "weight", weight, x, (None, None))
    check_channels(op, x, weight, of_x=-1)
    if bias is not None:
        check(op, "bias", bias, x, (weight.shape[0],))
    if resolve(op, backend, x.device, x.dtype) == "reference" or x.numel() == 0 or weight.numel() == 0:
        return linear_reference(x, weight, bias)
    kind = torch.promote_types(x.dtype, torch.float32)
    args = tuple(
        None if t is None else t.to(kind).contiguous() for t in (x.reshape(-1, x.shape[-1]), weight, bias)
    )  # fmt: skip
    call = _Linear.apply if differentiates(*args) else torch.ops.fastgen.linear
    y = call(*args)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)  # type: ignore[no-any-return]
