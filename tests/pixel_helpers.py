"""Small PixelCNN models that tests share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.models import GatedPixelCNN, PixelCNN, PixelModel, PixelSNAIL

MODELS = ("PixelCNN", "GatedPixelCNN", "PixelSNAIL")


def loud(model: PixelModel, scale: float = 4.0) -> PixelModel:
    """Random biases and larger output weights: an untrained network's outputs hardly depend on its input."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
        model.head.out.weight.mul_(scale)
    return model


def small(name: str, **options: object) -> PixelModel:
    """Channels that fill no vector, so that all padding is at work."""
    made: PixelModel
    if name == "PixelCNN":
        made = PixelCNN(channels=20, layers=2, context_channels=6, **options)  # type: ignore[arg-type]
    elif name == "GatedPixelCNN":
        made = GatedPixelCNN(channels=20, layers=2, context_channels=6, **options)  # type: ignore[arg-type]
    else:
        made = PixelSNAIL(
            channels=12, layers=2, residual_layers=1, heads=2, key_channels=6, value_channels=10, context_channels=6,
            **options,
        )  # type: ignore[arg-type]  # fmt: skip
    return loud(made)


def images_like(model: PixelModel, batch: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.levels, (batch, model.image_channels, *size), generator=generator)


def conditions(model: PixelModel, batch: int, size: tuple[int, int], seed: int = 1) -> dict[str, Tensor]:
    """Labels and a map of half the resolution, as the model wants them."""
    generator = torch.Generator().manual_seed(seed)
    wanted: dict[str, Tensor] = {}
    config = model.config
    half = tuple(max(1, n // 2) if n % 2 == 0 else n for n in size)
    if config["classes"]:
        wanted["labels"] = torch.randint(0, config["classes"], (batch,), generator=generator)
    if config["cond_codes"]:
        wanted["cond"] = torch.randint(0, config["cond_codes"], (batch, *half), generator=generator)
    if config["cond_channels"]:
        wanted["cond"] = torch.randn(batch, config["cond_channels"], *half, generator=generator)
    return wanted
