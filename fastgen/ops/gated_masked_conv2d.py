"""Masked convolution with a gate: the heart of a Gated PixelCNN block.

    a = masked_conv2d(x, W) + b + c        (2H)
    z = tanh(a[:H]) * sigmoid(a[H:])       (H)

Masks and colors are those of `masked_conv2d`; each half of the gate is divided into color groups of its own.

Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (2016), equations 2 to 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.backend import INTERPRETED, has_triton_kernels, lib, resolve
from fastgen.checks import autocast, check, check_tensor, differentiates, first_order, quick_apply
from fastgen.ops.masked_conv2d import MASKS, check_masked, masked_conv2d_reference, positions


def gated_masked_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, cond: Tensor | None = None, *, mask: str, colors: int = 1
) -> Tensor:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    a = masked_conv2d_reference(x, weight, bias, mask=mask, colors=colors, halves=2)  # (B, 2H, height, width)
    if cond is not None:
        a = a + cond
    tanh, sigmoid = a.chunk(2, 1)
    return torch.tanh(tanh) * torch.sigmoid(sigmoid)


lib.define(
    "gated_masked_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? cond, int mask, int colors, bool keep) "
    "-> (Tensor, Tensor)"
)


@torch.library.register_fake("fastgen::gated_masked_conv2d", lib=lib)
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, mask: int, colors: int, keep: bool
) -> tuple[Tensor, Tensor]:
    batch, rows, size = x.shape[0], weight.shape[0], x.shape[2:]
    of_kernel = (positions(size[0], size[1], weight.shape[3] // 2), rows) if x.is_cuda or INTERPRETED else (rows, *size)
    return x.new_empty(batch, rows // 2, *size), x.new_empty((batch, *of_kernel) if keep else 0)


has_triton_kernels("gated_masked_conv2d")


@quick_apply
class _GatedMaskedConv2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, mask: int, colors: int
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.fastgen.gated_masked_conv2d(x, weight, bias, cond, mask, colors, True)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, cond, ctx.mask, ctx.colors = inputs
        ctx.has_bias, kept = bias is not None, output[1]
        ctx.mark_non_differentiable(kept)
        ctx.set_materialize_grads(False)  # kept has none, as large as itself
        ctx.save_for_backward(x, weight, cond, kept)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        x, weight, cond, kept = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0]
        grads = torch.ops.fastgen.masked_conv2d_backward(
            grad.contiguous(), kept, x, weight, cond, ctx.mask, ctx.colors, False, need_x
        )
        return (
            grads[0] if need_x else None, grads[1], grads[2] if ctx.has_bias else None,
            None if cond is None else grads[3], None, None,
        )  # fmt: skip


def gated_masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    cond: Tensor | None = None,
    *,
    mask: str,
    colors: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Masked convolution, tanh times sigmoid; only live taps are computed.

    Parameters
    ----------
    x
        (B, C, H, W) float32, bfloat16 or float64; any strides.
    weight
        (2G, C, KH, KW), same dtype: the first G rows feed tanh, the last G the sigmoid; the pixel itself is at
        (KH // 2, KW // 2). What lies behind the mask is never read and has gradient zero.
    bias
        (2G,).
    cond
        (B, 2G, H, W), or (B, 2G, 1, 1) for conditioning that is constant over an image; added inside the gate.
    mask
        "A", "B", "vertical" or "vertical_B": see `fastgen.ops.masked_conv2d`.
    colors
        Groups of channels that are ordered within a pixel (3 for R, G, B); divides C and G.
    backend
        See `fastgen.backend`.

    Returns
    -------
    (B, G, H, W), dtype of x. Sums are float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.

    Notes
    -----
    Source: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (2016).
    """
    op = "gated_masked_conv2d"
    x, weight, bias, cond = autocast(op, x, weight, bias, cond)  # type: ignore[assignment]
    check_masked(op, x, weight, bias, mask, colors, 2)
    if cond is not None:
        check_tensor(op, "cond", cond)
        size = tuple(cond.shape[2:]) == (1, 1) if cond.dim() == 4 else False
        check(op, "cond", cond, x, (x.shape[0], weight.shape[0], *((1, 1) if size else x.shape[2:])))
    if resolve(op, backend, x.device, x.dtype) == "reference":
        return gated_masked_conv2d_reference(x, weight, bias, cond, mask=mask, colors=colors)
    args = (x.contiguous(), weight.contiguous(), *(None if t is None else t.contiguous() for t in (bias, cond)))
    if differentiates(*args):
        return _GatedMaskedConv2d.apply(*args, MASKS.index(mask), colors)[0]  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.fastgen.gated_masked_conv2d(*args, MASKS.index(mask), colors, False)[0]  # type: ignore[no-any-return]
