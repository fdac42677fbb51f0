"""The commands of normalizing flows."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fastgen.commands_images import (
    GRID_IMAGES,
    asked_labels,
    check_new,
    check_resumed,
    classes_of,
    grid_beside,
    loop_options,
    read_images,
    save_square,
)
from fastgen.files import check_picture

FLOW_COMMANDS = {"realnvp": "RealNVP", "glow": "Glow"}
FLOW_SIZES = {
    "RealNVP": {
        "scales": "of images; default: 2", "couplings": "on each scale and kind of mask, default: 3; points: 8",
        "hidden": "channels of the conditioners, default: 64",
    },
    "Glow": {
        "scales": "of images; default: 2", "flow-steps": "on each scale, default: 8",
        "hidden": "channels of the conditioners, default: 128; points: 64",
    },
}  # fmt: skip


def train_flow_command(options: argparse.Namespace) -> None:
    """`train realnvp` and `train glow`."""
    from fastgen.densities import POINTS, draw, points_of, save_density
    from fastgen.images import load_labels, pad_to_multiple
    from fastgen.training_flows import MODELS, read_flow, save_samples, train_flow

    kind = MODELS[FLOW_COMMANDS[options.model]]
    grid = grid_beside(options)
    sizes = [name.replace("-", "_") for name in FLOW_SIZES[kind.__name__]]
    asked: dict[str, Any] = {n: v for n in ("levels", *sizes) if (v := getattr(options, n)) is not None}
    if "flow_steps" in asked:
        asked["steps"] = asked.pop("flow_steps")
    if options.reversible:
        asked["reversible"] = True
    if options.data is not None and options.density is not None:
        raise ValueError(f"--data or --density, one of the two; got {options.data} and {options.density}")
    density = options.density or "two_moons"
    if options.resume:
        model, trained_on = read_flow(options.out)
        known, seed = points_of(trained_on)
        if options.data is None and known is None:
            raise ValueError(f"{options.out}: was trained on --data: give it again")
        if options.density not in (None, known):
            raise ValueError(f"{options.out}: was trained on {known or 'other data'}: leave out --density")
        if options.data is None and seed != options.seed:
            raise ValueError(f"{options.out}: its points were drawn with --seed {seed}: give that")
        density = known or density
        check_resumed(options, model, kind, asked, {"steps": "--flow-steps"})
    else:
        check_new(options)
    labels = None
    if options.data is None:
        if options.labels:
            raise ValueError("--labels: needs --data; points have none")
        if options.levels:
            raise ValueError("--levels: needs --data; points have none")
        data = draw(density, POINTS, torch.Generator().manual_seed(options.seed))
        asked = {"hidden": 64} | asked
    else:
        scales = model.config["scales"] if options.resume else asked.get("scales", 2)
        data = pad_to_multiple(read_images(options), 2 ** max(scales, 0))
        labels = load_labels(options.data) if options.labels else None
    if not options.resume:
        torch.manual_seed(options.seed)
        if labels is not None:
            asked["classes"] = classes_of(labels, len(data))
        model = kind(tuple(data.shape[1:]), **asked)  # type: ignore[call-arg]
    source = f"{density} {options.seed}" if options.data is None else None
    log = train_flow(model.to(options.device), data, labels=labels, **loop_options(options), source=source)
    unit = "bits per dimension" if model.levels else "nats"
    held_out = f", held out {log.validation[-1][1]:.4f}" if log.validation else ""
    print(f"{options.out}: step {log.step}, loss {log.losses[-1]:.4f} {unit}{held_out}")
    model.eval()
    if options.data is None:
        save_density(
            grid, model.log_prob, data, model.sample(POINTS, generator=torch.Generator().manual_seed(options.seed))
        )
        print(f"{grid}: data, density and samples")
        return
    of_shown = None if labels is None else labels[-GRID_IMAGES:]
    save_samples(grid, model, data[-GRID_IMAGES:], of_shown, seed=options.seed)
    print(f"{grid}: samples; images; a way from the first to the last")


def sample_flow(options: argparse.Namespace) -> None:
    """`sample flow`."""
    from fastgen.densities import save_density
    from fastgen.training_flows import load_flow

    check_picture(options.out)
    model = load_flow(options.checkpoint).to(options.device).eval()
    labels = asked_labels(options, model)
    generator = torch.Generator().manual_seed(options.seed)
    if len(model.shape) == 1:
        if model.shape != (2,):
            raise ValueError(
                f"{options.checkpoint}: pictures are of points in the plane, the model's have {model.dims} sides"
            )
        drawn = model.sample(options.number, temperature=options.temperature, generator=generator)
        save_density(options.out, model.log_prob, drawn, drawn)
        print(f"{options.out}: {options.number} points, and the density")
        return
    drawn = model.sample(options.number, labels=labels, temperature=options.temperature, generator=generator)
    save_square(options.out, drawn.float() / (model.levels - 1))
    print(f"{options.out}: {options.number} images of {model.shape[1]} x {model.shape[2]} pixels")
