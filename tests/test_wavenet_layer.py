"""gated_causal_conv1d and wavenet_layer: values and gradients against the float64 reference, for every ISA."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_helpers import DEVICE, DTYPES, EXACT, EXAMPLES, KERNELS, Arguments, compare, cpu_only, run

import fastgen
from fastgen import backend
from fastgen.nn import WaveNetLayer
from fastgen.ops import gated_causal_conv1d, wavenet_layer
from fastgen.ops.gated_causal_conv1d import gated_causal_conv1d_reference
from fastgen.ops.wavenet_layer import wavenet_layer_reference

pytestmark = pytest.mark.on_device


def arguments(batch, channels, steps, gate, kernel, skip, cond="none", seed=0):
    """float64 arguments of wavenet_layer; the first four with `cond` are those of gated_causal_conv1d."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    return {
        "x": normal(batch, channels, steps),
        "weight": normal(2 * gate, channels, kernel, scale=(channels * kernel) ** -0.5),
        "bias": normal(2 * gate),
        "out_weight": normal(channels + skip, gate, scale=gate**-0.5),
        "out_bias": normal(channels + skip),
        "cond": None if cond == "none" else normal(batch, 2 * gate, steps if cond == "local" else 1),
    }


def most_exact(args: Arguments) -> Arguments:
    return {k: v if v is None else v.to(EXACT) for k, v in args.items()}


def gate_arguments(args):
    return {k: args[k] for k in ("x", "weight", "bias", "cond")}


@pytest.fixture(autouse=True)
def _needs_kernels():
    reason = backend.why_not("gated_causal_conv1d", KERNELS)
    if reason and KERNELS not in os.environ.get("FASTGEN_REQUIRE", ""):
        pytest.skip(reason)
    assert reason is None, reason


SHAPES = [
    # batch, channels, steps, gate, kernel, skip, dilation
    (1, 1, 1, 1, 1, 0, 1),
    (2, 64, 200, 64, 2, 128, 4),
    (1, 7, 33, 5, 3, 13, 2),
    (3, 5, 101, 9, 1, 1, 1),
    (2, 33, 503, 17, 2, 31, 64),
    (1, 4, 7, 4, 2, 3, 8),  # every old tap lies before the start
    (5, 3, 49, 2, 5, 1, 100),
    (3, 8, 1500, 8, 3, 8, 7),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cond", ["none", "local", "constant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, cond, dtype):
    *sizes, dilation = shape
    args = arguments(*sizes, cond)
    compare(wavenet_layer, args, dtype, dilation=dilation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cond", ["none", "local", "constant"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_alone(shape, cond, dtype):
    *sizes, dilation = shape
    args = gate_arguments(arguments(*sizes, cond))
    compare(gated_causal_conv1d, args, dtype, dilation=dilation)
    compare(gated_causal_conv1d, args | {"bias": None}, dtype, dilation=dilation)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    batch=st.integers(1, 4), channels=st.integers(1, 40), steps=st.integers(1, 300), gate=st.integers(1, 40),
    kernel=st.integers(1, 4), skip=st.integers(0, 40), dilation=st.integers(1, 130),
    cond=st.sampled_from(["none", "local", "constant"]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99),
)  # fmt: skip
def test_matches_reference_anywhere(batch, channels, steps, gate, kernel, skip, dilation, cond, dtype, seed):
    args = arguments(batch, channels, steps, gate, kernel, skip, cond, seed)
    compare(wavenet_layer, args, dtype, dilation=dilation)


@cpu_only("threads")
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 2, 3):
            compare(wavenet_layer, arguments(batch, 6, 700, 6, 2, 5), torch.float32, dilation=16)
    finally:
        torch.set_num_threads(before)


def test_without_biases():
    args = arguments(2, 6, 50, 5, 2, 4) | {"bias": None, "out_bias": None}
    compare(wavenet_layer, args, torch.float32, dilation=3)


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    """The same tests under each instruction set that this CPU has."""
    run_under(isa, "(matches_reference and local) or (gate_alone and local) or poison", "wavenet_layer")


