"""nearest_code: the exact answer for every kind of data, dtype, metric and instruction set."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import KERNELS, cpu_only

from fastgen import backend
from fastgen.ops import nearest_code
from fastgen.ops.nearest_code import nearest_code_reference, no_direction, unit

pytestmark = pytest.mark.on_device
exact_only = cpu_only("the others owe float32's answer")

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
METRICS = ("euclidean", "cosine")
SIZES = [  # rows, codes, features
    (1, 1, 1), (7, 3, 1), (31, 33, 2), (33, 31, 7), (13, 100, 8), (500, 1000, 16), (97, 64, 17), (300, 257, 64),
    (50, 40, 300), (20, 70, 1024), (1000, 5, 3),
]  # fmt: skip


def gaussian(n, k, d):
    return torch.randn(n, d), torch.randn(k, d)


def data(kind, n, k, d):
    x, c = gaussian(n, k, d)
    if kind == "uniform":
        return torch.rand(n, d), torch.rand(k, d)
    if kind == "sphere":
        return unit(x), unit(c)
    if kind == "offset":
        return x + 20, c + 20
    if kind == "far offset":
        return x + 3e4, c + 3e4
    if kind == "apart":
        return x + 100, c
    if kind == "clusters":  # two, far apart
        sides = torch.randint(2, (n + k, 1)) * 2e3 - 1e3
        return x + sides[:n], c + sides[n:]
    if kind == "outliers":  # a few codes and rows a thousand times the size of the others
        x[::7] *= 1e3
        c[::5] *= 1e3
        return x, c
    if kind == "near codes":
        return c[torch.randint(k, (n,))] + 1e-3 * x, c
    if kind == "on codes":
        return c[torch.randint(k, (n,))].clone(), c
    if kind == "tiny":
        return 1e-25 * x, 1e-25 * c
    if kind == "subnormal":
        return 1e-41 * x, 1e-41 * c
    if kind == "some subnormal":
        x[::3] *= 1e-41
        c[::2] *= 1e-41
        return x, c
    if kind == "huge":
        return 1e16 * x, 1e16 * c
    if kind == "duplicates":
        return x, c[torch.randint(max(1, k // 4), (k,))]
    if kind == "grid":  # many exact ties
        return torch.randint(-1, 2, (n, d)).float(), torch.randint(-1, 2, (k, d)).float()
    if kind == "one dimension dominates":
        scale = torch.ones(d)
        scale[0] = 1e4
        return x * scale, c * scale
    if kind == "zeros":
        return x, torch.zeros(k, d)
    assert kind == "gaussian"
    return x, c


KINDS = (
    "gaussian", "uniform", "sphere", "offset", "far offset", "apart", "clusters", "outliers", "near codes", "on codes",
    "tiny", "subnormal", "some subnormal", "huge", "duplicates", "grid", "one dimension dominates", "zeros",
)  # fmt: skip


def exact_distances(x, codebook, metric):
    """(N, K) float64, from differences."""
    x, codebook = x.double(), codebook.double()
    if not len(x):
        return x.new_zeros(0, len(codebook))
    if metric == "euclidean":
        return torch.stack([(row - codebook).square().sum(1) for row in x])
    distances = torch.stack([(row - unit(codebook)).square().sum(1) for row in unit(x)])
    return torch.where(no_direction(x) | no_direction(codebook)[:, 0], 2.0, distances)


def check(x, codebook, metric="euclidean", which="cpu"):
    """The chosen code is the nearest in float64, the first of equals, and its distance is right."""
    index, distance = nearest_code(x, codebook, metric=metric, backend=which)
    exact = exact_distances(x, codebook, metric)
    assert index.dtype == torch.int64
    assert index.shape == distance.shape == x.shape[:1]
    got = exact.gather(1, index[:, None])[:, 0]
    best = exact.min(1).values
    # what float64 itself may be wrong by, in sums of D squares of differences
    slack = 1e-15 * x.shape[1] * best
    if metric == "cosine":
        slack = slack + 1e-14
    assert bool((got <= best + slack).all()), f"{int((got > best + slack).sum())} wrong codes"
    if metric == "euclidean":
        first = (exact <= best[:, None]).int().argmax(1)
        tied = (exact <= (best + slack)[:, None]).sum(1) > 1
        assert torch.equal(index[~tied], first[~tied])
    unit_error = 2**-24 if x.dtype != torch.float64 else 2**-53
    error = (distance.double() - got).abs()
    tolerance = (x.shape[1] + 8) * unit_error * got + 1e-38
    if metric == "cosine":
        tolerance = tolerance + 32 * unit_error * got.sqrt() + 64 * unit_error**2
    assert bool((error <= tolerance).all()), f"distances wrong by {float((error / (got + 1e-300)).max()):.1e}"


@exact_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_exact(size, metric, dtype, ran):
    x, codebook = gaussian(*size)
    with ran("nearest_code", "cpu"):
        check(x.to(dtype), codebook.to(dtype), metric)


@exact_only
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_for_all_data(kind, metric):
    for n, k, d in ((300, 200, 8), (300, 200, 64), (100, 130, 200)):
        x, codebook = data(kind, n, k, d)
        check(x, codebook, metric)
        check(x.double(), codebook.double(), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_answer(kind, metric, ran):
    """What every backend's kernel owes: none nearer by more than float32 rounds, the lowest index of equal codes."""
    for n, k, d in ((1, 1, 1), (40, 70, 8), (33, 90, 20), (9, 130, 150)):
        x, codebook = data(kind, n, k, d)
        with ran("nearest_code", KERNELS):
            index, distance = nearest_code(x, codebook, metric=metric, backend=KERNELS)
        exact = exact_distances(x, codebook, metric)
        got, best = exact.gather(1, index[:, None])[:, 0], exact.min(1).values
        rounding = (d + 8) * 2.0**-24 * got + 1e-37
        if metric == "cosine":
            rounding = rounding + 2.0**-19 * got.sqrt() + 2.0**-42
        assert bool((got <= best + 2 * rounding).all()), f"{int((got > best + 2 * rounding).sum())} wrong codes"
        assert bool(((distance.double() - got).abs() <= rounding).all())
        for row, code in enumerate(index):
            same = (codebook[: int(code)] == codebook[code]).all(1)
            assert not bool(same.any()), f"row {row}: code {int(code)} equals an earlier one"


