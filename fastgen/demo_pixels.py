"""The demo's Gated PixelCNN: train one on digits, draw and complete some, and time the ways to sample."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.backend import cpu_isa, use_backend, why_not
from fastgen.checkpoints import save_checkpoint
from fastgen.models import GatedPixelCNN, PixelCNN, PixelModel, PixelSNAIL, sample_naive
from fastgen.training_pixels import save_samples, train_pixels

BATCH = 16
LARGE = (28, 28)
REPEATS = 3


def demo_pixels(console: Any, images: Tensor, out: str | os.PathLike[str], seconds: float) -> None:
    """Train for `seconds` on digits, uint8 (N, 1, H, W); write digits.png and pixels.pt; print the table."""
    out = Path(out)
    torch.manual_seed(0)
    model = GatedPixelCNN(levels=16, channels=48, layers=6)
    console.print(
        f"Gated PixelCNN, {sum(p.numel() for p in model.parameters()):,} parameters, {model.levels} levels; "
        f"{len(images)} digits of {images.shape[2]} x {images.shape[3]} pixels"
    )
    log = train_pixels(model, images, seconds=seconds, learning_rate=2e-3, save_every=10**9)
    console.print(
        f"{log.step} steps; held out {log.validation[-1][1]:.2f} bits per pixel "
        f"(uniform guess: {math.log2(model.levels):.0f})"
    )
    save_samples(out / "digits.png", model, images[-BATCH:])
    save_checkpoint(out / "pixels.pt", model, image_size=list(images.shape[2:]))
    _print_speeds(console, model, (images.shape[2], images.shape[3]))
    console.print(
        f"written: {out}/digits.png (two rows of samples; digits, and their upper halves\ncompleted), pixels.pt"
    )


def _print_speeds(console: Any, trained: PixelModel, size: tuple[int, int]) -> None:
    from rich.table import Table

    table = Table(
        title=f"sampling {BATCH} images, {torch.get_num_threads()} threads, instruction set {cpu_isa or 'none'}"
    )
    for heading in ("model", "size", "naive\n[s]", "forward\n[ms]", "float32\n[ms]", "bf16\n[ms]", "logits", "ratio"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    torch.manual_seed(0)
    models = [(trained, size), (GatedPixelCNN(), LARGE), (PixelCNN(), LARGE), (PixelSNAIL(), LARGE)]
    reason = why_not("pixelcnn_generate", "cpu")
    for model, shape in models if reason is None else ():
        table.add_row(*_row(model.eval(), shape, measured=model is trained))
    console.print(table)
    console.print(
        "naive: a forward pass for each pixel (~ one pass times the pixels)\n"
        "forward: one pass of plain PyTorch; float32, bf16: fastgen, by its weights\n"
        "logits: largest difference of fastgen's from the forward pass in float64"
        if reason is None
        else f"fastgen's C++ kernels are not live: {reason}"
    )


@torch.no_grad()
def _row(model: PixelModel, size: tuple[int, int], measured: bool) -> list[str]:
    uniforms = torch.rand(BATCH, 1, *size)
    images = model.sample(BATCH, size, uniforms=uniforms)

    def forward() -> Tensor:
        with use_backend("reference"):
            return model(images)  # type: ignore[no-any-return]

    def naive() -> Tensor:
        with use_backend("reference"):
            return sample_naive(model, BATCH, size, uniforms=uniforms)

    one, single, half = (
        _seconds(call)
        for call in (
            forward,
            lambda: model.sample(BATCH, size, uniforms=uniforms),
            lambda: model.sample(BATCH, size, uniforms=uniforms, dtype=torch.bfloat16),
        )
    )
    loop = _seconds(naive, repeats=1) if measured else one * size[0] * size[1]
    return [
        type(model).__name__, f"{size[0]}x{size[1]}", f"{'' if measured else '~'}{loop:.1f}",
        f"{1e3 * one:.0f}", f"{1e3 * single:.0f}", f"{1e3 * half:.0f}", f"{_difference(model, uniforms):.0e}",
        f"{loop / single:.0f}x",
    ]  # fmt: skip


def _difference(model: PixelModel, uniforms: Tensor) -> float:
    """Of the parameters that sampling computes from those of a forward pass over its images in float64."""
    loop, plane = model.generator((uniforms.shape[2], uniforms.shape[3]))
    images, parameters = loop.run(uniforms, context=plane, parameters=True)
    assert parameters is not None
    exact = type(model)(**model.config).double()
    exact.load_state_dict(model.state_dict())
    with use_backend("reference"):
        return float((parameters - exact(images).movedim(2, -1)).abs().max())


def _seconds(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """The least of a few."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)
