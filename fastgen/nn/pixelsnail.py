"""Causal attention over raster order, and the block of a PixelSNAIL.

Source: Chen et al., "PixelSNAIL: An Improved Autoregressive Generative Model" (2018).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.nn.masked_conv2d import MaskedConv2d, check_input
from fastgen.ops.causal_attention import causal_attention
from fastgen.ops.pixel_program import PixelProgram


class CausalAttention2d(nn.Module):
    """Attention of each pixel to all pixels before it in raster order, and to a key and a value of zeros.

    Parameters
    ----------
    channels
        Of the input.
    key_channels, value_channels
        Of all heads together; multiples of heads.
    heads
        Number of heads.
    position_channels
        Channels of an input that enters keys and queries, such as where a pixel is; 0 for none.
    pixel_channels
        Channels of an input that enters keys and values, such as the pixels themselves; 0 for none.

    Shapes: forward(x (B, channels, H, W), position (B or 1, position_channels, H, W), pixel (B, pixel_channels, H, W))
    -> (B, value_channels, H, W).
    """

    def __init__(
        self, channels: int, key_channels: int, value_channels: int, heads: int = 1, position_channels: int = 0,
        pixel_channels: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        name = "CausalAttention2d"
        for label, size in (("channels", channels), ("heads", heads)):
            check_integer(name, label, size)
        for label, size in (("key_channels", key_channels), ("value_channels", value_channels)):
            check_integer(name, label, size)
            if size % heads:
                raise ValueError(f"{name}: heads must divide {label}, got {heads} for {size}")
        for label, size in (("position_channels", position_channels), ("pixel_channels", pixel_channels)):
            check_integer(name, label, size, 0)
        self.heads, self.position_channels, self.pixel_channels = heads, position_channels, pixel_channels
        self.query = MaskedConv2d(channels, key_channels, 1)
        self.key_value = MaskedConv2d(channels, key_channels + value_channels, 1)
        self.position = MaskedConv2d(position_channels, 2 * key_channels, 1, bias=False) if position_channels else None
        self.pixel = (
            MaskedConv2d(pixel_channels, key_channels + value_channels, 1, bias=False) if pixel_channels else None
        )

    def forward(self, x: Tensor, position: Tensor | None = None, pixel: Tensor | None = None) -> Tensor:
        check_input("CausalAttention2d", "position", position, self.position_channels, x)
        check_input("CausalAttention2d", "pixel", pixel, self.pixel_channels, x)
        query, key_value = self.query(x), self.key_value(x)
        if pixel is not None and self.pixel is not None:
            key_value = key_value + self.pixel(pixel)
        keys = query.shape[1]
        key, value = key_value[:, :keys], key_value[:, keys:]
        if position is not None and self.position is not None:
            for_query, for_key = self.position(position).chunk(2, 1)
            query, key = query + for_query, key + for_key
        # (B, heads, pixels, channels of a head)
        query, key, value = (t.flatten(2).unflatten(1, (self.heads, -1)).mT for t in (query, key, value))
        out = causal_attention(query, key, value, own=False)
        return out.mT.flatten(1, 2).unflatten(2, x.shape[2:])  # type: ignore[no-any-return]

    def emit(self, p: PixelProgram, x: int, position: int = -1) -> int:
        """Append the layer to a sampling program; position: the plane that begins with its channels."""
        for_query = for_key = -1
        if self.position is not None:
            for_query, for_key = (p.conv(position, w) for w in self.position.weight.chunk(2))
        query = self.query.emit(p, x, add=for_query)
        keys, bias = self.query.weight.shape[0], self.key_value.bias
        assert bias is not None

        def remember() -> tuple[int, int]:
            planes = []
            for rows, add in ((slice(None, keys), for_key), (slice(keys, None), -1)):
                if self.pixel is not None:
                    add = p.conv(p.input, self.pixel.weight[rows], add=add)
                planes.append(p.conv(x, self.key_value.weight[rows], bias[rows], add=add))
            return planes[0], planes[1]

        return p.attention(query, len(bias) - keys, self.heads, remember)


class PixelSNAILResidual(nn.Module):
    """ELU, masked convolution, ELU, masked convolution, first half times sigmoid of the second, added to the input.

    Shapes: forward(x (B, C, H, W), context (B, context_channels, H, W)) -> (B, C, H, W).
    """

    def __init__(self, channels: int, hidden: int, kernel_size: int, context_channels: int = 0) -> None:
        super().__init__()
        self.context_channels = context_channels
        self.first = MaskedConv2d(channels, hidden, kernel_size)
        self.second = MaskedConv2d(hidden, 2 * channels, kernel_size)
        self.context = MaskedConv2d(context_channels, 2 * channels, 1, bias=False) if context_channels else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_input("PixelSNAILResidual", "context", context, self.context_channels, x)
        u = self.second(F.elu(self.first(F.elu(x))))
        if context is not None and self.context is not None:
            u = u + self.context(context)
        return x + F.glu(u, 1)

    def emit(self, p: PixelProgram, x: int, context: int = -1, offset: int = 0) -> int:
        """Append the layer to a sampling program; context: the plane that holds its channels from `offset` on."""
        add = -1 if self.context is None else p.conv(context, self.context.weight, halves=2, offset=offset)
        u = p.elu(self.first.emit(p, p.elu(x)))
        return p.add(x, p.glu(self.second.emit(p, u, add=add, halves=2)))


class PixelSNAILBlock(nn.Module):
    """Residual masked convolutions, then attention, joined by a gated residual 1x1.

    Parameters
    ----------
    channels, hidden
        Of the input, and within the residual layers.
    residual_layers, kernel_size
        Their number and kernel.
    key_channels, value_channels, heads
        Of the attention.
    position_channels, pixel_channels, context_channels
        Of what tells positions, of the pixels themselves, and of the conditioning; 0 for none.

    Shapes: forward(x (B, C, H, W), position (B or 1, position_channels, H, W), pixel (B, pixel_channels, H, W), context
    (B, context_channels, H, W)) -> (B, C, H, W).
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        residual_layers: int,
        kernel_size: int,
        key_channels: int,
        value_channels: int,
        heads: int,
        position_channels: int = 0,
        pixel_channels: int = 0,
        context_channels: int = 0,
    ) -> None:
        super().__init__()
        check_integer("PixelSNAILBlock", "residual_layers", residual_layers, 0)
        self.residual = nn.ModuleList(
            PixelSNAILResidual(channels, hidden, kernel_size, context_channels) for _ in range(residual_layers)
        )
        self.attention = CausalAttention2d(
            channels, key_channels, value_channels, heads, position_channels, pixel_channels
        )
        self.own = MaskedConv2d(channels, channels, 1)
        self.attended = MaskedConv2d(value_channels, channels, 1, bias=False)
        self.out = MaskedConv2d(channels, 2 * channels, 1)

    def forward(
        self, x: Tensor, position: Tensor | None = None, pixel: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        for layer in self.residual:
            x = layer(x, context)
        u = self.own(F.elu(x)) + self.attended(F.elu(self.attention(x, position, pixel)))
        return x + F.glu(self.out(F.elu(u)), 1)

    def emit(self, p: PixelProgram, x: int, plane: int = -1) -> int:
        """Append the block to a sampling program; plane: of the position, and after it the context."""
        for layer in self.residual:
            assert isinstance(layer, PixelSNAILResidual)
            x = layer.emit(p, x, plane, self.attention.position_channels)
        attended = p.elu(self.attention.emit(p, x, plane))
        u = self.attended.emit(p, attended, add=self.own.emit(p, p.elu(x)))
        return p.add(x, p.glu(self.out.emit(p, p.elu(u), halves=2)))