def test_float32_answer_among_codes_that_rounding_cannot_tell_apart():
    """One, some or all lanes of a scan hold more than one candidate, or more lanes do than are kept."""
    base = torch.randn(20)
    x, near = base + torch.randn(12, 20), base + 1e-3 * torch.randn(300, 20)
    far = torch.randn(300, 20) + 5
    in_a_lane, few = far.clone(), far.clone()
    in_a_lane[5::64] = near[5::64]
    few[::100] = near[::100]
    for codebook in (near, in_a_lane, few, torch.cat([few, far.repeat(7, 1), few])):
        index, distance = nearest_code(x, codebook, backend=KERNELS)
        exact = exact_distances(x, codebook, "euclidean")
        got = exact.gather(1, index[:, None])[:, 0]
        assert bool((got <= exact.min(1).values + 60 * 2.0**-24 * got).all())
        torch.testing.assert_close(distance.double(), got, rtol=1e-5, atol=0)
        if len(codebook) > 300:
            assert int(index.max()) < 300


def test_float32_answer_beside_a_code_far_away():
    x, codebook = gaussian(30, 200, 16)
    codebook[7] *= 1e6
    index, _ = nearest_code(x, codebook, backend=KERNELS)
    assert torch.equal(index, exact_distances(x, codebook, "euclidean").argmin(1))


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_float32_answer_or_one_that_a_lower_precision_may_take_for_it(precision):
    x, codebook = gaussian(40, 150, 24)
    for metric in METRICS:
        index, distance = nearest_code(x, codebook, metric=metric, precision=precision, backend=KERNELS)
        exact = exact_distances(x, codebook, metric)
        got = exact.gather(1, index[:, None])[:, 0]
        torch.testing.assert_close(distance.double(), got, rtol=1e-4, atol=1e-6)
        assert bool((got <= exact.min(1).values * 1.02).all())
    for which in (KERNELS, "reference"):
        with pytest.raises(ValueError, match="precision must be one of ieee, tf32, bf16, got 'fp8'"):
            nearest_code(x, codebook, precision="fp8", backend=which)


