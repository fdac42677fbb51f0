"""`python -m fastgen demo`: train a small WaveNet, generate a second of audio, time the ways to do so; then images.

The teacher-forced forward in float64 on the generated samples is the truth that each way's logits are held against.
"""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.audio import load_folder, mu_law_decode, save_audio, speech_path
from fastgen.backend import cpu_isa, why_not
from fastgen.demo_flows import demo_flows
from fastgen.demo_pixels import demo_pixels
from fastgen.demo_vqvae import demo_vqvae
from fastgen.files import whole_file
from fastgen.images import load_images
from fastgen.models import WaveNet
from fastgen.ops import Generator, distributions
from fastgen.training import save_checkpoint, train_wavenet

PARTS = ("wavenet", "vqvae", "pixels", "flows")
RATE = 16000  # Hz
TEMPERATURE = 1.0
NAIVE_STEPS = 20
QUEUE_STEPS = 400
REPEATS = 3


class Row(NamedTuple):
    """A line of the table."""

    name: str
    speed: float  # samples/s
    error: float  # largest difference of logits from the float64 forward
    divergence: tuple[float, float] | None = None  # KL(float32 || this) in nats: mean, max


def demo(
    data: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "out",
    seconds: float = 60.0,
    only: str | None = None,
) -> None:
    """Train a WaveNet for `seconds`, a VQ-VAE and a Gated PixelCNN for half of that each, a flow for a quarter.

    Prints tables of speeds, and writes sample.wav, sample.png, wavenet.pt, reconstructions.png, vqvae.pt, digits.png,
    pixels.pt, moons.png and flow.pt into the folder `out`.

    Parameters
    ----------
    data
        A WAV or FLAC file or a folder of them, any rate, mono or stereo; by default the speech that comes with fastgen.
    only
        "wavenet", "vqvae", "pixels" or "flows": that part alone.

    Raises
    ------
    ImportError
        Where rich, matplotlib, soundfile, pillow or scikit-learn is missing.
    ValueError, FileNotFoundError
        As `fastgen.audio.load_folder` and `fastgen.training.train_wavenet`.
    """
    if only is not None and only not in PARTS:
        raise ValueError(f"demo: only must be one of {PARTS} or None, got {only!r}")
    parts = PARTS if only is None else (only,)
    console = _rich_console()
    # what is missing is found out before the training
    images = load_images() if {"vqvae", "pixels"} & set(parts) else None
    if "wavenet" in parts:
        _demo_wavenet(console, data, Path(out), seconds)
    if "vqvae" in parts and images is not None:
        demo_vqvae(console, images, out, seconds / 2)
    if "pixels" in parts and images is not None:
        demo_pixels(console, images, out, seconds / 2)
    if "flows" in parts:
        demo_flows(console, out, seconds / 4)


