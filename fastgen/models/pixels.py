"""What the PixelCNN family shares: the input, the distributions, the likelihood, and sampling pixel by pixel."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastgen.backend import resolve
from fastgen.checks import (
    check_classes,
    check_generator,
    check_integer,
    check_progress,
    check_temperature,
    check_tensor,
    check_truncation,
    is_finite,
    renew_weights,
)
from fastgen.models.progress import Progress, reporter
from fastgen.nn.pixel_context import PixelContext
from fastgen.nn.pixel_head import PixelHead
from fastgen.ops import distributions
from fastgen.ops.pixel_program import PixelProgram
from fastgen.ops.pixelcnn_generate import DISTRIBUTIONS, PixelDistribution, PixelGenerator

MOST_LEVELS = 256

_generators: WeakKeyDictionary[nn.Module, dict[object, PixelGenerator]] = WeakKeyDictionary()


class PixelModel(nn.Module):
    """An autoregressive model of images, pixel after pixel in raster order, and of a pixel's colors one after another.

    Subclasses make a trunk, from (B, inputs, H, W) to (B, trunk channels, H, W), each pixel of which sees only pixels
    before it.

    Parameters
    ----------
    image_channels
        Colors, 1 for grey.
    levels
        Values of a color, 2 to 256; images are int64 in [0, levels).
    distribution
        "bernoulli" (2 levels; their default), "categorical" (the default for more), or "logistic", a mixture of
        `mixtures` logistics discretised to the levels.
    codes
        Instead of colors and levels: the images are maps (B, H, W) of so many codes, as a VQ-VAE makes them; each code
        has an embedding of `code_channels`.
    classes, cond_codes, cond_channels
        What the model is conditioned on, 0 for nothing: labels (B,) int64; a map (B, h, w) of codes, or one
        (B, cond_channels, h, w) of features, whose sides divide the image's.
    context_channels
        Of the features made from that.
    head_channels
        Between the trunk and the parameters.
    log_scale_min
        Lower limit of a mixture's log scales.
    """

    def __init__(
        self,
        trunk_channels: int,
        *,
        image_channels: int = 1,
        levels: int = 2,
        distribution: str | None = None,
        mixtures: int = 10,
        codes: int = 0,
        code_channels: int = 32,
        classes: int = 0,
        cond_codes: int = 0,
        cond_channels: int = 0,
        context_channels: int = 64,
        head_channels: int | None = None,
        log_scale_min: float = -7.0,
        **unknown: Any,
    ) -> None:
        super().__init__()
        name = self._name = type(self).__name__
        if unknown:
            raise TypeError(f"{name}: got an unexpected argument {next(iter(unknown))!r}")
        head_channels = trunk_channels if head_channels is None else head_channels
        for label, size, least in (
            ("image_channels", image_channels, 1), ("mixtures", mixtures, 1), ("codes", codes, 0),
            ("code_channels", code_channels, 1), ("classes", classes, 0), ("cond_codes", cond_codes, 0),
            ("cond_channels", cond_channels, 0), ("context_channels", context_channels, 1),
            ("head_channels", head_channels, 1), ("levels", levels, 2),
        ):  # fmt: skip
            check_integer(name, label, size, least)
        if levels > MOST_LEVELS:
            raise ValueError(f"{name}: levels must lie in [2, {MOST_LEVELS}], got {levels}")
        if codes == 1:
            raise ValueError(f"{name}: codes must be 0 (images) or at least 2, got 1")
        if codes and (image_channels != 1 or levels != 2 or distribution not in (None, "categorical")):
            raise ValueError(
                f"{name}: codes stand in place of image_channels, levels and distribution; leave those out"
            )
        if cond_codes and cond_channels:
            raise ValueError(f"{name}: cond_codes or cond_channels, one of the two; got {cond_codes}, {cond_channels}")
        if distribution is None:
            distribution = "bernoulli" if levels == 2 and not codes else "categorical"
        if distribution not in DISTRIBUTIONS:
            raise ValueError(f"{name}: distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
        if distribution == "bernoulli" and levels != 2:
            raise ValueError(f"{name}: levels must be 2 with distribution='bernoulli', got {levels}")
        if not is_finite(log_scale_min):
            raise ValueError(f"{name}: log_scale_min must be finite, got {log_scale_min!r}")
        self.config: dict[str, Any] = {
            "image_channels": image_channels, "levels": levels, "distribution": distribution, "mixtures": mixtures,
            "codes": codes, "code_channels": code_channels, "classes": classes, "cond_codes": cond_codes,
            "cond_channels": cond_channels, "context_channels": context_channels, "head_channels": head_channels,
            "log_scale_min": log_scale_min,
        }  # fmt: skip
        self.codes, self.image_channels, self.levels = codes, image_channels, codes or levels
        outputs = {"bernoulli": 1, "categorical": self.levels, "logistic": 3 * mixtures}[distribution]
        self.distribution = PixelDistribution(distribution, self.levels, outputs, log_scale_min)
        self.inputs = code_channels if codes else image_channels
        self.context_channels = context_channels if classes or cond_codes or cond_channels else 0
        self.embedding = nn.Embedding(codes, code_channels) if codes else None
        self.conditioning = PixelContext(context_channels, classes, cond_codes, cond_channels)
        self.head = PixelHead(trunk_channels, head_channels, image_channels, outputs, self.inputs)

    @abstractmethod
    def trunk(self, e: Tensor, context: Tensor | None) -> Tensor:
        """(B, inputs, H, W), (B, context_channels, H or 1, W or 1) -> (B, trunk channels, H, W)."""

    @abstractmethod
    def emit_trunk(self, p: PixelProgram, context: Tensor | None) -> int:
        """Append the trunk to a sampling program -> the plane of its features. `context` is (B, context_channels, 1, 1)
        where `plane` makes none of it; else it is in the program's plane."""

    def forward(self, x: Tensor, labels: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Parameters (B, C, O, H, W) of each color's distribution, given all that comes before it.

        Parameters
        ----------
        x
            (B, C, H, W) int64 in [0, levels); with codes (B, H, W) (or (B, 1, H, W)).
        labels, cond
            See the class.
        """
        return self._outputs(self._check_images("x", x), labels, cond)

    def _outputs(self, x: Tensor, labels: Tensor | None, cond: Tensor | None) -> Tensor:
        context = self._context(len(x), (x.shape[2], x.shape[3]), labels, cond)
        e = self._features(x)
        return self.head(self.trunk(e, context), e)  # type: ignore[no-any-return]

    def log_prob(self, x: Tensor, labels: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Log-probability (B,) of the images in nats, float32 or float64; arguments as in `forward`."""
        x = self._check_images("x", x)
        parameters = self._outputs(x, labels, cond).movedim(2, -1)  # (B, C, H, W, O)
        parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
        kind = self.distribution.kind
        if kind == "logistic":
            x = self._scaled(x, parameters.dtype)
        log_p = distributions.log_prob(
            kind, parameters, x, levels=self.levels, log_scale_min=self.distribution.log_scale_min
        )
        return log_p.flatten(1).sum(1)

    def bits_per_dim(self, x: Tensor, labels: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """-log2 p(x) over the number of values in an image, (B,)."""
        return -self.log_prob(x, labels, cond) / (math.log(2) * x.shape[1:].numel())

    @torch.no_grad()
    def sample(
        self,
        batch_size: int,
        image_size: tuple[int, int],
        *,
        given: Tensor | None = None,
        known: Tensor | None = None,
        labels: Tensor | None = None,
        cond: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        progress: Progress = False,
    ) -> Tensor:
        """Draw images, each pixel at the cost of one pixel of a forward pass.

        Parameters
        ----------
        batch_size, image_size
            Number of images, and their (height, width).
        given, known
            Images to complete, int64 in the shape of the result, and which of their values are known: bool, of a shape
            that broadcasts to it. Without `known`, those that are not negative.
        labels, cond
            See the class.
        temperature
            > 0; below 1 samples are likelier and less varied.
        top_k, top_p
            Draw each value, or code, from the `top_k` most probable ones, and of these from the fewest whose
            probabilities reach `top_p` of theirs, once the temperature is applied; what float32 finds as
            probable as the last one kept is kept too. None keeps all. For categorical outputs.
        uniforms
            (B, C, H, W) in [0, 1) (with codes (B, H, W)); the same uniforms give the same image on every backend, save
            where one falls within rounding of a boundary. Drawn from `generator` by default.
        dtype
            Of the weights inside the loop: float32, or bfloat16. Sums stay float32; on a CPU what enters a product has
            15 bits, relative to the largest of 64 channels.
        backend
            See `fastgen.backend`.
        progress
            True for a progress bar, or a function of (rows done, rows in all).

        Returns
        -------
        (B, C, H, W) int64; with codes (B, H, W).

        Raises
        ------
        TypeError, ValueError
            For an argument that does not fit; the message names it, what was expected and what came. Also where the
            weights are not finite, or so large that the network's outputs are not.
        """
        name = f"{self._name}.sample"
        renew_weights(self)
        size, uniforms, given, known = self._sampling_arguments(
            name, batch_size, image_size, given, known, temperature, uniforms, generator, progress
        )
        check_truncation(name, top_k, top_p, self.distribution.kind)
        context = self._context(batch_size, size, labels, cond)
        if context is not None and not bool(torch.isfinite(context).all()):
            raise ValueError(f"{name}: cond holds NaN or infinity, or becomes so in the network that reads it")
        with reporter(name, progress, size[0], "rows") as report:
            loop, plane = self.generator(size, context, dtype, backend)
            values, _ = loop.run(
                uniforms, temperature=temperature, top_k=top_k, top_p=top_p, given=given, known=known, context=plane,
                report=report if progress else None,
            )  # fmt: skip
        return values[:, 0] if self.codes else values

    def plane(self, size: tuple[int, int], context: Tensor | None) -> Tensor | None:
        """(B or 1, channels, H, W): what sampling knows of every pixel beforehand, where it is not the same for all."""
        return None if context is None or context.shape[2:] == (1, 1) else context

    def generator(
        self,
        size: tuple[int, int],
        context: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> tuple[PixelGenerator, Tensor | None]:
        """The sampling op with the weights as they are now, laid out anew only where they have changed; the plane."""
        plane, table = self.plane(size, context), self._table()
        program = PixelProgram(self.inputs, 0 if plane is None else plane.shape[1])
        self.head.emit(program, self.emit_trunk(program, context if plane is None else None))
        program.finish()
        kept = _generators.setdefault(self, {})
        key = (dtype, resolve("pixelcnn_generate", backend, table.device), table.device, program.context)
        if key in kept and kept[key].is_of(program):
            return kept[key].updated(program, table), plane
        kept[key] = PixelGenerator(program, table, self.distribution, dtype=dtype, backend=key[1])
        return kept[key], plane

    def _table(self) -> Tensor:
        """(levels, features): what the network sees of each value."""
        if self.embedding is not None:
            return self.embedding.weight
        levels = torch.arange(self.levels, device=self.head.out.weight.device)
        return self._scaled(levels)[:, None]

    def _scaled(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Levels to [-1, 1], in the weights' dtype by default; bfloat16 does not tell 256 of them apart."""
        return x.to(dtype or self.head.out.weight.dtype) * (2 / (self.levels - 1)) - 1

    def _features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) values -> (B, inputs, H, W)."""
        return self._scaled(x) if self.embedding is None else self.embedding(x[:, 0]).movedim(-1, 1)

    def _context(self, batch: int, size: tuple[int, int], labels: Tensor | None, cond: Tensor | None) -> Tensor | None:
        return self.conditioning(self._name, batch, size, labels, cond)  # type: ignore[no-any-return]

    def _check_images(self, name: str, x: Tensor, least: int = 0) -> Tensor:
        """-> (B, C, H, W), checked."""
        shape = "(B, H, W)" if self.codes else f"(B, {self.image_channels}, H, W)"
        check_tensor(self._name, name, x, f"{shape} of int64 values in [0, {self.levels})")
        if self.codes and x.dim() == 3:
            x = x[:, None]
        if x.dim() != 4 or x.shape[1] != self.image_channels or 0 in x.shape[2:]:
            raise ValueError(f"{self._name}: {name} must be {shape} with at least one pixel, got {tuple(x.shape)}")
        if x.dtype == torch.uint8:  # as images come
            x = x.long()
        if x.dtype != torch.int64:
            raise TypeError(f"{self._name}: {name} must be int64 values in [0, {self.levels}), got {x.dtype}")
        device = self.head.out.weight.device
        if x.device != device:
            raise ValueError(f"{self._name}: {name} is on {x.device}, the model on {device}")
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            check_classes(self._name, name, x.clamp(min=0) if least < 0 else x, self.levels)
        return x

    def _sampling_arguments(
        self, name: str, batch: int, image_size: Any, given: Tensor | None, known: Tensor | None, temperature: float,
        uniforms: Tensor | None, generator: torch.Generator | None, progress: Progress,
    ) -> tuple[tuple[int, int], Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        check_integer(name, "batch_size", batch, 0)
        if not isinstance(image_size, tuple | list | torch.Size) or len(image_size) != 2:
            raise ValueError(f"{name}: image_size must be (height, width), got {image_size!r}")
        for side in image_size:
            check_integer(name, "each of image_size", side)
        size = (image_size[0], image_size[1])
        check_temperature(name, temperature)
        check_progress(name, progress)
        check_generator(name, generator)
        device = self.head.out.weight.device
        if device.type == "meta":
            raise ValueError(f"{name}: the model must have values to draw from, it is on the meta device")
        shape = (batch, self.image_channels, *size)
        wanted = (batch, *size) if self.codes else shape
        if uniforms is None:
            where = None if generator is None else generator.device
            uniforms = torch.rand(shape, generator=generator, dtype=torch.float32, device=where).to(device)
        else:
            check_tensor(name, "uniforms", uniforms, f"{wanted} in [0, 1)")
            if tuple(uniforms.shape) not in (shape, wanted):
                raise ValueError(f"{name}: uniforms must be {wanted}, got {tuple(uniforms.shape)}")
            if not uniforms.is_floating_point():
                raise TypeError(f"{name}: uniforms must be floating point, got {uniforms.dtype}")
            if uniforms.device != device:
                raise ValueError(f"{name}: uniforms is on {uniforms.device}, the model on {device}")
            if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
                low, high = float(uniforms.min()), float(uniforms.max())
                raise ValueError(f"{name}: uniforms must lie in [0, 1), got {low} to {high}")
            uniforms = uniforms.reshape(shape).float().clamp(max=1 - 2**-24)
        if given is None:
            if known is not None:
                raise ValueError(f"{name}: known says which values of given are known, but given is missing")
            return size, uniforms, None, None
        given = self._check_images("given", given, least=-1)
        if tuple(given.shape) != shape:
            raise ValueError(f"{name}: given must be {wanted}, got {tuple(given.shape)}")
        if known is None:
            return size, uniforms, given, given >= 0
        check_tensor(name, "known", known, f"of bool that broadcasts to {wanted}")
        if known.dtype != torch.bool:
            raise TypeError(f"{name}: known must be bool, got {known.dtype}")
        try:
            known = known.expand(shape if known.dim() == 4 else wanted).reshape(shape)
        except RuntimeError:
            raise ValueError(f"{name}: known must broadcast to {wanted}, got {tuple(known.shape)}") from None
        if bool((known & (given < 0)).any()):
            raise ValueError(f"{name}: given must not be negative where known, got {int(given[known].min())}")
        return size, uniforms, given, known


@torch.no_grad()
def sample_naive(
    model: PixelModel,
    batch_size: int,
    image_size: tuple[int, int],
    *,
    uniforms: Tensor,
    given: Tensor | None = None,
    known: Tensor | None = None,
    labels: Tensor | None = None,
    cond: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    report: Callable[[int], object] | None = None,
) -> Tensor:
    """`model.sample` by one forward pass of the whole image for each value: what it must agree with, hundreds of times
    slower. Arguments as there; `report` is called with the number of values drawn."""
    name = f"{type(model).__name__}.sample_naive"
    size, uniforms, given, known = model._sampling_arguments(
        name, batch_size, image_size, given, known, temperature, uniforms, None, False
    )
    x = torch.zeros(uniforms.shape, dtype=torch.int64, device=uniforms.device)
    done = 0
    for i in range(size[0]):
        for j in range(size[1]):
            for c in range(model.image_channels):
                out = model._outputs(x, labels, cond)[:, c, :, i, j].float()
                value = model.distribution.sample(out, uniforms[:, c, i, j], temperature, top_k, top_p)
                if given is not None and known is not None:
                    value = torch.where(known[:, c, i, j], given[:, c, i, j], value)
                x[:, c, i, j] = value
                done += 1
                if report is not None:
                    report(done)
    return x[:, 0] if model.codes else x
