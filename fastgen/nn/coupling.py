"""Coupling layers: a network reads one part of the input and says how to scale and shift the other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastgen.checks import check_positive, check_tensor
from fastgen.ops.affine_coupling import SCALES, affine_coupling

CHECKERBOARDS = ("checkerboard", "checkerboard_inverse")


def checkerboard(size: tuple[int, int], inverse: bool = False, device: torch.device | None = None) -> Tensor:
    """Bool (1, H, W), true (passes through) where row + column is even, with `inverse` where it is odd."""
    rows, columns = (torch.arange(n, device=device) for n in size)
    return ((rows[:, None] + columns) % 2 == int(inverse))[None]


class AffineCoupling(nn.Module):
    """Affine coupling with any network as its conditioner.

    Parameters
    ----------
    net
        Maps the part that passes through, (B, C - C // 2, *S), to the unconstrained scale and shift of the other,
        (B, 2 * (C // 2), *S), scale first. With `mask`, x with zeros for what is transformed, (B, C, *S), to
        (B, 2 * C, *S). Called as net(part), or net(part, cond) where the layer is given `cond`.
    scale, bound
        See `fastgen.ops.affine_coupling`.
    mask
        None: the channels are split in halves, the last of which is transformed. "checkerboard" or
        "checkerboard_inverse", over the last two dimensions; or a tensor that broadcasts to x, true where x passes
        through.
    swap
        With halves: the first is transformed.
    """

    mask: Tensor | None

    def __init__(
        self, net: nn.Module, *, scale: str = "tanh", bound: float = 1.0, mask: Tensor | str | None = None,
        swap: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        name = type(self).__name__
        if not isinstance(net, nn.Module):
            raise TypeError(f"{name}: net must be a module, got {type(net).__name__}")
        if scale not in SCALES:
            raise ValueError(f"{name}: scale must be one of {SCALES}, got {scale!r}")
        check_positive(name, "bound", bound)
        if isinstance(mask, str):
            if mask not in CHECKERBOARDS:
                raise ValueError(f"{name}: mask must be one of {CHECKERBOARDS}, a tensor or None, got {mask!r}")
        elif mask is not None:
            check_tensor(name, "mask", mask)
        self.net, self.scale, self.bound, self.swap = net, scale, bound, swap
        self.board = mask if isinstance(mask, str) else None
        self.register_buffer("mask", mask.bool() if isinstance(mask, Tensor) else None)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, *S) -> the same shape, log_det (B,)."""
        return self.transform(x, self.parameters_of(self.passive(x), cond))

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        return self.transform(z, self.parameters_of(self.passive(z), cond), inverse=True)

    def transform(self, x: Tensor, params: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
        """Apply or undo the coupling with parameters that the conditioner gave."""
        mask = self._mask_for(x)
        return affine_coupling(
            x, params, scale=self.scale, bound=self.bound, mask=mask, inverse=inverse, swap=self.swap
        )

    def parameters_of(self, passive: Tensor, cond: Tensor | None) -> Tensor:
        """What the conditioner says, checked."""
        name = type(self).__name__
        params: Tensor = self.net(passive) if cond is None else self.net(passive, cond)
        check_tensor(name, "what net returns", params)
        half = passive.shape[1]
        wanted = (passive.shape[0], half if self.scale == "none" else 2 * half, *passive.shape[2:])
        if tuple(params.shape) != wanted:
            raise ValueError(f"{name}: net must map {tuple(passive.shape)} to {wanted}, got {tuple(params.shape)}")
        return params

    def passive(self, x: Tensor) -> Tensor:
        """What the conditioner reads."""
        name = type(self).__name__
        mask = self._mask_for(x)
        if mask is not None:
            return torch.where(mask, x, 0)
        if x.dim() < 2 or x.shape[1] % 2 or not x.shape[1]:
            raise ValueError(
                f"{name}: x needs an even number of channels to split in halves, got {tuple(x.shape)}; give a mask"
            )
        half = x.shape[1] // 2
        return x[:, half:] if self.swap else x[:, :half]

    def add_to_passive(self, grad: Tensor, more: Tensor) -> None:
        """Add the gradient of what `passive` gave, in place."""
        mask = self._mask_for(grad)
        if mask is not None:
            grad += torch.where(mask, more, 0)
            return
        half = grad.shape[1] // 2
        (grad[:, half:] if self.swap else grad[:, :half]).add_(more)

    def _mask_for(self, x: Tensor) -> Tensor | None:
        if self.board is None:
            return self.mask
        if x.dim() < 4:
            raise ValueError(
                f"{type(self).__name__}: mask={self.board!r} needs images (B, C, H, W), got {tuple(x.shape)}"
            )
        return checkerboard((x.shape[-2], x.shape[-1]), self.board != CHECKERBOARDS[0], x.device)


class AdditiveCoupling(AffineCoupling):
    """Additive coupling (NICE): the conditioner gives a shift alone, (B, C // 2, *S), and the log-det is zero.

    Parameters are those of `AffineCoupling`, less the scale's.
    """

    def __init__(self, net: nn.Module, *, mask: Tensor | str | None = None, swap: bool = False) -> None:
        super().__init__(net, scale="none", mask=mask, swap=swap)