def test_float32_answer_beside_nan():
    x, codebook = gaussian(20, 9, 5)
    x[3, 1], x[7], codebook[0], codebook[4, 2] = float("nan"), float("inf"), float("nan"), float("-inf")
    index, distance = nearest_code(x, codebook, nonfinite="first", backend=KERNELS)
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 7]] = True
    assert (index[bad] == 0).all()
    assert distance[bad].isnan().all()
    present = [k for k in range(9) if k not in (0, 4)]
    expected, _ = nearest_code_reference(x[~bad], codebook[present])
    assert index[~bad].tolist() == [present[i] for i in expected]
    for which, wrong in (("x", x), ("codebook", codebook)):
        args = {"x": torch.randn(20, 5), "codebook": torch.randn(9, 5)} | {which: wrong}
        with pytest.raises(ValueError, match=f"nearest_code: {which} must be finite"):
            nearest_code(**args, nonfinite="raise", backend=KERNELS)


@exact_only
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    n=st.integers(0, 60), k=st.integers(1, 120), d=st.integers(1, 70), kind=st.sampled_from(KINDS),
    metric=st.sampled_from(METRICS), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_exact_anywhere(n, k, d, kind, metric, dtype, seed):
    torch.manual_seed(seed)
    x, codebook = data(kind, n, k, d)
    check(x.to(dtype), codebook.to(dtype), metric)


def test_no_wrong_codes_in_many():
    for kind in ("gaussian", "uniform", "sphere", "offset"):
        x, codebook = data(kind, 20000, 1024, 32)
        index, distance = nearest_code(x, codebook, backend=KERNELS)
        x, codebook = x.double(), codebook.double()
        centre = codebook.mean(0)
        scores = (x - centre) @ (codebook - centre).T - (codebook - centre).square().sum(1) / 2
        behind = scores.max(1).values - scores.gather(1, index[:, None])[:, 0]
        assert float((behind / distance).max()) < (1e-12 if KERNELS == "cpu" else 1e-5), kind


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    """The same tests under each instruction set that this CPU has."""
    run_under(isa, "exact_for or reference or opposite", "nearest_code", "vector_quantize", "code_statistics")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("which", [KERNELS, "reference"])
def test_ties_go_to_the_lowest_index(which, metric):
    codebook = torch.tensor([[5.0, 5], [1, 0], [0, 1], [1, 0], [0, 1]])
    x = torch.tensor([[2.0, 0], [0, 3], [2, 0]])
    assert nearest_code(x, codebook, metric=metric, backend=which)[0].tolist() == [1, 2, 1]
    same = torch.ones(100, 3)
    assert nearest_code(torch.randn(50, 3), same, metric=metric, backend=which)[0].unique().tolist() == [0]


def test_cosine_of_zero_vectors():
    codebook = torch.tensor([[-1.0, 0], [0, 0], [1, 0]])
    x = torch.tensor([[0.0, 0], [3, 0], [-2, 0]])
    index, distance = nearest_code(x, codebook, metric="cosine", backend=KERNELS)
    assert index.tolist() == [0, 2, 0]
    assert distance.tolist() == pytest.approx([2, 0, 0], abs=1e-12)


