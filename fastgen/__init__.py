"""Custom kernels for likelihood-based generative models in PyTorch."""

from fastgen import models, nn, ops
from fastgen.backend import BackendError, release_memory, use_backend

__version__ = "0.1.0"
__all__ = ["BackendError", "__version__", "models", "nn", "ops", "release_memory", "use_backend"]
