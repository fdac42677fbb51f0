"""Glow (Kingma and Dhariwal, 2018): steps of actnorm, invertible 1x1 convolution and affine coupling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastgen.checks import check_integer
from fastgen.models.flows import FlowModel, check_scales
from fastgen.nn.conditioners import ConvConditioner, MLPConditioner
from fastgen.nn.coupling import AffineCoupling
from fastgen.nn.flow import FlowSequence, MultiScale, Split, Squeeze
from fastgen.nn.invertible_conv1x1 import InvertibleConv1x1


class Glow(FlowModel):
    """Each scale squeezes, takes `steps` steps of flow, and factors out half the channels by a learned prior.

    Parameters
    ----------
    shape, levels, classes, alpha
        See `FlowModel`.
    scales, steps
        L and K of the paper; vectors have one scale, without squeezing.
    hidden
        Channels of the conditioners.
    scale, bound
        Of the couplings, see `fastgen.ops.affine_coupling`.
    lu
        Parametrise the 1x1 convolutions by their LU factors.
    reversible
        Keep no activations for the backward pass, see `fastgen.nn.FlowSequence`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        scales: int | None = None,
        steps: int = 8,
        hidden: int = 128,
        levels: int | None = None,
        classes: int = 0,
        scale: str = "sigmoid",
        bound: float = 1.0,
        alpha: float = 0.0,
        lu: bool = True,
        reversible: bool = False,
    ) -> None:
        super().__init__(shape, levels=levels, classes=classes, alpha=alpha)
        image = len(shape) == 3
        scales = (2 if image else 1) if scales is None else scales
        check_integer("Glow", "steps", steps)
        check_scales("Glow", shape, scales)
        self.config |= {
            "scales": scales, "steps": steps, "hidden": hidden, "scale": scale, "bound": bound, "lu": lu,
            "reversible": reversible,
        }  # fmt: skip
        flows, splits = [], []
        channels, cond = shape[0], self.cond_channels
        for i in range(scales):
            channels = 4 * channels if image else channels
            layers: list[nn.Module] = [Squeeze()] if image else []
            for _ in range(steps):
                layers += [
                    InvertibleConv1x1(channels, lu=lu, actnorm=True),
                    self._coupling(channels, hidden, cond, scale, bound),
                ]
            flows.append(FlowSequence(*layers, reversible=reversible))
            if i < scales - 1:
                splits.append(Split(ConvConditioner(channels // 2, channels, hidden, cond)))
                channels //= 2
        self.flow = MultiScale(flows, splits)

    def _coupling(self, channels: int, hidden: int, cond: int, scale: str, bound: float) -> AffineCoupling:
        half, parts = channels // 2, 1 if scale == "none" else 2
        if len(self.shape) == 3:
            net: nn.Module = ConvConditioner(half, parts * half, hidden, cond)
            return AffineCoupling(net, scale=scale, bound=bound)
        if channels % 2 == 0:
            return AffineCoupling(
                MLPConditioner(half, parts * half, hidden, cond_channels=cond), scale=scale, bound=bound
            )
        net = MLPConditioner(channels, parts * channels, hidden, cond_channels=cond)
        return AffineCoupling(net, scale=scale, bound=bound, mask=torch.arange(channels) <= half)
