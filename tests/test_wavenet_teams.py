"""Generation by several threads that share large layers, and by two for each of a few streams: they change no bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from wavenet_helpers import OP, Need, Ran, conditioning, draw, first, network

from fastgen.ops import Generator, WaveNetWeights

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = (torch.float32, torch.bfloat16)
# layers, residual, gate, skip and output channels, taps, distribution: of large layers, some not of whole panels
SHAPES = {
    "2 taps": (5, 256, 264, 200, 100, 2, "categorical"),
    "3 taps": (3, 328, 160, 512, 256, 3, "categorical"),
    "1 tap": (3, 300, 333, 260, 30, 1, "logistic"),
    "one layer": (1, 512, 300, 40, 2, 2, "gaussian"),
}


def drawn(
    w: WaveNetWeights, dilations: list[int], dtype: torch.dtype, threads: int, u: Tensor, known: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples in two calls, the last one's parameters, and what the network remembers."""
    distribution = "categorical" if u.dim() == 2 else "logistic" if w.output.shape[0] > 2 else "gaussian"
    batch, steps = u.shape[:2]
    gate_bias, cond = conditioning(w, batch, steps, batch)
    torch.set_num_threads(threads)
    loop = Generator(w, dilations, distribution=distribution, backend="cpu", dtype=dtype)
    state, cut = first(w, dilations, batch, distribution), steps // 3
    given = state.last[:, None].expand(-1, known).contiguous() if known else None
    begun, _ = loop.run(state, u[:, :cut], gate_bias, cond[:, :cut], given=given)
    rest, parameters = loop.run(state, u[:, cut:], gate_bias, cond[:, cut:], parameters=True)
    assert parameters is not None
    return torch.cat([begun, rest], 1), parameters, state.history


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_large_layers_give_the_same_bits_on_any_threads(shape: str, dtype: torch.dtype, need: Need, ran: Ran) -> None:
    need(OP, "cpu")
    *sizes, distribution = SHAPES[shape]
    w = network(*sizes, distribution=distribution)
    dilations = [1, 2, 16, 4, 33][: sizes[0]]
    u = draw(distribution, 1, 90)
    with ran(OP, "cpu"):
        expected = drawn(w, dilations, dtype, 1, u, known=5)
        for threads in (2, 3, 4, 7):
            for _ in range(3):
                for a, b in zip(drawn(w, dilations, dtype, threads, u, known=5), expected, strict=True):
                    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_weights_beyond_the_cache(batch: int, dtype: torch.dtype, need: Need, ran: Ran) -> None:
    """A team draws all streams at once; one thread sums other columns together, so the last bits may differ."""
    need(OP, "cpu")
    w = network(10, 512, 512, 256, 64, kernel_size=2)  # of 14 million weights: 21 MB at least
    dilations = [1, 2, 4, 8, 16] * 2
    u = draw("categorical", batch, 40)
    with ran(OP, "cpu"):
        alone = drawn(w, dilations, dtype, 1, u)
        for threads in (2, 3, 5):
            samples, parameters, history = drawn(w, dilations, dtype, threads, u)
            assert float((samples == alone[0]).double().mean()) > 0.9
            for b in range(batch):  # as long as the samples are the same
                if torch.equal(samples[b], alone[0][b]):
                    torch.testing.assert_close(parameters[b], alone[1][b], rtol=0, atol=5e-4)
                    torch.testing.assert_close(history[b], alone[2][b], rtol=0, atol=5e-4)


@pytest.mark.parametrize("dtype", TYPES)
def test_two_threads_for_each_of_a_few_streams(dtype: torch.dtype, need: Need, ran: Ran) -> None:
    """Each stream gives the bits that it gives alone."""
    need(OP, "cpu")
    w, dilations, batch = network(6, kernel_size=3), [1, 2, 4, 8, 16, 33], 3
    u = draw("categorical", batch, 200)
    gate_bias, cond = conditioning(w, batch, 200, batch)
    torch.set_num_threads(6)
    with ran(OP, "cpu"):
        loop = Generator(w, dilations, backend="cpu", dtype=dtype)
        together, parameters = loop.run(first(w, dilations, batch), u, gate_bias, cond, parameters=True)
        assert parameters is not None
        for b in range(batch):
            one = slice(b, b + 1)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                alone = loop.run(first(w, dilations, 1), u[one], gate_bias[one], cond[one], parameters=True)
                assert torch.equal(alone[0], together[one])
                assert alone[1] is not None
                assert torch.equal(alone[1], parameters[one])
