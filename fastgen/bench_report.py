"""What `fastgen.bench` makes of its figures: tables in Markdown, and plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen.files import whole_file

Benchmark = dict[str, Any]


def tables(results: list[dict[str, Any]]) -> str:
    """Of everything that was measured, one machine after another."""
    lines: list[str] = []
    for result in results:
        measured = result["benchmarks"]
        lines += [f"## {_machine(result)}", ""]
        for section in (_generation, _layers, _training, _quantization, _pixels, _sampling, _flows, _likelihoods):
            lines += section(measured)
        lines.append("")
    return "\n".join(lines).replace("\n\n\n", "\n\n").strip()


def summary(result: dict[str, Any]) -> str:
    """Of whole models on one machine."""
    measured = result["benchmarks"]
    lines = [f"{_machine(result)}:", *_generation(measured), *_sampling(measured), *_training(measured)]
    return "\n".join(lines)


def _machine(result: dict[str, Any]) -> str:
    about = result["fastgen"]
    date = result["datetime"][:10]
    isa = about["isa"] if about["isa"] == about["best_isa"] else f"{about['isa']} in place of {about['best_isa']}"
    return f"{result['cpu']}, {isa}, {about['threads']} threads, torch {about['torch']}, {date}"


def _table(heads: Sequence[str], rows: list[list[str]]) -> list[str]:
    """Of numbers, the first column aside; nothing where there are no rows."""
    if not rows:
        return []
    return ["", _row(heads), "|---|" + "---:|" * (len(heads) - 1), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _generation(benchmarks: list[Benchmark]) -> list[str]:
    ways = ("float32", "bfloat16", "PyTorch queue", "wavenet_vocoder")
    rows = []
    for b in benchmarks:
        if "samples_per_second" not in b:
            continue
        rate = b["samples_per_second"]
        peer = rate.get("wavenet_vocoder")
        ratio = "" if peer is None else f"{rate['float32'] / peer:.0f}x, {rate['bfloat16'] / peer:.0f}x"
        rows.append([b["case"].removeprefix("generate "), *(_count(rate.get(way)) for way in ways), ratio])
    heads = ("generation, samples/s", "float32", "bfloat16 weights", "PyTorch queue", "wavenet_vocoder", "ratio")
    return _table(heads, rows)


def _layers(benchmarks: list[Benchmark]) -> list[str]:
    ways = ("fastgen", "fastgen, reused outputs", "eager", "torch.compile")
    rows = [
        [b["case"].removeprefix("layer "), *_ms(b, ways, 1), f"{b['of_fma_peak']:.0%}", _memory(b)]
        for b in benchmarks
        if "gflops" in b and "search" not in b
    ]
    heads = ("layer, ms", "fastgen", "reused outputs", "eager", "torch.compile", "of FMA peak", MEMORY)
    return _table(heads, rows)


def _training(benchmarks: list[Benchmark]) -> list[str]:
    """Of whole models."""
    rows = []
    for b in benchmarks:
        if not b.get("training"):
            continue
        cells = []
        for dtype in ("", " bfloat16"):
            ours, theirs = (b["seconds"].get(way + dtype) for way in ("fastgen", "eager"))
            both = ours is not None and theirs is not None
            cells += [_milliseconds(ours), _milliseconds(theirs), f"{theirs / ours:.1f}x" if both else ""]
        rows.append([b["case"], *cells, _memory(b)])
    heads = (
        "gradients of a training step, ms", "fastgen", "PyTorch", "ratio", "bfloat16: fastgen", "PyTorch", "ratio",
        "extra memory in float32, MB: fastgen / PyTorch",
    )  # fmt: skip
    return _table(heads, rows)


def _quantization(benchmarks: list[Benchmark]) -> list[str]:
    """Of the search, and of the layer around it."""
    ways = ("fastgen", "faiss", "eager", "torch.compile", "cdist")
    searches = [
        [b["case"].removeprefix("search "), *_ms(b, ways, 1), f"{b['of_fma_peak']:.0%}", _memory(b)]
        for b in benchmarks
        if b.get("search")
    ]
    rows = []
    for b in benchmarks:
        if not b.get("layer"):
            continue
        ours, theirs = b["seconds"]["fastgen"], b["seconds"]["vector-quantize-pytorch"]
        ms = [f"{1e3 * ours:.1f}", f"{1e3 * theirs:.0f}", f"{theirs / ours:.0f}x"]
        rows.append([b["case"], *ms, _memory(b, "vector-quantize-pytorch")])
    heads = ("`VectorQuantize`, ms", "fastgen", "vector-quantize-pytorch", "ratio", "extra memory, MB")
    return _table(("nearest code, ms", *ways, "of FMA peak", MEMORY), searches) + _table(heads, rows)


def _pixels(benchmarks: list[Benchmark]) -> list[str]:
    """Of convolutions and of what else works on images."""
    lines = []
    for kind, title, ways in (
        ("masked", "gated masked convolution", ("eager", "cropped", "torch.compile")),
        ("conv2d", "convolution with ReLU", ("eager", "torch.compile")),
        ("resampling", "4x4 convolution with stride 2, or its transpose, and ReLU", ("eager", "torch.compile")),
        ("lstm", "LSTM over an image", ("eager",)),
        ("linear", "linear layer", ("eager", "torch.compile")),
        ("attention", "causal attention", ("eager", "torch.compile")),
    ):
        rows = [
            [
                b["case"],
                *_ms(b, ("fastgen", *ways), 1 if kind == "masked" else 2),
                f"{b['of_fma_peak']:.0%}",
                _memory(b),
            ]
            for b in benchmarks
            if b.get(kind)
        ]
        named = {"cropped": "cropped to live rows", "eager": "eager (fused)" if kind == "attention" else "eager"}
        heads = (f"{title}, ms", "fastgen", *(named.get(way, way) for way in ways), "of FMA peak", MEMORY)
        lines += _table(heads, rows)
    return lines


def _sampling(benchmarks: list[Benchmark]) -> list[str]:
    """Of images."""
    ways = ("float32", "bfloat16", "forward", "cropped forward")
    rows = []
    for b in benchmarks:
        if "pixels" not in b:
            continue
        seconds = b["seconds"]
        ratio = ", ".join(f"{b['pixels'] * seconds['forward'] / seconds[way]:.0f}x" for way in ways[:2])
        rows.append([b["case"], *(_milliseconds(seconds[way]) for way in ways), ratio])
    heads = (
        "sampling images of 28x28, ms", "float32", "bfloat16 weights", "one forward pass", "cropped forward pass",
        "faster than a forward pass for each pixel",
    )  # fmt: skip
    return _table(heads, rows)


def _flows(benchmarks: list[Benchmark]) -> list[str]:
    """Of the coupling, of a step of Glow, and of Glow's training."""
    ways = ("fastgen", "eager", "torch.compile", "normflows", "nflows")
    couplings = [
        [
            b["case"], *_ms(b, ways, 2), f"{b['of_copy']:.0%}" if "of_copy" in b else "",
            _memory(b, "eager" if "eager" in b["seconds"] else "normflows"),
        ]
        for b in benchmarks
        if b.get("coupling") or b.get("glow_step")
    ]  # fmt: skip
    heads = ("flows, ms", *ways, "of copy bandwidth", f"{MEMORY} or normflows")
    kinds = ("reversible", "plain", "normflows")
    trainings = [
        [
            b["case"], *_ms(b, kinds, 0), _megabytes(b["activation_bytes"], kinds),
            f"{b['parameter_bytes'] / 1e6:.0f}",
        ]
        for b in benchmarks
        if b.get("glow_training")
    ]  # fmt: skip
    activations = f"activations, MB: {' / '.join(kinds)}"
    of_training = ("training step", *(f"{kind}, ms" for kind in kinds), activations, "parameters, MB")
    return _table(heads, couplings) + _table(of_training, trainings)


