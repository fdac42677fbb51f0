"""--device: every command computes where it is told to, a GPU or a device that tests/elsewhere.py makes up."""

import numpy as np
import pytest
import torch
from elsewhere import DEVICE, Elsewhere
from op_helpers import DEVICE as REAL

from fastgen.__main__ import main
from fastgen.audio import save_audio

pytestmark = pytest.mark.filterwarnings("ignore:fastgen. .* runs on the PyTorch reference")
ON_GPU = REAL == "cuda"
SMALL = ["--steps", "2", "--batch-size", "4", "--holdout", "8"]
PIXELS = ["--channels", "8", "--layers", "1"]
VQ = [
    "--hidden-channels", "8", "--residual-channels", "4", "--codebook-size", "8", "--code-dim", "4", "--then", "prior",
    "--prior-channels", "16", "--prior-layers", "1", "--class-labels",
]  # fmt: skip
WAVE = ["--layers", "2", "--cycles", "1", "--residual-channels", "8", "--skip-channels", "8", "--segment", "256"]


@pytest.fixture
def images(tmp_path):
    pytest.importorskip("PIL", reason="pictures need pillow")
    generator = np.random.default_rng(0)
    train, labels = generator.integers(256, size=(40, 4, 4), dtype=np.uint8), np.arange(40) % 3
    np.savez(tmp_path / "images.npz", train=train, test=train[:5], train_labels=labels, test_labels=labels[:5])
    np.savez(tmp_path / "codes.npz", generator.integers(7, size=(40, 4, 4)))
    return ["--data", str(tmp_path / "images.npz")]


def run(command, *more, elsewhere=True):
    arguments = [*command.split(), *map(str, more)]
    if ON_GPU or not elsewhere:
        assert main([*arguments, "--device", "cuda"] if elsewhere else arguments) == 0
        return
    with Elsewhere() as there:
        assert main([*arguments, "--device", str(DEVICE)]) == 0
    assert there.ops > 20


@pytest.mark.parametrize(
    ("model", "options", "kind"),
    [
        ("pixelcnn", PIXELS, "pixels"),
        ("gated_pixelcnn", [*PIXELS, "--labels", "--levels", "4"], "pixels"),
        ("pixelsnail", ["--channels", "8", "--layers", "1", "--distribution", "logistic", "--levels", "16"], "pixels"),
        ("pixelrnn", PIXELS, "pixels"),
        ("gpt", ["--channels", "16", "--layers", "1", "--codes", "7"], "pixels"),
        ("realnvp", ["--hidden", "8", "--couplings", "1", "--labels"], "flow"),
        ("glow", ["--hidden", "8", "--flow-steps", "1", "--reversible"], "flow"),
        ("fvsbn", [], "vectors"),
        ("nade", ["--hidden", "8"], "vectors"),
        ("vae", ["--hidden", "8", "--latent", "3"], "vectors"),
        ("vae", ["--channels", "4", "--latent", "3", "--convolutions"], "vectors"),
        ("vqvae", VQ, "vqvae"),
        ("vqvae2", VQ, "vqvae"),
    ],
)
def test_images(model, options, kind, images, tmp_path):
    out, label = tmp_path / "m.pt", ["--label", 1] if {"--labels", "--class-labels"} & set(options) else []
    data = images if "--codes" not in options else ["--data", str(tmp_path / "codes.npz")]
    run(f"train {model} --out", out, *data, *SMALL, *options)
    if kind != "vqvae":  # whose priors are of the codes of one step
        run(f"train {model} --resume --out", out, *data, *options, *SMALL, "--steps", 3)
    run(f"sample {kind}", out, "--number", 2, "--out", tmp_path / "s.png", *label)
    run("evaluate", out, *data, *(["--samples", 2] if model == "vae" else []))


def test_points(tmp_path):
    pytest.importorskip("matplotlib", reason="densities are drawn by matplotlib")
    run("train glow --out", tmp_path / "m.pt", *SMALL, "--hidden", 8, "--flow-steps", 1)
    run("sample flow", tmp_path / "m.pt", "--number", 2, "--out", tmp_path / "s.png")
    run("evaluate", tmp_path / "m.pt", "--number", 2)


@pytest.mark.parametrize("model", ["wavenet", "speech_vqvae"])
def test_audio(model, tmp_path):
    pytest.importorskip("soundfile", reason="audio is read by soundfile")
    for word in "ab":
        save_audio(tmp_path / f"{word}_0.wav", torch.rand(900) - 0.5, 8000)
    out, more = tmp_path / "m.pt", ["--rate", 8000]
    if model == "speech_vqvae":
        more += ["--downsample", 16, "--length", 512, *VQ[:2], *VQ[4:]]
    run(f"train {model} --out", out, "--data", tmp_path, *SMALL, *WAVE, *more, "--holdout", "0.5")
    run(f"sample {model}", out, "--out", tmp_path / "s.wav", *(["--seconds", 0.01] if model == "wavenet" else []))
    run("evaluate", out, "--data", tmp_path)


def test_the_losses_are_the_cpus(images, tmp_path, capsys):
    for elsewhere in (True, False):
        out = tmp_path / f"{elsewhere}.pt"
        run("train gated_pixelcnn --out", out, *images, *SMALL, *PIXELS, elsewhere=elsewhere)
        run("evaluate", out, *images, elsewhere=elsewhere)
    if ON_GPU:
        pytest.skip("its sums are rounded otherwise")
    lines = capsys.readouterr().out.replace("True", "False").splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


def test_what_is_elsewhere_stays_there():
    with Elsewhere():
        there, weight = torch.ones(3, device=DEVICE), torch.nn.Linear(3, 2).to(DEVICE).weight
        assert there.device == weight.device == DEVICE
        assert float((weight @ there).sum().detach()) != 0
        with pytest.raises(AssertionError, match="on the CPU"):
            there + torch.ones(3)
        with pytest.raises(AssertionError, match="generator"):
            torch.rand(3, device=DEVICE, generator=torch.Generator())


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "meta"])
def test_a_device_that_is_not_there(device, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "m.pt"), "--device", device])
    assert f"--device: expected a device that torch has here, got '{device}'" in capsys.readouterr().err
