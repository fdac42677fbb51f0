"""The modules of FrEIA: forward(x, c=[], rev=False, jac=True) on a list of one tensor -> ((out,), log_det).

Constructors take (dims_in, dims_c, ...), dims without the batch; log_det is (B,), of the direction that ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.ops.actnorm import actnorm
from fastgen.ops.affine_coupling import affine_coupling
from fastgen.ops.invertible_conv1x1 import mix_channels

Dims = Sequence[Sequence[int]]
Clamp = str | Callable[[Tensor], Tensor]
CLAMPS: dict[str, Callable[[Tensor], Tensor]] = {
    "ATAN": lambda u: 0.636 * torch.atan(u), "TANH": torch.tanh, "SIGMOID": lambda u: 2 * torch.sigmoid(u) - 1,
}  # fmt: skip


class _Module(nn.Module):
    """Checks of dimensions, and what FrEIA's graphs ask of a module."""

    def __init__(self, dims_in: Dims, dims_c: Dims | None) -> None:
        super().__init__()
        self.dims_in, self.dims_c = list(dims_in), list(dims_c or ())
        self.channels = int(self.dims_in[0][0])
        self.condition_length = sum(int(d[0]) for d in self.dims_c)
        for d in self.dims_c:
            if tuple(d[1:]) != tuple(self.dims_in[0][1:]):
                raise ValueError(
                    f"{type(self).__name__}: dims_c {tuple(d)} do not fit dims_in {tuple(self.dims_in[0])}"
                )

    def output_dims(self, input_dims: Dims) -> Dims:
        """Those of the input."""
        if len(input_dims) != 1:
            raise ValueError(f"{type(self).__name__}: takes one input, got {len(input_dims)}")
        return input_dims

    def _with(self, part: Tensor, c: Sequence[Tensor]) -> Tensor:
        if len(c) != len(self.dims_c):
            raise ValueError(f"{type(self).__name__}: c must hold {len(self.dims_c)} conditions, got {len(c)}")
        return torch.cat([part, *c], 1) if self.dims_c else part


