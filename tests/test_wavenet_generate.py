"""Generation with queues: every backend against a float64 forward without queues, and against its own uniforms."""

from __future__ import annotations

import copy
import math
import os
import re
import subprocess
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgen.backend
from fastgen.models import WaveNet
from fastgen.ops import GenerationState, Generator, WaveNetWeights, initial_state

OP = "wavenet_generate"
BACKENDS = ("cpu", "reference")
Need = Callable[[str, str], None]
Ran = Callable[[str, str], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from threads; tests about threads set their own number."""
    torch.set_num_threads(1)


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


SMALL = {
    "default": {},
    "odd": {"residual": 5, "gate": 7, "skip": 13, "outputs": 17},
    "one skip": {"residual": 7, "gate": 5, "skip": 1, "outputs": 2},
    "wide": {"residual": 33, "gate": 9, "skip": 48, "outputs": 257},
    "narrow": {"residual": 1, "gate": 1, "skip": 3, "outputs": 3},
    "gate wider": {"residual": 20, "gate": 33, "skip": 31, "outputs": 33},
}


@pytest.mark.parametrize(("backend", "threads"), [("cpu", 1), ("cpu", 2), ("reference", 1)])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 5])
@pytest.mark.parametrize("size", list(SMALL))
def test_sizes(size: str, kernel_size: int, backend: str, threads: int, need: Need, ran: Ran) -> None:
    """Any channel counts, kernel size and batch; dilations of any value; conditioning of both kinds."""
    need(OP, backend)
    dilations = [1, 3, 17, 6]
    w = network(kernel_size=kernel_size, **SMALL[size])
    for batch in (1, 2, 3, 7, 33):
        if backend == "reference" and batch not in (1, 3):
            continue
        steps = 100 if batch == 1 else 45
        gate_bias, cond = conditioning(w, batch, steps, streams=batch if batch != 3 else 1)
        state, u = first(w, dilations, batch), draw("categorical", batch, steps)
        start = state.last.clone()
        torch.set_num_threads(threads)
        with ran(OP, backend):
            loop = Generator(w, dilations, backend=backend)
            samples, parameters = loop.run(state, u, gate_bias, cond, parameters=True)
        torch.set_num_threads(1)
        assert loop.backend == backend
        assert parameters is not None
        exact = teacher_forced(w, dilations, start, samples, gate_bias, cond)
        assert float(exact.std()) > 0.2, "weights so small that nothing is tested"
        torch.testing.assert_close(parameters.double(), exact, rtol=0, atol=3e-5)
        inverted("categorical", parameters, u, samples)
        assert state.position == steps
        assert torch.equal(state.last, samples[:, -1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize(
    ("distribution", "outputs"),
    [("categorical", 12), ("logistic", 3), ("logistic", 30), ("gaussian", 2), ("gaussian", 3), ("gaussian", 9)],
)
def test_distributions(distribution: str, outputs: int, temperature: float, backend: str, need: Need, ran: Ran) -> None:
    """Each distribution's samples are the inverse of its distribution function at the uniforms, edges included."""
    need(OP, backend)
    dilations, batch, steps = [1, 2, 4, 9], 3, 120
    w = network(outputs=outputs, distribution=distribution, residual=12, gate=10)
    gate_bias, cond = conditioning(w, batch, steps)
    u = draw(distribution, batch, steps)
    u[:, 5], u[:, 11] = 0.0, 1 - 2**-24
    state = first(w, dilations, batch, distribution)
    start = state.last.clone()
    with ran(OP, backend):
        loop = Generator(w, dilations, distribution=distribution, log_scale_min=-3.2, backend=backend)
        samples, parameters = loop.run(state, u, gate_bias, cond, temperature=temperature, parameters=True)
    assert parameters is not None
    exact = teacher_forced(w, dilations, start, samples, gate_bias, cond)
    torch.testing.assert_close(parameters.double(), exact, rtol=0, atol=3e-5)
    inverted(distribution, parameters, u, samples, temperature, -3.2)
    if distribution == "categorical":
        assert samples.dtype == torch.int64
    else:
        assert samples.dtype == torch.float32
        assert float(samples.abs().max()) <= 1
        clamped = exact[..., -distributions_of(outputs) :] < -3.2
        assert 0.05 < float(clamped.double().mean()) < 0.95, "log_scale_min must bite on some components only"


def default_network(seed: int = 0, gain: float = 1.0) -> tuple[WaveNetWeights, list[int]]:
    return network(20, 64, 64, 128, 256, gain=gain, seed=seed), [2 ** (i % 10) for i in range(20)]


@pytest.mark.parametrize(("backend", "threads"), [("cpu", 1), ("cpu", 2), ("reference", 1)])
def test_default_size_over_4000_steps(backend: str, threads: int, need: Need, ran: Ran) -> None:
    """float32 parameters within 1e-4 of the float64 forward, 4000 steps, 20 layers in 2 cycles."""
    need(OP, backend)
    torch.set_num_threads(threads)
    w, dilations = default_network()
    steps = 4000 if backend == "cpu" else 2100  # beyond the longest queue and the receptive field of 2047
    u, state = draw("categorical", 1, steps), first(w, dilations, 1)
    start = state.last.clone()
    gate_bias, _ = conditioning(w, 1, 1)
    with ran(OP, backend):
        samples, parameters = Generator(w, dilations, backend=backend).run(state, u, gate_bias, parameters=True)
    assert parameters is not None
    exact = teacher_forced(w, dilations, start, samples, gate_bias)
    assert float(exact.std()) > 1
    error = float((parameters.double() - exact).abs().max())
    assert error < 1e-4
    inverted("categorical", parameters, u, samples)
    assert samples.unique().numel() > 20


def test_same_uniforms_same_samples(need: Need, ran: Ran) -> None:
    """The C++ loop and the reference draw the same classes, up to a near-tie after which histories differ."""
    need(OP, "cpu")
    dilations, batch, steps = [1, 2, 4, 8, 16], 6, 400
    w = network(5, 24, 20, 32, 64)
    gate_bias, cond = conditioning(w, batch, steps, batch)
    u = draw("categorical", batch, steps)
    samples = {}
    for backend in BACKENDS:
        with ran(OP, backend):
            loop = Generator(w, dilations, backend=backend)
            samples[backend], _ = loop.run(first(w, dilations, batch), u, gate_bias, cond)
    same_up_to_ties(w, dilations, samples["cpu"], samples["reference"], u, gate_bias, cond)


def same_up_to_ties(
    w: WaveNetWeights, dilations: list[int], one: Tensor, other: Tensor, u: Tensor, gate_bias: Tensor, cond: Tensor
) -> None:
    agreed = 0
    for b in range(one.shape[0]):
        different = (one[b] != other[b]).nonzero()
        agreed += int(different[0]) if len(different) else one.shape[1]
        if not len(different):
            continue
        t, bias = int(different[0]), gate_bias[b : b + 1] if len(gate_bias) > 1 else gate_bias
        exact = teacher_forced(w, dilations, torch.tensor([1]), one[b : b + 1], bias, cond[b : b + 1])[0, t]
        boundaries = torch.softmax(exact, -1).cumsum(-1)
        assert float((boundaries - u[b, t].double()).abs().min()) < 1e-4, f"stream {b}, step {t}: not a near-tie"
    assert agreed > 0.8 * one.numel(), f"only {agreed} of {one.numel()} samples before the first near-ties"


@pytest.mark.parametrize(("distribution", "outputs"), [("logistic", 9), ("gaussian", 2)])
def test_same_uniforms_same_values(distribution: str, outputs: int, need: Need, ran: Ran) -> None:
    """Mixtures: both backends draw the same values while their histories agree."""
    need(OP, "cpu")
    dilations, batch, steps = [1, 2, 4], 4, 40
    w = network(3, 12, 12, 16, outputs, distribution=distribution, gain=0.7)
    gate_bias, cond = conditioning(w, batch, steps)
    u = draw(distribution, batch, steps)
    samples = []
    for backend in BACKENDS:
        with ran(OP, backend):
            loop = Generator(w, dilations, distribution=distribution, backend=backend)
            samples.append(loop.run(first(w, dilations, batch, distribution), u, gate_bias, cond)[0])
    torch.testing.assert_close(samples[0], samples[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_boundaries(backend: str, need: Need, ran: Ran) -> None:
    """A uniform on a boundary belongs to the class above: as many classes as have a cumulative probability <= u."""
    need(OP, backend)
    w, dilations = network(outputs=4), [1, 2, 4, 8]
    w.output.zero_()
    w.output_bias.zero_()
    u = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1 - 2**-24, 0.25 - 2**-20, 0.5 + 2**-20, 0.75 - 2**-20]])
    with ran(OP, backend):
        loop = Generator(w, dilations, backend=backend)
        samples, _ = loop.run(first(w, dilations, 1), u, torch.zeros(1, 4, 32), temperature=0.7)
    assert samples.tolist() == [[0, 1, 2, 3, 3, 0, 2, 2]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_given_prefix(backend: str, need: Need, ran: Ran) -> None:
    """Known samples are returned as they are and drive the network; what follows is sampled from them."""
    need(OP, backend)
    dilations, batch, steps, known = [1, 2, 20], 3, 60, 37
    for distribution, outputs in (("categorical", 11), ("logistic", 6)):
        w = network(3, outputs=outputs, distribution=distribution)
        gate_bias, cond = conditioning(w, batch, steps)
        u = draw(distribution, batch, steps)
        given = torch.randint(0, 11, (batch, known)) if outputs == 11 else torch.rand(batch, known) * 2 - 1
        state = first(w, dilations, batch, distribution)
        start = state.last.clone()
        loop = Generator(w, dilations, distribution=distribution, backend=backend)
        with ran(OP, backend):
            samples, parameters = loop.run(state, u, gate_bias, cond, given=given, parameters=True)
        assert torch.equal(samples[:, :known], given)
        assert parameters is not None
        exact = teacher_forced(w, dilations, start, samples, gate_bias, cond)
        torch.testing.assert_close(parameters.double(), exact, rtol=0, atol=3e-5)
        inverted(distribution, parameters[:, known:], u[:, known:], samples[:, known:])
        whole = loop.run(first(w, dilations, batch, distribution), u, gate_bias, cond, given=samples)[0]
        assert torch.equal(whole, samples)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_state_continues(backend: str, batch: int, dtype: torch.dtype, tmp_path: Path, need: Need, ran: Ran) -> None:
    """Pieces of any length, through a copy and a file, are what one go gives: same samples, same state."""
    need(OP, backend)
    dilations, steps = [1, 2, 4, 8, 16, 33], 150
    w = network(6, 20, 12, 24, 32, kernel_size=3)
    gate_bias, cond = conditioning(w, batch, steps, batch)
    u = draw("categorical", batch, steps)
    with ran(OP, backend):
        loop = Generator(w, dilations, backend=backend, dtype=dtype)
        whole_state = first(w, dilations, batch)
        whole, expected = loop.run(whole_state, u, gate_bias, cond, parameters=True)
        state, at, parts, kept = first(w, dilations, batch), 0, [], []
        for length in (1, 2, 7, 8, 9, 40, 3, 80):
            untouched = state.clone()
            copied = state.clone()
            cut = slice(at, at + length)
            samples, parameters = loop.run(copied, u[:, cut], gate_bias, cond[:, cut], parameters=True)
            assert torch.equal(state.history, untouched.history)
            assert (state.position, copied.position) == (at, at + length)
            torch.save(vars(copied), tmp_path / "state.pt")
            state = GenerationState(**torch.load(tmp_path / "state.pt"))
            at += length
            parts.append(samples)
            kept.append(parameters)
    assert at == steps
    torch.testing.assert_close(torch.cat(kept, 1), expected, rtol=0, atol=2e-5)
    assert torch.equal(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state.history, whole_state.history, rtol=0, atol=2e-5)
    assert torch.equal(state.last, whole_state.last)
    assert state.position == whole_state.position == steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_same_bits(batch: int, dtype: torch.dtype, need: Need, ran: Ran) -> None:
    """Two runs give the same bits; a single stream does so on one thread and on two."""
    need(OP, "cpu")
    w, dilations = default_network()
    w = w._replace(**{name: getattr(w, name)[:12] for name in ("conv", "residual", "residual_bias", "skip")})
    dilations, steps = dilations[:12], 300
    gate_bias, cond = conditioning(w, batch, steps)
    u, results = draw("categorical", batch, steps), []
    for threads in (2, 2, 1, 2, 1) if batch == 1 else (2, 2):
        torch.set_num_threads(threads)
        with ran(OP, "cpu"):
            loop = Generator(w, dilations, backend="cpu", dtype=dtype)
            state = first(w, dilations, batch)
            results.append((*loop.run(state, u, gate_bias, cond, parameters=True), state.history))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_streams_do_not_mix(need: Need, ran: Ran) -> None:
    """Each stream of a batch gives what it gives alone, whatever stands next to it."""
    need(OP, "cpu")
    dilations, batch, steps = [1, 2, 4, 16], 7, 80
    w = network()
    gate_bias, cond = conditioning(w, batch, steps, batch)
    u = draw("categorical", batch, steps)
    with ran(OP, "cpu"):
        loop = Generator(w, dilations, backend="cpu")
        together, expected = loop.run(first(w, dilations, batch), u, gate_bias, cond, parameters=True)
        assert expected is not None
        for b in range(batch):
            one = slice(b, b + 1)
            alone, parameters = loop.run(
                first(w, dilations, 1), u[one], gate_bias[one], cond[one], given=together[one], parameters=True
            )
            torch.testing.assert_close(parameters, expected[one], rtol=0, atol=2e-5)
            free, _ = loop.run(first(w, dilations, 1), u[one], gate_bias[one], cond[one])
            assert float((free == together[one]).double().mean()) > 0.9
            assert torch.equal(alone, together[one])


def test_many_threads(need: Need, ran: Ran) -> None:
    """More threads than cores or streams, and calls from several Python threads at once, change nothing."""
    need(OP, "cpu")
    dilations, steps = [1, 2, 4, 16], 200
    w = network()
    gate_bias, _ = conditioning(w, 1, 1)
    loop = Generator(w, dilations, backend="cpu")
    uniforms = {batch: draw("categorical", batch, steps, seed=batch) for batch in (1, 2, 3, 5)}
    torch.set_num_threads(1)
    with ran(OP, "cpu"):
        expected = {b: loop.run(first(w, dilations, b), u, gate_bias, parameters=True) for b, u in uniforms.items()}
    torch.set_num_threads(16)
    for b, u in uniforms.items():
        samples, parameters = loop.run(first(w, dilations, b), u, gate_bias, given=expected[b][0], parameters=True)
        torch.testing.assert_close(parameters, expected[b][1], rtol=0, atol=2e-5)
    torch.set_num_threads(2)
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(5):
            results[i] = loop.run(first(w, dilations, 1), uniforms[1], gate_bias)[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(results) == 6
    for samples in results.values():
        assert torch.equal(samples, expected[1][0])


def test_inputs_are_left_alone(need: Need, ran: Ran) -> None:
    """Only the state changes; strided uniforms, conditioning and prefixes give what contiguous ones give."""
    need(OP, "cpu")
    dilations, batch, steps = [1, 2, 4, 8], 3, 40
    w = network()
    kept = copy.deepcopy(w)
    gate_bias, cond = conditioning(w, batch, steps, batch)
    u, given = draw("categorical", batch, steps), torch.randint(0, 16, (batch, 9))
    inputs = (u, gate_bias, cond, given)
    before = [t.clone() for t in inputs]
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in inputs]
    with ran(OP, "cpu"):
        loop = Generator(w, dilations, backend="cpu")
        one = loop.run(first(w, dilations, batch), u, gate_bias, cond, given=given)[0]
        two = loop.run(first(w, dilations, batch), strided[0], strided[1], strided[2], given=strided[3])[0]
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(w, kept, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_streams_and_no_steps(backend: str, need: Need) -> None:
    """An empty batch and zero steps give empty results and leave the state as it was."""
    need(OP, backend)
    w, dilations = network(), [1, 2, 4, 8]
    gate_bias, _ = conditioning(w, 1, 1)
    loop = Generator(w, dilations, backend=backend)
    for batch, steps in ((0, 5), (3, 0)):
        state = first(w, dilations, batch)
        samples, parameters = loop.run(state, torch.rand(batch, steps), gate_bias, parameters=True)
        assert samples.shape == (batch, steps)
        assert samples.dtype == torch.int64
        assert parameters is not None
        assert parameters.shape == (batch, steps, 16)
        assert state.position == steps


def test_bf16_weights_exact(need: Need, ran: Ran) -> None:
    """Weights that bf16 holds exactly give what float32 gives: nothing is lost but the weights' last bits.

    One weight of each pair is 0, so that packing two in a word rounds nothing. CPUs with bf16 dot products also round
    the activations, to 8 bits: there the bound is wider.
    """
    need(OP, "cpu")
    dilations, batch, steps = [1, 3, 16], 4, 80
    for odd in (0, 1):
        for threads, streams in ((1, 1), (2, 1), (1, batch)):
            torch.set_num_threads(threads)
            w = network(3, 17, 10, 13, 19, kernel_size=3).rounded(torch.bfloat16)
            for name in ("conv", "residual", "skip", "hidden", "output"):
                tensor = getattr(w, name)
                columns = tensor.unbind(2 if name in ("conv", "residual", "skip") else 1)
                for column in columns[odd::2]:
                    column.zero_()
            gate_bias, cond = conditioning(w, streams, steps)
            u, state = draw("categorical", streams, steps), first(w, dilations, streams)
            start = state.last.clone()
            with ran(OP, "cpu"):
                loop = Generator(w, dilations, backend="cpu", dtype=torch.bfloat16)
                samples, parameters = loop.run(state, u, gate_bias, cond, parameters=True)
            torch.set_num_threads(1)
            exact = teacher_forced(w, dilations, start, samples, gate_bias, cond)
            assert float(exact.std()) > 0.3
            atol = 0.1 if fastgen.backend.cpu_isa in ("avx512_bf16", "amx") else 3e-5
            torch.testing.assert_close(parameters.double(), exact, rtol=0, atol=atol)
            inverted("categorical", parameters, u, samples)


@pytest.mark.parametrize("batch", [1, 6])
def test_bf16_weights(batch: int, need: Need, ran: Ran) -> None:
    """bf16 weights disturb the parameters as much as rounding the weights in the reference does, and the KL is small.

    Rounding to bf16 and keeping the second weight of a pair with the first one's bits behind it both err by at most
    half a bf16 ulp; so the two errors against float32 have the same size, and their difference is at most sqrt(2) that
    if they are independent. Rounded activations (bf16 dot products) add as much again. Factor 2 covers both.
    A disturbance d of the logits costs KL = Var_p(d) / 2 + O(d^3): with d of rms 0.01 to 0.03, some 1e-4.
    """
    need(OP, "cpu")
    w, dilations = default_network(seed=3)
    steps = 600 if batch == 1 else 150
    gate_bias, cond = conditioning(w, batch, steps)
    u, state = draw("categorical", batch, steps), first(w, dilations, batch)
    start = state.last.clone()
    with ran(OP, "cpu"):
        loop = Generator(w, dilations, backend="cpu", dtype=torch.bfloat16)
        samples, parameters = loop.run(state, u, gate_bias, cond, parameters=True)
    assert parameters is not None
    inverted("categorical", parameters, u, samples)
    exact = teacher_forced(w, dilations, start, samples, gate_bias, cond)
    rounded = teacher_forced(w.rounded(torch.bfloat16), dilations, start, samples, gate_bias, cond)
    rounding = float((rounded - exact).pow(2).mean().sqrt())
    assert 1e-3 < rounding < 0.1
    assert float((parameters - exact).pow(2).mean().sqrt()) < 2 * rounding
    assert float((parameters - rounded).pow(2).mean().sqrt()) < 2 * rounding
    assert float((parameters - exact).abs().max()) < 2 * float((rounded - exact).abs().max())
    log_p = torch.log_softmax(exact, -1)
    divergence = (log_p.exp() * (log_p - torch.log_softmax(parameters.double(), -1))).sum(-1)
    assert float(divergence.mean()) < 2 * rounding**2
    assert float(divergence.max()) < 20 * rounding**2
    assert float(divergence.max()) < 1e-2


def test_bf16_reference_is_the_rounded_weights(ran: Ran) -> None:
    """The reference's bf16 is float32 arithmetic on rounded weights, nothing else."""
    dilations, batch, steps = [1, 2, 4, 8], 2, 30
    w = network()
    gate_bias, cond = conditioning(w, batch, steps)
    u = draw("categorical", batch, steps)
    with ran(OP, "reference"):
        one = Generator(w, dilations, backend="reference", dtype=torch.bfloat16)
        two = Generator(w.rounded(torch.bfloat16), dilations, backend="reference")
        a = one.run(first(w, dilations, batch), u, gate_bias, cond, parameters=True)
        b = two.run(first(w, dilations, batch), u, gate_bias, cond, parameters=True)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])
    full = Generator(w, dilations, backend="reference").run(
        first(w, dilations, batch), u, gate_bias, cond, given=a[0], parameters=True
    )
    assert not torch.equal(a[1], full[1])


