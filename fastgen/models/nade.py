"""NADE, the neural autoregressive distribution estimator.

Source: Larochelle and Murray, "The Neural Autoregressive Distribution Estimator" (2011).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.models.vectors import VectorModel
from fastgen.ops.nade import nade, nade_sample


class NADE(VectorModel):
    """A hidden layer for each input, of the inputs before it; all share their weights.

    Parameters
    ----------
    inputs, values, order
        See `VectorModel`.
    hidden
        Units of the hidden layer.

    Notes
    -----
    A likelihood costs inputs * hidden * (1 + outputs) multiply-adds, and so does a sample.
    """

    def __init__(
        self, inputs: int, hidden: int = 500, values: int = 2, order: Sequence[int] | Tensor | None = None
    ) -> None:
        super().__init__(inputs, values, order)
        check_integer("NADE", "hidden", hidden)
        self.config["hidden"] = hidden
        rows = 1 if values == 2 else values
        self.in_weight = nn.Parameter(torch.randn(inputs, rows, hidden) * inputs**-0.5)
        self.in_bias = nn.Parameter(torch.zeros(hidden))
        self.out_weight = nn.Parameter(torch.randn(inputs, self.outputs, hidden) * hidden**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(inputs, self.outputs))

    def parameters_in_order(self, x: Tensor, backend: str | None) -> Tensor:
        return nade(x, self.in_weight, self.in_bias, self.out_weight, self.out_bias, backend=backend)

    def sample_in_order(self, uniforms: Tensor, given: Tensor, temperature: float, backend: str | None) -> Tensor:
        weights = (self.in_weight, self.in_bias, self.out_weight, self.out_bias)
        return nade_sample(*weights, uniforms, given=given, temperature=temperature, backend=backend)
