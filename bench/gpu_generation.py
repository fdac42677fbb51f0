"""Sampling on the GPU, for bench/gpu.py: streams of samples, and images. In a rehearsal the CPU samples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from gpu_cases import Case
from gpu_peers import DEVICE
from torch import Tensor, nn

from fastgen.backend import use_backend, why_not
from fastgen.models import GatedPixelCNN, PixelRNN, WaveNet
from fastgen.ops.masked_conv2d import weight_mask

STEPS, EAGER_STEPS, RATE = 1000, 50, 16000


def on_cpu(op: str) -> str:
    return "cpu" if why_not(op, "cpu") is None else "reference"


def sampler(op: str) -> str:
    return "cuda" if DEVICE == "cuda" else on_cpu(op)


def verify_samples(name: str, op: str, model: nn.Module, draw: Callable[[nn.Module, str, str], Tensor]) -> None:
    """As the CPU draws for the same uniforms, but for streams where one falls within rounding of a boundary."""
    got, expected = draw(model, DEVICE, sampler(op)).cpu(), draw(copy.deepcopy(model).cpu(), "cpu", on_cpu(op))
    same = float((got == expected).flatten(1).all(1).float().mean())
    if same < 0.9:
        raise AssertionError(f"{name}: {same:.0%} of the streams are those of the CPU")


def wavenet_cases(
    name: str, dtype: torch.dtype, layers: int, width: int, skip: int, kernel: int, streams: tuple[int, ...], steps: int
) -> Iterator[Case]:
    """With the reference's loop beside, in float32 and for a part of the steps."""
    model = WaveNet(layers, max(1, layers // 10), residual_channels=width, skip_channels=skip, kernel_size=kernel)
    model = model.to(DEVICE)
    few = torch.rand(64, 12)

    def draw(model: nn.Module, device: str, backend: str) -> Tensor:
        return model.generate(12, batch_size=64, uniforms=few.to(device), dtype=dtype, backend=backend)

    verify_samples(name, "wavenet_generate", model, draw)
    operations = 2.0 * (layers * width * (2 * width * kernel + width + skip) + skip * (skip + 256))
    for batch in streams:
        uniforms = torch.rand(batch, steps, device=DEVICE)
        run = partial(model.generate, batch_size=batch, dtype=dtype)
        ways = {"fastgen": partial(run, steps, uniforms=uniforms, backend=sampler("wavenet_generate"))}
        some = min(EAGER_STEPS, steps)
        if dtype == torch.float32:
            ways["eager"] = partial(run, some, uniforms=uniforms[:, :some].contiguous(), backend="reference")
        yield Case(
            f"{name}, {batch} stream{'s' * (batch > 1)}", ways, operations=operations * batch * steps,
            chain=steps * (layers * 0.3e-6 + 1e-6), shares={"eager": some / steps},
            facts={
                "network": name.removeprefix("wavenet_generate ").rsplit(" ", 1)[0], "streams": batch,
                "dtype": str(dtype).removeprefix("torch."), "samples": batch * steps, "rate": RATE,
            },
        )  # fmt: skip


def live_weights(model: nn.Module) -> int:
    """Of all convolutions, without what is behind masks."""
    live = 0
    for module in model.modules():
        if isinstance(weight := getattr(module, "weight", None), Tensor):
            of = weight_mask(weight, module.mask, module.colors) if hasattr(module, "mask") else weight.bool() | True
            live += int(of.expand_as(weight).sum())
    return live


def image_cases(
    name: str, dtype: torch.dtype, make: Callable[[], GatedPixelCNN | PixelRNN], meetings: int, size: tuple[int, int],
    batches: tuple[int, ...],
) -> Iterator[Case]:  # fmt: skip
    """Beside one forward pass of eager PyTorch's; a loop over pixels makes one for each. meetings: of the blocks, for a
    pixel."""
    model = make().to(DEVICE)
    few = torch.rand(32, 1, 5, 6)

    def draw(model: nn.Module, device: str, backend: str) -> Tensor:
        return model.sample(32, (5, 6), uniforms=few.to(device), dtype=dtype, backend=backend)

    verify_samples(name, "pixelcnn_generate", model, draw)
    pixels = size[0] * size[1]
    for images in batches:
        uniforms = torch.rand(images, 1, *size, device=DEVICE)
        draw_all = partial(
            model.sample, images, size, uniforms=uniforms, dtype=dtype, backend=sampler("pixelcnn_generate")
        )
        ways = {"fastgen": draw_all, "one eager forward pass": partial(forward_pass, model, (uniforms < 0.5).long())}
        yield Case(
            f"{name}, {images} image{'s' * (images > 1)}", ways, operations=2.0 * live_weights(model) * images * pixels,
            chain=pixels * meetings * 1e-6, facts={"images": images},
        )  # fmt: skip


@torch.no_grad()
def forward_pass(model: nn.Module, x: Tensor) -> object:
    with use_backend("reference"):
        return model(x)


def generation_listing(tiny: bool) -> list[tuple[str, Callable[[], Iterator[Case]]]]:
    networks = [(3, 8, 8, 2)] if tiny else [(20, 64, 128, 2), (30, 128, 256, 2), (20, 64, 128, 3)]
    streams, steps = ((1, 5), 8) if tiny else ((1, 16, 64, 256, 1024), STEPS)
    channels, layers, size, batches = (8, 2, (3, 4), (1, 3)) if tiny else (128, 10, (28, 28), (1, 16, 256))
    width, lstms = (8, 1) if tiny else (64, 7)
    entries: list[tuple[str, Callable[[], Iterator[Case]]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for n in networks:
            name = "wavenet_generate L{} R{} S{} K{} {}".format(*n, kind)
            few = streams if n[3] == 2 else streams[:1]
            entries.append((name, partial(wavenet_cases, name, dtype, *n, few, steps)))
        of = f"{size[0]}x{size[1]} {kind}"
        models: dict[str, tuple[Callable[[], GatedPixelCNN | PixelRNN], int]] = {
            f"{layers} x {channels}": (partial(GatedPixelCNN, channels=channels, layers=layers), 2 * layers + 4),
            f"PixelRNN, {lstms} row LSTMs x {width}": (
                partial(PixelRNN, channels=width, layers=lstms, kind="row"),
                2 * lstms + 4,
            ),
            f"PixelRNN, {lstms} diagonal BiLSTMs x {width}": (
                partial(PixelRNN, channels=width, layers=lstms, kind="diagonal"),
                4 * lstms + 4,
            ),
        }
        for network, (make, meetings) in models.items():
            name = f"pixelcnn_generate {network}, {of}"
            entries.append((name, partial(image_cases, name, dtype, make, meetings, size, batches)))
    return entries
