"""recipes/: each file is options that its command takes."""

from pathlib import Path

import pytest

from fastgen.__main__ import _parser

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.txt"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_options_are_known(file):
    options = _parser().parse_args(["train", f"@{file}", "--data", "data", "--out", "out.pt"])
    assert options.model == file.stem.split("-")[0]
    assert options.schedule == "cosine"


def test_there_is_one_for_each_system():
    there = {file.stem.split("-")[0] for file in RECIPES}
    assert there >= {
        "fvsbn", "nade", "pixelrnn", "pixelcnn", "gated_pixelcnn", "pixelsnail", "wavenet", "realnvp", "glow", "vae",
        "vqvae", "vqvae2", "speech_vqvae",
    }  # fmt: skip
