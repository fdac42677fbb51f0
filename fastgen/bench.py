"""`python -m fastgen bench`: run the benchmarks of a source checkout, and write the README's table from their JSON."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen.files import whole_file
from fastgen.info import processor

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
TRAINED_BEGIN, TRAINED_END = "<!-- trained:begin -->", "<!-- trained:end -->"


def main(table_only: bool = False, only: Sequence[str] = ()) -> int:
    """Run bench/ and write bench/results/<machine>.json, then the table in README.md; or the table alone.

    `only`: names of files, without bench_ and .py: what else was measured stays as it was.

    Raises
    ------
    FileNotFoundError
        Outside a source checkout, where there are no benchmarks.
    ValueError
        For a name in `only` that no file has.
    """
    if not (ROOT / "bench").is_dir():
        raise FileNotFoundError(f"bench: the benchmarks are in a source checkout's bench/; there is none in {ROOT}")
    files = [f"bench/bench_{name}.py" for name in only]
    for file in files:
        if not (ROOT / file).is_file():
            there = ", ".join(sorted(p.stem.removeprefix("bench_") for p in (ROOT / "bench").glob("bench_*.py")))
            raise ValueError(f"bench --only: there is no {file}; the names are {there}")
    results = ROOT / "bench" / "results" / f"{_machine()}.json"
    if not table_only:
        results.parent.mkdir(exist_ok=True)
        runs: list[tuple[dict[str, str], Path]] = [({}, results)]
        from fastgen import backend

        if backend.cpu_isa in ("avx512", "avx512_vnni") and (not only or "wavenet_generate" in only):
            runs.append(({"FASTGEN_CPU_ISA": "avx2"}, results.with_suffix(".avx2.json")))
        for env, path in runs:
            part = path.with_suffix(".part")
            command = [
                sys.executable, "-P", "-m", "pytest", *(files or ["bench"]), "-q",
                "--override-ini=python_files=bench_*.py", f"--benchmark-json={part}",
                *(["-k", "test_batch_1"] if env else []),
            ]  # fmt: skip
            done = subprocess.run(command, cwd=ROOT, env=os.environ | env | {"PYTHONPATH": str(ROOT / "bench")})
            if done.returncode:
                return done.returncode
            _slim(part, path, files)
    trained = ROOT / "bench" / "trained.json"
    entries = json.loads(trained.read_text()) if trained.exists() else {}
    measured = [json.loads(p.read_text()) for p in sorted(results.parent.glob("*.json"))]
    table = render([result for result in measured if "benchmarks" in result])  # others are those of GPUs
    if entries:
        draw_curves(trained.with_suffix(".png"), entries)
    readme = ROOT / "README.md"
    text = readme.read_text()
    with whole_file(readme) as temporary:
        text = re.sub(f"{BEGIN}.*{END}", f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL)
        made = f"{TRAINED_BEGIN}\n{render_trained(entries)}\n{TRAINED_END}"
        temporary.write_text(re.sub(f"{TRAINED_BEGIN}.*{TRAINED_END}", made, text, flags=re.DOTALL))
    print(table)
    return 0


def _machine() -> str:
    """A file name for this machine's processor."""
    return re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")


def _slim(part: Path, path: Path, files: list[str]) -> None:
    """Keep what the table needs and what tells where it comes from; the raw rounds stay out of the repository."""
    raw = json.loads(part.read_text())
    machine = raw["machine_info"]
    commit, date = raw["commit_info"].get("id"), raw["datetime"]
    slim = {"datetime": date, "commit": commit, "cpu": machine["cpu"].get("brand_raw"), "fastgen": machine["fastgen"]}
    measured = [
        {"file": b["fullname"].split("::")[0], "commit": commit, "datetime": date, **b["extra_info"]}
        for b in raw["benchmarks"]
    ]
    if files and path.exists():
        before = json.loads(path.read_text())
        measured = [b for b in before["benchmarks"] if b.get("file") not in files] + measured
        slim = {k: before[k] for k in slim}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(slim | {"benchmarks": measured}, indent=1) + "\n")
    part.unlink()


