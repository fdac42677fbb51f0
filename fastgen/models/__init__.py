"""The systems, assembled from `fastgen.nn`."""

from fastgen.models.wavenet import WaveNet

__all__ = ["WaveNet"]
