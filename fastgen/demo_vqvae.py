"""The demo's VQ-VAE: train one on digits, show reconstructions, and time the quantizer against plain PyTorch."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.backend import cpu_isa, why_not
from fastgen.checkpoints import save_checkpoint
from fastgen.images import save_grid
from fastgen.models import VQVAE
from fastgen.nn import VectorQuantize
from fastgen.ops import nearest_code
from fastgen.training_images import as_floats, code_perplexities, train_vqvae

SHAPES = ((65536, 512, 64), (32768, 1024, 8))  # rows, codes, features
REPEATS = 5


def demo_vqvae(console: Any, images: Tensor, out: str | os.PathLike[str], seconds: float) -> None:
    """Train for `seconds` on digits, uint8 (N, 1, H, W); write reconstructions.png and vqvae.pt; print the table."""
    out = Path(out)
    torch.manual_seed(0)
    model = VQVAE(
        1, hidden_channels=64, codebook_size=64, code_dim=16, downsample=2, kmeans_init=True,
        threshold_ema_dead_code=1, variance=float(as_floats(images).var()),
    )  # fmt: skip
    console.print(
        f"VQ-VAE, {sum(p.numel() for p in model.parameters()):,} parameters, {model.codebook_size} codes; "
        f"{len(images)} digits of {images.shape[2]} x {images.shape[3]} pixels"
    )
    log = train_vqvae(model, images, seconds=seconds, learning_rate=2e-3, save_every=10**9)
    held_out = images[-(len(images) // 20) :]
    console.print(
        f"{log.step} steps; held-out error {log.validation[-1][1]:.3f} of the variance, "
        f"perplexity of the codes {code_perplexities(model, held_out)[0]:.1f} of {model.codebook_size}"
    )
    model.eval()
    with torch.no_grad():
        shown = as_floats(held_out[:16])
        save_grid(out / "reconstructions.png", [shown, model.decode(model.encode(shown))])
    save_checkpoint(out / "vqvae.pt", model)
    _print_speeds(console)
    console.print(f"written: {out}/reconstructions.png (digits above, reconstructions below), vqvae.pt")


def _print_speeds(console: Any) -> None:
    from rich.table import Table

    table = Table(
        title=f"vector quantization [ms], {torch.get_num_threads()} threads, instruction set {cpu_isa or 'none'}"
    )
    table.add_column("rows x codes\nx features", no_wrap=True)
    for heading in ("search\nPyTorch", "\nfastgen", "\nratio", "step\nPyTorch", "\nfastgen", "\nratio"):
        table.add_column(heading, justify="right")
    reason = why_not("nearest_code", "cpu")
    for shape in SHAPES if reason is None else ():
        cells = []
        for pair in (_search(*shape), _step(*shape)):
            plain, ours = _alternate(*pair)
            cells += [f"{1e3 * plain:.1f}", f"{1e3 * ours:.1f}", f"{plain / ours:.0f}x"]
        table.add_row(" x ".join(map(str, shape)), *cells)
    console.print(table)
    console.print(
        "PyTorch: argmin of the expanded distance; a training step of a straight-through layer with one-hot averages"
        if reason is None
        else f"fastgen's C++ kernels are not live: {reason}"
    )


def _search(rows: int, codes: int, features: int) -> tuple[Callable[[], object], Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    x, codebook = (torch.randn(n, features, generator=generator) for n in (rows, codes))
    return lambda: _distances(x, codebook).argmin(1), lambda: nearest_code(x, codebook)


def _distances(x: Tensor, codebook: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True) - 2 * x @ codebook.T + codebook.square().sum(1)


def _step(rows: int, codes: int, features: int) -> tuple[Callable[[], object], Callable[[], object]]:
    layer = VectorQuantize(features, codes, decay=0.99, rotation_trick=False)
    codebook, size, average = layer.codebook.clone(), torch.ones(codes), layer.codebook.clone()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, rows, features, generator=generator).requires_grad_()

    def plain() -> None:
        flat = x[0]
        with torch.no_grad():
            one_hot = torch.nn.functional.one_hot(_distances(flat, codebook).argmin(1), codes).float()
            quantized = one_hot @ codebook
            size.lerp_(one_hot.sum(0), 0.01)
            average.lerp_(one_hot.T @ flat, 0.01)
            codebook.copy_(average / ((size + 1e-5) / (size.sum() + codes * 1e-5) * size.sum())[:, None])
        loss = (flat - quantized).square().mean()
        (loss + (flat + (quantized - flat).detach()).square().mean()).backward()
        x.grad = None

    def ours() -> None:
        quantized, _, loss = layer(x)
        (loss + quantized.square().mean()).backward()
        x.grad = None

    return plain, ours


def _alternate(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Median seconds of each, taking turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(REPEATS + 1):
        for call, seconds in zip((first, second), times, strict=True):
            began = time.perf_counter()
            call()
            if i:
                seconds.append(time.perf_counter() - began)
    return statistics.median(times[0]), statistics.median(times[1])
