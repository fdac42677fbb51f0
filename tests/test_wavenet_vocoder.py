"""Checkpoints of wavenet_vocoder, the PyPI release and its later layout: same logits and samples as its own code."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wavenet_helpers import BACKENDS, OP, Need, Ran
from wavenet_vocoder_master import ConvInUpsample, Master, Upsample

from fastgen.models import WaveNet
from fastgen.training import load_wavenet, save_checkpoint

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:fastgen. .* runs on the PyTorch reference:RuntimeWarning"),
]

SIZES: dict[str, Any] = {
    "out_channels": 256, "layers": 6, "stacks": 2, "residual_channels": 16, "gate_channels": 24,
    "skip_out_channels": 20, "kernel_size": 3,
}  # fmt: skip


@pytest.fixture
def release() -> Callable[..., nn.Module]:
    """The PyPI release's WaveNet with random biases and gains, in eval mode."""
    wavenet_vocoder = pytest.importorskip("wavenet_vocoder", reason="needs PyPI's wavenet_vocoder==0.1.1")

    def build(**options: Any) -> nn.Module:
        module = wavenet_vocoder.WaveNet(**{**SIZES, **options})
        return unsettle(module).eval()

    return build


def unsettle(module: nn.Module) -> nn.Module:
    """Random biases, and gains that weight normalisation must apply: fresh ones have g = |v| and biases of 0."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                p.normal_(0, 0.2)
            elif name.endswith("weight_g"):
                p.mul_(torch.rand_like(p) + 0.5)
        for name, p in module.named_parameters():
            if name.startswith("last_conv_layers.3.weight") and not name.endswith("_v"):
                p.mul_(3)
    return module


def inputs(module: Any, x: Tensor) -> Tensor:
    """x (B, T), classes or values, as that project's forward takes it: without the last sample, start first."""
    if x.is_floating_point():
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)[:, None]
    previous = torch.cat([torch.full_like(x[:, :1], 127), x[:, :-1]], 1)
    return F.one_hot(previous, module.out_channels).mT.float()


def same_logits(module: Any, model: WaveNet, x: Tensor, c: Tensor | None = None, g: Tensor | None = None) -> None:
    with torch.no_grad():
        expected = module(inputs(module, x), c, None if g is None else g[:, None])
        got = model(x, c, g)
    assert float(expected.std()) > 0.05
    assert float(expected.diff(dim=2).abs().mean()) > 1e-3, "the logits must depend on the input"
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def classes(batch: int, steps: int) -> Tensor:
    return torch.randint(0, 256, (batch, steps))