def _likelihoods(benchmarks: list[Benchmark]) -> list[str]:
    """Of the ops of NADE and the VAE."""
    ways = ("fastgen", "eager", "chunked PyTorch", "torch.compile", "loop over inputs")
    rows = [[b["case"], *_ms(b, ways, 2), _memory(b)] for b in benchmarks if b.get("likelihood")]
    return _table(("NADE and VAE, ms", *ways, MEMORY), rows)


MEMORY = "extra memory, MB: fastgen / eager"


def _ms(b: Benchmark, ways: Sequence[str], digits: int) -> list[str]:
    """Nothing for a way that was not measured."""
    return [f"{1e3 * b['seconds'][way]:.{digits}f}" if way in b["seconds"] else "" for way in ways]


def _memory(b: Benchmark, other: str = "eager") -> str:
    return _megabytes(b.get("peak_extra_bytes", {}), ("fastgen", other))


def _megabytes(memory: dict[str, float | None], names: tuple[str, ...]) -> str:
    return " / ".join(f"{value / 1e6:.0f}" for name in names if (value := memory.get(name)) is not None)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.{0 if seconds >= 0.01 else 1}f}"


def _count(rate: float | None) -> str:
    return "" if rate is None else f"{rate:,.0f}".replace(",", " ")


def trained(entries: dict[str, Any]) -> str:
    """The table of trained models."""
    rows = []
    for name, entry in sorted(entries.items()):
        figures = "; ".join(
            f"{f['name']} {f['value']:.2f} {f['unit']} ({f['examples']} examples)" for f in entry["figures"]
        )
        minutes = f"{entry['seconds'] / 60:.0f}"
        rows.append([f"`{name}`", figures, _count(entry["steps"]), minutes, str(entry["threads"]), entry["machine"]])
    lines = _table(("recipe", "figure on the test data", "steps", "minutes", "threads", "machine"), rows)
    return "\n".join(lines).strip()


