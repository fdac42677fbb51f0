"""Networks, conditioning, and the exact answers that tests of WaveNet and its generation hold results against."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgen
from fastgen.models import WaveNet
from fastgen.ops import GenerationState, WaveNetWeights, initial_state

OP = "wavenet_generate"
BACKENDS = ("cpu", "reference")
Need = Callable[[str, str], None]
Ran = Callable[[str, str], AbstractContextManager[None]]


def network(
    layers: int = 4,
    residual: int = 16,
    gate: int = 16,
    skip: int = 16,
    outputs: int = 16,
    kernel_size: int = 2,
    distribution: str = "categorical",
    gain: float = 1.0,
    seed: int = 0,
) -> WaveNetWeights:
    """Random weights large enough that gates saturate at times and probabilities are far from uniform."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, fan: int) -> Tensor:
        return gain * torch.randn(*shape, generator=g) / math.sqrt(fan)

    weights = WaveNetWeights(
        input=normal(outputs if distribution == "categorical" else 1, residual, fan=1),
        input_bias=normal(residual, fan=4),
        conv=normal(layers, 2 * gate, residual, kernel_size, fan=residual * kernel_size),
        residual=normal(layers, residual, gate, fan=gate),
        residual_bias=normal(layers, residual, fan=16),
        skip=2 * normal(layers, skip, gate, fan=gate * layers),
        skip_bias=normal(skip, fan=4),
        hidden=2 * normal(skip, skip, fan=skip),
        hidden_bias=normal(skip, fan=4),
        output=2 * normal(outputs, skip, fan=skip),
        output_bias=normal(outputs, fan=4),
    )
    if distribution != "categorical":  # values mostly inside (-1, 1), scales around exp(-3)
        count = distributions_of(outputs)
        probe = torch.rand(4, 200, generator=g) - 0.5
        out = teacher_forced(weights, [1] * layers, probe[:, 0], probe, torch.zeros(1, layers, 2 * gate)).float()
        for rows, mean, std in ((slice(-2 * count, -count), 0.0, 0.25), (slice(-count, None), -3.0, 0.4)):
            factor = std / out[..., rows].std()
            weights.output[rows] *= factor
            weights.output_bias[rows] = mean - (out[..., rows].mean((0, 1)) - weights.output_bias[rows]) * factor
    return weights


def distributions_of(outputs: int) -> int:
    return 1 if outputs == 2 else outputs // 3


def default_network(seed: int = 0, gain: float = 1.0) -> tuple[WaveNetWeights, list[int]]:
    return network(20, 64, 64, 128, 256, gain=gain, seed=seed), [2 ** (i % 10) for i in range(20)]


