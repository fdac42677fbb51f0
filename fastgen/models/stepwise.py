"""Models of pixels that are drawn by plain PyTorch, one pixel after another, with a state in place of a program."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastgen.checks import check_weights
from fastgen.models.pixels import PixelModel
from fastgen.ops.pixel_program import PixelProgram


class Stepper(Protocol):
    """The state of a batch of images, of which all pixels before the present one are known."""

    def features(self, i: int, j: int) -> Tensor:
        """The trunk's output (B, trunk channels) at pixel (i, j)."""

    def put(self, i: int, j: int, e: Tensor) -> None:
        """The pixel's values have become known, as inputs e (B, inputs)."""


class StepwiseModel(PixelModel):
    """A `PixelModel` whose subclasses make a `Stepper`."""

    @abstractmethod
    def stepper(self, batch: int, size: tuple[int, int], context: Tensor | None) -> Stepper:
        """Before the first pixel. `context` is (B, context_channels, H or 1, W or 1)."""

    def emit_trunk(self, p: PixelProgram, context: Tensor | None) -> int:
        raise NotImplementedError(f"{self._name}: is drawn step by step, it has no sampling program")

    def _draw(
        self, size: tuple[int, int], uniforms: Tensor, given: Tensor | None, known: Tensor | None,
        context: Tensor | None, temperature: float, dtype: torch.dtype, backend: str | None,
        report: Callable[[int], object] | None,
    ) -> Tensor:  # fmt: skip
        name = f"{self._name}.sample"
        if dtype != torch.float32:
            raise ValueError(f"{name}: dtype must be torch.float32, got {dtype}")
        if backend not in (None, "auto", "reference"):
            raise ValueError(f"{name}: backend must be 'auto' or 'reference', got {backend!r}")
        check_weights(name, self)
        values = torch.zeros(uniforms.shape, dtype=torch.int64, device=uniforms.device)
        steps = self.stepper(len(uniforms), size, context)
        for i in range(size[0]):
            for j in range(size[1]):
                h = steps.features(i, j)[:, :, None, None]
                for c in range(self.image_channels):
                    e = self._features(values[:, :, i : i + 1, j : j + 1])
                    out = self.head(h, e)[:, c, :, 0, 0].float()
                    value = self.distribution.sample(out, uniforms[:, c, i, j], temperature)
                    if given is not None and known is not None:
                        value = torch.where(known[:, c, i, j], given[:, c, i, j], value)
                    values[:, c, i, j] = value
                steps.put(i, j, self._features(values[:, :, i : i + 1, j : j + 1])[:, :, 0, 0])
            if report is not None:
                report(i + 1)
        return values
