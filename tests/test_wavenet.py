"""fastgen.models.WaveNet: causality, likelihood, sampling, state, and what it refuses."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastgen
import fastgen.backend
from fastgen.models import WaveNet
from fastgen.ops import distributions

BACKENDS = ("cpu", "reference")
OP = "wavenet_generate"
LAYER = "wavenet_layer"
Need = Callable[[str, str], None]
Ran = Callable[[str, str], AbstractContextManager[None]]

pytestmark = pytest.mark.filterwarnings("ignore:fastgen. .* runs on the PyTorch reference:RuntimeWarning")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from threads; tests about threads set their own number."""
    torch.set_num_threads(1)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distribution", distributions.KINDS)
@pytest.mark.parametrize(("layers", "cycles", "kernel_size"), [(4, 2, 2), (3, 1, 3), (4, 1, 2), (2, 2, 1), (3, 3, 4)])
def test_causality_and_receptive_field(
    layers: int, cycles: int, kernel_size: int, distribution: str, backend: str, need: Need, ran: Ran
) -> None:
    """x_t reaches the parameters of t + 1 to t + receptive_field, each of its ends included, and no other."""
    need(LAYER, backend)
    model = small(distribution, layers=layers, cycles=cycles, kernel_size=kernel_size).double()
    field = model.receptive_field
    per_cycle = layers // cycles
    assert field == (kernel_size - 1) * cycles * (2**per_cycle - 1) + 1
    steps, at = 3 * field + 5, field + 2
    x = random_samples(model, 2, steps)
    changed = x.clone()
    changed[:, at] = (x[:, at] + 1) % 10 if distribution == "categorical" else -x[:, at]
    with fastgen.use_backend(backend), torch.no_grad(), ran(LAYER, backend):
        difference = (model(changed) - model(x)).abs().amax((0, 1))
    assert bool((difference[: at + 1] == 0).all())
    assert bool((difference[at + field + 1 :] < 1e-13).all()), "beyond the receptive field"
    assert float(difference[at + 1]) > 1e-9
    assert float(difference[at + field]) > 1e-9, "the receptive field is smaller than stated"


def test_conditioning_reaches_only_its_own_stream_and_time() -> None:
    """local at t changes parameters from t on, speaker changes all of its stream; neither changes other streams."""
    model = small(local_channels=3, speakers=3).double()
    x, local, speaker = random_samples(model, 2, 30), torch.randn(2, 3, 30).double(), torch.tensor([0, 1])
    with torch.no_grad():
        base = model(x, local, speaker)
        moved = local.clone()
        moved[1, :, 12] += 1
        difference = (model(x, moved, speaker) - base).abs().amax(1)
        assert bool((difference[0] == 0).all())
        assert bool((difference[1, :12] == 0).all())
        assert float(difference[1, 12]) > 1e-9
        difference = (model(x, local, torch.tensor([0, 2])) - base).abs().amax(1)
        assert bool((difference[0] == 0).all())
        assert bool((difference[1] > 0).all())


@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_sum_to_one(classes: int) -> None:
    """Over all sequences of a tiny categorical model."""
    model = small(classes=classes)
    steps = 6
    x = torch.tensor(list(itertools.product(range(classes), repeat=steps)))
    with torch.no_grad():
        log_p = model.log_prob(x)
        assert log_p.shape == (classes**steps,)
        assert float(log_p.double().logsumexp(0)) == pytest.approx(0, abs=1e-5)
        assert float(log_p.std()) > 0.1, "a uniform model would pass whatever log_prob did"
        bits = model.bits_per_sample(x)
        torch.testing.assert_close(bits, -log_p / math.log(2) / steps)
        chain = torch.log_softmax(model(x), 1).gather(1, x[:, None])[:, 0].sum(1)
    torch.testing.assert_close(log_p, chain)


