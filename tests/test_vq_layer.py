"""VectorQuantize: against vector-quantize-pytorch, and where that has nothing to say."""

import copy

import pytest
import torch
import torch.nn.functional as F
from vq_helpers import close, follow, pair, peer

from fastgen.nn import GroupedResidualVQ, ResidualVQ, VectorQuantization, VectorQuantize, VectorQuantizer2
from fastgen.nn.vector_quantize import UNOFFERED
from fastgen.ops import nearest_code

OPTIONS = {
    "default": ({}, (4, 50, 32)),
    "vectors": ({}, (40, 32)),
    "straight through": ({"rotation_trick": False}, (4, 50, 32)),
    "cosine": ({"use_cosine_sim": True}, (4, 50, 32)),
    "learned": ({"learnable_codebook": True, "ema_update": False}, (4, 50, 32)),
    "heads": ({"heads": 4, "codebook_dim": 8}, (4, 50, 32)),
    "separate heads": ({"heads": 4, "codebook_dim": 8, "separate_codebook_per_head": True}, (4, 50, 32)),
    "projection": ({"codebook_dim": 8}, (4, 50, 32)),
    "projection and norm": ({"heads": 2, "layernorm_after_project_in": True, "codebook_dim": 32}, (4, 9, 32)),
    "image": ({"accept_image_fmap": True}, (4, 32, 7, 5)),
    "image, heads": ({"accept_image_fmap": True, "heads": 4, "codebook_dim": 8}, (4, 32, 7, 5)),
    "volume": ({"accept_3d_fmap": True}, (2, 32, 3, 4, 5)),
    "channels first": ({"channel_last": False}, (3, 32, 9)),
    "no commitment": ({"commitment_weight": 0.0}, (4, 50, 32)),
    "slow decay": ({"decay": 0.99, "eps": 1e-3}, (4, 50, 32)),
    "manual": ({"manual_ema_update": True}, (4, 50, 32)),
    "frozen": ({"freeze_codebook": True}, (4, 50, 32)),
    "dead codes, none": ({"threshold_ema_dead_code": 1e-6}, (4, 50, 32)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_follows_the_peer(name):
    options, shape = OPTIONS[name]
    follow(*pair(options), shape)


def test_follows_the_peer_with_masks():
    a, b = pair({})
    mask = torch.rand(4, 50) < 0.7
    follow(a, b, (4, 50, 32), mask=mask)
    follow(a, b, (4, 50, 32), lens=torch.tensor([50, 1, 0, 20]))
    a, b = pair({"return_zeros_for_masked_padding": False})
    follow(a, b, (4, 50, 32), mask=mask)


def test_follows_the_peer_with_half_the_precision():
    a, b = pair({"rotation_trick": False})
    x = torch.randn(4, 50, 32).bfloat16()
    for u, v in zip(a(x), b(x), strict=True):
        assert u.dtype == v.dtype
        close(u.float(), v.float(), scale=100)
    quantized, *_ = b(torch.randn(2, 5, 32).half())
    assert quantized.dtype == torch.float16


def test_default_is_the_peers():
    a, b = peer.VectorQuantize(16, 32), VectorQuantize(16, 32)
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
    assert b._codebook.decay == a._codebook.decay
    assert b.eval()(torch.randn(2, 3, 16))[2] == 0


def test_codes_and_outputs_from_indices():
    for options, shape in OPTIONS.values():
        a, b = pair(options)
        a.eval(), b.eval()
        x = torch.randn(shape)
        quantized, indices, _ = b(x)
        if "heads" not in options and "channel_last" not in options:
            close(a.get_codes_from_indices(indices), b.get_codes_from_indices(indices))
        close(b.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"learnable_codebook": True, "ema_update": False}, {"codebook_dim": 8},
        {"codebook_dim": 8, "learnable_codebook": True, "ema_update": False},
    ],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of_x", [True, False])
def test_whose_gradients_are_the_peers(options, training, of_x):
    a, b = pair(options)
    grads = []
    for module in (a.train(training), b.train(training)):
        x = torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(0), requires_grad=of_x)
        quantized, _, loss = module(x)
        total = quantized.square().mean() + loss.sum()
        if total.requires_grad:
            total.backward()
        grads.append({"x": x.grad} | {name: p.grad for name, p in module.named_parameters()})
    for name, grad in grads[0].items():
        assert (grad is None) == (grads[1][name] is None), name
        if grad is not None:
            close(grad, grads[1][name])


