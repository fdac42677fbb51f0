"""The systems, assembled from `fastgen.nn`."""

from fastgen.models.gated_pixelcnn import GatedPixelCNN
from fastgen.models.pixelcnn import PixelCNN
from fastgen.models.pixels import PixelModel, sample_naive
from fastgen.models.pixelsnail import PixelSNAIL
from fastgen.models.vqvae import VQVAE, VQVAE2
from fastgen.models.wavenet import WaveNet

__all__ = ["VQVAE", "VQVAE2", "GatedPixelCNN", "PixelCNN", "PixelModel", "PixelSNAIL", "WaveNet", "sample_naive"]