# ---- through the model


def loud(model: WaveNet) -> WaveNet:
    """Biases and output weights large enough that samples depend on everything."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.3)
        model.output.weight.mul_(4)
    return model


def matches_forward(model: WaveNet, u: Tensor, samples: Tensor, **conditions: Tensor) -> None:
    """The samples are drawn from what the double-precision forward says now."""
    parameters = copy.deepcopy(model).double()
    local = conditions.get("local")
    with torch.no_grad(), fastgen.use_backend("reference"):
        out = parameters(samples, None if local is None else local.double(), conditions.get("speaker")).mT
    inverted(model.distribution, out, u, samples, near=1e-4, most_clamped=0.9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"local_channels": 5},
        {"local_channels": 3, "upsample_scales": (2, 4)},
        {"speakers": 4},
        {"local_channels": 4, "speakers": 3, "distribution": "logistic", "mixtures": 3},
        {"speakers": 2, "distribution": "gaussian", "mixtures": 1, "kernel_size": 3, "gate_channels": 10},
    ],
)
def test_model_generates_what_forward_says(backend: str, options: dict, need: Need, ran: Ran) -> None:
    """`generate` follows `forward`, with local and speaker conditioning, and its temperature and prefix."""
    need(OP, backend)
    batch, steps = 3, 70
    model = loud(
        WaveNet(**{"layers": 6, "cycles": 2, "residual_channels": 12, "skip_channels": 9, "classes": 20, **options})
    )
    u = draw(model.distribution, batch, steps)
    conditions: dict[str, Tensor] = {}
    if model.local_channels:
        frames = steps if model.upsample is None else -(-steps // 8)
        conditions["local"] = torch.randn(batch, model.local_channels, frames)
    if model.speakers:
        conditions["speaker"] = torch.tensor([1, 0, model.speakers - 1])
    with ran(OP, backend):
        samples = model.generate(steps, batch_size=batch, uniforms=u, backend=backend, **conditions)
    matches_forward(model, u, samples, **conditions)
    cold = model.generate(steps, batch_size=batch, uniforms=u, backend=backend, temperature=0.05, **conditions)
    with torch.no_grad():
        assert float(model.log_prob(cold, **conditions).mean()) > float(model.log_prob(samples, **conditions).mean())
    given = samples.flip(0)[:, :31]
    more = model.generate(steps, batch_size=batch, uniforms=u, backend=backend, given=given, **conditions)
    assert torch.equal(more[:, :31], given)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distribution", ["categorical", "logistic"])
def test_stream_is_generate(backend: str, distribution: str, need: Need, ran: Ran) -> None:
    """Chunks of any size, local features in one piece or arriving in blocks, uniforms given or drawn: same samples."""
    need(OP, backend)
    batch, steps = 2, 48
    model = WaveNet(
        4, 1, 8, 8, classes=12, mixtures=2, distribution=distribution, local_channels=3, upsample_scales=(4,)
    )
    model = loud(model)
    local = torch.randn(batch, 3, steps // 4)
    with ran(OP, backend):
        whole = model.generate(
            steps, batch_size=batch, local=local, backend=backend, generator=torch.Generator().manual_seed(5)
        )
    for chunk in (1, 5, 47, 1000):
        for pieces in (local, local.split(1, 2), iter(local.split([3, 1, 8], 2))):
            chunks = list(
                model.stream(
                    steps, chunk, batch_size=batch, local=pieces, backend=backend,
                    generator=torch.Generator().manual_seed(5),
                )
            )  # fmt: skip
            assert [c.shape[1] for c in chunks[:-1]] == [chunk] * (len(chunks) - 1)
            torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=0, atol=1e-4)


def test_stream_starts_while_features_arrive() -> None:
    """A block of features is asked for only when the samples before it are out; too few of them are an error."""
    model = WaveNet(2, 1, 8, 8, classes=12, local_channels=3)
    asked = []

    def blocks(count: int):
        for i in range(count):
            asked.append(i)
            yield torch.randn(1, 3, 10)

    stream = model.stream(30, 10, local=blocks(3))
    assert asked == []
    for i in range(3):
        assert next(stream).shape == (1, 10)
        assert asked == list(range(i + 1))
    stream = model.stream(30, 10, local=blocks(2))
    next(stream), next(stream)
    with pytest.raises(ValueError, match=r"local ended after 20 samples, 30 are wanted"):
        next(stream)


def test_stream_leaves_gradients_on() -> None:
    """Between two chunks the caller's code can train: gradients are off inside the stream alone."""
    model = WaveNet(2, 1, 4, 4, classes=8)
    for chunk in model.stream(6, 2):
        assert torch.is_grad_enabled()
        assert model.log_prob(chunk).requires_grad
        break
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_never_stale(backend: str, need: Need, ran: Ran) -> None:
    """Whatever way parameters change between two calls, the second call uses the new ones."""
    need(OP, backend)
    model = loud(WaveNet(4, 2, 8, 8, classes=16, speakers=2))
    other = loud(WaveNet(4, 2, 8, 8, classes=16, speakers=2))
    speaker = torch.tensor([0, 1])
    u = draw("categorical", 2, 60)
    optimizer = torch.optim.SGD(model.parameters(), lr=3.0)

    def step() -> None:
        optimizer.zero_grad()
        (-model.log_prob(torch.randint(0, 16, (2, 30)), speaker=speaker).mean() / 30).backward()
        optimizer.step()

    def in_place() -> None:
        with torch.no_grad():
            model.layers[1].conv.bias.add_(1.0)

    def data() -> None:
        model.hidden.weight.data = torch.randn_like(model.hidden.weight)

    def data_in_place() -> None:
        model.layers[2].out.weight.data.mul_(-1)

    def embedding() -> None:
        model.embedding.weight.data.neg_()

    def replaced() -> None:
        model.output = torch.nn.Conv1d(8, 16, 1)

    def load() -> None:
        model.load_state_dict(other.state_dict())

    previous = model.generate(60, batch_size=2, speaker=speaker, uniforms=u, backend=backend)
    for change in (step, in_place, data, data_in_place, embedding, replaced, load):
        change()
        with ran(OP, backend):
            samples = model.generate(60, batch_size=2, speaker=speaker, uniforms=u, backend=backend)
        matches_forward(model, u, samples, speaker=speaker)
        assert not torch.equal(samples, previous), f"{change.__name__} changed nothing: a vacuous check"
        previous = samples


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("style", ["parametrization", "hook"])
def test_weight_norm_is_folded(style: str, backend: str, need: Need, ran: Ran) -> None:
    """Weight-normalised models, of either style, generate as plain ones with the same weights, also after a change."""
    need(OP, backend)
    plain = loud(WaveNet(4, 2, 8, 8, classes=16, local_channels=3))
    model = copy.deepcopy(plain)
    for module in list(model.modules()):
        if isinstance(module, torch.nn.Conv1d):
            if style == "parametrization":
                torch.nn.utils.parametrizations.weight_norm(module)
            else:
                torch.nn.utils.weight_norm(module)
    local, u = torch.randn(2, 3, 60), draw("categorical", 2, 60)
    with ran(OP, backend):
        samples = model.generate(60, batch_size=2, local=local, uniforms=u, backend=backend)
    matches_forward(plain, u, samples, local=local)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("weight_g", "original0")):
                p.mul_(-1.3)
    for module in plain.modules():
        if isinstance(module, torch.nn.Conv1d):
            module.weight.data.mul_(-1.3)
    changed = model.generate(60, batch_size=2, local=local, uniforms=u, backend=backend)
    matches_forward(plain, u, changed, local=local)
    assert not torch.equal(changed, samples)


