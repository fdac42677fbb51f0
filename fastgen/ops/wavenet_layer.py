"""One WaveNet layer: gated causal convolution, then the residual and skip 1x1 convolutions, in one pass over the input.

    z        = tanh(a[:H]) * sigmoid(a[H:]),  a = causal_conv(x) + b + c        (B, H, T)    gated_causal_conv1d
    r        = x + V[:C] z + v[:C]                                             (B, C, T)    residual
    s        = V[C:] z + v[C:]                                                 (B, S, T)    skip

Source: van den Oord et al., "WaveNet: A Generative Model for Raw Audio" (2016), section 2.4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import autocast, check, check_target, count_writes, differentiates, first_order, quick_apply
from fastgen.ops.gated_causal_conv1d import check_gate, empty_cond_grad, gated_causal_conv1d_reference


def wavenet_layer_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    cond: Tensor | None = None,
    *,
    dilation: int = 1,
) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    z = gated_causal_conv1d_reference(x, weight, bias, cond, dilation=dilation)  # (B, H, T)
    if x.shape[2] == 0:  # what F.conv1d refuses
        nothing = z.new_zeros(x.shape[0], out_weight.shape[0], 0) + 0 * (z.sum() + out_weight.sum())
        return x + nothing[:, : x.shape[1]], nothing[:, x.shape[1] :]
    out = F.conv1d(z, out_weight[:, :, None], out_bias)  # (B, C + S, T)
    return x + out[:, : x.shape[1]], out[:, x.shape[1] :]


_ARGS = "Tensor x, Tensor weight, Tensor? bias, Tensor out_weight, Tensor? out_bias, Tensor? cond, int dilation"
lib.define(f"wavenet_layer({_ARGS}) -> (Tensor, Tensor)")
lib.define(f"wavenet_layer_out({_ARGS}, Tensor(a!) residual, Tensor(b!) skip) -> ()")
lib.define(
    f"wavenet_layer_backward(Tensor grad_residual, Tensor grad_skip, {_ARGS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("fastgen::wavenet_layer", lib=lib)
def _(x: Tensor, weight: Tensor, bias: object, out_weight: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    batch, channels, steps = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, out_weight.shape[0] - channels, steps)


@torch.library.register_fake("fastgen::wavenet_layer_out", lib=lib)
def _(*args: object) -> None:
    return None


@torch.library.register_fake("fastgen::wavenet_layer_backward", lib=lib)
def _(
    grad_residual: Tensor,
    grad_skip: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    cond: Tensor | None,
    dilation: int,
) -> tuple[Tensor, ...]:
    rows, outs = weight.shape[0], out_weight.shape[0]
    shapes = (x.shape, weight.shape, (rows,), out_weight.shape, (outs,))
    return (*(x.new_empty(s) for s in shapes), empty_cond_grad(x, cond))


has_triton_kernels("wavenet_layer", "wavenet_layer_out", "wavenet_layer_backward")


@quick_apply
class _WaveNetLayer(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.fastgen.wavenet_layer(*args)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.dilation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_residual: Tensor, grad_skip: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = torch.ops.fastgen.wavenet_layer_backward(
            grad_residual.contiguous(), grad_skip.contiguous(), *saved, ctx.dilation
        )
        return (*(None if t is None else g for t, g in zip(saved, grads, strict=True)), None)


def _check_apart(op: str, tensors: dict[str, Tensor | None]) -> None:
    """The first two, which are written to, share no memory with each other or with the rest."""
    if torch.compiler.is_compiling():
        return
    spans = {}
    for name, t in tensors.items():
        if t is not None and t.numel() and t.device.type != "meta":
            last = sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))
            if begin := t.data_ptr():  # fake tensors have no memory
                spans[name] = (begin, begin + (last + 1) * t.element_size())
    for name in [n for n in ("out[0]", "out[1]") if n in spans]:
        begin, end = spans.pop(name)
        shared = [other for other, (b, e) in spans.items() if b < end and begin < e]
        if shared:
            raise ValueError(f"{op}: {name} must not share memory with another argument, got that of {shared[0]}")


def wavenet_layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    cond: Tensor | None = None,
    *,
    dilation: int = 1,
    out: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated dilated causal convolution, residual and skip 1x1 convolutions.

    Nothing of the layer's width but the two results is written to memory, and the backward pass saves only the inputs.

    Parameters
    ----------
    x
        (B, C, T) float32, bfloat16 or float64; any strides.
    weight, bias, cond, dilation, backend
        As in `gated_causal_conv1d`: (2H, C, K), (2H,), (B, 2H, T) or (B, 2H, 1).
    out_weight
        (C + S, H): the first C rows make the residual, the last S the skip.
    out_bias
        (C + S,).
    out
        (residual, skip): contiguous tensors to write into, which share no memory with each other or an input, without
        gradients; a loop that reuses them is spared the cost of fresh memory, which for large outputs is as long as the
        computation.

    Returns
    -------
    residual (B, C, T), which is x plus its 1x1 convolution; skip (B, S, T). Dtype of x.

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
    op = "wavenet_layer"
    x, weight, bias, out_weight, out_bias, cond = autocast(  # type: ignore[assignment]
        op, x, weight, bias, out_weight, out_bias, cond
    )
    check_gate(op, x, weight, bias, cond, dilation)
    check(op, "out_weight", out_weight, x, (None, weight.shape[0] // 2))
    batch, channels, steps = x.shape
    if out_weight.shape[0] < channels:
        raise ValueError(f"{op}: out_weight needs at least C = {channels} rows, got {out_weight.shape[0]}")
    if out_bias is not None:
        check(op, "out_bias", out_bias, x, (out_weight.shape[0],))
    tensors = (x, weight, bias, out_weight, out_bias, cond)
    needs_grad = differentiates(*tensors)
    if out is not None:
        if not isinstance(out, tuple | list) or len(out) != 2:
            came = f"{len(out)} elements" if isinstance(out, tuple | list) else type(out).__name__
            raise TypeError(f"{op}: out must be a pair of tensors (residual, skip), got {came}")
        check(op, "out[0]", out[0], x, (batch, channels, steps))
        check(op, "out[1]", out[1], x, (batch, out_weight.shape[0] - channels, steps))
        if needs_grad:
            raise ValueError(f"{op}: out= cannot be used where gradients are needed; call under torch.no_grad()")
        if not all(t.is_contiguous() for t in out):
            raise ValueError(f"{op}: out must be contiguous, got strides {tuple(t.stride() for t in out)}")
        for name, t in zip(("out[0]", "out[1]"), out, strict=True):
            check_target(op, name, t)
        names = ("out[0]", "out[1]", "x", "weight", "bias", "out_weight", "out_bias", "cond")
        _check_apart(op, dict(zip(names, (*out, *tensors), strict=True)))
    if resolve(op, backend, x.device, x.dtype) == "reference":
        results = wavenet_layer_reference(x, weight, bias, out_weight, out_bias, cond, dilation=dilation)
        if out is None:
            return results
        for to, result in zip(out, results, strict=True):
            to.copy_(result)
        return out
    args = tuple(None if t is None else t.contiguous() for t in tensors)
    if out is not None:
        torch.ops.fastgen.wavenet_layer_out(*args, dilation, *out)
        count_writes(*out)
        return out
    if needs_grad:
        return _WaveNetLayer.apply(*args, dilation)  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.fastgen.wavenet_layer(*args, dilation)  # type: ignore[no-any-return]
