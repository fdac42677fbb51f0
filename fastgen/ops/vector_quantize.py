"""Vector quantization: nearest code, gradient estimator, losses and code counts, in one pass over x.

    q_i        = c_{k_i},  k_i the nearest code of x_i                                   (N, D), (N,)
    commitment = mean (x - sg(q))^2,    codebook error = mean (sg(x) - q)^2              equal in value
    loss       = codebook error + beta * commitment                                     sg: stop gradient

`quantized` has the value q. Its gradient reaches x straight through, dL/dx = dL/dq, or by the rotation that takes x
to q: dL/dx = (|q| / |x|) R^T dL/dq, with R held constant.

Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), equation 3; rotation: Fifty et al.,
"Restructuring Vector Quantization with the Rotation Trick" (2024), section 4.2.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import (
    check_tensor,
    differentiates,
    first_order,
    is_finite,
    quick_apply,
    refused,
    widest,
    without_autocast,
)
from fastgen.ops.nearest_code import (
    PRECISIONS,
    Metric,
    Precision,
    assert_finite,
    by_rows,
    check_search,
    compute_type,
    is_strict,
    nearest_code_reference,
)

Estimator = Literal["straight_through", "rotation"]


class Quantized(NamedTuple):
    """What `quantize` returns."""

    quantized: Tensor  # (N, D), dtype of x
    indices: Tensor  # (N,) int64
    commitment: Tensor  # (), mean (x - sg(q))^2
    codebook_error: Tensor  # (), mean (sg(x) - q)^2
    counts: Tensor  # (K,), rows of each code


def rotate(x: Tensor, q: Tensor) -> Tensor:
    """x turned and scaled to q, as a linear function of x whose coefficients have no gradient."""
    x_norm, q_norm = x.detach().norm(dim=-1, keepdim=True).clamp(min=1e-6), q.norm(dim=-1, keepdim=True)
    u, v = x.detach() / x_norm, q / q_norm.clamp(min=1e-6)
    w = F.normalize(u + v, dim=-1, eps=1e-6)
    turned = x - 2 * (x * w).sum(-1, keepdim=True) * w + 2 * (x * u).sum(-1, keepdim=True) * v
    return turned * (q_norm / x_norm)  # type: ignore[no-any-return]


def quantize_given(
    x: Tensor, codebook: Tensor, indices: Tensor, mask: Tensor | None, *, estimator: Estimator
) -> Quantized:
    """What follows the search, in plain PyTorch: for codes (N,) chosen before, differentiable."""
    dtype = compute_type(x)
    codes, wide = F.embedding(indices, codebook.to(dtype)), x.to(dtype)
    moved = wide if estimator == "straight_through" else rotate(wide, codes.detach())
    quantized = (codes.detach() + (moved - moved.detach())).to(x.dtype)
    kept = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    used = (kept.sum() * x.shape[1]).clamp(min=1)
    counts = torch.zeros(codebook.shape[0], dtype=dtype, device=x.device).index_add(0, indices, kept.to(dtype))
    return Quantized(
        quantized=torch.where(kept[:, None], quantized, 0),
        indices=torch.where(kept, indices, -1),
        commitment=torch.where(kept[:, None], wide - codes.detach(), 0).square().sum() / used,
        codebook_error=torch.where(kept[:, None], wide.detach() - codes, 0).square().sum() / used,
        counts=counts,
    )


def quantize_reference(
    x: Tensor, codebook: Tensor, mask: Tensor | None, *, metric: Metric, estimator: Estimator
) -> Quantized:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    indices, _ = nearest_code_reference(x.detach(), codebook.detach(), metric=metric)
    return quantize_given(x, codebook, indices, mask, estimator=estimator)


lib.define(
    "vector_quantize(Tensor x, Tensor codebook, Tensor? mask, bool cosine, bool strict, int precision=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
lib.define(
    "vector_quantize_backward(Tensor grad_quantized, Tensor grad_error, Tensor x, Tensor quantized, Tensor? mask, "
    "bool rotation) -> Tensor"
)


@torch.library.register_fake("fastgen::vector_quantize", lib=lib)
def _(
    x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool, strict: bool, precision: int = 0
) -> tuple[Tensor, ...]:
    dtype = compute_type(x)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], dtype=torch.int64),
        x.new_empty((), dtype=dtype),
        x.new_empty(codebook.shape[0], dtype=dtype),
    )


@torch.library.register_fake("fastgen::vector_quantize_backward", lib=lib)
def _(grad_quantized: Tensor, grad_error: Tensor, x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


has_triton_kernels("vector_quantize", "vector_quantize_backward")


@quick_apply
class _VectorQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, codebook: Tensor, mask: Tensor | None, cosine: bool, strict: bool, precision: int, rotation: bool
    ) -> tuple[Tensor, ...]:
        quantized, indices, error, counts = torch.ops.fastgen.vector_quantize(
            x, codebook, mask, cosine, strict, precision
        )
        return quantized, indices, error, error.clone(), counts

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, codebook, mask, _, _, _, ctx.rotation = inputs
        quantized, indices, _, _, counts = output
        ctx.mark_non_differentiable(indices, counts)
        ctx.save_for_backward(x, quantized, indices, mask)
        ctx.num_codes, ctx.codebook_dtype = codebook.shape[0], codebook.dtype

    @staticmethod
    @first_order
    def backward(
        ctx: Any, grad_quantized: Tensor, _: Any, grad_commitment: Tensor, grad_codebook_error: Tensor, __: Any
    ) -> tuple[Tensor | None, ...]:
        x, quantized, indices, mask = ctx.saved_tensors
        grad_x = grad_codebook = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.fastgen.vector_quantize_backward(
                by_rows(grad_quantized), grad_commitment, x, quantized, mask, ctx.rotation
            )
        if ctx.needs_input_grad[1]:
            counts, sums = torch.ops.fastgen.code_statistics(quantized, x, indices, ctx.num_codes)
            used = (counts.sum() * x.shape[1]).clamp(min=1)
            grad_codebook = (sums * (2 * grad_codebook_error / used)).to(ctx.codebook_dtype)
        return grad_x, grad_codebook, None, None, None, None, None


def quantize(
    op: str,
    x: Tensor,
    codebook: Tensor,
    *,
    mask: Tensor | None = None,
    metric: Metric = "euclidean",
    estimator: Estimator = "straight_through",
    nonfinite: Literal["raise", "first"] | None = None,
    precision: Precision = "ieee",
    backend: str | None = None,
) -> Quantized:
    """`vector_quantize` with the parts of its loss and the code counts, for layers; `op` is named in errors.

    A bfloat16 x may come with a float32 codebook.
    """
    check_search(op, x, codebook, metric, nonfinite, precision, wide_codebook=True)
    if estimator not in ("straight_through", "rotation"):
        raise ValueError(f"{op}: estimator must be straight_through or rotation, got {estimator!r}")
    if mask is not None:
        check_tensor(op, "mask", mask)
        if mask.dtype != torch.bool or mask.shape != x.shape[:1] or mask.device != x.device:
            raise ValueError(
                f"{op}: mask must be bool ({x.shape[0]},) on {x.device}, "
                f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
            )
    strict = is_strict(x, nonfinite)
    chosen = resolve("vector_quantize", backend, x.device, x.dtype)
    if strict and chosen != "cpu":
        assert_finite(op, x.detach(), codebook.detach())
    if chosen == "reference":
        with without_autocast(x):
            return quantize_reference(x, codebook, mask, metric=metric, estimator=estimator)
    args = (
        by_rows(x), codebook.contiguous(), None if mask is None else mask.contiguous(), metric == "cosine", strict,
        PRECISIONS.index(precision),
    )  # fmt: skip
    with refused():
        if differentiates(x, codebook):
            return Quantized(*_VectorQuantize.apply(*args, estimator == "rotation"))  # type: ignore[no-untyped-call]
        quantized, indices, error, counts = torch.ops.fastgen.vector_quantize(*args)
    return Quantized(quantized, indices, error, error, counts)


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    beta: float = 0.25,
    mask: Tensor | None = None,
    metric: Metric = "euclidean",
    estimator: Estimator = "straight_through",
    nonfinite: Literal["raise", "first"] | None = None,
    precision: Precision = "ieee",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Replace each row by its nearest code, with the losses of a VQ-VAE.

    One search serves forward and backward; nothing of N x K elements is ever in memory, and x and its quantization are
    all that is saved.

    Parameters
    ----------
    x
        (N, D) float32, bfloat16 or float64; any strides.
    codebook
        (K, D), K >= 1, same dtype.
    beta
        Weight of the commitment loss, >= 0.
    mask
        (N,) bool: rows where it is False get zeros and index -1, and count in no loss.
    metric, nonfinite, precision, backend
        As in `nearest_code`.
    estimator
        How the gradient of `quantized` reaches x: "straight_through", or "rotation".

    Returns
    -------
    quantized (N, D), dtype of x; indices (N,) int64; loss (), float32 (float64 for float64): mean over the elements of
    (sg(x) - q)^2 + beta * (x - sg(q))^2, 0 where there are none.

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit, or values that are not finite: the message names the argument, what
        was expected and what came.
    BackendError
        An explicit backend that cannot run here.
    """
    op = "vector_quantize"
    if not is_finite(beta) or beta < 0:
        raise ValueError(f"{op}: beta must be finite and >= 0, got {beta!r}")
    dtype = x.dtype if isinstance(x, Tensor) else None
    x, codebook = widest(x, codebook)
    check_search(op, x, codebook, metric, nonfinite, precision)
    out = quantize(
        op, x, codebook, mask=mask, metric=metric, estimator=estimator, nonfinite=nonfinite, precision=precision,
        backend=backend,
    )  # fmt: skip
    return out.quantized.to(dtype), out.indices, out.codebook_error + beta * out.commitment
