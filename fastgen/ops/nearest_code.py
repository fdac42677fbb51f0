"""The nearest code of each row of a matrix: the search of every vector quantizer.

    euclidean   k(x) = argmin_k |x - c_k|^2
    cosine      k(x) = argmax_k cos(x, c_k) = argmin_k |x / |x| - c_k / |c_k||^2

The cosine of a vector no longer than 1e-30 counts as 0. Among equals the lowest index. Distances do not change when the
origin does: both sides are measured from the mean of the codebook, so that data far from zero loses no digits.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import check, differentiates, refused, widest, without_autocast

Metric = Literal["euclidean", "cosine"]
Precision = Literal["ieee", "tf32", "bf16"]
PRECISIONS = ("ieee", "tf32", "bf16")
SCORES = 1 << 24  # of the reference, in memory at a time


def _scaled(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their largest value, whose squares float32 can hold; and that value (N, 1)."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    return x / torch.where(largest > 0, largest, 1), largest


def no_direction(x: Tensor) -> Tensor:
    """Rows so short that their cosines count as 0: (N, 1)."""
    scaled, largest = _scaled(x)
    return scaled.norm(dim=-1, keepdim=True) * largest <= 1e-30  # type: ignore[no-any-return]


def unit(x: Tensor) -> Tensor:
    """Rows scaled to length 1; those without direction become zero."""
    nothing, (scaled, _) = no_direction(x), _scaled(x)
    return torch.where(nothing, 0, scaled / torch.where(nothing, 1, scaled.norm(dim=-1, keepdim=True)))


def squared_distance(x: Tensor, codes: Tensor, metric: Metric) -> Tensor:
    """Row by row; for cosine 2 - 2 cos, from the difference of the unit vectors."""
    if metric == "euclidean":
        return (x - codes).square().sum(1)
    nothing = no_direction(x) | no_direction(codes)
    return torch.where(nothing[:, 0], 2, (unit(x) - unit(codes)).square().sum(1))


def nearest_code_reference(x: Tensor, codebook: Tensor, *, metric: Metric = "euclidean") -> tuple[Tensor, Tensor]:
    """The specification, in plain PyTorch: any device and dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, codebook = x.to(dtype), codebook.to(dtype)
    present = torch.isfinite(codebook.square().sum(1))  # others are never chosen
    codes = torch.where(present[:, None], codebook, 0)
    if metric == "cosine":
        codes, offset, rows = unit(codes), torch.zeros_like(codes[:, 0]), unit(x)
    else:
        mean = codes.sum(0) / present.sum().clamp(min=1)
        codes, rows = codes - mean, x - mean
        offset = codes.square().sum(1) / 2
    offset = torch.where(present, offset, torch.inf)
    step = x.shape[0] if torch.compiler.is_compiling() else max(1, SCORES // codebook.shape[0])
    indices = [(r @ codes.T - offset).argmax(1) for r in rows.split(max(step, 1))]
    index = torch.cat(indices)
    index = torch.where(torch.isfinite(rows).all(1), index, 0)
    distance = squared_distance(x, codebook[index], metric)
    return index, torch.where(torch.isfinite(distance), distance, torch.nan)


lib.define("nearest_code(Tensor x, Tensor codebook, bool cosine, bool strict, int precision=0) -> (Tensor, Tensor)")


@torch.library.register_fake("fastgen::nearest_code", lib=lib)
def _(x: Tensor, codebook: Tensor, cosine: bool, strict: bool, precision: int = 0) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.int64), x.new_empty(x.shape[0], dtype=compute_type(x))


has_triton_kernels("nearest_code")


