"""A WaveNet layer: the gated convolution's kernels, and the 1x1 convolutions as PyTorch's matrix products.

See fastgen/ops/wavenet_layer.py and gated_causal_conv1d.py beside this. The gates are the one intermediate result in
memory; the backward computes them again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gated_causal_conv1d import gated_causal_conv1d, gated_causal_conv1d_backward


def _split(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, cond: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> what is added to x, and skip: views of one result."""
    out = out_weight @ gated_causal_conv1d(x, weight, bias, cond, dilation)
    if out_bias is not None:
        out += out_bias[:, None]
    return out[:, : x.shape[1]], out[:, x.shape[1] :]


def wavenet_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, cond: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Contiguous x (B, C, T) and the rest -> residual (B, C, T), skip (B, S, T)."""
    more, skip = _split(x, weight, bias, out_weight, out_bias, cond, dilation)
    return x + more, skip.clone(memory_format=torch.contiguous_format)


def wavenet_layer_out(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor, out_bias: Tensor | None, cond: Tensor | None,
    dilation: int, residual: Tensor, skip: Tensor,
) -> None:  # fmt: skip
    """`wavenet_layer` into results that are there."""
    more, rest = _split(x, weight, bias, out_weight, out_bias, cond, dilation)
    torch.add(x, more, out=residual)
    skip.copy_(rest)


def wavenet_layer_backward(
    grad_residual: Tensor, grad_skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, out_weight: Tensor,
    out_bias: Tensor | None, cond: Tensor | None, dilation: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """-> gradients of x, weight, bias, out_weight, out_bias, cond."""
    grad = torch.cat([grad_residual, grad_skip], 1)  # (B, C + S, T)
    z = gated_causal_conv1d(x, weight, bias, cond, dilation)
    of_out_weight = torch.einsum("bot,bht->oh", grad, z)
    of_out_bias = grad.sum((0, 2), dtype=torch.float32).to(grad.dtype)
    of_x, of_weight, of_bias, of_cond = gated_causal_conv1d_backward(
        (out_weight.T @ grad).contiguous(), x, weight, bias, cond, dilation
    )
    return of_x + grad_residual, of_weight, of_bias, of_out_weight, of_out_bias, of_cond
