"""The variational autoencoder.

    z ~ N(0, 1),   x ~ p(x | z) by the decoder;   q(z | x) = N(mean, exp(log_deviation)^2) by the encoder

    elbo(x)     = E_q log p(x | z) - KL(q(z | x) || p(z))                                 <= log p(x)
    IWAE_k(x)   = E log 1/k sum_i p(x | z_i) p(z_i) / q(z_i | x)                          between the two, rising with k

Sources: Kingma and Welling, "Auto-Encoding Variational Bayes" (2014); Burda et al., "Importance Weighted Autoencoders"
(2016); Higgins et al., "beta-VAE" (2017); free bits: Kingma et al., "Improved Variational Inference with Inverse
Autoregressive Flow" (2016).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import (
    check_classes,
    check_generator,
    check_integer,
    check_temperature,
    check_tensor,
    is_finite,
    readable,
    under_autocast,
)
from fastgen.nn.conv2d import Conv2d, ConvTranspose2d
from fastgen.nn.linear import Linear
from fastgen.ops import distributions
from fastgen.ops.bernoulli_perceptron import bernoulli_perceptron
from fastgen.ops.gaussian_rsample_kl import gaussian_rsample_kl

DISTRIBUTIONS = ("bernoulli", "gaussian", "logistic")


def _mlp(inputs: int, hidden: int, layers: int, outputs: int) -> nn.Sequential:
    sizes = [inputs, *[hidden] * layers]
    modules: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        modules += [Linear(before, after), nn.ReLU()]
    return nn.Sequential(*modules, Linear(sizes[-1], outputs))


class _Residual(nn.Module):
    """x + conv3x3(silu(conv3x3(silu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))  # type: ignore[no-any-return]


def _conv_encoder(height: int, width: int, channels: int, hidden: int, outputs: int) -> nn.Sequential:
    """(B, H W) -> (B, outputs): the sides are halved twice, then a hidden layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, height, width)), Conv2d(1, channels, 4, 2, 1), _Residual(channels), nn.SiLU(),
        Conv2d(channels, 2 * channels, 4, 2, 1), _Residual(2 * channels), nn.SiLU(), nn.Flatten(),
        Linear(2 * channels * (height // 4) * (width // 4), hidden), nn.SiLU(), Linear(hidden, outputs),
    )  # fmt: skip


def _conv_decoder(height: int, width: int, channels: int, hidden: int, latent: int, outputs: int) -> nn.Sequential:
    """(B, latent) -> (B, H W outputs), the way back."""
    small = (2 * channels, height // 4, width // 4)
    return nn.Sequential(
        Linear(latent, hidden), nn.SiLU(), nn.Linear(hidden, math.prod(small)), nn.Unflatten(1, small),
        _Residual(2 * channels), nn.SiLU(), ConvTranspose2d(2 * channels, channels, 4, 2, 1), _Residual(channels),
        nn.SiLU(), ConvTranspose2d(channels, outputs, 4, 2, 1), nn.Flatten(2), _ToEnd(), nn.Flatten(),
    )  # fmt: skip


class _ToEnd(nn.Module):
    """(B, O, D) -> (B, D, O)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class VAE(nn.Module):
    """An encoder and a decoder of vectors, trained together.

    Parameters
    ----------
    inputs
        D, values of x.
    latent
        Z, values of z.
    hidden, layers
        Units and number of the hidden layers of the encoder and of the decoder, where those are not given.
    image_size, channels
        (height, width), multiples of 4: the inputs are the pixels of such an image, and encoder and decoder are
        convolutions of `channels`, then 2 `channels`, with one hidden layer before z. None: perceptrons.
    distribution
        Of x given z, for each value: "bernoulli" (x is 0 or 1), "gaussian" (x is any real number; the decoder gives
        mean and log scale of each value), or "logistic" (x is int64 in [0, levels); one discretised logistic).
    levels
        For "logistic".
    log_scale_min
        Lower limit of the log scales of "gaussian" and "logistic".
    beta
        Weight of the divergence in `loss`.
    free_bits
        Nats below which the divergence of a latent value, averaged over the batch, is not pushed further by `loss`.
    encoder, decoder
        Modules in place of the default ones: (B, D) float -> (B, 2 Z), means then log deviations; (B, Z) -> (B, D O),
        for each value of x its O parameters: 1 logit, or mean and log scale.

    Raises
    ------
    ValueError
        For a parameter outside its range; the message names it.
    """

    def __init__(
        self,
        inputs: int,
        latent: int = 40,
        hidden: int = 500,
        layers: int = 2,
        *,
        image_size: tuple[int, int] | None = None,
        channels: int = 24,
        distribution: str = "bernoulli",
        levels: int = 256,
        log_scale_min: float = -7.0,
        beta: float = 1.0,
        free_bits: float = 0.0,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, size, least in (
            ("inputs", inputs, 1), ("latent", latent, 1), ("hidden", hidden, 1), ("layers", layers, 0),
            ("levels", levels, 2), ("channels", channels, 1),
        ):  # fmt: skip
            check_integer("VAE", name, size, least)
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"VAE: distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
        for name, value in (("beta", beta), ("free_bits", free_bits)):
            if not is_finite(value) or value < 0:
                raise ValueError(f"VAE: {name} must be finite and >= 0, got {value!r}")
        if not is_finite(log_scale_min):
            raise ValueError(f"VAE: log_scale_min must be finite, got {log_scale_min!r}")
        if image_size is not None:
            if (
                not isinstance(image_size, tuple | list)
                or len(image_size) != 2
                or any(not isinstance(side, int) or side < 4 or side % 4 for side in image_size)
            ):
                raise ValueError(f"VAE: image_size must be two multiples of 4, got {image_size!r}")
            if math.prod(image_size) != inputs:
                raise ValueError(f"VAE: inputs must be the pixels of image_size {tuple(image_size)}, got {inputs}")
            image_size = (image_size[0], image_size[1])
        self.config: dict[str, Any] = {
            "image_size": image_size, "channels": channels, "inputs": inputs, "latent": latent,
            "hidden": hidden, "layers": layers, "distribution": distribution,
            "levels": levels, "log_scale_min": log_scale_min, "beta": beta, "free_bits": free_bits,
        }  # fmt: skip
        self.inputs, self.latent, self.levels = inputs, latent, levels
        self.distribution, self.log_scale_min = distribution, log_scale_min
        self.beta, self.free_bits = beta, free_bits
        self.outputs = 1 if distribution == "bernoulli" else 2
        if encoder is None:
            encoder = (
                _mlp(inputs, hidden, layers, 2 * latent)
                if image_size is None
                else _conv_encoder(*image_size, channels, hidden, 2 * latent)
            )
        own_decoder = decoder is None
        if decoder is None:
            decoder = (
                _mlp(latent, hidden, layers, inputs * self.outputs)
                if image_size is None
                else _conv_decoder(*image_size, channels, hidden, latent, self.outputs)
            )
        self.encoder, self.decoder = encoder, decoder
        self.perceptron = image_size is None and own_decoder

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, D) -> mean and log_deviation of q(z | x), (B, Z) each."""
        mean, log_deviation = self.encoder(self._features(self._check(x))).chunk(2, 1)
        return mean, log_deviation

    def decode(self, z: Tensor) -> Tensor:
        """z (B, Z) -> parameters (B, D, O) of p(x | z): O = 1 logit, or mean and log scale."""
        check_tensor("VAE", "z", z, f"(B, {self.latent})")
        if z.dim() != 2 or z.shape[1] != self.latent:
            raise ValueError(f"VAE: z must be (B, {self.latent}), got {tuple(z.shape)}")
        out: Tensor = self.decoder(z)
        if out.numel() != len(z) * self.inputs * self.outputs:
            wanted = (len(z), self.inputs * self.outputs)
            raise ValueError(f"VAE: decoder must map z to {wanted}, got {tuple(out.shape)}")
        return out.view(len(z), self.inputs, self.outputs)

    def elbo(self, x: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """A lower bound (B,) of log p(x) in nats, by one sample of z; for "gaussian" of the density.

        Parameters
        ----------
        x
            (B, D): see `distribution`; "bernoulli" takes 0 and 1 of any dtype.
        noise
            (B, Z) standard normal: z = mean + exp(log_deviation) * noise. By default drawn from PyTorch's generator.

        Raises
        ------
        TypeError, ValueError
            For x of another size or with other values; the message says what came.
        """
        x = self._check(x)
        z, kl = gaussian_rsample_kl(*self.encode(x), noise)
        return self._log_likelihood(x, z) - kl

    def loss(self, x: Tensor, *, noise: Tensor | None = None) -> Tensor:
        """What training minimises: the mean of -elbo, with `beta` and `free_bits`."""
        x = self._check(x)
        mean, log_deviation = self.encode(x)
        if self.free_bits == 0:
            z, kl = gaussian_rsample_kl(mean, log_deviation, noise)
            return (self.beta * kl - self._log_likelihood(x, z)).mean()
        # each latent value is a sample of its own, so that its divergence is known apart
        by_value = None if noise is None else noise.mT
        z, kl = gaussian_rsample_kl(mean.mT, log_deviation.mT, by_value)
        kl = (kl / max(len(x), 1)).clamp(min=self.free_bits).sum()
        return self.beta * kl - self._log_likelihood(x, z.mT).mean()

    def iwae_bound(self, x: Tensor, samples: int, *, noise: Tensor | None = None) -> Tensor:
        """The importance-weighted bound (B,) of log p(x) in nats, differentiable; `elbo` is that of one sample.

        Parameters
        ----------
        x
            (B, D), as in `elbo`.
        samples
            k, of z for each x.
        noise
            (k, B, Z) standard normal, drawn by default.
        """
        check_integer("VAE", "samples", samples)
        x = self._check(x)
        weights = self._log_weights(x, *self.encode(x), samples, noise)
        return torch.logsumexp(weights, 0) - math.log(samples)

    @torch.no_grad()
    def importance_log_prob(
        self, x: Tensor, samples: int, *, chunk: int = 50, generator: torch.Generator | None = None
    ) -> Tensor:
        """An estimate (B,) of log p(x) in nats, in expectation a lower bound that rises with `samples`.

        Parameters
        ----------
        x
            (B, D), as in `elbo`.
        samples
            Of z for each x, in all.
        chunk
            Of them at once: memory grows with it, and not with `samples`.
        generator
            Of the noise.
        """
        check_integer("VAE", "samples", samples)
        check_integer("VAE", "chunk", chunk)
        x = self._check(x)
        mean, log_deviation = self.encode(x)
        total = torch.full((len(x),), -math.inf, dtype=torch.promote_types(mean.dtype, torch.float32), device=x.device)
        for first in range(0, samples, chunk):
            k = min(chunk, samples - first)
            where = None if generator is None else generator.device
            noise = torch.randn(k, *mean.shape, generator=generator, dtype=mean.dtype, device=where).to(mean.device)
            weights = self._log_weights(x, mean, log_deviation, k, noise)
            total = torch.logaddexp(total, torch.logsumexp(weights, 0))
        return total - math.log(samples)

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        *,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw z, then x given z.

        Parameters
        ----------
        batch_size
            B, 0 or more.
        temperature
            > 0; of x given z.
        uniforms
            (B, D) in [0, 1), for x given z; (B, D, 2) for "gaussian" and "logistic".
        noise
            (B, Z), z itself.
        generator
            Of what is not given.

        Returns
        -------
        (B, D): int64 for "bernoulli" and "logistic", float32 for "gaussian".
        """
        check_integer("VAE", "batch_size", batch_size, 0)
        check_temperature("VAE", temperature)
        check_generator("VAE", generator)
        pair = () if self.distribution == "bernoulli" else (2,)
        device = next(self.parameters()).device
        where = device if generator is None else generator.device
        if noise is None:
            noise = torch.randn(batch_size, self.latent, generator=generator, device=where).to(device)
        if uniforms is None:
            uniforms = torch.rand(batch_size, self.inputs, *pair, generator=generator, device=where).to(device)
        for name, tensor, shape in (
            ("noise", noise, (batch_size, self.latent)), ("uniforms", uniforms, (batch_size, self.inputs, *pair)),
        ):  # fmt: skip
            check_tensor("VAE", name, tensor, str(shape))
            if tuple(tensor.shape) != shape:
                raise ValueError(f"VAE: {name} must be {shape}, got {tuple(tensor.shape)}")
        if uniforms.numel() and not 0 <= float(uniforms.min()) <= float(uniforms.max()) < 1:
            raise ValueError("VAE: uniforms must lie in [0, 1)")
        out = self.decode(noise.to(next(self.parameters()).dtype)).float()
        if self.distribution == "bernoulli":
            logits = torch.cat([torch.zeros_like(out), out], -1) / temperature
            return distributions.categorical_from_uniform(logits, uniforms)
        mean, log_scale = out[..., 0], out[..., 1].clamp(min=self.log_scale_min)
        u = uniforms[..., 1].double().clamp(1e-7, 1 - 1e-7)
        if self.distribution == "gaussian":
            normal: Tensor = torch.special.ndtri(u)
            return (mean + temperature * log_scale.exp() * normal).float()
        x = mean + temperature * log_scale.exp() * torch.logit(u)
        return ((x.clamp(-1, 1) + 1) * (self.levels - 1) / 2).round().long()

    def _log_weights(
        self, x: Tensor, mean: Tensor, log_deviation: Tensor, samples: int, noise: Tensor | None
    ) -> Tensor:
        """log p(x | z) p(z) / q(z | x), (k, B), for z by noise (k, B, Z)."""
        shape = (samples, *mean.shape)
        if noise is None:
            noise = torch.randn(shape, dtype=mean.dtype, device=mean.device)
        check_tensor("VAE", "noise", noise, str(shape))
        if tuple(noise.shape) != shape:
            raise ValueError(f"VAE: noise must be {shape}, got {tuple(noise.shape)}")
        z = mean + log_deviation.exp() * noise
        ratio = 0.5 * (noise.square() - z.square()) + log_deviation  # log p(z) - log q(z | x)
        ratio = ratio.to(torch.promote_types(ratio.dtype, torch.float32)).sum(-1)
        return self._log_likelihood(x, z.flatten(0, 1)).view(samples, len(x)) + ratio

    def _log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z) (N,) for z (N, Z), row n of row n mod B of x (B, D)."""
        if not torch.is_grad_enabled() and self.perceptron and self.distribution == "bernoulli":
            linear = [layer for layer in self.decoder.children() if isinstance(layer, nn.Linear)]
            if z.dtype == linear[0].weight.dtype and not under_autocast(z.device):
                weights, biases = [layer.weight for layer in linear], [layer.bias for layer in linear]
                return bernoulli_perceptron(z, x.to(z.dtype), weights, biases)
        x = x.repeat(len(z) // max(1, len(x)), 1)
        out = self.decode(z)
        out = out.to(torch.promote_types(out.dtype, torch.float32))
        if self.distribution == "logistic":
            out = torch.cat([torch.zeros_like(out[..., :1]), out], -1)  # one component
            x = self._features(x)
        log_p = distributions.log_prob(self.distribution, out, x, levels=self.levels, log_scale_min=self.log_scale_min)
        return log_p.sum(1)

    def _features(self, x: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        return x.to(dtype) * (2 / (self.levels - 1)) - 1 if self.distribution == "logistic" else x.to(dtype)

    def _check(self, x: Tensor) -> Tensor:
        check_tensor("VAE", "x", x, f"(B, {self.inputs})")
        if x.dim() != 2 or x.shape[1] != self.inputs:
            raise ValueError(f"VAE: x must be (B, {self.inputs}), got {tuple(x.shape)}")
        if self.distribution == "gaussian":
            if not x.is_floating_point():
                raise TypeError(f"VAE: x must be floating point for 'gaussian', got {x.dtype}")
            if readable(x) and not bool(torch.isfinite(x).all()):
                raise ValueError("VAE: x holds NaN or infinity")
        elif self.distribution == "logistic":
            if x.dtype != torch.int64:
                raise TypeError(f"VAE: x must be int64 levels for 'logistic', got {x.dtype}")
            check_classes("VAE", "x", x, self.levels)
        elif readable(x) and not bool(((x == 0) | (x == 1)).all()):
            wrong = x[(x != 0) & (x != 1)][0].item()
            raise ValueError(f"VAE: x must be 0 or 1, got {wrong:g}; binarise images first, e.g. torch.bernoulli(x)")
        return x
