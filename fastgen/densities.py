"""Toy densities in the plane, and the picture of a model of one."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from fastgen.checks import check_integer
from fastgen.files import whole_file

EXTENT = 4.0  # of the picture: [-EXTENT, EXTENT] in both directions; all densities lie within
CELLS = 200  # of the picture, each way
DRAWN = 2000  # samples in the picture


def _two_moons(n: int, u: Tensor, noise: Tensor) -> Tensor:
    angle, lower = math.pi * u[:, 0], u[:, 1] < 0.5
    x = torch.where(lower, 1 - torch.cos(angle), torch.cos(angle))
    y = torch.where(lower, 0.5 - torch.sin(angle), torch.sin(angle))
    return 1.6 * (torch.stack([x - 0.5, y - 0.25], 1) + 0.08 * noise)


def _rings(n: int, u: Tensor, noise: Tensor) -> Tensor:
    angle, radius = 2 * math.pi * u[:, 0], 1 + (3 * u[:, 1]).floor()
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1) + 0.08 * noise


def _checkerboard(n: int, u: Tensor, noise: Tensor) -> Tensor:
    column = (4 * u[:, 0]).floor()
    row = 2 * (2 * u[:, 1]).floor() + column % 2
    within = torch.stack([4 * u[:, 0] % 1, 2 * u[:, 1] % 1], 1)
    return 1.5 * (torch.stack([column, row], 1) + within - 2)


def _pinwheel(n: int, u: Tensor, noise: Tensor) -> Tensor:
    radius, across = 1.8 + 0.6 * noise[:, 0], 0.25 * noise[:, 1]
    angle = 2 * math.pi / 5 * (5 * u[:, 0]).floor() + 0.6 * radius
    return torch.stack(
        [radius * torch.cos(angle) - across * torch.sin(angle), radius * torch.sin(angle) + across * torch.cos(angle)],
        1,
    )


POINTS = 20000  # to train a flow on, and to evaluate it

DENSITIES: dict[str, Callable[[int, Tensor, Tensor], Tensor]] = {
    "two_moons": _two_moons, "rings": _rings, "checkerboard": _checkerboard, "pinwheel": _pinwheel,
}  # fmt: skip


def points_of(source: str | None) -> tuple[str | None, int]:
    """Density and seed of the points that a checkpoint's model was trained on; None where it was on images."""
    density, _, seed = (source or "").rpartition(" ")
    return (density, int(seed)) if density and seed.isdecimal() else (source, 0)


def draw(name: str, n: int, generator: torch.Generator | None = None) -> Tensor:
    """n points of a density, float32 (n, 2): "two_moons", "rings", "checkerboard" or "pinwheel".

    Raises
    ------
    ValueError
        For another name, or n below 1.
    """
    if name not in DENSITIES:
        raise ValueError(f"draw: name must be one of {', '.join(DENSITIES)}, got {name!r}")
    check_integer("draw", "n", n)
    return DENSITIES[name](n, torch.rand(n, 2, generator=generator), torch.randn(n, 2, generator=generator))


@torch.no_grad()
def save_density(
    path: str | os.PathLike[str],
    log_prob: Callable[[Tensor], Tensor],
    data: Tensor,
    samples: Tensor,
) -> None:
    """Write a PNG: points of the data, the model's density, samples of the model.

    Parameters
    ----------
    log_prob
        From points (n, 2), on the samples' device, to log-densities (n,) in nats.
    data, samples
        (n, 2); at most the first 2000 are shown.

    Raises
    ------
    ImportError
        Where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("save_density: needs matplotlib: pip install fastgen-kernels[demo]") from error
    center = (torch.arange(CELLS, device=samples.device) + 0.5) * (2 * EXTENT / CELLS) - EXTENT
    grid = torch.stack(torch.meshgrid(center, center, indexing="xy"), -1).reshape(-1, 2)
    density = torch.cat([log_prob(part) for part in grid.split(8192)]).exp().reshape(CELLS, CELLS).cpu().numpy()
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    box = (-EXTENT, EXTENT, -EXTENT, EXTENT)
    for axes, title, points in ((left, "data", data), (right, "samples of the model", samples)):
        axes.plot(*points[:DRAWN].cpu().mT.numpy(), ".", markersize=2, color="tab:blue")
        axes.set_title(title)
    middle.imshow(density, origin="lower", extent=box, cmap="viridis", interpolation="bilinear")
    middle.set_title("density of the model")
    for axes in (left, middle, right):
        axes.axis(box)
        axes.set_aspect("equal")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=100)
