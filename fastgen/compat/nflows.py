"""The layers of nflows: forward(inputs, context=None) -> (outputs, logabsdet), inverse likewise; data to noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.nn.actnorm import ActNorm as _ActNorm
from fastgen.ops.affine_coupling import affine_coupling
from fastgen.ops.invertible_conv1x1 import lu_inverse, lu_weight, mix_channels

LEAST_SCALE = 1e-3


def _default_scale(u: Tensor) -> Tensor:
    return torch.sigmoid(u + 2) + LEAST_SCALE


class AffineCouplingTransform(nn.Module):
    """`nflows.transforms.AffineCouplingTransform`: features where mask > 0 are scaled and shifted.

    Parameters
    ----------
    mask
        One-dimensional, of as many features as the inputs have, (B, D) or (B, D, H, W).
    transform_net_create_fn
        (identity features, outputs) -> the network, called as net(inputs, context); its outputs are shifts, then
        unconstrained scales.
    unconditional_transform
        Not offered.
    scale_activation
        From unconstrained to positive scales; default: sigmoid(u + 2) + 0.001.
    """

    identity_features: Tensor
    transform_features: Tensor
    parts = 2

    def __init__(
        self,
        mask: Tensor | Sequence[int],
        transform_net_create_fn: Callable[[int, int], nn.Module],
        unconditional_transform: Any = None,
        scale_activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        mask = torch.as_tensor(mask)
        if mask.dim() != 1 or not mask.numel():
            raise ValueError(f"{name}: mask must have one dimension and an entry, got {tuple(mask.shape)}")
        if unconditional_transform is not None:
            raise ValueError(f"{name}: unconditional_transform is not offered, got {unconditional_transform!r}")
        self.features = len(mask)
        self.register_buffer("identity_features", (mask <= 0).nonzero().flatten())
        self.register_buffer("transform_features", (mask > 0).nonzero().flatten())
        self.scale_activation = scale_activation or _default_scale
        kept, changed = len(self.identity_features), len(self.transform_features)
        self.transform_net = transform_net_create_fn(kept, self.parts * changed)
        # transformed features that come last, or first, are scaled where they lie
        first, last = torch.arange(changed), torch.arange(kept, self.features)
        self._swap = torch.equal(self.transform_features, first)
        self._in_place = self._swap or torch.equal(self.transform_features, last)

    @property
    def num_identity_features(self) -> int:
        """How many pass through."""
        return len(self.identity_features)

    @property
    def num_transform_features(self) -> int:
        """How many are transformed."""
        return len(self.transform_features)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, D) or (B, D, H, W) -> the same shape, logabsdet (B,)."""
        return self._run(inputs, context, False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        return self._run(inputs, context, True)

    def _run(self, inputs: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if inputs.dim() not in (2, 4) or inputs.shape[1] != self.features:
            raise ValueError(
                f"{type(self).__name__}: inputs must be (B, {self.features}) or (B, {self.features}, H, W), got "
                f"{tuple(inputs.shape)}"
            )
        params = self._params(self.transform_net(inputs[:, self.identity_features], context))
        scale = "exp" if self.parts == 2 else "none"
        if self._in_place:
            return affine_coupling(inputs, params, scale=scale, inverse=inverse, swap=self._swap)
        changed, log_det = affine_coupling(inputs[:, self.transform_features], params, scale=scale, inverse=inverse)
        outputs = inputs.index_copy(1, self.transform_features, changed)
        return outputs, log_det

    def _params(self, raw: Tensor) -> Tensor:
        shift, u = raw.chunk(2, 1)
        return torch.cat([self.scale_activation(u).log(), shift], 1)


class AdditiveCouplingTransform(AffineCouplingTransform):
    """`nflows.transforms.AdditiveCouplingTransform`: shifts alone."""

    parts = 1

    def _params(self, raw: Tensor) -> Tensor:
        return raw


class ActNorm(_ActNorm):
    """`nflows.transforms.ActNorm`; the first batch's deviation is the unbiased one, as there."""

    correction = 1

    def __init__(self, features: int) -> None:
        super().__init__(features)

    @property
    def scale(self) -> Tensor:
        """(features,), positive."""
        return self.log_scale.exp()


class LULinear(nn.Module):
    """`nflows.transforms.LULinear`: a linear map of vectors (B, D) in LU form, with a bias.

    Parameters
    ----------
    features
        D.
    using_cache
        Accepted, see `use_cache`.
    identity_init
        The identity at first, else random.
    eps
        Least entry of U's diagonal.
    """

    rank = 2

    def __init__(
        self, features: int, using_cache: bool = False, identity_init: bool = True, eps: float = LEAST_SCALE
    ) -> None:
        super().__init__()
        check_integer(type(self).__name__, "features", features)
        self.features, self.eps, self.using_cache = features, eps, using_cache
        entries, bound = features * (features - 1) // 2, 1 / math.sqrt(features)
        self.bias = nn.Parameter(torch.zeros(features))
        self.lower_entries = nn.Parameter(torch.zeros(entries))
        self.upper_entries = nn.Parameter(torch.zeros(entries))
        self.unconstrained_upper_diag = nn.Parameter(torch.full((features,), math.log(math.expm1(1 - eps))))
        if not identity_init:
            for p in (self.lower_entries, self.upper_entries, self.unconstrained_upper_diag):
                nn.init.uniform_(p, -bound, bound)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, D) -> the same shape, logabsdet (B,)."""
        factors, log_det = self._factors(inputs)
        weight = lu_weight(*factors)[:, self._order().argsort()]
        return mix_channels(inputs, weight, self.bias), log_det

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        factors, log_det = self._factors(inputs)
        weight = lu_inverse(*factors)[self._order().argsort()]
        bias = -(weight @ self.bias.double())
        return mix_channels(inputs, weight.to(inputs.dtype), bias.to(inputs.dtype)), -log_det

    def weight(self) -> Tensor:
        """The matrix (D, D), without the permutation of `OneByOneConvolution`."""
        return lu_weight(*self._matrices())

    def weight_inverse(self) -> Tensor:
        """Its inverse."""
        return lu_inverse(*self._matrices()).to(self.bias.dtype)

    def logabsdet(self) -> Tensor:
        """Log of its absolute determinant, ()."""
        return self.upper_diag.log().sum()

    def weight_and_logabsdet(self) -> tuple[Tensor, Tensor]:
        """Both."""
        return self.weight(), self.logabsdet()

    def weight_inverse_and_logabsdet(self) -> tuple[Tensor, Tensor]:
        """Both; the log-determinant is the matrix's, not its inverse's."""
        return self.weight_inverse(), self.logabsdet()

    @property
    def upper_diag(self) -> Tensor:
        """Diagonal (D,) of U."""
        return F.softplus(self.unconstrained_upper_diag) + self.eps

    def use_cache(self, mode: bool = True) -> None:
        """Accepted; the matrix is assembled at every call, which costs microseconds."""
        self.using_cache = mode

    def _order(self) -> Tensor:
        return torch.arange(self.features, device=self.bias.device)

    def _factors(self, inputs: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        if inputs.dim() != self.rank or inputs.shape[1] != self.features:
            wanted = ("B", self.features, "H", "W")[: self.rank]
            raise ValueError(f"{type(self).__name__}: inputs must have shape {wanted}, got {tuple(inputs.shape)}")
        matrices = self._matrices()
        return matrices, (inputs.shape[2:].numel() * self.logabsdet()).expand(len(inputs))

    def _matrices(self) -> tuple[Tensor, ...]:
        below = torch.tril_indices(self.features, self.features, -1, device=self.bias.device)
        above = torch.triu_indices(self.features, self.features, 1, device=self.bias.device)
        zero = self.bias.new_zeros(self.features, self.features)
        lower = zero.index_put((below[0], below[1]), self.lower_entries)
        upper = zero.index_put((above[0], above[1]), self.upper_entries)
        log_diagonal = self.upper_diag.log()
        identity = torch.arange(self.features, device=self.bias.device)
        return lower, upper, log_diagonal, torch.ones_like(log_diagonal), identity


class _RandomPermutation(nn.Module):
    _permutation: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("_permutation", torch.randperm(features))


class OneByOneConvolution(LULinear):
    """`nflows.transforms.OneByOneConvolution`: a fixed random permutation, then `LULinear`, at every pixel.

    Parameters are those of `LULinear`; inputs (B, C, H, W).
    """

    rank = 4

    def __init__(self, num_channels: int, using_cache: bool = False, identity_init: bool = True) -> None:
        super().__init__(num_channels, using_cache, identity_init)
        self.permutation = _RandomPermutation(num_channels)

    def _order(self) -> Tensor:
        return self.permutation._permutation
