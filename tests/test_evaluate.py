"""`python -m fastgen evaluate`: figures of every kind of model, the data's parts, and the record."""

import gzip
import json
import struct

import numpy as np
import pytest
import torch

from fastgen.__main__ import main
from fastgen.audio import save_audio
from fastgen.checkpoints import save_checkpoint
from fastgen.evaluate import evaluate
from fastgen.images import load_images, load_labels
from fastgen.models import FVSBN, NADE, VAE, VQVAE, GatedPixelCNN, Glow, PixelCNN, RealNVP, WaveNet
from fastgen.training import save_checkpoint as save_wavenet


@pytest.fixture
def folder(tmp_path):
    """MNIST's files: 12 images to train on, 9 to test on, of 4 x 4 pixels."""
    for name, number in (("train", 12), ("t10k", 9)):
        pixels = np.full((number, 4, 4), number, np.uint8)
        head = b"\0\0\x08\x03" + struct.pack(">III", *pixels.shape)
        (tmp_path / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + pixels.tobytes()))
        labels = b"\0\0\x08\x01" + struct.pack(">I", number) + bytes(i % 3 for i in range(number))
        (tmp_path / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


def test_parts_of_data(folder):
    assert [len(load_images(folder, part=part)) for part in ("train", "test")] == [12, 9]
    assert [len(load_labels(folder, part=part)) for part in ("train", "test")] == [12, 9]
    archive = folder / "x.npz"
    np.savez(archive, train=np.zeros((5, 4, 4, 3), np.uint8), test=np.ones((2, 4, 4, 3), np.uint8))
    assert load_images(archive, part="test").shape == (2, 3, 4, 4)
    np.savez(archive, images=np.zeros((5, 4, 4), np.uint8))
    assert len(load_images(archive, part="test")) == 5
    np.savez(archive, a=np.zeros((5, 4, 4), np.uint8), b=np.zeros((5, 4, 4), np.uint8))
    with pytest.raises(ValueError, match="expected an array of test or test_images or x_test, got a, b"):
        load_images(archive, part="test")


MODELS = {
    "fvsbn": (lambda: FVSBN(16), "nats"),
    "nade": (lambda: NADE(16, hidden=4), "nats"),
    "pixelcnn": (lambda: PixelCNN(channels=8, layers=1), "nats"),
    "gated, of classes": (lambda: GatedPixelCNN(levels=4, channels=8, layers=1, classes=3), "bits/dim"),
    "glow": (lambda: Glow((1, 4, 4), scales=1, steps=1, hidden=4), "bits/dim"),
    "realnvp": (lambda: RealNVP((1, 4, 4), scales=1), "bits/dim"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_figure_is_the_mean_over_the_test_images(name, folder):
    make, unit = MODELS[name]
    save_checkpoint(folder / "model.pt", make())
    (figure,) = evaluate(folder / "model.pt", folder)
    assert (figure.unit, figure.examples) == (unit, 9)
    assert 0 < figure.value < 100
    assert evaluate(folder / "model.pt", folder) == [figure]
    assert evaluate(folder / "model.pt", folder, number=2)[0].examples == 2


def test_a_fresh_fvsbn_gives_every_pixel_one_bit(folder):
    model = FVSBN(16)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    save_checkpoint(folder / "model.pt", model)
    assert evaluate(folder / "model.pt", folder)[0].value == pytest.approx(16 * np.log(2))


def test_vae_and_vqvae(folder, capsys):
    save_checkpoint(folder / "vae.pt", VAE(16, latent=2, hidden=8, layers=1), step=7, seconds=1.6, threads=1)
    record = folder / "record.json"
    command = ["evaluate", str(folder / "vae.pt"), "--data", str(folder), "--samples", "200", "--record", str(record)]
    assert main(command) == 0
    assert main([*command, "--name", "again"]) == 0
    assert "-ELBO" in capsys.readouterr().out
    entries = json.loads(record.read_text())
    assert sorted(entries) == ["again", "vae"]
    assert {k: entries["vae"][k] for k in ("model", "steps", "seconds", "threads")} == {
        "model": "VAE", "steps": 7, "seconds": 2, "threads": 1,
    }  # fmt: skip
    bound, estimate = (figure["value"] for figure in entries["vae"]["figures"])
    assert estimate < bound < estimate + 5
    save_checkpoint(folder / "vq.pt", VQVAE(1, 8, 0, 4, 6, 4, 2))
    error, perplexity = evaluate(folder / "vq.pt", folder)
    assert error.value > 0
    assert 1 <= perplexity.value <= 6


def test_audio(folder):
    pytest.importorskip("soundfile")
    for i in range(3):
        save_audio(folder / f"{i}_me_{10 * i}.wav", torch.rand(100 * (i + 1)) - 0.5, 8000)
    model = WaveNet(layers=2, cycles=1, residual_channels=4, skip_channels=4, classes=8)
    save_wavenet(folder / "wavenet.pt", model, 8000)
    (figure,) = evaluate(folder / "wavenet.pt", folder, include="*_[0-4].wav")
    assert figure.examples == 1
    assert evaluate(folder / "wavenet.pt", folder / "0_me_0.wav") == [figure]
    assert evaluate(folder / "wavenet.pt", folder)[0].examples == 3
    with pytest.raises(ValueError, match="no file is left by include='none'"):
        evaluate(folder / "wavenet.pt", folder, include="none")


def test_bad_input(folder):
    save_checkpoint(folder / "nade.pt", NADE(15, hidden=4))
    with pytest.raises(ValueError, match=r"NADE: x must be \(B, 15\), got \(9, 16\)"):
        evaluate(folder / "nade.pt", folder)
    with pytest.raises(ValueError, match=r"samples are of a VAE's likelihood, .* is a NADE"):
        evaluate(folder / "nade.pt", folder, samples=5)
    with pytest.raises(FileNotFoundError, match="no such file; expected a checkpoint"):
        evaluate(folder / "none.pt", folder)
    with pytest.raises(ValueError, match=r"include is of audio files, .* is a NADE"):
        evaluate(folder / "nade.pt", folder, include="*.wav")
    for load in (load_images, load_labels):
        with pytest.raises(ValueError, match="part must be one of train, test, got 'bogus'"):
            load(folder, part="bogus")
    save_checkpoint(folder / "prior.pt", GatedPixelCNN(codes=4, channels=8, layers=1))
    with pytest.raises(ValueError, match="data is needed, an npz archive of codes"):
        evaluate(folder / "prior.pt", None)


def test_options_from_a_file(folder, capsys):
    pytest.importorskip("PIL")
    settings = folder / "settings.txt"
    settings.write_text("# a small one\nnade --hidden 4  # units\n--steps 3 --holdout 4 --schedule cosine\n")
    out = ["--data", str(folder), "--out", str(folder / "nade.pt")]
    assert main(["train", f"@{settings}", *out, "--steps", "2"]) == 0
    assert "step 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", f"@{folder / 'none.txt'}", *out])
    assert "none.txt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "nade", "--steps", "2", "--holdout", "some", *out])
    assert "expected a number of examples, or a share, got 'some'" in capsys.readouterr().err


def test_what_cannot_be_evaluated(tmp_path, capsys):
    archive, model, record = tmp_path / "x.npz", tmp_path / "a.pt", tmp_path / "r.json"
    save_checkpoint(model, NADE(16, hidden=4), step=1, image_size=[1, 4, 4])
    np.savez(archive, test=np.zeros((0, 4, 4), np.uint8))
    assert main(["evaluate", str(model), "--data", str(archive)]) == 2
    assert "must hold at least one image, got none" in capsys.readouterr().err
    record.write_text("[1]")
    assert main(["evaluate", str(model), "--data", str(archive), "--record", str(record)]) == 2
    assert "expected a JSON object of figures, got a list" in capsys.readouterr().err
    prior = tmp_path / "p.pt"
    save_checkpoint(prior, GatedPixelCNN(codes=4, channels=8, layers=1, cond_codes=4), image_size=[4, 4])
    np.savez(archive, codes=np.zeros((2, 4, 4), np.int64))
    assert main(["evaluate", str(prior), "--data", str(archive)]) == 2
    assert "a prior is evaluated with its quantizer" in capsys.readouterr().err