def compute_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def by_rows(x: Tensor) -> Tensor:
    """As the kernels take a matrix: any distance between rows, none between the elements of one."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def check_search(
    op: str, x: Tensor, codebook: Tensor, metric: str, nonfinite: str | None, precision: str, *,
    wide_codebook: bool = False,
) -> None:  # fmt: skip
    """Raise on arguments that do not fit. With `wide_codebook`, a bfloat16 x may come with a float32 codebook."""
    check(op, "x", x, x, (None, None))
    wide = wide_codebook and x.dtype == torch.bfloat16 and codebook.dtype == torch.float32
    check(op, "codebook", codebook, x.float() if wide else x, (None, x.shape[1]))
    if x.shape[1] == 0:
        raise ValueError(f"{op}: x needs at least one coordinate, got {tuple(x.shape)}")
    if codebook.shape[0] == 0:
        raise ValueError(f"{op}: codebook needs at least one code, got {tuple(codebook.shape)}")
    if metric not in ("euclidean", "cosine"):
        raise ValueError(f"{op}: metric must be euclidean or cosine, got {metric!r}")
    if nonfinite not in (None, "raise", "first"):
        raise ValueError(f"{op}: nonfinite must be raise, first or None, got {nonfinite!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"{op}: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def is_strict(x: Tensor, nonfinite: str | None) -> bool:
    """Whether NaN is an error: by default where finding out does not make the host wait."""
    return x.device.type == "cpu" if nonfinite is None else nonfinite == "raise"


def assert_finite(op: str, x: Tensor, codebook: Tensor) -> None:
    """What the C++ kernels check, for the others."""
    for name, t in (("codebook", codebook), ("x", x)):
        finite = torch.isfinite(t.to(compute_type(t)).square().sum(1))
        if torch.compiler.is_compiling():
            torch._assert_async(finite.all(), f"{op}: {name} must be finite")
        elif t.device.type != "meta" and not bool(finite.all()):
            what = "code" if name == "codebook" else "row"
            raise ValueError(f"{op}: {name} must be finite, but {what} {int(finite.int().argmin())} is not")


def nearest_code(
    x: Tensor,
    codebook: Tensor,
    *,
    metric: Metric = "euclidean",
    nonfinite: Literal["raise", "first"] | None = None,
    precision: Precision = "ieee",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The nearest code of each row, and how far it is.

    On the CPU the code is the exact answer: none other is nearer in float64, and among equals the index is the lowest.
    On a GPU it is what float32 distances give. No matrix of N x K is ever in memory.

    Parameters
    ----------
    x
        (N, D) float32, bfloat16 or float64; any strides.
    codebook
        (K, D), K >= 1, same dtype.
    metric
        "euclidean", or "cosine": the largest cosine.
    nonfinite
        What a row with NaN or infinity gets: "raise", an error that names it; "first", code 0 and distance NaN, while
        such codes are never chosen. None: raise on the CPU, first elsewhere, where raising would make the host wait.
    precision
        What a GPU may round: "ieee", nothing that changes the answer (a scan in bfloat16 finds candidates, and rows
        whose candidates do not surely hold the nearest are measured against all codes); "tf32" or "bf16", the products
        of a scan whose leader is taken as it is, some 10 bits or 8 of each number. The CPU is exact whatever it may.
    backend
        See `fastgen.backend`.

    Returns
    -------
    indices (N,) int64; squared_distance (N,) float32 (float64 for float64), for cosine between the unit
    vectors, which is 2 - 2 cos. squared_distance is differentiable.

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit, or values that are not finite: the message names the argument, what
        was expected and what came.
    BackendError
        An explicit backend that cannot run here.
    """
    op = "nearest_code"
    x, codebook = widest(x, codebook)
    check_search(op, x, codebook, metric, nonfinite, precision)
    strict = is_strict(x, nonfinite)
    rows, codes = x.detach(), codebook.detach()
    chosen = resolve(op, backend, x.device, x.dtype)
    if strict and chosen != "cpu":
        assert_finite(op, rows, codes)
    if chosen == "reference":
        with without_autocast(x):
            index, distance = nearest_code_reference(rows, codes, metric=metric)
    else:
        with refused():
            index, distance = torch.ops.fastgen.nearest_code(
                by_rows(rows), codes.contiguous(), metric == "cosine", strict, PRECISIONS.index(precision)
            )
    if differentiates(x, codebook):
        found = squared_distance(x.to(distance.dtype), F.embedding(index, codebook).to(distance.dtype), metric)
        distance = torch.where(distance.isnan(), distance, found)
    return index, distance
