"""WaveNet: an autoregressive model of audio, one sample at a time.

Sources: van den Oord et al., "WaveNet" (2016); Salimans et al., "PixelCNN++" (2017) for the logistic mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn.causal_conv1d import WaveNetLayer, folded_weight
from fastgen.nn.upsample import StretchUpsample, TransposedUpsample
from fastgen.ops import GenerationState, Generator, WaveNetWeights, distributions, initial_state

Progress = bool | Callable[[int, int], None]

CHUNK_WORK = 4_000_000_000  # multiply-adds in one call of the generation op: some tenths of a second on a slow core
CHUNK_CONDITIONING = 16_000_000  # floats of per-layer conditioning in one call


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
        Factors from feature frames to samples, by transposed convolutions; () where features come at the sample rate.
    speakers, speaker_channels
        Number of speakers, 0 for none, and the size of their embedding.
    start
        What the network sees before the first sample: a class (the middle one by default) or a value (0).
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
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"WaveNet: {name} must be an integer >= 1, got {size!r}")
        if layers % cycles:
            raise ValueError(f"WaveNet: layers must be a multiple of cycles, got {layers} and {cycles}")
        if distribution not in distributions.KINDS:
            raise ValueError(f"WaveNet: distribution must be one of {distributions.KINDS}, got {distribution!r}")
        self.config = {
            **sizes, "distribution": distribution, "local_channels": local_channels,
            "upsample_scales": tuple(upsample_scales), "speakers": speakers, "gate_channels": gate_channels,
            "speaker_channels": speaker_channels, "start": start, "log_scale_min": log_scale_min,
            "weight_norm": weight_norm,
        }  # fmt: skip
        self.distribution, self.classes, self.log_scale_min = distribution, classes, log_scale_min
        self.local_channels, self.speakers = local_channels, speakers
        self.dilations = [2 ** (i % (layers // cycles)) for i in range(layers)]
        self.kernel_size = kernel_size
        categorical = distribution == "categorical"
        self.start = (classes // 2 if categorical else 0.0) if start is None else start
        if categorical and not (isinstance(self.start, int) and 0 <= self.start < classes):
            raise ValueError(f"WaveNet: start must be a class in [0, {classes}), got {self.start!r}")

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
        self.hidden = nn.Conv1d(skip_channels, skip_channels, 1)
        self.output = nn.Conv1d(skip_channels, distributions.output_channels(distribution, classes, mixtures), 1)
        self.embedding = nn.Embedding(speakers, speaker_channels) if speakers else None
        self.upsample: TransposedUpsample | StretchUpsample | None = None
        if upsample_scales:
            self.upsample = TransposedUpsample(upsample_scales)
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
        previous = torch.cat([torch.full_like(x[:, :1], self.start), x[:, :-1]], 1)
        h = self._embed(previous)
        local = self._upsampled(local, batch, steps)
        speaker_vector = self._speaker(speaker, batch)
        skips: Tensor | None = None
        for layer in self.layers:
            h, skip = layer(h, local, speaker_vector)
            skips = skip if skips is None else skips + skip
        assert skips is not None
        return self.output(F.relu(self.hidden(F.relu(skips))))  # type: ignore[no-any-return]

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

    @torch.no_grad()
    def generate(
        self,
        steps: int,
        *,
        batch_size: int = 1,
        local: Tensor | None = None,
        speaker: Tensor | None = None,
        temperature: float = 1.0,
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
        local, speaker
            Conditioning, as in `forward`; local must reach over `steps`.
        temperature
            > 0; below 1 samples are likelier and less varied.
        uniforms
            (B, steps) in [0, 1), or (B, steps, 2) for mixtures; the same uniforms give the same samples on every
            backend, save where a uniform falls within rounding of a boundary. Drawn from `generator` by default.
        given
            (B, n <= steps): known first samples, which the model continues.
        state
            From `initial_state`, to continue an earlier call; it is advanced in place.
        dtype
            Of the weights inside the loop: float32, or bfloat16, about twice as fast. Activations and sums stay
            float32, save that CPUs with fast bfloat16 dot products round the activations that enter a product.
        progress
            True for a progress bar, or a function of (steps done, steps in all).

        Returns
        -------
        (B, steps) int64 classes or float32 values.
        """
        chunks = self.stream(
            steps, chunk=steps, batch_size=batch_size, local=local, speaker=speaker, temperature=temperature,
            uniforms=uniforms, generator=generator, given=given, state=state, dtype=dtype, backend=backend,
            progress=progress,
        )  # fmt: skip
        return torch.cat(list(chunks), 1)

    sample = generate

    @torch.no_grad()
    def stream(
        self,
        steps: int,
        chunk: int = 1024,
        *,
        batch_size: int = 1,
        local: Tensor | Iterable[Tensor] | None = None,
        speaker: Tensor | None = None,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        given: Tensor | None = None,
        state: GenerationState | None = None,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        progress: Progress = False,
    ) -> Iterator[Tensor]:
        """`generate`, a chunk at a time: an iterator of (B, chunk), the last one perhaps shorter.

        `local` may also be an iterable of blocks (B, local_channels, frames): a block is asked for when the samples
        before it are out, so that generation starts while features still arrive. The weights are those at the start.
        """
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"generate: steps must be an integer >= 1, got {steps!r}")
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"stream: chunk must be an integer >= 1, got {chunk!r}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"generate: batch_size must be an integer >= 1, got {batch_size!r}")
        if not (isinstance(temperature, int | float) and temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"generate: temperature must be finite and > 0, got {temperature!r}")
        if not 1e-30 <= temperature <= 1e30:
            raise ValueError(f"generate: temperature must lie in [1e-30, 1e30], got {temperature}")
        if uniforms is not None:
            self._check_uniforms(uniforms, batch_size, steps)
        if given is not None:
            given = self._check_samples("given", given)
            given = given if self.distribution == "categorical" else given.float()
            if given.shape[0] != batch_size or given.shape[1] > steps:
                raise ValueError(f"generate: given must be ({batch_size}, at most {steps}), got {tuple(given.shape)}")
            if given.is_floating_point() and not bool((given.abs() <= 1).all()):
                raise ValueError("generate: given must lie in [-1, 1], got values outside or NaN")
        for name, parameter in self.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                raise ValueError(f"generate: the model's weights must be finite, {name} holds NaN or infinity")
        if isinstance(local, Tensor) or local is None:
            upsampled = _finite(self._upsampled(local, batch_size, steps))
            blocks: Iterator[Tensor] = iter(() if upsampled is None else (upsampled,))
        else:
            if self.upsample is not None and self.upsample.context:
                raise ValueError("stream: local must be one tensor: this model's upsampling looks at later frames")
            blocks = (_finite(self._upsampled(block, batch_size, None)) for block in local)  # type: ignore[misc]
        loop = Generator(
            self.packed_weights(), self.dilations, distribution=self.distribution,
            log_scale_min=self.log_scale_min, dtype=dtype, backend=backend,
        )  # fmt: skip
        if state is None:
            state = self.initial_state(batch_size)
        elif state.last.shape[0] != batch_size:
            raise ValueError(f"generate: state is for {state.last.shape[0]} streams, batch_size is {batch_size}")
        gate_bias = self._gate_bias(self._speaker(speaker, batch_size))
        return self._chunks(
            loop, state, gate_bias, blocks, steps, chunk, temperature, uniforms, generator, given, progress
        )

    def _chunks(
        self,
        loop: Generator,
        state: GenerationState,
        gate_bias: Tensor,
        blocks: Iterator[Tensor],
        steps: int,
        chunk: int,
        temperature: float,
        uniforms: Tensor | None,
        generator: torch.Generator | None,
        given: Tensor | None,
        progress: Progress,
    ) -> Iterator[Tensor]:
        batch = state.last.shape[0]
        pair = () if self.distribution == "categorical" else (2,)
        weights = sum(t.numel() for t in loop.weights)
        # fixed by the shapes alone, so that two runs make the same calls and give the same bits
        call = max(1, min(16384, CHUNK_WORK // (weights * batch)))
        local_weight = self._local_weight()
        if local_weight is not None:
            call = max(1, min(call, CHUNK_CONDITIONING // (local_weight.shape[0] * batch)))
        local = gate_bias.new_empty(batch, self.local_channels, 0)
        with _reporter(progress, steps) as report:
            done = 0
            while done < steps:
                wanted = min(chunk, steps - done)
                parts = []
                with torch.no_grad():  # not around the yield: it would hold for the caller too
                    while wanted:
                        n = min(call, wanted)
                        cond = None
                        if local_weight is not None:
                            while local.shape[2] < n:
                                block = next(blocks, None)
                                if block is None:
                                    raise ValueError(
                                        f"stream: local ended after {done + local.shape[2]} samples, {steps} are wanted"
                                    )
                                local = torch.cat([local, block.float()], 2)
                            cond = F.linear(local[:, :, :n].mT, local_weight).float()  # (B, n, L * 2H)
                            cond = cond.view(batch, n, len(self.layers), -1)
                            local = local[:, :, n:]
                        if uniforms is None:
                            # drawn step by step, so that the samples do not depend on the size of the chunks
                            u = torch.rand(n, batch, *pair, generator=generator, dtype=torch.float32).transpose(0, 1)
                        else:
                            u = uniforms[:, done : done + n].float().clamp(max=1 - 2**-24)
                        known = None if given is None else given[:, done : done + n]
                        parts.append(
                            loop.run(
                                state, u, gate_bias, cond, temperature=temperature,
                                given=known if known is not None and known.shape[1] else None,
                            )[0]
                        )  # fmt: skip
                        done, wanted = done + n, wanted - n
                        report(done)
                yield torch.cat(parts, 1)

    def initial_state(self, batch_size: int = 1) -> GenerationState:
        """The state before the first sample: empty queues. Pass it to `generate` to continue where a call ended."""
        kind = torch.int64 if self.distribution == "categorical" else torch.float32
        start = torch.full((batch_size,), self.start, dtype=kind, device=self.output.bias.device)  # type: ignore[union-attr]
        return initial_state(self.packed_weights(), self.dilations, start)

    def packed_weights(self) -> WaveNetWeights:
        """The network's weights in the form that `fastgen.ops.Generator` takes: current, weight norm folded in."""
        layers: list[WaveNetLayer] = list(self.layers)  # type: ignore[arg-type]
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

    def _gate_bias(self, speaker: Tensor | None) -> Tensor:
        """(1 or B, L, 2H): the convolutions' biases, and what the speaker adds."""
        layers: list[WaveNetLayer] = list(self.layers)  # type: ignore[arg-type]
        bias = torch.stack([_bias(layer.conv) for layer in layers])[None]
        if speaker is not None:
            bias = bias + torch.stack([layer.speaker(speaker) for layer in layers if layer.speaker is not None], 1)
        return bias.detach().float()

    def _local_weight(self) -> Tensor | None:
        """(L * 2H, local_channels): the 1x1 convolutions of local conditioning, all layers."""
        if not self.local_channels:
            return None
        layers: list[WaveNetLayer] = list(self.layers)  # type: ignore[arg-type]
        return torch.cat([folded_weight(layer.local)[:, :, 0] for layer in layers if layer.local is not None]).float()

    def _speaker(self, speaker: Tensor | None, batch: int) -> Tensor | None:
        if self.embedding is None:
            if speaker is not None:
                raise ValueError("WaveNet: speaker was given, but the model has speakers=0")
            return None
        if speaker is None:
            raise ValueError(f"WaveNet: speaker is needed: (B,) int64 in [0, {self.speakers})")
        if speaker.shape != (batch,) or speaker.dtype != torch.int64:
            raise ValueError(f"WaveNet: speaker must be ({batch},) int64, got {tuple(speaker.shape)} {speaker.dtype}")
        if torch.compiler.is_compiling():
            return self.embedding(speaker)  # type: ignore[no-any-return]
        if speaker.numel() and not 0 <= int(speaker.min()) <= int(speaker.max()) < self.speakers:
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
        if local.dim() != 3 or local.shape[:2] != (batch, self.local_channels):
            raise ValueError(
                f"WaveNet: local must be ({batch}, {self.local_channels}, frames), got {tuple(local.shape)}"
            )
        dtype = self.output.weight.dtype
        if not local.is_floating_point() or (local.dtype != dtype and not torch.is_autocast_enabled(local.device.type)):
            raise TypeError(f"WaveNet: local must be {dtype}, as the model is, got {local.dtype}")
        local = local if self.upsample is None else self.upsample(local)
        if steps is None:
            return local
        if local.shape[2] < steps:
            raise ValueError(f"WaveNet: local is too short: it covers {local.shape[2]} samples of {steps}")
        return local[:, :, :steps]

    def _check_samples(self, name: str, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"WaveNet: {name} must be (B, T), got {tuple(x.shape)}")
        if self.distribution == "categorical":
            if x.dtype != torch.int64:
                raise TypeError(f"WaveNet: {name} must be int64 classes, got {x.dtype}")
            if not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel():
                low, high = int(x.min()), int(x.max())
                if low < 0 or high >= self.classes:
                    raise ValueError(f"WaveNet: {name} must lie in [0, {self.classes}), got {low} to {high}")
        elif not x.is_floating_point():
            raise TypeError(f"WaveNet: {name} must be floating point in [-1, 1], got {x.dtype}")
        return x

    def _check_uniforms(self, uniforms: Tensor, batch: int, steps: int) -> None:
        shape = (batch, steps) if self.distribution == "categorical" else (batch, steps, 2)
        if tuple(uniforms.shape) != shape:
            raise ValueError(f"generate: uniforms must be {shape}, got {tuple(uniforms.shape)}")
        if not uniforms.is_floating_point():
            raise TypeError(f"generate: uniforms must be floating point, got {uniforms.dtype}")
        if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
            raise ValueError(
                f"generate: uniforms must lie in [0, 1), got {float(uniforms.min())} to {float(uniforms.max())}"
            )


def _finite(local: Tensor | None) -> Tensor | None:
    if local is not None and not bool(torch.isfinite(local).all()):
        raise ValueError("generate: local holds NaN or infinity, or becomes so when upsampled")
    return local


def _bias(module: nn.Module) -> Tensor:
    return module.bias  # type: ignore[return-value]


class _reporter:
    """A function of the steps done: a progress bar, the caller's function, or nothing."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress, self.steps = progress, steps
        self.stop: Callable[[], None] | None = None

    def __enter__(self) -> Callable[[int], object]:
        if callable(self.progress):
            report, steps = self.progress, self.steps
            return lambda done: report(done, steps)
        if not self.progress:
            return lambda done: None
        try:
            from rich.progress import Progress as Bar
        except ImportError as error:
            raise ImportError("generate: progress=True needs rich: pip install fastgen-kernels[demo]") from error
        bar = Bar(*Bar.get_default_columns(), transient=True)
        bar.start()
        self.stop = bar.stop
        task = bar.add_task("samples", total=self.steps)
        return lambda done: bar.update(task, completed=done)

    def __exit__(self, *exception: object) -> None:
        if self.stop is not None:
            self.stop()
