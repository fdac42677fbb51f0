"""Generation with queues: every backend against a float64 forward without queues, and against its own uniforms."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wavenet_helpers import (
    BACKENDS,
    OP,
    Need,
    Ran,
    conditioning,
    default_network,
    distributions_of,
    draw,
    first,
    inverted,
    network,
    teacher_forced,
)  # fmt: skip

import fastgen.backend
from fastgen.ops import Generator, WaveNetWeights

pytestmark = pytest.mark.usefixtures("one_thread")


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
    for batch in (1, 2, 3, 7, 33, 131) if kernel_size == 2 else (1, 2, 3, 7, 33):
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


@pytest.mark.parametrize("sizes", [(64, 64, 128, 256, 2), (33, 40, 100, 37, 3), (130, 70, 75, 140, 2)])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_float32_errs_as_float32_does(sizes: tuple[int, ...], batch: int, need: Need, ran: Ran) -> None:
    """Against float64 the loop errs as PyTorch's float32 does, whose sums in blocks are up to 3 times as exact.

    Weights in 24 bits are no worse: where float32 keeps all its bits (AVX2) the same sums err more.
    """
    need(OP, "cpu")
    residual, gate, skip, outputs, kernel_size = sizes
    dilations, steps = [1, 2, 4, 8, 16, 1], 60
    w = network(6, residual, gate, skip, outputs, kernel_size)
    gate_bias, cond = conditioning(w, batch, steps)
    u, known = draw("categorical", batch, steps), torch.randint(outputs, (batch, steps))
    error = {}
    for backend in ("cpu", "reference"):
        state = first(w, dilations, batch)
        start = state.last.clone()
        with ran(OP, backend):
            loop = Generator(w, dilations, backend=backend)
            _, parameters = loop.run(state, u, gate_bias, cond, given=known, parameters=True)
        assert parameters is not None
        exact = teacher_forced(w, dilations, start, known, gate_bias, cond)
        error[backend] = float((parameters.double() - exact).square().mean().sqrt())
    assert 0 < error["cpu"] < 4 * error["reference"], error


@pytest.mark.parametrize("batch", [1, 9])
def test_forms_of_one_size(batch: int, need: Need, ran: Ran) -> None:
    """Weights that take as many bytes laid out for few streams as for many: neither form is taken for the other."""
    need(OP, "cpu")
    w = network(7, 6, 6, 16, 16, 2)
    w = w._replace(**{name: getattr(w, name)[:1] for name in ("conv", "residual", "residual_bias", "skip")})
    u, state = draw("categorical", batch, 20), first(w, [1], batch)
    start, gate_bias = state.last.clone(), torch.zeros(1, 1, 12)
    with ran(OP, "cpu"):
        samples, parameters = Generator(w, [1], backend="cpu").run(state, u, gate_bias, parameters=True)
    assert parameters is not None
    exact = teacher_forced(w, [1], start, samples, gate_bias)
    torch.testing.assert_close(parameters.double(), exact, rtol=0, atol=1e-5)


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


@pytest.mark.parametrize("sizes", [(17, 10, 13, 19, 3), (130, 70, 75, 140, 2)])
def test_bf16_weights_alone_are_rounded(sizes: tuple[int, ...], need: Need, ran: Ran) -> None:
    """Weights that bf16 holds give what float64 gives with them, to the error of fixed point in blocks of 64 inputs.

    A row of 64 weights of similar size has units of a 1300th of their standard deviation, 2^-10, hence errors of 2^-12;
    an activation keeps 14 bits or more of the block's largest. For few streams, with AVX-512, weights err by 2^-11 and
    activations keep 11 bits.
    """
    need(OP, "cpu")
    outputs, residual, gate, skip, kernel_size = sizes
    dilations, batch, steps = [1, 3, 16], 4, 80
    for threads, streams in ((1, 1), (2, 1), (1, batch)):
        torch.set_num_threads(threads)
        w = network(3, residual, gate, skip, outputs, kernel_size).rounded(torch.bfloat16)
        gate_bias, cond = conditioning(w, streams, steps)
        u, state = draw("categorical", streams, steps), first(w, dilations, streams)
        start = state.last.clone()
        with ran(OP, "cpu"):
            loop = Generator(w, dilations, backend="cpu", dtype=torch.bfloat16)
            samples, parameters = loop.run(state, u, gate_bias, cond, parameters=True)
        torch.set_num_threads(1)
        exact = teacher_forced(w, dilations, start, samples, gate_bias, cond)
        assert float(exact.std()) > 0.3
        largest = (6e-3 if streams == 1 else 2e-3) * float(exact.std())
        torch.testing.assert_close(parameters.double(), exact, rtol=0, atol=largest)
        inverted("categorical", parameters, u, samples)


def test_bf16_weights_of_extreme_channels(need: Need, ran: Ran) -> None:
    """Channels 1e25 times as large, read with weights as much smaller, are lost in fixed point, but not NaN."""
    need(OP, "cpu")
    w, dilations, steps = network(), [1, 2, 4, 8], 40
    for channel, factor in ((0, 1e25), (1, 1e-25)):
        for tensor in (w.input[:, channel], w.input_bias[channel], w.residual[:, channel], w.residual_bias[:, channel]):
            tensor.mul_(factor)
        w.conv[:, :, channel] /= factor
    u, state = draw("categorical", 1, steps), first(w, dilations, 1)
    with ran(OP, "cpu"):
        loop = Generator(w, dilations, backend="cpu", dtype=torch.bfloat16)
        _, parameters = loop.run(state, u, torch.zeros(1, 4, 32), parameters=True)
    assert parameters is not None
    assert bool(torch.isfinite(parameters).all())


@pytest.mark.parametrize("batch", [1, 6])
def test_bf16_weights(batch: int, need: Need, ran: Ran) -> None:
    """bf16 weights disturb the parameters as rounding the weights in the reference does, and the KL is small.

    Rounding to bf16 errs by 1.6e-3 of a weight, rms; fixed point adds some 2.2e-4 of the row's, a seventh; for few
    streams 4.5e-4, and 2.5e-4 of the activations', a third. A change d of the logits costs KL = Var_p(d) / 2 + O(d^3):
    with d of rms 0.01 to 0.03, some 1e-4.
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
    assert float((parameters - exact).pow(2).mean().sqrt()) < 1.1 * rounding
    assert float((parameters - rounded).pow(2).mean().sqrt()) < rounding / (2.8 if batch == 1 else 5)
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
        str(Path(__file__).with_name("test_wavenet_generate_state.py")),
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
