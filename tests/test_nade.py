"""NADE's recurrence against the float64 reference, and sampling against the reference's loop."""

import itertools

import pytest
import torch
from op_helpers import DEVICE, DTYPES, KERNELS, compare, cpu_only

from fastgen.ops import nade, nade_sample
from fastgen.ops.nade import nade_reference

SIZES = [  # batch, inputs, hidden units, rows of an input, outputs
    (1, 1, 1, 1, 1),
    (3, 7, 5, 1, 1),
    (33, 31, 64, 1, 1),
    (5, 67, 65, 1, 1),
    (70, 33, 130, 1, 1),
    (4, 9, 33, 3, 3),
    (40, 65, 17, 5, 5),
    (2, 3, 200, 2, 7),
    (3, 4, 600, 1, 1),
    (20, 34, 70, 4, 70),
    (0, 4, 3, 1, 1),
    (3, 0, 4, 1, 1),
]


def arguments(steps, hidden, columns, outputs):
    return {
        "in_weight": torch.randn(steps, columns, hidden, dtype=torch.float64),
        "in_bias": torch.randn(hidden, dtype=torch.float64),
        "out_weight": torch.randn(steps, outputs, hidden, dtype=torch.float64) * hidden**-0.5,
        "out_bias": torch.randn(steps, outputs, dtype=torch.float64),
    }


def values(batch, steps, columns):
    return torch.randint(max(2, columns), (batch, steps)).to(DEVICE)


def floats(*sizes):
    return {k: v.to(DEVICE, torch.float32) for k, v in arguments(*sizes).items()}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(sizes, dtype):
    batch, steps, _, columns, _ = sizes
    x = values(batch, steps, columns)
    compare(lambda backend, **args: nade(x, **args, backend=backend), arguments(*sizes[1:]), dtype)


def test_reference_is_a_loop():
    args = arguments(6, 4, 3, 2)
    x = values(5, 6, 3)
    state, rows = args["in_bias"].expand(5, -1), []
    for d in range(6):
        rows.append(torch.sigmoid(state) @ args["out_weight"][d].T + args["out_bias"][d])
        state = state + args["in_weight"][d][x[:, d]]
    torch.testing.assert_close(nade_reference(x, **args), torch.stack(rows, 1))


@cpu_only("in float64")
@pytest.mark.parametrize("columns", [1, 3])
def test_gradcheck(columns):
    x = values(3, 5, columns)
    leaves = [v.requires_grad_() for v in arguments(5, 4, columns, 2).values()]
    assert torch.autograd.gradcheck(lambda *w: nade(x, *w, backend="cpu"), leaves)


def test_an_output_sees_the_inputs_before_it():
    args = floats(9, 20, 1, 1)
    x = values(2, 9, 1)
    before = nade(x, **args, backend=KERNELS)
    for d in range(9):
        other = x.clone()
        other[:, d] = 1 - other[:, d]
        after = nade(other, **args, backend=KERNELS)
        assert torch.equal(after[:, : d + 1], before[:, : d + 1])
        assert d == 8 or not torch.equal(after[:, d + 1], before[:, d + 1])


def test_same_bits_whatever_the_threads():
    args = {k: v.requires_grad_() for k, v in floats(40, 150, 1, 1).items()}
    x = values(37, 40, 1)
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out = nade(x, **args, backend=KERNELS)
        results.append((out, *torch.autograd.grad(out.square().sum(), list(args.values()))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_opcheck_compile_export_autocast(ran):
    args = floats(5, 7, 1, 1)
    x = values(3, 5, 1)
    torch.library.opcheck(torch.ops.fastgen.nade.default, (x, *args.values()))
    grad = torch.randn(3, 5, 1, device=DEVICE)
    torch.library.opcheck(torch.ops.fastgen.nade_backward.default, (grad, x, *list(args.values())[:3]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, **a: nade(x, **a), fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, **args), nade_reference(x, **args))
    if KERNELS == "cpu":
        with pytest.raises(RuntimeError, match=r"x must lie in \[0, 1\], got 2"):
            compiled(x + 2 - x, **args)
    with torch.autocast(DEVICE, torch.bfloat16), ran("nade", KERNELS):
        mixed = nade(x, args["in_weight"], args["in_bias"].bfloat16(), args["out_weight"], args["out_bias"])
    assert mixed.dtype == torch.float32
    with ran("nade", "reference"):
        nade(x, **args, backend="reference")


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize(("steps", "hidden", "columns"), [(1, 1, 1), (9, 33, 1), (31, 70, 1), (7, 20, 5), (3, 600, 70)])
def test_samples_of_every_backend(steps, hidden, columns, temperature):
    args = floats(steps, hidden, columns, columns)
    args["out_bias"][::2, -1] += 5  # what is computed last counts
    uniforms = torch.rand(50, steps, device=DEVICE)
    given = torch.full((50, steps), -1, device=DEVICE)
    given[:, ::3] = 1
    for known in (None, given):
        got, expected = (
            nade_sample(**args, uniforms=uniforms, given=known, temperature=temperature, backend=which)
            for which in (KERNELS, "reference")
        )
        assert torch.equal(got, expected)
        assert known is None or bool((got[:, ::3] == 1).all())


@cpu_only("many draws")
def test_samples_have_the_probabilities_of_the_outputs():
    args = floats(3, 6, 1, 1)
    drawn = nade_sample(**args, uniforms=torch.rand(200_000, 3), backend="cpu")
    everything = torch.tensor(list(itertools.product([0, 1], repeat=3)))
    logits = nade(everything, **args)[..., 0]
    p = torch.where(everything == 1, torch.sigmoid(logits), torch.sigmoid(-logits)).prod(1)
    assert abs(float(p.sum()) - 1) < 1e-5
    counts = torch.bincount(drawn @ torch.tensor([4, 2, 1]), minlength=8) / len(drawn)
    torch.testing.assert_close(counts, p, atol=6e-3, rtol=0)


GOOD = floats(4, 3, 1, 1)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"x": torch.zeros(2, 4)}, TypeError, "x must be int64, got torch.float32"),
    ({"x": torch.full((2, 4), 2)}, ValueError, r"x must lie in \[0, 2\), got 2 to 2"),
    ({"x": torch.zeros(2, 5, dtype=torch.int64)}, ValueError, r"x must be \(B, 4\), got \(2, 5\)"),
    ({"in_weight": torch.zeros(4, 3)}, ValueError, r"in_weight must be \(D, V, H\)"),
    ({"in_weight": [1]}, TypeError, "in_weight must be a tensor"),
    ({"in_bias": torch.zeros(4)}, ValueError, r"in_bias must have shape \(3,\), got \(4,\)"),
    ({"out_weight": torch.zeros(5, 1, 3)}, ValueError, "out_weight must have shape"),
    ({"out_bias": torch.zeros(4, 2)}, ValueError, "out_bias must have shape"),
    ({"out_bias": torch.zeros(4, 1).double()}, TypeError, "out_bias"),
])  # fmt: skip
def test_bad_input(changes, error, message):
    args = {"x": torch.zeros(2, 4, dtype=torch.int64)} | GOOD | changes
    with pytest.raises(error, match=message):
        nade(**args)