def _demo_wavenet(console: Any, data: str | os.PathLike[str] | None, out: Path, seconds: float) -> None:
    plot = _plot_function()
    clips = load_folder(speech_path() if data is None else data, RATE)
    torch.manual_seed(0)
    model = WaveNet()
    length = sum(map(len, clips)) / RATE
    console.print(
        f"WaveNet, {len(model.layers)} layers, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"receptive field {model.receptive_field / RATE * 1000:.0f} ms; {length:.1f} s of audio at {RATE} Hz"
    )
    log = train_wavenet(
        model, clips, RATE, seconds=seconds, batch_size=2, segment=min(2048, int(length * RATE * 0.9)),
        learning_rate=2e-3, save_every=10**9,
    )  # fmt: skip
    tenth = max(1, len(log.losses) // 10)
    first, last = statistics.mean(log.losses[:tenth]), statistics.mean(log.losses[-tenth:])
    console.print(
        f"{log.step} steps; bits per sample: first tenth {first:.2f}, last tenth {last:.2f}, "
        f"held-out tail {log.validation[-1][1]:.2f} (uniform guess: {math.log2(model.classes):.0f})"
    )
    save_checkpoint(out / "wavenet.pt", model, RATE)

    model.eval()
    uniforms = torch.rand(1, RATE, generator=torch.Generator().manual_seed(0))
    samples = model.generate(RATE, uniforms=uniforms, temperature=TEMPERATURE, progress=True)
    audio = mu_law_decode(samples[0], model.classes)
    save_audio(out / "sample.wav", audio, RATE)
    with whole_file(out / "sample.png") as temporary:
        plot(temporary, audio, max(clips, key=len))
    _print_table(console, compare(model, samples))
    console.print(f"written: {out}/sample.wav, sample.png, wavenet.pt")


@torch.no_grad()
def compare(model: WaveNet, samples: Tensor) -> list[Row]:
    """Speed and exactness of each way to generate, on samples (1, T) that the model has generated, T > 20."""
    truth = copy.deepcopy(model).double()(samples)[0].T  # (T, classes)
    rows = [
        _naive(model, samples, truth),
        _loop("PyTorch queue", model, samples[:, :QUEUE_STEPS], truth, "reference")[0],
    ]
    if why_not("wavenet_generate", "cpu") is None:
        single, logits = _loop("fastgen float32", model, samples, truth, "cpu")
        half, half_logits = _loop("fastgen bf16 weights", model, samples, truth, "cpu", torch.bfloat16)
        log_p, log_q = F.log_softmax(logits.double(), -1), F.log_softmax(half_logits.double(), -1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # (T,)
        rows += [single, half._replace(divergence=(float(kl.mean()), float(kl.max())))]
    return rows


def _naive(model: WaveNet, samples: Tensor, truth: Tensor) -> Row:
    """A forward over the receptive field for each sample; a few at the end, where the field is full, stand for all."""
    total = samples.shape[1]
    error, times = 0.0, []
    for t in range(total - NAIVE_STEPS, total):
        began = time.perf_counter()
        window = samples[:, max(0, t - model.receptive_field) : t + 1]  # the last one only fills the place to predict
        logits = model(window)[0, :, -1]
        distributions.categorical_from_uniform(logits, torch.rand(()))
        times.append(time.perf_counter() - began)
        error = max(error, float((logits - truth[t]).abs().max()))
    return Row(f"naive loop (from {NAIVE_STEPS} samples)", 1 / statistics.median(times), error)


def _loop(
    name: str, model: WaveNet, samples: Tensor, truth: Tensor, backend: str, dtype: torch.dtype = torch.float32
) -> tuple[Row, Tensor]:
    steps = samples.shape[1]
    uniforms = torch.rand(1, steps, generator=torch.Generator().manual_seed(1))
    weights = model.packed_weights()
    loop = Generator(weights, model.dilations, dtype=dtype, backend=backend)
    gate_bias = torch.stack([layer.get_parameter("conv.bias") for layer in model.layers])[None].detach()

    def run(**options: Any) -> tuple[Tensor, Tensor | None]:
        return loop.run(model.initial_state(), uniforms, gate_bias, **options)

    logits = run(given=samples, parameters=True)[1]
    assert logits is not None
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    error = float((logits[0] - truth[:steps]).abs().max())
    return Row(name, steps / statistics.median(times), error), logits[0]


def _print_table(console: Any, rows: list[Row]) -> None:
    from rich.table import Table

    table = Table(title=f"generation, batch 1, {torch.get_num_threads()} threads, instruction set {cpu_isa or 'none'}")
    table.add_column("way")
    for heading in ("samples/s", "x naive", "x real time", "logits: largest error", "KL from float32 [nat]: mean, max"):
        table.add_column(heading, justify="right")
    for row in rows:
        kl = "" if row.divergence is None else "{:.1e}, {:.1e}".format(*row.divergence)
        speed = f"{row.speed:,.0f}" if row.speed >= 100 else f"{row.speed:.1f}"
        table.add_row(
            row.name, speed, f"{row.speed / rows[0].speed:,.0f}", f"{row.speed / RATE:.3g}", f"{row.error:.1e}", kl
        )
    console.print(table)
    console.print("errors are against the teacher-forced float64 forward on the same samples")
    reason = why_not("wavenet_generate", "cpu")
    if reason is not None:
        console.print(f"fastgen's C++ loop is not live: {reason}")


def _rich_console() -> Any:
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError("demo: needs rich: pip install fastgen-kernels[demo]") from error
    return Console(markup=False, highlight=False)


def _plot_function() -> Callable[[Path, Tensor, Tensor], None]:
    """Looked up before the training, so that a missing matplotlib is not found out after it."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("demo: needs matplotlib: pip install fastgen-kernels[demo]") from error

    def plot(path: Path, generated: Tensor, training: Tensor) -> None:
        """Waveforms over spectrograms: a second of the training audio, and the sample."""
        figure = Figure(figsize=(12, 6), layout="constrained")
        axes = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=(1, 2))
        columns = {"training audio": training[: len(generated)], "generated by the WaveNet": generated}
        for (title, x), (above, below) in zip(columns.items(), axes.T, strict=True):
            seconds = torch.arange(len(x)) / RATE
            above.plot(seconds.numpy(), x.numpy(), linewidth=0.5)
            above.set_title(title)
            above.grid(alpha=0.3)
            image = below.imshow(
                _spectrogram(x).numpy(), origin="lower", aspect="auto", cmap="magma", vmin=-80, vmax=0,
                extent=(0, len(x) / RATE, 0, RATE / 2000),
            )  # fmt: skip
            below.set_xlabel("time [s]")
        axes[0, 0].set_ylabel("amplitude")
        axes[1, 0].set_ylabel("frequency [kHz]")
        figure.colorbar(image, ax=axes[1], label="power [dB relative to the peak]")
        figure.savefig(path, dpi=120)

    return plot


def _spectrogram(x: Tensor) -> Tensor:
    """Power (257, frames) of x (T,) in dB below its peak: Hann windows of 32 ms, 2 ms apart."""
    window = torch.hann_window(RATE * 32 // 1000)
    spectrum = torch.stft(x, 512, RATE * 2 // 1000, len(window), window, pad_mode="constant", return_complex=True)
    power = spectrum.abs().square().clamp(min=1e-12)
    return 10 * torch.log10(power / power.max())
