"""PixelCNN, GatedPixelCNN and PixelSNAIL: what each pixel sees, the likelihood, conditioning, and bad input."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from pixel_helpers import MODELS, conditions, images_like, loud, small
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgen
from fastgen.models import GatedPixelCNN, GPTPrior, PixelCNN, PixelRNN, PixelSNAIL
from fastgen.models.pixelcnn import PixelCNNBlock
from fastgen.nn import CausalAttention2d, GatedPixelCNNBlock, MaskedConv2d


@pytest.fixture(autouse=True)
def _small_tensors(one_thread):
    pass


def influence(model, size, at, color=0, **kw):
    """Which pixels (and colors) of the input change the parameters of one color at one pixel."""
    x = images_like(model, 1, size)
    before = model(x, **kw)[0, color, :, at[0], at[1]]
    seen = torch.zeros(model.image_channels, *size, dtype=torch.bool)
    for c, i, j in itertools.product(range(model.image_channels), range(size[0]), range(size[1])):
        for value in range(1, min(model.levels, 3)):
            changed = x.clone()
            changed[0, c, i, j] = (x[0, c, i, j] + value) % model.levels
            seen[c, i, j] |= bool((model(changed, **kw)[0, color, :, at[0], at[1]] != before).any())
    return seen


def test_a_block_that_could_be_conditioned_and_is_not():
    block, x = PixelCNNBlock(16, 3, context_channels=4), torch.randn(1, 16, 8, 8)
    plain = x + block.expand(F.relu(block.conv(block.reduce(F.relu(x)))))
    torch.testing.assert_close(block(x), plain)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_sees_only_what_comes_before(name, which, need):
    need("masked_conv2d", which)
    model = small(name, image_channels=3, levels=5).double().eval()
    with fastgen.use_backend(which), torch.no_grad():
        for color in range(3):
            seen = influence(model, (5, 6), (2, 3), color)
            assert not seen[:, 3:].any()
            assert not seen[:, 2, 4:].any()
            assert seen[:, 2, 3].tolist() == [c < color for c in range(3)]


@torch.no_grad()
def test_gated_pixelcnn_has_no_blind_spot():
    """The receptive field pixel by pixel: everything before the pixel, as far as the kernels reach, and all of that."""
    model = loud(GatedPixelCNN(channels=8, layers=3, first_kernel_size=3, levels=4)).double().eval()
    size, at = (9, 13), (6, 6)
    seen = influence(model, size, at)[0]
    expected = torch.zeros(size, dtype=torch.bool)
    expected[at[0], max(0, at[1] - 4) : at[1]] = True  # the row to the left: 1 from the first layer, 1 from each block
    for above in range(1, 5):  # rows above: 1 from the first layer, 1 from each block
        # three blocks and the first layer widen the view by one on each side; each pixel to the left sees as far
        expected[at[0] - above, max(0, at[1] - 4) : at[1] + 5] = True
    assert torch.equal(seen & expected, expected), "a blind spot"
    assert torch.equal(seen, expected), "it sees more than it should"


@torch.no_grad()
def test_pixelcnn_has_the_blind_spot_of_its_masks():
    model = loud(PixelCNN(channels=8, layers=3, first_kernel_size=3, levels=4)).double().eval()
    seen = influence(model, (6, 11), (4, 5))[0]
    assert bool(seen[3, 6])
    assert not bool(seen[3, 7]), "the pixel two to the right, one above, is out of sight of masks A and B"


@torch.no_grad()
def test_pixelsnail_sees_every_pixel_before():
    model = small("PixelSNAIL", levels=3).double().eval()
    seen = influence(model, (5, 6), (4, 2))[0].flatten()
    assert bool(seen[: 4 * 6 + 2].all())
    assert not bool(seen[4 * 6 + 2 :].any())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"levels": 2}, {"levels": 3}, {"levels": 2, "distribution": "categorical"}, {"codes": 3},
        {"levels": 3, "distribution": "logistic", "mixtures": 2},
        {"levels": 2, "image_channels": 2}, {"levels": 2, "distribution": "logistic", "classes": 2},
    ],
    ids=str,
)  # fmt: skip
def test_probabilities_sum_to_one(name, options):
    """Over every image of six values."""
    model = small(name, **options).double().eval()
    shape = (2, 3) if model.codes else (model.image_channels, 6 // model.image_channels // 1, 1)
    every = torch.tensor(list(itertools.product(range(model.levels), repeat=6))).reshape(-1, *shape)
    kw = {"labels": torch.zeros(len(every), dtype=torch.int64)} if model.config["classes"] else {}
    with torch.no_grad():
        log_p = model.log_prob(every, **kw)
    assert log_p.shape == (len(every),)
    assert float(log_p.double().exp().sum()) == pytest.approx(1, abs=1e-4)
    assert float(log_p.exp().std() / log_p.exp().mean()) > 0.1, "the test's model must not be uniform"


def test_log_prob_is_what_the_distributions_say():
    x = torch.randint(0, 2, (4, 1, 5, 6))
    model = small("GatedPixelCNN", levels=2)
    logits = model(x)[:, 0, 0]
    exact = -F.binary_cross_entropy_with_logits(logits, x[:, 0].float(), reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(model.log_prob(x), exact)
    torch.testing.assert_close(model.bits_per_dim(x), -exact / math.log(2) / 30)
    assert model.bits_per_dim(x[:0]).shape == (0,)
    model = small("GatedPixelCNN", levels=2, image_channels=3)
    x = torch.randint(0, 2, (4, 3, 5, 6))
    torch.testing.assert_close(model.bits_per_dim(x), -model.log_prob(x) / math.log(2) / 90)
    model = small("PixelCNN", levels=7)
    x = torch.randint(0, 7, (4, 1, 5, 6))
    exact = -F.cross_entropy(model(x)[:, 0], x[:, 0], reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(model.log_prob(x), exact)


@pytest.mark.parametrize("name", MODELS)
def test_kernels_and_reference_agree(name, need, ran):
    need("masked_conv2d", "cpu")
    model = small(name, levels=5, classes=3, cond_codes=4)
    x, kw = images_like(model, 2, (7, 6)), conditions(model, 2, (7, 6))
    results = []
    for which in ("cpu", "reference"):
        model.zero_grad()
        with ran("masked_conv2d", which), fastgen.use_backend(which):
            loss = model.log_prob(x, **kw).sum()
            loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_conditioning_matters(name):
    model = small(name, levels=3, classes=4, cond_channels=2)
    x = images_like(model, 1, (4, 6))
    labels, cond = torch.tensor([1]), torch.randn(1, 2, 2, 3)
    base = model(x, labels, cond)
    assert not torch.equal(base, model(x, torch.tensor([2]), cond))
    moved = cond.clone()
    moved[0, :, 1, 2] += 1
    assert not torch.equal(base, model(x, labels, moved))
    alone = small(name, levels=3, classes=4)
    assert not torch.equal(alone(x, labels), alone(x, torch.tensor([0])))


@pytest.mark.parametrize("name", MODELS)
def test_config_makes_the_same_model_and_state_loads_strictly(name):
    model = small(name, levels=5, classes=3, cond_codes=4, image_channels=3)
    twin = type(model)(**model.config)
    twin.load_state_dict(model.state_dict())
    x, kw = images_like(model, 2, (4, 4)), conditions(model, 2, (4, 4))
    assert torch.equal(model(x, **kw), twin(x, **kw))


@pytest.mark.parametrize("name", MODELS)
def test_a_larger_likelihood_after_training(name):
    model = small(name, levels=2)
    x = (torch.rand(16, 1, 6, 6) < torch.linspace(0.05, 0.95, 6)).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = float(model.log_prob(x).mean().detach())
    for _ in range(30):
        optimizer.zero_grad()
        (-model.log_prob(x).mean()).backward()
        optimizer.step()
    assert float(model.log_prob(x).mean().detach()) > before + 3


def test_block_in_a_users_network():
    block = GatedPixelCNNBlock(6, 5, context_channels=3)
    v, h, context = torch.randn(2, 6, 5, 4), torch.randn(2, 6, 5, 4), torch.randn(2, 3, 1, 1)
    for out in block(v, h, context):
        assert out.shape == (2, 6, 5, 4)
    with pytest.raises(ValueError, match="context is needed, the layer has context_channels=3"):
        block(v, h)
    with pytest.raises(ValueError, match=r"context must be \(B, 3, H, W\), got \(2, 3\)"):
        block(v, h, context[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"context must broadcast to \(2, 3, 5, 4\), got \(4, 3, 1, 1\)"):
        block(v, h, torch.randn(4, 3, 1, 1))
    with pytest.raises(ValueError, match=r"v and h must have one shape, got \(2, 6, 5, 4\), \(2, 6, 5, 3\)"):
        block(v, h[..., :3], context)
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        GatedPixelCNNBlock(6, 4)


def test_attention_is_causal_over_raster_order():
    layer = CausalAttention2d(4, 6, 8, heads=2, position_channels=2).double()
    x, position = torch.randn(1, 4, 3, 4).double(), torch.randn(1, 2, 3, 4).double()
    before = layer(x, position)
    assert before.shape == (1, 8, 3, 4)
    x[0, :, 1, 2] += 1
    changed = (layer(x, position) != before).any(1).flatten()
    assert changed.tolist() == [pixel >= 6 for pixel in range(12)]


@pytest.mark.parametrize(("keys", "values"), [(6, 8), (8, 6)])
def test_attention_takes_the_fused_path(keys, values):
    layer = CausalAttention2d(4, keys, values, heads=2)
    x = torch.randn(2, 4, 5, 3, requires_grad=True)
    results = []
    for path in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with sdpa_kernel(path):  # raises where the path cannot be taken
            out = layer(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*results)


def test_initial_weights_know_the_live_taps():
    layer = MaskedConv2d(16, 64, 7, "A")
    live = layer.weight.detach()[:, :, :3].std()
    assert float(live) == pytest.approx((16 * 24) ** -0.5 / math.sqrt(3), rel=0.05)
    assert "mask='A'" in repr(layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GatedPixelCNN(levels=1), "levels must be an integer >= 2, got 1"),
        (lambda: PixelCNN(levels=257), r"levels must lie in \[2, 256\], got 257"),
        (lambda: PixelCNN(codes=1), "codes must be 0 .images. or at least 2, got 1"),
        (lambda: PixelCNN(codes=5, levels=3), "codes stand in place of image_channels, levels and distribution"),
        (lambda: PixelSNAIL(distribution="poisson"), "distribution must be one of .*got 'poisson'"),
        (lambda: PixelSNAIL(levels=3, distribution="bernoulli"), "levels must be 2 with distribution='bernoulli'"),
        (lambda: PixelSNAIL(log_scale_min=math.nan), "log_scale_min must be finite, got nan"),
        (lambda: PixelSNAIL(heads=3), "heads must divide key_channels, got 3 for 32"),
        (lambda: GatedPixelCNN(kernel_size=4), "kernel_size must be odd, got 4"),
        (lambda: GatedPixelCNN(first_kernel_size=1), "first_kernel_size must be at least 3, got 1"),
        (lambda: GatedPixelCNN(layers=0), "layers must be an integer >= 1, got 0"),
        (lambda: PixelCNN(channels=7), "channels must be even, got 7"),
        (lambda: PixelCNN(first_kernel_size=1), "first_kernel_size must be at least 2, got 1"),
        (lambda: PixelCNN(classes=-1), "classes must be an integer >= 0, got -1"),
        (lambda: PixelCNN(cond_codes=3, cond_channels=2), "cond_codes or cond_channels, one of the two; got 3, 2"),
        (lambda: MaskedConv2d(4, 6, 3, "C"), "mask must be one of .*got 'C'"),
        (lambda: MaskedConv2d(4, 6, 3, colors=3), "colors must divide in_channels, got 3 for 4"),
        (lambda: MaskedConv2d(4, 6, 3, colors=0), "colors must be an integer >= 1, got 0"),
        (lambda: MaskedConv2d(4, 6, (3, 0)), "kernel_size must be an integer >= 1, got 0"),
        (lambda: CausalAttention2d(4, 6, 7, heads=2), "heads must divide value_channels, got 2 for 7"),
    ],
)
def test_refuses_sizes(make, message):
    with pytest.raises(ValueError, match=message):
        make()


IMAGE = torch.zeros(2, 1, 4, 6, dtype=torch.int64)
BAD = {
    "rank": ((IMAGE[0],), ValueError, r"x must be \(B, 1, H, W\) with at least one pixel, got \(1, 4, 6\)"),
    "channels": ((IMAGE.expand(2, 3, 4, 6),), ValueError, r"x must be \(B, 1, H, W\).*got \(2, 3, 4, 6\)"),
    "no pixel": ((IMAGE[:, :, :0],), ValueError, "at least one pixel"),
    "floats": ((IMAGE.float(),), TypeError, r"x must be int64 values in \[0, 4\), got torch.float32"),
    "level": ((IMAGE + 4,), ValueError, r"x must lie in \[0, 4\), got 4 to 4"),
    "negative": ((IMAGE - 1,), ValueError, r"x must lie in \[0, 4\), got -1 to -1"),
    "list": (([[0]],), TypeError, r"x must be a tensor \(B, 1, H, W\) of int64.*got list"),
    "no labels": ((IMAGE,), ValueError, r"labels are needed: \(2,\) int64 in \[0, 3\)"),
    "label": ((IMAGE, torch.tensor([0, 3])), ValueError, r"labels must lie in \[0, 3\), got 0 to 3"),
    "labels": ((IMAGE, torch.tensor([0])), ValueError, r"labels must be \(2,\) int64, got \(1,\)"),
    "label floats": ((IMAGE, torch.zeros(2)), ValueError, r"labels must be \(2,\) int64, got .*float32"),
    "label list": ((IMAGE, [0, 1]), TypeError, r"labels must be a tensor \(2,\) of int64, got list"),
    "no cond": ((IMAGE, torch.tensor([0, 1])), ValueError, r"cond is needed: \(2, h, w\) int64"),
    "cond rank": ((IMAGE, torch.tensor([0, 1]), IMAGE), ValueError, r"cond must be \(2, h, w\) int64, got"),
    "cond size": (
        (IMAGE, torch.tensor([0, 1]), torch.zeros(2, 3, 3, dtype=torch.int64)),
        ValueError,
        r"cond must have sides that divide the image's \(4, 6\), got \(3, 3\)",
    ),
    "cond code": (
        (IMAGE, torch.tensor([0, 1]), torch.full((2, 2, 3), 5)),
        ValueError,
        r"cond must lie in \[0, 5\), got 5 to 5",
    ),
    "cond floats": ((IMAGE, torch.tensor([0, 1]), torch.zeros(2, 2, 3)), TypeError, "cond must be int64 codes"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    args, kind, message = BAD[case]
    model = small("GatedPixelCNN", levels=4, classes=3, cond_codes=5)
    with pytest.raises(kind, match=message):
        model.log_prob(*args)


def test_conditioning_that_the_model_has_not():
    model = small("PixelCNN", levels=4)
    with pytest.raises(ValueError, match="labels were given, but the model has classes=0"):
        model.log_prob(IMAGE, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="cond was given, but the model has cond_codes=0 and cond_channels=0"):
        model.log_prob(IMAGE, None, IMAGE[:, 0])


def test_code_maps_have_no_channel():
    model = small("GatedPixelCNN", codes=9)
    x = torch.randint(0, 9, (2, 4, 5))
    assert model(x).shape == (2, 1, 9, 4, 5)
    assert torch.equal(model.log_prob(x), model.log_prob(x[:, None]))
    assert model.sample(2, (4, 5)).shape == (2, 4, 5)


def test_bfloat16_weights_leave_the_levels_apart():
    model = GatedPixelCNN(levels=256, channels=8, layers=1, distribution="logistic", mixtures=1)
    with torch.no_grad():
        model.head.out.weight.zero_()
        model.head.out.bias.copy_(torch.tensor([0.0, 0.7, -7.0]))
    every = torch.arange(256)[:, None, None, None]
    with torch.no_grad():
        total = model.bfloat16().log_prob(every).exp().sum()
    assert float(total) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("model", [PixelCNN, GatedPixelCNN, PixelSNAIL, PixelRNN, GPTPrior])
def test_an_unknown_option_is_named(model):
    with pytest.raises(TypeError, match=f"{model.__name__}: got an unexpected argument 'bogus'"):
        model(bogus=1)
