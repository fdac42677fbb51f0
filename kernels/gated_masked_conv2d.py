"""`gated_masked_conv2d`'s kernels are those of `masked_conv2d`: the gate is the end of the same product."""

from .masked_conv2d import gated_masked_conv2d

__all__ = ["gated_masked_conv2d"]
