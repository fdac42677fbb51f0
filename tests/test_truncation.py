"""top_k and top_p: what is drawn, from which classes, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from pixel_helpers import small
from wavenet_helpers import conditioning, first, network

from fastgen import backend
from fastgen.models import VQVAE, GatedPixelCNN, GPTPrior, TwoStage, WaveNet, sample_naive
from fastgen.ops import Generator
from fastgen.ops.distributions import categorical_from_uniform, most_probable

CASES = [(1, None), (2, None), (5, None), (None, 1e-9), (None, 0.3), (None, 0.9), (7, 0.6), (3, 1.0), (10**6, 0.8)]
BACKENDS = ("cpu", "reference")


def kept_classes(logits, top_k, top_p):
    """Which classes of one distribution are drawn from, and how probable they are: one after another, in float64."""
    p = torch.softmax(logits.double(), 0)
    ranked = sorted(p.tolist(), reverse=True)[:top_k]
    total, least, reached = sum(ranked), 1.0, 0.0
    for least in ranked:
        reached += least
        if top_p is not None and reached >= top_p * total:
            break
    return p * (p >= least)


def drawn(p, u):
    """The number of classes whose cumulative probability is <= u, and how far u is from a boundary."""
    cumulative = p.cumsum(0) / p.sum()
    return int((cumulative <= u).sum()), float((cumulative - u).abs().min())


@pytest.mark.parametrize(("top_k", "top_p"), CASES)
@pytest.mark.parametrize("classes", [1, 2, 7, 300])
def test_most_probable_classes(classes, top_k, top_p):
    logits = 3 * torch.randn(40, 2, classes)
    got = most_probable(logits, top_k, top_p).flatten(0, 1)
    for row, original in zip(got, logits.flatten(0, 1), strict=True):
        assert torch.equal(row > -math.inf, kept_classes(original, top_k, top_p) > 0)
        assert torch.equal(row[row > -math.inf], original[row > -math.inf])


def test_ties_are_kept():
    logits = torch.tensor([1.0, 3.0, 2.0, 2.0, 0.0])
    assert (most_probable(logits, 2, None) > -math.inf).tolist() == [False, True, True, True, False]
    assert (most_probable(logits, None, 0.7) > -math.inf).tolist() == [False, True, True, True, False]
    assert (most_probable(torch.zeros(4), 1, 0.1) > -math.inf).all()


@pytest.mark.parametrize("classes", [2, 3, 9, 64, 513])
def test_a_class_without_probability_is_never_drawn(classes):
    """The last of the uniforms, and sums that round: what is drawn lies within the classes that are kept."""
    logits = torch.randn(500, classes)
    logits[:, classes // 2 :] = -1e4
    u = torch.full((500,), 1 - 2**-24)
    assert int(categorical_from_uniform(logits, u).max()) < classes // 2


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(("top_k", "top_p"), CASES)
@pytest.mark.parametrize("classes", [3, 20, 256])
def test_wavenet(classes, top_k, top_p, which, need, ran):
    """Each sample is what its uniform draws from the classes that the parameters keep, at the edges too."""
    need("wavenet_generate", which)
    dilations, batch, steps = [1, 2, 4], 3, 60
    weights = network(layers=3, outputs=classes, residual=12, gate=10)
    gate_bias, _ = conditioning(weights, batch, steps)
    u = torch.rand(batch, steps)
    u[:, 5], u[:, 11] = 0.0, 1 - 2**-24
    with ran("wavenet_generate", which):
        loop = Generator(weights, dilations, backend=which)
        state = first(weights, dilations, batch)
        samples, parameters = loop.run(state, u, gate_bias, temperature=3.0, top_k=top_k, top_p=top_p, parameters=True)
    close = 0
    for logits, at, sample in zip(parameters.flatten(0, 1), u.flatten(), samples.flatten(), strict=True):
        kept = kept_classes(logits / 3, top_k, top_p)
        expected, margin = drawn(kept, at)
        assert kept[sample] > 0
        if int(sample) != expected:
            assert margin < 1e-5
            close += 1
    assert close <= 2
    assert samples.unique().numel() > 1 or top_k == 1 or top_p == 1e-9, "it must vary"


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (2, None), (None, 0.6), (4, 0.8)])
@pytest.mark.parametrize("options", [{"levels": 7}, {"codes": 30}, {"levels": 5, "image_channels": 3}], ids=str)
@pytest.mark.parametrize("name", ["PixelCNN", "GatedPixelCNN", "PixelSNAIL"])
def test_images(name, options, top_k, top_p, which, need, ran):
    """As one forward pass for each value draws them; several pixels at once too, from guesses of their neighbors."""
    need("pixelcnn_generate", which)
    model, how = small(name, **options), {"top_k": top_k, "top_p": top_p}
    for batch in (1, 3):
        u = torch.rand(batch, model.image_channels, 4, 9)
        expected = sample_naive(model, batch, (4, 9), uniforms=u, temperature=1.2, **how)
        with ran("pixelcnn_generate", which):
            got = model.sample(batch, (4, 9), uniforms=u, temperature=1.2, backend=which, **how)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    run_under(isa, "wavenet or images or alike", "truncation")


@pytest.mark.parametrize("which", BACKENDS)
def test_all_classes_alike(which, need):
    """What keeps every class changes no bit; the most probable one alone is drawn by any uniform."""
    need("pixelcnn_generate", which)
    torch.manual_seed(0)
    model = GPTPrior(300, (3, 5), channels=24, layers=2)
    u = torch.rand(2, 3, 5)
    plain = model.sample(2, (3, 5), uniforms=u, backend=which)
    for how in ({"top_k": 300}, {"top_p": 1.0}, {"top_k": 1000, "top_p": 1}):
        assert torch.equal(plain, model.sample(2, (3, 5), uniforms=u, backend=which, **how))
    for how in ({"top_k": 1}, {"top_p": 1e-30}, {"top_p": 5e-324}):
        first_of = model.sample(2, (3, 5), uniforms=u, backend=which, **how)
        assert torch.equal(first_of, model.sample(2, (3, 5), uniforms=1 - u - 2**-24, backend=which, **how))
        assert torch.equal(first_of, model.sample(2, (3, 5), temperature=1e-6, uniforms=u, backend=which))


@pytest.mark.parametrize("which", BACKENDS)
def test_uniforms_that_round_to_one(which, need):
    need("pixelcnn_generate", which)
    loop, _ = small("GatedPixelCNN", codes=30).generator((3, 5), backend=which)
    u = torch.full((1, 1, 3, 5), 1 - 2**-50, dtype=torch.float64)
    values, parameters = loop.run(u, top_k=1, parameters=True)
    assert torch.equal(values, parameters.argmax(-1))
    with pytest.raises(ValueError, match=r"temperature must lie in \[1e-30, 1e30\], got 1e-39"):
        loop.run(u, temperature=1e-39)


def test_two_stages_draw_codes_so():
    torch.manual_seed(0)
    quantizer = VQVAE(image_channels=1, codebook_size=20, downsample=4, hidden_channels=8, code_dim=4)
    prior = GatedPixelCNN(codes=20, channels=8, layers=1)
    u = [torch.rand(3, 2, 2)]
    codes = prior.sample(3, (2, 2), uniforms=u[0], top_k=3, top_p=0.7)
    images = TwoStage(quantizer, [prior]).sample(3, (8, 8), uniforms=u, top_k=3, top_p=0.7)
    assert torch.equal(images, quantizer.decode(codes))
    assert not torch.equal(codes, prior.sample(3, (2, 2), uniforms=u[0]))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"top_k": 0}, "top_k must be an integer >= 1, got 0"),
        ({"top_k": 2.0}, "top_k must be an integer >= 1, got 2.0"),
        ({"top_k": True}, "top_k must be an integer >= 1, got True"),
        ({"top_p": 0.0}, r"top_p must be a float in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be a float in \(0, 1\], got 1.5"),
        ({"top_p": math.nan}, r"top_p must be a float in \(0, 1\], got nan"),
        ({"top_p": "a"}, r"top_p must be a float in \(0, 1\], got 'a'"),
    ],
)
def test_bad_input(how, message):
    pixels, audio = small("GatedPixelCNN", levels=4), WaveNet(2, 1, residual_channels=8, skip_channels=8, classes=8)
    with pytest.raises(ValueError, match=r"GatedPixelCNN\.sample: " + message):
        pixels.sample(1, (3, 3), **how)
    with pytest.raises(ValueError, match="generate: " + message):
        audio.generate(3, **how)
    with pytest.raises(ValueError, match="generate: " + message):
        audio.stream(3, **how)


@pytest.mark.parametrize("how", [{"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_other_distributions_have_none(how):
    (name, value), size = next(iter(how.items())), {"residual_channels": 8, "skip_channels": 8}
    message = f"{name} is for categorical outputs, got {value} where they are "
    with pytest.raises(ValueError, match=message + "bernoulli"):
        small("GatedPixelCNN", levels=2).sample(1, (3, 3), **how)
    with pytest.raises(ValueError, match=message + "logistic"):
        small("PixelCNN", levels=256, distribution="logistic").sample(1, (3, 3), **how)
    with pytest.raises(ValueError, match=message + "gaussian"):
        WaveNet(2, 1, distribution="gaussian", mixtures=1, **size).generate(3, **how)
