"""A VQ-VAE of audio whose decoder is a WaveNet.

    z_e = encoder(x),   k = nearest codes of z_e,   p(x | k) = WaveNet(x; local conditioning c_k)

Source: van den Oord et al., "Neural Discrete Representation Learning" (2017), section 4.3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.audio import mu_law_decode
from fastgen.checks import check_classes, check_integer, check_tensor
from fastgen.models.wavenet import WaveNet
from fastgen.nn import Conv1d, VectorQuantize


class SpeechVQVAE(nn.Module):
    """One code for `downsample` samples of mu-law audio.

    Parameters
    ----------
    hidden_channels
        Width of the encoder: convolutions of 4 taps and stride 2, and two residual blocks.
    codebook_size, code_dim, downsample
        Codes K, features of each, and samples that share one, a power of 2 of at least 4.
    layers, cycles, residual_channels, skip_channels, kernel_size, classes
        Of the decoder: see `WaveNet`.
    commitment_weight, decay, kmeans_init, threshold_ema_dead_code
        As in `fastgen.nn.VectorQuantize`.
    """

    levels = 1

    def __init__(
        self,
        hidden_channels: int = 64,
        codebook_size: int = 128,
        code_dim: int = 32,
        downsample: int = 64,
        *,
        layers: int = 20,
        cycles: int = 2,
        residual_channels: int = 32,
        skip_channels: int = 64,
        kernel_size: int = 2,
        classes: int = 256,
        commitment_weight: float = 0.25,
        decay: float = 0.99,
        kmeans_init: bool = False,
        threshold_ema_dead_code: float = 0,
    ) -> None:
        super().__init__()
        sizes = {
            "hidden_channels": hidden_channels, "codebook_size": codebook_size, "code_dim": code_dim,
            "downsample": downsample,
        }  # fmt: skip
        for name, size in sizes.items():
            check_integer("SpeechVQVAE", name, size, {"downsample": 4, "codebook_size": 2}.get(name, 1))
        if downsample & (downsample - 1):
            raise ValueError(f"SpeechVQVAE: downsample must be a power of 2, got {downsample}")
        decoder: dict[str, Any] = {
            "layers": layers, "cycles": cycles, "residual_channels": residual_channels, "skip_channels": skip_channels,
            "kernel_size": kernel_size, "classes": classes,
        }  # fmt: skip
        quantizer: dict[str, Any] = {
            "commitment_weight": commitment_weight, "decay": decay, "kmeans_init": kmeans_init,
            "threshold_ema_dead_code": threshold_ema_dead_code,
        }  # fmt: skip
        self.config: dict[str, Any] = sizes | decoder | quantizer
        self.codebook_size, self.downsample, self.classes = codebook_size, downsample, classes
        halvings = downsample.bit_length() - 1
        parts: list[nn.Module] = []
        for i in range(halvings):
            parts += [nn.Conv1d(hidden_channels if i else 1, hidden_channels, 4, 2, 1), nn.ReLU()]
        self.encoder = nn.Sequential(*parts, _Residual(hidden_channels), _Residual(hidden_channels))
        self.to_codes = Conv1d(hidden_channels, code_dim, 1)
        self.quantizer = VectorQuantize(code_dim, codebook_size, rotation_trick=False, **quantizer)
        scales = (4,) * (halvings // 2) + (2,) * (halvings % 2)
        self.decoder = WaveNet(**decoder, local_channels=code_dim, upsample_scales=scales)

    def _quantized(self, x: Tensor, frozen: bool | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T) classes -> (B, code_dim, frames), codes (B, frames), loss."""
        self._check(x)
        wave = mu_law_decode(x, self.classes)[:, None].to(self.to_codes.weight.dtype)
        features = self.to_codes(self.encoder(wave)).mT
        quantized, codes, loss = self.quantizer(features, freeze_codebook=frozen)
        return quantized.mT, codes, loss

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T) int64 classes, T a multiple of downsample -> log p(x | codes) (B,) in nats, codes
        (B, T / downsample) int64, the quantizer's loss (); in training the codebook moves."""
        quantized, codes, loss = self._quantized(x, None)
        return self.decoder.log_prob(x, quantized), codes, loss

    def loss(self, x: Tensor) -> Tensor:
        """What training minimises, (): bits per sample given the codes, plus the quantizer's loss."""
        log_p, _, loss = self(x)
        return -log_p.mean() / (math.log(2) * x.shape[1]) + loss  # type: ignore[no-any-return]

    def elbo(self, x: Tensor) -> Tensor:
        """x (B, T) -> (B,) nats: log p(x | codes), less the constant divergence from the uniform prior."""
        log_p, codes, _ = self(x)
        return log_p - codes.shape[1] * math.log(self.codebook_size)  # type: ignore[no-any-return]

    def encode(self, x: Tensor) -> Tensor:
        """x (B, T) -> codes (B, T / downsample) int64; the codebook stays."""
        return self._quantized(x, True)[1]

    @torch.no_grad()
    def decode(self, codes: Tensor, **options: Any) -> Tensor:
        """codes (B, frames) int64 -> (B, frames * downsample) int64 classes, drawn; options as in `WaveNet.generate`:
        temperature, top_k, top_p, uniforms, generator, dtype, backend, progress."""
        check_tensor("SpeechVQVAE", "codes", codes, "(B, frames) of codes")
        if codes.dim() != 2 or codes.dtype != torch.int64 or not codes.shape[1]:
            raise ValueError(f"SpeechVQVAE: codes must be int64 (B, frames), got {codes.dtype} {tuple(codes.shape)}")
        check_classes("SpeechVQVAE", "codes", codes, self.codebook_size)
        local = self.quantizer.get_output_from_indices(codes).mT.to(next(self.decoder.parameters()).dtype)
        steps = codes.shape[1] * self.downsample
        return self.decoder.generate(steps, batch_size=len(codes), local=local, **options)

    sample = decode

    def _check(self, x: Tensor) -> None:
        check_tensor("SpeechVQVAE", "x", x, "(B, T) of classes")
        if x.dim() != 2 or x.dtype != torch.int64:
            raise ValueError(f"SpeechVQVAE: x must be int64 (B, T), got {x.dtype} {tuple(x.shape)}")
        if x.shape[1] % self.downsample or not x.shape[1]:
            raise ValueError(f"SpeechVQVAE: T must be a multiple of {self.downsample}, got {x.shape[1]}")
        check_classes("SpeechVQVAE", "x", x, self.classes)


class _Residual(nn.Module):
    """x + conv1(relu(conv3(relu(x)))), (B, C, T)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.out = Conv1d(channels, channels, 3, padding=1, relu=True), Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.conv(F.relu(x)))  # type: ignore[no-any-return]
