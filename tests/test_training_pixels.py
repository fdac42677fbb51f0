"""Training the PixelCNN family: data, checkpoints that go on exactly, the commands, and real images."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from pixel_helpers import MODELS, small

from fastgen import training_pixels
from fastgen.__main__ import main
from fastgen.checkpoints import save_checkpoint
from fastgen.images import load_codes, load_images, load_labels
from fastgen.models import GatedPixelCNN, GPTPrior
from fastgen.training_pixels import load_pixels, save_samples, to_levels, to_pixels, train_pixels, validate

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
pytestmark = pytest.mark.usefixtures("one_thread")


def train(model, images, **options):
    return train_pixels(model, images, **{"steps": 4, "batch_size": 8, "progress": False} | options)


def pictures(number=40, size=(6, 5)):
    return torch.randint(0, 256, (number, 1, *size), dtype=torch.uint8)


def test_levels():
    model = small("PixelCNN", levels=4)
    x = torch.tensor([[[[0, 63, 64, 127, 128, 255]]]], dtype=torch.uint8)
    assert to_levels(x, model).flatten().tolist() == [0, 0, 1, 1, 2, 3]
    assert to_pixels(to_levels(x, model), model).flatten().tolist() == pytest.approx([0, 0, 1 / 3, 1 / 3, 2 / 3, 1])
    model = small("PixelCNN", levels=2)
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(4000, 1, 1, 3)
    rate = to_levels(x, model, torch.Generator().manual_seed(0)).double().mean(0).flatten()
    assert rate.tolist() == pytest.approx([0, 0.2, 1], abs=0.02)
    codes = torch.randint(0, 9, (3, 4, 4))
    assert to_levels(codes, small("PixelCNN", codes=9)) is codes


@pytest.mark.parametrize("name", MODELS)
def test_resumes_exactly(name, tmp_path):
    images, labels = pictures(), torch.randint(0, 3, (40,))
    logs, states = [], []
    for parts in ((6,), (2, 6)):
        torch.manual_seed(0)
        model, path = small(name, levels=2, classes=3), tmp_path / f"{len(parts)}.pt"
        losses = []
        for i, steps in enumerate(parts):
            if i:
                model, _ = load_pixels(path)
            losses += train(model, images, labels=labels, steps=steps, checkpoint=path, resume=i > 0).losses
        logs.append(losses)
        states.append(load_pixels(path)[0].state_dict())
    assert logs[0] == logs[1]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert load_pixels(path)[1] == (6, 5)


def test_learns_and_holds_out():
    images = torch.zeros(64, 1, 6, 6, dtype=torch.uint8)
    images[..., ::2] = 255
    model = small("GatedPixelCNN", levels=2)
    log = train(model, images, steps=60, learning_rate=1e-2, save_every=20)
    assert [step for step, _ in log.validation] == [20, 40, 60]
    assert log.validation[-1][1] < 0.05
    assert validate(model, images) == validate(model, images)
    assert not train(small("PixelCNN"), pictures(), holdout=0).validation


def test_code_maps_and_conditions(tmp_path):
    codes = torch.randint(0, 7, (30, 4, 4))
    log = train(small("GatedPixelCNN", codes=7, cond_codes=5), codes, cond=torch.randint(0, 5, (30, 2, 2)))
    assert log.step == 4
    np.savez(tmp_path / "a.npz", other=np.zeros(3), codes=codes.numpy().astype(np.int16), labels=np.arange(30))
    assert torch.equal(load_codes(tmp_path / "a.npz"), codes)
    assert torch.equal(load_labels(tmp_path / "a.npz"), torch.arange(30))


def test_labels_of_idx_files(tmp_path):
    data = b"\0\0\x08\x01" + struct.pack(">I", 3) + bytes([2, 0, 9])
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(data))
    assert load_labels(tmp_path).tolist() == [2, 0, 9]
    assert load_labels().shape == load_images().shape[:1]
    (tmp_path / "b").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="expected an IDX file of labels"):
        load_labels(tmp_path / "b")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="expected train-labels-idx1-ubyte"):
        load_labels(tmp_path / "none")
    np.savez(tmp_path / "c.npz", x=np.zeros((3, 4), dtype=np.int64))
    for load, message in ((load_codes, r"integers \(N, H, W\), got x int64"), (load_labels, r"integers \(N,\) as")):
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "c.npz")
        with pytest.raises(FileNotFoundError, match="no such file"):
            load(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"images": torch.zeros(3, 1, 4, 4)}, ValueError, r"images must be uint8 \(N, 1, H, W\), got torch.float32"),
        ({"images": pictures()[:, :, :0]}, ValueError, "at least one pixel"),
        ({"images": pictures()[:0]}, ValueError, "at least one to train on, got 0"),
        ({"images": [1]}, TypeError, "images must be a tensor, got list"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "labels must be one for each of the 40 images"),
        ({"labels": torch.tensor(3)}, ValueError, r"labels must be one for each of the 40 images, got \(\)"),
        ({"labels": torch.zeros(40, dtype=torch.int64)}, ValueError, "labels were given, but the model has classes=0"),
        ({"steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
        ({"holdout": 1.0}, ValueError, r"holdout must be a number of examples, or a share in \[0, 1\), got 1"),
        ({"holdout": 40}, ValueError, "images must hold at least one to train on, got 40 less 40 held out"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ({"resume": True}, ValueError, "resume=True needs checkpoint="),
    ],
)
def test_bad_input(options, kind, message):
    with pytest.raises(kind, match=message):
        train(small("PixelCNN"), **{"images": pictures()} | options)


def test_bad_labels_are_found_before_the_training(tmp_path):
    """Also those that are held out."""
    for options, given, message in (
        ({"classes": 3}, {"labels": torch.arange(40) // 10}, r"labels must lie in \[0, 3\), got 0 to 3"),
        (
            {"cond_codes": 3},
            {"cond": (torch.arange(40) // 10)[:, None, None]},
            r"cond must lie in \[0, 3\), got 0 to 3",
        ),
    ):
        steps = []
        with pytest.raises(ValueError, match=message):
            train(small("PixelCNN", **options), pictures(), **given, progress=lambda *_: steps.append(1))  # noqa: B023
        assert not steps
    with pytest.raises(TypeError, match=r"model must be one of PixelCNN, .*GPTPrior, got Linear"):
        train(torch.nn.Linear(2, 2), pictures())


def test_bad_codes_and_checkpoints(tmp_path):
    model = small("PixelCNN", codes=4)
    with pytest.raises(ValueError, match=r"images must be maps of codes, int64 \(N, H, W\)"):
        train(model, pictures())
    with pytest.raises(ValueError, match=r"images must lie in \[0, 4\), got 4 to 4"):
        train(model, torch.full((9, 3, 3), 4))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_pixels(tmp_path / "none.pt")
    save_checkpoint(tmp_path / "a.pt", model)
    with pytest.raises(ValueError, match=r"image_size must be \[height, width\], got None"):
        load_pixels(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="holds no training state"):
        train(model, torch.zeros(9, 3, 3, dtype=torch.int64), checkpoint=tmp_path / "a.pt", resume=True)
    path = tmp_path / "b.pt"
    train(small("PixelCNN", levels=3), pictures(), checkpoint=path)
    with pytest.raises(ValueError, match=r"is of another model: levels=3 \(model: 4\)"):
        train(small("PixelCNN", levels=4), pictures(), checkpoint=path, resume=True, steps=9)
    with pytest.raises(FileExistsError, match="exists; resume from it"):
        train(small("PixelCNN", levels=3), pictures(), checkpoint=path)
    assert json.dumps(load_pixels(path)[0].config)


def test_loss_that_is_not_finite():
    model = small("PixelCNN")
    with torch.no_grad():
        model.head.out.bias.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="the loss became"):
        train(model, pictures())


def test_grid_of_samples(tmp_path, monkeypatch):
    for options, images in (
        ({"levels": 4, "image_channels": 3}, torch.randint(0, 256, (3, 3, 6, 4), dtype=torch.uint8)),
        ({"codes": 9}, torch.randint(0, 9, (3, 6, 4))),
    ):
        model, rows = small("GatedPixelCNN", **options), []
        monkeypatch.setattr(training_pixels, "save_grid", lambda path, given, rows=rows: rows.extend(given))
        save_samples(tmp_path / "a.png", model, images)
        first, second, given, completed = rows
        assert torch.equal(given, to_pixels(to_levels(images, model), model))
        assert torch.equal(completed[:, :, :3], given[:, :, :3])
        assert not torch.equal(completed[:, :, 3:], given[:, :, 3:])
        assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["pixelcnn", "gated_pixelcnn", "pixelsnail"])
def test_command_line(name, tmp_path, capsys):
    out = tmp_path / "runs" / "a.pt"
    size = ["--channels", "8", "--layers", "1"]
    base = ["train", name, "--out", str(out), "--batch-size", "8", "--labels"]
    assert main([*base, *size, "--levels", "16", "--steps", "2"]) == 0
    assert "step 2, loss" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 100
    assert main([*base, "--steps", "3", "--resume", "--grid", str(tmp_path / "g.png")]) == 0
    whole = tmp_path / "whole.pt"
    assert main([*base[:2], "--out", str(whole), *base[4:], *size, "--levels", "16", "--steps", "3"]) == 0
    a, b = (torch.load(p)["state_dict"] for p in (out, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)
    picture = tmp_path / "drawn.png"
    draw = ["sample", "pixels", str(out), "--out", str(picture), "--number", "5"]
    assert main([*draw, "--label", "7", "--image-size", "6", "9", "--dtype", "bfloat16"]) == 0
    assert "5 images of 6 x 9 pixels" in capsys.readouterr().out
    assert picture.exists()
    np.savez(tmp_path / "codes.npz", codes=np.random.default_rng(0).integers(0, 5, (20, 4, 4)))
    codes = ["train", name, "--out", str(tmp_path / "c.pt"), "--steps", "1", "--codes", "5", *size]
    assert main([*codes, "--data", str(tmp_path / "codes.npz")]) == 0
    capsys.readouterr()
    fresh = ["--out", str(tmp_path / "n.pt"), "--steps", "1", *size]
    for arguments, message in (
        ([*base, "--steps", "9"], "exists; add --resume"),
        ([*base, "--steps", "9", "--resume", "--levels", "8"], "leave out --levels 8"),
        ([*base[:-1], "--steps", "9", "--resume"], "has 10 classes: add --labels"),
        (["train", name, *fresh, "--codes", "5"], "--codes: needs --data"),
        (["train", name, *fresh, "--data", "/none"], "no such file"),
        (["train", name, *fresh, "--levels", "300"], "levels must lie in [2, 256], got 300"),
        (["train", name, *fresh[:1], str(tmp_path / "n.png"), *fresh[2:]], "is where the pictures go"),
        (draw, "the model needs --label"),
        ([*draw, "--label", "10"], "--label: must lie in [0, 10), got 10"),
        ([*draw, "--label", "1", "--temperature", "0"], "temperature must be finite and > 0"),
        ([*draw, "--label", "1", "--top-p", "-1"], "top_p must be a float in (0, 1], got -1.0"),
    ):
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err, arguments
    assert not (tmp_path / "n.pt").exists()


def test_real_images():
    for part, options in (("mnist", {"levels": 2}), ("cifar10/cifar10_jpeg_subset.npz", {"distribution": "logistic"})):
        if not (DATA / part).exists():
            pytest.skip(f"no {DATA / part}")
        images = load_images(DATA / part)
        model = GatedPixelCNN(
            **{"levels": 256, "image_channels": images.shape[1], "channels": 16, "layers": 2} | options
        )
        log = train(model, images[:256], steps=25, learning_rate=3e-3)
        assert sum(log.losses[-3:]) < sum(log.losses[:3])


def test_labels_of_mnist():
    if not (DATA / "mnist").exists():
        pytest.skip(f"no {DATA / 'mnist'}")
    labels = load_labels(DATA / "mnist")
    assert labels.shape == (60000,)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_demo_part(tmp_path):
    from rich.console import Console

    from fastgen import demo_pixels

    file = tmp_path / "log.txt"
    with pytest.MonkeyPatch.context() as patch, file.open("w") as stream:
        patch.setattr(demo_pixels, "LARGE", (5, 5))
        demo_pixels.demo_pixels(Console(file=stream, width=200), load_images(), tmp_path, 1.0)
    text = file.read_text()
    assert "bits per pixel" in text
    assert text.count("GatedPixelCNN") == 2
    assert (tmp_path / "digits.png").exists()
    assert load_pixels(tmp_path / "pixels.pt")[1] == (8, 8)


def test_samples_of_a_command_have_no_dropout(tmp_path):
    path, images = tmp_path / "gpt.pt", torch.randint(5, (8, 3, 4))
    train_pixels(
        GPTPrior(5, (3, 4), 16, 2, 2, dropout=0.5), images, steps=1, batch_size=4, progress=False, checkpoint=path
    )
    drawn = []
    for i in range(2):
        assert main(["sample", "pixels", str(path), "--out", str(tmp_path / f"{i}.png"), "--seed", "1"]) == 0
        drawn.append((tmp_path / f"{i}.png").read_bytes())
    assert drawn[0] == drawn[1]
