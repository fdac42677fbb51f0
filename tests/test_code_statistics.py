"""code_statistics and update_codebook_: against the reference, deterministic, whatever the number of threads."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import DTYPES, EXAMPLES, KERNELS, cpu_only

from fastgen.ops import code_statistics, update_codebook_
from fastgen.ops.code_statistics import code_statistics_reference

pytestmark = pytest.mark.on_device


def check(x, indices, num_codes):
    counts, sums = code_statistics(x, indices, num_codes, backend=KERNELS)
    exact_counts, exact = code_statistics_reference(x.double(), indices, num_codes)
    assert counts.dtype == sums.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert torch.equal(counts.double(), exact_counts)
    size, _ = code_statistics_reference(x.double().abs(), indices, num_codes)[1].max(1, keepdim=True)
    unit = 2**-53 if x.dtype == torch.float64 else 2**-24
    assert bool(((sums.double() - exact).abs() <= 100 * unit * (size + 1e-30)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(0, 1, 1), (1, 1, 1), (7, 3, 5), (1000, 33, 17), (300, 1000, 8), (20000, 2, 3)], ids=str
)
def test_matches_reference(size, dtype, ran):
    n, k, d = size
    indices = torch.randint(-1, k, (n,))
    with ran("code_statistics", KERNELS):
        check(torch.randn(n, d).to(dtype), indices, k)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(n=st.integers(0, 400), k=st.integers(1, 50), d=st.integers(1, 40), seed=st.integers(0, 99))
def test_matches_reference_anywhere(n, k, d, seed):
    torch.manual_seed(seed)
    check(torch.randn(n, d) + 10, torch.randint(-1, k, (n,)), k)


def test_all_rows_of_one_code_lose_no_digits():
    x = torch.full((100000, 3), 0.1)
    _, sums = code_statistics(x, torch.zeros(100000, dtype=torch.int64), 4, backend=KERNELS)
    assert float((sums[0].double() / (x[0].double() * 100000) - 1).abs().max()) < 1e-6


def test_threads_and_strides_do_not_change_a_bit():
    x, indices = torch.randn(5000, 19), torch.randint(-1, 37, (5000,))
    plain = code_statistics(x, indices, 37, backend=KERNELS)
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for other in (x, x.T.contiguous().T, torch.stack([x, x], 1)[:, 1]):
            for a, b in zip(plain, code_statistics(other, indices, 37, backend=KERNELS), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("which", [KERNELS, "reference"])
@pytest.mark.parametrize("cosine", [False, True])
def test_update_matches_the_formula(which, cosine):
    k, d, decay, eps = 9, 5, 0.9, 1e-5
    size, average, counts, sums = torch.rand(k) + 1, torch.randn(k, d), torch.rand(k), torch.randn(k, d)
    embed = torch.full((k, d), float("nan"))
    expected_size = decay * size.double() + (1 - decay) * counts
    expected_average = decay * average.double() + (1 - decay) * sums
    n = expected_size.sum()
    expected = expected_average / (n * (expected_size + eps) / (n + k * eps))[:, None]
    if cosine:
        expected = expected / expected.norm(dim=1, keepdim=True)
    update_codebook_(size, average, embed, counts, sums, decay=decay, eps=eps, cosine=cosine, backend=which)
    torch.testing.assert_close(size.double(), expected_size, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(average.double(), expected_average, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(embed.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("which", [KERNELS, "reference"])
def test_codes_stay_while_nothing_has_been_seen(which):
    size, average, embed = torch.ones(3), torch.randn(3, 2), torch.randn(3, 2)
    before = embed.clone()
    update_codebook_(size, average, embed, torch.zeros(3), torch.zeros(3, 2), decay=0.0, backend=which)
    assert torch.equal(embed, before)
    assert float(size.sum()) == 0


def test_opcheck_and_compile():
    x, indices = torch.randn(30, 4), torch.randint(5, (30,))
    torch.library.opcheck(torch.ops.fastgen.code_statistics.default, (x, None, indices, 5))
    counts, sums = code_statistics(x, indices, 5)
    state = torch.rand(5) + 1, torch.randn(5, 4), torch.randn(5, 4)
    torch.library.opcheck(torch.ops.fastgen.update_codebook.default, (*state, counts, sums, 0.9, 1e-5, False))
    copies = [t.clone() for t in state]
    torch._dynamo.reset()
    torch.compile(update_codebook_, fullgraph=True)(*copies, counts, sums, decay=0.9)
    update_codebook_(*state, counts, sums, decay=0.9)
    for a, b in zip(copies, state, strict=True):
        torch.testing.assert_close(a, b)


BAD = {
    "indices must be int64": (torch.zeros(3, 2), torch.zeros(3), 4),
    "indices must lie in": (torch.zeros(3, 2), torch.tensor([0, 4, 1]), 4),
    "num_codes must be an integer": (torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 0),
    "x must have shape": (torch.zeros(3), torch.zeros(3, dtype=torch.int64), 4),
    "x must be float32": (torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64), 4),
}


@cpu_only("arguments are checked alike everywhere")
@pytest.mark.parametrize("which", ["cpu", "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, which):
    with pytest.raises((TypeError, ValueError), match=message):
        code_statistics(*BAD[message], backend=which)


def test_bad_update():
    good = (torch.ones(3), torch.ones(3, 2), torch.ones(3, 2), torch.ones(3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="decay must lie in"):
        update_codebook_(*good, decay=1.5)
    with pytest.raises(ValueError, match="decay must lie in"):
        update_codebook_(*good, decay="a")
    with pytest.raises(ValueError, match="eps must be"):
        update_codebook_(*good, decay=0.5, eps=0.0)
    with pytest.raises(ValueError, match="counts must have shape"):
        update_codebook_(*good[:3], torch.ones(4), good[4], decay=0.5)
    with pytest.raises(ValueError, match="embed_avg must be contiguous"):
        update_codebook_(good[0], torch.ones(2, 3).T, *good[2:], decay=0.5)
    with pytest.raises(TypeError, match="embed must be float32"):
        update_codebook_(*(t.bfloat16() for t in good), decay=0.5)


def test_rows_without_coordinates_are_counted():
    indices = torch.tensor([2, 0, 2])
    counts, sums = code_statistics(torch.zeros(3, 0), indices, 4, backend=KERNELS)
    assert counts.tolist() == [1, 0, 2, 0]
    assert sums.shape == (4, 0)