class _Coupling(_Module):
    def __init__(
        self, dims_in: Dims, dims_c: Dims | None = None,
        subnet_constructor: Callable[[int, int], nn.Module] | None = None, clamp: float = 2.0,
        clamp_activation: Clamp = "ATAN", split_len: float | int = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(dims_in, dims_c)
        name = type(self).__name__
        if subnet_constructor is None:
            raise ValueError(f"{name}: subnet_constructor must be given, a function of (channels in, channels out)")
        size = round(self.channels * split_len) if isinstance(split_len, float) else split_len
        if not 0 <= size <= self.channels:
            raise ValueError(
                f"{name}: split_len must lie in [0, 1] or, whole, in [0, {self.channels}], got {split_len}"
            )
        if isinstance(clamp_activation, str) and clamp_activation not in CLAMPS:
            raise ValueError(f"{name}: clamp_activation must be one of {tuple(CLAMPS)}, got {clamp_activation!r}")
        self.split_len1, self.split_len2 = size, self.channels - size
        self.clamp = clamp
        self.f_clamp = CLAMPS[clamp_activation] if isinstance(clamp_activation, str) else clamp_activation
        self._build(subnet_constructor, size + self.condition_length, self.channels - size + self.condition_length)

    def _build(self, subnet: Callable[[int, int], nn.Module], first: int, second: int) -> None:
        """Make the subnets; those that see a half and the conditions take `first` or `second` channels."""
        raise NotImplementedError

    def _affine(self, x: Tensor, s: Tensor, t: Tensor, rev: bool, first: bool) -> tuple[Tensor, Tensor]:
        params = torch.cat([self.clamp * self.f_clamp(s), t], 1)
        return affine_coupling(x, params, scale="exp", inverse=rev, swap=first)

    def _halves(self, a: Tensor) -> tuple[Tensor, Tensor]:
        return a.chunk(2, 1)  # type: ignore[return-value]

    def _first(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        """Transform the first half of x by what the second says."""
        raise NotImplementedError

    def _second(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """[(B, C, *S)] -> ((the same shape,), log_det (B,))."""
        steps = (self._second, self._first) if rev else (self._first, self._second)
        y, one = steps[0](x[0], c, rev)
        y, two = steps[1](y, c, rev)
        return (y,), one + two


class GLOWCouplingBlock(_Coupling):
    """`FrEIA.modules.GLOWCouplingBlock`: both halves in turn, one subnet for scale and shift of each."""

    def _build(self, subnet: Callable[[int, int], nn.Module], first: int, second: int) -> None:
        self.subnet1 = subnet(first, 2 * self.split_len2)
        self.subnet2 = subnet(second, 2 * self.split_len1)

    def _first(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        a = self.subnet2(self._with(x[:, self.split_len1 :], c))
        return self._affine(x, *self._halves(a), rev, True)

    def _second(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        a = self.subnet1(self._with(x[:, : self.split_len1], c))
        return self._affine(x, *self._halves(a), rev, False)


class RNVPCouplingBlock(_Coupling):
    """`FrEIA.modules.RNVPCouplingBlock`: both halves in turn, a subnet for each scale and each shift."""

    def _build(self, subnet: Callable[[int, int], nn.Module], first: int, second: int) -> None:
        self.subnet_s1 = subnet(first, self.split_len2)
        self.subnet_t1 = subnet(first, self.split_len2)
        self.subnet_s2 = subnet(second, self.split_len1)
        self.subnet_t2 = subnet(second, self.split_len1)

    def _first(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        u = self._with(x[:, self.split_len1 :], c)
        return self._affine(x, self.subnet_s2(u), self.subnet_t2(u), rev, True)

    def _second(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        u = self._with(x[:, : self.split_len1], c)
        return self._affine(x, self.subnet_s1(u), self.subnet_t1(u), rev, False)


class NICECouplingBlock(_Coupling):
    """`FrEIA.modules.NICECouplingBlock`: both halves in turn, shifts alone. log_det is zeros (B,)."""

    def __init__(
        self, dims_in: Dims, dims_c: Dims | None = None,
        subnet_constructor: Callable[[int, int], nn.Module] | None = None, split_len: float | int = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(dims_in, dims_c, subnet_constructor, 0.0, "TANH", split_len)

    def _build(self, subnet: Callable[[int, int], nn.Module], first: int, second: int) -> None:
        self.F = subnet(second, self.split_len1)
        self.G = subnet(first, self.split_len2)

    def _first(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        shift = self.F(self._with(x[:, self.split_len1 :], c))
        return affine_coupling(x, shift, scale="none", inverse=rev, swap=True)

    def _second(self, x: Tensor, c: Sequence[Tensor], rev: bool) -> tuple[Tensor, Tensor]:
        shift = self.G(self._with(x[:, : self.split_len1], c))
        return affine_coupling(x, shift, scale="none", inverse=rev)


class AffineCouplingOneSided(_Coupling):
    """`FrEIA.modules.AffineCouplingOneSided`: the second half is transformed."""

    def _build(self, subnet: Callable[[int, int], nn.Module], first: int, second: int) -> None:
        self.subnet = subnet(first, 2 * self.split_len2)

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """[(B, C, *S)] -> ((the same shape,), log_det (B,))."""
        a = self.subnet(self._with(x[0][:, : self.split_len1], c))
        y, log_det = self._affine(x[0], *self._halves(a), rev, False)
        return (y,), log_det


class ActNorm(_Module):
    """`FrEIA.modules.ActNorm`: initialised by `init_data`, or the first batch that it sees."""

    def __init__(self, dims_in: Dims, dims_c: Dims | None = None, init_data: Tensor | None = None) -> None:
        super().__init__(dims_in, dims_c)
        shape = (1, self.channels, *(1,) * (len(self.dims_in[0]) - 1))
        self.scale = nn.Parameter(torch.zeros(shape))
        self.bias = nn.Parameter(torch.zeros(shape))
        self.init_on_next_batch = True
        if init_data is not None:
            self._initialise(init_data)

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        flat = x.movedim(1, 0).flatten(1)
        std = flat.std(1)
        if not bool((std > 0).all()):
            raise ValueError(f"ActNorm: channels {(~(std > 0)).nonzero().flatten().tolist()} have no variance")
        self.scale.copy_(-std.log().view_as(self.scale))
        self.bias.copy_((-flat.mean(1) / std).view_as(self.bias))
        self.init_on_next_batch = False

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """[(B, C, *S)] -> ([the same shape], log_det (B,))."""
        if self.init_on_next_batch:
            self._initialise(x[0])
        y, log_det = actnorm(x[0], self.scale.flatten(), self.bias.flatten(), inverse=rev)
        return [y], log_det

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.init_on_next_batch = False


class AllInOneBlock(_Module):
    """`FrEIA.modules.AllInOneBlock`: affine coupling, a global affine map and a fixed permutation or rotation.

    Not offered: gin_block, learned_householder_permutation.
    """

    def __init__(
        self, dims_in: Dims, dims_c: Dims | None = None,
        subnet_constructor: Callable[[int, int], nn.Module] | None = None, affine_clamping: float = 2.0,
        gin_block: bool = False, global_affine_init: float = 1.0, global_affine_type: str = "SOFTPLUS",
        permute_soft: bool = False, learned_householder_permutation: int = 0, reverse_permutation: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(dims_in, dims_c)
        name = type(self).__name__
        if subnet_constructor is None:
            raise ValueError(f"{name}: subnet_constructor must be given, a function of (channels in, channels out)")
        for option, value in (
            ("gin_block", gin_block), ("learned_householder_permutation", learned_householder_permutation),
        ):  # fmt: skip
            if value:
                raise ValueError(f"{name}: {option} is not offered, got {value!r}")
        init = global_affine_init
        starts: dict[str, Callable[[], float]] = {
            "SIGMOID": lambda: 2 - math.log(10 / init - 1),
            "SOFTPLUS": lambda: 2 * math.log(math.expm1(5 * init)),
            "EXP": lambda: math.log(init),
        }
        if global_affine_type not in starts:
            raise ValueError(f"{name}: global_affine_type must be one of {tuple(starts)}, got {global_affine_type!r}")
        self.clamp, self.global_affine_type = affine_clamping, global_affine_type
        self.reverse_permutation = reverse_permutation
        ones = (1,) * (len(self.dims_in[0]) - 1)
        self.global_scale = nn.Parameter(torch.full((1, self.channels, *ones), float(starts[global_affine_type]())))
        self.global_offset = nn.Parameter(torch.zeros(1, self.channels, *ones))
        if permute_soft:
            q, r = torch.linalg.qr(torch.randn(self.channels, self.channels, dtype=torch.float64))
            w = q * r.diagonal().sign()
            w[0] *= torch.linalg.det(w).sign()
        else:
            w = torch.eye(self.channels, dtype=torch.float64)[torch.randperm(self.channels)]
        w = w.float().reshape(self.channels, self.channels, *ones)
        self.w_perm = nn.Parameter(w, requires_grad=False)
        self.w_perm_inv = nn.Parameter(w.transpose(0, 1).contiguous(), requires_grad=False)
        kept = self.channels - self.channels // 2
        self.splits = [kept, self.channels // 2]
        self.subnet = subnet_constructor(kept + self.condition_length, 2 * (self.channels // 2))

    def forward(
        self, x: Sequence[Tensor], c: Sequence[Tensor] = (), rev: bool = False, jac: bool = True
    ) -> tuple[tuple[Tensor], Tensor]:
        """[(B, C, *S)] -> ((the same shape,), log_det (B,))."""
        y = x[0]
        w, inverse = (p.detach().flatten(1) for p in (self.w_perm, self.w_perm_inv))
        scale, offset = self._global_scale().flatten(), self.global_offset.flatten()
        zero = torch.zeros_like(offset)
        if rev:
            y = mix_channels(y, inverse / scale[:, None], -offset / scale)
        elif self.reverse_permutation:
            y = mix_channels(y, inverse, zero)
        a = self.subnet(self._with(y[:, : self.splits[0]], c))
        # a / 10 are scale and shift; the op bounds by clamp * tanh(s / clamp)
        factor = a.new_full((2, self.splits[1]), 0.1)
        factor[0] *= self.clamp
        a = a * factor.flatten().reshape(-1, *(1,) * (a.dim() - 2))
        y, log_det = affine_coupling(y, a, scale="tanh", bound=self.clamp, inverse=rev)
        if not rev:
            y = mix_channels(y, w * scale, (w * offset).sum(1))
        elif self.reverse_permutation:
            y = mix_channels(y, w, zero)
        of_scale = y.shape[2:].numel() * scale.log().sum()
        return (y,), log_det - of_scale if rev else log_det + of_scale

    def _global_scale(self) -> Tensor:
        if self.global_affine_type == "SIGMOID":
            return 10 * torch.sigmoid(self.global_scale - 2)
        if self.global_affine_type == "SOFTPLUS":
            return 0.1 * F.softplus(self.global_scale, beta=0.5)
        return self.global_scale.exp()