@pytest.mark.parametrize(("changes", "error", "message"), [
    ({"uniforms": torch.ones(2, 4)}, ValueError, r"uniforms must lie in \[0, 1\)"),
    ({"uniforms": torch.rand(2, 3)}, ValueError, "uniforms"),
    ({"temperature": 0}, ValueError, "temperature"),
    ({"given": torch.zeros(3, 4, dtype=torch.int64)}, ValueError, r"given must be \(2, 4\)"),
    ({"given": torch.full((2, 4), 2)}, ValueError, r"given must lie in \[0, 2\)"),
    ({"out_weight": torch.zeros(4, 3, 3), "out_bias": torch.zeros(4, 3)}, ValueError, "in_weight must have a row"),
    ({"in_weight": torch.zeros(4, 2, 3), "out_weight": torch.zeros(4, 0, 3), "out_bias": torch.zeros(4, 0)}, ValueError,
     "got 2 rows and 0 outputs"),
])  # fmt: skip
def test_bad_input_of_sampling(changes, error, message):
    with pytest.raises(error, match=message):
        nade_sample(**GOOD | {"uniforms": torch.rand(2, 4)} | changes)


@pytest.mark.parametrize("backend", [KERNELS, "reference"])
def test_a_uniform_of_zero_draws_nothing_impossible(backend):
    bias = torch.tensor([[-300.0, -torch.inf, 0.0, 1.0]])
    weights = [w.to(DEVICE) for w in (torch.zeros(1, 4, 2), torch.zeros(2), torch.zeros(1, 4, 2), bias)]
    assert nade_sample(*weights, torch.zeros(1, 1, device=DEVICE), backend=backend).item() == 2


def test_temperatures_that_float32_cannot_divide_by():
    weights = torch.zeros(1, 1, 2), torch.zeros(2), torch.zeros(1, 1, 2), torch.full((1, 1), 5.0)
    assert nade_sample(*weights, torch.full((1, 1), 0.5), temperature=1e-30).item() == 1
    with pytest.raises(ValueError, match=r"temperature must lie in \[1e-30, 1e30\], got 1e-40"):
        nade_sample(*weights, torch.full((1, 1), 0.5), temperature=1e-40)


@pytest.mark.parametrize("large", [1e6, float("inf")])
def test_a_large_weight_costs_no_digits(large):
    args = floats(20, 8, 1, 1)
    args["in_weight"][15] = large
    x = torch.ones(3, 20, dtype=torch.int64, device=DEVICE)
    grads = {}
    for dtype, which in ((torch.float32, KERNELS), (torch.float64, "reference")):
        leaves = [w.to(dtype).requires_grad_() for w in args.values()]
        grads[dtype] = torch.autograd.grad(nade(x, *leaves, backend=which).sum(), leaves)
    for got, exact in zip(grads[torch.float32], grads[torch.float64], strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-6)


def test_sums_over_many_rows_keep_their_digits():
    """All of one sign: a running float32 sum of so many would lose the last ones."""
    rows, generator = 40000, torch.Generator().manual_seed(0)
    x = torch.randint(2, (rows, 6), generator=generator).to(DEVICE)
    weights = [torch.rand(shape, generator=generator).to(DEVICE) for shape in ((6, 1, 4), (4,), (6, 1, 4), (6, 1))]
    grads = {}
    for dtype, which in ((torch.float32, KERNELS), (torch.float64, "reference")):
        leaves = [w.to(dtype).requires_grad_() for w in weights]
        grads[dtype] = torch.autograd.grad(nade(x, *leaves, backend=which).sum(), leaves)
    for got, exact in zip(grads[torch.float32], grads[torch.float64], strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=5e-6, atol=1e-6 * float(exact.abs().max()))
