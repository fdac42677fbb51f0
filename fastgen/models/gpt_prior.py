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
from fastgen.models.pixels import PixelModel
from fastgen.nn.linear import Linear
from fastgen.ops.causal_attention import causal_attention
from fastgen.ops.pixel_program import PixelProgram


class GPTBlock(nn.Module):
    """Causal self-attention and a perceptron, each after a layer norm and with a residual connection; (B, T, C)."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm, self.mlp_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = Linear(channels, 3 * channels), Linear(channels, channels)
        self.up, self.down = Linear(channels, 4 * channels), Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        if dropout:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            y = causal_attention(q, k, v)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), dropout)
        return x + F.dropout(self.down(F.gelu(self.up(self.mlp_norm(x)))), dropout)

    def emit(self, p: PixelProgram, x: int) -> int:
        """Append the block to a sampling program."""
        u, channels = p.norm(x, self.norm.weight, self.norm.bias), self.out.in_features
        query, key, value = (
            p.linear(u, *part) for part in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
        )
        y = p.attention(query, channels, self.heads, lambda: (key, value), own=True)
        x = p.linear(y, self.out.weight, self.out.bias, add=x)
        u = p.gelu(p.linear(p.norm(x, self.mlp_norm.weight, self.mlp_norm.bias), self.up.weight, self.up.bias))
        return p.linear(u, self.down.weight, self.down.bias, add=x)


class GPTPrior(PixelModel):
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
        self.read = Linear(self.inputs, channels)
        self.start = nn.Parameter(torch.zeros(channels))
        self.place = nn.Parameter(0.02 * torch.randn(image_size[0] * image_size[1], channels))
        self.context = Linear(self.context_channels, channels) if self.context_channels else None
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

    def plane(self, size: tuple[int, int], context: Tensor | None) -> Tensor:
        """What is added to a place's input: what is known of it, and the bias, or the first place's start."""
        self.check_size(size)
        first = torch.zeros_like(self.place)
        first[0] = self.start - self.read.bias
        return (self.places(context) + self.read.bias + first).mT.unflatten(2, size)  # type: ignore[no-any-return]

    def emit_trunk(self, p: PixelProgram, context: Tensor | None) -> int:
        x = p.linear(p.previous(p.input), self.read.weight, add=p.context)
        for block in self.blocks:
            assert isinstance(block, GPTBlock)
            x = block.emit(p, x)
        return p.norm(x, self.norm.weight, self.norm.bias)
