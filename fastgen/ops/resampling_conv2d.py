"""Convolutions of 4x4 that halve an image's sides (stride 2), and their transposes that double them; and the ReLU.

    down: y[o, i, j] = act(sum over c, p, q of W[o, c, p, q] x[c, 2 i + p - 1, 2 j + q - 1] + b[o])
    up:   y[o, 2 i + p - 1, 2 j + q - 1] = act(sum over all c, i, j, p, q of W[c, o, p, q] x[c, i, j] + b[o])

act is max(., 0) or nothing; x is zero outside the image. What encoders and decoders of VQ-VAEs are made of. The kernel
(csrc/cpu/winograd_conv.h) takes 16 products in place of 36: each of the four phases of the pixels, odd and even, is
seen by 2x2 weights (Winograd's F(3x3, 2x2)).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import lib, resolve
from fastgen.checks import autocast, check, differentiates, first_order, quick_apply

KERNEL = 4


def downsample_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    if x.numel() == 0:
        return _nothing(x, weight, bias, (weight.shape[0], x.shape[2] // 2, x.shape[3] // 2))
    y = F.conv2d(x, weight, bias, stride=2, padding=1)
    return F.relu(y) if relu else y


def upsample_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    if x.numel() == 0:
        return _nothing(x, weight, bias, (weight.shape[1], x.shape[2] * 2, x.shape[3] * 2))
    y = F.conv_transpose2d(x, weight, bias, stride=2, padding=1)
    return F.relu(y) if relu else y


def _nothing(x: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    parts = sum(t.sum() for t in (x, weight, bias) if t is not None)
    return x.new_zeros(x.shape[0], *shape) + 0 * parts


ARGUMENTS = "Tensor x, Tensor weight"
for name in ("downsample_conv2d", "upsample_conv2d"):
    lib.define(f"{name}({ARGUMENTS}, Tensor? bias, bool relu) -> Tensor")
    lib.define(f"{name}_backward(Tensor grad, Tensor? result, {ARGUMENTS}, bool need_x) -> (Tensor, Tensor, Tensor)")


@torch.library.register_fake("fastgen::downsample_conv2d", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2] // 2, x.shape[3] // 2)


@torch.library.register_fake("fastgen::upsample_conv2d", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1], x.shape[2] * 2, x.shape[3] * 2)


@torch.library.register_fake("fastgen::downsample_conv2d_backward", lib=lib)
@torch.library.register_fake("fastgen::upsample_conv2d_backward", lib=lib)
def _(grad: Tensor, result: Tensor | None, x: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape if need_x else 0), x.new_empty(weight.shape), x.new_empty(grad.shape[1])


@quick_apply
class _Resampling(torch.autograd.Function):
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


def downsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolution of 4x4 with stride 2 and padding 1, which halves an image's sides, and the ReLU behind it.

    Parameters
    ----------
    x
        (B, C, H, W) float32, bfloat16 or float64; H and W even; any strides. Zeros lie around the image.
    weight
        (O, C, 4, 4), same dtype.
    bias
        (O,).
    relu
        Whether max(., 0) follows.
    backend
        See `fastgen.backend`.

    Returns
    -------
    (B, O, H/2, W/2), dtype of x. Sums are float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.
    """
    op = "downsample_conv2d"
    x, weight, bias = _checked(op, x, weight, bias, relu, 1)
    if any(size % 2 for size in x.shape[2:]):
        raise ValueError(f"{op}: x needs even height and width, got {tuple(x.shape[2:])}")
    return _resample(op, downsample_conv2d_reference, x, weight, bias, relu, backend)


def upsample_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Transposed convolution of 4x4 with stride 2 and padding 1, which doubles an image's sides, and the ReLU behind.

    Parameters
    ----------
    x
        (B, C, H, W) float32, bfloat16 or float64; any strides.
    weight
        (C, O, 4, 4), same dtype, as torch's transposed convolutions have it.
    bias
        (O,).
    relu
        Whether max(., 0) follows.
    backend
        See `fastgen.backend`.

    Returns
    -------
    (B, O, 2 H, 2 W), dtype of x. Sums are float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.
    """
    op = "upsample_conv2d"
    x, weight, bias = _checked(op, x, weight, bias, relu, 0)
    return _resample(op, upsample_conv2d_reference, x, weight, bias, relu, backend)


def _checked(
    op: str, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, inputs: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`inputs`: the dimension of the weight that x has channels for."""
    x, weight, bias = autocast(op, x, weight, bias)  # type: ignore[assignment]
    check(op, "x", x, x, (None, None, None, None))
    channels: list[int | None] = [None, None]
    channels[inputs] = x.shape[1]
    check(op, "weight", weight, x, (*channels, KERNEL, KERNEL))
    if min(weight.shape[:2]) < 1:
        raise ValueError(f"{op}: weight needs at least one channel each way, got {tuple(weight.shape)}")
    if bias is not None:
        check(op, "bias", bias, x, (weight.shape[1 - inputs],))
    if not isinstance(relu, bool):
        raise TypeError(f"{op}: relu must be True or False, got {relu!r}")
    return x, weight, bias


def _resample(
    op: str, reference: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, backend: str | None
) -> Tensor:
    if resolve(op, backend, x.device, x.dtype) == "reference":
        return reference(x, weight, bias, relu=relu)  # type: ignore[no-any-return]
    args = (x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())
    if differentiates(*args):
        return _Resampling.apply(*args, relu, op)  # type: ignore[no-any-return,no-untyped-call]
    return getattr(torch.ops.fastgen, op)(*args, relu)  # type: ignore[no-any-return]
