"""Layers with parameters: what training code imports."""

from fastgen.nn.causal_conv1d import CausalConv1d, WaveNetLayer
from fastgen.nn.upsample import StretchUpsample, TransposedUpsample

__all__ = ["CausalConv1d", "StretchUpsample", "TransposedUpsample", "WaveNetLayer"]
