"""FVSBN, the fully visible sigmoid belief network: a logistic regression of each input on those before it.

Source: Frey, Hinton and Dayan, "Does the Wake-Sleep Algorithm Produce Good Density Estimators?" (1996).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen.models.vectors import VectorModel
from fastgen.nn.linear import linear_map
from fastgen.ops import distributions


class FVSBN(VectorModel):
    """One product with a strictly triangular matrix for all inputs together. Binary inputs; see `VectorModel`.

    `backend` makes no difference: there is nothing here that PyTorch does not do well.
    """

    def __init__(self, inputs: int, order: Sequence[int] | Tensor | None = None) -> None:
        super().__init__(inputs, 2, order)
        del self.config["values"]
        self.weight = nn.Parameter(torch.zeros(inputs, inputs))  # what lies on and above the diagonal is not used
        self.bias = nn.Parameter(torch.zeros(inputs))

    def parameters_in_order(self, x: Tensor, backend: str | None) -> Tensor:
        return linear_map(x.to(self.weight.dtype), self.weight.tril(-1), self.bias)[..., None]

    def sample_in_order(self, uniforms: Tensor, given: Tensor, temperature: float, backend: str | None) -> Tensor:
        columns = self.weight.tril(-1).T.float()  # (D, D): what an input of 1 adds to the logits behind it
        logits, x = self.bias.float().expand(uniforms.shape).clone(), given.clone()
        for d in range(self.inputs):
            pair = torch.stack([torch.zeros_like(logits[:, d]), logits[:, d]], 1) / temperature
            drawn = distributions.categorical_from_uniform(pair, uniforms[:, d])
            x[:, d] = torch.where(given[:, d] < 0, drawn, given[:, d])
            logits[:, d + 1 :] += x[:, d, None] * columns[d, d + 1 :]
        return x
