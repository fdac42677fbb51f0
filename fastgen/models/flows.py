"""What RealNVP and Glow share: dequantisation, likelihood, sampling, encoding and interpolation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_classes, check_generator, check_integer, check_tensor, is_finite, readable
from fastgen.nn.flow import MultiScale

MOST_LEVELS = 65536
CONTEXT = 32  # channels of a label's embedding
LEAST_ALPHA = 1e-6  # so that float32 tells 1 - alpha from 1


class FlowModel(nn.Module):
    """A normalizing flow of images or vectors, with a standard normal prior.

    Parameters
    ----------
    shape
        Of one example: (C, H, W), or (D,) for vectors.
    levels
        Values of the data: integers in [0, levels), which are dequantised by uniform noise; 0 for continuous data,
        the default for vectors. Images have 256 by default.
    classes
        Labels (B,) int64 in [0, classes) that every conditioner sees; 0 for none.
    alpha
        0, or in [1e-6, 0.5): with levels, values v in [0, 1) enter the flow as logit(alpha + (1 - 2 alpha) v), or where
        alpha is 0 as v - 1/2.
    """

    def __init__(self, shape: Sequence[int], *, levels: int | None, classes: int, alpha: float) -> None:
        super().__init__()
        name = self._name = type(self).__name__
        if not isinstance(shape, list | tuple | torch.Size) or len(shape) not in (1, 3):
            raise ValueError(f"{name}: shape must be (C, H, W) or (D,), got {shape!r}")
        for n in shape:
            check_integer(name, "each of shape", n)
        levels = (256 if len(shape) == 3 else 0) if levels is None else levels
        check_integer(name, "levels", levels, 0)
        check_integer(name, "classes", classes, 0)
        if levels == 1 or levels > MOST_LEVELS:
            raise ValueError(f"{name}: levels must be 0 (continuous) or lie in [2, {MOST_LEVELS}], got {levels}")
        if not is_finite(alpha) or not (alpha == 0 or LEAST_ALPHA <= alpha < 0.5):
            raise ValueError(f"{name}: alpha must be 0 or lie in [{LEAST_ALPHA:g}, 0.5), got {alpha!r}")
        self.shape, self.levels, self.classes, self.alpha = tuple(shape), levels, classes, float(alpha)
        self.dims = math.prod(shape)
        self.config: dict[str, Any] = {"shape": list(shape), "levels": levels, "classes": classes, "alpha": alpha}
        self.context = nn.Embedding(classes, CONTEXT) if classes else None
        self.flow: MultiScale

    @property
    def cond_channels(self) -> int:
        """Of the vector that every conditioner gets."""
        return CONTEXT if self.classes else 0

    def encode(
        self, x: Tensor, labels: Tensor | None = None, *, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """To the prior's space.

        Parameters
        ----------
        x
            (B, *shape): integers in [0, levels), or floating point where levels is 0.
        labels
            (B,) int64, for a model with classes.
        uniforms
            (B, *shape) in [0, 1), where in its level each value lies; default: 1/2, the middle.

        Returns
        -------
        z (B, D), all scales in a row; the log-density (B,) of what entered the flow, in nats, of the continuous values
        (with levels: scaled to a volume of 1 for each integer, so that its mean over uniforms is a lower bound of the
        integers' log-probability).
        """
        v, log_det = self._continuous(self._check(x), uniforms)
        parts, of_flow = self.flow(v, self._cond(len(x), labels))
        z = torch.cat([part.flatten(1) for part in parts], 1)
        kind = log_det.dtype
        log_p = -0.5 * (z.to(kind).square().sum(1) + self.dims * math.log(2 * math.pi))
        return z, log_p + log_det + of_flow

    def decode(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """From the prior's space (B, D): int64 (B, *shape) in [0, levels), or floating point where levels is 0.

        `decode(encode(x)[0])` is x within what float32 rounding leaves of it: with levels, x itself, unless the scales
        that the conditioners choose for it are so extreme that half a level is lost. ValueError where z leads to values
        that are not finite, as those of a model that has diverged.
        """
        check_tensor(self._name, "z", z)
        if z.dim() != 2 or z.shape[1] != self.dims:
            raise ValueError(f"{self._name}: z must have shape (B, {self.dims}), got {tuple(z.shape)}")
        sizes = self._part_shapes()
        parts = [
            part.reshape(len(z), *size)
            for part, size in zip(z.split([math.prod(s) for s in sizes], 1), sizes, strict=True)
        ]
        v, _ = self.flow.inverse(parts, self._cond(len(z), labels))
        return self._discrete(v)

    def log_prob(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Log-density (B,) in nats, float32; with levels, one estimate of a lower bound of the log-probability.

        x and labels as in `encode`; the uniforms that dequantise are drawn from `generator` where they are not given.
        """
        self._check(x)
        if self.levels and uniforms is None:
            check_generator(f"{self._name}.log_prob", generator)
            where = x.device if generator is None else generator.device
            uniforms = torch.rand(x.shape, generator=generator, device=where).to(x.device)
        return self.encode(x, labels, uniforms=uniforms)[1]

    def bits_per_dim(self, x: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        """-log2 p(x) over the number of values, (B,)."""
        return -self.log_prob(x, labels, **options) / (math.log(2) * self.dims)

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        *,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw from the model.

        Parameters
        ----------
        batch_size
            Number of examples.
        labels
            (B,) int64, for a model with classes.
        temperature
            >= 0; the prior's standard deviation.
        uniforms
            (B, D) in (0, 1), whose normal quantiles are the prior's draws; the same uniforms give the same sample.
            Normals are drawn from `generator` by default.

        Returns
        -------
        (B, *shape): int64 in [0, levels), or floating point where levels is 0.
        """
        name = f"{self._name}.sample"
        check_integer(name, "batch_size", batch_size, 0)
        if not is_finite(temperature) or temperature < 0:
            raise ValueError(f"{name}: temperature must be finite and >= 0, got {temperature!r}")
        parameter = next(self.parameters())
        if uniforms is None:
            check_generator(name, generator)
            where = parameter.device if generator is None else generator.device
            z = torch.randn(batch_size, self.dims, generator=generator, device=where, dtype=parameter.dtype)
            z = z.to(parameter.device)
        else:
            check_tensor(name, "uniforms", uniforms)
            if tuple(uniforms.shape) != (batch_size, self.dims):
                raise ValueError(
                    f"{name}: uniforms must have shape {(batch_size, self.dims)}, got {tuple(uniforms.shape)}"
                )
            if uniforms.numel() and not bool(((uniforms > 0) & (uniforms < 1)).all()):
                raise ValueError(
                    f"{name}: uniforms must lie in (0, 1), got {float(uniforms.min())} to {float(uniforms.max())}"
                )
            z = torch.special.ndtri(uniforms.double()).to(parameter)
        return self.decode(temperature * z, labels)

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int, labels: Tensor | None = None) -> Tensor:
        """From a to b (both (B, *shape)), straight in the prior's space -> (B, steps, *shape), ends included."""
        check_integer(f"{self._name}.interpolate", "steps", steps, 2)
        for name, x in (("a", a), ("b", b)):
            check_tensor(f"{self._name}.interpolate", name, x)
        if a.shape != b.shape:
            raise ValueError(
                f"{self._name}.interpolate: a and b must have one shape, got {tuple(a.shape)}, {tuple(b.shape)}"
            )
        ends = [self.encode(x, labels)[0] for x in (a, b)]
        weights = torch.linspace(0, 1, steps, device=a.device)[:, None].to(ends[0])
        between = torch.lerp(ends[0][:, None], ends[1][:, None], weights)  # (B, steps, D)
        repeated = None if labels is None else labels.repeat_interleave(steps)
        return self.decode(between.flatten(0, 1), repeated).reshape(len(a), steps, *self.shape)

    def _continuous(self, x: Tensor, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
        """What enters the flow, and the log-det (B,) of that."""
        parameter = next(self.parameters())
        kind = torch.promote_types(parameter.dtype, torch.float32)
        if not self.levels:
            return x, x.new_zeros(len(x), dtype=kind)
        if uniforms is None:
            u: Tensor | float = 0.5
        else:
            check_tensor(self._name, "uniforms", uniforms)
            if uniforms.shape != x.shape:
                raise ValueError(
                    f"{self._name}: uniforms must have shape {tuple(x.shape)}, got {tuple(uniforms.shape)}"
                )
            if uniforms.numel() and readable(uniforms) and not bool(((uniforms >= 0) & (uniforms < 1)).all()):
                low, high = float(uniforms.min()), float(uniforms.max())
                raise ValueError(f"{self._name}: uniforms must lie in [0, 1), got {low} to {high}")
            u = uniforms.to(parameter)
        v = (x.to(parameter.dtype) + u) / self.levels
        if self.alpha == 0:
            return v - 0.5, x.new_full((len(x),), -self.dims * math.log(self.levels), dtype=kind)
        p = self.alpha + (1 - 2 * self.alpha) * v
        logit = torch.logit(p)
        constant = self.dims * math.log((1 - 2 * self.alpha) / self.levels)
        return logit, (F.softplus(logit) + F.softplus(-logit)).flatten(1).to(kind).sum(1) + constant

    def _discrete(self, v: Tensor) -> Tensor:
        """Undo `_continuous`, to the integers."""
        if not self.levels:
            self._check_finite(v)
            return v
        v = v + 0.5 if self.alpha == 0 else (torch.sigmoid(v) - self.alpha) / (1 - 2 * self.alpha)
        self._check_finite(v)
        return (v * self.levels).floor().clamp(0, self.levels - 1).long()

    def _check_finite(self, v: Tensor) -> None:
        if not bool(torch.isfinite(v).all()):
            raise ValueError(f"{self._name}.decode: z leads to values that are not finite; has the model diverged?")

    def _part_shapes(self) -> list[tuple[int, ...]]:
        """Of each scale's z: half of what is left is factored out after every scale but the last."""
        scales = len(self.flow.flows)
        if len(self.shape) == 1:
            return [self.shape]
        channels, height, width = self.shape
        shapes: list[tuple[int, ...]] = []
        for i in range(scales):
            channels, height, width = 4 * channels, height // 2, width // 2
            if i < scales - 1:
                channels //= 2
            shapes.append((channels, height, width))
        return shapes

    def _cond(self, batch: int, labels: Tensor | None) -> Tensor | None:
        if (labels is None) != (self.context is None):
            wanted = "must be None: the model has no classes" if self.context is None else "must be given"
            raise ValueError(f"{self._name}: labels {wanted}")
        if self.context is None or labels is None:
            return None
        check_tensor(self._name, "labels", labels)
        if labels.dtype != torch.int64 or tuple(labels.shape) != (batch,):
            raise ValueError(f"{self._name}: labels must be int64 ({batch},), got {labels.dtype} {tuple(labels.shape)}")
        check_classes(self._name, "labels", labels, self.classes)
        return self.context(labels)  # type: ignore[no-any-return]

    def _check(self, x: Tensor) -> Tensor:
        check_tensor(self._name, "x", x)
        wanted = ("B", *self.shape)
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{self._name}: x must have shape {wanted}, got {tuple(x.shape)}")
        if not self.levels:
            if not x.is_floating_point():
                raise TypeError(f"{self._name}: x must be floating point, got {x.dtype}")
        else:
            if x.is_floating_point() or x.dtype == torch.bool:
                raise TypeError(f"{self._name}: x must be integers in [0, {self.levels}), got {x.dtype}")
            check_classes(self._name, "x", x, self.levels)
        return x


def check_scales(name: str, shape: Sequence[int], scales: int) -> None:
    """Each scale halves height and width."""
    check_integer(name, "scales", scales)
    if len(shape) == 1:
        if scales != 1:
            raise ValueError(f"{name}: scales must be 1 for vectors, got {scales}")
        if shape[0] < 2:
            raise ValueError(f"{name}: shape must be at least (2,), got {tuple(shape)}")
    elif shape[1] % 2**scales or shape[2] % 2**scales:
        raise ValueError(f"{name}: scales {scales} needs height and width divisible by {2**scales}, got {tuple(shape)}")
