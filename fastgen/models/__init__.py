"""The systems, assembled from `fastgen.nn`."""

from fastgen.models.vqvae import VQVAE, VQVAE2
from fastgen.models.wavenet import WaveNet

__all__ = ["VQVAE", "VQVAE2", "WaveNet"]