def test_encodecs_quantizer_is_not_straight_through_in_evaluation():
    layer, x = VectorQuantization(8, 16, codebook_dim=3).eval(), torch.randn(2, 8, 5, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad is None
    assert layer.project_in.weight.grad is None
    assert layer.project_out.weight.grad is not None


def test_gradient_accumulation_updates_once():
    torch.manual_seed(0)
    b = VectorQuantize(8, 16)
    whole = copy.deepcopy(b)
    x = torch.randn(4, 30, 8)
    before = {k: v.clone() for k, v in b.state_dict().items()}
    for part in x[:3]:
        b(part[None], accum_ema_update=True)
        for key, value in b.state_dict().items():
            assert torch.equal(value, before[key])
    b(x[3:])
    whole(x)
    for key, value in b.state_dict().items():
        close(value, whole.state_dict()[key])


def test_update_indices_is_a_call_in_training():
    b = VectorQuantize(8, 16)
    other = copy.deepcopy(b)
    x, mask = torch.randn(3, 20, 8), torch.rand(3, 20) < 0.5
    indices = nearest_code(x.flatten(0, 1), b.codebook)[0].reshape(3, 20)
    b(x, mask=mask)
    other.update_indices(x, indices, mask)
    for key, value in b.state_dict().items():
        close(value, other.state_dict()[key])


def test_kmeans_finds_the_clusters():
    centres = 20 * torch.randn(8, 5)
    x = (centres[:, None] + 0.1 * torch.randn(8, 50, 5)).flatten(0, 1)[torch.randperm(400)]
    for options in ({}, {"use_cosine_sim": True}):
        torch.manual_seed(3)
        b = VectorQuantize(5, 32, kmeans_init=True, **options)
        assert not bool(b._codebook.initted)
        loss = b(x[None])[2]
        assert bool(b._codebook.initted)
        assert float(loss) < 0.05
        again = VectorQuantize(5, 32, kmeans_init=True, **options)
        again.load_state_dict(b.state_dict())
        assert torch.equal(again.eval()(x[None])[1], b.eval()(x[None])[1])
    few = VectorQuantize(5, 32, kmeans_init=True)
    few(x[None, :3])  # fewer vectors than codes
    assert bool(few._codebook.initted)
    none = VectorQuantize(5, 32, kmeans_init=True)
    none(x[None, :0])
    assert not bool(none._codebook.initted)


def test_dead_codes_are_replaced_by_vectors_of_the_batch():
    b = VectorQuantize(4, 16, threshold_ema_dead_code=0.5, decay=0.5)
    with torch.no_grad():
        b._codebook.embed[0, 8:] = 1e3  # far from everything
    x = torch.randn(1, 200, 4)
    for _ in range(3):
        b(x)
    moved = b.codebook[8:]
    assert float(torch.cdist(moved, x[0]).min(1).values.max()) < 2
    assert len(moved.unique(dim=0)) == 8
    mask = torch.zeros(1, 200, dtype=torch.bool)
    mask[:, :3] = True  # three candidates only
    c = VectorQuantize(4, 16, threshold_ema_dead_code=1e9)
    before = c.codebook.clone()
    c(x, mask=mask)
    rows = (torch.cdist(c.codebook, x[0, :3]) < 1e-6).any(1)
    assert int(rows.sum()) == 3
    assert before.shape == c.codebook.shape


def test_sampled_codes_follow_the_temperature():
    b = VectorQuantize(2, 4, stochastic_sample_codes=True, sample_codebook_temp=1.0, rotation_trick=False)
    b.codebook = torch.tensor([[0.0, 0], [1, 0], [0, 2], [3, 3]])
    x = torch.zeros(1, 20000, 2)
    probabilities = F.softmax(-b.codebook.norm(dim=1), 0)
    counts = torch.bincount(b(x, freeze_codebook=True)[1].flatten(), minlength=4) / 20000
    torch.testing.assert_close(counts, probabilities, atol=0.02, rtol=0)
    assert set(b(x, sample_codebook_temp=0.0, freeze_codebook=True)[1].unique().tolist()) == {0}
    assert set(b.eval()(x)[1].unique().tolist()) == {0}


def test_compile_fullgraph_and_no_recompilation():
    torch._dynamo.reset()
    b = VectorQuantize(8, 16)
    plain = copy.deepcopy(b)
    compiled = torch.compile(b, fullgraph=True, dynamic=True)
    for rows in (20, 31, 7):
        x = torch.randn(2, rows, 8).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=rows != 20):
            got = compiled(x)
        want = plain(x)
        close(got[0], want[0])
        close(torch.autograd.grad(got[0].sum() + got[2], x)[0], torch.autograd.grad(want[0].sum() + want[2], x)[0])
    for key, value in plain.state_dict().items():
        close(value, b.state_dict()[key])
    torch._dynamo.reset()
    replacing = VectorQuantize(8, 16, threshold_ema_dead_code=1e9)
    torch.compile(replacing, fullgraph=True)(torch.full((2, 20, 8), 3.0))
    assert bool((replacing.codebook == 3).all())


