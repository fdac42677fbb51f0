"""Training of FVSBN, NADE and the VAE, resumption, and the commands."""

import pytest
import torch
from PIL import Image

from fastgen.__main__ import main
from fastgen.models import FVSBN, NADE, VAE
from fastgen.training_vectors import load_vectors, train_vectors

MODELS = {
    "fvsbn": lambda: FVSBN(20),
    "nade": lambda: NADE(20, hidden=8, order=torch.randperm(20)),
    "vae": lambda: VAE(20, latent=3, hidden=16, layers=1),
}


@pytest.fixture
def images():
    """Bright or dark all over: one bit each."""
    torch.manual_seed(0)
    return torch.randint(2, (200, 1, 1, 1)).mul(255).to(torch.uint8).expand(-1, 1, 4, 5).contiguous()


@pytest.mark.parametrize("name", MODELS)
def test_learns(name, images):
    torch.manual_seed(0)
    log = train_vectors(MODELS[name](), images, steps=300, batch_size=50, learning_rate=0.02, progress=False)
    assert log.losses[0] > 10
    assert log.validation[-1][1] < 2.5  # of 0.69 at the least


@pytest.mark.parametrize("name", MODELS)
def test_resumed_is_uninterrupted(name, images, tmp_path):
    losses = {}
    for parts in ((20,), (7, 20)):
        torch.manual_seed(0)
        model, path, seen = MODELS[name](), tmp_path / f"{len(parts)}.pt", []
        for i, steps in enumerate(parts):
            log = train_vectors(
                model, images, steps=steps, batch_size=10, checkpoint=path, resume=i > 0, progress=False
            )
            seen += log.losses
        losses[len(parts)] = seen
    assert losses[1] == losses[2]
    loaded, size = load_vectors(path)
    assert size == (1, 4, 5)
    x = torch.randint(2, (3, 20))
    noise = {"noise": torch.zeros(3, 3)} if name == "vae" else {}
    figure = "elbo" if name == "vae" else "log_prob"
    assert torch.equal(getattr(loaded.eval(), figure)(x, **noise), getattr(model.eval(), figure)(x, **noise))


@pytest.mark.parametrize("name", MODELS)
def test_commands(name, tmp_path, capsys):
    pytest.importorskip("sklearn")
    out, sizes = tmp_path / "model.pt", {"nade": ["--hidden", "20"], "vae": ["--latent", "4", "--hidden", "20"]}
    train = ["train", name, "--out", str(out), "--batch-size", "20"]
    assert main([*train, "--steps", "3", *sizes.get(name, [])]) == 0
    assert main([*train, "--steps", "5", "--resume"]) == 0
    assert "step 5, loss" in capsys.readouterr().out
    assert Image.open(tmp_path / "model.png").size[0] > 0
    assert main([*train, "--steps", "9"]) == 2
    assert "exists; add --resume" in capsys.readouterr().err
    other = "nade" if name == "vae" else "vae"
    assert main(["train", other, "--out", str(out), "--steps", "9", "--resume"]) == 2
    assert "is of a" in capsys.readouterr().err
    assert main(["sample", "vectors", str(out), "--number", "5", "--out", str(tmp_path / "drawn.png")]) == 0
    assert (tmp_path / "drawn.png").exists()
    if name == "vae":
        assert main([*train, "--steps", "9", "--resume", "--convolutions"]) == 2
        assert "is of perceptrons: leave out --convolutions" in capsys.readouterr().err
        assert main([*train, "--steps", "9", "--resume", "--beta", "0.5", "--free-bits", "0.1"]) == 2
        assert "leave out --beta 0.5, --free-bits 0.1" in capsys.readouterr().err


@pytest.mark.parametrize(("model", "images", "error", "message"), [
    (NADE(19), torch.zeros(4, 1, 4, 5, dtype=torch.uint8), ValueError, "images must have 19 values each"),
    (NADE(20, values=3), torch.zeros(4, 1, 4, 5, dtype=torch.uint8), ValueError, "model must be one of binary"),
    (VAE(20, distribution="gaussian"), torch.zeros(4, 1, 4, 5, dtype=torch.uint8), ValueError, "one of binary"),
    (NADE(20), torch.zeros(4, 1, 4, 5), ValueError, "images must be uint8"),
    (torch.nn.Linear(2, 2), torch.zeros(4, 1, 4, 5, dtype=torch.uint8), TypeError, "model must be one of FVSBN"),
    (NADE(20), torch.zeros(0, 1, 4, 5, dtype=torch.uint8), ValueError, "at least one to train on"),
])  # fmt: skip
def test_bad_input(model, images, error, message):
    with pytest.raises(error, match=message):
        train_vectors(model, images, steps=1, progress=False)
