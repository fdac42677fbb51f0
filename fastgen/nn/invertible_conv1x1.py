"""Invertible 1x1 convolution as a layer: in LU form, or a plain matrix; with an actnorm before it, folded in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen.checks import check_integer, permutation_fault
from fastgen.nn.actnorm import ActNorm
from fastgen.ops.actnorm import actnorm
from fastgen.ops.invertible_conv1x1 import invertible_conv1x1, lu_weight, mix_channels

LARGEST_CONDITION = 1e12
LARGEST_LOG = 80.0  # beyond it float32 has neither e^x nor its inverse


class InvertibleConv1x1(nn.Module):
    """Mix the channels of every pixel by an invertible matrix; a random rotation at first.

    Parameters
    ----------
    channels
        C of the input (B, C, *S).
    lu
        Parametrised by its LU factors, so that the log-determinant is a sum; else by the matrix itself, whose
        determinant (and in the inverse direction, inverse) is computed in float64 at every call.
    actnorm
        With an `ActNorm` of the input, computed as part of the same product.
    """

    sign: Tensor
    permutation: Tensor

    def __init__(self, channels: int, *, lu: bool = True, actnorm: bool = False) -> None:
        super().__init__()
        check_integer("InvertibleConv1x1", "channels", channels)
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        self.lu, kind = lu, torch.get_default_dtype()
        self.actnorm = ActNorm(channels) if actnorm else None
        if not lu:
            self.weight = nn.Parameter(rotation.to(kind))
            return
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1).to(kind))
        self.upper = nn.Parameter(upper.triu(1).to(kind))
        self.log_diagonal = nn.Parameter(diagonal.abs().log().to(kind))
        self.register_buffer("sign", diagonal.sign().to(kind))
        self.register_buffer("permutation", p.argmax(1))

    def matrix(self) -> Tensor:
        """The matrix (C, C), without the actnorm."""
        if not self.lu:
            return self.weight
        return lu_weight(*self._factors())

    def _factors(self) -> tuple[Tensor, ...]:
        return self.lower, self.upper, self.log_diagonal, self.sign, self.permutation

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, *S) -> the same shape, log_det (B,)."""
        if self.actnorm is not None:
            self.actnorm.prepare(x)
        return self._run(x, False)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        return self._run(z, True)

    def _run(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        norm = self.actnorm
        affine = (None, None) if norm is None else (norm.log_scale, norm.shift)
        if self.lu:
            return invertible_conv1x1(x, *self._factors(), *affine, inverse=inverse)
        kind = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.double()
        log_det = x.shape[2:].numel() * torch.linalg.slogdet(weight)[1].to(kind).expand(x.shape[0])
        zero = torch.zeros(len(weight), dtype=kind, device=x.device)
        if inverse:
            x = mix_channels(x, torch.linalg.inv(weight).to(kind), zero)
            if norm is None:
                return x, -log_det
            x, of_norm = actnorm(x, *affine, inverse=True)  # type: ignore[arg-type]
            return x, of_norm - log_det
        if norm is not None:
            x, of_norm = actnorm(x, *affine)  # type: ignore[arg-type]
            log_det = log_det + of_norm
        return mix_channels(x, weight.to(kind), zero), log_det

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        faults = self._faults({name: state_dict.get(prefix + name) for name in self.state_dict()})
        if faults:
            args[-1].extend(f"InvertibleConv1x1: {prefix}{fault}" for fault in faults)
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _faults(self, given: dict[str, Any]) -> list[str]:
        """What makes a loaded matrix singular; shapes are for PyTorch to compare."""
        expected = self.state_dict()
        loaded = {k: v for k, v in given.items() if isinstance(v, Tensor) and v.shape == expected[k].shape}
        faults = [f"{k} holds NaN or infinity" for k, v in loaded.items() if not bool(torch.isfinite(v).all())]
        if faults:
            return faults
        if "weight" in loaded and not float(torch.linalg.cond(loaded["weight"].double())) < LARGEST_CONDITION:
            faults.append("weight is of a singular matrix")  # or NaN, for zeros
        if "log_diagonal" in loaded and float(loaded["log_diagonal"].abs().max()) > LARGEST_LOG:
            faults.append(f"log_diagonal must lie within +-{LARGEST_LOG}, or the matrix is singular")
        if "sign" in loaded and not bool((loaded["sign"].abs() == 1).all()):
            faults.append("sign must hold 1 and -1 alone, or the matrix is singular")
        if "permutation" in loaded and (fault := permutation_fault(loaded["permutation"], len(self.lower))):
            faults.append(f"permutation {fault}")
        return faults
