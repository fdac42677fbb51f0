"""The systems, assembled from `fastgen.nn`."""

from fastgen.models.flows import FlowModel
from fastgen.models.fvsbn import FVSBN
from fastgen.models.gated_pixelcnn import GatedPixelCNN
from fastgen.models.glow import Glow
from fastgen.models.gpt_prior import GPTPrior
from fastgen.models.nade import NADE
from fastgen.models.pixelcnn import PixelCNN
from fastgen.models.pixelrnn import PixelRNN
from fastgen.models.pixels import PixelModel, sample_naive
from fastgen.models.pixelsnail import PixelSNAIL
from fastgen.models.realnvp import RealNVP
from fastgen.models.speech_vqvae import SpeechVQVAE
from fastgen.models.two_stage import TwoStage
from fastgen.models.vae import VAE
from fastgen.models.vectors import VectorModel
from fastgen.models.vqvae import VQVAE, VQVAE2
from fastgen.models.wavenet import WaveNet

__all__ = [
    "FVSBN",
    "NADE",
    "VAE",
    "VQVAE",
    "VQVAE2",
    "FlowModel",
    "GPTPrior",
    "GatedPixelCNN",
    "Glow",
    "PixelCNN",
    "PixelModel",
    "PixelRNN",
    "PixelSNAIL",
    "RealNVP",
    "SpeechVQVAE",
    "TwoStage",
    "VectorModel",
    "WaveNet",
    "sample_naive",
]
