"""A sample of a diagonal Gaussian, reparameterised, and its divergence from the standard one, in one pass.

    z  = m + e^s * noise
    kl = sum over a sample of (m^2 + e^2s - 1) / 2 - s         KL(N(m, e^2s) || N(0, 1)) in nats

    dm = dz + dkl * m,          ds = dz * noise * e^s + dkl * (e^2s - 1)

Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), appendix B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import check, check_tensor, differentiates, first_order, keep_dtype, quick_apply


def gaussian_rsample_kl_reference(mean: Tensor, log_deviation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    kind = torch.promote_types(mean.dtype, torch.float32)
    m, s = mean.to(kind), log_deviation.to(kind)
    deviation = torch.exp(s)
    kl = 0.5 * (m.square() + (deviation.square() - 1)) - s
    return (m + deviation * noise.to(kind)).to(mean.dtype), kl.unsqueeze(-1).flatten(1).sum(1)


lib.define("gaussian_rsample_kl(Tensor mean, Tensor log_deviation, Tensor noise) -> (Tensor, Tensor)")
lib.define(
    "gaussian_rsample_kl_backward(Tensor? grad_z, Tensor grad_kl, Tensor mean, Tensor log_deviation, Tensor noise) "
    "-> (Tensor, Tensor)"
)


@torch.library.register_fake("fastgen::gaussian_rsample_kl", lib=lib)
def _(mean: Tensor, log_deviation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(mean.dtype, torch.float32)
    return torch.empty_like(mean), mean.new_empty(mean.shape[0], dtype=kind)


@torch.library.register_fake("fastgen::gaussian_rsample_kl_backward", lib=lib)
def _(
    grad_z: Tensor | None, grad_kl: Tensor, mean: Tensor, log_deviation: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


has_triton_kernels("gaussian_rsample_kl", "gaussian_rsample_kl_backward")


@quick_apply
class _RsampleKl(torch.autograd.Function):
    @staticmethod
    def forward(mean: Tensor, log_deviation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.fastgen.gaussian_rsample_kl(mean, log_deviation, noise)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_z: Tensor | None, grad_kl: Tensor | None) -> tuple[Tensor | None, ...]:
        mean, log_deviation, noise = ctx.saved_tensors
        if grad_z is not None:
            grad_z = grad_z.contiguous()
        if grad_kl is None:
            grad_kl = mean.new_zeros(len(mean), dtype=torch.promote_types(mean.dtype, torch.float32))
        grads = torch.ops.fastgen.gaussian_rsample_kl_backward(grad_z, grad_kl.contiguous(), mean, log_deviation, noise)
        of_noise = None
        if ctx.needs_input_grad[2] and grad_z is not None:
            of_noise = grad_z * torch.exp(log_deviation)
        return *grads, of_noise


def gaussian_rsample_kl(
    mean: Tensor, log_deviation: Tensor, noise: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Sample N(mean, exp(log_deviation)^2) by its noise, and KL divergence from N(0, 1). Differentiable in all.

    Parameters
    ----------
    mean, log_deviation
        (B, *S) float32, bfloat16 or float64, one dtype (under autocast that of mean).
    noise
        (B, *S), standard normal; by default drawn from PyTorch's generator.
    backend
        See `fastgen.backend`.

    Returns
    -------
    z (B, *S), dtype of mean; kl (B,) in nats, float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.

    Notes
    -----
    Source: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014).
    """
    op = "gaussian_rsample_kl"
    check_tensor(op, "mean", mean, "(B, *S)")
    given = torch.randn_like(mean) if noise is None else noise
    mean, log_deviation, noise = keep_dtype(op, mean, log_deviation, given)  # type: ignore[assignment]
    assert noise is not None
    if mean.dim() < 1:
        raise ValueError(f"{op}: mean must have shape (B, *S), got ()")
    check(op, "mean", mean, mean, (None,) * mean.dim())
    check(op, "log_deviation", log_deviation, mean, tuple(mean.shape))
    check(op, "noise", noise, mean, tuple(mean.shape))
    if resolve(op, backend, mean.device, mean.dtype) == "reference":
        return gaussian_rsample_kl_reference(mean, log_deviation, noise)
    args = (mean.contiguous(), log_deviation.contiguous(), noise.contiguous())
    if differentiates(*args):
        return _RsampleKl.apply(*args)  # type: ignore[no-any-return, no-untyped-call]
    return torch.ops.fastgen.gaussian_rsample_kl(*args)  # type: ignore[no-any-return]
