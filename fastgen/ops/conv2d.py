"""Two-dimensional convolution that keeps the size of the image, with the ReLU that follows it.

    y[o, i, j] = act(sum over c, di, dj of W[o, c, KH//2 + di, KW//2 + dj] x[c, i + di, j + dj] + b[o])

act is max(., 0) or nothing; x is zero outside the image. What flows' conditioners, encoders and decoders are made of.
The kernel is that of `masked_conv2d` (csrc/cpu/masked_conv2d.cpp), with every tap live: 3x3 takes 16 products in place
of 36 (Winograd's F(2x2, 3x3); Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2016), and 1x1 is a
product of matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import lib, resolve
from fastgen.checks import autocast, check, check_channels, differentiates, first_order, quick_apply


def conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    if x.numel() == 0:
        parts = sum(t.sum() for t in (x, weight, bias) if t is not None)
        return x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:]) + 0 * parts
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    y = F.conv2d(x, weight, bias, padding=padding)
    return F.relu(y) if relu else y


def define_convolution(name: str) -> None:
    """Schemas of a convolution with a ReLU and of its gradients, and the shapes of these."""
    inputs = "Tensor x, Tensor weight"
    lib.define(f"{name}({inputs}, Tensor? bias, bool relu) -> Tensor")
    lib.define(f"{name}_backward(Tensor grad, Tensor? result, {inputs}, bool need_x) -> (Tensor, Tensor, Tensor)")

    @torch.library.register_fake(f"fastgen::{name}_backward", lib=lib)
    def _(grad: Tensor, result: Tensor | None, x: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor, ...]:
        return x.new_empty(x.shape if need_x else 0), x.new_empty(weight.shape), x.new_empty(grad.shape[1])


@quick_apply
class _Convolution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, op: str) -> Tensor:
        return getattr(torch.ops.fastgen, op)(x, weight, bias, relu)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, relu, ctx.op = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, output if relu else None)  # the output, which the next layer saves anyway

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, (x, weight, result) = ctx.needs_input_grad[0], ctx.saved_tensors
        backward = getattr(torch.ops.fastgen, f"{ctx.op}_backward")
        grads = backward(grad.contiguous(), result, x, weight, need_x)
        return grads[0] if need_x else None, grads[1], grads[2] if ctx.has_bias else None, None, None


def check_convolution(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, size: int | None = None, inputs: int = 1
) -> None:
    """Raise on arguments that do not fit; size: of kernels, None for any; inputs: the weight's dimension of them."""
    check(op, "x", x, x, (None, None, None, None))
    check(op, "weight", weight, x, (None, None, size, size))
    check_channels(op, x, weight, of_weight=inputs)
    if min(weight.shape[:2]) < 1:
        raise ValueError(f"{op}: weight needs at least one channel each way, got {tuple(weight.shape)}")
    if bias is not None:
        check(op, "bias", bias, x, (weight.shape[1 - inputs],))
    if not isinstance(relu, bool):
        raise TypeError(f"{op}: relu must be True or False, got {relu!r}")


def convolve(
    op: str,
    reference: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    relu: bool,
    backend: str | None,
) -> Tensor:
    """What was checked, on the backend that runs it."""
    if resolve(op, backend, x.device, x.dtype) == "reference":
        return reference(x, weight, bias, relu=relu)
    args = (x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())
    if differentiates(*args):
        return _Convolution.apply(*args, relu, op)  # type: ignore[no-any-return,no-untyped-call]
    return getattr(torch.ops.fastgen, op)(*args, relu)  # type: ignore[no-any-return]


define_convolution("conv2d")


@torch.library.register_fake("fastgen::conv2d", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolution of an image that keeps its size, and the ReLU behind it.

    Parameters
    ----------
    x
        (B, C, H, W) float32, bfloat16 or float64; any strides. Zeros lie around the image.
    weight
        (O, C, KH, KW), same dtype; KH and KW are odd.
    bias
        (O,).
    relu
        Whether max(., 0) follows.
    backend
        See `fastgen.backend`.

    Returns
    -------
    (B, O, H, W), dtype of x. Sums are float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.
    """
    op = "conv2d"
    x, weight, bias = autocast(op, x, weight, bias)  # type: ignore[assignment]
    check_convolution(op, x, weight, bias, relu)
    if not all(size % 2 for size in weight.shape[2:]):
        raise ValueError(f"{op}: weight needs odd kernel sizes, got {tuple(weight.shape[2:])}")
    return convolve(op, conv2d_reference, x, weight, bias, relu, backend)
