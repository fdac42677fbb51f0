"""The commands that train on images, and draw them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.files import check_picture, check_writable

VQVAE_SIZES = {
    "hidden-channels": 128, "residual-layers": 2, "residual-channels": 32, "codebook-size": 512, "code-dim": 64,
    "downsample": 2,
}  # fmt: skip
PIXEL_SIZES = {
    "PixelCNN": {"channels": 64, "layers": 8, "kernel-size": 3},
    "GatedPixelCNN": {"channels": 64, "layers": 8, "kernel-size": 3},
    "PixelSNAIL": {"channels": 32, "layers": 3},
    "PixelRNN": {"channels": 32, "layers": 2},
    "GPTPrior": {"channels": 128, "layers": 4},
}
PIXEL_COMMANDS = {
    "pixelcnn": "PixelCNN", "gated_pixelcnn": "GatedPixelCNN", "pixelsnail": "PixelSNAIL", "pixelrnn": "PixelRNN",
    "gpt": "GPTPrior",
}  # fmt: skip
GRID_IMAGES = 16


def train_vqvae_command(options: argparse.Namespace) -> None:
    """`train vqvae` and `train vqvae2`, and their priors with --then prior."""
    from fastgen.checkpoints import read_checkpoint
    from fastgen.images import pad_to_multiple, save_grid
    from fastgen.training_images import MODELS, as_floats, code_perplexities, load_vqvae, train_vqvae
    from fastgen.training_stages import check_priors

    chosen = {name: getattr(options, name) for name in (size.replace("-", "_") for size in VQVAE_SIZES)}
    given = {name: value for name, value in chosen.items() if value is not None}
    grid = grid_beside(options)
    if options.resume:
        model = load_vqvae(options.out)
        check_resumed(options, model, MODELS[options.model.upper()], given)
        if options.then and read_checkpoint(options.out, ("step",), "train_vqvae")["step"] >= options.steps:
            check_priors(options.out, model, resume=True)
            print(f"{options.out}: has its {options.steps} steps")
            train_prior_command(options, options.out)
            return
    else:
        check_new(options)
    images = read_images(options)
    if not options.resume:
        torch.manual_seed(options.seed)
        sizes = {n.replace("-", "_"): v for n, v in VQVAE_SIZES.items()} | given
        model = MODELS[options.model.upper()](
            image_channels=images.shape[1], kmeans_init=True, threshold_ema_dead_code=1.0,
            variance=max(float(as_floats(images[:4096]).var()), 1e-6), **sizes,
        )  # type: ignore[arg-type]  # fmt: skip
    check_priors(options.out, model, resume=False)  # they would be of other codes than those to come
    check_then(options, model, len(images))
    images = pad_to_multiple(images, model.factor)
    log = train_vqvae(model.to(options.device), images, **loop_options(options))
    shown = as_floats(images[-GRID_IMAGES:])
    model.eval()
    with torch.no_grad():
        save_grid(grid, [shown, model(shown.to(options.device)).reconstruction.cpu()])
    used = ", ".join(f"{p:.1f}" for p in code_perplexities(model, images[-1024:]))
    held_out = f", held out {log.validation[-1][1]:.4f} of the variance" if log.validation else ""
    print(f"{options.out}: step {log.step}, loss {log.losses[-1]:.4f}{held_out}, perplexity of the codes {used}")
    print(f"{grid}: images above, reconstructions below")
    if options.then:
        train_prior_command(options, options.out)


def check_then(options: argparse.Namespace, model: nn.Module, number: int | None = None) -> None:
    """Refuse before the first stage what the second would refuse; `number` of images, which labels must match."""
    from fastgen.images import load_labels
    from fastgen.training_stages import check_kinds, check_sizes

    if not options.then:
        for flag in ("priors", "class_labels", "prior_channels", "prior_layers", "prior_steps"):
            if getattr(options, flag) not in (None, False, []):
                raise ValueError(f"--{flag.replace('_', '-')}: needs --then prior")
        return
    check_sizes(model, check_kinds(model, options.priors), prior_sizes(options))
    if options.class_labels and number is not None:
        classes_of(load_labels(options.data), number, "--class-labels")


def classes_of(labels: Tensor, number: int, flag: str = "--labels") -> int:
    """How many classes labels are of; `number` of them are expected."""
    if len(labels) != number:
        raise ValueError(f"{flag}: {number} labels are expected, one for each image, got {len(labels)}")
    if int(labels.min()) < 0:
        raise ValueError(f"{flag}: labels must be >= 0, got {int(labels.min())}")
    return int(labels.max()) + 1


def prior_sizes(options: argparse.Namespace) -> dict[str, int]:
    """Those asked for."""
    asked = {"channels": options.prior_channels, "layers": options.prior_layers}
    return {name: size for name, size in asked.items() if size is not None}


def train_prior_command(options: argparse.Namespace, path: Path | None = None) -> None:
    """`train prior`, and the second stage of `train vqvae --then prior`."""
    from fastgen.commands_speech import train_speech_prior
    from fastgen.images import load_labels, pad_to_multiple
    from fastgen.models import SpeechVQVAE
    from fastgen.training_stages import beside, load_quantizer, load_two_stage, train_priors

    path = options.of if path is None else path
    model = load_quantizer(path)
    if isinstance(model, SpeechVQVAE):
        if options.data is None:
            raise ValueError(f"{path}: is of speech; --data is needed, a folder of audio")
        train_speech_prior(options, path)
        return
    images = read_images(options)
    labels = load_labels(options.data) if options.class_labels else None
    kinds = options.priors or None
    settings = loop_options(options) | {"steps": options.prior_steps or options.steps}
    del settings["checkpoint"]
    logs = train_priors(
        path, pad_to_multiple(images, model.factor), labels, kinds=kinds,
        sizes=prior_sizes(options), device=options.device, **settings,
    )  # fmt: skip
    for level, log in logs.items():
        held_out = f", held out {log.validation[-1][1]:.4f}" if log.validation else ""
        print(f"prior of {level}: step {log.step}, loss {log.losses[-1]:.4f} bits per code{held_out}")
    whole, size = load_two_stage(path)
    drawn_labels = None if labels is None else torch.arange(GRID_IMAGES, device=options.device) % whole.classes
    picture = beside(path, "samples", ".png")
    generator = torch.Generator().manual_seed(options.seed)
    save_square(
        picture, whole.to(options.device).eval().sample(GRID_IMAGES, size, labels=drawn_labels, generator=generator)
    )
    print(f"{picture}: samples")


def sample_two_stage(options: argparse.Namespace) -> None:
    """`sample vqvae`."""
    from fastgen.training_stages import load_two_stage

    check_picture(options.out)
    model, size = load_two_stage(options.checkpoint)
    model.to(options.device)
    if (options.label is None) == bool(model.classes):
        wanted = "need --label" if model.classes else "have no classes: leave out --label"
        raise ValueError(f"{options.checkpoint}: its priors {wanted}")
    if options.label is not None and not 0 <= options.label < model.classes:
        raise ValueError(f"--label: must lie in [0, {model.classes}), got {options.label}")
    labels = None if options.label is None else torch.full((options.number,), options.label, device=options.device)
    drawn = model.eval().sample(
        options.number, size, labels=labels, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, generator=torch.Generator().manual_seed(options.seed),
        dtype=getattr(torch, options.dtype), backend=options.backend, progress=True,
    )  # fmt: skip
    save_square(options.out, drawn)
    print(f"{options.out}: {options.number} images of {size[0]} x {size[1]} pixels")


def train_pixels_command(options: argparse.Namespace) -> None:
    """`train pixelcnn` and its kin."""
    from fastgen.images import load_labels
    from fastgen.training_pixels import MODELS, load_pixels, save_samples, train_pixels

    kind = MODELS[PIXEL_COMMANDS[options.model]]
    grid = grid_beside(options)
    defaults = {size.replace("-", "_"): value for size, value in PIXEL_SIZES[kind.__name__].items()}
    names = (*defaults, "levels", "codes", "distribution", "kind")
    asked = {name: getattr(options, name) for name in names if getattr(options, name, None) is not None}
    if options.resume:
        model, _ = load_pixels(options.out)
        check_resumed(options, model, kind, asked)
    else:
        check_new(options)
    of_codes = model.codes if options.resume else options.codes
    if of_codes and options.data is None:
        raise ValueError("--codes: needs --data, an npz archive of integers (N, H, W)")
    images = read_images(options, codes=bool(of_codes))
    labels = load_labels(options.data) if options.labels else None
    if not options.resume:
        torch.manual_seed(options.seed)
        if kind is MODELS["GPTPrior"]:
            asked["image_size"] = tuple(images.shape[1:])
        elif not of_codes:
            asked["image_channels"] = images.shape[1]
        if labels is not None:
            asked["classes"] = classes_of(labels, len(images))
        model = kind(**defaults | asked)
    log = train_pixels(model.to(options.device), images, labels=labels, **loop_options(options))
    held_out = f", held out {log.validation[-1][1]:.4f}" if log.validation else ""
    print(f"{options.out}: step {log.step}, loss {log.losses[-1]:.4f} bits per value{held_out}")
    save_samples(
        grid, model, images[-GRID_IMAGES:], None if labels is None else labels[-GRID_IMAGES:], seed=options.seed
    )
    print(f"{grid}: samples; images, and their upper halves completed")


def sample_pixels(options: argparse.Namespace) -> None:
    """`sample pixels`."""
    from fastgen.training_pixels import load_pixels, to_pixels

    check_picture(options.out)
    model, size = load_pixels(options.checkpoint)
    model.to(options.device).eval()
    if model.config["cond_codes"] or model.config["cond_channels"]:
        raise ValueError(f"{options.checkpoint}: the model is conditioned on a map; sample it from Python")
    labels = asked_labels(options, model)
    values = model.sample(
        options.number, tuple(options.image_size or size), labels=labels, temperature=options.temperature,
        top_k=options.top_k, top_p=options.top_p, dtype=getattr(torch, options.dtype),
        generator=torch.Generator().manual_seed(options.seed), backend=options.backend, progress=True,
    )  # fmt: skip
    pictures = to_pixels(values, model)
    save_square(options.out, pictures)
    print(f"{options.out}: {options.number} images of {values.shape[-2]} x {values.shape[-1]} pixels")


def read_images(options: argparse.Namespace, *, codes: bool = False) -> Tensor:
    """Of --data and --size, at least one: uint8 (N, C, H, W); maps of codes int64 (N, H, W)."""
    from fastgen.images import load_codes, load_images

    images = load_codes(options.data) if codes else load_images(options.data, size=options.size)
    if not len(images):
        raise ValueError(f"{options.data}: expected at least one image, got none")
    return images


def loop_options(options: argparse.Namespace) -> dict[str, Any]:
    """What every training takes from the command line."""
    names = ("steps", "batch_size", "learning_rate", "schedule", "precision", "holdout", "seed", "save_every", "resume")
    return {name: getattr(options, name) for name in names} | {"checkpoint": options.out}


def check_new(options: argparse.Namespace) -> None:
    """Refuse to write over a checkpoint, or where none can be written: said before any data are read."""
    check_writable(options.out)
    if options.out.exists():
        raise FileExistsError(f"{options.out}: exists; add --resume to go on from it, or choose another --out")


def check_resumed(
    options: argparse.Namespace, model: nn.Module, kind: type, asked: dict[str, Any],
    flags: dict[str, str] | None = None,
) -> None:  # fmt: skip
    """Refuse to go on with a model of another kind, or of other settings than those asked for.

    `flags` names the options that are called otherwise than the settings.
    """
    config: dict[str, Any] = model.config  # type: ignore[assignment]
    if type(model) is not kind:
        raise ValueError(f"{options.out}: is of a {type(model).__name__}, not of a {kind.__name__}")
    if hasattr(options, "labels") and bool(config.get("classes")) != options.labels:
        wanted = "leave out --labels" if options.labels else "add --labels"
        raise ValueError(f"{options.out}: the model has {config['classes']} classes: {wanted}")
    flag = {name: "--" + name.replace("_", "-") for name in asked} | (flags or {})
    different = [flag[n] if v is True else f"{flag[n]} {v}" for n, v in asked.items() if config[n] != v]
    if different:
        raise ValueError(f"{options.out}: is of another model: leave out {', '.join(different)}, or --resume")


def asked_labels(options: argparse.Namespace, model: nn.Module) -> Tensor | None:
    """--label for each of the samples; None where the model has no classes."""
    classes = model.config["classes"]  # type: ignore[index]
    if (options.label is None) == bool(classes):
        wanted = "needs --label" if classes else "has no classes: leave out --label"
        raise ValueError(f"{options.checkpoint}: the model {wanted}")
    if options.label is None:
        return None
    if not 0 <= options.label < classes:
        raise ValueError(f"--label: must lie in [0, {classes}), got {options.label}")
    return torch.full((options.number,), options.label, device=options.device)


def grid_beside(options: argparse.Namespace) -> Path:
    """Where the pictures go that belong to --out."""
    grid: Path = options.grid or options.out.with_suffix(".png")
    if grid.resolve() == options.out.resolve():
        raise ValueError(f"{options.out}: is where the pictures go; choose another --out or --grid")
    check_picture(grid)
    return grid


def save_square(path: Path, pictures: Tensor) -> None:
    """Write (n, C, H, W) in [0, 1] as a grid of about as many rows as columns."""
    from fastgen.images import save_grid

    columns = math.ceil(math.sqrt(len(pictures)))
    blank = pictures.new_ones(-len(pictures) % columns, *pictures.shape[1:])
    save_grid(path, list(torch.cat([pictures, blank]).split(columns)))
