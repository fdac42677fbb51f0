"""What a PixelCNN is conditioned on, as one feature map: a class, a map of lower resolution, or both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_classes, check_tensor

RESIDUAL_LAYERS = 2


class PixelContext(nn.Module):
    """Labels and a map (codes or features) -> (B, channels, H, W), or (B, channels, 1, 1) without a map.

    Parameters
    ----------
    channels
        Of the result.
    classes
        Of labels (B,) int64; 0 for none.
    cond_codes
        Codes of a map (B, h, w) int64, as a VQ-VAE makes them; 0 for none.
    cond_channels
        Channels of a map (B, cond_channels, h, w) of features; 0 for none. One of the two at most.

    H and W are multiples of h and w: the map passes through two residual layers and is repeated.
    """

    def __init__(self, channels: int, classes: int, cond_codes: int, cond_channels: int) -> None:
        super().__init__()
        self.classes, self.cond_codes, self.cond_channels = classes, cond_codes, cond_channels
        self.label = nn.Embedding(classes, channels) if classes else None
        self.code = nn.Embedding(cond_codes, channels) if cond_codes else None
        self.feature = nn.Conv2d(cond_channels, channels, 1) if cond_channels else None
        self.spatial = bool(cond_codes or cond_channels)
        self.residual = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 1)
            )
            for _ in range(RESIDUAL_LAYERS if self.spatial else 0)
        )

    def forward(
        self, name: str, batch: int, size: tuple[int, int], labels: Tensor | None, cond: Tensor | None
    ) -> Tensor | None:
        """`name` is the model's, for errors; None where there is nothing to be conditioned on."""
        label = self._label(name, batch, labels)
        features = self._map(name, batch, size, cond)
        if label is None or features is None:
            return features if label is None else label
        return features + label

    def _label(self, name: str, batch: int, labels: Tensor | None) -> Tensor | None:
        if self.label is None:
            if labels is not None:
                raise ValueError(f"{name}: labels were given, but the model has classes=0")
            return None
        if labels is None:
            raise ValueError(f"{name}: labels are needed: ({batch},) int64 in [0, {self.classes})")
        check_tensor(name, "labels", labels, f"({batch},) of int64")
        if tuple(labels.shape) != (batch,) or labels.dtype != torch.int64:
            raise ValueError(f"{name}: labels must be ({batch},) int64, got {tuple(labels.shape)} {labels.dtype}")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_classes(name, "labels", labels, self.classes)
        return self.label(labels)[:, :, None, None]  # type: ignore[no-any-return]

    def _map(self, name: str, batch: int, size: tuple[int, int], cond: Tensor | None) -> Tensor | None:
        if not self.spatial:
            if cond is not None:
                raise ValueError(f"{name}: cond was given, but the model has cond_codes=0 and cond_channels=0")
            return None
        wanted = f"({batch}, h, w) int64" if self.code is not None else f"({batch}, {self.cond_channels}, h, w)"
        if cond is None:
            raise ValueError(f"{name}: cond is needed: {wanted}")
        check_tensor(name, "cond", cond, wanted)
        fits = cond.dim() == 3 if self.code is not None else cond.dim() == 4 and cond.shape[1] == self.cond_channels
        if not fits or cond.shape[0] != batch:
            raise ValueError(f"{name}: cond must be {wanted}, got {tuple(cond.shape)}")
        low = tuple(cond.shape[-2:])
        if 0 in low or size[0] % low[0] or size[1] % low[1]:
            raise ValueError(f"{name}: cond must have sides that divide the image's {size}, got {low}")
        if self.code is not None:
            if cond.dtype != torch.int64:
                raise TypeError(f"{name}: cond must be int64 codes, got {cond.dtype}")
            if cond.device.type == "cpu" and not torch.compiler.is_compiling():
                check_classes(name, "cond", cond, self.cond_codes)
            features = self.code(cond).movedim(-1, 1)
        else:
            assert self.feature is not None
            if cond.dtype != self.feature.weight.dtype and not torch.is_autocast_enabled(cond.device.type):
                raise TypeError(f"{name}: cond must be {self.feature.weight.dtype}, as the model is, got {cond.dtype}")
            features = self.feature(cond)
        for layer in self.residual:
            features = features + layer(features)
        return F.interpolate(features, size=size, mode="nearest") if low != size else features
