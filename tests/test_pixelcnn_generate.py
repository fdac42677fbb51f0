"""Sampling pixel by pixel against one forward pass for each value: same uniforms, same image, on every backend."""

import pytest
import torch
from pixel_helpers import MODELS, conditions, images_like, loud, small

import fastgen
from fastgen import backend
from fastgen.models import GatedPixelCNN, PixelCNN, PixelSNAIL, sample_naive
from fastgen.ops import PixelDistribution, PixelGenerator, PixelProgram
from fastgen.ops.distributions import log_prob, sample_levels

OP = "pixelcnn_generate"
BACKENDS = ("cpu", "reference")
OPTIONS = (
    {"levels": 2}, {"levels": 2, "distribution": "categorical"}, {"levels": 7},
    {"levels": 256, "distribution": "logistic", "mixtures": 3, "image_channels": 3}, {"levels": 5, "image_channels": 3},
    {"codes": 30}, {"levels": 4, "classes": 3}, {"levels": 4, "classes": 3, "cond_codes": 9},
    {"levels": 4, "cond_channels": 2, "image_channels": 2},
)  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_cpu_kernels(need, one_thread):
    need(OP, "cpu")


def draw(model, batch, size, seed=2):
    return torch.rand(batch, model.image_channels, *size, generator=torch.Generator().manual_seed(seed))


def naive(model, batch, size, u, **kw):
    """In float64, the exact answer."""
    doubled = type(model)(**model.config).double()
    doubled.load_state_dict(model.state_dict())
    kw = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in kw.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastgen.use_backend("reference"):
        values = sample_naive(doubled, batch, size, uniforms=u, **kw)
    torch.set_num_threads(threads)
    return values


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_matches_naive_pixel_for_pixel(name, options, ran):
    model = small(name, **options)
    torch.set_num_threads(2)  # which one image is enough for
    for batch, size in ((3, (4, 6)), (1, (4, 10))):
        u, kw = draw(model, batch, size), conditions(model, batch, size)
        exact = naive(model, batch, size, u, **kw)
        assert exact.unique().numel() > 1, "the test's model must vary"
        for which in BACKENDS:
            with ran(OP, which):
                got = model.sample(batch, size, uniforms=u, backend=which, **kw)
            assert torch.equal(got, exact), which


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    """The same tests under each instruction set that this CPU has."""
    run_under(isa, "(naive and (levels or codes)) or teacher or bfloat16", "pixelcnn_generate")


def parameters(model, batch, size, which, dtype=torch.float32, **kw):
    """Values and parameters that the op computes while it samples."""
    with torch.no_grad():
        context = model._context(batch, size, kw.get("labels"), kw.get("cond"))
        loop, plane = model.generator(size, context, dtype, which)
        return loop.run(draw(model, batch, size), context=plane, parameters=True)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_teacher_forced_forward(name, which):
    model = small(name, levels=5, image_channels=3, classes=3, cond_codes=4)
    kw = conditions(model, 3, (8, 6))
    values, got = parameters(model, 3, (8, 6), which, **kw)
    model.double()
    with torch.no_grad(), fastgen.use_backend("reference"):
        exact = model(values, **kw).movedim(2, -1)
    torch.testing.assert_close(got.double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 3])
def test_bfloat16_weights(name, which, batch):
    """The error is that of rounded weights: the forward of a model whose matrices are rounded is close."""
    model = loud(small(name, levels=5), 1.0)
    values, got = parameters(model, batch, (8, 6), which, torch.bfloat16)
    rounded = type(model)(**model.config).double()
    rounded.load_state_dict(
        {k: v.bfloat16().double() if k.endswith("weight") else v.double() for k, v in model.state_dict().items()}
    )
    with torch.no_grad(), fastgen.use_backend("reference"):
        exact = rounded(values).movedim(2, -1)
        plain = model.double()(values).movedim(2, -1)
    own = float((exact - plain).norm())
    assert float((got - exact).norm()) < (0.6 if which == "cpu" else 1e-3) * own
    assert own < 0.05 * float(plain.norm())


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_any_number_of_threads_and_images(name, threads):
    torch.set_num_threads(threads)
    model = small(name, levels=4)
    for batch in (1, 2, 4, 7):
        u = draw(model, batch, (5, 7))
        assert torch.equal(model.sample(batch, (5, 7), uniforms=u), naive(model, batch, (5, 7), u))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 31)])
