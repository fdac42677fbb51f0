"""The operators: each module holds one, from its mathematics to its public function."""

from fastgen.ops.actnorm import actnorm
from fastgen.ops.affine_coupling import affine_coupling
from fastgen.ops.bernoulli_perceptron import bernoulli_perceptron
from fastgen.ops.causal_attention import causal_attention
from fastgen.ops.code_statistics import code_statistics, update_codebook_
from fastgen.ops.conv2d import conv2d
from fastgen.ops.gated_causal_conv1d import gated_causal_conv1d
from fastgen.ops.gated_masked_conv2d import gated_masked_conv2d
from fastgen.ops.gaussian_rsample_kl import gaussian_rsample_kl
from fastgen.ops.image_lstm import image_lstm
from fastgen.ops.invertible_conv1x1 import invertible_conv1x1, mix_channels
from fastgen.ops.linear import linear
from fastgen.ops.masked_conv2d import masked_conv2d
from fastgen.ops.nade import nade, nade_sample
from fastgen.ops.nearest_code import nearest_code
from fastgen.ops.pixel_program import PixelProgram
from fastgen.ops.pixelcnn_generate import PixelDistribution, PixelGenerator
from fastgen.ops.resampling_conv2d import downsample_conv2d, upsample_conv2d
from fastgen.ops.vector_quantize import vector_quantize
from fastgen.ops.wavenet_generate import GenerationState, Generator, WaveNetWeights, initial_state
from fastgen.ops.wavenet_layer import wavenet_layer

OPS = (
    "gated_causal_conv1d", "wavenet_layer", "wavenet_generate",
    "masked_conv2d", "gated_masked_conv2d", "conv2d", "downsample_conv2d", "upsample_conv2d",
    "pixelcnn_generate",
    "nearest_code", "vector_quantize", "code_statistics", "update_codebook",
    "affine_coupling", "actnorm", "invertible_conv1x1", "mix_channels", "nade",
    "gaussian_rsample_kl", "bernoulli_perceptron", "causal_attention", "linear", "image_lstm",
)  # fmt: skip

__all__ = [
    "OPS",
    "GenerationState",
    "Generator",
    "PixelDistribution",
    "PixelGenerator",
    "PixelProgram",
    "WaveNetWeights",
    "actnorm",
    "affine_coupling",
    "bernoulli_perceptron",
    "causal_attention",
    "code_statistics",
    "conv2d",
    "downsample_conv2d",
    "gated_causal_conv1d",
    "gated_masked_conv2d",
    "gaussian_rsample_kl",
    "image_lstm",
    "initial_state",
    "invertible_conv1x1",
    "linear",
    "masked_conv2d",
    "mix_channels",
    "nade",
    "nade_sample",
    "nearest_code",
    "update_codebook_",
    "upsample_conv2d",
    "vector_quantize",
    "wavenet_layer",
]
