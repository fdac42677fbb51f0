"""The log-likelihood under a perceptron's logits: sizes that fill no vector, large logits, gradients, bad input."""

import itertools

import pytest
import torch
from torch import nn

from fastgen.models import VAE
from fastgen.ops import bernoulli_perceptron
from fastgen.ops.bernoulli_perceptron import bernoulli_perceptron_reference

BACKENDS = ["cpu", "reference"]


def arguments(sizes, rows, batch, scale=1.0):
    torch.manual_seed(0)
    weights = [torch.randn(o, i) * scale / i**0.5 for i, o in itertools.pairwise(sizes)]
    biases = [torch.randn(o) for o in sizes[1:]]
    return torch.randn(rows, sizes[0]), torch.randint(2, (batch, sizes[-1])).float(), weights, biases


def exact(z, x, weights, biases):
    doubles = ([t.double() for t in tensors] for tensors in (weights, biases))
    return bernoulli_perceptron_reference(z.double(), x.double(), *doubles)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("sizes", "rows", "batch"),
    [([3, 5], 1, 1), ([2, 1], 6, 3), ([40, 50, 31, 78], 300, 100), ([7, 33], 65, 13), ([4, 9, 2500], 58, 29)],
    ids=str,
)
def test_follows_float64(sizes, rows, batch, backend, need, ran):
    need("bernoulli_perceptron", backend)
    given = arguments(sizes, rows, batch)
    with torch.no_grad(), ran("bernoulli_perceptron", backend):
        out = bernoulli_perceptron(*given, backend=backend)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact(*given), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend, need):
    need("bernoulli_perceptron", backend)
    given = arguments([4, 8, 40], 30, 10, scale=100.0)
    expected = exact(*given)
    assert expected.min() < -1e4
    out = bernoulli_perceptron(*given, backend=backend)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_stays_one(backend, need):
    need("bernoulli_perceptron", backend)
    z, *rest = arguments([4, 8, 40], 30, 10)
    z[7, 2] = float("nan")
    wrong = bernoulli_perceptron(z, *rest, backend=backend).isnan()
    assert wrong.nonzero().tolist() == [[7]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_other_dtypes_and_gradients(backend, need):
    need("bernoulli_perceptron", backend)
    z, x, weights, biases = given = arguments([4, 8, 5], 6, 3)
    assert bernoulli_perceptron(z[:0], x, weights, biases, backend=backend).shape == (0,)
    half = [z.bfloat16(), x.bfloat16(), [w.bfloat16() for w in weights], [b.bfloat16() for b in biases]]
    out = bernoulli_perceptron(*half, backend=backend)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact(*given), rtol=0.05, atol=0.1)
    z = z.double().requires_grad_()
    parameters = [t.double().requires_grad_() for t in (*weights, *biases)]

    def of(z, *p):
        return bernoulli_perceptron(z, x.double(), p[:2], p[2:], backend=backend)

    assert of(z, *parameters).dtype == torch.float64
    torch.testing.assert_close(of(z, *parameters), exact(*given))
    assert torch.autograd.gradcheck(of, (z, *parameters))


def test_compiles_and_exports(need):
    need("bernoulli_perceptron", "cpu")
    given = arguments([4, 8, 5], 6, 3)
    expected = bernoulli_perceptron(*given)
    torch._dynamo.reset()
    compiled = torch.compile(bernoulli_perceptron, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(*given), expected)

    class Module(nn.Module):
        def forward(self, z, x, weights, biases):
            return bernoulli_perceptron(z, x, weights, biases)

    exported = torch.export.export(Module(), given)
    assert any("bernoulli_perceptron" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*given), expected)


def test_opcheck_and_strides(need):
    need("bernoulli_perceptron", "cpu")
    z, x, weights, biases = arguments([4, 8, 5], 6, 3)
    torch.library.opcheck(torch.ops.fastgen.bernoulli_perceptron.default, (z, x, weights, biases))
    strided = bernoulli_perceptron(z.mT.contiguous().mT, x, [w.mT.contiguous().mT for w in weights], biases)
    assert torch.equal(strided, bernoulli_perceptron(z, x, weights, biases))


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_every_instruction_set(isa, run_under):
    run_under(isa, "follows_float64 or large or not_a_number", "bernoulli_perceptron")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"z": torch.randn(7, 4)}, ValueError, "z must have a multiple of the 3 rows of x, got 7"),
        ({"z": torch.randn(6, 5)}, ValueError, r"weights\[0\] must have shape \('any', 5\), got \(8, 4\)"),
        ({"x": torch.ones(3, 6)}, ValueError, r"x must have shape \('any', 5\), got \(3, 6\)"),
        ({"x": torch.ones(3, 5).long()}, TypeError, "x must be float32, bfloat16 or float64, got torch.int64"),
        ({"biases": [torch.randn(8)]}, ValueError, "weights must be as many as biases, at least 1, got 2 and 1"),
    ],
)
def test_bad_input(change, error, text):
    z, x, weights, biases = arguments([4, 8, 5], 6, 3)
    with pytest.raises(error, match=text):
        bernoulli_perceptron(**{"z": z, "x": x, "weights": weights, "biases": biases} | change)


@pytest.mark.parametrize("custom", [False, True])
def test_a_vae_uses_it_where_it_may(custom, need, ran):
    need("bernoulli_perceptron", "cpu")
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 12)) if custom else None
    model = VAE(12, latent=2, hidden=20, decoder=decoder)
    x = torch.randint(2, (5, 12))
    with ran("bernoulli_perceptron", "reference" if custom else "cpu"):
        estimate = model.importance_log_prob(x, 300, chunk=7, generator=torch.Generator().manual_seed(0))
    model.double()
    slow = model.importance_log_prob(x, 30_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(estimate.double(), slow, atol=0.2, rtol=0)