def test_double_and_bf16_models_generate() -> None:
    """A model in another precision generates with its weights as float32, conditioning included."""
    model = loud(WaveNet(4, 2, 8, 8, classes=16, local_channels=3, speakers=2, upsample_scales=(2,))).to(torch.bfloat16)
    local, speaker, u = torch.randn(1, 3, 30).bfloat16(), torch.tensor([1]), draw("categorical", 1, 60)
    samples = model.double().generate(60, local=local.double(), speaker=speaker, uniforms=u)
    matches_forward(model, u, samples, local=local, speaker=speaker)
    assert model.bfloat16().generate(60, local=local, speaker=speaker, uniforms=u).shape == (1, 60)


# ---- what does not fit


BAD_CALLS = {
    "uniforms": [
        (torch.rand(2), ValueError),
        (torch.rand(2, 5, 2), ValueError),
        (torch.rand(2, 5).double(), TypeError),
    ],
    "gate_bias": [
        (torch.zeros(1, 4, 30), ValueError),
        (torch.zeros(3, 4, 32), ValueError),
        (torch.zeros(4, 32), ValueError),
    ],
    "cond": [(torch.zeros(2, 4, 4, 32), ValueError), (torch.zeros(2, 5, 4, 32).double(), TypeError)],
    "given": [
        (torch.zeros(2, 6, dtype=torch.int64), ValueError),
        (torch.zeros(2, 3), TypeError),
        (torch.full((2, 3), 16), ValueError),
        (torch.full((2, 3), -1), ValueError),
    ],
    "state.history": [(torch.zeros(2, 14, 16), ValueError), (torch.zeros(2, 15, 16).bfloat16(), TypeError)],
    "state.last": [
        (torch.zeros(2), TypeError),
        (torch.full((2,), 16), ValueError),
        (torch.zeros(3).long(), ValueError),
    ],
}


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_run_refuses_what_does_not_fit(name: str, need: Need) -> None:
    """Nothing of another shape, dtype or range reaches the kernel: an error names the argument instead."""
    need(OP, "cpu")
    w, dilations = network(), [1, 2, 4, 8]
    loop = Generator(w, dilations, backend="cpu")
    for value, kind in BAD_CALLS[name]:
        state = first(w, dilations, 2)
        call = {"uniforms": torch.rand(2, 5), "gate_bias": torch.zeros(1, 4, 32), "cond": None, "given": None}
        if name.startswith("state."):
            setattr(state, name[6:], value)
        else:
            call[name] = value
        with pytest.raises(kind, match=rf"wavenet_generate: {re.escape(name)} must .*got"):
            loop.run(state, **call)
    assert loop.run(first(w, dilations, 2), torch.rand(2, 5), torch.zeros(1, 4, 32))[0].shape == (2, 5)


