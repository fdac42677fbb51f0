"""What a PixelCNN is conditioned on, as one feature map: a class, a map of lower resolution, or both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_classes, check_tensor, under_autocast
from fastgen.nn.conv2d import Conv2d

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
        self.feature = Conv2d(cond_channels, channels, 1) if cond_channels else None
        self.spatial = bool(cond_codes or cond_channels)
        self.residual = nn.ModuleList(
            nn.Sequential(nn.ReLU(), Conv2d(channels, channels, 3, padding=1), nn.ReLU(), Conv2d(channels, channels, 1))
            for _ in range(RESIDUAL_LAYERS if self.spatial else 0)
        )

    def forward(
        self, name: str, batch: int, size: tuple[int, int], labels: Tensor | None, cond: Tensor | None
    ) -> Tensor | None:
        """`name` is the model's, for errors; None where there is nothing to be conditioned on."""
        self.check(name, batch, size, labels, cond)
        features = self._map(size, cond)
        if self.label is None or labels is None:
            return features
        label = self.label(labels)[:, :, None, None]
        return label if features is None else features + label  # type: ignore[no-any-return]

    def check(self, name: str, batch: int, size: tuple[int, int], labels: Tensor | None, cond: Tensor | None) -> None:
        """Raise on labels and maps that are missing, surplus or do not fit."""
        self._check_labels(name, batch, labels)
        self._check_map(name, batch, size, cond)

    def _check_labels(self, name: str, batch: int, labels: Tensor | None) -> None:
        if self.label is None:
            if labels is not None:
                raise ValueError(f"{name}: labels were given, but the model has classes=0")
            return
        if labels is None:
            raise ValueError(f"{name}: labels are needed: ({batch},) int64 in [0, {self.classes})")
        check_tensor(name, "labels", labels, f"({batch},) of int64")
        if tuple(labels.shape) != (batch,) or labels.dtype != torch.int64:
            raise ValueError(f"{name}: labels must be ({batch},) int64, got {tuple(labels.shape)} {labels.dtype}")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            check_classes(name, "labels", labels, self.classes)

    def _check_map(self, name: str, batch: int, size: tuple[int, int], cond: Tensor | None) -> None:
        if not self.spatial:
            if cond is not None:
                raise ValueError(f"{name}: cond was given, but the model has cond_codes=0 and cond_channels=0")
            return
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
        if self.feature is not None:
            if cond.dtype != self.feature.weight.dtype and not under_autocast(cond.device):
                raise TypeError(f"{name}: cond must be {self.feature.weight.dtype}, as the model is, got {cond.dtype}")
            return
        if cond.dtype != torch.int64:
            raise TypeError(f"{name}: cond must be int64 codes, got {cond.dtype}")
        if cond.device.type == "cpu" and not torch.compiler.is_compiling():
            check_classes(name, "cond", cond, self.cond_codes)

    def _map(self, size: tuple[int, int], cond: Tensor | None) -> Tensor | None:
        if cond is None:
            return None
        features = self.feature(cond) if self.code is None else self.code(cond).movedim(-1, 1)  # type: ignore[misc]
        for layer in self.residual:
            features = features + layer(features)
        if tuple(features.shape[2:]) == size:
            return features  # type: ignore[no-any-return]
        return F.interpolate(features, size=size, mode="nearest")