def render(results: list[dict[str, Any]]) -> str:
    """The README's tables, in Markdown."""
    lines = []
    for result in results:
        about = result["fastgen"]
        lines += [
            f"{result['cpu']}, {about['isa']}, {about['threads']} threads, torch {about['torch']}, "
            f"{result['datetime'][:10]}.",
            "",
        ]
        generation = [b for b in result["benchmarks"] if "samples_per_second" in b]
        if generation:
            lines += [
                "| generation, samples/s | float32 | bfloat16 weights | PyTorch queue | wavenet_vocoder | ratio |",
                "|---|---:|---:|---:|---:|---:|",
            ]
        for b in generation:
            rate = b["samples_per_second"]
            peer = rate.get("wavenet_vocoder")
            ratio = "" if peer is None else f"{rate['float32'] / peer:.0f}x, {rate['bfloat16'] / peer:.0f}x"
            cells = [_count(rate.get(k)) for k in ("float32", "bfloat16", "PyTorch queue", "wavenet_vocoder")]
            lines.append(f"| {b['case'].removeprefix('generate ')} | {' | '.join(cells)} | {ratio} |")
        layers = [b for b in result["benchmarks"] if "gflops" in b and "search" not in b]
        if layers:
            lines += [
                "",
                "| layer, ms | fastgen | reused outputs | eager | torch.compile | of FMA peak | extra memory, MB: "
                "fastgen / eager |",
                "|---|---:|---:|---:|---:|---:|---:|",
            ]
        for b in layers:
            ms = {k: f"{1e3 * v:.1f}" for k, v in b["seconds"].items()}
            memory = b["peak_extra_bytes"]
            cells = [ms["fastgen"], ms.get("fastgen, reused outputs", ""), ms["eager"], ms["torch.compile"]]
            megabytes = _megabytes(memory, ("fastgen", "eager"))
            lines.append(
                f"| {b['case'].removeprefix('layer ')} | {' | '.join(cells)} | {b['of_fma_peak']:.0%} | {megabytes} |"
            )
        lines += _training(result["benchmarks"])
        lines += _quantization(result["benchmarks"])
        lines += _pixels(result["benchmarks"])
        lines += _flows(result["benchmarks"])
        lines += _likelihoods(result["benchmarks"])
        lines.append("")
    return re.sub("\n{3,}", "\n\n", "\n".join(lines)).strip()


