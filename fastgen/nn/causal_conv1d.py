"""Causal convolutions: the plain one, and the gated residual layer of a WaveNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.nn.conv2d import Conv1d
from fastgen.ops.wavenet_layer import wavenet_layer


def folded_weight(module: nn.Module) -> Tensor:
    """The weight a module computes with now, weight normalisation included.

    `torch.nn.utils.parametrizations` keeps `weight` current; the older `torch.nn.utils.weight_norm` renews it only when
    the module is called, so it is computed from its parts here.
    """
    for hook in module._forward_pre_hooks.values():
        if hasattr(hook, "compute_weight"):
            return hook.compute_weight(module)  # type: ignore[no-any-return]
    return module.weight  # type: ignore[return-value]


class CausalConv1d(nn.Conv1d):
    """`torch.nn.Conv1d` that sees only the present and the past: (B, C, T) -> (B, out_channels, T).

    Parameters
    ----------
    in_channels, out_channels, kernel_size, dilation, bias
        As in `torch.nn.Conv1d`; the input counts as zero before its first sample.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1, bias: bool = True
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, dilation=dilation, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        past = (self.kernel_size[0] - 1) * self.dilation[0]
        return F.conv1d(F.pad(x, (past, 0)), self.weight, self.bias, dilation=self.dilation)


class WaveNetLayer(nn.Module):
    """Gated causal convolution with residual and skip 1x1 convolutions, in one fused op.

    Parameters
    ----------
    residual_channels, skip_channels
        Channels C of the input and the residual, S of the skip.
    kernel_size, dilation
        Of the causal convolution.
    gate_channels
        Channels H behind the gate; residual_channels by default.
    local_channels, speaker_channels
        Channels of the conditioning that varies in time (B, local_channels, T) and that does not (B, speaker_channels);
        0 for none. `forward` wants each that is not 0, and no other.

    Shapes: forward(x (B, C, T), local, speaker) -> residual (B, C, T), skip (B, S, T).
    """

    def __init__(
        self,
        residual_channels: int,
        skip_channels: int,
        kernel_size: int = 2,
        dilation: int = 1,
        *,
        gate_channels: int | None = None,
        local_channels: int = 0,
        speaker_channels: int = 0,
    ) -> None:
        super().__init__()
        gate = residual_channels if gate_channels is None else gate_channels
        for name, least, size in (
            ("residual_channels", 1, residual_channels), ("skip_channels", 0, skip_channels),
            ("kernel_size", 1, kernel_size), ("dilation", 1, dilation), ("gate_channels", 1, gate),
            ("local_channels", 0, local_channels), ("speaker_channels", 0, speaker_channels),
        ):  # fmt: skip
            check_integer("WaveNetLayer", name, size, least)
        self.conv = CausalConv1d(residual_channels, 2 * gate, kernel_size, dilation)
        self.out = nn.Conv1d(gate, residual_channels + skip_channels, 1)
        self.local = Conv1d(local_channels, 2 * gate, 1, bias=False) if local_channels else None
        self.speaker = nn.Linear(speaker_channels, 2 * gate, bias=False) if speaker_channels else None

    def forward(
        self, x: Tensor, local: Tensor | None = None, speaker: Tensor | None = None, *, backend: str | None = None
    ) -> tuple[Tensor, Tensor]:
        for name, module, given in (("local", self.local, local), ("speaker", self.speaker, speaker)):
            if module is None and given is not None:
                raise ValueError(f"WaveNetLayer: {name} was given, but the layer has {name}_channels=0")
            if module is not None and given is None:
                raise ValueError(f"WaveNetLayer: {name} is needed: the layer has {name}_channels > 0")
        cond = None if self.local is None else self.local(local)  # (B, 2H, T)
        if self.speaker is not None:
            constant = self.speaker(speaker)[:, :, None]  # (B, 2H, 1)
            cond = constant if cond is None else cond + constant
        return wavenet_layer(
            x,
            folded_weight(self.conv),
            self.conv.bias,
            folded_weight(self.out)[:, :, 0],
            self.out.bias,
            cond,
            dilation=self.conv.dilation[0],
            backend=backend,
        )