def conditioning(w: WaveNetWeights, batch: int, steps: int, streams: int = 1, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    layers, gates = w.conv.shape[:2]
    return (
        torch.randn(streams, layers, gates, generator=g) / 2,
        torch.randn(batch, steps, layers, gates, generator=g) / 2,
    )


def first(w: WaveNetWeights, dilations: list[int], batch: int, distribution: str = "categorical") -> GenerationState:
    kind = torch.int64 if distribution == "categorical" else torch.float32
    return initial_state(w, dilations, torch.full((batch,), 1, dtype=kind))


def draw(distribution: str, batch: int, steps: int, seed: int = 2) -> Tensor:
    shape = (batch, steps) if distribution == "categorical" else (batch, steps, 2)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def teacher_forced(
    w: WaveNetWeights,
    dilations: list[int],
    start: Tensor,
    samples: Tensor,
    gate_bias: Tensor,
    cond: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Parameters (B, T, O) from whole sequences, layer by layer: no queue, no packing, no sampling."""
    w = WaveNetWeights(*(t.to(dtype) for t in w))
    previous = torch.cat([start[:, None], samples[:, :-1]], 1)
    x = w.input[previous] if previous.dtype == torch.int64 else previous.to(dtype)[..., None] * w.input[0]
    x = (x + w.input_bias).mT  # (B, R, T)
    skips = w.skip_bias[:, None]
    for i, d in enumerate(dilations):
        taps, steps = w.conv.shape[3], x.shape[2]
        padded = F.pad(x, ((taps - 1) * d, 0))
        a = sum(w.conv[i, :, :, j] @ padded[:, :, j * d : j * d + steps] for j in range(taps))
        a = a + gate_bias[:, i, :, None].to(dtype)
        if cond is not None:
            a = a + cond[:, :, i].mT.to(dtype)
        tanh, sigmoid = a.chunk(2, 1)
        z = torch.tanh(tanh) * torch.sigmoid(sigmoid)
        skips = skips + w.skip[i] @ z
        x = x + w.residual[i] @ z + w.residual_bias[i][:, None]
    hidden = w.hidden @ F.relu(skips) + w.hidden_bias[:, None]
    return (w.output @ F.relu(hidden) + w.output_bias[:, None]).mT


def inverted(
    distribution: str,
    parameters: Tensor,
    uniforms: Tensor,
    samples: Tensor,
    temperature: float = 1.0,
    log_scale_min: float = -7.0,
    near: float = 1e-5,
    most_clamped: float = 0.7,
) -> None:
    """Assert that each sample is the inverse of the distribution function at its uniform.

    A class (or component) may differ from the exact one only where the uniform lies within `near` of its boundary.
    """
    p, u = parameters.double(), uniforms.double()
    if distribution == "categorical":
        above = torch.softmax(p / temperature, -1).cumsum(-1)
        low = F.pad(above, (1, 0))[..., :-1].gather(-1, samples[..., None])[..., 0]
        high = above.gather(-1, samples[..., None])[..., 0]
        last = samples == p.shape[-1] - 1
        assert bool((u >= low - near).all())
        assert bool(((u < high + near) | last).all())
        exact = ((u >= low) & (u < high)).double().mean()
        assert exact > 0.999, f"only {exact:.4f} of the samples are exact: near-ties do not explain that"
        return
    mixtures = distributions_of(p.shape[-1])
    means, log_scales = p[..., -2 * mixtures : -mixtures], p[..., -mixtures:].clamp(min=log_scale_min)
    logits = torch.zeros_like(means) if mixtures == 1 else p[..., :mixtures]
    above = torch.softmax(logits / temperature, -1).cumsum(-1)
    component = (u[..., :1] >= F.pad(above, (1, 0))[..., :-1] - near) & (u[..., :1] < above + near)  # (B, T, M)
    assert bool((component.sum(-1) <= 1).double().mean() > 0.999), "near-ties are rare"
    x = samples.double()[..., None]
    unit = (x - means) / (temperature * log_scales.exp())
    cdf = torch.special.ndtr(unit) if distribution == "gaussian" else torch.sigmoid(unit)
    v = uniforms.double()[..., 1:].clamp(1e-7, 1 - 1e-7)
    close = (cdf - v).abs() < 1e-4 + 1e-7 * unit.abs().clamp(max=1e3)
    clamped = ((x == 1) & (cdf <= v + 1e-4)) | ((x == -1) & (cdf >= v - 1e-4))
    assert bool((component & (close | clamped)).any(-1).all())
    assert float(clamped.any(-1).double().mean()) < most_clamped, "the test's network must sample mostly inside (-1, 1)"


def loud(model: WaveNet, scale: float = 4.0) -> WaveNet:
    """Random biases and larger output weights: an untrained network's outputs hardly depend on its input."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
        model.output.weight.mul_(scale)
    return model


def small(distribution: str = "categorical", **options: object) -> WaveNet:
    sizes = {"layers": 4, "cycles": 2, "residual_channels": 8, "skip_channels": 8, "classes": 10, "mixtures": 2}
    return loud(WaveNet(distribution=distribution, **{**sizes, **options}))


def random_samples(model: WaveNet, batch: int, steps: int) -> Tensor:
    if model.distribution == "categorical":
        return torch.randint(0, model.classes, (batch, steps))
    return torch.rand(batch, steps).double() * 2 - 1


def matches_forward(model: WaveNet, u: Tensor, samples: Tensor, **conditions: Tensor) -> None:
    """The samples are drawn from what the double-precision forward says now."""
    parameters = copy.deepcopy(model).double()
    local = conditions.get("local")
    with torch.no_grad(), fastgen.use_backend("reference"):
        out = parameters(samples, None if local is None else local.double(), conditions.get("speaker")).mT
    inverted(model.distribution, out, u, samples, near=1e-4, most_clamped=0.9)
