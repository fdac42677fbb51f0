"""Layers with parameters: what training code imports."""

from fastgen.nn.actnorm import ActNorm
from fastgen.nn.causal_conv1d import CausalConv1d, WaveNetLayer
from fastgen.nn.conditioners import ConvConditioner, MLPConditioner, ResidualConditioner
from fastgen.nn.conv2d import Conv1d, Conv2d, ConvTranspose2d
from fastgen.nn.coupling import AdditiveCoupling, AffineCoupling, checkerboard
from fastgen.nn.flow import FlowSequence, MultiScale, Permutation, Split, Squeeze
from fastgen.nn.invertible_conv1x1 import InvertibleConv1x1
from fastgen.nn.linear import Linear
from fastgen.nn.masked_conv2d import GatedMaskedConv2d, GatedPixelCNNBlock, MaskedConv2d
from fastgen.nn.pixel_lstm import DiagonalBiLSTM, RowLSTM
from fastgen.nn.pixelsnail import CausalAttention2d, PixelSNAILBlock, PixelSNAILResidual
from fastgen.nn.residual_vq import GroupedResidualVQ, ResidualVQ
from fastgen.nn.upsample import StretchUpsample, TransposedUpsample
from fastgen.nn.vector_quantize import VectorQuantize
from fastgen.nn.vq_adapters import VectorQuantization, VectorQuantizer2

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "CausalAttention2d",
    "CausalConv1d",
    "Conv1d",
    "Conv2d",
    "ConvConditioner",
    "ConvTranspose2d",
    "DiagonalBiLSTM",
    "FlowSequence",
    "GatedMaskedConv2d",
    "GatedPixelCNNBlock",
    "GroupedResidualVQ",
    "InvertibleConv1x1",
    "Linear",
    "MLPConditioner",
    "MaskedConv2d",
    "MultiScale",
    "Permutation",
    "PixelSNAILBlock",
    "PixelSNAILResidual",
    "ResidualConditioner",
    "ResidualVQ",
    "RowLSTM",
    "Split",
    "Squeeze",
    "StretchUpsample",
    "TransposedUpsample",
    "VectorQuantization",
    "VectorQuantize",
    "VectorQuantizer2",
    "WaveNetLayer",
    "checkerboard",
]
