"""Tiles of the Triton kernels, measured: python bench/tune.py [--out FILE] -> the table that their launchers read.

Takes the benchmarks' cases, and for each kernel's launches tries one option after the other, twice over; what is at
least 3 % faster than the heuristic is written. Other sizes: add them to the listing of bench/gpu_cases.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from fastgen.kernels import tuning
from gpu import CUDA, graph_seconds, seconds
from gpu_cases import listing

CHOICES = {
    "ROWS": (16, 32, 64, 128, 256), "STEPS": (16, 32, 64, 128, 256), "COLUMNS": (16, 32, 64, 128, 256),
    "CHUNK": (16, 32, 64, 128), "CODES": (32, 64, 128, 256), "OUTS": (16, 32, 64, 128),
    "num_warps": (2, 4, 8, 16), "num_stages": (1, 2, 3, 4, 5),
}  # fmt: skip
OPS = ("nearest_code", "gated_masked_conv2d", "masked_conv2d", "wavenet_layer", "gated_causal_conv1d")
TOO_LARGE = (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError)


def best_options(key: str, options: tuning.Options, call: Callable[[], object], tiny: bool) -> tuple[float, dict]:
    """-> how much faster than the heuristic, and by which options."""
    measured = graph_seconds if CUDA else seconds
    start = best = measured(call)
    chosen: tuning.Options = {}
    for _ in range(1 if tiny else 2):
        for name in [n for n in CHOICES if n in options][: 1 if tiny else None]:
            for value in CHOICES[name][:2] if tiny else CHOICES[name]:
                candidate = chosen | {name: value}
                if (options | chosen)[name] == value:
                    continue
                try:
                    with tuning.trial(key, candidate):
                        time = measured(call)
                except TOO_LARGE:
                    continue
                if time < best:
                    best, chosen = time, candidate
    return start / best, chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: the folder that the launchers read")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if CUDA else "rehearsal"
    out = options.out or tuning.file_for(device)
    table = dict(json.loads(out.read_text())) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for _, make in (entry for entry in listing(options.tiny) if entry[0].split()[0] in OPS):
        for case in make():
            call = case.ways["fastgen"]
            tuning.forget()
            call()
            for key, given in list(tuning.asked.items()):
                gain, chosen = best_options(key, given, call, options.tiny)
                print(f"{case.name}: {key}: {gain:.2f}x by {chosen or 'nothing'}")
                if gain > 1.03:
                    table[key] = table.get(key, {}) | chosen
        out.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")  # what is measured is kept
    print(out)


if __name__ == "__main__":
    main()
