"""Layers with parameters: what training code imports."""

from fastgen.nn.causal_conv1d import CausalConv1d, WaveNetLayer
from fastgen.nn.residual_vq import GroupedResidualVQ, ResidualVQ
from fastgen.nn.upsample import StretchUpsample, TransposedUpsample
from fastgen.nn.vector_quantize import VectorQuantize
from fastgen.nn.vq_adapters import VectorQuantization, VectorQuantizer2

__all__ = [
    "CausalConv1d",
    "GroupedResidualVQ",
    "ResidualVQ",
    "StretchUpsample",
    "TransposedUpsample",
    "VectorQuantization",
    "VectorQuantize",
    "VectorQuantizer2",
    "WaveNetLayer",
]
