"""A quantizer and priors over its codes, as one model of images.

    log p(x) >= log p(x | codes) + sum over levels of log p(codes of the level | those of the levels above)

Source: Razavi et al., "Generating Diverse High-Fidelity Images with VQ-VAE-2" (2019).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgen.checks import check_integer
from fastgen.models.pixels import PixelModel
from fastgen.models.progress import Progress
from fastgen.models.vqvae import VQVAE, VQVAE2


class TwoStage(nn.Module):
    """A VQ-VAE whose codes have learned priors in place of the uniform one.

    Parameters
    ----------
    quantizer
        Trained.
    priors
        One for each of its maps, the top first; each further one with the map above as its `cond`. Those of classes
        have the same classes.

    Raises
    ------
    ValueError
        If the priors are not as many as the maps, or are of other codes.
    """

    def __init__(self, quantizer: VQVAE | VQVAE2, priors: Sequence[PixelModel]) -> None:
        super().__init__()
        if not isinstance(quantizer, VQVAE | VQVAE2):
            raise TypeError(f"TwoStage: quantizer must be a VQVAE or VQVAE2, got {type(quantizer).__name__}")
        if not all(isinstance(prior, PixelModel) for prior in priors):
            came = ", ".join(type(prior).__name__ for prior in priors)
            raise TypeError(f"TwoStage: priors must be PixelModels, got {came}")
        if len(priors) != quantizer.levels:
            raise ValueError(
                f"TwoStage: priors must be {quantizer.levels}, one for each map of codes, got {len(priors)}"
            )
        for i, prior in enumerate(priors):
            above = quantizer.codebook_size if i else 0
            if prior.codes != quantizer.codebook_size or prior.config["cond_codes"] != above:
                raise ValueError(
                    f"TwoStage: priors[{i}] must have codes={quantizer.codebook_size} and cond_codes={above}, as the "
                    f"quantizer's codebook, got {prior.codes} and {prior.config['cond_codes']}"
                )
            if prior.config["cond_channels"]:
                raise ValueError(f"TwoStage: priors[{i}] must not be conditioned on features")
        classes = {prior.config["classes"] for prior in priors}
        if len(classes - {0}) > 1:
            raise ValueError(f"TwoStage: priors must have the same classes, got {sorted(classes)}")
        self.quantizer, self.priors, self.classes = quantizer, nn.ModuleList(priors), max(classes)

    def elbo(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """x (B, C, H, W) -> (B,) nats: log p(x | codes), a density, plus log p(codes); labels (B,) int64.

        In training mode the quantizer's codebook moves, and the priors are of other codes: call `eval()` first.
        """
        self._check_labels("elbo", labels)
        out = self.quantizer(x)
        total = self.quantizer.log_likelihood(x, out.reconstruction)
        for i, (prior, codes) in enumerate(zip(self.priors, out.codes, strict=True)):
            assert isinstance(prior, PixelModel)
            of_classes = labels if prior.config["classes"] else None
            total = total + prior.log_prob(codes, of_classes, out.codes[i - 1] if i else None)
        return total

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        *,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        uniforms: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        progress: Progress = False,
    ) -> Tensor:
        """Draw codes, the top ones first, and decode them.

        Parameters
        ----------
        batch_size, image_size
            Number of images; (height, width), multiples of the quantizer's `factor`.
        labels
            (B,) int64, where a prior has classes.
        temperature, top_k, top_p
            Of the codes, see `PixelModel.sample`.
        uniforms
            For each map of codes (B, h, w) in [0, 1); drawn from `generator` by default.
        dtype, backend, progress
            Of the drawing of each map, see `PixelModel.sample`.

        Returns
        -------
        (B, C, H, W) float32, the decoder's means.
        """
        check_integer("TwoStage.sample", "batch_size", batch_size, 0)
        factor, levels = self.quantizer.factor, self.quantizer.levels
        if (
            not isinstance(image_size, tuple | list)
            or len(image_size) != 2
            or any(side < 1 or side % factor for side in image_size)
        ):
            raise ValueError(f"TwoStage.sample: image_size must be two multiples of {factor}, got {image_size!r}")
        if uniforms is not None and len(uniforms) != levels:
            raise ValueError(f"TwoStage.sample: uniforms must be {levels} tensors, got {len(uniforms)}")
        self._check_labels("sample", labels)
        drawn: list[Tensor] = []
        for i, prior in enumerate(self.priors):
            assert isinstance(prior, PixelModel)
            shrunk = factor >> i
            drawn.append(
                prior.sample(
                    batch_size, (image_size[0] // shrunk, image_size[1] // shrunk),
                    labels=labels if prior.config["classes"] else None, cond=drawn[-1] if drawn else None,
                    temperature=temperature, top_k=top_k, top_p=top_p,
                    uniforms=None if uniforms is None else uniforms[i], generator=generator, dtype=dtype,
                    backend=backend, progress=progress,
                )
            )  # fmt: skip
        return self.quantizer.decode(*drawn)

    def _check_labels(self, name: str, labels: Tensor | None) -> None:
        if (labels is None) == bool(self.classes):
            raise ValueError(f"TwoStage.{name}: labels are for priors of classes; these have {self.classes}")
