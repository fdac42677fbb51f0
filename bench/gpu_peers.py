"""What a user would pick instead, where it is installed and computes the same.

normflows, nflows, FrEIA and vector-quantize-pytorch. Convolutions have none: the causal ones of other libraries are of
one channel each.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Peer(NamedTuple):
    name: str
    call: Callable[..., object]
    args: list[Tensor | None]
    tolerance: float = 0.02  # of its result, relative: they compute in the dtype they are given


class Given(nn.Module):
    """A conditioner that costs nothing."""

    params: Tensor

    def forward(self, *_: Any) -> Tensor:
        return self.params


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def coupling_peers(scale: str, x: Tensor, params: Tensor) -> list[Peer]:
    """Of the forward direction, each beside the scale that it has; one that cannot be made raises when called."""
    try:
        return make_coupling_peers(scale, x, params)
    except Exception as error:
        return [Peer("peer", partial(fail, error), [x, params])]


def fail(error: Exception, *_: Any) -> NoReturn:
    raise error


def make_coupling_peers(scale: str, x: Tensor, params: Tensor) -> list[Peer]:
    given, channels = Given(), x.shape[1]
    if scale == "exp" and installed("normflows"):
        import normflows

        block = normflows.flows.AffineCouplingBlock(given, split_mode="channel")
        log_scale, shift = params.chunk(2, 1)
        args = [x, torch.stack([shift, log_scale], 2).flatten(1, 2)]
        return [Peer("normflows", with_given(given, block), args)]
    if scale == "sigmoid" and installed("nflows"):  # which adds 1e-3 to the scale
        from nflows.transforms import AffineCouplingTransform

        half = channels // 2
        layer = AffineCouplingTransform([0] * half + [1] * half, lambda *_: given).to(DEVICE)
        return [Peer("nflows", with_given(given, layer), [x, params])]
    if scale == "tanh" and installed("FrEIA"):
        from FrEIA.modules import AffineCouplingOneSided

        one_sided = AffineCouplingOneSided(
            [x.shape[1:]], subnet_constructor=lambda *_: given, clamp=1.0, clamp_activation="TANH"
        )

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            (y,), log_det = one_sided([x])
            return y, log_det

        return [Peer("FrEIA", with_given(given, run), [x, params])]
    return []


def with_given(given: Given, layer: Callable[[Tensor], object]) -> Callable[[Tensor, Tensor], object]:
    def run(x: Tensor, params: Tensor) -> object:
        given.params = params
        return layer(x)

    return run


def quantizer_peers(ours: nn.Module) -> dict[str, nn.Module]:
    """With the state of ours, a `fastgen.nn.VectorQuantize`."""
    if not installed("vector_quantize_pytorch"):
        return {}
    from vector_quantize_pytorch import VectorQuantize

    codes, dim = ours.codebook.shape
    layer = VectorQuantize(dim, codes, decay=0.99).to(DEVICE)
    layer.load_state_dict(ours.state_dict(), strict=True)
    return {"vector-quantize-pytorch": layer}
