"""PixelRNN and GPTPrior: what a pixel sees, the likelihood, and drawing."""

import itertools

import pytest
import torch
from pixel_helpers import conditions, images_like, loud

import fastgen
from fastgen import backend
from fastgen.models import GPTPrior, PixelRNN, sample_naive
from fastgen.nn import RowLSTM
from fastgen.ops import PixelDistribution, PixelGenerator, PixelProgram

OP = "pixelcnn_generate"
BACKENDS = ("cpu", "reference")


@pytest.fixture(autouse=True)
def _small_tensors(one_thread):
    pass


def rnn(kind, **options):
    return loud(PixelRNN(channels=8, layers=2, kind=kind, context_channels=6, **options)).eval()


def gpt(size, codes=5, **options):
    model = loud(GPTPrior(codes, size, channels=12, layers=2, heads=3, context_channels=6, **options)).eval()
    torch.nn.init.normal_(model.place)
    return model


def make(name, size, **options):
    return gpt(size, **options) if name == "gpt" else rnn(name, **options)


def seen_by(model, size, at):
    """Which pixels change the parameters at one pixel."""
    x = images_like(model, 1, size)
    before = model(x)[0, :, :, at[0], at[1]]
    seen = torch.zeros(size, dtype=torch.bool)
    for i, j in itertools.product(*map(range, size)):
        changed = x.clone()
        changed[0, 0, i, j] = (x[0, 0, i, j] + 1) % model.levels
        seen[i, j] = bool((model(changed)[0, :, :, at[0], at[1]] != before).any())
    return seen


@torch.no_grad()
@pytest.mark.parametrize("name", ["diagonal", "gpt"])
def test_sees_every_pixel_before(name):
    model = make(name, (5, 6), **({} if name == "gpt" else {"levels": 5, "first_kernel_size": 3})).double()
    for at in ((0, 0), (0, 3), (2, 0), (3, 2), (4, 5)):
        seen = seen_by(model, (5, 6), at).flatten()
        place = at[0] * 6 + at[1]
        assert seen[:place].all()
        assert not seen[place:].any()


