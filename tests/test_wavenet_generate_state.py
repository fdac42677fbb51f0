"""Generation's state, streams and threads: what carries over, what stays apart, and what is refused."""

from __future__ import annotations

import copy
import math
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from wavenet_helpers import BACKENDS, OP, Need, Ran, conditioning, default_network, draw, first, network

from fastgen.ops import GenerationState, Generator, WaveNetWeights, initial_state

pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_copied(backend: str, need: Need, ran: Ran) -> None:
    """What becomes of the tensors later does not matter, also to a number of streams that comes for the first time."""
    need(OP, backend)
    w, dilations = network(), [1, 2, 4, 8]
    loop, other = (Generator(w, dilations, backend=backend) for _ in range(2))
    gate_bias, _ = conditioning(w, 1, 20)
    u, states = draw("categorical", 9, 20), [first(w, dilations, n) for n in (1, 9, 1, 9)]
    with ran(OP, backend):
        before = [other.run(state, u[: len(state.last)], gate_bias)[0] for state in states[:2]]
        for tensor in w:
            tensor.fill_(torch.nan)
        after = [loop.run(state, u[: len(state.last)], gate_bias)[0] for state in states[2:]]
    assert all(map(torch.equal, before, after))


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"uniforms": [[0.5]]}, TypeError, r"uniforms must be a tensor \(B, T, 2\), got list"),
        ({"uniforms": torch.rand(2, 5, 2, device="meta")}, ValueError, "uniforms is on meta, weights on cpu"),
        ({"gate_bias": None}, TypeError, "gate_bias must be a tensor, got NoneType"),
        ({"gate_bias": torch.full((1, 4, 32), math.nan)}, ValueError, "gate_bias holds NaN"),
        ({"cond": torch.full((2, 5, 4, 32), -math.inf)}, ValueError, "cond holds NaN, infinity"),
        ({"given": torch.full((2, 3), 1.5)}, ValueError, r"given must lie in \[-1, 1\], got 1\.5 to 1\.5"),
        ({"given": [0.5]}, TypeError, "given must be a tensor, got list"),
        ({"state": "x"}, TypeError, "state must be a GenerationState, got str"),
        ({"temperature": "a"}, ValueError, "temperature must be finite and > 0, got 'a'"),
        ({"temperature": 0.0}, ValueError, r"temperature must be finite and > 0, got 0\.0"),
    ],
)
def test_run_of_a_mixture_refuses(change: dict, kind: type[Exception], message: str, backend: str, need: Need) -> None:
    need(OP, backend)
    w, dilations = network(outputs=6, distribution="logistic"), [1, 2, 4, 8]
    loop = Generator(w, dilations, distribution="logistic", backend=backend)
    call = {
        "state": first(w, dilations, 2, "logistic"), "uniforms": torch.rand(2, 5, 2),
        "gate_bias": torch.zeros(1, 4, 32), **change,
    }  # fmt: skip
    with pytest.raises(kind, match=f"wavenet_generate: {message}"):
        loop.run(**call)


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
    with pytest.raises(ValueError, match=r"log_scale_min must be finite, got nan"):
        Generator(w, dilations, log_scale_min=math.nan)
    with pytest.raises(TypeError, match=r"weights\.conv must be a tensor, got list"):
        Generator(w._replace(conv=[]), dilations)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 5])
def test_without_layers(batch: int, dtype: torch.dtype, need: Need) -> None:
    """What is drawn depends on the biases alone."""
    need(OP, "cpu")
    w = network(0, 20, 12, 24, 32)
    u, gate_bias = torch.rand(batch, 30), torch.zeros(1, 0, 24)
    drawn = [
        Generator(w, [], dtype=dtype, backend=backend).run(
            initial_state(w, [], torch.zeros(batch, dtype=torch.int64)), u, gate_bias
        )[0]
        for backend in ("cpu", "reference")
    ]
    assert torch.equal(*drawn)
