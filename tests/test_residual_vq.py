"""ResidualVQ and GroupedResidualVQ against vector-quantize-pytorch, and the quantizers of two other projects."""

import pytest
import torch
from vq_helpers import close, follow, peer

from fastgen.nn import GroupedResidualVQ, ResidualVQ, VectorQuantization, VectorQuantizer2

RESIDUAL = {
    "default": ({"num_quantizers": 3, "codebook_size": 64}, (4, 50, 32)),
    "shared": ({"num_quantizers": 3, "codebook_size": 64, "shared_codebook": True}, (4, 50, 32)),
    "sizes": ({"codebook_size": (64, 32, 16)}, (4, 50, 32)),
    "projection": ({"num_quantizers": 2, "codebook_size": 64, "codebook_dim": 8}, (4, 50, 32)),
    "gradient share": ({"num_quantizers": 2, "codebook_size": 64, "quant_grad_frac": 0.5}, (4, 50, 32)),
    "cosine": ({"num_quantizers": 2, "codebook_size": 64, "use_cosine_sim": True}, (4, 50, 32)),
    "groups": ({"num_quantizers": 2, "codebook_size": 64, "groups": 4}, (4, 50, 32)),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_follows_the_peer(name):
    options, shape = RESIDUAL[name]
    grouped = "groups" in options
    theirs, ours = (
        (peer.GroupedResidualVQ, GroupedResidualVQ) if grouped else (peer.ResidualVQ, ResidualVQ)
    )  # fmt: skip
    a, b = theirs(dim=32, **options), ours(dim=32, **options)
    b.load_state_dict(a.state_dict(), strict=True)
    follow(a, b, shape)
    a.eval(), b.eval()
    x = torch.randn(shape)
    indices = b(x)[1]
    close(a.get_output_from_indices(indices), b.get_output_from_indices(indices))
    close(b(x)[0], b.get_output_from_indices(indices))


def test_residual_of_images_is_that_of_their_pixels():
    b = ResidualVQ(dim=8, num_quantizers=2, codebook_size=16)
    image = ResidualVQ(dim=8, num_quantizers=2, codebook_size=16, accept_image_fmap=True)
    image.load_state_dict(b.state_dict())
    x = torch.randn(2, 8, 3, 5)
    q, indices, losses = image(x)
    plain, plain_indices, plain_losses = b(x.flatten(2).mT)
    assert indices.shape == (2, 3, 5, 2)
    close(q.flatten(2).mT, plain)
    assert torch.equal(indices.flatten(1, 2), plain_indices)
    close(losses, plain_losses)
    close(image.eval().get_output_from_indices(image(x)[1]), image(x)[0])


def test_quantize_dropout():
    b = ResidualVQ(
        dim=8, num_quantizers=8, codebook_size=16, quantize_dropout=True, quantize_dropout_cutoff_index=2,
        quantize_dropout_multiple_of=2,
    )  # fmt: skip
    x = torch.randn(2, 9, 8)
    used = set()
    for seed in range(40):
        _, indices, losses = b(x, rand_quantize_dropout_fixed_seed=seed)
        number = int((indices[0, 0] >= 0).sum())
        assert bool((indices[..., :number] >= 0).all())
        assert bool((indices[..., number:] == -1).all())
        assert bool((losses[number:] == 0).all())
        used.add(number)
    assert used == {4, 6, 8}
    assert bool((b.eval()(x)[1] >= 0).all())
    coarse = b(x)[1][..., :3]
    close(b.get_output_from_indices(coarse), b.get_codes_from_indices(coarse).sum(0))


def test_residual_of_vectors_and_dropout_are_the_peers():
    a, b = peer.ResidualVQ(dim=8, num_quantizers=4, codebook_size=16, quantize_dropout=True), None
    b = ResidualVQ(dim=8, num_quantizers=4, codebook_size=16, quantize_dropout=True)
    b.load_state_dict(a.state_dict())
    for seed in range(6):
        x = torch.randn(2, 9, 8)
        options = {"rand_quantize_dropout_fixed_seed": seed, "freeze_codebook": True}
        assert torch.equal(a(x, **options)[1], b(x, **options)[1])
    a.eval(), b.eval()
    for u, v in zip(a(x[0]), b(x[0]), strict=True):
        close(u, v)


def test_taming_quantizer():
    v = VectorQuantizer2(16, 4, beta=0.3)
    assert list(v.state_dict()) == ["embedding.weight"]
    z = torch.randn(2, 4, 3, 5).requires_grad_()
    quantized, loss, (perplexity, encodings, indices) = v(z)
    assert perplexity is None
    assert encodings is None
    assert indices.shape == (30,)
    codes = v.get_codebook_entry(indices, (2, 3, 5, 4))
    close(quantized, codes)
    expected = (codes.detach() - z).square().mean() + 0.3 * (codes - z.detach()).square().mean()
    close(loss, expected)
    params = (z, v.embedding.weight)
    for a, b in zip(torch.autograd.grad(loss, params), torch.autograd.grad(expected, params), strict=True):
        close(a, b)
    right = VectorQuantizer2(16, 4, beta=0.3, legacy=False, sane_index_shape=True)
    right.load_state_dict(v.state_dict())
    _, other, (_, _, indices) = right(z)
    assert indices.shape == (2, 3, 5)
    close(other, 0.3 * (codes.detach() - z).square().mean() + (codes - z.detach()).square().mean())


def test_encodec_quantizer():
    v = VectorQuantization(6, 16, kmeans_iters=5)
    shapes = {k: tuple(t.shape) for k, t in v.state_dict().items()}
    book = "_codebook."
    assert shapes == {
        book + "inited": (1,), book + "cluster_size": (16,), book + "embed": (16, 6), book + "embed_avg": (16, 6),
    }  # fmt: skip
    x = torch.randn(2, 6, 50).requires_grad_()
    quantized, indices, loss = v(x)
    assert quantized.shape == (2, 6, 50)
    assert indices.shape == (2, 50)
    assert loss.shape == (1,)
    (grad,) = torch.autograd.grad(quantized.sum(), x)
    assert torch.equal(grad, torch.ones_like(grad))
    other = VectorQuantization(6, 16)
    other.load_state_dict(v.state_dict(), strict=True)
    other.eval(), v.eval()
    assert torch.equal(other(x)[1], v(x)[1])
    assert torch.equal(v.decode(v.encode(x)), v(x)[0])
    assert float(v(x)[2]) == 0
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({}, strict=True)
