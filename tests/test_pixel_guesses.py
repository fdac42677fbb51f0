"""Several pixels at once, from guesses of their neighbors: drawn as if they had been known. And images in turns."""

import pytest
import torch
from pixel_helpers import conditions, small

import fastgen
from fastgen.models import GatedPixelCNN
from fastgen.ops import PixelDistribution, PixelGenerator, PixelProgram
from fastgen.ops.pixel_layout import layout_of

OP = "pixelcnn_generate"
KINDS = {
    "two levels": {"levels": 2},
    "colors": {"levels": 3, "image_channels": 3},
    "classes": {"levels": 4, "classes": 3},
    "map": {"levels": 4, "cond_channels": 2},
    "logistic": {"levels": 256, "distribution": "logistic", "mixtures": 3},
    "codes": {"codes": 30},
}


@pytest.fixture(autouse=True)
def _needs_cpu_kernels(need, one_thread):
    need(OP, "cpu")


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["PixelCNN", "GatedPixelCNN", "PixelSNAIL"])
def test_every_pixel_is_drawn_from_what_came_before_it(name, kind, scale):
    """Whatever share of the guesses is right: scale 0 makes all alike, a large one few."""
    model, size = small(name, **KINDS[kind]), (4, 27)
    with torch.no_grad():
        model.head.out.weight.mul_(scale)
    for threads, batch in ((1, 1), (2, 1), (2, 2), (1, 5)):
        torch.set_num_threads(threads)
        check(model, batch, size)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_with_known_pixels(share, batch):
    model, size = small("GatedPixelCNN", levels=5, image_channels=2), (6, 30)
    seed = torch.Generator().manual_seed(0)
    given = torch.randint(5, (batch, 2, *size), generator=seed)
    known = torch.rand(given.shape, generator=seed) < share
    values = check(model, batch, size, given=given, known=known)
    assert torch.equal(values[known], given[known])


def test_calls_for_each_row_give_the_same():
    model, u = small("GatedPixelCNN", levels=2), torch.rand(2, 1, 9, 30)
    by_rows = model.sample(2, (9, 30), uniforms=u, progress=lambda *_: None)
    assert torch.equal(by_rows, model.sample(2, (9, 30), uniforms=u))


def check(model, batch, size, **given):
    """That the parameters are those of a forward pass over the values, and the values what the uniforms draw."""
    kw = conditions(model, batch, size)
    u = torch.rand(batch, model.image_channels, *size, generator=torch.Generator().manual_seed(batch))
    with torch.no_grad():
        context = model._context(batch, size, kw.get("labels"), kw.get("cond"))
        loop, plane = model.generator(size, context)
        values, out = loop.run(u, context=plane, parameters=True, **given)
        with fastgen.use_backend("reference"):
            exact = model(values[:, 0] if model.codes else values, **kw).movedim(2, -1)
    torch.testing.assert_close(out, exact, atol=1e-4, rtol=1e-4)
    drawn = model.distribution.sample(out, u, 1.0)
    assert torch.equal(torch.where(given["known"], given["given"], drawn) if given else drawn, values)
    return values


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_call_gives_the_same_bits(threads):
    torch.set_num_threads(threads)
    model = small("GatedPixelCNN", levels=4)
    for batch in (1, 2):
        u = torch.rand(batch, 1, 6, 20)
        loop, _ = model.generator((6, 20))
        first = loop.run(u, parameters=True)[1]
        for _ in range(100):
            assert torch.equal(loop.run(u, parameters=True)[1], first)


@pytest.mark.parametrize("key", ["1x1", "3x3", "row"])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_remembered_may_be_made_in_any_phase(threads, key):
    torch.set_num_threads(threads)
    p = PixelProgram(features=1)
    h = p.conv(p.input, torch.randn(8, 1, 3, 3), torch.randn(8), mask="A")
    row = p.conv(p.input, torch.randn(8, 1, 3, 3), torch.randn(8), mask="vertical")
    weight, last = torch.randn(8, 1, *((3, 3) if key == "3x3" else (1, 1))), torch.randn(6, 8)

    def remember():
        return p.relu(row) if key == "row" else p.conv(p.input, weight), p.linear(h, last)

    attended = p.attention(p.linear(h, torch.randn(8, 8)), 6, 2, remember)
    p.sample(p.linear(attended, torch.randn(4, 6), torch.randn(4), add=p.linear(h, torch.randn(4, 8))), 0)
    p.finish()
    make, u = (p, torch.randn(4, 1), PixelDistribution("categorical", 4, 4)), torch.rand(2, 1, 6, 11)
    values, out = (PixelGenerator(*make, backend=which).run(u, parameters=True) for which in ("cpu", "reference"))
    assert torch.equal(values[0], out[0])
    torch.testing.assert_close(values[1], out[1], atol=1e-4, rtol=1e-4)


def test_weights_that_are_no_parameters_and_options_that_change_are_current():
    """Whatever a program is made of is compared, not only what the module lists."""
    model, u = small("PixelSNAIL", levels=4), torch.rand(1, 1, 5, 9)
    weight = model.head.out.weight.detach().clone()
    del model.head.out.weight
    model.head.out.weight = weight

    def parameters(which):
        loop, plane = model.generator((5, 9), None, torch.float32, which)
        return loop.run(u, context=plane, parameters=True)[1]

    def check_again():
        torch.testing.assert_close(parameters("cpu"), parameters("reference"), atol=1e-4, rtol=1e-4)

    check_again()
    weight.mul_(-2)
    check_again()
    for module in model.modules():
        if hasattr(module, "heads"):
            module.heads = 1
    check_again()


def test_biases_for_other_numbers_of_images():
    p = PixelProgram(features=1)
    x = p.conv(p.input, torch.randn(4, 1, 1, 3), torch.randn(2, 4), mask="A")
    p.sample(p.linear(x, torch.randn(3, 4), torch.randn(5, 3)), 0)
    with pytest.raises(ValueError, match=r"biases are for \[2, 5\] images at once"):
        PixelGenerator(p, torch.randn(3, 1), PixelDistribution("categorical", 3, 3))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images_that_do_not_fit_into_the_cache_are_drawn_in_rounds(dtype, threads, monkeypatch):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, uniforms = GatedPixelCNN(channels=8, layers=2, levels=4), torch.rand(11, 1, 3, 4)
    expected = model.sample(11, (3, 4), uniforms=uniforms, dtype=dtype)
    larger = 1 << 23  # numbers of an image, in place of what attention would remember of a large one

    def layout(*args):
        planes, caches, size = layout_of(*args)
        return planes, caches, size + larger

    monkeypatch.setattr("fastgen.ops.pixelcnn_generate.layout_of", layout)
    assert torch.equal(model.sample(11, (3, 4), uniforms=uniforms, dtype=dtype), expected)
