"""Memory and time of a training step of Glow, reversible and plain, as it grows deeper; normflows' beside it."""

import pytest
import torch
from conftest import peak_extra_bytes

from fastgen.models import Glow

SHAPE, BATCH, SCALES, HIDDEN = (3, 64, 64), 8, 3, 128


def ours(steps, reversible):
    torch.manual_seed(0)
    model = Glow(SHAPE, scales=SCALES, steps=steps, hidden=HIDDEN, reversible=reversible)
    x = torch.randint(0, 256, (BATCH, *SHAPE))
    uniforms = torch.rand(x.shape)
    with torch.no_grad():
        model.log_prob(x, uniforms=uniforms)
    parameters = list(model.parameters())

    def step():
        return torch.autograd.grad(-model.log_prob(x, uniforms=uniforms).mean(), parameters)

    return step, parameters


def normflows(steps):
    nf = pytest.importorskip("normflows", reason="pip install normflows")
    torch.manual_seed(0)
    channels, size = SHAPE[0], SHAPE[1]
    q0, merges, flows = [], [], []
    for i in range(SCALES):  # normflows counts from the coarsest scale
        deep = SCALES - i
        c = channels * 2 ** (deep + 1)
        flows.append(
            [nf.flows.GlowBlock(c, HIDDEN, split_mode="channel", scale=True) for _ in range(steps)]
            + [nf.flows.Squeeze()]
        )
        shape = (c // (2 if i else 1), size // 2**deep, size // 2**deep)
        if i:
            merges.append(nf.flows.Merge())
        q0.append(nf.distributions.DiagGaussian(shape))
    model = nf.MultiscaleFlow(q0, flows, merges)
    x = torch.rand(BATCH, *SHAPE)
    with torch.no_grad():
        model.log_prob(x, None)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        return torch.autograd.grad(-model.log_prob(x, None).mean(), parameters, allow_unused=True)

    return step, parameters


def activations(step, parameters):
    """Peak bytes of a step beyond the gradients that it returns."""
    step()
    peak = peak_extra_bytes(step)
    return None if peak is None else peak - sum(4 * p.numel() for p in parameters)


@pytest.mark.parametrize("steps", [4, 32])
def test_training_step(steps, contest, benchmark):
    ways = {
        "reversible": ours(steps, True), "plain": ours(steps, False), "normflows": normflows(steps),
    }  # fmt: skip
    peaks = {name: activations(*way) for name, way in ways.items()}
    contest({name: way[0] for name, way in ways.items()}, rounds=5)
    benchmark.extra_info.update(
        case=f"Glow 3x64x64, batch 8, L3, hidden 128, K{steps}",
        glow_training=True,
        activation_bytes=peaks,
        parameter_bytes=4 * sum(p.numel() for p in ways["reversible"][1]),
    )
