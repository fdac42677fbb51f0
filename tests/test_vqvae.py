"""VQVAE and VQVAE2: codes, reconstructions, the bound; their training, checkpoints and command line."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.__main__ import main
from fastgen.checkpoints import save_checkpoint
from fastgen.images import load_codes, load_images, load_labels, pad_to_multiple, save_grid
from fastgen.models import VQVAE, VQVAE2
from fastgen.models.vqvae import perplexity
from fastgen.training_images import as_floats, code_perplexities, load_vqvae, train_vqvae, validate

SMALL = {"hidden_channels": 8, "residual_layers": 1, "residual_channels": 4, "codebook_size": 16, "code_dim": 4}
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def model(cls=VQVAE, **options):
    torch.manual_seed(0)
    return cls(**{"image_channels": 1, "downsample": 2, **SMALL, **options})


def images(n=40, channels=1, side=8):
    return torch.randint(256, (n, channels, side, side), dtype=torch.uint8)


@pytest.mark.parametrize("downsample", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 3])
def test_shapes_of_one_level(downsample, channels):
    m = model(image_channels=channels, downsample=downsample).eval()
    x = torch.rand(2, channels, 16, 24)
    out = m(x)
    codes = m.encode(x)
    assert codes.shape == (2, 16 // downsample, 24 // downsample)
    assert codes.dtype == torch.int64
    assert torch.equal(out.codes[0], codes)
    assert out.reconstruction.shape == x.shape
    assert torch.equal(m.decode(codes), out.reconstruction)


def test_shapes_of_two_levels():
    m = model(VQVAE2, downsample=4).eval()
    x = torch.rand(2, 1, 16, 24)
    top, bottom = m.encode(x)
    assert top.shape == (2, 2, 3)
    assert bottom.shape == (2, 4, 6)
    assert torch.equal(m.decode(top, bottom), m(x).reconstruction)
    # the decoder takes both
    for other in (((top + 1) % 16, bottom), (top, (bottom + 1) % 16)):
        assert not torch.equal(m.decode(*other), m(x).reconstruction)


@pytest.mark.parametrize("cls", [VQVAE, VQVAE2])
def test_encoding_leaves_the_codebooks_alone(cls):
    m = model(cls).train()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    m.encode(torch.rand(2, 1, 8, 8))
    for key, value in m.state_dict().items():
        assert torch.equal(value, before[key])
    m(torch.rand(2, 1, 8, 8))
    assert any(not torch.equal(value, before[key]) for key, value in m.state_dict().items())


@pytest.mark.parametrize("cls", [VQVAE, VQVAE2])
def test_every_parameter_learns(cls):
    m = model(cls).train()
    m.loss(torch.rand(4, 1, 16, 16)).backward()
    for name, parameter in m.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_bound_is_the_gaussian_less_the_codes():
    m = model(variance=0.3).eval()
    x = torch.rand(3, 1, 8, 8)
    density = torch.distributions.Normal(m(x).reconstruction, math.sqrt(0.3)).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(m.elbo(x), density - 16 * math.log(16))
    assert m.elbo(x[:0]).shape == (0,)


def test_perplexity():
    assert float(perplexity(torch.zeros(9, dtype=torch.int64), 8)) == pytest.approx(1)
    assert float(perplexity(torch.arange(8), 8)) == pytest.approx(8)
    assert float(perplexity(torch.tensor([0, 0, 1, 1]), 8)) == pytest.approx(2)


BAD = {
    "x must be floating point": lambda: model()(torch.zeros(2, 3, 8, 8)),
    "H and W must be multiples of 4": lambda: model(VQVAE2)(torch.zeros(2, 1, 6, 8)),
    "downsample must be a power of 2": lambda: model(downsample=3),
    "downsample must be an integer >= 2": lambda: model(downsample=1),
    "hidden_channels must be even": lambda: model(hidden_channels=3),
    "variance must be finite and > 0": lambda: model(variance=0.0),
    "codebook_size must be an integer": lambda: model(codebook_size=0),
    "codes must lie in": lambda: model().decode(torch.full((1, 2, 2), 16)),
    "codes must be int64": lambda: model().decode(torch.zeros(1, 2, 2)),
    "bottom must have twice the sides": lambda: model(VQVAE2).decode(
        torch.zeros(1, 2, 2, dtype=torch.int64), torch.zeros(1, 2, 2, dtype=torch.int64)
    ),
    "images must be uint8": lambda: train_vqvae(model(), torch.zeros(4, 1, 8, 8), steps=1),
    "images must have sides": lambda: train_vqvae(model(VQVAE2), images(side=6), steps=1),
    "images must hold at least one": lambda: train_vqvae(model(), images(0), steps=1),
    "give steps or seconds": lambda: train_vqvae(model(), images()),
    "batch_size must be": lambda: train_vqvae(model(), images(), steps=1, batch_size=0),
    "learning_rate must be": lambda: train_vqvae(model(), images(), steps=1, learning_rate=math.nan),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()


def train(m, x, **options):
    return train_vqvae(m, x, **{"batch_size": 8, "progress": False, **options})


@pytest.mark.parametrize("cls", [VQVAE, VQVAE2])
def test_resuming_is_as_if_nothing_had_happened(cls, tmp_path):
    """Dead codes are replaced and k-means runs on the way: both draw random numbers."""
    options = {"kmeans_init": True, "threshold_ema_dead_code": 1.0}
    x = images()
    whole = model(cls, **options)
    losses = train(whole, x, steps=12).losses
    path = tmp_path / "a.pt"
    first = train(model(cls, **options), x, steps=5, checkpoint=path).losses
    torch.rand(17)
    resumed = model(cls, **options)
    rest = train(resumed, x, steps=12, checkpoint=path, resume=True)
    assert rest.step == 12
    assert first + rest.losses == losses
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_training_learns_and_leaves_the_random_state_alone():
    x = load_images()
    m = model(hidden_channels=32, codebook_size=32, kmeans_init=True, variance=float(as_floats(x).var()))
    state = torch.get_rng_state()
    log = train(m, x, steps=200, batch_size=32, save_every=150)
    assert torch.equal(torch.get_rng_state(), state)
    assert [step for step, _ in log.validation] == [150, 200]
    assert log.validation[-1][1] < 0.35
    assert validate(m, x[-90:]) < 0.35
    assert code_perplexities(m, x[-90:])[0] > 4


def test_checkpoints_of_others_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    train(model(), images(), steps=1, checkpoint=path)
    assert type(load_vqvae(path)) is VQVAE
    with pytest.raises(FileExistsError, match="exists"):
        train(model(), images(), steps=2, checkpoint=path)
    with pytest.raises(ValueError, match="codebook_size=16"):
        train(model(codebook_size=8), images(), steps=2, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="model='VQVAE'"):
        train(model(VQVAE2), images(), steps=2, checkpoint=path, resume=True)
    with pytest.raises(ValueError, match="steps must be larger"):
        train(model(), images(), steps=1, checkpoint=path, resume=True)
    with pytest.raises(FileNotFoundError):
        train(model(), images(), steps=2, checkpoint=tmp_path / "none.pt", resume=True)
    save_checkpoint(path, model())
    with pytest.raises(ValueError, match="no training state"):
        train(model(), images(), steps=2, checkpoint=path, resume=True)
    content = torch.load(path)
    torch.save(content | {"model": "Other"}, path)
    with pytest.raises(ValueError, match="expected a checkpoint of VQVAE or VQVAE2, got 'Other'"):
        load_vqvae(path)
    del content["state_dict"]["quantizer._codebook.embed"]
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"missing: quantizer\._codebook\.embed"):
        load_vqvae(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="damaged, or no file that"):
        load_vqvae(path)


def idx(x):
    return b"\0\0\x08\x03" + struct.pack(">III", *x.shape[:1], *x.shape[2:]) + x.numpy().tobytes()


def test_images_from_everywhere(tmp_path):
    import gzip

    from PIL import Image

    x = images(5, side=6)
    (tmp_path / "a").write_bytes(idx(x))
    (tmp_path / "b.gz").write_bytes(gzip.compress(idx(x)))
    assert torch.equal(load_images(tmp_path / "a"), x)
    assert torch.equal(load_images(tmp_path / "b.gz"), x)
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(x)))
    assert torch.equal(load_images(folder), x)
    color = images(4, 3, 6)
    for name, array in (("x", color.movedim(1, 3)), ("images", color), ("train", x[:, 0])):
        np.savez(tmp_path / "c.npz", other=np.zeros(3), **{name: array.numpy()})
        assert torch.equal(load_images(tmp_path / "c.npz"), x if name == "train" else color)
    pictures = tmp_path / "pictures" / "deep"
    pictures.mkdir(parents=True)
    for i, image in enumerate(color):
        Image.fromarray(image.movedim(0, 2).numpy()).save(pictures / f"{i}.png")
    assert torch.equal(load_images(tmp_path / "pictures"), color)
    Image.fromarray(np.zeros((9, 7), np.uint8)).save(pictures / "9.png")
    with pytest.raises(ValueError, match=r"9\.png: is 7 x 9 pixels"):
        load_images(tmp_path / "pictures")
    assert load_images(tmp_path / "pictures", size=4).shape == (5, 3, 4, 4)
    digits = load_images()
    assert digits.shape == (1797, 1, 8, 8)
    assert int(digits.max()) == 255
    assert pad_to_multiple(images(1, side=7), 4).shape == (1, 1, 8, 8)


BAD_FILES = {
    "no such file": None,
    "expected an IDX file": b"PNG",
    "expected 2 images of 3 x 3": b"\0\0\x08\x03" + struct.pack(">III", 2, 3, 3) + b"1234",
    "it begins with nothing": b"",
}


@pytest.mark.parametrize("message", BAD_FILES)
def test_bad_files(message, tmp_path):
    path = tmp_path / "file"
    if BAD_FILES[message] is not None:
        path.write_bytes(BAD_FILES[message])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_images(path)


def test_one_array_in_a_file(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(48, dtype=np.uint8).reshape(3, 4, 4))
    np.save(tmp_path / "b.npy", np.arange(3))
    assert load_images(tmp_path / "a.npy").flatten().tolist() == list(range(48))
    assert load_codes(tmp_path / "a.npy").shape == (3, 4, 4)
    assert load_labels(tmp_path / "b.npy").tolist() == [0, 1, 2]


def test_more_bad_files(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match="expected an npz archive, unreadable"):
        load_images(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 4, 4)))
    with pytest.raises(ValueError, match=r"expected a uint8 array.*got x float64"):
        load_images(tmp_path / "b.npz")
    (tmp_path / "c.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="expected a gzip file"):
        load_images(tmp_path / "c.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        load_images(tmp_path / "empty")
    (tmp_path / "empty" / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a\.png: expected a picture"):
        load_images(tmp_path / "empty")


def test_grid(tmp_path):
    from PIL import Image

    row = torch.zeros(3, 1, 8, 8)
    row[1] = 1.5  # clipped
    save_grid(tmp_path / "a.png", [row, 1 - row], scale=2)
    with Image.open(tmp_path / "a.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape == (2 * 18, 3 * 18)
    assert pixels[9, 9] == 0
    assert pixels[9, 27] == 255
    assert pixels[27, 9] == 255
    save_grid(tmp_path / "b.png", [torch.rand(2, 3, 50, 8)])
    with pytest.raises(ValueError, match="rows must be images of one shape"):
        save_grid(tmp_path / "c.png", [row, row[:2]])
    assert not (tmp_path / "c.png").exists()


SIZES = ["--hidden-channels", "8", "--residual-layers", "1", "--codebook-size", "16", "--code-dim", "4"]


@pytest.mark.parametrize("name", ["vqvae", "vqvae2"])
def test_command_line(name, tmp_path, capsys):
    out = tmp_path / "runs" / "a.pt"
    base = ["train", name, "--out", str(out), "--batch-size", "8"]
    assert main([*base, *SIZES, "--steps", "3"]) == 0
    assert "step 3, loss" in capsys.readouterr().out
    assert out.with_suffix(".png").stat().st_size > 100
    assert main([*base, "--steps", "5", "--resume", "--grid", str(tmp_path / "g.png")]) == 0
    assert (tmp_path / "g.png").exists()
    whole = tmp_path / "whole.pt"
    assert main(["train", name, "--out", str(whole), "--batch-size", "8", *SIZES, "--steps", "5"]) == 0
    a, b = (torch.load(p)["state_dict"] for p in (out, whole))
    assert all(torch.equal(a[k], b[k]) for k in a)
    capsys.readouterr()
    for arguments, message in (
        ([*base, "--steps", "9"], "exists; add --resume"),
        ([*base, "--steps", "9", "--resume", "--codebook-size", "8"], "leave out --codebook-size 8"),
        (["train", "vqvae2" if name == "vqvae" else "vqvae", *base[2:], "--steps", "9", "--resume"], "is of a "),
        (["train", name, "--out", str(tmp_path / "n.pt"), "--steps", "1", "--data", "/none"], "no such file"),
        (["train", name, "--out", str(tmp_path / "n.png"), "--steps", "1"], "is where the pictures go"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def test_real_images():
    for part, shape in (("mnist", (60000, 1, 28, 28)), ("cifar10/cifar10_jpeg_subset.npz", (8000, 3, 32, 32))):
        if not (DATA / part).exists():
            pytest.skip(f"no {DATA / part}")
        x = load_images(DATA / part)
        assert x.shape == shape
        m = model(image_channels=shape[1], downsample=4, hidden_channels=16)
        log = train(m, x[:512], steps=8)
        assert log.losses[-1] < log.losses[0]


def test_demo_part(tmp_path):
    from rich.console import Console

    from fastgen.demo_vqvae import demo_vqvae

    file = tmp_path / "log.txt"
    with file.open("w") as stream:
        demo_vqvae(Console(file=stream, width=200), load_images(), tmp_path, 1.0)
    text = file.read_text()
    assert "held-out error" in text
    assert "65536 x 512 x 64" in text
    assert (tmp_path / "reconstructions.png").exists()
    assert json.dumps(load_vqvae(tmp_path / "vqvae.pt").config)


@pytest.mark.parametrize("kind", [VQVAE, VQVAE2])
def test_decodes_in_the_dtype_it_was_cast_to(kind):
    """Codebooks stay float32 there."""
    model = kind(1, 8, codebook_size=16, code_dim=8).eval().bfloat16()
    x = torch.rand(2, 1, 16, 16, dtype=torch.bfloat16)
    codes = model.encode(x)
    got = model.decode(*codes) if isinstance(codes, tuple) else model.decode(codes)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, model(x).reconstruction, atol=0.05, rtol=0.05)


def test_parameters_keep_the_names_that_checkpoints_hold():
    names = {name.rsplit(".", 1)[0] for name, _ in VQVAE(1).named_parameters()}
    assert {"encoder.0", "encoder.2", "encoder.4", "encoder.5.conv", "decoder.0", "decoder.4", "decoder.6"} <= names