@pytest.mark.parametrize("weight_norm", [True, False, "removed"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("source", ["module", "state_dict"])
def test_release_logits(source: str, legacy: bool, weight_norm: bool | str, release: Callable[..., nn.Module]) -> None:
    """Same logits from the module and from its state_dict, weight-normalised, plain, or after make_generation_fast_."""
    module = release(legacy=legacy, weight_normalization=bool(weight_norm))
    x = classes(2, 90)
    if weight_norm == "removed":
        before = module(inputs(module, x))
        module.make_generation_fast_()
        assert not any(k.endswith("_g") for k in module.state_dict())
        torch.testing.assert_close(module(inputs(module, x)), before, rtol=1e-4, atol=1e-4)
    if source == "module":
        model = WaveNet.from_wavenet_vocoder(module)
    else:
        model = WaveNet.from_wavenet_vocoder(module.state_dict(), stacks=2, legacy=legacy)
    same_logits(module, model, x)
    assert model.receptive_field == module.receptive_field


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(("layers", "stacks", "kernel_size"), [(1, 1, 2), (3, 3, 1), (4, 1, 2), (10, 2, 3)])
def test_release_shapes(
    layers: int, stacks: int, kernel_size: int, legacy: bool, release: Callable[..., nn.Module]
) -> None:
    """Any number of layers and stacks; a module needs no hparams."""
    module = release(layers=layers, stacks=stacks, kernel_size=kernel_size, legacy=legacy)
    same_logits(module, WaveNet.from_wavenet_vocoder(module), classes(1, 60))


@pytest.mark.parametrize("upsample", [(), (2, 4), (3,)])
@pytest.mark.parametrize("speakers", [0, 5])
def test_release_conditioning(
    upsample: tuple[int, ...], speakers: int, release: Callable[..., nn.Module], need: Need, ran: Ran
) -> None:
    """Local features, at the sample rate or upsampled by its transposed convolutions, and speaker embeddings."""
    options: dict[str, Any] = {"cin_channels": 7}
    if upsample:
        options |= {"upsample_conditional_features": True, "upsample_scales": list(upsample)}
    if speakers:
        options |= {"gin_channels": 6, "n_speakers": speakers}
    module = release(**options)
    steps = 48
    c = torch.rand(2, 7, steps // math.prod(upsample))
    g = torch.tensor([1, 4]) if speakers else None
    model = WaveNet.from_wavenet_vocoder(module.state_dict(), stacks=2)
    x = classes(2, steps)
    same_logits(module, model, x, c, g)
    with torch.no_grad():
        assert float((model(x, c, g) - model(x, c.flip(0), g)).abs().max()) > 1e-2, "features must matter"


def test_release_scalar_input(release: Callable[..., nn.Module], need: Need, ran: Ran) -> None:
    """Mixture of logistics on scalar input: same parameters, and the same distribution of samples.

    Its own loop draws other uniforms; its samples and ours, given the same history, are compared by their mean and
    mean square within 5 standard errors.
    """
    need(OP, "cpu")
    module = release(out_channels=30, scalar_input=True, cin_channels=4)
    model = WaveNet.from_wavenet_vocoder(module, quantize_channels=65536)
    assert (model.distribution, model.classes) == ("logistic", 65536)
    x, c = torch.rand(2, 60) * 2 - 1, torch.rand(2, 4, 60)
    same_logits(module, model, x, c)
    count = 3000
    c = c[:1, :, :1].expand(count, -1, -1)
    with torch.no_grad():
        from wavenet_vocoder.mixture import sample_from_discretized_mix_logistic

        theirs = sample_from_discretized_mix_logistic(module(torch.zeros(count, 1, 1), c), log_scale_min=-7.0)[:, 0]
    with ran(OP, "cpu"):
        ours = model.generate(1, batch_size=count, local=c, backend="cpu")[:, 0]
    for a, b in ((theirs, ours), (theirs**2, ours**2)):
        error = math.sqrt(float(a.var() + b.var()) / count)
        assert abs(float(a.mean() - b.mean())) < 5 * error


def with_uniforms(monkeypatch: pytest.MonkeyPatch, uniforms: Tensor) -> None:
    """np.random.choice draws from `uniforms`, by the inversion that numpy itself uses."""
    stream = iter(uniforms.double().tolist())

    def choice(a: np.ndarray, p: np.ndarray) -> Any:
        cumulative = np.cumsum(p.astype(np.float64))
        return a[np.searchsorted(cumulative / cumulative[-1], next(stream), side="right")]

    monkeypatch.setattr(np.random, "choice", choice)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("legacy", [True, False])
def test_release_samples(
    legacy: bool, backend: str, monkeypatch: pytest.MonkeyPatch, release: Callable[..., nn.Module], need: Need, ran: Ran
) -> None:
    """Its incremental_forward and our generate draw the same classes from the same uniforms.

    Where they part, the uniform lies within 1e-4 of a boundary of the distribution of that step.
    """
    need(OP, backend)
    steps = 250
    module = release(legacy=legacy, cin_channels=5, gin_channels=4, n_speakers=3)
    model = WaveNet.from_wavenet_vocoder(module)
    module.make_generation_fast_()
    c, g, u = torch.rand(1, 5, steps), torch.tensor([2]), torch.rand(1, steps)
    with monkeypatch.context() as patch, torch.no_grad():
        with_uniforms(patch, u[0])
        theirs = module.incremental_forward(c=c, g=g[:, None], T=steps).argmax(1)
    with ran(OP, backend):
        ours = model.generate(steps, local=c, speaker=g, uniforms=u, backend=backend)
    assert ours.unique().numel() > 20
    different = (ours != theirs)[0].nonzero()
    if len(different):
        t = int(different[0])
        assert t > steps // 4, "they part too early for near-ties"
        with torch.no_grad():
            boundaries = torch.softmax(model(ours, c, g)[0, :, t].double(), 0).cumsum(0)
        assert float((boundaries - u[0, t].double()).abs().min()) < 1e-4


def test_uniforms_feed_numpy_as_numpy_does() -> None:
    """The patched choice is numpy's own: same classes from the uniforms that numpy would draw."""
    p = torch.softmax(torch.randn(50, dtype=torch.float64), 0).numpy()
    state = np.random.RandomState(3)
    expected = [state.choice(np.arange(50), p=p) for _ in range(200)]
    uniforms = torch.from_numpy(np.random.RandomState(3).random_sample(200))
    with pytest.MonkeyPatch.context() as patch:
        with_uniforms(patch, uniforms)
        assert [np.random.choice(np.arange(50), p=p) for _ in range(200)] == expected  # noqa: NPY002


@pytest.mark.parametrize("source", ["module", "state_dict"])
@pytest.mark.parametrize(("cin", "gin"), [(0, 0), (5, 0), (0, 4), (5, 4)])
def test_master_logits(cin: int, gin: int, source: str) -> None:
    """Same logits with each kind of conditioning; an unconditioned state_dict says layout='master'."""
    module = unsettle(Master(cin=cin, gin=gin, speakers=3 if gin else 0)).eval()
    if source == "module":
        model = WaveNet.from_wavenet_vocoder(module)
    else:
        hparams = {} if cin or gin else {"layout": "master"}
        model = WaveNet.from_wavenet_vocoder(module.state_dict(), stacks=2, **hparams)
    c, g = torch.randn(2, 5, 70) if cin else None, torch.tensor([0, 2]) if gin else None
    same_logits(module, model, classes(2, 70), c, g)


@pytest.mark.parametrize("net", ["conv_in", "plain", "plain cut"])
@pytest.mark.parametrize(("scales", "freq"), [((4, 2), 1), ((3,), 3)])
def test_master_upsampling(net: str, scales: tuple[int, ...], freq: int) -> None:
    """The upsampling networks: with a convolution over frames in front, without, and with frames cut at the ends."""
    pad = 0 if net == "plain" else 2
    upsample = ConvInUpsample(scales, freq, 5, pad) if net == "conv_in" else Upsample(scales, freq, pad)
    module = unsettle(Master(cin=5, upsample_net=upsample)).eval()
    with torch.no_grad():
        for name, p in upsample.named_parameters():
            if name.endswith(("weight_v", "conv_in.weight")):
                p.normal_()
    hparams = {"cin_pad": pad, "upsample_params": {"upsample_scales": list(scales)}}
    model = WaveNet.from_wavenet_vocoder(module.state_dict(), stacks=2, **hparams)
    frames = 9
    same_logits(module, model, classes(2, frames * math.prod(scales)), torch.randn(2, 5, frames + 2 * pad))


@pytest.mark.parametrize(("outputs", "distribution"), [(30, "logistic"), (2, "gaussian")])
def test_master_scalar_input(outputs: int, distribution: str) -> None:
    module = unsettle(Master(out_channels=outputs, scalar_input=True, cin=5)).eval()
    model = WaveNet.from_wavenet_vocoder(module.state_dict(), stacks=2)
    assert model.distribution == distribution
    same_logits(module, model, torch.rand(2, 50) * 2 - 1, torch.randn(2, 5, 50))


@pytest.mark.parametrize("backend", BACKENDS)
def test_master_samples(backend: str, need: Need, ran: Ran) -> None:
    """generate draws each step from the original module's own distribution, inverting uniforms as numpy does."""
    need(OP, backend)
    module = unsettle(Master(cin=5, gin=4, speakers=3)).eval()
    model = WaveNet.from_wavenet_vocoder(module)
    c, g, u = torch.randn(2, 5, 120), torch.tensor([2, 0]), torch.rand(2, 120)
    with ran(OP, backend):
        samples = model.generate(120, batch_size=2, local=c, speaker=g, uniforms=u, backend=backend)
    with torch.no_grad():
        above = torch.softmax(module(inputs(module, samples), c, g[:, None]).double(), 1).cumsum(1)
    expected = (above <= u[:, None].double()).sum(1)
    ties = (above - u[:, None].double()).abs().amin(1) < 1e-4
    assert bool(((samples == expected) | ties).all())
    assert float((samples == expected).double().mean()) > 0.95
    assert samples.unique().numel() > 20


def good_state(**options: Any) -> dict[str, Tensor]:
    return dict(unsettle(Master(cin=5, gin=4, speakers=3, **options)).state_dict())


@pytest.mark.parametrize("pick", range(0, 200, 7))
def test_missing_key_is_named(pick: int) -> None:
    state = good_state()
    key = sorted(state)[pick % len(state)]
    del state[key]
    with pytest.raises(ValueError, match=r"^from_wavenet_vocoder: .*" + key.removesuffix("_v").replace(".", r"\.")):
        WaveNet.from_wavenet_vocoder(state, stacks=2)


@pytest.mark.parametrize("key", ["surplus.weight", "conv_layers.2.conv1x1d.weight", "conv_layers.0.conv.weight_h"])
def test_surplus_key_is_named(key: str) -> None:
    with pytest.raises(ValueError, match=r"^from_wavenet_vocoder: .*" + key.replace(".", r"\.")):
        WaveNet.from_wavenet_vocoder({**good_state(), key: torch.zeros(3)}, stacks=2)


@pytest.mark.parametrize("pick", range(0, 200, 7))
def test_wrong_shape_is_named(pick: int) -> None:
    """A tensor with another number of channels, or another rank, in place of a right one."""
    plain = good_state()
    key = sorted(plain)[pick % len(plain)]
    part = key.removesuffix("_g").removesuffix("_v").replace(".", r"\.")
    if "conv1x1" in key or "embed" in key:  # the first layer says how many channels the others must have
        part = r"(embed_speakers|conv_layers\.\d\.conv1x1)"
    for wrong in (plain[key][..., None], torch.cat([plain[key]] * 2, 1 if plain[key].dim() > 1 else 0)):
        with pytest.raises(ValueError, match=rf"(?s)^from_wavenet_vocoder: .*{part}"):
            WaveNet.from_wavenet_vocoder({**plain, key: wrong}, stacks=2)


def test_all_missing_and_surplus_keys_are_named() -> None:
    state = {**good_state(), "b.weight": torch.zeros(3), "a.weight_g": torch.zeros(3)}
    for key in ("first_conv.bias", "conv_layers.3.conv1x1c.weight_v", "last_conv_layers.1.bias"):
        del state[key]
    message = (
        r"missing: first_conv\.bias, last_conv_layers\.1\.bias, conv_layers\.3\.conv1x1c\.weight_v; "
        r"surplus: a\.weight_g, b\.weight$"
    )
    with pytest.raises(ValueError, match=message):
        WaveNet.from_wavenet_vocoder(state, stacks=2)
    surplus = {f"extra.{i:02}": torch.zeros(1) for i in range(20)}
    with pytest.raises(ValueError, match=r"surplus: extra\.00, .*extra\.07 and 12 more$"):
        WaveNet.from_wavenet_vocoder(good_state() | surplus, stacks=2)
    for key in ("conv_layers.4", "upsample_net"):
        module = Master(cin=5, upsample_net=ConvInUpsample((4, 2), 1, 5, 2))
        state = {k: v for k, v in module.state_dict().items() if not k.startswith(f"{key}.") or "up_layers.3" in k}
        with pytest.raises(ValueError, match=rf"missing: {key}\."):
            WaveNet.from_wavenet_vocoder(state, stacks=2)


@pytest.mark.parametrize("source", [None, 5, "model.pt", [torch.zeros(1)]])
def test_wrong_sources_are_refused(source: Any) -> None:
    message = rf"source must be a module or its state_dict, got {type(source).__name__}"
    with pytest.raises(TypeError, match=message):
        WaveNet.from_wavenet_vocoder(source)


@pytest.mark.parametrize("upsample", ["none", "transposed", "conv_in", "plain cut"])
def test_config_describes_the_model(upsample: str, tmp_path: Path, release: Callable[..., nn.Module]) -> None:
    """A converted model goes through a checkpoint, its upsampling and first sample included."""
    hparams: dict[str, Any] = {}
    frames, channels = 9, 5
    if upsample == "transposed":
        module = release(cin_channels=5, upsample_conditional_features=True, upsample_scales=[2, 4])
    elif upsample == "none":
        module = unsettle(Master(gin=4, speakers=3))
    else:
        net = ConvInUpsample((4, 2), 3, 5, 2) if upsample == "conv_in" else Upsample((4, 2), 1, 2)
        module, frames, hparams = unsettle(Master(cin=5, upsample_net=net)), 13, {"cin_pad": 2}
    model = WaveNet.from_wavenet_vocoder(module.state_dict(), stacks=2, **hparams)
    save_checkpoint(tmp_path / "a.pt", model, 16000)
    again, _ = load_wavenet(tmp_path / "a.pt")
    assert again.config == model.config
    assert (again.start, again.receptive_field) == (model.start, model.receptive_field)
    conditions = (None, torch.tensor([2])) if upsample == "none" else (torch.rand(1, channels, frames),)
    x = classes(1, 72)
    with torch.no_grad():
        assert torch.equal(again(x, *conditions), model(x, *conditions))


def test_wrong_hparams_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stacks must divide 6 layers, got 4"):
        WaveNet.from_wavenet_vocoder(good_state(), stacks=4)
    with pytest.raises(ValueError, match=r"layout must be release or master, got 'old'"):
        WaveNet.from_wavenet_vocoder(dict(Master().state_dict()), layout="old")
    with pytest.raises(ValueError, match=r"output_distribution must be Logistic or Normal, got 'Poisson'"):
        WaveNet.from_wavenet_vocoder(good_state(out_channels=30, scalar_input=True), output_distribution="Poisson")
    for empty in ({}, {"state_dict": {}}):
        with pytest.raises(ValueError, match=r"no keys 'conv_layers"):
            WaveNet.from_wavenet_vocoder(empty)
