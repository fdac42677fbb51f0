"""The operators: each module holds one, from its mathematics to its public function."""

from fastgen.ops.gated_causal_conv1d import gated_causal_conv1d
from fastgen.ops.wavenet_generate import GenerationState, Generator, WaveNetWeights, initial_state
from fastgen.ops.wavenet_layer import wavenet_layer

OPS = ("gated_causal_conv1d", "wavenet_layer", "wavenet_generate")

__all__ = [
    "OPS",
    "GenerationState",
    "Generator",
    "WaveNetWeights",
    "gated_causal_conv1d",
    "initial_state",
    "wavenet_layer",
]