@pytest.mark.parametrize("levels", [2, 256, 65536])
@pytest.mark.parametrize("log_scale", [-40.0, -7.0, -3.0, 0.0, 4.0, 12.0, 40.0])
@pytest.mark.parametrize("mean", [-1.0, 0.0, 0.3, 1.0, -9.0, 50.0])
def test_logistic_sums_to_one(levels: int, log_scale: float, mean: float) -> None:
    """The discretised logistic's levels sum to 1 and gradients are finite, at the edges and for extreme scales too."""
    x = torch.linspace(-1, 1, levels, dtype=torch.float64).float()
    parameters = torch.tensor([0.3, -0.4, mean, -mean / 3, log_scale, log_scale + 1]).requires_grad_()
    log_p = distributions.log_prob("logistic", parameters.expand(levels, 6), x, levels=levels)
    assert log_p.dtype == torch.float32
    assert bool((log_p <= 1e-6).all())
    assert float(log_p.double().logsumexp(0)) == pytest.approx(0, abs=2e-3 if levels == 65536 else 2e-4)
    for value in (log_p.mean(), log_p[0], log_p[-1], log_p[levels // 2]):
        (gradient,) = torch.autograd.grad(value, parameters, retain_graph=True)
        assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("levels", [256, 65536])
def test_logistic_gradient_is_that_of_float64(levels: int) -> None:
    """log_prob of the logistic mixture and its gradient, against the distribution function in float64."""
    g = torch.Generator().manual_seed(3)
    parameters = torch.randn(400, 9, generator=g)
    parameters[:, 6:] = parameters[:, 6:] * 2 - 3
    x = (torch.randint(0, levels, (400,), generator=g).double() / (levels - 1) * 2 - 1).float()
    x[:20], x[20:40] = -1.0, 1.0
    parameters[:, 3:6] = x[:, None] + torch.randn(400, 3, generator=g) * parameters[:, 6:].exp() * 2
    single = parameters.clone().requires_grad_()
    log_p = distributions.log_prob("logistic", single, x, levels=levels)
    double = parameters.double().requires_grad_()
    logits, means, log_scales = double.chunk(3, -1)
    scale = log_scales.clamp(min=-7.0).exp()
    half, at = 1 / (levels - 1), x.double()[:, None]
    upper = torch.where(at > 1 - half, 1.0, torch.sigmoid((at + half - means) / scale))
    lower = torch.where(at < -1 + half, 0.0, torch.sigmoid((at - half - means) / scale))
    expected = (torch.softmax(logits, -1) * (upper - lower)).sum(-1).log()
    torch.testing.assert_close(log_p.double(), expected, rtol=1e-4, atol=1e-4)
    log_p.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(single.grad.double(), double.grad, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("mixtures", [1, 3])
@pytest.mark.parametrize("log_scale", [-20.0, -6.0, -2.0, 0.5])
def test_gaussian_integrates_to_one(mixtures: int, log_scale: float) -> None:
    """The trapezoid rule over all reals that matter gives 1; log_scale_min widens what is narrower."""
    if mixtures == 1:
        parameters = torch.tensor([0.2, log_scale])
    else:
        parameters = torch.tensor([0.1, -0.5, 0.4, 0.2, -0.3, 0.6, log_scale, log_scale + 0.5, log_scale + 1])
    assert parameters.numel() == distributions.output_channels("gaussian", 0, mixtures)
    width = 12 * math.exp(max(log_scale + 1, -7))
    x = torch.cat([torch.linspace(m - width, m + width, 20001) for m in (-0.3, 0.2, 0.6)]).double().sort().values
    p = distributions.log_prob("gaussian", parameters.expand(len(x), -1), x).exp().double()
    assert float(torch.trapezoid(p, x.float().double())) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_follow_the_model(backend: str, need: Need, ran: Ran) -> None:
    """Chi-square of 8000 sampled sequences against the model's probabilities of all 81.

    With 80 degrees of freedom the statistic has mean 80 and deviation 12.6; a correct sampler exceeds 143
    (5 deviations) with a probability below 1e-5, and this seed is fixed.
    """
    need(OP, backend)
    model = small(classes=3, layers=2, cycles=1)
    x = torch.tensor(list(itertools.product(range(3), repeat=4)))
    with torch.no_grad():
        expected = model.log_prob(x).double().exp() * 8000
    with ran(OP, backend):
        samples = model.generate(4, batch_size=8000, generator=torch.Generator().manual_seed(7), backend=backend)
    counts = torch.bincount((samples * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double()
    assert float(expected.min()) > 1
    assert float(((counts - expected) ** 2 / expected).sum()) < 143
    uniform = torch.full_like(expected, 8000 / 81)
    assert float(((counts - uniform) ** 2 / uniform).sum()) > 1000, "a uniform sampler must not pass"


@pytest.mark.parametrize("distribution", ["logistic", "gaussian"])
def test_mixture_samples_follow_the_model(distribution: str, need: Need, ran: Ran) -> None:
    """Mean log_prob of 4000 samples against the entropy computed on a grid, within 5 standard errors."""
    need(OP, "cpu")
    model = small(distribution, classes=512)
    with torch.no_grad():
        model.output.bias.copy_(torch.tensor([0.5, -0.5, -0.2, 0.3, -3.0, -2.5]))
        model.output.weight.mul_(0.02)
        grid = torch.linspace(-1, 1, 512)[:, None]
        log_p = model.log_prob(grid).double()
        p = log_p.exp() / log_p.exp().sum()
        mean, second = float((p * log_p).sum()), float((p * log_p**2).sum())
        with ran(OP, "cpu"):
            samples = model.generate(1, batch_size=4000, generator=torch.Generator().manual_seed(9), backend="cpu")
        nearest = grid[:, 0][((samples + 1) / 2 * 511).round().long()]
        found = float(model.log_prob(nearest).double().mean())
        assert abs(found - mean) < 5 * math.sqrt((second - mean**2) / 4000)
        spread = float((p * grid[:, 0] ** 2).sum())
        assert abs(float(nearest.double().pow(2).mean()) - spread) < 5 * math.sqrt(2 / 4000) * spread


def test_state_dict_loads_strictly(tmp_path: Path) -> None:
    """Keys and values survive a file; missing and surplus keys are errors that name them; config rebuilds the model."""
    options = {"local_channels": 2, "upsample_scales": (2, 2), "speakers": 3, "weight_norm": True, "kernel_size": 3}
    model = small("logistic", **options)
    torch.save({"config": model.config, "weights": model.state_dict()}, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt")
    other = WaveNet(**saved["config"])
    x, local, speaker = torch.rand(2, 16), torch.randn(2, 2, 4), torch.tensor([2, 0])
    with torch.no_grad():
        assert not torch.equal(other(x, local, speaker), model(x, local, speaker))
        other.load_state_dict(saved["weights"], strict=True)
        assert torch.equal(other(x, local, speaker), model(x, local, speaker))
    short = dict(saved["weights"])
    short.pop("output.bias")
    with pytest.raises(RuntimeError, match=r"Missing key.*output\.bias"):
        other.load_state_dict(short)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surplus"):
        other.load_state_dict({**saved["weights"], "surplus": torch.zeros(1)})


@pytest.mark.parametrize("distribution", distributions.KINDS)
def test_deterministic_given_a_seed(distribution: str, need: Need, ran: Ran) -> None:
    """The generator decides the samples, the global seed decides the initial weights, and runs repeat bit for bit."""
    need(OP, "cpu")
    model = small(distribution)

    def draw(seed: int) -> Tensor:
        with ran(OP, "cpu"):
            return model.generate(50, batch_size=2, generator=torch.Generator().manual_seed(seed), backend="cpu")

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(5)
    one = model.generate(50)
    torch.manual_seed(5)
    assert torch.equal(one, model.generate(50))
    x = random_samples(model, 2, 40)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        torch.manual_seed(6)
        first = WaveNet(2, 1, 4, 4)
        torch.manual_seed(6)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), WaveNet(2, 1, 4, 4).parameters(), strict=True))


@pytest.mark.parametrize("distribution", distributions.KINDS)
def test_training_learns(distribution: str) -> None:
    """Every parameter gets a finite gradient, and a few steps on one sequence raise its probability."""
    model = small(distribution, local_channels=2, upsample_scales=(4,), speakers=2, weight_norm=True)
    x = random_samples(model, 2, 32)
    x = x if x.dtype == torch.int64 else x.float()
    local, speaker = torch.randn(2, 2, 8), torch.tensor([0, 1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model.bits_per_sample(x, local, speaker).mean()
        loss.backward()
        losses.append(float(loss))
        for name, p in model.named_parameters():
            assert p.grad is not None, name
            assert bool(torch.isfinite(p.grad).all()), name
        optimizer.step()
    # the residual output of the last layer feeds nothing
    idle = {f"layers.{len(model.layers) - 1}.out.{part}" for part in ("weight", "bias")}
    for name, p in model.named_parameters():
        if name not in idle:
            assert bool((p.grad != 0).any()), name
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("options", [{}, {"local_channels": 2, "speakers": 3}])
def test_compiles_whole(options: dict) -> None:
    """torch.compile(fullgraph=True) of forward: no graph break, same values."""
    model = small(layers=2, **options)
    x = random_samples(model, 2, 16)
    conditions = (torch.randn(2, 2, 16), torch.tensor([2, 0])) if options else ()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, *conditions), model(x, *conditions))


# ---- progress and interruption


def test_progress_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback gets increasing counts that end at `steps`, more than one for long runs."""
    monkeypatch.setattr("fastgen.models.wavenet.CHUNK_WORK", 40_000)
    model = small()
    seen: list[tuple[int, int]] = []
    model.generate(100, progress=lambda done, steps: seen.append((done, steps)))
    counts = [done for done, _ in seen]
    assert {steps for _, steps in seen} == {100}
    assert counts == sorted(set(counts))
    assert counts[-1] == 100
    assert counts[0] > 0
    assert len(counts) > 3
    seen.clear()
    list(model.stream(10, 3, progress=lambda done, steps: seen.append((done, steps))))
    assert seen[-1] == (10, 10)
    assert [done for done, _ in seen] == sorted({3, 6, 9, 10} | {done for done, _ in seen})


@pytest.mark.parametrize("backend", BACKENDS)
def test_interruption_leaves_the_state_usable(
    backend: str, monkeypatch: pytest.MonkeyPatch, need: Need, ran: Ran
) -> None:
    """After Ctrl-C in a callback the state stands where the last report said; going on gives what one go gives."""
    need(OP, backend)
    monkeypatch.setattr("fastgen.models.wavenet.CHUNK_WORK", 40_000)
    model = small(kernel_size=3)
    u = torch.rand(1, 90)
    with ran(OP, backend):
        whole = model.generate(90, uniforms=u, backend=backend)
    state, reached = model.initial_state(), []

    def stop(done: int, steps: int) -> None:
        reached.append(done)
        if done >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(90, uniforms=u, state=state, backend=backend, progress=stop)
    assert 30 <= reached[-1] < 90
    assert state.position == reached[-1]
    rest = model.generate(90 - state.position, uniforms=u[:, state.position :], state=state, backend=backend)
    assert torch.equal(rest, whole[:, reached[-1] :])
    assert state.position == 90


def test_state_through_the_model(need: Need, ran: Ran) -> None:
    """initial_state, then pieces, then a copy: the same samples as one call; a state of another model is refused."""
    need(OP, "cpu")
    model = small()
    u = torch.rand(2, 60)
    with ran(OP, "cpu"):
        whole = model.generate(60, batch_size=2, uniforms=u, backend="cpu")
        state = model.initial_state(2)
        one = model.generate(25, batch_size=2, uniforms=u[:, :25], state=state, backend="cpu")
        kept = state.clone()
        two = model.generate(35, batch_size=2, uniforms=u[:, 25:], state=state, backend="cpu")
        again = model.generate(35, batch_size=2, uniforms=u[:, 25:], state=kept, backend="cpu")
    assert torch.equal(torch.cat([one, two], 1), whole)
    assert torch.equal(two, again)
    with pytest.raises(ValueError, match=r"state is for 2 streams, batch_size is 1"):
        model.generate(5, state=state)
    with pytest.raises(ValueError, match=r"state\.history must be .*got"):
        small(kernel_size=3).generate(5, batch_size=2, state=state)
    with pytest.raises(TypeError, match=r"state\.last must be torch\.float32, got torch\.int64"):
        small("logistic").generate(5, batch_size=2, state=state)


# ---- what is refused

long = torch.int64
BAD_FORWARD = [
    ({}, (torch.zeros(8, dtype=long),), ValueError, r"x must be \(B, T\), got \(8,\)"),
    ({}, (torch.zeros(1, 1, 8, dtype=long),), ValueError, r"x must be \(B, T\), got \(1, 1, 8\)"),
    ({}, (torch.zeros(1, 8),), TypeError, r"x must be int64 classes, got torch\.float32"),
    ({}, (torch.zeros(1, 8, dtype=torch.int32),), TypeError, r"x must be int64 classes, got torch\.int32"),
    ({}, (torch.full((1, 8), 10),), ValueError, r"x must lie in \[0, 10\), got 10 to 10"),
    ({}, (torch.full((1, 8), -1),), ValueError, r"x must lie in \[0, 10\), got -1 to -1"),
    ({"distribution": "logistic"}, (torch.zeros(1, 8, dtype=long),), TypeError, r"x must be floating point.*int64"),
    ({}, (torch.zeros(1, 8, dtype=long), torch.zeros(1, 3, 8)), ValueError, r"local was given.*local_channels=0"),
    (
        {},
        (torch.zeros(1, 8, dtype=long), None, torch.zeros(1, dtype=long)),
        ValueError,
        r"speaker was given.*speakers=0",
    ),
    ({"local_channels": 3}, (torch.zeros(1, 8, dtype=long),), ValueError, r"local is needed: \(B, 3, frames\)"),
    (
        {"local_channels": 3},
        (torch.zeros(1, 8, dtype=long), torch.zeros(1, 4, 8)),
        ValueError,
        r"local must be \(1, 3, frames\), got \(1, 4, 8\)",
    ),
    (
        {"local_channels": 3},
        (torch.zeros(2, 8, dtype=long), torch.zeros(1, 3, 8)),
        ValueError,
        r"local must be \(2, 3, frames\), got \(1, 3, 8\)",
    ),
    (
        {"local_channels": 3},
        (torch.zeros(1, 8, dtype=long), torch.zeros(3, 8)),
        ValueError,
        r"local must be \(1, 3, frames\), got \(3, 8\)",
    ),
    (
        {"local_channels": 3},
        (torch.zeros(1, 8, dtype=long), torch.zeros(1, 3, 8).double()),
        TypeError,
        r"local must be torch\.float32.*got torch\.float64",
    ),
    (
        {"local_channels": 3, "upsample_scales": (2,)},
        (torch.zeros(1, 9, dtype=long), torch.zeros(1, 3, 4)),
        ValueError,
        r"local is too short: it covers 8 samples of 9",
    ),
    ({"speakers": 3}, (torch.zeros(1, 8, dtype=long),), ValueError, r"speaker is needed: \(B,\) int64 in \[0, 3\)"),
    (
        {"speakers": 3},
        (torch.zeros(1, 8, dtype=long), None, torch.tensor([3])),
        ValueError,
        r"speaker must lie in \[0, 3\), got \[3\]",
    ),
    (
        {"speakers": 3},
        (torch.zeros(1, 8, dtype=long), None, torch.tensor([1, 1])),
        ValueError,
        r"speaker must be \(1,\) int64, got \(2,\)",
    ),
    (
        {"speakers": 3},
        (torch.zeros(1, 8, dtype=long), None, torch.tensor([1.0])),
        ValueError,
        r"speaker must be \(1,\) int64, got \(1,\) torch\.float32",
    ),
]


@pytest.mark.parametrize(("options", "arguments", "kind", "message"), BAD_FORWARD)
def test_forward_refuses(options: dict, arguments: tuple, kind: type[Exception], message: str) -> None:
    """Each wrong input is an error that says which argument, what was expected and what came."""
    with pytest.raises(kind, match=message):
        small(**options)(*arguments)


BAD_GENERATE = [
    ({}, {"steps": 0}, ValueError, r"steps must be an integer >= 1, got 0"),
    ({}, {"steps": -3}, ValueError, r"steps must be an integer >= 1, got -3"),
    ({}, {"steps": 2.0}, ValueError, r"steps must be an integer >= 1, got 2\.0"),
    ({}, {"batch_size": 0}, ValueError, r"batch_size must be an integer >= 1, got 0"),
    ({}, {"temperature": 0.0}, ValueError, r"temperature must be finite and > 0, got 0\.0"),
    ({}, {"temperature": -1.0}, ValueError, r"temperature must be finite and > 0, got -1\.0"),
    ({}, {"temperature": math.nan}, ValueError, r"temperature must be finite and > 0, got nan"),
    ({}, {"temperature": math.inf}, ValueError, r"temperature must be finite and > 0, got inf"),
    ({}, {"uniforms": torch.rand(1, 7)}, ValueError, r"uniforms must be \(1, 8\), got \(1, 7\)"),
    ({}, {"uniforms": torch.rand(8)}, ValueError, r"uniforms must be \(1, 8\), got \(8,\)"),
    (
        {"distribution": "logistic"},
        {"uniforms": torch.rand(1, 8)},
        ValueError,
        r"uniforms must be \(1, 8, 2\), got \(1, 8\)",
    ),
    ({}, {"uniforms": torch.ones(1, 8)}, ValueError, r"uniforms must lie in \[0, 1\), got 1\.0 to 1\.0"),
    ({}, {"uniforms": torch.full((1, 8), -0.1)}, ValueError, r"uniforms must lie in \[0, 1\), got -0\.1"),
    ({}, {"uniforms": torch.full((1, 8), math.nan)}, ValueError, r"uniforms must lie in \[0, 1\), got nan"),
    ({}, {"uniforms": torch.zeros(1, 8, dtype=long)}, TypeError, r"uniforms must be floating point, got torch\.int64"),
    ({}, {"given": torch.zeros(1, 9, dtype=long)}, ValueError, r"given must be \(1, at most 8\), got \(1, 9\)"),
    ({}, {"given": torch.zeros(2, 3, dtype=long)}, ValueError, r"given must be \(1, at most 8\), got \(2, 3\)"),
    ({}, {"given": torch.zeros(1, 3)}, TypeError, r"given must be int64 classes, got torch\.float32"),
    ({}, {"given": torch.full((1, 3), 10)}, ValueError, r"given must lie in \[0, 10\), got 10"),
    (
        {"distribution": "gaussian"},
        {"given": torch.zeros(1, 3, dtype=long)},
        TypeError,
        r"given must be floating point",
    ),
    ({}, {"dtype": torch.float16}, ValueError, r"dtype must be float32 or bfloat16, got torch\.float16"),
    ({}, {"backend": "gpu"}, ValueError, r"backend: expected one of .*, got 'gpu'"),
    ({"local_channels": 3}, {}, ValueError, r"local is needed"),
    (
        {"local_channels": 3},
        {"local": torch.zeros(1, 3, 7)},
        ValueError,
        r"local is too short: it covers 7 samples of 8",
    ),
    ({"speakers": 3}, {"speaker": torch.tensor([-1])}, ValueError, r"speaker must lie in \[0, 3\), got \[-1\]"),
]


@pytest.mark.parametrize(("options", "arguments", "kind", "message"), BAD_GENERATE)
def test_generate_refuses(options: dict, arguments: dict, kind: type[Exception], message: str) -> None:
    """Each wrong argument is an error before the first sample, from `stream` at the call, not at the first chunk."""
    model = small(**options)
    with pytest.raises(kind, match=message):
        model.generate(**{"steps": 8, **arguments})
    with pytest.raises(kind, match=message):
        model.stream(**{"steps": 8, **arguments})


def test_stream_refuses_a_wrong_chunk() -> None:
    with pytest.raises(ValueError, match=r"chunk must be an integer >= 1, got 0"):
        small().stream(5, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    """NaN or infinity in any parameter is an error that names it, instead of noise."""
    model = small(local_channels=2, upsample_scales=(2,), speakers=2)
    conditions = {"local": torch.zeros(1, 2, 8), "speaker": torch.tensor([1])}
    assert model.generate(8, **conditions).shape == (1, 8)
    for name, p in model.named_parameters():
        broken = copy.deepcopy(model)
        dict(broken.named_parameters())[name].data.view(-1)[-1] = value
        assert torch.isfinite(p).all()
        with pytest.raises(ValueError, match=rf"{name} holds NaN or infinity"):
            broken.generate(8, **conditions)


def test_prefix_and_uniforms_in_double(need: Need, ran: Ran) -> None:
    """Prefixes and uniforms in another floating-point type are converted, not read as if they were float32."""
    need(OP, "cpu")
    model = small("logistic")
    given, u = torch.rand(2, 5).double() - 0.5, torch.rand(2, 12, 2).double()
    u[0, 7] = 1 - 1e-12  # rounds to 1 in float32
    with ran(OP, "cpu"):
        one = model.generate(12, batch_size=2, given=given, uniforms=u, backend="cpu")
        two = model.generate(
            12, batch_size=2, given=given.float(), uniforms=u.clamp(max=1 - 2**-24).float(), backend="cpu"
        )
    assert torch.equal(one, two)
    torch.testing.assert_close(one[:, :5], given.float(), rtol=0, atol=0)
    categorical = small(classes=10)
    with torch.no_grad():
        categorical.output.weight.zero_()
        categorical.output.bias.copy_(torch.tensor([0.0] * 9 + [-60.0]))
    edge = torch.full((1, 4), 1 - 1e-12, dtype=torch.float64)
    assert int(categorical.generate(4, uniforms=edge).max()) == 8, "a class of probability 1e-27 came out"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, r"layers must be an integer >= 1, got 0"),
        ({"layers": 5, "cycles": 2}, r"layers must be a multiple of cycles, got 5 and 2"),
        ({"kernel_size": 0}, r"kernel_size must be an integer >= 1, got 0"),
        ({"residual_channels": -4}, r"residual_channels must be an integer >= 1, got -4"),
        ({"skip_channels": 1.5}, r"skip_channels must be an integer >= 1, got 1\.5"),
        ({"classes": 0}, r"classes must be an integer >= 1, got 0"),
        ({"mixtures": 0}, r"mixtures must be an integer >= 1, got 0"),
        ({"distribution": "poisson"}, r"distribution must be one of .*got 'poisson'"),
        ({"start": 256}, r"start must be a class in \[0, 256\), got 256"),
    ],
)
def test_constructor_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveNet(**options)