def test_opposite_of_every_code():
    """All cosines negative: a zero code wins with its cosine of 0."""
    codebook = torch.tensor([[1.0, 0], [0, 0], [1, 1e-3]])
    assert nearest_code(torch.tensor([[-1.0, 0]]), codebook, metric="cosine", backend=KERNELS)[0].tolist() == [1]


@pytest.mark.parametrize("which", [KERNELS, "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(bad, which):
    x, codebook = gaussian(20, 10, 5)
    x[7, 2] = bad
    with pytest.raises(ValueError, match=r"x must be finite.*row 7"):
        nearest_code(x, codebook, backend=which)
    index, distance = nearest_code(x, codebook, nonfinite="first", backend=which)
    others = torch.arange(20) != 7
    assert int(index[7]) == 0
    assert not torch.isfinite(distance[7])
    assert torch.equal(index[others], nearest_code(x[others], codebook)[0])
    codebook[3, 1] = bad
    with pytest.raises(ValueError, match=r"codebook must be finite.*code 3"):
        nearest_code(x[:5], codebook, backend=which)


def test_codes_that_are_not_finite_are_never_chosen():
    x, codebook = gaussian(200, 40, 5)
    codebook[::3] = float("nan")
    kept = torch.tensor([i for i in range(40) if i % 3])
    for which in (KERNELS, "reference"):
        for metric in METRICS:
            index, _ = nearest_code(x, codebook, metric=metric, nonfinite="first", backend=which)
            assert torch.equal(index, kept[nearest_code(x, codebook[kept], metric=metric)[0]])
        assert nearest_code(x, codebook[::3], nonfinite="first", backend=which)[0].unique().tolist() == [0]


@pytest.mark.parametrize("which", [KERNELS, "reference"])
def test_no_rows(which):
    index, distance = nearest_code(torch.zeros(0, 4), torch.randn(3, 4), backend=which)
    assert index.shape == distance.shape == (0,)


def test_strides_threads_and_repetition_do_not_matter():
    x, codebook = gaussian(400, 90, 33)
    plain = nearest_code(x, codebook, backend=KERNELS)
    wide = torch.randn(400, 66)
    wide[:, :33] = x
    for other in (x.T.contiguous().T, wide[:, :33], torch.stack([x, x], 1)[:, 0]):
        assert not other.is_contiguous()
        for a, b in zip(plain, nearest_code(other, codebook.T.contiguous().T, backend=KERNELS), strict=True):
            assert torch.equal(a, b)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        for a, b in zip(plain, nearest_code(x, codebook, backend=KERNELS), strict=True):
            assert torch.equal(a, b)
    one = nearest_code(x[:1].expand(50, -1), codebook, backend=KERNELS)[0]
    assert one.tolist() == [int(plain[0][0])] * 50


@cpu_only("float64")
@pytest.mark.parametrize("metric", METRICS)
def test_distance_is_differentiable(metric):
    x, codebook = (t.double().requires_grad_() for t in gaussian(9, 5, 4))
    assert torch.autograd.gradcheck(lambda *a: nearest_code(*a, metric=metric, backend=KERNELS)[1], (x, codebook))


@pytest.mark.parametrize("metric", METRICS)
def test_reference_agrees(metric, ran):
    x, codebook = gaussian(300, 70, 12)
    with ran("nearest_code", "reference"):
        index, distance = nearest_code(x, codebook, metric=metric, backend="reference")
    ours, ours_distance = nearest_code(x, codebook, metric=metric, backend=KERNELS)
    assert float((index == ours).float().mean()) > 0.99
    torch.testing.assert_close(distance, ours_distance, atol=1e-5, rtol=1e-4)


def test_opcheck_compile_and_export():
    x, codebook = gaussian(30, 9, 5)
    torch.library.opcheck(torch.ops.fastgen.nearest_code.default, (x, codebook, False, True))
    torch._dynamo.reset()
    for which in (KERNELS, "reference"):
        compiled = torch.compile(lambda x, c, b: nearest_code(x, c, backend=b), fullgraph=True, dynamic=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for n in (30, 21, 64):
                x = torch.randn(n, 5)
                index, distance = compiled(x, codebook, which)
                assert torch.equal(index, nearest_code(x, codebook)[0])
                torch.testing.assert_close(distance, nearest_code(x, codebook)[1])
        torch._dynamo.reset()

    class Search(torch.nn.Module):
        def forward(self, x, codebook):
            return nearest_code(x, codebook)

    program = torch.export.export(Search(), (x, codebook))
    assert torch.equal(program.module()(x, codebook)[0], nearest_code(x, codebook)[0])
    assert nearest_code(x.to("meta"), codebook.to("meta"))[0].shape == (64,)


@cpu_only("the process's memory")
def test_memory_stays_small():
    """No matrix of rows by codes: 64 bytes a row above the outputs, and the packed codebook."""
    code = """
import torch
from pathlib import Path
from fastgen.ops import nearest_code
x, codebook = torch.randn(65536, 64), torch.randn(4096, 64)
nearest_code(x[:4096], codebook)
kib = lambda field: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field))
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
out = nearest_code(x, codebook)
grown = 1024 * (kib("VmHWM") - before)
assert grown < 65536 * (64 + 12) + 4096 * 64 * 2 * 4, grown
"""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc/self/clear_refs")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


BAD = {
    "x must have shape": (torch.zeros(3), torch.zeros(2, 4), {}),
    "codebook must have shape": (torch.zeros(3, 5), torch.zeros(2, 4), {}),
    "codebook needs at least one code": (torch.zeros(3, 4), torch.zeros(0, 4), {}),
    "x needs at least one coordinate": (torch.zeros(3, 0), torch.zeros(2, 0), {}),
    "x must be float32": (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(2, 4), {}),
    "codebook is torch.float64": (torch.zeros(3, 4), torch.zeros(2, 4).double(), {}),
    "x must be a tensor": ([[1.0]], torch.zeros(2, 4), {}),
    "metric must be": (torch.zeros(3, 4), torch.zeros(2, 4), {"metric": "dot"}),
    "nonfinite must be": (torch.zeros(3, 4), torch.zeros(2, 4), {"nonfinite": True}),
    "codebook is on meta": (torch.zeros(3, 4), torch.zeros(2, 4, device="meta"), {}),
}


@cpu_only("arguments are checked alike everywhere")
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    x, codebook, options = BAD[message]
    with pytest.raises((TypeError, ValueError), match=message):
        nearest_code(x, codebook, **options)


def test_reference_is_the_definition():
    x, codebook = (t.double() for t in gaussian(40, 30, 6))
    index, distance = nearest_code_reference(x, codebook)
    exact = exact_distances(x, codebook, "euclidean")
    assert torch.equal(index, exact.argmin(1))
    torch.testing.assert_close(distance, exact.min(1).values)


@pytest.mark.parametrize("length", [1e-29, 1e-25, 1e-22])
def test_short_vectors_have_a_direction(length):
    """Their squares are nothing in float32; with gradients and without, on the reference too."""
    x, codes = torch.randn(40, 6), torch.randn(9, 6)
    index, distance = nearest_code(x, codes, metric="cosine", backend="reference")
    for which in (KERNELS, "reference"):
        for needs in (False, True):
            short = (x * length).requires_grad_(needs)
            again, distances = nearest_code(short, codes, metric="cosine", backend=which)
            assert torch.equal(again, index)
            torch.testing.assert_close(distances, distance, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("which", [KERNELS, "reference"])
@pytest.mark.parametrize("needs", [False, True])
def test_rows_that_are_not_finite_have_no_distance(which, needs):
    x, codes = torch.randn(4, 3), torch.randn(5, 3)
    x[1, 0], x[2, 1] = torch.inf, torch.nan
    index, distance = nearest_code(x.requires_grad_(needs), codes, nonfinite="first", backend=which)
    assert distance.isnan().tolist() == [False, True, True, False]
    assert index[1:3].tolist() == [0, 0]
