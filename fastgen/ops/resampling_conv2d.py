"""Convolutions of 4x4 that halve an image's sides (stride 2), and their transposes that double them; and the ReLU.

    down: y[o, i, j] = act(sum over c, p, q of W[o, c, p, q] x[c, 2 i + p - 1, 2 j + q - 1] + b[o])
    up:   y[o, 2 i + p - 1, 2 j + q - 1] = act(sum over all c, i, j, p, q of W[c, o, p, q] x[c, i, j] + b[o])

act is max(., 0) or nothing; x is zero outside the image. What encoders and decoders of VQ-VAEs are made of. The kernel
(csrc/cpu/winograd_conv.h) takes 16 products in place of 36: each of the four phases of the pixels, odd and even, is
seen by 2x2 weights (Winograd's F(3x3, 2x2)). A result's rounding error is measured by the largest pixels of the 3x3
results beside it, and where one of these is not finite it is not either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import lib
from fastgen.checks import autocast
from fastgen.ops.conv2d import check_convolution, convolve, define_convolution

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


define_convolution("downsample_conv2d")
define_convolution("upsample_conv2d")


@torch.library.register_fake("fastgen::downsample_conv2d", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2] // 2, x.shape[3] // 2)


@torch.library.register_fake("fastgen::upsample_conv2d", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1], x.shape[2] * 2, x.shape[3] * 2)


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
    x, weight, bias = autocast(op, x, weight, bias)  # type: ignore[assignment]
    check_convolution(op, x, weight, bias, relu, KERNEL)
    if any(size % 2 for size in x.shape[2:]):
        raise ValueError(f"{op}: x needs even height and width, got {tuple(x.shape[2:])}")
    return convolve(op, downsample_conv2d_reference, x, weight, bias, relu, backend)


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
    x, weight, bias = autocast(op, x, weight, bias)  # type: ignore[assignment]
    check_convolution(op, x, weight, bias, relu, KERNEL, inputs=0)
    return convolve(op, upsample_conv2d_reference, x, weight, bias, relu, backend)
