"""NADE's recurrence over inputs, which share one running sum of their columns.

    a_1     = c                                            (H)
    h_d     = sigmoid(a_d)                                 (H)
    out_d   = V_d h_d + b_d                                (O)      parameters of p(x_d | x_1 ... x_{d-1})
    a_{d+1} = a_d + W_d[x_d]                               (H)      a row for each value; of one row, x_d is the factor

D H (O + 1) multiply-adds for a sample, where each output by a network of its own would take D times as many.

Source: Larochelle and Murray, "The Neural Autoregressive Distribution Estimator" (2011); Uria et al., "Neural
Autoregressive Distribution Estimation" (2016).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import (
    check,
    check_classes,
    check_temperature,
    check_tensor,
    differentiates,
    first_order,
    keep_dtype,
    quick_apply,
    without_autocast,
)
from fastgen.ops import distributions


def nade_reference(x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    """The specification, in plain PyTorch, all states at once: any device and dtype, differentiable."""
    kind = torch.promote_types(in_weight.dtype, torch.float32)
    steps, columns, _ = in_weight.shape
    rows = in_weight.to(kind)
    added = rows[torch.arange(steps, device=x.device), x] if columns > 1 else rows[:, 0] * x[..., None]  # (B, D, H)
    states = torch.cat([in_bias.to(kind).expand(len(x), 1, -1), added[:, :-1]], 1).cumsum(1)
    out = torch.einsum("bdh,doh->bdo", torch.sigmoid(states), out_weight.to(kind)) + out_bias.to(kind)
    return out.to(in_weight.dtype)


lib.define("nade(Tensor x, Tensor in_weight, Tensor in_bias, Tensor out_weight, Tensor out_bias) -> Tensor")
lib.define(
    "nade_backward(Tensor grad, Tensor x, Tensor in_weight, Tensor in_bias, Tensor out_weight) "
    "-> (Tensor, Tensor, Tensor)"
)
lib.define(
    "nade_sample(Tensor in_weight, Tensor in_bias, Tensor out_weight, Tensor out_bias, Tensor uniforms, "
    "float temperature, Tensor(a!) x) -> ()"
)


@torch.library.register_fake("fastgen::nade", lib=lib)
def _(x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
    return in_weight.new_empty(x.shape[0], x.shape[1], out_weight.shape[1])


@torch.library.register_fake("fastgen::nade_backward", lib=lib)
def _(grad: Tensor, x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(in_weight), torch.empty_like(in_bias), torch.empty_like(out_weight)


@torch.library.register_fake("fastgen::nade_sample", lib=lib)
def _(*args: object) -> None:
    return None


has_triton_kernels("nade", "nade_backward", "nade_sample")


@quick_apply
class _Nade(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> Tensor:
        return torch.ops.fastgen.nade(x, in_weight, in_bias, out_weight, out_bias)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, in_weight, in_bias, out_weight = ctx.saved_tensors
        grads = torch.ops.fastgen.nade_backward(grad.contiguous(), x, in_weight, in_bias, out_weight)
        return None, *grads, grad.sum(0)


def nade(
    x: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Parameters of every input's distribution given the inputs before it. Differentiable in all but x.

    Parameters
    ----------
    x
        (B, D) int64: 0 or 1 where `in_weight` has one row for an input, else in [0, V).
    in_weight
        (D, V, H) float32, bfloat16 or float64, V = 1 for binary inputs.
    in_bias
        (H,), same dtype (under autocast any), as the others.
    out_weight, out_bias
        (D, O, H), (D, O).
    backend
        See `fastgen.backend`.

    Returns
    -------
    (B, D, O), dtype of in_weight.

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes, devices or values that do not fit: the message names the argument, what was expected and what
        came.
    BackendError
        An explicit backend that cannot run here.

    Notes
    -----
    Source: Uria et al., "Neural Autoregressive Distribution Estimation" (2016). What is kept for the backward is x and
    the weights alone.
    """
    weights = _check(in_weight, in_bias, out_weight, out_bias)
    in_weight = weights[0]
    _check_values("x", x, in_weight, 0)
    if resolve("nade", backend, in_weight.device, in_weight.dtype) == "reference":
        with without_autocast(in_weight):
            return nade_reference(x, *weights)
    kind = torch.promote_types(in_weight.dtype, torch.float32)
    args = [w.to(kind).contiguous() for w in weights]
    call = _Nade.apply if differentiates(*args) else torch.ops.fastgen.nade
    return call(x.contiguous(), *args).to(in_weight.dtype)  # type: ignore[no-any-return, no-untyped-call]


