"""generate and stream of fastgen.models.WaveNet: the model's distribution, chunks, state, progress, current weights."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wavenet_helpers import BACKENDS, OP, Need, Ran, draw, loud, matches_forward, random_samples, small

from fastgen.models import WaveNet, wavenet_sampling
from fastgen.ops import GenerationState, Generator, distributions

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastgen. .* runs on the PyTorch reference:RuntimeWarning"),
]


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


@pytest.mark.parametrize("channels", [1, 20, 80])
def test_conditioning_has_the_same_bits_in_any_chunk(channels: int, need: Need) -> None:
    """However few steps a chunk has, its share of the conditioning is summed as that of a long one."""
    need(OP, "cpu")
    model = loud(WaveNet(4, 2, 16, 16, distribution="gaussian", mixtures=1, local_channels=channels))
    local, u = torch.randn(1, channels, 150), draw("gaussian", 1, 150)
    whole = model.generate(150, local=local, uniforms=u, backend="cpu")
    for chunk in (1, 2, 3, 7, 11, 20):
        assert torch.equal(torch.cat(list(model.stream(150, chunk, local=local, uniforms=u, backend="cpu")), 1), whole)


def test_blocks_without_frames_are_skipped() -> None:
    """Nothing has arrived yet: the stream asks for the next block, before upsampling, which has no word for nothing."""
    model = loud(WaveNet(2, 1, 8, 8, classes=12, local_channels=3, upsample_scales=(4,)))
    local, u = torch.randn(1, 3, 5), draw("categorical", 1, 20)
    blocks = (local[:, :, :0], local[:, :, :2], local[:, :, :0], local[:, :, 2:])
    chunks = list(model.stream(20, 4, local=blocks, uniforms=u))
    assert torch.equal(torch.cat(chunks, 1), torch.cat(list(model.stream(20, 4, local=local, uniforms=u)), 1))


def test_stream_leaves_gradients_on() -> None:
    """Between two chunks the caller's code can train: gradients are off inside the stream alone."""
    model = WaveNet(2, 1, 4, 4, classes=8)
    for chunk in model.stream(6, 2):
        assert torch.is_grad_enabled()
        assert model.log_prob(chunk).requires_grad
        break
    assert torch.is_grad_enabled()


def test_progress_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callback gets increasing counts that end at `steps`, more than one for long runs."""
    monkeypatch.setattr("fastgen.models.wavenet_sampling.CHUNK_WORK", 40_000)
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
    monkeypatch.setattr("fastgen.models.wavenet_sampling.CHUNK_WORK", 40_000)
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


OTHER_NETWORKS = {
    "residual channels 8, here 9": {"residual_channels": 9, "gate_channels": 8},
    "gate channels 8, here 7": {"gate_channels": 7},
    "skip channels 8, here 5": {"skip_channels": 5},
    "output channels 10, here 11": {"classes": 11},
    r"dilations \[1, 2, 1, 2\], here \[1, 1, 1, 1, 1, 1\]": {"layers": 6, "cycles": 6},
    r"kernel size 2, here 3; dilations .* here \[1, 1, 1\]": {"layers": 3, "cycles": 3, "kernel_size": 3},
}


@pytest.mark.parametrize("difference", OTHER_NETWORKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_of_another_network_are_refused(difference: str, backend: str, need: Need) -> None:
    """Even where the queues have the same size in memory; the message says what differs. The state stays as it is."""
    need(OP, backend)
    state, other = small().initial_state(), small(**OTHER_NETWORKS[difference])
    assert state.history.shape == other.initial_state().history.shape
    with pytest.raises(ValueError, match=rf"state belongs to another network: {difference}$"):
        other.stream(5, state=state, backend=backend)
    assert state.position == 0
    assert small().generate(5, state=state, backend=backend).shape == (1, 5)


@pytest.mark.parametrize("how", ["clone", "deepcopy", "pickle", "file", "fields"])
def test_copies_of_a_state_continue(how: str, tmp_path: Path) -> None:
    model, u = small(), draw("categorical", 1, 30)
    state = model.initial_state()
    model.generate(10, uniforms=u[:, :10], state=state)
    torch.save(vars(state), tmp_path / "state.pt")
    copies = {
        "clone": state.clone,
        "deepcopy": lambda: copy.deepcopy(state),
        "pickle": lambda: pickle.loads(pickle.dumps(state)),
        "file": lambda: GenerationState(**torch.load(tmp_path / "state.pt", weights_only=True)),
        "fields": lambda: GenerationState(**dataclasses.asdict(state)),
    }
    other = copies[how]()
    expected = model.generate(20, uniforms=u[:, 10:], state=state)
    assert torch.equal(model.generate(20, uniforms=u[:, 10:], state=other), expected)
    assert other.position == 30


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_packed_once(backend: str, need: Need, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing is not repeated while the weights stay, for either dtype; a copy of the model packs its own."""
    need(OP, backend)
    made = []

    class Counted(Generator):
        def __init__(self, *args: object, **options: object) -> None:
            made.append(self)
            super().__init__(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(wavenet_sampling, "Generator", Counted)
    model = small()
    for _ in range(3):
        for dtype in (torch.float32, torch.bfloat16):
            model.generate(5, dtype=dtype, backend=backend)
    assert len(made) == 2
    copy.deepcopy(model).generate(5, backend=backend)
    assert len(made) == 3
    pickle.dumps(model)
