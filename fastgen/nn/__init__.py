"""Layers with parameters: what training code imports."""

from fastgen.nn.causal_conv1d import CausalConv1d, WaveNetLayer
from fastgen.nn.masked_conv2d import GatedMaskedConv2d, GatedPixelCNNBlock, MaskedConv2d
from fastgen.nn.pixelsnail import CausalAttention2d, PixelSNAILBlock, PixelSNAILResidual
from fastgen.nn.residual_vq import GroupedResidualVQ, ResidualVQ
from fastgen.nn.upsample import StretchUpsample, TransposedUpsample
from fastgen.nn.vector_quantize import VectorQuantize
from fastgen.nn.vq_adapters import VectorQuantization, VectorQuantizer2

__all__ = [
    "CausalAttention2d",
    "CausalConv1d",
    "GatedMaskedConv2d",
    "GatedPixelCNNBlock",
    "GroupedResidualVQ",
    "MaskedConv2d",
    "PixelSNAILBlock",
    "PixelSNAILResidual",
    "ResidualVQ",
    "StretchUpsample",
    "TransposedUpsample",
    "VectorQuantization",
    "VectorQuantize",
    "VectorQuantizer2",
    "WaveNetLayer",
]
