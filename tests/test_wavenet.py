"""fastgen.models.WaveNet: causality, likelihood, training, weights from a file, compilation."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from wavenet_helpers import BACKENDS, Need, Ran, random_samples, small

import fastgen
from fastgen.models import WaveNet
from fastgen.ops import distributions

LAYER = "wavenet_layer"

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastgen. .* runs on the PyTorch reference:RuntimeWarning"),
]


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


@pytest.mark.parametrize("distribution", distributions.KINDS)
def test_vmap_over_sequences(distribution: str) -> None:
    """torch.func.vmap, which has no values to check, gives what the batch gives."""
    model = small(distribution, layers=2)
    x = random_samples(model, 3, 12)
    x = x if x.dtype == torch.int64 else x.float()
    with torch.no_grad(), fastgen.use_backend("reference"):
        torch.testing.assert_close(torch.func.vmap(model)(x[:, None])[:, 0], model(x))


@pytest.mark.parametrize("options", [{}, {"local_channels": 2, "speakers": 3}])
def test_compiles_whole(options: dict) -> None:
    """torch.compile(fullgraph=True) of forward: no graph break, same values."""
    model = small(layers=2, **options)
    x = random_samples(model, 2, 16)
    conditions = (torch.randn(2, 2, 16), torch.tensor([2, 0])) if options else ()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, *conditions), model(x, *conditions))
