"""PixelRNN and GPTPrior: what a pixel sees, the likelihood, and drawing step by step."""

import itertools

import pytest
import torch
from pixel_helpers import conditions, images_like, loud

from fastgen.models import GPTPrior, PixelRNN, sample_naive
from fastgen.nn import DiagonalBiLSTM, RowLSTM
from fastgen.nn.pixel_lstm import skewed, unskewed


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


def test_skewing():
    x = torch.randn(2, 3, 4, 5)
    y = skewed(x)
    for i in range(4):
        assert torch.equal(y[:, :, i, i : i + 5], x[:, :, i])
        assert not y[:, :, i, :i].any()
        assert not y[:, :, i, i + 5 :].any()
    assert torch.equal(unskewed(y, 5), x)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["row", "diagonal"])
def test_layers_step_as_they_run(kind):
    x, e, context = torch.randn(2, 3, 5, 6), torch.randn(2, 1, 5, 6), torch.randn(2, 2, 5, 6)
    layer = RowLSTM(3, 4, 5, 2) if kind == "row" else DiagonalBiLSTM(3, 1, 4, 2)
    whole = layer(x, context) if kind == "row" else layer(x, e, context)
    steps = layer.steps(2, (5, 6), context)
    for i, j in itertools.product(range(5), range(6)):
        torch.testing.assert_close(steps(i, j, x[:, :, i, j]), whole[:, :, i, j])
        if kind == "diagonal":
            steps.put(j, e[:, :, i, j])


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("row", {"levels": 2, "classes": 3}), ("row", {"levels": 4, "image_channels": 3, "cond_channels": 2}),
        ("diagonal", {"levels": 2}), ("diagonal", {"codes": 5, "cond_codes": 4, "classes": 2}),
        ("diagonal", {"levels": 4, "image_channels": 2, "cond_codes": 3}),
        ("gpt", {}), ("gpt", {"classes": 3}), ("gpt", {"cond_codes": 4}),
    ],
    ids=str,
)  # fmt: skip
def test_draws_what_a_pass_for_each_pixel_would(name, options):
    size = (4, 6)
    model = make(name, size, **options)
    kw = conditions(model, 3, size)
    shape = (3, *size) if model.codes else (3, model.image_channels, *size)
    uniforms = torch.rand(shape)
    drawn = model.sample(3, size, uniforms=uniforms, temperature=0.9, **kw)
    assert torch.equal(drawn, sample_naive(model, 3, size, uniforms=uniforms, temperature=0.9, **kw))
    known = torch.rand(size) < 0.5
    given = torch.randint(model.levels, shape)
    completed = model.sample(3, size, uniforms=uniforms, given=given, known=known, **kw)
    assert torch.equal(completed, sample_naive(model, 3, size, uniforms=uniforms, given=given, known=known, **kw))
    assert torch.equal(completed[..., known], given[..., known])
    rows = []
    model.sample(3, size, uniforms=uniforms, progress=lambda done, total: rows.append((done, total)), **kw)
    assert rows == [(i, 4) for i in range(1, 5)]


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


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
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
        (lambda: gpt((2, 3)).sample(1, (2, 3), dtype=torch.bfloat16), ValueError, "dtype must be torch.float32"),
        (lambda: gpt((2, 3)).sample(1, (2, 3), backend="cpu"), ValueError, "backend must be 'auto' or 'reference'"),
        (lambda: gpt((2, 3)).generator((2, 3)), NotImplementedError, "GPTPrior: is drawn step by step"),
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
