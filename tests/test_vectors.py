"""NADE and FVSBN: their probabilities, their samples, and what they refuse."""

import itertools

import pytest
import torch

from fastgen.models import FVSBN, NADE

MODELS = {
    "FVSBN": lambda inputs, **o: FVSBN(inputs, **o),
    "NADE": lambda inputs, **o: NADE(inputs, hidden=9, **o),
}
BACKENDS = ["cpu", "reference"]


def model_of(name, inputs=6, **options):
    torch.manual_seed(0)
    model = MODELS[name](inputs, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def everything(inputs, values=2):
    return torch.tensor(list(itertools.product(range(values), repeat=inputs)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [None, [3, 0, 5, 1, 4, 2]])
@pytest.mark.parametrize("name", MODELS)
def test_probabilities_sum_to_one(name, order, backend):
    model = model_of(name, order=order)
    assert abs(float(model.log_prob(everything(6), backend=backend).double().exp().sum()) - 1) < 1e-5


def test_probabilities_of_many_values_sum_to_one():
    model = model_of("NADE", inputs=4, values=5, order=[2, 3, 1, 0])
    assert abs(float(model.log_prob(everything(4, 5)).double().exp().sum()) - 1) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_an_input_depends_on_those_before_it_in_the_order(name):
    order = [3, 0, 5, 1, 4, 2]
    model = model_of(name, order=order)
    x = torch.randint(2, (4, 6))
    before = model(x)
    for place, d in enumerate(order):
        other = x.clone()
        other[:, d] = 1 - other[:, d]
        changed = (model(other) != before).flatten(2).any(2).any(0)
        assert changed.nonzero()[:, 0].tolist() == sorted(order[place + 1 :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_samples_follow_the_probabilities(name, backend):
    model = model_of(name, inputs=3, order=[2, 0, 1])
    x = model.sample(100_000, generator=torch.Generator().manual_seed(0), backend=backend)
    counts = torch.bincount(x @ torch.tensor([4, 2, 1]), minlength=8) / len(x)
    torch.testing.assert_close(counts, model.log_prob(everything(3)).exp().detach(), atol=8e-3, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_completion_keeps_what_is_known(name):
    model = model_of(name, order=[5, 4, 3, 2, 1, 0])
    given = torch.randint(2, (7, 6))
    known = torch.tensor([True, False, False, True, False, True])
    uniforms = torch.rand(7, 6)
    x = model.sample(7, given=given, known=known, uniforms=uniforms)
    assert torch.equal(x[:, known], given[:, known])
    negative = torch.where(known, given, -1)
    assert torch.equal(model.sample(7, given=negative, uniforms=uniforms), x)
    assert model.sample(0).shape == (0, 6)


@pytest.mark.parametrize("name", MODELS)
def test_cold_samples_are_the_likeliest_values(name):
    model = model_of(name)
    x = model.sample(4, temperature=1e-4)
    assert torch.equal(x, (model(x)[..., 0] > 0).long())


@pytest.mark.parametrize("name", MODELS)
def test_learns_and_is_saved(name):
    torch.manual_seed(0)
    first = torch.randint(2, (256, 1))
    x = torch.cat([first, 1 - first, first, torch.randint(2, (256, 1))], 1)  # one bit of these is free, and the last
    model = MODELS[name](4, order=[1, 0, 3, 2])
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(150):
        loss = -model.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss) < 2 * 0.6932 + 0.05
    again = type(model)(**model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    assert torch.equal(model.bits_per_dim(x), -model.log_prob(x) / (4 * torch.log(torch.tensor(2.0))))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
def test_any_dtype_of_whole_numbers(dtype):
    model = model_of("NADE")
    x = torch.randint(2, (5, 6))
    assert torch.equal(model.log_prob(x.to(dtype)), model.log_prob(x))


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda m: m(torch.rand(2, 6)), ValueError, r"x must hold whole numbers in \[0, 2\), got 0\.\d+; binarise"),
    (lambda m: m(torch.full((2, 6), 2)), ValueError, r"x must lie in \[0, 2\), got 2 to 2"),
    (lambda m: m(torch.zeros(2, 5)), ValueError, r"x must be \(B, 6\), got \(2, 5\)"),
    (lambda m: m([0]), TypeError, "x must be a tensor"),
    (lambda m: m.sample(-1), ValueError, "batch_size must be"),
    (lambda m: m.sample(2, temperature=0), ValueError, "temperature"),
    (lambda m: m.sample(2, uniforms=torch.rand(2, 5)), ValueError, r"uniforms must be \(2, 6\)"),
    (lambda m: m.sample(2, uniforms=torch.ones(2, 6)), ValueError, r"uniforms must lie in \[0, 1\)"),
    (lambda m: m.sample(2, given=torch.zeros(2, 5).long()), ValueError, r"given must be \(2, 6\) int64"),
    (lambda m: m.sample(2, given=torch.full((2, 6), 3)), ValueError, r"given must lie in \[0, 2\)"),
    (lambda m: m.sample(2, known=torch.ones(6).bool()), ValueError, "known was given without"),
    (lambda m: type(m)(6, order=[0, 1, 2, 3, 4, 4]), ValueError, "order must hold each of 0 to 5 once, got"),
    (lambda m: m.sample(2, given=torch.zeros(2, 6).long(), known=torch.ones(3).bool()), ValueError, "known must broad"),
    (lambda m: type(m)(6, order=5), TypeError, "order must be 6 whole numbers, got 5"),
    (lambda m: type(m)(6, order=[0, 1]), ValueError, r"order must hold each of 0 to 5 once, got torch.int64 \(2,\)$"),
    (lambda m: type(m)(0), ValueError, "inputs must be"),
])  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_bad_input(name, call, error, message):
    with pytest.raises(error, match=message):
        call(model_of(name))


@pytest.mark.parametrize("name", MODELS)
def test_orders_of_any_whole_numbers_and_weights_that_are_none(name):
    order = torch.tensor([5, 3, 1, 0, 2, 4])
    model = type(model_of(name))(6, order=order.int())
    assert torch.equal(model.order, order)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"weights must be finite, \w+ is not"):
        model.sample(2)


@pytest.mark.parametrize("model", [FVSBN, NADE])
def test_an_order_that_is_loaded_counts(model):
    x = torch.randint(2, (5, 6))
    ordered, other = model(6, order=[3, 0, 5, 1, 4, 2]), model(6)
    for parameter in ordered.parameters():
        torch.nn.init.normal_(parameter)
    other.log_prob(x)
    other.load_state_dict(ordered.state_dict())
    assert torch.equal(other.log_prob(x), ordered.log_prob(x))
    other.order.copy_(torch.arange(6))
    assert not torch.equal(other.log_prob(x), ordered.log_prob(x))
