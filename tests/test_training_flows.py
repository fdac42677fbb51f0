"""Training flows: data, checkpoints that go on exactly, the commands, and real images."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.__main__ import main
from fastgen.densities import DENSITIES, EXTENT, draw, points_of, save_density
from fastgen.evaluate import evaluate
from fastgen.images import load_images
from fastgen.models import Glow, RealNVP
from fastgen.training_flows import load_flow, save_samples, to_levels, train_flow, validate

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"RealNVP": {"couplings": 2, "blocks": 1}, "Glow": {"steps": 2}}


def small(kind, shape=(1, 8, 8), **options):
    model = {"RealNVP": RealNVP, "Glow": Glow}[kind]
    return model(shape, **{**KINDS[kind], "hidden": 8, "scales": 1, **options})


def train(model, data, **options):
    return train_flow(model, data, **{"steps": 4, "batch_size": 8, "progress": False} | options)


def pictures(number=40, size=(8, 8), channels=1):
    return torch.randint(0, 256, (number, channels, *size), dtype=torch.uint8)


@pytest.mark.parametrize("name", DENSITIES)
def test_densities(name):
    points = draw(name, 5000, torch.Generator().manual_seed(0))
    assert points.shape == (5000, 2)
    assert points.dtype == torch.float32
    assert bool((points.abs() < EXTENT).all())
    assert float(points.mean(0).norm()) < 0.3
    assert torch.equal(points, draw(name, 5000, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"name must be one of two_moons, .* got 'moon'"):
        draw("moon", 3)
    with pytest.raises(ValueError, match="n must be an integer >= 1, got 0"):
        draw(name, 0)


def test_picture_of_a_density(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    model = small("Glow", (2,)).eval()
    save_density(tmp_path / "a.png", model.log_prob, draw("rings", 100), model.sample(100))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1200, 400)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("points", [False, True])
def test_resumes_exactly(kind, points, tmp_path):
    data = draw("two_moons", 60) if points else pictures()
    labels = torch.randint(0, 3, (len(data),))
    logs, states = [], []
    for parts in ((6,), (2, 6)):
        torch.manual_seed(0)
        model, path = small(kind, data.shape[1:], classes=3), tmp_path / f"{len(parts)}.pt"
        losses = []
        for i, steps in enumerate(parts):
            if i:
                model = load_flow(path)
            losses += train(model, data, labels=labels, steps=steps, checkpoint=path, resume=i > 0).losses
        logs.append(losses)
        states.append(load_flow(path).state_dict())
    assert logs[0] == logs[1]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("kind", KINDS)
def test_learns_two_moons(kind):
    torch.manual_seed(0)
    points = draw("two_moons", 4000)
    model = small(kind, (2,), hidden=32, **({"couplings": 6} if kind == "RealNVP" else {"steps": 4}))
    log = train(model, points, steps=250, batch_size=256, learning_rate=5e-3, save_every=50)
    assert [step for step, _ in log.validation] == [50, 100, 150, 200, 250]
    # a normal distribution of the points' covariance has about 3.0 nats, the moons themselves 1.6
    assert log.validation[-1][1] < 2.3
    assert validate(model, points) == validate(model, points)
    assert not train(small(kind, (2,)), points, holdout=0).validation


@pytest.mark.parametrize("kind", KINDS)
def test_learns_images(kind):
    images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    images[::2, ..., ::2] = 200  # two kinds: what the first batch sets means and scales to is no answer
    images[1::2, ..., 1::2] = 200
    log = train(small(kind, hidden=16), images, steps=40, batch_size=32, learning_rate=3e-3)
    assert log.losses[-1] < log.losses[0] - 0.5


def test_levels():
    model = small("Glow", levels=4)
    assert to_levels(torch.tensor([0, 63, 64, 255], dtype=torch.uint8), model).tolist() == [0, 0, 1, 3]
    points = torch.randn(3, 2)
    assert to_levels(points, small("Glow", (2,))) is points


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"data": torch.zeros(3, 1, 8, 8)}, ValueError, r"data must be uint8 \('N', 1, 8, 8\), got torch.float32"),
        ({"data": pictures(size=(8, 4))}, ValueError, r"data must be uint8 .*got torch.uint8 \(40, 1, 8, 4\)"),
        ({"data": pictures()[:0]}, ValueError, "data must hold at least one to train on, got 0"),
        ({"data": [1]}, TypeError, "data must be a tensor, got list"),
        ({"labels": torch.zeros(40).long()}, ValueError, "labels must be None: the model has no classes"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model must be one of RealNVP, Glow, got Linear"),
        ({"model": small("Glow", (2,)), "data": torch.full((9, 2), torch.nan)}, ValueError, "data holds NaN"),
        ({"model": small("Glow", classes=2)}, ValueError, "labels are missing"),
        ({"model": small("Glow", classes=2), "labels": torch.zeros(3).long()}, ValueError, "one for each of the 40"),
        (
            {"model": small("Glow", classes=2), "labels": torch.full((40,), 2)},
            ValueError,
            r"labels must be int64 in \[0, 2\)",
        ),
        ({"steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
        ({"resume": True}, ValueError, "resume=True needs checkpoint="),
    ],
)
def test_bad_input(options, kind, message):
    options = {"model": small("Glow"), "data": pictures()} | options
    with pytest.raises(kind, match=message):
        train(options.pop("model"), options.pop("data"), **options)


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize("kind", ["realnvp", "glow"])
def test_commands_on_points(kind, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "a.pt"
    assert run("train", kind, "--out", out, "--steps", 2, "--hidden", 8) == 0
    assert (tmp_path / "a.png").exists()
    assert run("train", kind, "--out", out, "--steps", 3, "--resume") == 0
    assert "step 3, loss" in capsys.readouterr().out
    assert run("sample", "flow", out, "--out", tmp_path / "b.png", "--number", 50) == 0
    assert (tmp_path / "b.png").exists()
    assert run("train", kind, "--out", out, "--steps", 4, "--resume", "--density", "rings") == 2
    assert "was trained on two_moons: leave out --density" in capsys.readouterr().err
    assert run("train", kind, "--out", out, "--steps", 3) == 2
    assert "exists; add --resume" in capsys.readouterr().err
    assert run("train", kind, "--out", out, "--steps", 9, "--resume", "--hidden", 9) == 2
    assert "leave out --hidden 9" in capsys.readouterr().err
    assert run("train", {"realnvp": "glow", "glow": "realnvp"}[kind], "--out", out, "--steps", 9, "--resume") == 2
    assert "is of a " in capsys.readouterr().err
    for more, message in (
        (["--density", "rings", "--data", tmp_path], "--data or --density, one of the two"),
        (["--labels"], "--labels: needs --data"),
    ):
        assert run("train", kind, "--out", tmp_path / "c.pt", "--steps", 1, *more) == 2
        assert message in capsys.readouterr().err


def test_commands_on_images(tmp_path, capsys):
    data = tmp_path / "a.npz"
    np.savez(data, x=pictures(30, (6, 6), 3).numpy(), labels=np.arange(30) % 3)
    out = tmp_path / "a.pt"
    sizes = ["--hidden", 8, "--flow-steps", 1, "--scales", 2, "--levels", 32, "--labels", "--reversible"]
    assert run("train", "glow", "--data", data, "--out", out, "--steps", 2, "--batch-size", 8, *sizes) == 0
    model = load_flow(out)
    assert model.shape == (3, 8, 8)
    assert model.levels == 32
    assert model.classes == 3
    assert model.config["reversible"]
    assert run("train", "glow", "--data", data, "--out", out, "--steps", 3, "--labels", "--resume") == 0
    capsys.readouterr()
    assert run("train", "glow", "--out", out, "--steps", 4, "--labels", "--resume") == 2
    assert "was trained on --data: give it again" in capsys.readouterr().err
    assert run("sample", "flow", out, "--label", 1, "--number", 5, "--out", tmp_path / "b.png") == 0
    capsys.readouterr()
    assert run("sample", "flow", out, "--out", tmp_path / "c.png") == 2
    assert "needs --label" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mnist", "cifar10/cifar10_jpeg_subset.npz"])
def test_real_images(kind, name, tmp_path):
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is absent")
    images = load_images(DATA / name)[:200]
    model = small(kind, tuple(images.shape[1:]), scales=2)
    log = train(model, images, steps=12, learning_rate=3e-3)
    assert min(log.losses[-3:]) < log.losses[0]
    save_samples(tmp_path / "a.png", model, images[:4])
    x = images[:4].long()
    with torch.no_grad():
        assert torch.equal(model.decode(model.encode(x)[0]), x)


def test_a_singular_checkpoint_andpoints_of_another_seed_are_refused(tmp_path, capsys):
    out = tmp_path / "g.pt"
    train = ["train", "glow", "--out", str(out), "--flow-steps", "1", "--hidden", "4", "--batch-size", "16"]
    assert main([*train, "--levels", "4", "--steps", "1"]) == 2
    assert "--levels: needs --data" in capsys.readouterr().err
    assert main([*train, "--steps", "1", "--seed", "5"]) == 0
    assert main([*train, "--steps", "2", "--resume"]) == 2
    assert "its points were drawn with --seed 5: give that" in capsys.readouterr().err
    assert main([*train, "--steps", "2", "--resume", "--seed", "5"]) == 0
    content = torch.load(out)
    next(v for k, v in content["state_dict"].items() if k.endswith(".sign")).zero_()
    torch.save(content, out)
    assert main(["sample", "flow", str(out), "--out", str(tmp_path / "s.png")]) == 2
    assert "holds parameters that a layer refuses" in capsys.readouterr().err


def testpoints_of_a_checkpoint():
    assert points_of("two_moons 5") == ("two_moons", 5)
    assert points_of("two_moons") == ("two_moons", 0)
    assert points_of("data of my own") == ("data of my own", 0)
    assert points_of(None) == (None, 0)


def test_a_flow_that_has_diverged_draws_nothing():
    model = Glow((1, 4, 4), scales=1, steps=1, hidden=4).eval()
    with pytest.raises(ValueError, match="values that are not finite"):
        model.decode(torch.full((1, 16), float("nan")))
    with pytest.raises(ValueError, match=r"uniforms must lie in \[0, 1\), got 7.0 to 7.0"):
        model.encode(torch.zeros(1, 1, 4, 4).long(), uniforms=torch.full((1, 1, 4, 4), 7.0))


def test_a_trained_flow_is_evaluated(tmp_path, capsys):
    """On images of other sides than the scales divide, which are padded as in training; on its density's points."""
    np.savez(tmp_path / "data.npz", train=pictures(size=(10, 6))[:, 0].numpy(), test=pictures(7, (10, 6))[:, 0].numpy())
    data, small_ones = ["--data", str(tmp_path / "data.npz")], ["--hidden", "8", "--steps", "2", "--batch-size", "8"]
    glow, moons = str(tmp_path / "glow.pt"), str(tmp_path / "moons.pt")
    assert main(["train", "glow", *data, *small_ones, "--scales", "2", "--flow-steps", "1", "--out", glow]) == 0
    assert main(["evaluate", glow, *data]) == 0
    assert "bits/dim" in capsys.readouterr().out
    assert main(["train", "realnvp", "--out", moons, *small_ones, "--couplings", "2", "--density", "rings"]) == 0
    assert main(["evaluate", moons]) == 0
    assert "nats" in capsys.readouterr().out
    (figure,) = evaluate(moons, None, number=7)
    assert figure.examples == 7
    assert main(["evaluate", moons, *data]) == 2
    assert "a flow of points is evaluated on those of the density it learned" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_refused():
    model = small("RealNVP", (2,))
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="values that are not finite"):
        model.sample(3)
