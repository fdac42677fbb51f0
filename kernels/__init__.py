"""Triton kernels, installed as `fastgen.kernels`. Import them through that name only."""
