"""What fastgen.models.WaveNet refuses, and how it says so."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from wavenet_helpers import BACKENDS, OP, Need, small

from fastgen.models import WaveNet
from fastgen.ops import Generator, distributions

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:fastgen. .* runs on the PyTorch reference:RuntimeWarning"),
]

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
    ({}, ([[0, 1]],), TypeError, r"x must be a tensor \(B, T\) of int64 classes, got list"),
    ({}, (torch.zeros(1, 8, dtype=long, device="meta"),), ValueError, r"x is on meta, the model on cpu"),
    (
        {"speakers": 3},
        (torch.zeros(2, 8, dtype=long), None, 1),
        TypeError,
        r"speaker must be a tensor \(2,\) of int64, got int",
    ),
    (
        {"local_channels": 3},
        (torch.zeros(1, 8, dtype=long), [[0.0] * 8] * 3),
        TypeError,
        r"local must be a tensor \(1, 3, frames\), got list",
    ),
    (
        {"distribution": "logistic"},
        (torch.tensor([[0.5, 3.0]]),),
        ValueError,
        r"x must lie in \[-1, 1\], got 0\.5 to 3",
    ),
    ({"distribution": "gaussian"}, (torch.tensor([[0.5, math.nan]]),), ValueError, r"x must lie in \[-1, 1\], got nan"),
]


@pytest.mark.parametrize(("options", "arguments", "kind", "message"), BAD_FORWARD)
def test_forward_refuses(options: dict, arguments: tuple, kind: type[Exception], message: str) -> None:
    """Each wrong input is an error that says which argument, what was expected and what came."""
    model = small(**options)
    for call in (model, model.log_prob):
        with pytest.raises(kind, match=message):
            call(*arguments)


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
    ({"speakers": 3}, {"speaker": 1}, TypeError, r"speaker must be a tensor \(1,\) of int64, got int"),
    ({}, {"steps": True}, ValueError, r"steps must be an integer >= 1, got True"),
    ({}, {"batch_size": True}, ValueError, r"batch_size must be an integer >= 1, got True"),
    ({}, {"temperature": "a"}, ValueError, r"temperature must be finite and > 0, got 'a'"),
    ({}, {"uniforms": [[0.5] * 8]}, TypeError, r"uniforms must be a tensor \(1, 8\) in \[0, 1\), got list"),
    ({}, {"uniforms": torch.rand(1, 8, device="meta")}, ValueError, r"uniforms is on meta, the model on cpu"),
    ({}, {"given": [[1, 2]]}, TypeError, r"given must be a tensor \(B, T\) of int64 classes, got list"),
    (
        {"distribution": "logistic"},
        {"given": torch.tensor([[0.0, math.nan]])},
        ValueError,
        r"given must lie in \[-1, 1\], got nan",
    ),
    ({"local_channels": 3}, {"local": 5}, TypeError, r"local must be a tensor or an iterable of tensors, got int"),
    (
        {"local_channels": 3},
        {"local": torch.zeros(1, 3, 0)},
        ValueError,
        r"local is too short: it covers 0 samples of 8",
    ),
    ({}, {"local": [torch.zeros(1, 3, 8)]}, ValueError, r"local was given.*local_channels=0"),
    ({}, {"state": "x"}, TypeError, r"state must be a GenerationState, got str"),
    ({}, {"generator": 3}, TypeError, r"generator must be a torch\.Generator, got int"),
    ({}, {"progress": "x"}, TypeError, r"progress must be True, False or a function, got 'x'"),
]


@pytest.mark.parametrize(("options", "arguments", "kind", "message"), BAD_GENERATE)
def test_generate_refuses(options: dict, arguments: dict, kind: type[Exception], message: str) -> None:
    """Each wrong argument is an error before the first sample, from `stream` at the call, not at the first chunk."""
    model = small(**options)
    with pytest.raises(kind, match=message):
        model.generate(**{"steps": 8, **arguments})
    with pytest.raises(kind, match=message):
        model.stream(**{"steps": 8, **arguments})


def test_blocks_of_features_are_checked() -> None:
    """A list that holds something else than tensors is an error when its turn comes."""
    with pytest.raises(TypeError, match=r"local must be a tensor \(1, 3, frames\), got list"):
        next(small(local_channels=3).stream(8, local=[[0.0] * 8]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distribution", distributions.KINDS)
@pytest.mark.parametrize(
    ("part", "scale"),
    [("input", 1e38), ("layers.1.conv", 1e38), ("layers.2.out", 3e37), ("hidden", 1e38), ("output", 1e38)],
)
def test_weights_that_could_overflow_are_refused(
    part: str, scale: float, distribution: str, backend: str, need: Need
) -> None:
    """Finite weights whose sums leave float32 are an error that names them, not a class drawn from NaN."""
    need(OP, backend)
    model = small(distribution)
    model.get_parameter(f"{part}.weight").data.mul_(scale)
    with pytest.raises(FloatingPointError, match=r"weights\.\w+ is so large that float32 can overflow: sums of up to"):
        model.generate(3, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("part", "scale"), [("input", 1e30), ("layers.1.conv", 1e35), ("layers.2.out", 1e30), ("output", 1e34)]
)
def test_large_weights_that_cannot_overflow_are_used(part: str, scale: float, backend: str, need: Need) -> None:
    """Below the bound outputs are finite, and those of float64."""
    need(OP, backend)
    model = small(kernel_size=3)
    model.get_parameter(f"{part}.weight").data.mul_(scale)
    loop = Generator(model.packed_weights(), model.dilations, backend=backend)
    x = torch.randint(10, (1, 20))
    gate_bias = torch.stack([layer.conv.bias for layer in model.layers])[None].detach()
    _, parameters = loop.run(model.initial_state(), torch.rand(1, 20), gate_bias, given=x, parameters=True)
    with torch.no_grad():
        expected = model.double()(x).mT
    if part in ("layers.2.out", "output"):  # what comes before ends in gates, which saturate
        assert float(expected.abs().max()) > 1e-3 * scale
    torch.testing.assert_close(parameters.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_temperature_that_overflows_is_refused(backend: str, need: Need) -> None:
    need(OP, backend)
    model = small()
    model.output.weight.data.mul_(1e15)
    assert model.generate(3, backend=backend).shape == (1, 3)
    with pytest.raises(FloatingPointError, match=r"divided by a temperature of 1e-30, can overflow float32"):
        model.generate(3, temperature=1e-30, backend=backend)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 0}, r"layers must be an integer >= 1, got 0"),
        ({"layers": 5, "cycles": 2}, r"layers must be a multiple of cycles, got 5 and 2"),
        ({"kernel_size": 0}, r"kernel_size must be an integer >= 1, got 0"),
        ({"residual_channels": -4}, r"residual_channels must be an integer >= 1, got -4"),
        ({"skip_channels": 1.5}, r"skip_channels must be an integer >= 1, got 1\.5"),
        ({"classes": 1}, r"classes must be an integer >= 2, got 1"),
        ({"mixtures": 0}, r"mixtures must be an integer >= 1, got 0"),
        ({"distribution": "poisson"}, r"distribution must be one of .*got 'poisson'"),
        ({"start": 256}, r"start must be a class in \[0, 256\), got 256"),
        ({"start": "a"}, r"start must be a class in \[0, 256\), got 'a'"),
        ({"start": True}, r"start must be a class in \[0, 256\), got True"),
        ({"start": "a", "distribution": "logistic"}, r"start must be a number in \[-1, 1\], got 'a'"),
        ({"start": math.nan, "distribution": "logistic"}, r"start must be a number in \[-1, 1\], got nan"),
        ({"start": 5.0, "distribution": "gaussian"}, r"start must be a number in \[-1, 1\], got 5\.0"),
        ({"log_scale_min": math.nan}, r"log_scale_min must be finite, got nan"),
        ({"log_scale_min": "a"}, r"log_scale_min must be finite, got 'a'"),
        ({"layers": True}, r"layers must be an integer >= 1, got True"),
        ({"gate_channels": -4}, r"gate_channels must be an integer >= 1, got -4"),
        ({"gate_channels": 0}, r"gate_channels must be an integer >= 1, got 0"),
        ({"local_channels": -1}, r"local_channels must be an integer >= 0, got -1"),
        ({"speakers": 1.5}, r"speakers must be an integer >= 0, got 1\.5"),
        ({"speakers": 2, "speaker_channels": 0}, r"speaker_channels must be an integer >= 1, got 0"),
        ({"upsample_scales": (4, 0)}, r"each of upsample_scales must be an integer >= 1, got 0"),
        (
            {"upsample_scales": (4,), "upsample_options": {"kind": "cubic"}},
            r"upsample_options\['kind'\] must be one of transposed, stretch, got 'cubic'",
        ),
    ],
)
def test_constructor_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaveNet(**options)


@pytest.mark.parametrize("position", [-390, 2**63 - 5, 3.5, None, True])
def test_state_with_impossible_position(position: object) -> None:
    """The kernels take the position as it is to find their place in the queues."""
    model = small()
    state = model.initial_state()
    state.position = position  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"state\.position must be"):
        model.generate(3, state=state)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_state_that_is_not_finite(value: float) -> None:
    model = small()
    state = model.initial_state()
    state.history[0, 0, 0] = value
    with pytest.raises(ValueError, match=r"state\.history holds NaN"):
        model.generate(3, state=state)