def test_modules_are_pickled_copied_and_compiled_after_loading(tmp_path):
    for module in (VectorQuantize(8, 16, kmeans_init=True), ResidualVQ(dim=8, num_quantizers=2, codebook_size=4)):
        x = torch.randn(2, 30, 8)
        module(x)
        torch.save(module, tmp_path / "module.pt")
        for other in (torch.load(tmp_path / "module.pt", weights_only=False), copy.deepcopy(module)):
            close(other.eval()(x)[0], module.eval()(x)[0])
    fresh = VectorQuantize(8, 16, kmeans_init=True)
    fresh(100 * torch.randn(1, 40, 8), accum_ema_update=True)
    trained = VectorQuantize(8, 16)
    fresh.load_state_dict(trained.state_dict())  # forgets what it had put off
    torch._dynamo.reset()
    torch.compile(fresh, fullgraph=True)(x)
    trained(x)
    close(fresh.codebook, trained.codebook)


def test_temperature_needs_stochastic_codes():
    a, b = pair({})
    x = torch.randn(2, 40, 32)
    assert torch.equal(a(x, sample_codebook_temp=1.0)[1], b(x, sample_codebook_temp=1.0)[1])


def test_low_precision_modules_train():
    for dtype in (torch.bfloat16, torch.float16):
        b = VectorQuantize(8, 16, kmeans_init=True).to(dtype)
        assert b.codebook.dtype == torch.float32
        quantized, _, loss = b(torch.randn(2, 30, 8, dtype=dtype))
        assert quantized.dtype == dtype
        assert bool(torch.isfinite(loss))


def test_masked_indices_can_be_decoded():
    b = VectorQuantize(8, 16)
    mask = torch.tensor([[True, False, True]])
    quantized, indices, _ = b.eval()(torch.randn(1, 3, 8), mask=mask)
    close(b.get_output_from_indices(indices), quantized)
    residual = ResidualVQ(dim=8, num_quantizers=1, codebook_size=16)
    for decode, wrong in (
        (b.get_output_from_indices, torch.full((1, 3), 16)),
        (VectorQuantization(8, 16, kmeans_init=False).decode, torch.full((1, 3), 16)),
        (residual.get_output_from_indices, torch.full((1, 3, 1), 16)),
    ):
        with pytest.raises(ValueError, match=r"indices must lie in \[-1, 16\), got 16 to 16"):
            decode(wrong)


def test_nothing_seen_and_nothing_kept():
    b = VectorQuantize(8, 16, decay=0.0)
    b(torch.randn(0, 4, 8))
    assert bool(torch.isfinite(b.codebook).all())


def test_no_value_is_read_in_training():
    """Nothing in a step asks a tensor for its value, which on a GPU would make the host wait."""
    b = VectorQuantize(8, 16, threshold_ema_dead_code=1).to("meta")
    x = torch.zeros(2, 20, 8, device="meta", requires_grad=True)
    quantized, indices, loss = b(x, mask=torch.ones(2, 20, dtype=torch.bool, device="meta"))
    (quantized.sum() + loss).backward()
    assert indices.shape == (2, 20)


@pytest.mark.parametrize("name", sorted(UNOFFERED))
def test_options_that_are_not_offered(name):
    VectorQuantize(8, 16, **{name: UNOFFERED[name]})
    with pytest.raises(NotImplementedError, match=name):
        VectorQuantize(8, 16, **{name: "something"})


