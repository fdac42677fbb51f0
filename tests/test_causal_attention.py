"""causal_attention: values and gradients against the float64 reference, for every ISA."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import DTYPES, compare, run

import fastgen
from fastgen import backend
from fastgen.ops import causal_attention
from fastgen.ops.causal_attention import causal_attention_reference

SHAPES = [
    # batch, heads, time, channels of keys, of values
    (1, 1, 1, 1, 1),
    (2, 3, 64, 16, 16),
    (1, 2, 200, 40, 33),
    (2, 1, 65, 1, 3),
    (1, 1, 3, 300, 2),
    (3, 2, 97, 8, 16),
]
BOTH = pytest.mark.parametrize("own", [True, False])


def arguments(batch, heads, time, keys, values, seed=0, time_innermost=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(channels):
        shape = (batch, heads, channels, time) if time_innermost else (batch, time, heads, channels)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.transpose(2, 3) if time_innermost else x.transpose(1, 2)

    return {"q": normal(keys), "k": normal(keys), "v": normal(values)}


def floats(args):
    return {k: v.float() for k, v in args.items()}


def explicit(q, k, v, own):
    """The definition, with the scores in memory."""
    time = q.shape[2]
    scores = (q @ k.mT) * q.shape[3] ** -0.5
    scores = scores.masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1 if own else 0), -torch.inf)
    if not own:
        scores, v = torch.nn.functional.pad(scores, (1, 0)), torch.nn.functional.pad(v, (0, 0, 1, 0))
    return scores.softmax(3) @ v


@pytest.fixture(autouse=True)
def _needs_kernels(need, one_thread):
    need("causal_attention", "cpu")


@BOTH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_definition(shape, own, ran):
    args = arguments(*shape)
    exact = explicit(**args, own=own)
    for which in ("cpu", "reference"):
        with ran("causal_attention", which):
            got = causal_attention(**args, own=own, backend=which)
        torch.testing.assert_close(got, exact, atol=1e-12, rtol=1e-12)


@BOTH
@pytest.mark.parametrize("time_innermost", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, time_innermost, own):
    compare(causal_attention, arguments(*shape, time_innermost=time_innermost), dtype, own=own)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(0, 3), heads=st.integers(1, 3), time=st.integers(1, 150), keys=st.integers(1, 40),
    values=st.integers(1, 40), own=st.booleans(), time_innermost=st.booleans(), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_reference_anywhere(batch, heads, time, keys, values, own, time_innermost, dtype, seed):
    compare(causal_attention, arguments(batch, heads, time, keys, values, seed, time_innermost), dtype, own=own)


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    run_under(isa, "matches or definition or bits or scores", "causal_attention")


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("heads", [1, 2, 7])
def test_any_number_of_threads(threads, heads):
    torch.set_num_threads(threads)
    compare(causal_attention, arguments(2, heads, 70, 8, 8), torch.float32)


@BOTH
def test_strided_expanded_and_shared_inputs(own):
    args = floats(arguments(2, 3, 50, 8, 8))
    plain = causal_attention(**args, own=own, backend="cpu")
    spread = {k: torch.randn(*v.shape, 2).select(4, 1).copy_(v) for k, v in args.items()}
    assert torch.equal(plain, causal_attention(**spread, own=own, backend="cpu"))
    together = torch.stack([v.transpose(1, 2) for v in args.values()], 2)  # (B, T, 3, heads, channels)
    q, k, v = together.permute(2, 0, 3, 1, 4)
    assert torch.equal(plain, causal_attention(q, k, v, own=own, backend="cpu"))
    one = {k: v[:1].expand(2, -1, -1, -1) for k, v in args.items()}
    assert torch.equal(causal_attention(**one, own=own, backend="cpu")[1], plain[0])


def test_results_lie_as_the_values_do():
    for innermost in (False, True):
        y = causal_attention(**floats(arguments(2, 3, 50, 8, 8, time_innermost=innermost)), backend="cpu")
        assert (y.mT if innermost else y.transpose(1, 2)).is_contiguous()


@pytest.mark.parametrize("which", ["cpu", "reference"])
@pytest.mark.parametrize("sizes", [(0, 3, 4, 4, 4), (2, 0, 3, 4, 4), (2, 3, 0, 4, 4), (2, 3, 4, 4, 0)])
def test_empty(sizes, which):
    args = {k: v.requires_grad_() for k, v in floats(arguments(*sizes)).items()}
    y = causal_attention(**args, backend=which)
    assert y.shape == (*sizes[:3], sizes[4])
    y.sum().backward()
    assert torch.equal(args["q"].grad, torch.zeros_like(args["q"]))


@BOTH
def test_two_runs_give_the_same_bits(own):
    args = arguments(3, 4, 130, 16, 16)
    runs = [run(causal_attention, args, torch.float32, "cpu", own=own) for _ in range(3)]
    for other in runs[1:]:
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), name
    alone = causal_attention(**{k: v[1:2].float() for k, v in args.items()}, own=own)
    assert torch.equal(alone, runs[0]["out[0]"][1:2]), "an example in a batch is the example alone"


@BOTH
def test_sees_nothing_later(own):
    args = floats(arguments(1, 2, 90, 8, 8))
    before = causal_attention(**args, own=own, backend="cpu")
    for at in (0, 31, 32, 63, 64, 89):
        changed = {k: v.clone() for k, v in args.items()}
        for name in ("k", "v"):
            changed[name][:, :, at] = float("nan")
        seen = causal_attention(**changed, own=own, backend="cpu").isnan().all(3)
        first = at if own else at + 1
        assert not seen[:, :, :first].any()
        assert seen[:, :, first:].all()
        changed = {k: v.clone() for k, v in args.items()}
        changed["q"][:, :, at] += 1
        differs = (causal_attention(**changed, own=own, backend="cpu") != before).any(3)
        assert not differs[:, :, :at].any()
        assert not differs[:, :, at + 1 :].any()


@BOTH
def test_large_scores_do_not_overflow(own):
    args = floats(arguments(1, 2, 80, 8, 8))
    args["q"] *= 300
    args["k"] *= 300
    compare(causal_attention, {k: v.double() for k, v in args.items()}, torch.float32, own=own)


@BOTH
def test_gradcheck(own):
    args = tuple(v.requires_grad_() for v in arguments(1, 2, 5, 3, 2).values())
    assert torch.autograd.gradcheck(lambda *v: causal_attention(*v, own=own, backend="cpu"), args)


def test_opcheck():
    q, k, v = floats(arguments(2, 3, 9, 4, 5)).values()
    ops = torch.ops.fastgen
    for own, innermost in ((True, False), (False, True)):
        torch.library.opcheck(ops.causal_attention.default, (q, k, v, own, innermost))
        memory, stats = ops.causal_attention(q, k, v, own, innermost)
        y = memory.transpose(2, 3) if innermost else memory.transpose(1, 2)
        torch.library.opcheck(ops.causal_attention_backward.default, (y, q, k, v, y, stats, own, innermost))


@BOTH
def test_compile_fullgraph_forward_backward_and_dynamic(own):
    torch._dynamo.reset()
    compiled = torch.compile(lambda *v: causal_attention(*v, own=own), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for time in (6, 9, 40):
            args = [v.requires_grad_() for v in floats(arguments(2, 3, time, 4, 5)).values()]
            grads = torch.autograd.grad(compiled(*args).square().sum(), args)
            exact = torch.autograd.grad(causal_attention_reference(*args, own=own).square().sum(), args)
            for got, expected in zip(grads, exact, strict=True):
                torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_meta_autocast_vmap_and_functional_grad():
    q, k, v = floats(arguments(2, 3, 9, 4, 5)).values()
    assert causal_attention(q.to("meta"), k.to("meta"), v.to("meta")).shape == (2, 3, 9, 5)
    with torch.autocast("cpu"):
        assert causal_attention(q, k, v).dtype == torch.bfloat16
    grads = [
        torch.func.grad(lambda x: op(x, k, v).square().sum())(q)  # noqa: B023
        for op in (causal_attention, causal_attention_reference)
    ]
    torch.testing.assert_close(*grads)
    many = torch.stack((q, 2 * q))
    mapped = torch.func.vmap(causal_attention, (0, None, None))(many, k, v)
    torch.testing.assert_close(mapped, torch.stack([causal_attention(x, k, v) for x in many]))
    x = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(causal_attention(x, k, v).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        first.sum().backward()


BAD = {
    "q list": ({"q": [1.0]}, TypeError, "q must be a tensor .* got list"),
    "q rank": ({"q": torch.zeros(3, 4, 4).double()}, ValueError, r"q must have shape .*any.*, got \(3, 4, 4\)"),
    "k": ({"k": torch.zeros(2, 3, 9, 5).double()}, ValueError, r"k must have shape \(2, 3, 9, 4\), got \(2, 3, 9, 5\)"),
    "v": ({"v": torch.zeros(2, 3, 8, 5).double()}, ValueError, r"v must have shape .*, got \(2, 3, 8, 5\)"),
    "dtype": ({"v": torch.zeros(2, 3, 9, 5)}, TypeError, "v is torch.float32, q is torch.float64"),
    "half": ({"q": torch.zeros(2, 3, 9, 4).half()}, TypeError, "q must be float32, bfloat16 or float64, got"),
    "own": ({"own": 1}, TypeError, "own must be True or False, got 1"),
    "backend": ({"backend": "triton"}, fastgen.BackendError, "'triton' was requested but cannot run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        causal_attention(**(arguments(2, 3, 9, 4, 5) | change))


def test_no_channels():
    with pytest.raises(ValueError, match=r"q needs at least one channel, got \(2, 3, 9, 0\)"):
        causal_attention(**arguments(2, 3, 9, 0, 5))
