"""The commands that train FVSBN, NADE and the VAE on binarised images, and draw from them."""

from __future__ import annotations

import argparse

import torch

from fastgen.commands_images import (
    GRID_IMAGES,
    check_new,
    check_resumed,
    grid_beside,
    loop_options,
    read_images,
    save_square,
)
from fastgen.files import check_picture

VECTOR_COMMANDS = {"fvsbn": "FVSBN", "nade": "NADE", "vae": "VAE"}
VECTOR_SIZES: dict[str, dict[str, int | float]] = {
    "FVSBN": {}, "NADE": {"hidden": 500},
    "VAE": {"hidden": 500, "latent": 40, "layers": 2, "channels": 24, "beta": 1.0, "free_bits": 0.0},
}  # fmt: skip


def train_vectors_command(options: argparse.Namespace) -> None:
    """`train fvsbn`, `train nade` and `train vae`."""
    from fastgen.training_vectors import MODELS, load_vectors, save_samples, train_vectors

    name = VECTOR_COMMANDS[options.model]
    grid = grid_beside(options)
    asked = {size: getattr(options, size) for size in VECTOR_SIZES[name] if getattr(options, size) is not None}
    if options.resume:
        model, _ = load_vectors(options.out)
        check_resumed(options, model, MODELS[name], asked)
        if name == "VAE" and options.convolutions and not model.config["image_size"]:
            raise ValueError(f"{options.out}: is of perceptrons: leave out --convolutions, or --resume")
    else:
        check_new(options)
    images = read_images(options)
    if not options.resume:
        torch.manual_seed(options.seed)
        if name == "VAE" and options.convolutions:
            if images.shape[1] != 1:
                raise ValueError(f"--convolutions: takes images of one channel, got {images.shape[1]}")
            asked["image_size"] = tuple(images.shape[2:])
        model = MODELS[name](images[0].numel(), **VECTOR_SIZES[name] | asked)  # type: ignore[assignment]
    log = train_vectors(model.to(options.device), images, **loop_options(options))
    held_out = f", held out {log.validation[-1][1]:.2f}" if log.validation else ""
    print(f"{options.out}: step {log.step}, loss {log.losses[-1]:.2f} nats per image{held_out}")
    save_samples(grid, model, images[-GRID_IMAGES:], seed=options.seed)
    last = "reconstructions" if name == "VAE" else "their upper halves completed"
    print(f"{grid}: samples; images, and {last}")


def sample_vectors(options: argparse.Namespace) -> None:
    """`sample vectors`."""
    from fastgen.training_vectors import load_vectors

    check_picture(options.out)
    model, size = load_vectors(options.checkpoint)
    drawn = model.to(options.device).sample(
        options.number, temperature=options.temperature, generator=torch.Generator().manual_seed(options.seed)
    )
    save_square(options.out, drawn.view(-1, *size).float())
    print(f"{options.out}: {options.number} images of {size[1]} x {size[2]} pixels")