@pytest.mark.parametrize("name", MODELS)
def test_sizes(name, size, which):
    model = small(name, levels=3)
    u = draw(model, 2, size)
    assert torch.equal(model.sample(2, size, uniforms=u, backend=which), naive(model, 2, size, u))


@pytest.mark.parametrize("which", BACKENDS)
def test_no_images(which):
    assert small("GatedPixelCNN").sample(0, (4, 4), backend=which).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("kernels", [(5, 7), (3, 9), (1, 3), (7, 3)])
def test_other_kernels(kernels):
    model = loud(GatedPixelCNN(channels=70, layers=3, kernel_size=kernels[0], first_kernel_size=kernels[1], levels=3))
    u = draw(model, 2, (9, 8))
    assert torch.equal(model.sample(2, (9, 8), uniforms=u), naive(model, 2, (9, 8), u))
    model = loud(PixelCNN(channels=130, layers=2, kernel_size=kernels[0] + 1, first_kernel_size=kernels[1] + 1))
    assert torch.equal(model.sample(2, (9, 8), uniforms=u), naive(model, 2, (9, 8), u))


def test_channels_that_share_conversions():
    """64 channels: windows of pixels are converted to fixed point once."""
    torch.manual_seed(0)
    for model in (GatedPixelCNN(channels=64, layers=2), PixelCNN(channels=128, layers=2), PixelSNAIL(layers=1)):
        loud(model, 1.0)
        values, got = parameters(model, 2, (6, 7), "cpu", torch.bfloat16)
        with torch.no_grad():
            exact = model(values).movedim(2, -1)
        assert float((got - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_completion(name, which):
    """Known values stand, unknown ones are drawn given them: as the naive loop does."""
    model = small(name, levels=4, image_channels=2)
    given, u = images_like(model, 3, (6, 5)), draw(model, 3, (6, 5))
    known = torch.rand(3, 2, 6, 5) < 0.4
    exact = naive(model, 3, (6, 5), u, given=given, known=known)
    got = model.sample(3, (6, 5), given=given, known=known, uniforms=u, backend=which)
    assert torch.equal(got, exact)
    assert torch.equal(got[known], given[known])
    rows = torch.zeros(6, 1, dtype=torch.bool)
    rows[:3] = True
    half = model.sample(3, (6, 5), given=given, known=rows, uniforms=u, backend=which)
    assert torch.equal(half[:, :, :3], given[:, :, :3])
    marked = torch.where(rows, given, -1)
    assert torch.equal(half, model.sample(3, (6, 5), given=marked, uniforms=u, backend=which))


def test_temperature():
    model = small("GatedPixelCNN", levels=6)
    u = draw(model, 4, (6, 6))
    cold = model.sample(4, (6, 6), temperature=1e-6, uniforms=u)
    assert torch.equal(cold, model.sample(4, (6, 6), temperature=1e-6, uniforms=draw(model, 4, (6, 6), 9)))
    assert float(model.log_prob(cold).detach().mean()) > float(model.log_prob(model.sample(4, (6, 6))).detach().mean())
    got = model.sample(4, (6, 6), temperature=1.7, uniforms=u)
    assert torch.equal(got, naive(model, 4, (6, 6), u, temperature=1.7))


def test_seeds_progress_and_changed_weights():
    model = small("PixelCNN", levels=5)
    first = model.sample(2, (5, 6), generator=torch.Generator().manual_seed(3))
    seen = []
    again = model.sample(
        2, (5, 6), generator=torch.Generator().manual_seed(3), progress=lambda done, of: seen.append((done, of))
    )
    assert torch.equal(first, again)
    assert seen == [(i + 1, 5) for i in range(5)]
    with torch.no_grad():
        for p in model.parameters():
            p.data.mul_(1.5)
    u = draw(model, 2, (5, 6))
    assert torch.equal(model.sample(2, (5, 6), uniforms=u), naive(model, 2, (5, 6), u))
    with torch.no_grad():
        model.head.out.bias.add_(torch.randn(5))  # biases alone: the matrices are kept
    assert torch.equal(model.sample(2, (5, 6), uniforms=u), naive(model, 2, (5, 6), u))


def test_two_runs_give_the_same_bits():
    for batch in (1, 5):
        for dtype in (torch.float32, torch.bfloat16):
            model = small("PixelSNAIL", levels=5)
            runs = [parameters(model, batch, (7, 6), "cpu", dtype)[1] for _ in range(3)]
            assert torch.equal(runs[0], runs[1])
            assert torch.equal(runs[0], runs[2])


def test_weight_behind_the_mask_does_not_matter():
    model = small("GatedPixelCNN", levels=4)
    u = draw(model, 2, (5, 6))
    before = model.sample(2, (5, 6), uniforms=u)
    with torch.no_grad():
        model.blocks[0].vertical.weight[:, :, 2] = float("nan")
        model.blocks[1].horizontal.weight[..., 2] = float("inf")
    for which in BACKENDS:
        assert torch.equal(model.sample(2, (5, 6), uniforms=u, backend=which), before)


def test_logistic_levels_sum_to_one_and_invert():
    parameters = torch.randn(50, 9)
    levels = torch.arange(11)
    log_p = log_prob("logistic", parameters[:, None].expand(50, 11, 9), levels * (2 / 10) - 1.0, levels=11)
    torch.testing.assert_close(log_p.double().exp().sum(1), torch.ones(50).double(), atol=1e-5, rtol=0)
    u = torch.rand(50, 200)
    got = sample_levels("logistic", parameters[:, None].expand(50, 200, 9), u, 11)
    cumulative = log_p.double().exp().cumsum(1)
    exact = (cumulative[:, None] <= u[..., None]).sum(2).clamp(max=10)
    assert float((got != exact).double().mean()) < 1e-3


def test_opcheck_and_program_errors():
    p = PixelProgram(1)
    x = p.conv(p.input, torch.randn(2, 1, 1, 3), mask="A")
    p.sample(p.conv(x, torch.randn(3, 2, 1, 1)), 0)
    p.finish()
    generator = PixelGenerator(p, torch.randn(3, 1), PixelDistribution("categorical", 3, 3))
    assert generator.run(torch.rand(2, 1, 4, 5))[0].shape == (2, 1, 4, 5)
    with pytest.raises(ValueError, match="no live tap in a kernel of 1 x 1 with mask A"):
        p.conv(p.input, torch.randn(2, 1, 1, 1), mask="A")
    with pytest.raises(ValueError, match=r"dtype must be float32 or bfloat16, got torch\.float16"):
        PixelGenerator(p, torch.randn(3, 1), PixelDistribution("categorical", 3, 3), dtype=torch.float16)


U = torch.zeros(2, 1, 4, 6)
GIVEN = torch.zeros(2, 1, 4, 6, dtype=torch.int64)
BAD = {
    "batch": ({"batch_size": -1}, ValueError, "batch_size must be an integer >= 0, got -1"),
    "size": ({"image_size": 28}, ValueError, r"image_size must be \(height, width\), got 28"),
    "side": ({"image_size": (0, 4)}, ValueError, "each of image_size must be an integer >= 1, got 0"),
    "temperature": ({"temperature": 0}, ValueError, "temperature must be finite and > 0, got 0"),
    "uniforms": ({"uniforms": U[:1]}, ValueError, r"uniforms must be \(2, 1, 4, 6\), got \(1, 1, 4, 6\)"),
    "uniforms 1": ({"uniforms": U + 1}, ValueError, r"uniforms must lie in \[0, 1\), got 1.0 to 1.0"),
    "uniforms nan": ({"uniforms": U * float("nan")}, ValueError, r"uniforms must lie in \[0, 1\), got nan"),
    "uniforms type": ({"uniforms": GIVEN}, TypeError, "uniforms must be floating point, got torch.int64"),
    "uniforms list": ({"uniforms": [0.5]}, TypeError, "uniforms must be a tensor .* got list"),
    "generator": ({"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
    "progress": ({"progress": "yes"}, TypeError, "progress must be True, False or a function"),
    "dtype": ({"dtype": torch.float16}, ValueError, "dtype must be float32 or bfloat16, got torch.float16"),
    "backend": ({"backend": "triton"}, fastgen.BackendError, "'triton' was requested but cannot run"),
    "given": ({"given": GIVEN[:, :, :3]}, ValueError, r"given must be \(2, 1, 4, 6\), got \(2, 1, 3, 6\)"),
    "given level": ({"given": GIVEN + 4}, ValueError, r"given must lie in \[0, 4\), got 4 to 4"),
    "given floats": ({"given": U}, TypeError, "given must be int64 values"),
    "known alone": ({"known": GIVEN > 0}, ValueError, "given is missing"),
    "known shape": ({"given": GIVEN, "known": torch.ones(5, dtype=torch.bool)}, ValueError, "known must broadcast to"),
    "known type": ({"given": GIVEN, "known": GIVEN}, TypeError, "known must be bool, got torch.int64"),
    "known negative": ({"given": GIVEN - 1, "known": GIVEN == 0}, ValueError, "not be negative where known, got -1"),
    "labels": ({"labels": torch.tensor([0, 1])}, ValueError, "labels were given, but the model has classes=0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, kind, message = BAD[case]
    model = small("GatedPixelCNN", levels=4)
    with pytest.raises(kind, match=message):
        model.sample(**({"batch_size": 2, "image_size": (4, 6)} | change))


def test_weights_that_are_not_finite():
    model = small("PixelCNN", levels=4)
    with torch.no_grad():
        model.blocks[0].conv.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="weights must be finite"):
        model.sample(1, (4, 4))


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_that_are_not_finite(name, which):
    model = small(name, levels=5, cond_channels=2)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cond holds NaN or infinity"):
            model.sample(1, (4, 4), cond=torch.full((1, 2, 2, 2), value), backend=which)
    model = small(name, levels=5)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e25)
    with pytest.raises(ValueError, match="the network's outputs are not finite"):
        model.sample(2, (4, 4), backend=which)


def _program(features=1, outputs=4, color=0, **options):
    p = PixelProgram(features, **options)
    p.sample(p.conv(p.conv(p.input, torch.randn(8, features, 3, 3), mask="A"), torch.randn(outputs, 8, 1, 1)), color)
    return p


PROGRAMS = {
    r"table must be \(4, a divisor of 1\), got \(4, 40\)": lambda: (_program(), torch.zeros(4, 40)),
    r"table must be \(4, a divisor of 1\), got \(3, 1\)": lambda: (_program(), torch.zeros(3, 1)),
    r"must sample the colors 0 to 0 in order.*got \[7\]": lambda: (_program(color=7), torch.zeros(4, 1)),
    r"must sample the colors 0 to 1 in order.*got \[0\]": lambda: (_program(2), torch.zeros(4, 1)),
    "must sample from 4 parameters, got 2": lambda: (_program(outputs=2), torch.zeros(4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("which", BACKENDS)
@pytest.mark.parametrize("message", PROGRAMS)
def test_programs_that_do_not_fit(message, which):
    program, table = PROGRAMS[message]()
    with pytest.raises(ValueError, match=message):
        PixelGenerator(program, table, PixelDistribution("categorical", 4, 4), backend=which)


@pytest.mark.parametrize("which", BACKENDS)
def test_uniforms_of_any_floating_type(which):
    generator = PixelGenerator(
        _program(), torch.linspace(-1, 1, 4)[:, None], PixelDistribution("categorical", 4, 4), backend=which
    )
    u = torch.rand(2, 1, 9, 9).bfloat16().clamp(max=0.99)
    values, parameters = generator.run(u.float(), parameters=True)
    for dtype in (torch.bfloat16, torch.float64):
        got = generator.run(u.to(dtype), parameters=True)
        assert torch.equal(got[0], values)
        assert torch.equal(got[1], parameters)


def test_threads_divide_the_halves_of_a_gate_alike():
    """One image, two threads: a sum of planes of 3 x 16 gate channels, written as a sum, read as a gate."""
    torch.set_num_threads(2)
    p = PixelProgram(1)
    h = p.conv(p.input, torch.randn(48, 1, 3, 3), mask="A")
    for _ in range(4):
        other = p.conv(h, torch.randn(96, 48, 1, 1) / 7, halves=2)
        h = p.gate(p.conv(h, torch.randn(96, 48, 3, 3) / 14, add=other, halves=2))
    p.sample(p.conv(h, torch.randn(4, 48, 1, 1)), 0)
    u = torch.rand(1, 1, 12, 12)
    runs = [
        PixelGenerator(
            p, torch.linspace(-1, 1, 4)[:, None], PixelDistribution("categorical", 4, 4), backend=which
        ).run(u, parameters=True)
        for which in ("reference", *["cpu"] * 5)
    ]  # fmt: skip
    for values, parameters in runs[1:]:
        assert torch.equal(values, runs[0][0])
        torch.testing.assert_close(parameters, runs[0][1], atol=1e-5, rtol=1e-5)


def test_calls_of_a_generator_that_do_not_fit():
    generator = PixelGenerator(_program(), torch.zeros(4, 1), PixelDistribution("categorical", 4, 4))
    u = torch.rand(2, 1, 5, 5)
    known, given = torch.ones(2, 1, 5, 5, dtype=torch.bool), torch.zeros(2, 1, 5, 5, dtype=torch.int64)
    for options, message in (
        ({"uniforms": u[0]}, r"uniforms must be \(B, 1, H, W\)"),
        ({"uniforms": u.expand(2, 3, 5, 5)}, r"uniforms must be \(B, 1, H, W\)"),
        ({"given": given + 10**9, "known": known}, r"given must lie in \[0, 4\)"),
        ({"given": given[:1], "known": known}, r"given must be \(2, 1, 5, 5\) torch.int64, got \(1, 1, 5, 5\)"),
        ({"given": given, "known": given}, "known must be .* torch.bool, got .* torch.int64"),
        ({"given": given}, "given and known belong together"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"context": u}, "context must be there where the program has context channels"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.run(**{"uniforms": u} | options)
    generator = PixelGenerator(_program(context_channels=3), torch.zeros(4, 1), PixelDistribution("categorical", 4, 4))
    for context in (None, torch.zeros(2, 300, 2, 2)):
        with pytest.raises(ValueError, match="context must be"):
            generator.run(u, context=context)
    p = PixelProgram(4)
    with pytest.raises(ValueError, match="weight must have at most the plane's 4 channels, got 5 from channel 0 on"):
        p.conv(p.input, torch.randn(2, 5, 1, 1))
    with pytest.raises(ValueError, match=r"mask must be one of .*got 'C'"):
        p.conv(p.input, torch.randn(2, 4, 1, 1), mask="C")
    one, two = (p.conv(p.input, torch.randn(8, 4, 1, 1), halves=n) for n in (1, 2))
    other = p.conv(p.input, torch.randn(6, 4, 1, 1))
    for call, message in (
        (lambda: p.gate(one), "gate needs a plane of two halves"),
        (lambda: p.glu(one), "glu needs a plane of two halves"),
        (lambda: p.add(one, two), "the same channels and halves, got 8 and 1, 8 and 2"),
        (lambda: p.add(one, other), "the same channels and halves, got 8 and 1, 6 and 1"),
        (lambda: p.conv(p.input, torch.randn(8, 4, 1, 1), add=two), "the same channels and halves"),
        (lambda: p.conv(p.input, torch.randn(8, 4, 3, 3), mask="vertical_B"), "sees pixels to the right"),
        (lambda: p.conv(p.input, torch.randn(7, 4, 1, 1), halves=2), "halves must be 1, 2 or 4 and divide 7 outputs"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="heads must divide 4 and 8 channels, got 3"):
        p.attention(p.input, 8, 3, lambda: (0, 0))


def test_the_program_of_the_modules_head():
    p = PixelProgram(features=1)
    v = p.conv(p.input, torch.randn(10, 1, 3, 3), torch.randn(10), mask="vertical")
    h = p.conv(p.input, torch.randn(10, 1, 1, 3), torch.randn(10), mask="A")
    z = p.gate(
        p.conv(
            h, torch.randn(20, 10, 1, 3), torch.randn(20), mask="B",
            add=p.conv(v, torch.randn(20, 10, 1, 1), halves=2), halves=2,
        )
    )  # fmt: skip
    p.sample(p.conv(z, torch.randn(4, 10, 1, 1), torch.randn(4)), color=0)
    u, drawn = torch.rand(2, 1, 4, 5), {}
    for which in BACKENDS:
        generator = PixelGenerator(p, torch.randn(4, 1, generator=torch.Generator().manual_seed(0)),
                                   PixelDistribution("categorical", 4, 4), backend=which)  # fmt: skip
        drawn[which] = generator.run(u, parameters=True)
    torch.testing.assert_close(drawn["cpu"][1], drawn["reference"][1], atol=1e-4, rtol=1e-4)
    assert torch.equal(drawn["cpu"][0], drawn["reference"][0])


def test_two_threads_and_planes_that_share_memory(need):
    """A plane takes the memory of one that nothing reads any more, but the other thread may not be that far."""
    need("pixelcnn_generate", "cpu")
    p = PixelProgram(features=1)
    a = p.conv(p.input, torch.randn(64, 1, 3, 3), torch.randn(64), mask="vertical")
    b = p.relu(a)
    c = p.conv(b, torch.randn(64, 64, 1, 1) / 8, torch.randn(64), mask="vertical_B")
    f = p.add(p.relu(c), p.relu(a))  # the last ReLU's result lies where b was
    p.sample(p.conv(f, torch.randn(4, 64, 1, 1) / 8, torch.randn(4), mask="B"), 0)
    p.finish()
    generator = PixelGenerator(p, torch.randn(4, 1), PixelDistribution("categorical", 4, 4), backend="cpu")
    uniforms = torch.rand(1, 1, 12, 100)
    torch.set_num_threads(1)
    _, alone = generator.run(uniforms, parameters=True)
    torch.set_num_threads(2)
    for _ in range(60):
        assert torch.equal(generator.run(uniforms, parameters=True)[1], alone)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("size", [(4, 5), (1, 1)])
def test_a_wide_convolution_of_the_context(size, backend, need):
    need("pixelcnn_generate", backend)
    p = PixelProgram(features=1, context_channels=2)
    weight, context = torch.randn(3, 2, 3, 3), torch.randn(1, 2, *size)
    p.sample(p.conv(p.context, weight, mask="vertical_B"), 0)
    p.finish()
    generator = PixelGenerator(p, torch.zeros(3, 1), PixelDistribution("categorical", 3, 3), backend=backend)
    _, parameters = generator.run(torch.rand(1, 1, *size), context=context, parameters=True)
    expected = fastgen.ops.masked_conv2d(context, weight, mask="vertical_B")
    torch.testing.assert_close(parameters[:, 0].movedim(-1, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize(
    "make", [lambda: small("GatedPixelCNN", levels=4), lambda: fastgen.models.PixelRNN(levels=4, channels=8, layers=1)]
)
def test_weights_of_the_older_weight_norm_are_current(make):
    """Changed since the last forward pass."""
    model = loud(make())
    torch.nn.utils.weight_norm(model.head.out)
    uniforms = torch.rand(3, 1, 5, 5)
    before = model.sample(3, (5, 5), uniforms=uniforms)
    with torch.no_grad():
        model.head.out.weight_g.mul_(-3)
    drawn = model.sample(3, (5, 5), uniforms=uniforms)
    assert not torch.equal(drawn, before)
    assert torch.equal(drawn, sample_naive(model, 3, (5, 5), uniforms=uniforms))
