"""RealNVP (Dinh et al., 2017): checkerboard and channel couplings on several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastgen.checks import check_integer
from fastgen.models.flows import FlowModel, check_scales
from fastgen.nn.actnorm import ActNorm
from fastgen.nn.conditioners import MLPConditioner, ResidualConditioner
from fastgen.nn.coupling import AffineCoupling
from fastgen.nn.flow import FlowSequence, MultiScale, Split, Squeeze


class RealNVP(FlowModel):
    """Each scale: couplings on checkerboards, squeeze, couplings on halves of the channels, half is factored out.

    The last scale has one coupling more on checkerboards and none on channels. Normalisation is `ActNorm` after each
    coupling, in place of the paper's batch normalisation: its log-det does not depend on the batch.

    Parameters
    ----------
    shape, levels, classes, alpha
        See `FlowModel`.
    scales
        Of images; vectors have one.
    couplings
        On checkerboards, and again on channels; for vectors, in all.
    hidden, blocks
        Channels and residual blocks of the conditioners; those of vectors have blocks + 1 linear layers.
    scale, bound
        Of the couplings, see `fastgen.ops.affine_coupling`.
    reversible
        Keep no activations for the backward pass, see `fastgen.nn.FlowSequence`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        scales: int | None = None,
        couplings: int | None = None,
        hidden: int = 64,
        blocks: int = 2,
        levels: int | None = None,
        classes: int = 0,
        scale: str = "tanh",
        bound: float = 2.0,
        alpha: float = 0.05,
        reversible: bool = False,
    ) -> None:
        super().__init__(shape, levels=levels, classes=classes, alpha=alpha)
        image = len(shape) == 3
        scales = (2 if image else 1) if scales is None else scales
        couplings = (3 if image else 8) if couplings is None else couplings
        check_integer("RealNVP", "couplings", couplings)
        check_scales("RealNVP", shape, scales)
        self.config |= {
            "scales": scales, "couplings": couplings, "hidden": hidden, "blocks": blocks, "scale": scale,
            "bound": bound, "reversible": reversible,
        }  # fmt: skip
        cond = self.cond_channels
        flows, splits = [], []
        channels = shape[0]

        def coupling(mask: torch.Tensor | str | None, swap: bool = False) -> list[nn.Module]:
            inputs = channels // 2 if mask is None else channels
            outputs = inputs if scale == "none" else 2 * inputs
            net: nn.Module = (
                ResidualConditioner(inputs, outputs, hidden, blocks, cond)
                if image
                else MLPConditioner(inputs, outputs, hidden, blocks + 1, cond)
            )
            return [AffineCoupling(net, scale=scale, bound=bound, mask=mask, swap=swap), ActNorm(channels)]

        if not image:
            first = torch.arange(channels) < channels // 2
            layers = [
                layer
                for i in range(couplings)
                for layer in (coupling(None, i % 2 == 1) if channels % 2 == 0 else coupling(first ^ (i % 2 == 1)))
            ]
            self.flow = MultiScale([FlowSequence(*layers, reversible=reversible)], [])
            return
        for i in range(scales):
            last = i == scales - 1
            layers = []
            for k in range(couplings + last):
                layers += coupling("checkerboard_inverse" if k % 2 else "checkerboard")
            layers.append(Squeeze())
            channels *= 4
            if not last:
                for k in range(couplings):
                    layers += coupling(None, k % 2 == 1)
            flows.append(FlowSequence(*layers, reversible=reversible))
            if not last:
                splits.append(Split())
                channels //= 2
        self.flow = MultiScale(flows, splits)
