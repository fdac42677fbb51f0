"""Modules under PyTorch's own tools: the device "meta", averaged models, another default dtype, traces, vmap."""

import pytest
import torch
from elsewhere import DEVICE, Elsewhere
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastgen import nn as fn
from fastgen.models import (
    FVSBN,
    NADE,
    VAE,
    VQVAE,
    VQVAE2,
    GatedPixelCNN,
    Glow,
    GPTPrior,
    PixelCNN,
    PixelRNN,
    PixelSNAIL,
    RealNVP,
    SpeechVQVAE,
    WaveNet,
)

MODULES = {
    "PixelCNN": lambda: PixelCNN(channels=8, layers=1),
    "GatedPixelCNN": lambda: GatedPixelCNN(image_channels=3, channels=9, layers=1),
    "PixelSNAIL": lambda: PixelSNAIL(channels=8, layers=1),
    "PixelRNN": lambda: PixelRNN(channels=8, layers=1),
    "GPTPrior": lambda: GPTPrior(codes=5, channels=16, layers=1, heads=2),
    "NADE": lambda: NADE(10, hidden=4, order=torch.randperm(10)),
    "FVSBN": lambda: FVSBN(10),
    "Glow": lambda: Glow((3, 8, 8), steps=1, hidden=8),
    "RealNVP": lambda: RealNVP((3, 8, 8), hidden=8),
    "VAE": lambda: VAE(10, latent=2, hidden=4),
    "VQVAE": lambda: VQVAE(1, 8, codebook_size=8, code_dim=4),
    "VQVAE2": lambda: VQVAE2(1, 8, codebook_size=8, code_dim=4),
    "WaveNet": lambda: WaveNet(layers=2, residual_channels=8, skip_channels=8),
    "SpeechVQVAE": lambda: SpeechVQVAE(hidden_channels=8, codebook_size=8, layers=2, residual_channels=8),
    "Permutation": lambda: fn.Permutation(4, "random"),
    "InvertibleConv1x1": lambda: fn.InvertibleConv1x1(6, actnorm=True),
}
ORDERED = {
    "NADE": lambda: (NADE(784, hidden=4, order=torch.randperm(784)), torch.randint(2, (3, 784)).float()),
    "Permutation": lambda: (fn.Permutation(48, "random"), torch.randn(2, 48)),
    "InvertibleConv1x1": lambda: (fn.InvertibleConv1x1(48), torch.randn(2, 48, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_made_on_meta_and_filled_from_a_state(name):
    there = MODULES[name]()
    with torch.device("meta"):
        emptied, assigned = MODULES[name](), MODULES[name]()
    assert all(t.is_meta for t in emptied.state_dict().values())
    emptied.to_empty(device="cpu").load_state_dict(there.state_dict())
    assigned.load_state_dict(there.state_dict(), assign=True)
    for module in (emptied, assigned):
        for (key, a), (_, b) in zip(there.named_buffers(), module.named_buffers(), strict=True):
            assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ORDERED)
@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_a_state_with_averaged_whole_numbers_is_refused(name, decay):
    module, x = ORDERED[name]()
    average = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(3):
        average.update_parameters(module)
    with pytest.raises(RuntimeError, match="must hold each of 0 to"):
        module.load_state_dict(average.module.state_dict())
    kept = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(decay))
    kept.update_parameters(module)
    torch.testing.assert_close(kept(x), module(x))


@pytest.mark.parametrize("module", [NADE(10), FVSBN(10), fn.Permutation(10), fn.InvertibleConv1x1(10)])
def test_a_state_with_a_bad_order_is_refused(module):
    state, before = module.state_dict(), {k: v.clone() for k, v in module.state_dict().items()}
    key = "permutation" if "permutation" in state else "order"
    for order in (torch.zeros(10, dtype=torch.int64), torch.arange(10) + 5):
        with pytest.raises(RuntimeError, match=f"{key} must hold each of 0 to 9 once, got torch.int64"):
            module.load_state_dict(before | {key: order})
        assert torch.equal(module.state_dict()[key], before[key])


def test_an_order_from_elsewhere_goes_where_the_parameters_are():
    order = torch.randperm(10)
    with torch.device("meta"):
        assert NADE(10, hidden=4, order=order).order.is_meta
    with Elsewhere():
        assert NADE(10, hidden=4, order=order.to(DEVICE)).order.device.type == "cpu"


@pytest.mark.parametrize("lu", [True, False])
def test_the_default_dtype_is_the_parameters(lu):
    torch.set_default_dtype(torch.float64)
    try:
        layer = fn.InvertibleConv1x1(6, lu=lu, actnorm=True)
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        x = torch.randn(2, 6, 5)
        z, log_det = layer(x)
        torch.testing.assert_close(layer.inverse(z)[0], x)
        assert log_det.dtype == torch.float64
        assert Glow((3, 8, 8), steps=1, hidden=8).log_prob(torch.randint(256, (2, 3, 8, 8))).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (fn.MaskedConv2d(8, 8), (2, 8, 9, 9)),
        (fn.GatedMaskedConv2d(8, 8), (2, 8, 9, 9)),
        (fn.WaveNetLayer(8, 8), (2, 8, 50)),
        (fn.ActNorm(8).eval(), (2, 8, 9, 9)),
        (fn.InvertibleConv1x1(8), (2, 8, 9)),
        (fn.AffineCoupling(torch.nn.Conv2d(4, 8, 1)), (2, 8, 9, 9)),
        (fn.FlowSequence(fn.InvertibleConv1x1(8), reversible=True), (2, 8, 9)),
    ],
)
def test_traces_hold_the_ops(module, shape, tmp_path, need):
    need("masked_conv2d", "cpu")
    x = torch.randn(shape)
    traced = torch.jit.trace(module, x)
    assert "fastgen::" in str(traced.inlined_graph)
    torch.jit.save(traced, tmp_path / "a.pt")
    again, first = torch.jit.load(tmp_path / "a.pt"), x[:1].clone()
    torch.testing.assert_close(again(first), module(first), check_device=False)


@pytest.mark.parametrize(
    ("ours", "shape"),
    [
        (fn.Conv2d(4, 6, 3, padding=1), (5, 1, 4, 16, 16)),
        (fn.Conv2d(4, 6, 4, stride=2, padding=1), (5, 1, 4, 16, 16)),
        (fn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (5, 1, 4, 16, 16)),
        (fn.Conv1d(4, 6, 3, padding=1), (5, 1, 4, 300)),
        (fn.Linear(200, 300), (5, 100, 200)),
    ],
)
def test_gradients_of_examples_by_vmap_are_pytorchs(ours, shape, monkeypatch):
    parameters, x = dict(ours.named_parameters()), torch.randn(shape)

    def loss(parameters, example):
        return torch.func.functional_call(ours, parameters, (example,)).square().mean()

    for kernel in ("conv2d", "downsample_conv2d", "upsample_conv2d", "linear"):
        for part in (fn.conv2d, fn.linear):
            monkeypatch.setattr(part, kernel, None, raising=False)  # which would be called for each example alone
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i, example in enumerate(x):
        ours.zero_grad()
        torch.nn.functional.mse_loss(type(ours).__mro__[1].forward(ours, example), torch.zeros(())).backward()
        for name, parameter in ours.named_parameters():
            torch.testing.assert_close(grads[name][i], parameter.grad, rtol=1e-4, atol=1e-6)
