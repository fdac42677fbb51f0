"""image_lstm: values and gradients against the float64 reference, for every ISA and for Triton."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import DEVICE, DTYPES, EXACT, EXAMPLES, KERNELS, compare, cpu_only, run

import fastgen
from fastgen import backend
from fastgen.ops import image_lstm
from fastgen.ops.image_lstm import image_lstm_reference, skewed, unskewed

SHAPES = [
    # batch, states, height, width, taps: 0 for the diagonals
    (1, 1, 1, 1, 1),
    (1, 1, 1, 1, 0),
    (2, 3, 5, 6, 3),
    (2, 3, 5, 6, 0),
    (3, 40, 9, 13, 5),
    (3, 40, 9, 13, 0),
    (1, 17, 1, 9, 0),
    (1, 17, 9, 1, 0),
    (2, 32, 28, 28, 3),
    (1, 20, 3, 2, 9),  # more taps than pixels
]


def arguments(batch, states, height, width, taps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = taps or 2
    weight = torch.randn(4 * states, states, columns, generator=generator, dtype=torch.float64)
    return {
        "gates": torch.randn(batch, 4 * states, height, width, generator=generator, dtype=torch.float64),
        "weight": weight * (states * columns) ** -0.5,
    }


def floats(args):
    return {k: v.to(DEVICE, torch.float32) for k, v in args.items()}


def explicit(gates, weight, diagonal):
    """The definition, pixel by pixel."""
    batch, channels, height, width = gates.shape
    nothing = gates.new_zeros(batch, channels // 4)
    h, c, reach = {}, {}, weight.shape[2] // 2
    for i in range(height):
        for j in range(width):
            above = [(i - 1, j + k - reach) for k in range(weight.shape[2])]
            seen = [(i - 1, j), (i, j - 1)] if diagonal else above
            z = gates[:, :, i, j] + sum(h.get(at, nothing) @ weight[:, :, k].T for k, at in enumerate(seen))
            o, f, new, g = z.chunk(4, 1)
            before = c.get((i, j - 1) if diagonal else (i - 1, j), nothing)
            c[i, j] = f.sigmoid() * before + new.sigmoid() * g.tanh()
            h[i, j] = o.sigmoid() * c[i, j].tanh()
    return torch.stack([torch.stack([h[i, j] for j in range(width)], 2) for i in range(height)], 2)


@pytest.fixture(autouse=True)
def _needs_kernels(need, one_thread):
    need("image_lstm", KERNELS)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition(shape, ran):
    diagonal, close = not shape[4], 1e-12 if KERNELS == "cpu" else 1e-5
    args = {k: v.to(DEVICE, EXACT) for k, v in arguments(*shape).items()}
    exact = explicit(**args, diagonal=diagonal)
    for which in (KERNELS, "reference"):
        with ran("image_lstm", which):
            got = image_lstm(**args, diagonal=diagonal, backend=which)
        torch.testing.assert_close(got, exact, atol=close, rtol=close)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype):
    compare(image_lstm, arguments(*shape), dtype, diagonal=not shape[4])


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(0, 3), states=st.integers(1, 40), height=st.integers(1, 20), width=st.integers(1, 20),
    taps=st.sampled_from([0, 1, 3, 5]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_reference_anywhere(batch, states, height, width, taps, dtype, seed):
    compare(image_lstm, arguments(batch, states, height, width, taps, seed), dtype, diagonal=not taps)


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    run_under(isa, "matches or definition or bits", "image_lstm")


@cpu_only("threads")
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_number_of_threads(threads, batch):
    torch.set_num_threads(threads)
    for taps in (0, 3):
        compare(image_lstm, arguments(batch, 8, 9, 11, taps), torch.float32, diagonal=not taps)


@pytest.mark.parametrize("diagonal", [False, True])
def test_strided_and_expanded_inputs(diagonal):
    args = floats(arguments(3, 6, 8, 9, 0 if diagonal else 3))
    plain = image_lstm(**args, diagonal=diagonal, backend=KERNELS)
    gates = args["gates"].contiguous(memory_format=torch.channels_last)
    weight = args["weight"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not gates.is_contiguous()
    assert torch.equal(plain, image_lstm(gates, weight, diagonal=diagonal, backend=KERNELS))
    one = args["gates"][:1].expand(3, -1, -1, -1)
    assert torch.equal(image_lstm(one, args["weight"], diagonal=diagonal, backend=KERNELS)[2], plain[0])


@pytest.mark.parametrize("which", [KERNELS, "reference"])
@pytest.mark.parametrize("sizes", [(0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_empty(sizes, which):
    for taps in (0, 3):
        args = {k: v.requires_grad_() for k, v in floats(arguments(*sizes, taps)).items()}
        h = image_lstm(**args, diagonal=not taps, backend=which)
        assert h.shape == sizes
        h.sum().backward()
        assert torch.equal(args["weight"].grad, torch.zeros_like(args["weight"]))


@pytest.mark.parametrize("diagonal", [False, True])
def test_two_runs_give_the_same_bits(diagonal):
    args = arguments(3, 20, 9, 11, 0 if diagonal else 3)
    runs = [run(image_lstm, args, torch.float32, KERNELS, diagonal=diagonal) for _ in range(3)]
    for other in runs[1:]:
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), name
    alone = image_lstm(floats(args)["gates"][1:2], floats(args)["weight"], diagonal=diagonal)
    assert torch.equal(alone, runs[0]["out[0]"][1:2]), "an image in a batch is the image alone"


@pytest.mark.parametrize("diagonal", [False, True])
def test_gates_that_are_out_of_range(diagonal):
    """Wide open and shut, far beyond what an exponential holds; and a NaN stays where it is seen."""
    args = floats(arguments(1, 4, 6, 7, 0 if diagonal else 3))
    args["gates"] *= 1e4
    torch.testing.assert_close(
        image_lstm(**args, diagonal=diagonal, backend=KERNELS), image_lstm_reference(**args, diagonal=diagonal)
    )
    args["gates"][0, :, 3, 3] = float("nan")
    seen = image_lstm(**args, diagonal=diagonal, backend=KERNELS).isnan().any(1)
    expected = image_lstm_reference(**args, diagonal=diagonal).isnan().any(1)
    if not diagonal:  # whose reference makes NaN of what is multiplied by nothing
        assert torch.equal(seen, expected)
    assert seen[0, 3, 3]
    assert not seen[0, :3].any()


@cpu_only("float64")
@pytest.mark.parametrize("diagonal", [False, True])
def test_gradcheck(diagonal):
    args = tuple(v.requires_grad_() for v in arguments(1, 2, 3, 4, 0 if diagonal else 3).values())
    assert torch.autograd.gradcheck(lambda *v: image_lstm(*v, diagonal=diagonal, backend=KERNELS), args)


@cpu_only("the schemas are the same")
def test_opcheck():
    for taps in (0, 3):
        gates, weight = floats(arguments(2, 3, 5, 6, taps)).values()
        ops = torch.ops.fastgen
        for keep in (False, True):
            torch.library.opcheck(ops.image_lstm.default, (gates, weight, not taps, keep))
        h, kept = ops.image_lstm(gates, weight, not taps, True)
        torch.library.opcheck(ops.image_lstm_backward.default, (h, weight, kept, not taps))


@cpu_only("traces on the CPU")
@pytest.mark.parametrize("diagonal", [False, True])
def test_compile_fullgraph_forward_backward_and_dynamic(diagonal):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *v: image_lstm(*v, diagonal=diagonal), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for size in ((6, 7), (9, 5), (11, 13)):
            args = [v.requires_grad_() for v in floats(arguments(2, 3, *size, 0 if diagonal else 3)).values()]
            grads = torch.autograd.grad(compiled(*args).square().sum(), args)
            exact = torch.autograd.grad(image_lstm_reference(*args, diagonal=diagonal).square().sum(), args)
            for got, expected in zip(grads, exact, strict=True):
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@cpu_only("autocast of the CPU")
def test_meta_autocast_and_functional_grad():
    gates, weight = floats(arguments(2, 3, 5, 6)).values()
    assert image_lstm(gates.to("meta"), weight.to("meta")).shape == (2, 3, 5, 6)
    with torch.autocast("cpu"):
        assert image_lstm(gates, weight).dtype == torch.bfloat16
    grads = [
        torch.func.grad(lambda x: op(x, weight).square().sum())(gates)  # noqa: B023
        for op in (image_lstm, image_lstm_reference)
    ]
    torch.testing.assert_close(*grads)


def test_skewing():
    x = torch.randn(2, 3, 4, 5)
    y = skewed(x)
    for i in range(4):
        assert torch.equal(y[:, :, i, i : i + 5], x[:, :, i])
        assert not y[:, :, i, :i].any()
        assert not y[:, :, i, i + 5 :].any()
    assert torch.equal(unskewed(y, 5), x)


BAD = {
    "gates list": ({"gates": [1.0]}, TypeError, "gates must be a tensor .* got list"),
    "gates rank": ({"gates": torch.zeros(3, 4, 4).double()}, ValueError, r"gates must have shape .*, got \(3, 4, 4\)"),
    "channels": ({"gates": torch.zeros(2, 6, 4, 4).double()}, ValueError, "gates must have 4 H channels.*, got 6"),
    "weight": ({"weight": torch.zeros(8, 3, 3).double()}, ValueError, r"weight must have shape \(12, 3, 'any'\), got"),
    "even": ({"weight": torch.zeros(12, 3, 4).double()}, ValueError, "weight must have an odd number of taps, got 4"),
    "diagonal": ({"diagonal": True}, ValueError, r"weight must have shape \(12, 3, 2\), got \(12, 3, 3\)"),
    "diagonal 1": ({"diagonal": 1}, TypeError, "diagonal must be True or False, got 1"),
    "dtype": ({"weight": torch.zeros(12, 3, 3)}, TypeError, "weight is torch.float32, gates is torch.float64"),
    "half": ({"gates": torch.zeros(2, 12, 4, 4).half()}, TypeError, "gates must be float32, bfloat16 or float64, got"),
    "backend": ({"backend": "triton"}, fastgen.BackendError, "'triton' was requested but cannot run"),
}


@cpu_only("errors name what the CPU takes")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        image_lstm(**(arguments(2, 3, 4, 5) | change))