def _training(benchmarks: list[dict[str, Any]]) -> list[str]:
    """The table of whole models."""
    steps = [b for b in benchmarks if b.get("training")]
    lines = []
    if steps:
        lines += [
            "",
            "| gradients of a training step, ms | fastgen | PyTorch | ratio | bfloat16: fastgen | PyTorch | ratio | "
            "extra memory in float32, MB: fastgen / PyTorch |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
    for b in steps:
        cells = []
        for dtype in ("", " bfloat16"):
            ours, theirs = (b["seconds"][way + dtype] for way in ("fastgen", "eager"))
            cells += [_milliseconds(ours), _milliseconds(theirs), f"{theirs / ours:.1f}x"]
        megabytes = _megabytes(b["peak_extra_bytes"], ("fastgen", "eager"))
        lines.append(f"| {b['case']} | {' | '.join(cells)} | {megabytes} |")
    return lines


def _quantization(benchmarks: list[dict[str, Any]]) -> list[str]:
    """The tables of the search and of the layer around it."""
    lines = []
    searches = [b for b in benchmarks if b.get("search")]
    if searches:
        lines += [
            "",
            "| nearest code, ms | fastgen | faiss | eager | torch.compile | cdist | of FMA peak | "
            "extra memory, MB: fastgen / eager |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
    for b in searches:
        ms = [f"{1e3 * b['seconds'][k]:.1f}" for k in ("fastgen", "faiss", "eager", "torch.compile", "cdist")]
        megabytes = _megabytes(b["peak_extra_bytes"], ("fastgen", "eager"))
        lines.append(
            f"| {b['case'].removeprefix('search ')} | {' | '.join(ms)} | {b['of_fma_peak']:.0%} | {megabytes} |"
        )
    layers = [b for b in benchmarks if b.get("layer")]
    if layers:
        lines += [
            "",
            "| `VectorQuantize`, ms | fastgen | vector-quantize-pytorch | ratio | extra memory, MB |",
            "|---|---:|---:|---:|---:|",
        ]
    for b in layers:
        ours, theirs = b["seconds"]["fastgen"], b["seconds"]["vector-quantize-pytorch"]
        megabytes = _megabytes(b["peak_extra_bytes"], ("fastgen", "vector-quantize-pytorch"))
        lines.append(f"| {b['case']} | {1e3 * ours:.1f} | {1e3 * theirs:.0f} | {theirs / ours:.0f}x | {megabytes} |")
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.{0 if seconds >= 0.01 else 1}f}"


def _pixels(benchmarks: list[dict[str, Any]]) -> list[str]:
    """The tables of convolutions and of sampling images."""
    lines = []
    for kind, title, contestants in (
        (
            "masked", "gated masked convolution",
            {"fastgen": "", "eager": "", "cropped": " to live rows", "torch.compile": ""},
        ),
        ("conv2d", "convolution with ReLU", {"fastgen": "", "eager": "", "torch.compile": ""}),
        (
            "resampling", "4x4 convolution with stride 2, or its transpose, and ReLU",
            {"fastgen": "", "eager": "", "torch.compile": ""},
        ),
        ("lstm", "LSTM over an image", {"fastgen": "", "eager": ""}),
        ("linear", "linear layer", {"fastgen": "", "eager": "", "torch.compile": ""}),
        ("attention", "causal attention", {"fastgen": "", "eager": " (fused)", "torch.compile": ""}),
    ):  # fmt: skip
        convolutions = [b for b in benchmarks if b.get(kind)]
        if convolutions:
            heads = " | ".join(f"{name}{what}" for name, what in contestants.items())
            lines += [
                "",
                f"| {title}, ms | {heads} | of FMA peak | extra memory, MB: fastgen / eager |",
                "|---|" + "---:|" * (len(contestants) + 2),
            ]
        for b in convolutions:
            ms = [f"{1e3 * b['seconds'][k]:.{1 if kind == 'masked' else 2}f}" for k in contestants]
            megabytes = _megabytes(b["peak_extra_bytes"], ("fastgen", "eager"))
            lines.append(f"| {b['case']} | {' | '.join(ms)} | {b['of_fma_peak']:.0%} | {megabytes} |")
    samples = [b for b in benchmarks if "pixels" in b]
    if samples:
        lines += [
            "",
            "| sampling images of 28x28, ms | float32 | bfloat16 weights | one forward pass | cropped forward pass | "
            "faster than a forward pass for each pixel |",
            "|---|---:|---:|---:|---:|---:|",
        ]
    for b in samples:
        seconds = b["seconds"]
        ms = [_milliseconds(seconds[k]) for k in ("float32", "bfloat16", "forward", "cropped forward")]
        naive = b["pixels"] * seconds["forward"]
        ratio = f"{naive / seconds['float32']:.0f}x, {naive / seconds['bfloat16']:.0f}x"
        lines.append(f"| {b['case']} | {' | '.join(ms)} | {ratio} |")
    return lines


def _flows(benchmarks: list[dict[str, Any]]) -> list[str]:
    """The tables of the coupling, of a step of Glow, and of Glow's training."""
    lines = []
    couplings = [b for b in benchmarks if b.get("coupling") or b.get("glow_step")]
    if couplings:
        lines += [
            "",
            "| flows, ms | fastgen | eager | torch.compile | normflows | nflows | of copy bandwidth | "
            "extra memory, MB: fastgen / eager or normflows |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
    for b in couplings:
        names = ("fastgen", "eager", "torch.compile", "normflows", "nflows")
        ms = [f"{1e3 * b['seconds'][k]:.2f}" if k in b["seconds"] else "" for k in names]
        share = f"{b['of_copy']:.0%}" if "of_copy" in b else ""
        other = "eager" if "eager" in b["seconds"] else "normflows"
        megabytes = _megabytes(b["peak_extra_bytes"], ("fastgen", other))
        lines.append(f"| {b['case']} | {' | '.join(ms)} | {share} | {megabytes} |")
    trainings = [b for b in benchmarks if b.get("glow_training")]
    if trainings:
        lines += [
            "",
            "| training step | reversible, ms | plain, ms | normflows, ms | activations, MB: reversible / plain / "
            "normflows | parameters, MB |",
            "|---|---:|---:|---:|---:|---:|",
        ]
    for b in trainings:
        ways = ("reversible", "plain", "normflows")
        ms = [f"{1e3 * b['seconds'][k]:.0f}" for k in ways]
        megabytes = _megabytes(b["activation_bytes"], ways)
        lines.append(f"| {b['case']} | {' | '.join(ms)} | {megabytes} | {b['parameter_bytes'] / 1e6:.0f} |")
    return lines


def _likelihoods(benchmarks: list[dict[str, Any]]) -> list[str]:
    """The table of the ops of NADE and the VAE."""
    ways = ("fastgen", "eager", "chunked PyTorch", "torch.compile", "loop over inputs")
    measured = [b for b in benchmarks if b.get("likelihood")]
    if not measured:
        return []
    head = f"| NADE and VAE, ms | {' | '.join(ways)} | extra memory, MB: fastgen / eager |"
    lines = ["", head, "|---|" + "---:|" * (len(ways) + 1)]
    for b in measured:
        ms = [f"{1e3 * b['seconds'][k]:.2f}" if k in b["seconds"] else "" for k in ways]
        megabytes = _megabytes(b.get("peak_extra_bytes", {}), ("fastgen", "eager"))
        lines.append(f"| {b['case']} | {' | '.join(ms)} | {megabytes} |")
    return lines


def render_trained(entries: dict[str, Any]) -> str:
    """The README's table of trained models, in Markdown."""
    lines = [
        "| recipe | figure on the test data | steps | minutes | threads | machine |",
        "|---|---|---:|---:|---:|---|",
    ]
    for name, entry in sorted(entries.items()):
        figures = "; ".join(
            f"{f['name']} {f['value']:.2f} {f['unit']} ({f['examples']} examples)" for f in entry["figures"]
        )
        lines.append(
            f"| `{name}` | {figures} | {_count(entry['steps'])} | {entry['seconds'] / 60:.0f} | {entry['threads']} | "
            f"{entry['machine']} |"
        )
    return "\n".join(lines)


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


def _megabytes(memory: dict[str, float | None], names: tuple[str, ...]) -> str:
    return " / ".join(f"{value / 1e6:.0f}" for name in names if (value := memory.get(name)) is not None)


def _count(rate: float | None) -> str:
    return "" if rate is None else f"{rate:,.0f}".replace(",", " ")
