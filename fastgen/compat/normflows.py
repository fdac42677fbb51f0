"""The layers of normflows: forward(z) is noise to data, inverse(z) data to noise; each returns (z, log_det).

log_det is (B,), or for layers that treat every example alike a number without dimensions, as there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.ops.actnorm import actnorm
from fastgen.ops.affine_coupling import affine_coupling
from fastgen.ops.invertible_conv1x1 import lu_inverse, lu_weight, mix_channels

SCALE_MAPS = ("exp", "sigmoid", "sigmoid_inv")
SPLIT_MODES = ("channel", "channel_inv", "checkerboard", "checkerboard_inv")


class AffineCoupling(nn.Module):
    """`normflows.flows.AffineCoupling`: on a list [z1, z2], of which the second is transformed.

    Parameters
    ----------
    param_map
        From z1 to shift and scale in turn along the channels; to the shift alone with scale=False.
    scale_map
        "exp", "sigmoid" (z2 is divided by sigmoid(s + 2)) or "sigmoid_inv" (multiplied by it).
    """

    def __init__(self, param_map: nn.Module, scale: bool = True, scale_map: str = "exp") -> None:
        super().__init__()
        if scale_map not in SCALE_MAPS:
            raise ValueError(f"AffineCoupling: scale_map must be one of {SCALE_MAPS}, got {scale_map!r}")
        self.param_map, self.scale, self.scale_map = param_map, scale, scale_map

    def forward(self, z: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """[z1, z2] -> [z1, z2'], log_det (B,)."""
        z2, log_det = self.transform(z[1], self.param_map(z[0]), z[1].shape[1], False)
        return [z[0], z2], log_det

    def inverse(self, z: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Undo `forward`."""
        z2, log_det = self.transform(z[1], self.param_map(z[0]), z[1].shape[1], True)
        return [z[0], z2], log_det

    def transform(
        self, z: Tensor, param: Tensor, channels: int, inverse: bool, swap: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Scale and shift the last of z's channels, with `swap` the first, by what `param_map` gave.

        Lists give z2 alone, all of whose channels are transformed; a block gives all of z.
        """
        wanted = 2 * channels if self.scale else channels
        if param.shape[1] != wanted:
            raise ValueError(f"{type(self).__name__}: param_map must give {wanted} channels, got {param.shape[1]}")
        if not self.scale:
            return affine_coupling(z, param, scale="none", inverse=inverse, swap=swap)
        if self.scale_map == "sigmoid":  # over the sigmoid: not among the op's scales
            param = torch.cat([-F.logsigmoid(param[:, 1::2] + 2), param[:, ::2]], 1)
            return affine_coupling(z, param, scale="exp", inverse=inverse, swap=swap)
        scale = "exp" if self.scale_map == "exp" else "sigmoid"
        return affine_coupling(z, param, scale=scale, layout="interleaved", inverse=inverse, swap=swap)


class AffineCouplingBlock(nn.Module):
    """`normflows.flows.AffineCouplingBlock`: split, `AffineCoupling`, merge.

    Parameters
    ----------
    param_map, scale, scale_map
        See `AffineCoupling`.
    split_mode
        "channel" (the second half is transformed), "channel_inv", "checkerboard" or "checkerboard_inv".
    """

    def __init__(
        self, param_map: nn.Module, scale: bool = True, scale_map: str = "exp", split_mode: str = "channel"
    ) -> None:
        super().__init__()
        if split_mode not in SPLIT_MODES:
            raise ValueError(f"AffineCouplingBlock: split_mode must be one of {SPLIT_MODES}, got {split_mode!r}")
        self.split_mode = split_mode
        # the coupling has the place in state_dict that it has there, between a split and a merge
        self.flows = nn.ModuleList([nn.Identity(), AffineCoupling(param_map, scale, scale_map), nn.Identity()])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, *S) -> the same shape, log_det (B,)."""
        return self._run(z, False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        return self._run(z, True)

    def _run(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        coupling: AffineCoupling = self.flows[1]  # type: ignore[assignment]
        if self.split_mode == "channel":
            kept = z[:, : (z.shape[1] + 1) // 2]
            return coupling.transform(z, coupling.param_map(kept), z.shape[1] // 2, inverse)
        if self.split_mode == "channel_inv":
            kept = z[:, (z.shape[1] + 1) // 2 :]
            return coupling.transform(z, coupling.param_map(kept), (z.shape[1] + 1) // 2, inverse, swap=True)
        if z.shape[-1] % 2:
            raise ValueError(f"AffineCouplingBlock: {self.split_mode} needs an even last size, got {tuple(z.shape)}")
        parity = torch.zeros((), dtype=torch.int64, device=z.device)
        for size in z.shape[1:]:
            parity = parity[..., None] + torch.arange(size, device=z.device)
        first = ((parity % 2 == 1) != (self.split_mode == "checkerboard_inv")).flatten()
        flat, half = z.flatten(1), (*z.shape[:-1], z.shape[-1] // 2)
        z1, z2 = flat[:, first].reshape(half), flat[:, ~first].reshape(half)
        z2, log_det = coupling.transform(z2, coupling.param_map(z1), z2.shape[1], inverse)
        merged = flat.index_copy(1, (~first).nonzero().flatten(), z2.flatten(1))
        return merged.reshape(z.shape), log_det


class MaskedAffineFlow(nn.Module):
    """`normflows.flows.MaskedAffineFlow`: z where the mask b is 1, z * exp(s(b * z)) + t(b * z) elsewhere.

    Parameters
    ----------
    b
        Of the shape of an example, zeros and ones.
    t, s
        Networks for shift and log-scale; None for zeros.
    """

    b: Tensor

    def __init__(self, b: Tensor, t: nn.Module | None = None, s: nn.Module | None = None) -> None:
        super().__init__()
        if not bool(((b == 0) | (b == 1)).all()):
            raise ValueError("MaskedAffineFlow: b must hold zeros and ones alone")
        self.register_buffer("b", b.view(1, *b.size()))
        self.s, self.t = s, t

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, *S) -> the same shape, log_det (B,)."""
        return self._run(z, False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        return self._run(z, True)

    def _run(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        kept = self.b * z
        params = torch.cat([torch.zeros_like(z) if net is None else net(kept) for net in (self.s, self.t)], 1)
        return affine_coupling(z, params, scale="exp", mask=self.b != 0, inverse=inverse)


class ActNorm(nn.Module):
    """`normflows.flows.ActNorm`, for shapes (C, 1, ...) or (C,).

    It is initialised by the first batch that it sees, in either direction, training or not, as there: the output has
    mean 0 and deviation 1 for each channel.
    """

    data_dep_init_done: Tensor

    def __init__(self, shape: int | tuple[int, ...], scale: bool = True, shift: bool = True) -> None:
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(n != 1 for n in shape[1:]) or not (scale and shift):
            raise ValueError(
                f"ActNorm: offered with scale and shift for shapes (C, 1, ...), got {shape}, {scale}, {shift}"
            )
        self.s = nn.Parameter(torch.zeros(shape)[None])
        self.t = nn.Parameter(torch.zeros(shape)[None])
        self.register_buffer("data_dep_init_done", torch.tensor(0.0))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, *S) -> the same shape, log_det ()."""
        return self._run(z, False)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        return self._run(z, True)

    def _run(self, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        if not bool(self.data_dep_init_done > 0):
            self._initialise(z, inverse)
        y, _ = actnorm(z, self.s.flatten(), self.t.flatten(), inverse=inverse)
        log_det = z.shape[2:].numel() * self.s.sum()
        return y, -log_det if inverse else log_det

    @torch.no_grad()
    def _initialise(self, z: Tensor, inverse: bool) -> None:
        flat = z.movedim(1, 0).flatten(1)
        mean, log_std = flat.mean(1), (flat.std(1) + 1e-6).log()
        self.s.copy_((log_std if inverse else -log_std).view_as(self.s))
        self.t.copy_((mean if inverse else -mean * (-log_std).exp()).view_as(self.t))
        self.data_dep_init_done.fill_(1.0)


class Invertible1x1Conv(nn.Module):
    """`normflows.flows.Invertible1x1Conv`: the inverse direction multiplies by W, as there.

    Parameters
    ----------
    num_channels
        C of the input (B, C, H, W).
    use_lu
        W = P L (U + diag(sign_S * exp(log_S))).
    """

    def __init__(self, num_channels: int, use_lu: bool = False) -> None:
        super().__init__()
        check_integer("Invertible1x1Conv", "num_channels", num_channels)
        self.num_channels, self.use_lu = num_channels, use_lu
        self.P: Tensor
        self.sign_S: Tensor
        rotation = torch.linalg.qr(torch.randn(num_channels, num_channels))[0]
        if not use_lu:
            self.W = nn.Parameter(rotation)
            return
        p, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("P", p)
        self.L = nn.Parameter(lower)
        self.register_buffer("sign_S", upper.diagonal().sign())
        self.log_S = nn.Parameter(upper.diagonal().abs().log())
        self.U = nn.Parameter(upper.triu(1))
        self.register_buffer("eye", torch.eye(num_channels))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> the same shape, log_det ()."""
        weight = lu_inverse(*self._factors()) if self.use_lu else torch.linalg.inv(self.W.double())
        return self._mix(z, weight), -self._log_det(z)

    def inverse(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        return self._mix(z, lu_weight(*self._factors()) if self.use_lu else self.W), self._log_det(z)

    def _factors(self) -> tuple[Tensor, ...]:
        return self.L, self.U, self.log_S, self.sign_S, self.P.argmax(1)

    def _log_det(self, z: Tensor) -> Tensor:
        log_det = self.log_S.sum() if self.use_lu else torch.linalg.slogdet(self.W)[1]
        return z.shape[2:].numel() * log_det

    def _mix(self, z: Tensor, weight: Tensor) -> Tensor:
        weight = weight.to(torch.promote_types(z.dtype, torch.float32))
        return mix_channels(z, weight, weight.new_zeros(self.num_channels))