def test_options_of_calls_that_are_not_offered():
    b, x = VectorQuantize(8, 16), torch.randn(2, 5, 8)
    with pytest.raises(NotImplementedError, match="topk"):
        b(x, topk=3)
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(b.eval()(x, None, mask)[1], b(x, mask=mask)[1])  # the peer's order
    with pytest.raises(TypeError, match="unexpected option 'codebok_dim'"):
        VectorQuantize(8, 16, codebok_dim=3)
    with pytest.raises(NotImplementedError, match="beam_size"):
        ResidualVQ(dim=8, num_quantizers=2, codebook_size=16, beam_size=3)
    with pytest.raises(NotImplementedError, match="remap"):
        VectorQuantizer2(8, 4, 0.25, remap="file")
    *_, parts = b(x, return_loss_breakdown=True)
    assert float(parts.commitment) > 0


BAD = {
    "heads must divide dim": lambda: VectorQuantize(8, 16, heads=3),
    "codebook_size must be an integer >= 1": lambda: VectorQuantize(8, 0),
    "decay must lie in": lambda: VectorQuantize(8, 16, decay=1.1),
    "eps must be finite": lambda: VectorQuantize(8, 16, eps=0),
    "commitment_weight must be": lambda: VectorQuantize(8, 16, commitment_weight=-1.0),
    "excludes ema_update": lambda: VectorQuantize(8, 16, learnable_codebook=True, ema_update=True),
    "x must have shape": lambda: VectorQuantize(8, 16)(torch.zeros(2, 3, 7)),
    "with D = 8, got": lambda: VectorQuantize(8, 16, accept_image_fmap=True)(torch.zeros(2, 3, 8)),
    "x must be floating point": lambda: VectorQuantize(8, 16)(torch.zeros(2, 3, 8, dtype=torch.int64)),
    "x is on meta": lambda: VectorQuantize(8, 16)(torch.zeros(2, 3, 8, device="meta")),
    "mask must be bool": lambda: VectorQuantize(8, 16)(torch.zeros(2, 3, 8), mask=torch.ones(2, 4, dtype=torch.bool)),
    "lens must be integers": lambda: VectorQuantize(8, 16)(torch.zeros(2, 3, 8), lens=torch.ones(3, dtype=torch.int64)),
    "give mask or lens": lambda: VectorQuantize(8, 16)(
        torch.zeros(2, 3, 8), mask=torch.ones(2, 3, dtype=torch.bool), lens=torch.ones(2, dtype=torch.int64)
    ),
    "x must be finite": lambda: VectorQuantize(8, 16)(torch.full((2, 3, 8), float("nan"))),
    "size mismatch for _codebook.embed": lambda: VectorQuantize(8, 16).load_state_dict(
        VectorQuantize(8, 17).state_dict()
    ),
    "groups must divide dim": lambda: GroupedResidualVQ(dim=8, groups=3, num_quantizers=2, codebook_size=4),
    "give num_quantizers": lambda: ResidualVQ(dim=8, codebook_size=4),
    "at most num_quantizers": lambda: ResidualVQ(dim=8, num_quantizers=2, codebook_size=4).get_codes_from_indices(
        torch.zeros(1, 2, 3, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        BAD[message]()


def test_nothing_is_half_done_by_bad_input():
    b = VectorQuantize(8, 16)
    before = {k: v.clone() for k, v in b.state_dict().items()}
    with pytest.raises(ValueError, match="x must be finite"):
        b(torch.full((2, 3, 8), float("inf")))
    for key, value in b.state_dict().items():
        assert torch.equal(value, before[key])


def test_empty_batches():
    for training in (True, False):
        b = VectorQuantize(8, 16, threshold_ema_dead_code=1).train(training)
        for shape in ((0, 8), (0, 5, 8), (3, 0, 8)):
            x = torch.zeros(shape, requires_grad=True)
            quantized, indices, loss = b(x)
            assert quantized.shape == shape
            assert indices.shape == shape[:-1]
            (quantized.sum() + loss).backward() if training else None
            assert float(loss) == 0


def test_outputs_from_indices_after_a_cast():
    """Where features are mapped, the codebook's float32 meets weights of another dtype."""
    x = torch.randn(2, 6, 8, dtype=torch.bfloat16)
    for layer in (
        VectorQuantize(8, 16, codebook_dim=3),
        ResidualVQ(dim=8, codebook_size=16, num_quantizers=2, codebook_dim=3),
    ):
        layer.bfloat16().eval()
        quantized, indices = layer(x)[:2]
        assert quantized.dtype == torch.bfloat16
        torch.testing.assert_close(layer.get_output_from_indices(indices), quantized, atol=0.02, rtol=0.02)
    layer = VectorQuantization(8, 16, codebook_dim=3).bfloat16().eval()
    assert layer.decode(layer.encode(x.mT)).dtype == torch.bfloat16
