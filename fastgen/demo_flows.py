"""The demo's normalizing flow: a RealNVP on two moons, and its picture."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from fastgen.checkpoints import save_checkpoint
from fastgen.densities import draw, save_density
from fastgen.models import RealNVP
from fastgen.training_flows import train_flow

POINTS = 20000


def demo_flows(console: Any, out: str | os.PathLike[str], seconds: float) -> None:
    """Train for `seconds` on two moons; write moons.png and flow.pt."""
    out = Path(out)
    torch.manual_seed(0)
    points = draw("two_moons", POINTS, torch.Generator().manual_seed(0))
    model = RealNVP((2,))
    console.print(f"RealNVP, {sum(p.numel() for p in model.parameters()):,} parameters; {POINTS:,} points of two moons")
    log = train_flow(model, points, seconds=seconds, batch_size=512, learning_rate=3e-3, save_every=10**9)
    model.eval()
    with torch.no_grad():
        x = points[-1000:]
        z, _ = model.encode(x)
        off = float((model.decode(z) - x).abs().max())
    console.print(
        f"{log.step} steps; held out {log.validation[-1][1]:.3f} nats a point; decode(encode(x)) is x within {off:.0e}"
    )
    samples = model.sample(POINTS, generator=torch.Generator().manual_seed(0))
    save_density(out / "moons.png", model.log_prob, points, samples)
    save_checkpoint(out / "flow.pt", model)
    console.print(f"written: {out}/moons.png (data, density, samples), flow.pt")