def draw_curves(path: Path, entries: dict[str, Any]) -> None:
    """The held-out figure of each trained model over its steps, as a PNG."""
    from matplotlib.figure import Figure

    curves = {name: entry for name, entry in sorted(entries.items()) if len(entry["validation"]) > 1}
    rows = math.ceil(len(curves) / 4)
    figure = Figure(figsize=(16, 3 * rows), layout="constrained")
    for i, (name, entry) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, 4, i + 1)
        axes.plot(*zip(*entry["validation"], strict=True), marker=".")
        axes.set(title=name, xlabel="step", ylabel=f"held out {entry.get('unit', '')}".strip())
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_speed(path: Path, result: dict[str, Any]) -> None:
    """How many times faster than PyTorch whole models are, drawn from and trained, as a PNG."""
    from matplotlib.figure import Figure

    draws, steps = [], []
    for b in result["benchmarks"]:
        seconds, rate = b.get("seconds", {}), b.get("samples_per_second", {})
        if "wavenet_vocoder" in rate:
            name = "WaveNet, " + b["case"].removeprefix("generate ")
            draws.append((name, [rate[way] / rate["wavenet_vocoder"] for way in ("float32", "bfloat16")]))
        elif "pixels" in b:
            naive = b["pixels"] * seconds["forward"]
            draws.append((b["case"], [naive / seconds[way] for way in ("float32", "bfloat16")]))
        elif b.get("training"):
            ways = ("", " bfloat16")
            measured = [way for way in ways if "eager" + way in seconds]
            steps.append((b["case"], [seconds["eager" + way] / seconds["fastgen" + way] for way in measured]))
    figure = Figure(figsize=(14, 6), layout="constrained")
    titles = ("drawing samples: times faster than a loop in PyTorch", "a training step: times faster than PyTorch")
    for axes, title, bars in zip(figure.subplots(1, 2), titles, (draws, steps), strict=True):
        for i, (label, color) in enumerate((("float32", "tab:blue"), ("bfloat16", "tab:orange"))):
            places = [row + 0.4 * i - 0.2 for row, (_, ratios) in enumerate(bars) if i < len(ratios)]
            times = [ratios[i] for _, ratios in bars if i < len(ratios)]
            axes.barh(places, [t - 1 for t in times], left=1, height=0.38, color=color, label=label)
            for place, t in zip(places, times, strict=True):
                axes.text(max(t, 1), place, f" {t:,.{0 if t >= 10 else 1}f}", va="center", fontsize=7)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlim(0.9, 2 * max(max(ratios) for _, ratios in bars))
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=100)
