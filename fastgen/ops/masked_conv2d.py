"""Masked two-dimensional convolution: each pixel sees only pixels before it in raster order.

    y[o, i, j] = sum over c and live (di, dj) of W[o, c, KH//2 + di, KW//2 + dj] x[c, i + di, j + dj] + b[o]

    mask          live taps: rows above (di < 0), and of the pixel's own row
    "A"           those to the left (dj < 0)
    "B"           those to the left and the pixel itself (dj <= 0)
    "vertical"    none
    "vertical_B"  all: the second and later layers of a vertical stack, whose input already sees only rows above

With `colors` groups of channels, which come one after another, the pixel itself is ordered too: output group g sees its
input groups before g ("A"), or up to g ("B"). x is zero outside the image; the size does not change.

Sources: van den Oord et al., "Pixel Recurrent Neural Networks" (2016); "Conditional Image Generation with PixelCNN
Decoders" (2016) for the vertical stack.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import autocast, check, check_channels, check_integer, differentiates, first_order, quick_apply

MASKS = ("A", "B", "vertical", "vertical_B")


ALIGNED = 8  # numbers: on a GPU tiles begin at multiples of them


def aligned(n: int) -> int:
    return -(-n // ALIGNED) * ALIGNED


def positions(height: int, width: int, margin: int) -> int:
    """Of an image with `margin` zeros behind each of its rows."""
    return aligned(height * (width + margin))


def mask_2d(mask: str, kernel_size: tuple[int, int], *, device: torch.device | None = None) -> Tensor:
    """(KH, KW) bool: which taps are live for one color group; the pixel itself is at (KH // 2, KW // 2)."""
    height, width = kernel_size
    row, column = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    in_row = {"A": width // 2, "B": width // 2 + 1, "vertical": 0, "vertical_B": width}[mask]
    return (row < height // 2) | ((row == height // 2) & (column < in_row))


def weight_mask(weight: Tensor, mask: str, colors: int = 1, halves: int = 1) -> Tensor:
    """Bool mask that broadcasts to a weight (O, C, KH, KW); `halves` is 2 where O holds both halves of a gate."""
    rows, columns, *kernel = weight.shape
    live = mask_2d(mask, (kernel[0], kernel[1]), device=weight.device)[None, None]
    if colors == 1 or mask not in ("A", "B"):
        return live
    group = torch.arange(colors, device=weight.device)
    to = group.repeat_interleave(rows // halves // colors).repeat(halves)[:, None]
    sees = group.repeat_interleave(columns // colors) < to + (mask == "B")  # (O, C)
    live = live.repeat(rows, columns, 1, 1)
    live[:, :, kernel[0] // 2, kernel[1] // 2] = sees
    return live


def masked_conv2d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: str,
    colors: int = 1,
    halves: int = 1,
    relu: bool = False,
) -> Tensor:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    if x.numel() == 0:
        parts = sum(t.sum() for t in (x, weight, bias) if t is not None)
        return x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:]) + 0 * parts
    height, width = weight.shape[2:]
    # chosen, not multiplied: whatever the dead weights hold, NaN included, stays out
    live = torch.where(weight_mask(weight, mask, colors, halves), weight, 0)
    above, left = height // 2, width // 2
    y = F.conv2d(F.pad(x, (left, width - 1 - left, above, height - 1 - above)), live, bias)
    return F.relu(y) if relu else y


lib.define("masked_conv2d(Tensor x, Tensor weight, Tensor? bias, int mask, int colors, bool relu) -> Tensor")
lib.define(
    "masked_conv2d_backward(Tensor grad, Tensor? kept, Tensor x, Tensor weight, Tensor? cond, int mask, int colors, "
    "bool relu, bool need_x) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("fastgen::masked_conv2d", lib=lib)
def _(x: Tensor, weight: Tensor, bias: Tensor | None, mask: int, colors: int, relu: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:])


@torch.library.register_fake("fastgen::masked_conv2d_backward", lib=lib)
def _(
    grad: Tensor, kept: Tensor | None, x: Tensor, weight: Tensor, cond: Tensor | None, mask: int, colors: int,
    relu: bool, need_x: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        x.new_empty(x.shape if need_x else 0), x.new_empty(weight.shape), x.new_empty(weight.shape[0]),
        x.new_empty(0 if cond is None else cond.shape),
    )  # fmt: skip


has_triton_kernels("masked_conv2d", "masked_conv2d_backward")


@quick_apply
class _MaskedConv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, mask: int, colors: int, relu: bool) -> Tensor:
        return torch.ops.fastgen.masked_conv2d(x, weight, bias, mask, colors, relu)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.mask, ctx.colors, ctx.relu = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, output if ctx.relu else None)  # which the next layer saves anyway

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_x, (x, weight, result) = ctx.needs_input_grad[0], ctx.saved_tensors
        grads = torch.ops.fastgen.masked_conv2d_backward(
            grad.contiguous(), result, x, weight, None, ctx.mask, ctx.colors, ctx.relu, need_x
        )
        return grads[0] if need_x else None, grads[1], grads[2] if ctx.has_bias else None, None, None, None


def check_masked(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, mask: str, colors: int, halves: int) -> None:
    """Raise on arguments that do not fit together, naming the argument, what was expected and what came."""
    check(op, "x", x, x, (None, None, None, None))
    check(op, "weight", weight, x, (None, None, None, None))
    check_channels(op, x, weight)
    rows, channels, *kernel = weight.shape
    if min(kernel) < 1:
        raise ValueError(f"{op}: weight needs a kernel size >= 1, got {tuple(kernel)}")
    if channels < 1:
        raise ValueError(f"{op}: x needs at least one channel, got 0")
    if rows < 1 or rows % halves:
        wanted = "an even number of rows (tanh half, sigmoid half)" if halves == 2 else "at least one row"
        raise ValueError(f"{op}: weight needs {wanted}, got {rows}")
    if bias is not None:
        check(op, "bias", bias, x, (rows,))
    if mask not in MASKS:
        raise ValueError(f"{op}: mask must be one of {MASKS}, got {mask!r}")
    check_integer(op, "colors", colors)
    for name, count in (("x's channels", channels), ("weight's output channels", rows // halves)):
        if count % colors:
            raise ValueError(f"{op}: colors must divide {name}, got {colors} for {count}")


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: str,
    colors: int = 1,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Convolution of an image whose pixels see only pixels before them in raster order; only live taps are computed.

    Parameters
    ----------
    x
        (B, C, H, W) float32, bfloat16 or float64; any strides.
    weight
        (O, C, KH, KW), same dtype; the pixel itself is at (KH // 2, KW // 2). What lies behind the mask is never read
        and has gradient zero.
    bias
        (O,).
    mask
        "A", "B", "vertical" or "vertical_B": see the head of this module.
    colors
        Groups of channels that are ordered within a pixel (3 for R, G, B); divides C and O.
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

    Notes
    -----
    Source: van den Oord et al., "Pixel Recurrent Neural Networks" (2016).
    """
    op = "masked_conv2d"
    x, weight, bias = autocast(op, x, weight, bias)  # type: ignore[assignment]
    check_masked(op, x, weight, bias, mask, colors, 1)
    if not isinstance(relu, bool):
        raise TypeError(f"{op}: relu must be True or False, got {relu!r}")
    if resolve(op, backend, x.device, x.dtype) == "reference":
        return masked_conv2d_reference(x, weight, bias, mask=mask, colors=colors, relu=relu)
    args = (x.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous())
    if differentiates(*args):
        return _MaskedConv2d.apply(*args, MASKS.index(mask), colors, relu)  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.fastgen.masked_conv2d(*args, MASKS.index(mask), colors, relu)  # type: ignore[no-any-return]