@torch.no_grad()
def test_a_row_lstm_sees_a_triangle():
    model = rnn("row", levels=5, first_kernel_size=3).double()
    seen = seen_by(model, (6, 15), (5, 7))
    assert not seen[5, 7:].any()
    assert seen[5, 7 - 3 : 7].all()  # the first layer and each LSTM look one pixel to the left
    assert not seen[5, : 7 - 3].any()
    for above in (1, 2):
        assert seen[5 - above, 7 - above : 7 + above].all()
        assert not seen[5 - above, 7 + above + 2 :].any()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("row", {"levels": 2}), ("diagonal", {"levels": 2, "image_channels": 2}), ("diagonal", {"levels": 3}),
        ("row", {"codes": 3}), ("gpt", {"codes": 3}), ("gpt", {"codes": 2, "classes": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_probabilities_sum_to_one(name, options):
    size = (2, 3) if options.get("image_channels", 1) == 1 else (3, 1)
    model = make(name, size, **options).double()
    every = torch.tensor(list(itertools.product(range(model.levels), repeat=6)))
    every = every.reshape(-1, *size) if model.codes else every.reshape(-1, model.image_channels, *size)
    log_p = model.log_prob(every, **conditions(model, len(every), size) | labels_of(model, len(every)))
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-4)
    assert float(log_p.exp().std() / log_p.exp().mean()) > 0.1


def labels_of(model, batch):
    """One class for all."""
    return {"labels": torch.ones(batch, dtype=torch.int64)} if model.config["classes"] else {}


CONDITIONED = pytest.mark.parametrize(
    ("name", "options"),
    [
        ("row", {"levels": 2, "classes": 3}), ("row", {"levels": 4, "image_channels": 3, "cond_channels": 2}),
        ("diagonal", {"levels": 2}), ("diagonal", {"codes": 5, "cond_codes": 4, "classes": 2}),
        ("diagonal", {"levels": 4, "image_channels": 2, "classes": 3}), ("row", {"levels": 3, "kernel_size": 5}),
        ("diagonal", {"levels": 4, "image_channels": 2, "cond_codes": 3}),
        ("gpt", {}), ("gpt", {"classes": 3}), ("gpt", {"cond_codes": 4}),
    ],
    ids=str,
)  # fmt: skip


@CONDITIONED
def test_draws_what_a_pass_for_each_pixel_would(name, options, need, ran):
    need(OP, "cpu")
    size = (4, 6)
    model = make(name, size, **options).double()
    kw = conditions(model, 3, size)
    kw = {k: v.double() if v.is_floating_point() else v for k, v in kw.items()}
    shape = (3, *size) if model.codes else (3, model.image_channels, *size)
    uniforms, known, given = torch.rand(shape), torch.rand(size) < 0.5, torch.randint(model.levels, shape)
    exact = sample_naive(model, 3, size, uniforms=uniforms, temperature=0.9, **kw)
    completed = sample_naive(model, 3, size, uniforms=uniforms, given=given, known=known, **kw)
    model, rows = model.float(), []
    kw = {k: v.float() if v.is_floating_point() else v for k, v in kw.items()}
    for which, threads in (("cpu", 1), ("cpu", 2), ("reference", 1)):
        torch.set_num_threads(threads)
        with ran(OP, which):
            drawn = model.sample(3, size, uniforms=uniforms, temperature=0.9, backend=which, **kw)
        assert torch.equal(drawn, exact)
        got = model.sample(3, size, uniforms=uniforms, given=given, known=known, backend=which, **kw)
        assert torch.equal(got, completed)
        one = {k: v[:1] for k, v in kw.items()}  # which two threads share
        assert torch.equal(model.sample(1, size, uniforms=uniforms[:1], temperature=0.9, **one), exact[:1])
    model.sample(3, size, uniforms=uniforms, progress=lambda done, total: rows.append((done, total)), **kw)
    assert rows == [(i, 4) for i in range(1, 5)]


def parameters(model, size, which, dtype=torch.float32, **kw):
    """Of two images, with the values drawn."""
    with torch.no_grad():
        context = model._context(2, size, kw.get("labels"), kw.get("cond"))
        loop, plane = model.generator(size, context, dtype, which)
        return loop.run(torch.rand(2, model.image_channels, *size), context=plane, parameters=True)


@pytest.mark.parametrize("which", BACKENDS)
@CONDITIONED
def test_parameters_are_those_of_the_teacher_forced_forward(name, options, which, need):
    need(OP, "cpu")
    size = (5, 6)
    model = make(name, size, **options)
    kw = conditions(model, 2, (5, 6))
    values, got = parameters(model, size, which, **kw)
    with torch.no_grad(), fastgen.use_backend("reference"):
        kw = {k: v.double() if v.is_floating_point() else v for k, v in kw.items()}
        exact = model.double()(values, **kw).movedim(2, -1)
    torch.testing.assert_close(got.double(), exact, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["row", "diagonal", "gpt"])
def test_larger_networks(name, need):
    """Channels of several vectors, and heads of several blocks of pixels."""
    need(OP, "cpu")
    torch.manual_seed(0)
    size = (9, 11)
    if name == "gpt":
        model = GPTPrior(5, size, channels=144, layers=2, heads=2)
        torch.nn.init.normal_(model.place)
    else:
        model = PixelRNN(channels=140, layers=2, kind=name, levels=4)
    loud(model, 1.0).eval()
    values, got = parameters(model, size, "cpu")
    rounded, of_rounded = parameters(model, size, "cpu", torch.bfloat16)
    with torch.no_grad():
        exact = model.double()(values).movedim(2, -1)
        close = model(rounded).movedim(2, -1)
    torch.testing.assert_close(got.double(), exact, atol=2e-5, rtol=2e-5)
    assert float((of_rounded - close).norm()) < 0.02 * float(close.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_network_that_reads_the_cells(dtype, need):
    """What an LSTM writes beside h is known to be written, by the other thread too."""
    need(OP, "cpu")
    torch.manual_seed(0)
    hidden, p = 96, PixelProgram(4)
    for _ in range(2):
        h, c = p.state(hidden), p.state(hidden)
        gates = p.conv(p.input, torch.randn(4 * hidden, 4, 1, 3), mask="A", halves=4)
        first = p.linear(p.lstm(gates, h, c, dx=-1), torch.randn(5, hidden), add=p.linear(c, torch.randn(5, hidden)))
        p.lstm(p.linear(c, torch.randn(4 * hidden, hidden) / 8, halves=4), p.state(hidden), c, dx=-1)
    p.sample(p.linear(c, torch.randn(5, hidden), add=first), 0)
    make = p, torch.randn(5, 4), PixelDistribution("categorical", 5, 5)
    u = torch.rand(1, 1, 5, 8)
    exact = PixelGenerator(*make, dtype=dtype, backend="reference").run(u, parameters=True)[1]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(20):
            got = PixelGenerator(*make, dtype=dtype, backend="cpu").run(u, parameters=True)[1]
            assert float((got - exact).norm() / exact.norm()) < (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("isa", backend.ISAS)
def test_every_instruction_set(isa, run_under):
    """The same tests under each instruction set that this CPU has."""
    run_under(isa, "would or teacher or larger or cells", "pixelrnn")


def test_programs_that_do_not_fit():
    p = PixelProgram(4)
    gates, row = (
        p.conv(p.input, torch.randn(8, 4, 1, 1), halves=4),
        p.conv(p.input, torch.randn(8, 4, 3, 3), mask="vertical"),
    )
    back = p.state(4, "back")
    for call, message in (
        (lambda: p.lstm(row, p.state(2), p.state(2)), "lstm needs a plane of four gates; make plane .* with halves=4"),
        (lambda: p.lstm(gates, p.state(2), p.state(3)), "a quarter of the gates' 8 channels, got 3"),
        (lambda: p.previous(row), "previous needs a plane of the pixel phase"),
        (lambda: p.norm(p.input, torch.ones(3), torch.ones(4)), r"scale must be \(4,\), as the plane's.*got \(3,\)"),
        (lambda: p.gelu(gates), "gelu needs a plane that is not of halves"),
        (lambda: p.attention(gates, 8, 2, lambda: (0, 0)), "attention needs a plane that is not of halves"),
        (
            lambda: p.right(back, torch.ones(8, 3), p.linear(row, torch.ones(8, 8), halves=4)),
            "the plane's 4 channels, got 3",
        ),
        (lambda: p.right(back, torch.ones(8, 4), gates), "right runs before the pixels of a row are drawn"),
        (lambda: p.lstm(gates, p.state(2, "back"), p.state(2, "back"), dx=1), "h and c must be states of one phase"),
        (lambda: p.lstm(gates, p.state(2), p.state(2, "back"), dx=-1), "h and c must be states of one phase"),
        (lambda: p.lstm(gates, p.state(2), p.state(2), dx=1), r"c must come from the row above .* got dy=0, dx=1"),
        (lambda: p.lstm(gates, p.state(2), p.state(2)), r"c must come from the row above .* got dy=0, dx=0"),
        (lambda: p.linear(gates, torch.ones(3, 8)), "conv needs a plane that is not of halves"),
        (lambda: p.sample(gates, 0), "sample needs a plane that is not of halves"),
        (lambda: p.attention(p.input, 8, 2, lambda: (p.input, p.input), own=True), "4 and 8 channels, got 4 for 8"),
        (lambda: p.conv(back, torch.randn(8, 4, 1, 3)), "sees pixels to the left, which plane"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", ["row", "diagonal", "gpt"])
def test_gradients_reach_every_parameter(name):
    model = make(name, (4, 6), classes=3)
    x = images_like(model, 2, (4, 6))
    model.train().log_prob(x, labels=torch.tensor([0, 2])).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name


def test_sequences_and_dropout():
    model = gpt((1, 7), dropout=0.5)
    x = torch.randint(5, (3, 1, 7))
    assert torch.equal(model.log_prob(x), model.log_prob(x))
    model.train()
    assert not torch.equal(model.log_prob(x), model.log_prob(x))
    assert model.eval().sample(2, (1, 7)).shape == (2, 1, 7)
    assert model.sample(0, (1, 7)).shape == (0, 1, 7)


def read_early(kind):
    p = PixelProgram(1)
    state = p.state(3)
    p.linear(state, torch.randn(12, 3)) if kind == "linear" else p.relu(state)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            lambda: read_early("linear"),
            ValueError,
            "conv reads state 1 at its own pixel, where no lstm has made it yet",
        ),
        (lambda: read_early("relu"), ValueError, "relu reads state 1 at its own pixel"),
        (lambda: PixelRNN(channels=7), ValueError, "PixelRNN: channels must be even, got 7"),
        (lambda: PixelRNN(kernel_size=4), ValueError, "PixelRNN: kernel_size must be odd, got 4"),
        (lambda: PixelRNN(first_kernel_size=1), ValueError, "first_kernel_size must be at least 3, got 1"),
        (lambda: PixelRNN(kind="spiral"), ValueError, r"kind must be one of \('row', 'diagonal'\), got 'spiral'"),
        (lambda: RowLSTM(4, 4, 2), ValueError, "RowLSTM: kernel_size must be odd, got 2"),
        (lambda: GPTPrior(heads=3), ValueError, "GPTPrior: heads must divide channels, got 3 for 128"),
        (lambda: GPTPrior(1), ValueError, "GPTPrior: codes must be an integer >= 2, got 1"),
        (lambda: GPTPrior(image_size=8), ValueError, r"image_size must be \(height, width\), got 8"),
        (lambda: GPTPrior(dropout=1), ValueError, r"dropout must lie in \[0, 1\), got 1"),
        (lambda: gpt((2, 3)).sample(1, (3, 2)), ValueError, r"maps must be \(2, 3\), .* got \(3, 2\)"),
        (lambda: gpt((2, 3)).log_prob(torch.zeros(1, 3, 2).long()), ValueError, r"maps must be \(2, 3\)"),
        (lambda: gpt((2, 3)).log_prob(torch.full((1, 2, 3), 5)), ValueError, r"\[0, 5\), got 5"),
    ],
)
def test_bad_input(make, error, text):
    with pytest.raises(error, match=text):
        make()


@torch.no_grad()
@pytest.mark.parametrize("name", ["diagonal", "gpt"])
def test_draws_from_the_whole_distribution_after_a_cast(name):
    """Probabilities of 1/512 and their sums have no place in bfloat16."""
    codes = 512
    options = {"codes": codes, "channels": 16, "layers": 1}
    model = GPTPrior(image_size=(1, 1), heads=2, **options) if name == "gpt" else PixelRNN(**options)
    for p in model.head.out.parameters():
        p.zero_()
    uniforms = ((torch.arange(codes) + 0.5) / codes)[:, None, None]
    drawn = model.bfloat16().sample(codes, (1, 1), uniforms=uniforms)
    assert torch.equal(drawn.flatten(), torch.arange(codes))


def normed_above(p):
    above = p.conv(p.input, torch.randn(3, 1, 3, 3), mask="vertical")
    return p.norm(above, torch.ones(3), torch.zeros(3))


def shared_cell(p):
    c = p.state(3)
    h = p.lstm(p.linear(p.previous(p.input), torch.randn(12, 1), halves=4), p.state(3), c, dx=-1)
    return p.add(h, c)


def right_of_row(p):
    above = p.conv(p.input, torch.randn(12, 1, 3, 3), mask="vertical", halves=4)
    x = p.conv(p.input, torch.randn(3, 1, 3, 3), mask="vertical")
    return p.lstm(p.right(x, torch.randn(12, 3), above), p.state(3, "back"), p.state(3, "back"), dx=1)


def masked_behind(p):
    return p.conv(p.relu(p.conv(p.input, torch.randn(3, 1, 1, 3), mask="A")), torch.randn(3, 3, 1, 3), mask="A")


def cell_of_another(p):
    c, h = p.state(3), p.state(3)
    for states in ((c, p.state(3)), (h, c)):
        p.lstm(p.linear(p.previous(p.input), torch.randn(12, 1), halves=4), *states, dx=-1)
    return h


def not_yet_whole(p):
    return p.conv(p.input, torch.randn(3, 1, 1, 3))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (normed_above, "layer norms are of single pixels"),
        (shared_cell, "LSTMs have cells of their own"),
        (cell_of_another, "LSTMs have cells of their own"),
        (right_of_row, "convolutions are of planes that grow there"),
        (masked_behind, "beside the pixel before it makes it"),
        (not_yet_whole, "windows end at a pixel that is whole"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_cuda_kernels_lack_some_programs(make, reason, monkeypatch):
    """They are refused, not misread."""
    monkeypatch.setattr("fastgen.ops.pixelcnn_generate.resolve", lambda *_: "cuda")
    monkeypatch.setattr(fastgen.backend, "_warned", set())
    program = PixelProgram(1)
    program.sample(make(program), 0)
    arguments = (program, torch.randn(3, 1), PixelDistribution("categorical", 3, 3))
    with pytest.raises(fastgen.BackendError, match=reason):
        PixelGenerator(*arguments, backend="cuda")
    with pytest.warns(RuntimeWarning, match=reason):
        assert PixelGenerator(*arguments).backend == "reference"
