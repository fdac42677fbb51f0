"""Activation normalisation, initialised from the first batch that it sees in training."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.ops.actnorm import actnorm

LEAST_VARIANCE = 1e-13  # relative to the squared mean: below it a channel counts as constant in float32


class ActNorm(nn.Module):
    """A scale and a shift for each channel: y = x * exp(log_scale) + shift.

    The first batch in training gives each channel mean 0 and variance 1 there; under `torch.distributed` the batches of
    all ranks together do, so that ranks agree. A channel that is constant in them is only shifted, with a warning.

    Parameters
    ----------
    channels
        C of the input (B, C, *S).
    """

    initialized: Tensor
    correction = 0  # of the variance of the first batch

    def __init__(self, channels: int) -> None:
        super().__init__()
        check_integer("ActNorm", "channels", channels)
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self._ready = False  # the buffer was seen to hold True: a device is asked no more

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, *S) -> the same shape, log_det (B,)."""
        self.prepare(x)
        return actnorm(x, self.log_scale, self.shift)

    def inverse(self, z: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Undo `forward`."""
        return actnorm(z, self.log_scale, self.shift, inverse=True)

    def prepare(self, x: Tensor) -> None:
        """In training, and if it has not been done: set scale and shift from x."""
        if not self.training or self._ready:
            return
        if not bool(self.initialized):
            self._initialize(x)
        self._ready = bool(self.initialized)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != len(self.shift):
            raise ValueError(f"ActNorm: x must have shape (B, {len(self.shift)}, *S), got {tuple(x.shape)}")
        flat = x.detach().movedim(1, 0).flatten(1).double()
        mean, variance, count = flat.mean(1), flat.var(1, correction=0), flat.shape[1]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            moments = torch.cat([count * mean, count * (variance + mean.square()), mean.new_tensor([count])])
            moments = torch.where(torch.isfinite(moments), moments, 0) if count == 0 else moments
            dist.all_reduce(moments)
            total = moments[-1]
            mean, square = moments[:-1].chunk(2)
            mean, square = mean / total, square / total
            variance = square - mean.square()
        elif count == 0:
            return
        if self.correction and count > 1:
            variance = variance * (count / (count - self.correction))
        if not bool(torch.isfinite(variance).all()):
            raise ValueError("ActNorm: x holds NaN or infinity in the batch that initialises it")
        constant = variance <= LEAST_VARIANCE * mean.square() + torch.finfo(torch.float32).tiny
        if bool(constant.any()):
            which = constant.nonzero().flatten().tolist()
            warnings.warn(f"ActNorm: channels {which} are constant in the first batch: shifted only", stacklevel=3)
        scale = torch.where(constant, 1.0, variance).rsqrt()
        self.log_scale.copy_(scale.log())
        self.shift.copy_(-mean * scale)
        self.initialized.fill_(True)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ready = False
