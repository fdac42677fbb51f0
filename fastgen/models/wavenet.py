"""WaveNet: an autoregressive model of audio, one sample at a time.

Sources: van den Oord et al., "WaveNet" (2016); Salimans et al., "PixelCNN++" (2017) for the logistic mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import check_classes, check_integer, check_tensor, check_unit_range, is_finite, under_autocast
from fastgen.models import wavenet_sampling
from fastgen.models.progress import Progress
from fastgen.nn.causal_conv1d import WaveNetLayer, folded_weight
from fastgen.nn.conv2d import Conv1d
from fastgen.nn.upsample import StretchUpsample, TransposedUpsample
from fastgen.ops import GenerationState, WaveNetWeights, distributions, initial_state

UPSAMPLINGS = {"transposed": TransposedUpsample, "stretch": StretchUpsample}


class WaveNet(nn.Module):
    """WaveNet with local and global conditioning.

    Parameters
    ----------
    layers, cycles
        Gated layers, and how often the dilation starts again at 1: layer l has dilation 2 ** (l mod layers/cycles).
    residual_channels, skip_channels, gate_channels
        Channels between layers, of the sum of skips, and behind the gates (residual_channels by default).
    kernel_size
        Taps of each causal convolution, >= 1.
    distribution
        "categorical" over `classes` (mu-law) values; "logistic" or "gaussian": a mixture of `mixtures` components over
        values in [-1, 1], the logistic one discretised to `classes` levels.
    classes, mixtures
        See distribution.
    local_channels
        Channels of conditioning features that vary in time, 0 for none.
    upsample_scales
        Factors from feature frames to samples; () where features come at the sample rate.
    upsample_options
        "kind": "transposed" (the default) or "stretch", and the options of that class of `fastgen.nn`.
    speakers, speaker_channels
        Number of speakers, 0 for none, and the size of their embedding.
    start
        What the network sees before the first sample: a class (the middle one by default) or a value in [-1, 1] (0).
    log_scale_min
        Lower limit of a mixture's log scales.
    weight_norm
        Weight normalisation on every convolution.

    Raises
    ------
    ValueError
        For a parameter outside its range; the message names it.
    """

    def __init__(
        self,
        layers: int = 20,
        cycles: int = 2,
        residual_channels: int = 64,
        skip_channels: int = 128,
        kernel_size: int = 2,
        distribution: str = "categorical",
        classes: int = 256,
        mixtures: int = 10,
        local_channels: int = 0,
        upsample_scales: Sequence[int] = (),
        speakers: int = 0,
        *,
        upsample_options: Mapping[str, Any] | None = None,
        gate_channels: int | None = None,
        speaker_channels: int = 16,
        start: int | float | None = None,
        log_scale_min: float = -7.0,
        weight_norm: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "layers": layers, "cycles": cycles, "residual_channels": residual_channels, "classes": classes,
            "skip_channels": skip_channels, "kernel_size": kernel_size, "mixtures": mixtures,
        }  # fmt: skip
        for name, size in sizes.items():
            check_integer("WaveNet", name, size, 2 if name == "classes" else 1)
        for name, size in (("local_channels", local_channels), ("speakers", speakers)):
            check_integer("WaveNet", name, size, 0)
        check_integer("WaveNet", "speaker_channels", speaker_channels, 1 if speakers else 0)
        if layers % cycles:
            raise ValueError(f"WaveNet: layers must be a multiple of cycles, got {layers} and {cycles}")
        if distribution not in distributions.KINDS:
            raise ValueError(f"WaveNet: distribution must be one of {distributions.KINDS}, got {distribution!r}")
        if not is_finite(log_scale_min):
            raise ValueError(f"WaveNet: log_scale_min must be finite, got {log_scale_min!r}")
        self.config = {
            **sizes, "distribution": distribution, "local_channels": local_channels,
            "upsample_scales": _scales(upsample_scales), "speakers": speakers,
            "upsample_options": None if upsample_options is None else dict(upsample_options),
            "gate_channels": gate_channels, "speaker_channels": speaker_channels, "start": start,
            "log_scale_min": log_scale_min, "weight_norm": weight_norm,
        }  # fmt: skip
        self.distribution, self.classes, self.log_scale_min = distribution, classes, log_scale_min
        self.local_channels, self.speakers = local_channels, speakers
        self.dilations = [2 ** (i % (layers // cycles)) for i in range(layers)]
        self.kernel_size = kernel_size
        categorical = distribution == "categorical"
        self.start = (classes // 2 if categorical else 0.0) if start is None else start
        if categorical and not (type(self.start) is int and 0 <= self.start < classes):
            raise ValueError(f"WaveNet: start must be a class in [0, {classes}), got {start!r}")
        if not (is_finite(self.start) and (categorical or abs(self.start) <= 1)):
            raise ValueError(f"WaveNet: start must be a number in [-1, 1], got {start!r}")

        self.input = nn.Conv1d(classes if categorical else 1, residual_channels, 1)
        if categorical:  # only one input channel is ever on: the default scale, made for sums over all, is too faint
            nn.init.normal_(self.input.weight, std=0.5)
        self.layers = nn.ModuleList(
            WaveNetLayer(
                residual_channels,
                skip_channels,
                kernel_size,
                dilation,
                gate_channels=gate_channels,
                local_channels=local_channels,
                speaker_channels=speaker_channels if speakers else 0,
            )
            for dilation in self.dilations
        )
        self.hidden = Conv1d(skip_channels, skip_channels, 1, relu=True)
        self.output = Conv1d(skip_channels, distributions.output_channels(distribution, classes, mixtures), 1)
        self.embedding = nn.Embedding(speakers, speaker_channels) if speakers else None
        self.upsample: TransposedUpsample | StretchUpsample | None = None
        if upsample_scales:
            self.upsample = _upsampling(upsample_scales, upsample_options or {})
        if weight_norm:
            for module in self.modules():
                if isinstance(module, nn.Conv1d):
                    nn.utils.parametrizations.weight_norm(module)

    @property
    def receptive_field(self) -> int:
        """How many past samples a prediction depends on."""
        return int((self.kernel_size - 1) * sum(self.dilations) + 1)

    def forward(self, x: Tensor, local: Tensor | None = None, speaker: Tensor | None = None) -> Tensor:
        """Parameters (B, O, T) of p(x_t | x before t) for every t; the shift by one sample is inside.

        Parameters
        ----------
        x
            (B, T): int64 classes, or values in [-1, 1].
        local
            (B, local_channels, frames), frames * product(upsample_scales) >= T.
        speaker
            (B,) int64.
        """
        x = self._check_samples("x", x)
        batch, steps = x.shape
        if not steps:
            raise ValueError(f"WaveNet: x must hold at least one sample, got {tuple(x.shape)}")
        previous = torch.cat([torch.full_like(x[:, :1], self.start), x[:, :-1]], 1)
        h = self._embed(previous)
        local = self._upsampled(local, batch, steps)
        speaker_vector = self._speaker(speaker, batch)
        skips: Tensor | None = None
        for layer in self.layers:
            h, skip = layer(h, local, speaker_vector)
            skips = skip if skips is None else skips + skip
        assert skips is not None
        return self.output(self.hidden(F.relu(skips)))  # type: ignore[no-any-return]

    def log_prob(self, x: Tensor, local: Tensor | None = None, speaker: Tensor | None = None) -> Tensor:
        """Log-probability (B,) of x (B, T) in nats (a log-density for "gaussian"), float32."""
        parameters = self.forward(x, local, speaker).movedim(1, -1).float()  # (B, T, O)
        log_p = distributions.log_prob(
            self.distribution, parameters, x, levels=self.classes, log_scale_min=self.log_scale_min
        )
        return log_p.sum(1)

    def bits_per_sample(self, x: Tensor, local: Tensor | None = None, speaker: Tensor | None = None) -> Tensor:
        """-log2 p(x) / T, shape (B,)."""
        return -self.log_prob(x, local, speaker) / (math.log(2) * x.shape[1])

    def generate(
        self,
        steps: int,
        *,
        batch_size: int = 1,
        local: Tensor | Iterable[Tensor] | None = None,
        speaker: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        given: Tensor | None = None,
        state: GenerationState | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        progress: Progress = False,
    ) -> Tensor:
        """Sample `steps` values for each of `batch_size` streams, with queues: O(layers) work for each.

        Parameters
        ----------
        batch_size
            Number of streams.
        local, speaker
            Conditioning, as in `forward`; local must reach over `steps`.
        temperature
            > 0; below 1 samples are likelier and less varied.
        top_k, top_p
            Of classes: draw from the `top_k` most probable ones, and of these from the fewest whose probabilities reach
            `top_p` of theirs, once the temperature is applied; ties with the last one kept are kept. None keeps all.
        uniforms
            (B, steps) in [0, 1), or (B, steps, 2) for mixtures; the same uniforms give the same samples on every
            backend, save where a uniform falls within rounding of a boundary. Drawn from `generator` by default.
        given
            (B, n <= steps): known first samples, which the model continues.
        state
            From `initial_state`, to continue an earlier call; it is advanced in place.
        dtype
            Of the weights inside the loop: float32, or bfloat16, up to three times as fast. Sums stay
            float32; on a CPU what enters a product has 15 bits, relative to the largest of 64 channels.
        backend
            See `fastgen.backend`.
        progress
            True for a progress bar, or a function of (steps done, steps in all).

        Returns
        -------
        (B, steps) int64 classes or float32 values.

        Raises
        ------
        TypeError, ValueError
            For an argument that does not fit; the message names it, what was expected and what came.
        FloatingPointError
            If the weights are so large that the network could overflow float32.
        """
        chunks = wavenet_sampling.stream(
            self, steps, steps, batch_size=batch_size, local=local, speaker=speaker, temperature=temperature,
            top_k=top_k, top_p=top_p, uniforms=uniforms, generator=generator, given=given, state=state, dtype=dtype,
            backend=backend, progress=progress,
        )  # fmt: skip
        return torch.cat(list(chunks), 1)

    sample = generate

    stream = wavenet_sampling.stream

    def initial_state(self, batch_size: int = 1) -> GenerationState:
        """The state before the first sample: empty queues. Pass it to `generate` to continue where a call ended."""
        return initial_state(self.packed_weights(), self.dilations, self._start_samples(batch_size))

    def _start_samples(self, batch_size: int = 1) -> Tensor:
        """(batch_size,) what stands before the first sample: int64 class or float32 value."""
        check_integer("WaveNet", "batch_size", batch_size)
        kind = torch.int64 if self.distribution == "categorical" else torch.float32
        return torch.full((batch_size,), self.start, dtype=kind, device=self.output.bias.device)  # type: ignore[union-attr]

    def packed_weights(self) -> WaveNetWeights:
        """The network's weights in the form that `fastgen.ops.Generator` takes: current, weight norm folded in."""
        layers = self._layers()
        channels = self.input.out_channels
        outs = [folded_weight(layer.out)[:, :, 0] for layer in layers]  # (C + S, H)
        biases = [_bias(layer.out) for layer in layers]
        weights = (
            folded_weight(self.input)[:, :, 0].T,
            _bias(self.input),
            torch.stack([folded_weight(layer.conv) for layer in layers]),
            torch.stack([w[:channels] for w in outs]),
            torch.stack([b[:channels] for b in biases]),
            torch.stack([w[channels:] for w in outs]),
            torch.stack([b[channels:] for b in biases]).sum(0),
            folded_weight(self.hidden)[:, :, 0],
            _bias(self.hidden),
            folded_weight(self.output)[:, :, 0],
            _bias(self.output),
        )
        return WaveNetWeights(*(w.detach().float().contiguous() for w in weights))

    @classmethod
    def from_wavenet_vocoder(cls, source: nn.Module | dict[str, Tensor], **hparams: object) -> WaveNet:
        """A model of the `wavenet_vocoder` project: see `fastgen.models.wavenet_vocoder.convert`."""
        from fastgen.models.wavenet_vocoder import convert

        return convert(source, **hparams)

    def _embed(self, previous: Tensor) -> Tensor:
        """(B, T) samples -> (B, R, T): a column of the input convolution for each class, or a multiple of the one."""
        weight, bias = folded_weight(self.input)[:, :, 0], _bias(self.input)
        if self.distribution == "categorical":
            return F.embedding(previous, weight.T).mT + bias[:, None]
        return previous[:, None].to(weight.dtype) * weight + bias[:, None]

    def _layers(self) -> list[WaveNetLayer]:
        return list(self.layers)  # type: ignore[arg-type]

    def _gate_bias(self, speaker: Tensor | None, batch: int) -> Tensor:
        """(1 or B, L, 2H): the convolutions' biases, and what the speaker adds."""
        layers, vector = self._layers(), self._speaker(speaker, batch)
        bias = torch.stack([_bias(layer.conv) for layer in layers])[None]
        if vector is not None:
            bias = bias + torch.stack([layer.speaker(vector) for layer in layers if layer.speaker is not None], 1)
        return bias.detach().float()

    def _local_weight(self) -> Tensor | None:
        """(L, 2H, local_channels): the 1x1 convolutions of local conditioning."""
        if not self.local_channels:
            return None
        weights = [folded_weight(layer.local)[:, :, 0] for layer in self._layers() if layer.local is not None]
        return torch.stack(weights).detach().float()

    def _speaker(self, speaker: Tensor | None, batch: int) -> Tensor | None:
        if self.embedding is None:
            if speaker is not None:
                raise ValueError("WaveNet: speaker was given, but the model has speakers=0")
            return None
        if speaker is None:
            raise ValueError(f"WaveNet: speaker is needed: (B,) int64 in [0, {self.speakers})")
        check_tensor("WaveNet", "speaker", speaker, f"({batch},) of int64")
        if speaker.shape != (batch,) or speaker.dtype != torch.int64:
            raise ValueError(f"WaveNet: speaker must be ({batch},) int64, got {tuple(speaker.shape)} {speaker.dtype}")
        self._check_device("speaker", speaker)
        if _readable(speaker) and speaker.numel() and not 0 <= int(speaker.min()) <= int(speaker.max()) < self.speakers:
            raise ValueError(f"WaveNet: speaker must lie in [0, {self.speakers}), got {speaker.tolist()}")
        return self.embedding(speaker)  # type: ignore[no-any-return]

    def _upsampled(self, local: Tensor | None, batch: int, steps: int | None) -> Tensor | None:
        """(B, local_channels, frames) -> (B, local_channels, steps), checked."""
        if not self.local_channels:
            if local is not None:
                raise ValueError("WaveNet: local was given, but the model has local_channels=0")
            return None
        if local is None:
            raise ValueError(f"WaveNet: local is needed: (B, {self.local_channels}, frames)")
        check_tensor("WaveNet", "local", local, f"({batch}, {self.local_channels}, frames)")
        if local.dim() != 3 or local.shape[:2] != (batch, self.local_channels):
            raise ValueError(
                f"WaveNet: local must be ({batch}, {self.local_channels}, frames), got {tuple(local.shape)}"
            )
        dtype = self.output.weight.dtype
        if not local.is_floating_point() or (local.dtype != dtype and not under_autocast(local.device)):
            raise TypeError(f"WaveNet: local must be {dtype}, as the model is, got {local.dtype}")
        self._check_device("local", local)
        if self.upsample is not None and local.shape[2]:
            local = self.upsample(local)
        if steps is None:
            return local
        if local.shape[2] < steps:
            raise ValueError(f"WaveNet: local is too short: it covers {local.shape[2]} samples of {steps}")
        return local[:, :, :steps]

    def _check_samples(self, name: str, x: Tensor) -> Tensor:
        categorical = self.distribution == "categorical"
        check_tensor("WaveNet", name, x, "(B, T) of " + ("int64 classes" if categorical else "values in [-1, 1]"))
        if x.dim() != 2:
            raise ValueError(f"WaveNet: {name} must be (B, T), got {tuple(x.shape)}")
        if categorical and x.dtype != torch.int64:
            raise TypeError(f"WaveNet: {name} must be int64 classes, got {x.dtype}")
        if not categorical and not x.is_floating_point():
            raise TypeError(f"WaveNet: {name} must be floating point in [-1, 1], got {x.dtype}")
        self._check_device(name, x)
        if x.device.type == "cpu" and _readable(x):  # elsewhere it would mean to wait for the device
            if categorical:
                check_classes("WaveNet", name, x, self.classes)
            else:
                check_unit_range("WaveNet", name, x)
        return x

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if tensor.device != self.output.bias.device:  # type: ignore[union-attr]
            raise ValueError(f"WaveNet: {name} is on {tensor.device}, the model on {self.output.bias.device}")  # type: ignore[union-attr]


def _scales(upsample_scales: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(upsample_scales, list | tuple):
        raise TypeError(f"WaveNet: upsample_scales must be a list of integers, got {upsample_scales!r}")
    return tuple(upsample_scales)


def _upsampling(scales: Sequence[int], options: Mapping[str, Any]) -> TransposedUpsample | StretchUpsample:
    for scale in scales:
        check_integer("WaveNet", "each of upsample_scales", scale)
    options = dict(options)
    kind = options.pop("kind", "transposed")
    if kind not in UPSAMPLINGS:
        raise ValueError(f"WaveNet: upsample_options['kind'] must be one of {', '.join(UPSAMPLINGS)}, got {kind!r}")
    try:
        return UPSAMPLINGS[kind](scales, **options)  # type: ignore[no-any-return]
    except TypeError as error:
        raise TypeError(f"WaveNet: upsample_options do not fit: {error}") from error


def _readable(x: Tensor) -> bool:
    """Whether there are values to check: not while a graph is captured, nor within torch.func.vmap."""
    if torch.compiler.is_compiling() or x.device.type == "meta":
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _bias(module: nn.Module) -> Tensor:
    return module.bias  # type: ignore[return-value]