@torch.no_grad()
def nade_sample(
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    uniforms: Tensor,
    *,
    given: Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Draw inputs one after another by inversion of their distributions.

    Parameters
    ----------
    in_weight, in_bias, out_weight, out_bias
        See `nade`; O = 1 is the logit of 1 against 0. Computed in float32.
    uniforms
        (B, D) float32 in [0, 1).
    given
        (B, D) int64: inputs that are known; those below 0 are drawn.
    temperature
        > 0: the logits are divided by it.
    backend
        See `fastgen.backend`.

    Returns
    -------
    (B, D) int64. The same uniforms give the same values on every backend, save where one falls within rounding of a
    boundary.

    Raises
    ------
    TypeError, ValueError, BackendError
        As `nade`.
    """
    op = "nade_sample"
    in_weight, in_bias, out_weight, out_bias = (
        w.float().contiguous() for w in _check(in_weight, in_bias, out_weight, out_bias, op)
    )
    steps, outputs = out_weight.shape[:2]
    check_temperature(op, temperature)
    check(op, "uniforms", uniforms, in_bias, (None, steps))
    if uniforms.numel() and not 0 <= float(uniforms.min()) <= float(uniforms.max()) < 1:
        raise ValueError(f"{op}: uniforms must lie in [0, 1)")
    values = max(2, outputs)
    x = torch.full(uniforms.shape, -1, dtype=torch.int64, device=uniforms.device)
    if given is not None:
        _check_values("given", given, in_weight, -1, op)
        if given.shape != uniforms.shape:
            raise ValueError(f"{op}: given must be {tuple(uniforms.shape)}, as uniforms, got {tuple(given.shape)}")
        x.copy_(given)
    if outputs < 1 or in_weight.shape[1] != outputs:
        raise ValueError(
            f"{op}: in_weight must have a row for each of {values} values, or 1 with 1 output, "
            f"got {in_weight.shape[1]} rows and {outputs} outputs"
        )
    if resolve("nade", backend, in_weight.device) != "reference":
        torch.ops.fastgen.nade_sample(in_weight, in_bias, out_weight, out_bias, uniforms.contiguous(), temperature, x)
        return x
    state = in_bias.expand(len(x), -1)
    with without_autocast(in_weight):
        for d in range(steps):
            out = torch.sigmoid(state) @ out_weight[d].T + out_bias[d]  # (B, O)
            logits = torch.cat([torch.zeros_like(out), out], 1) if outputs == 1 else out
            drawn = distributions.categorical_from_uniform(logits / temperature, uniforms[:, d])
            x[:, d] = torch.where(x[:, d] < 0, drawn, x[:, d])
            rows = in_weight[d]
            state = state + (rows[x[:, d]] if len(rows) > 1 else rows[0] * x[:, d, None])
    return x


def _check(
    in_weight: Tensor, in_bias: Tensor, out_weight: Tensor, out_bias: Tensor, op: str = "nade"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_tensor(op, "in_weight", in_weight, "(D, V, H)")
    if in_weight.dim() != 3 or in_weight.shape[1] < 1:
        raise ValueError(f"{op}: in_weight must be (D, V, H) with V >= 1, got {tuple(in_weight.shape)}")
    weights = keep_dtype(op, in_weight, in_bias, out_weight, out_bias)
    in_weight, in_bias, out_weight, out_bias = weights  # type: ignore[assignment]
    steps, _, hidden = in_weight.shape
    check(op, "in_weight", in_weight, in_weight, (None, None, None))
    check(op, "in_bias", in_bias, in_weight, (hidden,))
    check(op, "out_weight", out_weight, in_weight, (steps, None, hidden))
    check(op, "out_bias", out_bias, in_weight, (steps, out_weight.shape[1]))
    return in_weight, in_bias, out_weight, out_bias


def _check_values(name: str, x: Tensor, in_weight: Tensor, least: int, op: str = "nade") -> None:
    steps, columns, _ = in_weight.shape
    check_tensor(op, name, x, f"(B, {steps}) of int64")
    if x.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != steps:
        raise ValueError(f"{op}: {name} must be (B, {steps}), got {tuple(x.shape)}")
    if x.device != in_weight.device:
        raise ValueError(f"{op}: {name} is on {x.device}, in_weight on {in_weight.device}")
    # then the C++ kernels look, and Triton's add nothing for a value that has no weights
    if not torch.compiler.is_compiling():
        check_classes(op, name, x if least == 0 else x.clamp(min=0), max(2, columns))
