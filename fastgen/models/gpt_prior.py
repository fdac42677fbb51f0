"""A small causal transformer over maps or sequences of codes.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), for the blocks; Esser et al.,
"Taming Transformers for High-Resolution Image Synthesis" (2021), for such a prior.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.models.stepwise import StepwiseModel


class GPTBlock(nn.Module):
    """Causal self-attention and a perceptron, each after a layer norm and with a residual connection; (B, T, C)."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.mlp_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor, cache: Tensor | None = None, t: int = 0) -> Tensor:
        """With a cache (2, B, heads, T, C / heads) of keys and values, x (B, 1, C) is at place t, which is filled."""
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, t], cache[1, :, :, t] = k[:, :, 0], v[:, :, 0]
            k, v = cache[:, :, :, : t + 1]
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None, dropout_p=dropout)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), dropout)
        return x + F.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))), dropout)


class GPTPrior(StepwiseModel):
    """A causal transformer over maps of codes, in raster order, or over sequences: maps of one row.

    Parameters
    ----------
    codes
        K, of which every place has one.
    image_size
        (height, width) of the maps, the same for all; (1, T) for sequences.
    channels, layers, heads
        Features of a place, blocks, and the heads of each block's attention; they divide channels.
    classes
        And all further options, such as cond_codes: see `PixelModel`.
    dropout
        In training, of attention and of each block's two outputs.

    Raises
    ------
    ValueError
        For a parameter outside its range; the message names it.
    """

    def __init__(
        self,
        codes: int = 512,
        image_size: tuple[int, int] = (8, 8),
        channels: int = 128,
        layers: int = 4,
        heads: int = 4,
        classes: int = 0,
        *,
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        name = "GPTPrior"
        sizes = {"channels": channels, "layers": layers, "heads": heads}
        for label, value in sizes.items():
            check_integer(name, label, value)
        check_integer(name, "codes", codes, 2)
        if not isinstance(image_size, tuple | list) or len(image_size) != 2:
            raise ValueError(f"{name}: image_size must be (height, width), got {image_size!r}")
        for side in image_size:
            check_integer(name, "each of image_size", side)
        if channels % heads:
            raise ValueError(f"{name}: heads must divide channels, got {heads} for {channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}: dropout must lie in [0, 1), got {dropout!r}")
        super().__init__(channels, codes=codes, classes=classes, **{"code_channels": channels} | options)
        for surplus in ("image_channels", "levels", "distribution"):
            self.config.pop(surplus)
        self.config |= {**sizes, "image_size": tuple(image_size), "dropout": dropout}
        self.image_size = (image_size[0], image_size[1])
        self.read = nn.Linear(self.inputs, channels)
        self.start = nn.Parameter(torch.zeros(channels))
        self.place = nn.Parameter(0.02 * torch.randn(image_size[0] * image_size[1], channels))
        self.context = nn.Linear(self.context_channels, channels) if self.context_channels else None
        self.blocks = nn.ModuleList(GPTBlock(channels, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)

    def trunk(self, e: Tensor, context: Tensor | None) -> Tensor:
        self.check_size(e.shape[2:])
        x = self.read(e.flatten(2).mT)  # (B, T, C)
        start = self.start.expand(len(x), 1, -1)
        x = torch.cat((start, x[:, :-1]), 1) + self.places(context)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mT.unflatten(2, self.image_size)  # type: ignore[no-any-return]

    def places(self, context: Tensor | None) -> Tensor:
        """What is known of each place beforehand, (B or 1, T, C)."""
        if self.context is None or context is None:
            return self.place[None]
        return self.place + self.context(context.expand(-1, -1, *self.image_size).flatten(2).mT)  # type: ignore[no-any-return]

    def check_size(self, size: tuple[int, ...]) -> None:
        """Raise on maps of another size."""
        if tuple(size) != self.image_size:
            raise ValueError(f"GPTPrior: maps must be {self.image_size}, as the model's image_size, got {tuple(size)}")

    def stepper(self, batch: int, size: tuple[int, int], context: Tensor | None) -> GPTSteps:
        self.check_size(size)
        return GPTSteps(self, batch, context)


class GPTSteps:
    """A `Stepper`: the keys and values of all places before are kept."""

    def __init__(self, model: GPTPrior, batch: int, context: Tensor | None) -> None:
        places, channels = model.place.shape
        heads = model.config["heads"]
        self.model, self.places = model, model.places(context)
        self.caches = [
            model.place.new_empty(2, batch, heads, places, channels // heads) for _ in range(len(model.blocks))
        ]
        self.before = model.start.expand(batch, -1)

    def features(self, i: int, j: int) -> Tensor:
        t = i * self.model.image_size[1] + j
        x = (self.before + self.places[:, t])[:, None]
        for block, cache in zip(self.model.blocks, self.caches, strict=True):
            x = block(x, cache, t)
        return self.model.norm(x)[:, 0]  # type: ignore[no-any-return]

    def put(self, i: int, j: int, e: Tensor) -> None:
        self.before = self.model.read(e)
