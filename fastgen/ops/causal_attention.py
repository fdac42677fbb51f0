"""Causal attention: of each place to those before it, and to itself or to nothing.

    own:      y_t = sum over s <= t of p_ts v_s,     p_t = softmax over s <= t of q_t . k_s / sqrt(D)
    not own:  y_t = sum over s < t of p_ts v_s,      p_t = softmax over s < t of the same, and of a score of 0

The second is PixelSNAIL's, whose pixels do not see themselves: a key and a value of zeros stand before the first.

Sources: Vaswani et al., "Attention Is All You Need" (2017); Chen et al., "PixelSNAIL" (2018); Dao et al.,
"FlashAttention" (2022), for scores that are never written to memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import lib, resolve
from fastgen.checks import autocast, check, check_tensor, differentiates, first_order, quick_apply


def causal_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, own: bool = True) -> Tensor:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    if v.numel() == 0 or q.shape[3] == 0:
        return v + 0 * (q.sum() + k.sum())
    scale, keys, values = q.shape[3] ** -0.5, k.shape[3], v.shape[3]
    width = max(keys, values)
    if not own:
        k, v = (F.pad(t[:, :, :-1], (0, 0, 1, 0)) for t in (k, v))
    # of one width, channels innermost: what PyTorch's fused attention takes, which never stores the scores
    q, k, v = (F.pad(t, (0, width - t.shape[3])).contiguous() for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[..., :values]


lib.define("causal_attention(Tensor q, Tensor k, Tensor v, bool own, bool time_innermost) -> (Tensor, Tensor)")
lib.define(
    "causal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, bool own, "
    "bool time_innermost) -> (Tensor, Tensor, Tensor)"
)


def _memory(like: Tensor, channels: int, time_innermost: bool) -> Tensor:
    batch, heads, time = like.shape[:3]
    shape = (batch, heads, channels, time) if time_innermost else (batch, time, heads, channels)
    return like.new_empty(shape)


def _view(memory: Tensor, time_innermost: bool) -> Tensor:
    """(B, heads, T, channels)."""
    return memory.transpose(2, 3) if time_innermost else memory.transpose(1, 2)


@torch.library.register_fake("fastgen::causal_attention", lib=lib)
def _(q: Tensor, k: Tensor, v: Tensor, own: bool, time_innermost: bool) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(q.dtype, torch.float32)
    return _memory(q, v.shape[3], time_innermost), q.new_empty(*q.shape[:2], 2, q.shape[2], dtype=kind)


@torch.library.register_fake("fastgen::causal_attention_backward", lib=lib)
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, own: bool, time_innermost: bool
) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(_memory(t, t.shape[3], time_innermost) for t in (q, k, v))


@quick_apply
class _CausalAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, own: bool, time_innermost: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.fastgen.causal_attention(q, k, v, own, time_innermost)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.own, ctx.time_innermost = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        q, k, v, out, stats = ctx.saved_tensors
        innermost = ctx.time_innermost
        grads = torch.ops.fastgen.causal_attention_backward(
            _view(grad, innermost), q, k, v, _view(out, innermost), stats, ctx.own, innermost
        )
        return *(_view(g, innermost) for g in grads), None, None


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, own: bool = True, backend: str | None = None) -> Tensor:
    """Attention of each place to those before it. Scores are never written to memory.

    Parameters
    ----------
    q, k
        (B, heads, T, D) float32, bfloat16 or float64; any strides.
    v
        (B, heads, T, E), same dtype.
    own
        Whether a place attends to itself too; otherwise to a key and a value of zeros in its place.
    backend
        See `fastgen.backend`.

    Returns
    -------
    (B, heads, T, E), dtype of q. Sums are float32 (float64 for float64). In memory places are innermost where they are
    in v, otherwise channels, then heads.

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.
    """
    op = "causal_attention"
    check_tensor(op, "q", q, "(B, heads, T, D)")
    q, k, v = autocast(op, q, k, v)  # type: ignore[assignment]
    check(op, "q", q, q, (None, None, None, None))
    check(op, "k", k, q, tuple(q.shape), of="q")
    check(op, "v", v, q, (*q.shape[:3], None), of="q")
    if q.shape[3] < 1:
        raise ValueError(f"{op}: q needs at least one channel, got {tuple(q.shape)}")
    if not isinstance(own, bool):
        raise TypeError(f"{op}: own must be True or False, got {own!r}")
    if resolve(op, backend, q.device, q.dtype) == "reference":
        return causal_attention_reference(q, k, v, own=own)
    innermost = v.stride(2) == 1 and v.shape[3] > 1
    if differentiates(q, k, v):
        memory = _CausalAttention.apply(q, k, v, own, innermost)[0]  # type: ignore[no-untyped-call]
    else:
        memory = torch.ops.fastgen.causal_attention(q, k, v, own, innermost)[0]
    return _view(memory, innermost)
