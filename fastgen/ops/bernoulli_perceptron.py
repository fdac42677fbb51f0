"""The log-likelihood of binary values under a perceptron's logits, which are never written to memory.

    h_0 = z,   h_{l+1} = relu(W_l h_l + b_l),   logits = W_L h_L + b_L
    log p(x | z) = sum_d x_d logits_d - log(1 + exp(logits_d))

What a VAE's importance-weighted likelihood evaluates thousands of times for each x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import lib, resolve
from fastgen.checks import check, check_tensor, differentiates, first_order, quick_apply, widest, without_autocast


def bernoulli_perceptron_reference(z: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    h = z
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        h = F.relu(F.linear(h, weight, bias))
    logits = F.linear(h, weights[-1], biases[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.view(z.shape[0] // max(1, x.shape[0]), *x.shape)
    return (x * logits - F.softplus(logits)).sum(-1).flatten()


lib.define("bernoulli_perceptron(Tensor z, Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor")


@torch.library.register_fake("fastgen::bernoulli_perceptron", lib=lib)
def _(z: Tensor, x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return z.new_empty(z.shape[0])


@quick_apply
class _BernoulliPerceptron(torch.autograd.Function):
    @staticmethod
    def forward(z: Tensor, x: Tensor, *parameters: Tensor) -> Tensor:
        layers = len(parameters) // 2
        weights, biases = list(parameters[:layers]), list(parameters[layers:])
        return torch.ops.fastgen.bernoulli_perceptron(z, x, weights, biases)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Writes the logits: training keeps as much for its activations anyway."""
        z, x, *parameters = ctx.saved_tensors
        layers = len(parameters) // 2
        weights, biases = parameters[:layers], parameters[layers:]
        with without_autocast(z):
            inputs = [z]
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                inputs.append(F.relu(torch.ops.fastgen.linear(inputs[-1], weight, bias)))
            copies = z.shape[0] // max(1, x.shape[0])
            logits = torch.ops.fastgen.linear(inputs[-1], weights[-1], biases[-1]).view(copies, *x.shape)
            by_row = grad.view(copies, x.shape[0], 1)
            d = (by_row * (x - torch.sigmoid(logits))).flatten(0, 1)
            of_weights: list[Tensor] = []
            of_biases: list[Tensor] = []
            for weight, h in zip(reversed(weights), reversed(inputs), strict=True):
                d, of_weight, of_bias = torch.ops.fastgen.linear_backward(d, h, weight, True)
                of_weights.insert(0, of_weight)
                of_biases.insert(0, of_bias)
                if h is not z:
                    d = d * (h > 0)
            return d, (by_row * logits).sum(0), *of_weights, *of_biases


def bernoulli_perceptron(
    z: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, backend: str | None = None
) -> Tensor:
    """Log-likelihood of x given z.

    Parameters
    ----------
    z
        (N, Z), N = k B: k for each row of x, row n for row n mod B; float32, bfloat16 or float64.
    x
        (B, D): 0 and 1, dtype of z.
    weights, biases
        Of each layer (outputs, inputs) and (outputs,), dtype of z; D outputs of the last one.
    backend
        See `fastgen.backend`.

    Returns
    -------
    (N,) nats, float32, or float64 for such z.

    Raises
    ------
    ValueError, TypeError
        For tensors that do not fit; the message names them.
    """
    op = "bernoulli_perceptron"
    check_tensor(op, "z", z, "(N, Z)")
    check_tensor(op, "x", x, "(B, D)")
    if z.dim() != 2 or x.dim() != 2 or not z.is_floating_point():
        raise ValueError(f"{op}: z and x must be (N, Z) and (B, D) floats, got {tuple(z.shape)} and {tuple(x.shape)}")
    if not all(isinstance(p, list | tuple) for p in (weights, biases)):
        came = f"{type(weights).__name__} and {type(biases).__name__}"
        raise TypeError(f"{op}: weights and biases must be lists of tensors, got {came}")
    if not len(weights) or len(weights) != len(biases):
        raise ValueError(f"{op}: weights must be as many as biases, at least 1, got {len(weights)} and {len(biases)}")
    if z.shape[0] % max(1, x.shape[0]) or (z.shape[0] and not x.shape[0]):
        raise ValueError(f"{op}: z must have a multiple of the {x.shape[0]} rows of x, got {z.shape[0]}")
    for name, parameters in (("weights", weights), ("biases", biases)):
        for i, parameter in enumerate(parameters):
            check_tensor(op, f"{name}[{i}]", parameter)
    z, x, *rest = widest(z, x, *weights, *biases)
    weights, biases = rest[: len(weights)], rest[len(weights) :]
    inputs = z.shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        check(op, f"weights[{i}]", weight, z, (None, inputs))
        inputs = weight.shape[0]
        check(op, f"biases[{i}]", bias, z, (inputs,))
    check(op, "x", x, z, (None, inputs))
    if resolve(op, backend, z.device, z.dtype) == "cpu" and z.numel():
        kind = torch.promote_types(z.dtype, torch.float32)
        tensors = [t.to(kind).contiguous() for t in (z, x, *weights, *biases)]
        if differentiates(*tensors):
            return _BernoulliPerceptron.apply(*tensors)  # type: ignore[no-any-return,no-untyped-call]
        return torch.ops.fastgen.bernoulli_perceptron(  # type: ignore[no-any-return]
            *tensors[:2], tensors[2 : 2 + len(weights)], tensors[2 + len(weights) :]
        )
    with without_autocast(z):
        return bernoulli_perceptron_reference(z, x, weights, biases)