def test_generator_refuses_what_does_not_fit() -> None:
    """Weights, dilations, dtype and distribution are checked before anything is packed."""
    w, dilations = network(), [1, 2, 4, 8]
    for name in WaveNetWeights._fields:
        bad = getattr(w, name).clone()
        bad.view(-1)[-1] = math.nan
        with pytest.raises(ValueError, match=rf"weights\.{name} holds NaN"):
            Generator(w._replace(**{name: bad}), dilations)
        with pytest.raises(ValueError, match=rf"weights\.{name} must be float32, got torch\.float64"):
            Generator(w._replace(**{name: getattr(w, name).double()}), dilations)
        if name not in ("conv", "hidden", "output"):  # these say how many channels there are
            with pytest.raises(ValueError, match=rf"weights\.{name} must be .*got"):
                Generator(w._replace(**{name: getattr(w, name)[..., :-1]}), dilations)
    for wrong in ([1, 2, 4], [1, 2, 4, 0], [1, 2, 4, 8.0], []):
        with pytest.raises(ValueError, match=r"dilations must be 4 integers >= 1, got"):
            Generator(w, wrong)
    with pytest.raises(ValueError, match=r"dtype must be float32 or bfloat16, got torch\.float16"):
        Generator(w, dilations, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"distribution must be one of .*got 'poisson'"):
        Generator(w, dilations, distribution="poisson")


# ---- every instruction set

ISA_TESTS = (
    "test_sizes or test_distributions or test_bf16 or test_same_uniforms or test_same_bits or test_state_continues"
)


@pytest.mark.parametrize("isa", fastgen.backend.ISAS)
def test_instruction_sets(
    isa: str, need_isa: Callable[[str], None], python: Callable[..., subprocess.CompletedProcess]
) -> None:
    """The tests of values, samples and bits pass with each instruction set's kernels."""
    need_isa(isa)
    if os.environ.get("FASTGEN_TESTED_ISA"):
        pytest.skip("this is the inner run")
    arguments = (
        "-m",
        "pytest",
        __file__,
        "-p",
        "no:cacheprovider",
        "-k",
        f"({ISA_TESTS}) and not reference and not instruction_sets",
    )
    done = python(*arguments, FASTGEN_CPU_ISA=isa, FASTGEN_REQUIRE="cpu", FASTGEN_TESTED_ISA=isa)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"instruction set {isa}" in done.stdout
    counted = re.search(r"(\d+) passed", done.stdout)
    assert counted, done.stdout
    assert int(counted[1]) > 60
    assert "skipped" not in done.stdout
