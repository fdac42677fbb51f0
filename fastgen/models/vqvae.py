"""VQ-VAE and VQ-VAE-2: images to maps of codes and back.

    z_e = encoder(x),   k = nearest codes of z_e,   x^ = decoder(c_k)
    -log p(x | k) = |x - x^|^2 / (2 variance) + D / 2 log(2 pi variance)
    ELBO(x) = log p(x | k) - KL,   KL = (number of codes of an image) * log K        under the uniform prior

The posterior is one-hot, so the KL term is a constant: it does not train anything, and is what a learned prior over the
codes improves on.

Source: van den Oord et al., "Neural Discrete Representation Learning" (2017); Razavi et al., "Generating Diverse
High-Fidelity Images with VQ-VAE-2" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_classes, check_integer, check_positive, check_tensor
from fastgen.nn import Conv2d, ConvTranspose2d, VectorQuantize


class Reconstruction(NamedTuple):
    """What the models return."""

    reconstruction: Tensor  # (B, C, H, W)
    codes: tuple[Tensor, ...]  # int64 (B, h, w) of each level, the top first
    loss: Tensor  # (), of the quantizers, 0 in evaluation


def perplexity(codes: Tensor, codebook_size: int) -> Tensor:
    """exp of the entropy of how often each code is used: between 1 and codebook_size; float32 ()."""
    p = torch.bincount(codes.reshape(-1), minlength=codebook_size).float() / max(codes.numel(), 1)
    return torch.exp(-torch.special.xlogy(p, p).sum())


class _Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, inner, 3, padding=1, relu=True)
        self.out = Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.conv(F.relu(x)))  # type: ignore[no-any-return]


def _residuals(channels: int, inner: int, layers: int) -> list[nn.Module]:
    return [*(_Residual(channels, inner) for _ in range(layers)), nn.ReLU()]


def _encoder(channels: int, hidden: int, inner: int, layers: int, halvings: int) -> nn.Sequential:
    """Each halving of the sides is a convolution of 4 x 4 with stride 2.

    An Identity stands where a ReLU of its own did: parameters keep their names in checkpoints.
    """
    parts: list[nn.Module] = []
    for i in range(halvings):
        last = i + 1 == halvings
        parts += [Conv2d(channels, hidden if last else hidden // 2, 4, 2, 1, relu=True), nn.Identity()]
        channels = hidden if last else hidden // 2
    return nn.Sequential(*parts, Conv2d(channels, hidden, 3, padding=1), *_residuals(hidden, inner, layers))


def _decoder(channels: int, out: int, hidden: int, inner: int, layers: int, halvings: int) -> nn.Sequential:
    parts: list[nn.Module] = [Conv2d(channels, hidden, 3, padding=1), *_residuals(hidden, inner, layers)]
    for i in range(halvings):
        last = i + 1 == halvings
        width = hidden if i == 0 else hidden // 2
        parts.append(ConvTranspose2d(width, out if last else hidden // 2, 4, 2, 1, relu=not last))
        parts += [] if last else [nn.Identity()]
    return nn.Sequential(*parts)


class CodedImages(nn.Module):
    """What both models share: sizes, checks, and the bound.

    Parameters
    ----------
    image_channels
        Channels C of the images.
    hidden_channels, residual_layers, residual_channels
        Width of encoder and decoder, their residual blocks, and the width inside a block.
    codebook_size, code_dim
        Codes K, and features of each.
    downsample
        A power of 2: one code, of the finest map, for downsample x downsample pixels.
    commitment_weight, decay
        Of the quantizer's loss, and of its moving averages.
    kmeans_init, threshold_ema_dead_code
        As in `fastgen.nn.VectorQuantize`.
    variance
        Of the decoder's Gaussian; the data's variance makes losses of different data comparable.
    """

    levels: int

    def __init__(
        self,
        image_channels: int = 3,
        hidden_channels: int = 128,
        residual_layers: int = 2,
        residual_channels: int = 32,
        codebook_size: int = 512,
        code_dim: int = 64,
        downsample: int = 4,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        kmeans_init: bool = False,
        threshold_ema_dead_code: float = 0,
        variance: float = 1.0,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        sizes = {
            "image_channels": image_channels, "hidden_channels": hidden_channels, "residual_layers": residual_layers,
            "residual_channels": residual_channels, "codebook_size": codebook_size, "code_dim": code_dim,
            "downsample": downsample,
        }  # fmt: skip
        least = {"residual_layers": 0, "downsample": 2}
        for name, value in sizes.items():
            check_integer(op, name, value, least.get(name, 1))
        if downsample & (downsample - 1):
            raise ValueError(f"{op}: downsample must be a power of 2, got {downsample}")
        if hidden_channels % 2:
            raise ValueError(f"{op}: hidden_channels must be even, got {hidden_channels}")
        check_positive(op, "variance", variance)
        quantizer = {
            "commitment_weight": commitment_weight, "decay": decay, "kmeans_init": kmeans_init,
            "threshold_ema_dead_code": threshold_ema_dead_code,
        }  # fmt: skip
        self.config: dict[str, Any] = {**sizes, **quantizer, "variance": variance}
        self.image_channels, self.codebook_size, self.variance = image_channels, codebook_size, variance
        self._build(
            lambda: VectorQuantize(code_dim, codebook_size, accept_image_fmap=True, rotation_trick=False, **quantizer),  # type: ignore[arg-type]
            (hidden_channels, residual_channels, residual_layers),
            downsample.bit_length() - 1,
        )

    def _build(self, quantizer: Callable[[], VectorQuantize], shape: tuple[int, int, int], halvings: int) -> None:
        raise NotImplementedError

    @property
    def factor(self) -> int:
        """What the sides of an image must be divisible by."""
        return int(self.config["downsample"]) << (self.levels - 1)

    def _check_images(self, x: Tensor) -> None:
        op = type(self).__name__
        check_tensor(op, "x", x, "of images")
        if x.dim() != 4 or x.shape[1] != self.image_channels or not x.is_floating_point():
            raise ValueError(
                f"{op}: x must be floating point (B, {self.image_channels}, H, W), got {x.dtype} {tuple(x.shape)}"
            )
        if x.shape[2] % self.factor or x.shape[3] % self.factor or 0 in x.shape[2:]:
            raise ValueError(f"{op}: H and W must be multiples of {self.factor}, got {x.shape[2]} x {x.shape[3]}")

    def _check_codes(self, name: str, codes: Tensor) -> None:
        op = type(self).__name__
        check_tensor(op, name, codes, "of codes")
        if codes.dim() != 3 or codes.dtype != torch.int64:
            raise ValueError(f"{op}: {name} must be int64 (B, h, w), got {codes.dtype} {tuple(codes.shape)}")
        check_classes(op, name, codes, self.codebook_size)

    def _looked_up(self, quantizer: VectorQuantize, codes: Tensor) -> Tensor:
        """In the dtype of the decoder: a codebook stays float32 in a module that is cast."""
        return quantizer.get_output_from_indices(codes).to(next(self.parameters()).dtype)

    def loss(self, x: Tensor) -> Tensor:
        """What training minimises, (): mean squared error over the variance, plus the quantizers' loss."""
        out = self(x)
        return F.mse_loss(out.reconstruction, x) / self.variance + out.loss  # type: ignore[no-any-return]

    def elbo(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B,) nats: log p(x | codes), a density, less the constant KL to the uniform prior."""
        out = self(x)
        log_p = self.log_likelihood(x, out.reconstruction)
        return log_p - sum(c.shape[1:].numel() for c in out.codes) * math.log(self.codebook_size)  # type: ignore[no-any-return]

    def log_likelihood(self, x: Tensor, reconstruction: Tensor) -> Tensor:
        """log p(x | codes) (B,) in nats, a density, of what the codes decode to."""
        squared = (x - reconstruction).square().flatten(1).sum(1)
        return -squared / (2 * self.variance) - x.shape[1:].numel() / 2 * math.log(2 * math.pi * self.variance)


class VQVAE(CodedImages):
    """One map of codes; the parameters are `CodedImages`'."""

    levels = 1

    def _build(self, quantizer: Callable[[], VectorQuantize], shape: tuple[int, int, int], halvings: int) -> None:
        code_dim = self.config["code_dim"]
        self.encoder = _encoder(self.image_channels, *shape, halvings)
        self.to_codes = Conv2d(shape[0], code_dim, 1)
        self.quantizer = quantizer()
        self.decoder = _decoder(code_dim, self.image_channels, *shape, halvings)

    def forward(self, x: Tensor) -> Reconstruction:
        """x (B, C, H, W), sides multiples of `factor` -> Reconstruction; in training the codebook moves."""
        self._check_images(x)
        quantized, codes, loss = self.quantizer(self.to_codes(self.encoder(x)))
        return Reconstruction(self.decoder(quantized), (codes,), loss)

    def encode(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> codes (B, H / downsample, W / downsample) int64; the codebook stays."""
        self._check_images(x)
        return self.quantizer(self.to_codes(self.encoder(x)), freeze_codebook=True)[1]  # type: ignore[no-any-return]

    def decode(self, codes: Tensor) -> Tensor:
        """codes (B, h, w) int64 -> (B, C, h * downsample, w * downsample)."""
        self._check_codes("codes", codes)
        return self.decoder(self._looked_up(self.quantizer, codes))  # type: ignore[no-any-return]


class VQVAE2(CodedImages):
    """Two maps of codes: a top one of half the sides, and a bottom one coded with the top one in view.

    The parameters are `CodedImages`'.
    """

    levels = 2

    def _build(self, quantizer: Callable[[], VectorQuantize], shape: tuple[int, int, int], halvings: int) -> None:
        hidden, code_dim = shape[0], self.config["code_dim"]
        self.bottom_encoder = _encoder(self.image_channels, *shape, halvings)
        self.top_encoder = _encoder(hidden, *shape, 1)
        self.to_top = Conv2d(hidden, code_dim, 1)
        self.top_quantizer = quantizer()
        self.top_decoder = _decoder(code_dim, code_dim, *shape, 1)
        self.to_bottom = Conv2d(code_dim + hidden, code_dim, 1)
        self.bottom_quantizer = quantizer()
        self.upsample_top = ConvTranspose2d(code_dim, code_dim, 4, 2, 1)
        self.decoder = _decoder(2 * code_dim, self.image_channels, *shape, halvings)

    def _code(self, x: Tensor, frozen: bool | None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]:
        self._check_images(x)
        features = self.bottom_encoder(x)
        top, top_codes, top_loss = self.top_quantizer(self.to_top(self.top_encoder(features)), freeze_codebook=frozen)
        joined = torch.cat((self.top_decoder(top), features), 1)
        bottom, bottom_codes, bottom_loss = self.bottom_quantizer(self.to_bottom(joined), freeze_codebook=frozen)
        return top, bottom, (top_codes, bottom_codes), top_loss + bottom_loss

    def _decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        return self.decoder(torch.cat((self.upsample_top(top), bottom), 1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Reconstruction:
        """x (B, C, H, W), sides multiples of `factor` -> Reconstruction; in training the codebooks move."""
        top, bottom, codes, loss = self._code(x, None)
        return Reconstruction(self._decode(top, bottom), codes, loss)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) -> top codes (B, h / 2, w / 2), bottom codes (B, h, w), int64; the codebooks stay."""
        return self._code(x, True)[2]

    def decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        """top (B, h / 2, w / 2), bottom (B, h, w) int64 -> (B, C, h * downsample, w * downsample)."""
        self._check_codes("top", top)
        self._check_codes("bottom", bottom)
        if (top.shape[0], 2 * top.shape[1], 2 * top.shape[2]) != tuple(bottom.shape):
            raise ValueError(
                f"VQVAE2: bottom must have twice the sides of top {tuple(top.shape)}, got {tuple(bottom.shape)}"
            )
        return self._decode(self._looked_up(self.top_quantizer, top), self._looked_up(self.bottom_quantizer, bottom))
