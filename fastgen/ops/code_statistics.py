"""Statistics of a codebook's use, and its moving average.

    counts_k = #{i : k_i = k},    sums_k = sum_{i : k_i = k} x_i

    cluster_size <- decay * cluster_size + (1 - decay) * counts
    embed_avg    <- decay * embed_avg    + (1 - decay) * sums
    n            =  sum_k cluster_size_k
    embed_k      <- embed_avg_k / (n * (cluster_size_k + eps) / (n + K * eps))        Laplace smoothing

Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), appendix A.1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import (
    check,
    check_integer,
    check_positive,
    check_target,
    check_tensor,
    count_writes,
    is_finite,
    refused,
)
from fastgen.ops.nearest_code import by_rows, compute_type


def code_statistics_reference(x: Tensor, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch: any device and dtype. A row of index -1 is left out."""
    dtype = compute_type(x)
    slot = torch.where(indices < 0, num_codes, indices)
    counts = torch.zeros(num_codes + 1, dtype=dtype, device=x.device)
    sums = torch.zeros(num_codes + 1, x.shape[1], dtype=dtype, device=x.device)
    counts = counts.index_add(0, slot, torch.ones_like(slot, dtype=dtype))
    return counts[:-1], sums.index_add(0, slot, x.to(dtype))[:-1]


lib.define("code_statistics(Tensor x, Tensor? minus, Tensor indices, int num_codes) -> (Tensor, Tensor)")
lib.define(
    "update_codebook(Tensor(a!) cluster_size, Tensor(b!) embed_avg, Tensor(c!) embed, Tensor counts, Tensor sums, "
    "float decay, float eps, bool cosine) -> ()"
)


@torch.library.register_fake("fastgen::code_statistics", lib=lib)
def _(x: Tensor, minus: Tensor | None, indices: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    dtype = compute_type(x)
    return x.new_empty(num_codes, dtype=dtype), x.new_empty(num_codes, x.shape[1], dtype=dtype)


@torch.library.register_fake("fastgen::update_codebook", lib=lib)
def _(*args: object) -> None:
    return None


has_triton_kernels("code_statistics")
has_triton_kernels("update_codebook")


def code_statistics(x: Tensor, indices: Tensor, num_codes: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """How many rows each code has, and their sum. Rows are summed in their order: the same bits every time.

    Parameters
    ----------
    x
        (N, D) float32, bfloat16 or float64; any strides.
    indices
        (N,) int64 in [0, num_codes), or -1 for a row that is left out. On a GPU, where looking would make the host
        wait, rows of any other index are left out too.
    num_codes
        K >= 1.
    backend
        See `fastgen.backend`.

    Returns
    -------
    counts (K,), sums (K, D), float32 (float64 for float64); without gradients.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.
    """
    op = "code_statistics"
    check(op, "x", x, x, (None, None))
    check_tensor(op, "indices", indices)
    check_integer(op, "num_codes", num_codes)
    if indices.dtype != torch.int64 or indices.shape != x.shape[:1]:
        raise ValueError(f"{op}: indices must be int64 ({x.shape[0]},), got {indices.dtype} {tuple(indices.shape)}")
    if indices.device != x.device:
        raise ValueError(f"{op}: indices is on {indices.device}, x is on {x.device}")
    x = x.detach()
    if resolve(op, backend, x.device, x.dtype) == "reference":
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and indices.numel():
            least, most = int(indices.min()), int(indices.max())
            if least < -1 or most >= num_codes:
                raise ValueError(f"{op}: indices must lie in [-1, {num_codes}), got {least} to {most}")
        return code_statistics_reference(x, indices, num_codes)
    with refused():
        return torch.ops.fastgen.code_statistics(by_rows(x), None, indices.contiguous(), num_codes)  # type: ignore[no-any-return]


def update_codebook_reference(
    cluster_size: Tensor, embed_avg: Tensor, counts: Tensor, sums: Tensor, decay: float, eps: float, cosine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification, in plain PyTorch -> new cluster_size, embed_avg, embed."""
    cluster_size = cluster_size.lerp(counts, 1 - decay)
    embed_avg = embed_avg.lerp(sums, 1 - decay)
    n = cluster_size.sum()
    embed = embed_avg / (n * (cluster_size + eps) / (n + len(cluster_size) * eps))[:, None]
    return cluster_size, embed_avg, F.normalize(embed, dim=1, eps=1e-6) if cosine else embed


def update_codebook_(
    cluster_size: Tensor,
    embed_avg: Tensor,
    embed: Tensor,
    counts: Tensor,
    sums: Tensor,
    *,
    decay: float,
    eps: float = 1e-5,
    cosine: bool = False,
    backend: str | None = None,
) -> None:
    """One step of the moving average, in place.

    Parameters
    ----------
    cluster_size, embed_avg, embed
        (K,), (K, D), (K, D) contiguous float32 or float64: the averages and the codebook; written to.
    counts, sums
        (K,), (K, D), as from `code_statistics`, same dtype.
    decay
        In [0, 1]: the share of the old averages.
    eps
        > 0, of Laplace smoothing.
    cosine
        Whether codes are scaled to unit length.
    backend
        See `fastgen.backend`.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.
    """
    op = "update_codebook"
    check(op, "embed", embed, embed, (None, None))
    if embed.dtype == torch.bfloat16:
        raise TypeError(f"{op}: embed must be float32 or float64, got {embed.dtype}")
    size = tuple(embed.shape)
    for name, tensor, shape in (
        ("cluster_size", cluster_size, size[:1]), ("embed_avg", embed_avg, size),
        ("counts", counts, size[:1]), ("sums", sums, size),
    ):  # fmt: skip
        check(op, name, tensor, embed, shape)
    for name, tensor in (("cluster_size", cluster_size), ("embed_avg", embed_avg), ("embed", embed)):
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")
    if not is_finite(decay) or not 0 <= decay <= 1:
        raise ValueError(f"{op}: decay must lie in [0, 1], got {decay!r}")
    check_positive(op, "eps", eps)
    written = (cluster_size, embed_avg, embed)
    with torch.no_grad():
        for name, tensor in zip(("cluster_size", "embed_avg", "embed"), written, strict=True):
            check_target(op, name, tensor)
        if embed is embed_avg:
            raise ValueError(f"{op}: embed and embed_avg must be two tensors, got one for both")
        if resolve(op, backend, embed.device, embed.dtype) == "reference":
            new = update_codebook_reference(cluster_size, embed_avg, counts, sums, decay, eps, cosine)
            seen = new[0].sum() != 0  # else the codes stay
            for to, value in zip(written, new, strict=True):
                to.copy_(torch.where(seen, value, to) if to is embed else value)
            return
        torch.ops.fastgen.update_codebook(
            cluster_size, embed_avg, embed, counts.contiguous(), sums.contiguous(), decay, eps, cosine
        )
        count_writes(*written)