def test_strided_and_expanded_inputs():
    args = most_exact(arguments(3, 6, 40, 5, 2, 4, "local"))
    plain = wavenet_layer(**args, dilation=2, backend=KERNELS)
    strided = args | {
        "x": args["x"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "weight": args["weight"].permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "out_weight": args["out_weight"].T.contiguous().T,
        "cond": torch.stack([args["cond"]] * 2, -1)[..., 0],
    }
    assert not any(strided[k].is_contiguous() for k in ("x", "weight", "out_weight", "cond"))
    for a, b in zip(plain, wavenet_layer(**strided, dilation=2, backend=KERNELS), strict=True):
        assert torch.equal(a, b)
    one = args["x"][:1].expand(3, -1, -1)
    got = wavenet_layer(**(args | {"x": one}), backend=KERNELS)[0]
    torch.testing.assert_close(got, wavenet_layer_reference(**(args | {"x": one}))[0])


@pytest.mark.parametrize("which", [KERNELS, "reference"])
@pytest.mark.parametrize(("batch", "steps"), [(0, 5), (3, 0)])
def test_empty(batch, steps, which):
    args = {k: v if v is None else v.float() for k, v in arguments(batch, 4, steps, 3, 2, 5).items()}
    args["x"].requires_grad_()
    args["weight"].requires_grad_()
    residual, skip = wavenet_layer(**args, backend=which)
    assert residual.shape == (batch, 4, steps)
    assert skip.shape == (batch, 5, steps)
    (residual.sum() + skip.sum()).backward()
    assert args["x"].grad.shape == (batch, 4, steps)
    assert torch.equal(args["weight"].grad, torch.zeros_like(args["weight"]))


def test_two_runs_give_the_same_bits():
    args = arguments(3, 20, 900, 20, 2, 30, "local")
    runs = [run(wavenet_layer, args, torch.float32, KERNELS, dilation=8) for _ in range(3)]
    for other in runs[1:]:
        for name, value in other.items():
            assert torch.equal(value, runs[0][name]), name


def test_every_element_is_written_poison():
    """Outputs that start as NaN end without."""
    for dtype in DTYPES:
        args = {k: v if v is None else v.to(DEVICE, dtype) for k, v in arguments(2, 5, 61, 4, 2, 6).items()}
        out = tuple(torch.full((2, n, 61), float("nan"), device=DEVICE, dtype=dtype) for n in (5, 6))
        same = wavenet_layer(**args, dilation=3, out=out, backend=KERNELS)
        assert same[0] is out[0]
        for a, b in zip(out, wavenet_layer(**args, dilation=3, backend=KERNELS), strict=True):
            assert torch.equal(a, b)


def test_inputs_are_left_alone():
    args = {k: v.float() for k, v in arguments(2, 5, 61, 4, 2, 6, "local").items()}
    before = {k: v.clone() for k, v in args.items()}
    run(wavenet_layer, args, torch.float32, KERNELS, dilation=2)
    assert all(torch.equal(args[k], before[k]) for k in args)


@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_causal(kernel):
    """A changed x_t changes nothing before t, and something at t and at each of the taps' distances."""
    args = {k: v if v is None else v.float() for k, v in arguments(1, 4, 64, 4, kernel, 4).items()}
    a = wavenet_layer(**args, dilation=5, backend=KERNELS)[1]
    changed = args["x"].clone()
    changed[..., 30] += 1
    b = wavenet_layer(**(args | {"x": changed}), dilation=5, backend=KERNELS)[1]
    where = (a != b).any(1)[0].nonzero()[:, 0].tolist()
    assert where == [30 + 5 * k for k in range(kernel)]


def test_nan_stays_in_its_column():
    args = {k: v if v is None else v.float() for k, v in arguments(1, 4, 100, 4, 2, 4).items()}
    args["x"][0, 2, 50] = float("nan")
    residual, skip = wavenet_layer(**args, dilation=5, backend=KERNELS)
    assert skip.isnan().any(1)[0].nonzero()[:, 0].tolist() == [50, 55]
    exact = wavenet_layer_reference(**args, dilation=5)
    assert torch.equal(residual.isnan(), exact[0].isnan())


@pytest.mark.parametrize("gate", [3, 4])
def test_infinite_input_saturates_only_the_gates_it_reaches(gate):
    """What pads the gate's channels does not multiply infinity by zero: the gradient of x stays finite."""
    args = {k: v if v is None else v.float() for k, v in arguments(1, 5, 60, gate, 2, 3).items()}
    args["x"][0, 2, 20] = float("inf")
    x = args["x"].requires_grad_()
    results = wavenet_layer(**args, dilation=4, backend=KERNELS)
    (grad,) = torch.autograd.grad([r[:, :, 30:].sum() + r[:, :, 20].sum() for r in results], x)
    assert torch.isfinite(grad).all()


def test_saturated_gates():
    """Far in the tails tanh and sigmoid are their limits, and the gradients finite."""
    args = arguments(1, 3, 40, 4, 2, 3)
    args["bias"] = torch.tensor([50.0, -50, 1e4, -1e4, 90, -90, 1e4, -1e4], dtype=torch.float64)
    for dtype in {torch.float32, EXACT}:
        result = run(wavenet_layer, args, dtype, KERNELS, dilation=1)
        exact = run(wavenet_layer, args, torch.float64, "reference", dilation=1)
        for name, value in result.items():
            assert torch.isfinite(value).all(), name
            torch.testing.assert_close(value.double(), exact[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e-5, 1e-3, 0.1, 0.2, 1.0, 5.0])
def test_small_pre_activations_keep_their_precision(size):
    """The gate is right in the relative sense, however small tanh's argument."""
    x = torch.linspace(-size, size, 64).reshape(1, 1, -1)
    weight = torch.tensor([[[1.0]], [[0.5 / max(size, 1.0)]]])
    z = gated_causal_conv1d(x, weight, backend=KERNELS)
    exact = gated_causal_conv1d_reference(x.double(), weight.double())
    assert float(((z.double() - exact) / exact).abs().max()) < (1e-6 if KERNELS == "cpu" else 2e-6)


def test_second_derivative_raises():
    args = most_exact(arguments(1, 2, 9, 2, 2, 2))
    args["x"].requires_grad_()
    out = wavenet_layer(**args, backend=KERNELS)[0].square().sum()
    (grad,) = torch.autograd.grad(out, args["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="first-order gradients only"):
        grad.sum().backward()


def test_forward_mode_is_refused_not_wrong():
    args = most_exact(arguments(1, 2, 9, 2, 2, 2))
    for call in (
        lambda x: wavenet_layer(**(args | {"x": x}), backend=KERNELS)[0],
        lambda x: gated_causal_conv1d(**(gate_arguments(args) | {"x": x}), backend=KERNELS),
    ):
        with pytest.raises(RuntimeError, match="forward mode"):
            torch.func.jvp(call, (args["x"],), (args["x"],))


@cpu_only("float64")
def test_gradcheck():
    args = {k: v.requires_grad_() for k, v in arguments(2, 3, 9, 2, 2, 2, "local").items()}
    names = list(args)

    def call(*values):
        return wavenet_layer(**dict(zip(names, values, strict=True)), dilation=2, backend=KERNELS)

    assert torch.autograd.gradcheck(call, tuple(args.values()))
    gate = {k: args[k] for k in ("x", "weight", "bias", "cond")}
    assert torch.autograd.gradcheck(lambda *v: gated_causal_conv1d(*v, dilation=2), tuple(gate.values()))


def test_opcheck():
    args = {k: v.float() for k, v in arguments(2, 3, 17, 4, 2, 5, "local").items()}
    values = (*args.values(), 2)
    torch.library.opcheck(torch.ops.fastgen.wavenet_layer.default, values)
    residual, skip = torch.ops.fastgen.wavenet_layer(*values)
    torch.library.opcheck(torch.ops.fastgen.wavenet_layer_backward.default, (residual, skip, *values))
    torch.library.opcheck(torch.ops.fastgen.wavenet_layer_out.default, (*values, residual, skip))
    gate = (*gate_arguments(args).values(), 2)
    torch.library.opcheck(torch.ops.fastgen.gated_causal_conv1d.default, gate)
    z = torch.ops.fastgen.gated_causal_conv1d(*gate)
    torch.library.opcheck(torch.ops.fastgen.gated_causal_conv1d_backward.default, (z, *gate))


def test_compile_fullgraph_forward_backward_and_dynamic():
    args = {k: v.float() for k, v in arguments(2, 3, 50, 4, 2, 5).items() if v is not None}
    args["weight"].requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(lambda **a: wavenet_layer(**a, dilation=2), fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for steps in (50, 37, 91):
            a = args | {"x": torch.randn(2, 3, steps)}
            (grad,) = torch.autograd.grad(sum(o.sum() for o in compiled(**a)), args["weight"])
            (exact,) = torch.autograd.grad(
                sum(o.sum() for o in wavenet_layer_reference(**a, dilation=2)), args["weight"]
            )
            torch.testing.assert_close(grad, exact, atol=1e-4, rtol=1e-4)


def test_export_and_meta():
    class Layer(torch.nn.Module):
        def forward(self, x, weight, out_weight):
            return wavenet_layer(x, weight, None, out_weight, None, dilation=2)

    args = {k: v.float() for k, v in arguments(2, 3, 50, 4, 2, 5).items() if v is not None}
    inputs = (args["x"], args["weight"], args["out_weight"])
    program = torch.export.export(Layer(), inputs)
    for a, b in zip(program.module()(*inputs), Layer()(*inputs), strict=True):
        torch.testing.assert_close(a, b)
    residual, skip = Layer()(*(t.to("meta") for t in inputs))
    assert residual.shape == (2, 3, 50)
    assert skip.shape == (2, 5, 50)


def test_functional_grad_and_vmap():
    args = most_exact(arguments(2, 3, 20, 4, 2, 5))

    def loss(weight, op):
        return op(args["x"], weight, args["bias"], dilation=2).square().sum()

    exact = torch.func.grad(lambda w: loss(w, gated_causal_conv1d_reference))(args["weight"])
    torch.testing.assert_close(torch.func.grad(lambda w: loss(w, gated_causal_conv1d))(args["weight"]), exact)


def test_autocast():
    args = {k: v.float() for k, v in arguments(2, 3, 20, 4, 2, 5).items() if v is not None}
    with torch.autocast(DEVICE, torch.bfloat16):
        residual, _ = wavenet_layer(**args, backend=KERNELS)
    assert residual.dtype == torch.bfloat16
    exact = wavenet_layer_reference(**args)[0]
    assert float((residual - exact).norm() / exact.norm()) < 0.02


def test_backend_that_runs(monkeypatch):
    """auto and the backend by name call the kernel, "reference" does not."""
    calls = []
    real = torch.ops.fastgen.gated_causal_conv1d
    monkeypatch.setattr(torch.ops.fastgen, "gated_causal_conv1d", lambda *a: calls.append(1) or real(*a))
    args = {k: v if v is None else v.float() for k, v in gate_arguments(arguments(1, 2, 5, 2, 2, 1)).items()}
    for which, expected in ((None, 1), (KERNELS, 2), ("reference", 2)):
        gated_causal_conv1d(**args, backend=which)
        assert len(calls) == expected
    with fastgen.use_backend("reference"):
        gated_causal_conv1d(**args)
    assert len(calls) == 2


BAD = {
    "x rank": ({"x": torch.zeros(3, 4)}, ValueError, r"x must have shape .* got \(3, 4\)"),
    "x dtype": ({"x": torch.zeros(2, 3, 9, dtype=torch.int64)}, TypeError, "x must be float32.*got torch.int64"),
    "mixed": ({"x": torch.zeros(2, 3, 9)}, TypeError, "weight is torch.float64, x is torch.float32"),
    "channels": ({"weight": torch.zeros(8, 4, 2).double()}, ValueError, "x must have 4 channels, .*got 3"),
    "odd rows": ({"weight": torch.zeros(7, 3, 2).double()}, ValueError, "even number of rows.*got 7"),
    "no taps": ({"weight": torch.zeros(8, 3, 0).double()}, ValueError, "kernel size >= 1, got 0"),
    "bias": ({"bias": torch.zeros(7).double()}, ValueError, r"bias must have shape \(8,\), got \(7,\)"),
    "cond": ({"cond": torch.zeros(2, 8, 5).double()}, ValueError, r"cond must have shape \(2, 8, 9\)"),
    "out_weight": ({"out_weight": torch.zeros(5, 3).double()}, ValueError, "out_weight must have shape"),
    "few rows": ({"out_weight": torch.zeros(2, 4).double()}, ValueError, "at least C = 3 rows, got 2"),
    "out_bias": ({"out_bias": torch.zeros(4).double()}, ValueError, "out_bias must have shape"),
    "dilation": ({"dilation": 0}, ValueError, "dilation must be an integer >= 1, got 0"),
    "device": ({"weight": torch.zeros(8, 3, 2, device="meta").double()}, ValueError, "weight is on meta, x is on cpu"),
    "huge dilation": ({"dilation": 2**63}, ValueError, r"dilation must be < 2\*\*31, got 9223372036854775808"),
    "dilation True": ({"dilation": True}, ValueError, "dilation must be an integer >= 1, got True"),
    "x a list": ({"x": [0.0]}, TypeError, "x must be a tensor, got list"),
    "not a tensor": ({"bias": [0.0] * 8}, TypeError, "bias must be a tensor, got list"),
    "backend": ({"backend": "gpu"}, ValueError, "expected one of cpu, triton"),
    "no triton": ({"backend": "triton"}, fastgen.BackendError, "'triton' was requested but cannot run"),
}


@cpu_only("arguments are checked alike everywhere")
@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, message = BAD[case]
    args = arguments(2, 3, 9, 4, 2, 2) | {"dilation": 1} | change
    with pytest.raises(kind, match=message):
        wavenet_layer(**args)


@cpu_only("arguments are checked alike everywhere")
def test_bad_out():
    args = arguments(2, 3, 9, 4, 2, 2)
    good = (torch.empty(2, 3, 9).double(), torch.empty(2, 2, 9).double())
    with pytest.raises(ValueError, match=r"out\[1\] must have shape \(2, 2, 9\)"):
        wavenet_layer(**args, out=(good[0], good[0]))
    with pytest.raises(ValueError, match="out must be contiguous"):
        wavenet_layer(**args, out=(good[0].mT.contiguous().mT, good[1]))
    for out, came in (((good[0],), "1 elements"), (good[0], "Tensor"), ((*good, good[0]), "3 elements")):
        with pytest.raises(TypeError, match=rf"out must be a pair of tensors \(residual, skip\), got {came}"):
            wavenet_layer(**args, out=out)
    args["x"].requires_grad_()
    with pytest.raises(ValueError, match="gradients are needed"):
        wavenet_layer(**args, out=good)


@pytest.mark.parametrize("which", [KERNELS, "reference"])
def test_out_shares_no_memory(which):
    """Results that would overwrite each other, or an input that is still to be read; halves of a buffer are fine."""
    args = most_exact(arguments(2, 3, 9, 4, 2, 3))
    buffer = torch.empty(5, 2, 3, 9).to(EXACT)
    for out, message in (
        ((buffer[0], buffer[0]), r"out\[0\] must not share memory with another argument, got that of out\[1\]"),
        ((args["x"], buffer[0]), r"out\[0\] .*got that of x"),
        ((buffer[0], args["x"]), r"out\[1\] .*got that of x"),
        ((buffer.view(10, 3, 9)[0:2], buffer.view(10, 3, 9)[1:3]), r"out\[0\] .*got that of out\[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            wavenet_layer(**args, out=out, backend=which)
    expected = wavenet_layer(**args, backend=which)
    for got, exact in zip(wavenet_layer(**args, out=(buffer[0], buffer[1]), backend=which), expected, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("speaker", [False, True])
def test_layer_wants_the_conditioning_it_was_made_for(local, speaker):
    layer = WaveNetLayer(3, 2, local_channels=4 * local, speaker_channels=5 * speaker)
    given = {"local": torch.randn(1, 4, 6), "speaker": torch.randn(1, 5)}
    fits = {
        name: value if wanted else None for (name, value), wanted in zip(given.items(), (local, speaker), strict=True)
    }
    assert layer(torch.randn(1, 3, 6), **fits)[0].shape == (1, 3, 6)
    for name, value in given.items():
        wrong, message = (value, f"{name} was given.*{name}_channels=0")
        if fits[name] is not None:
            wrong, message = (None, f"{name} is needed.*{name}_channels > 0")
        with pytest.raises(ValueError, match=f"WaveNetLayer: {message}"):
            layer(torch.randn(1, 3, 6), **(fits | {name: wrong}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate_channels": -4}, "gate_channels must be an integer >= 1, got -4"),
        ({"gate_channels": 0}, "gate_channels must be an integer >= 1, got 0"),
        ({"kernel_size": 0}, "kernel_size must be an integer >= 1, got 0"),
        ({"local_channels": -1}, "local_channels must be an integer >= 0, got -1"),
    ],
)
def test_layer_refuses_sizes(options, message):
    with pytest.raises(ValueError, match=f"WaveNetLayer: {message}"):
        WaveNetLayer(3, 2, **options)
