"""What bench/gpu.py makes of its figures: tables in Markdown, the targets, plots."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CaseReport = dict[str, Any]
USUAL = ("eager", "torch.compile")
OF_MATRIX, OF_COPY, SAMPLES, REAL_TIME = "of bf16 matrix rate", "of copy bandwidth", "samples/s", "x real time"


@dataclass(frozen=True)
class Target:
    case: str
    measure: str  # one of the above, or how many times fastgen's time a way takes
    least: float


IMAGES, LAYER = "gated_masked_conv2d B64 C128 32x32 k5", "wavenet_layer B16 T16384 R128 S256 K2"
SMALL = ("nearest_code N65536 K1024 D64", "nearest_code N8192 K1024 D128")
NETWORK = "wavenet_generate L20 R64 S128 K2 bfloat16"
PASSES = ("forward", "forward and backward")
TARGETS = [
    Target("nearest_code N65536 K8192 D256", OF_MATRIX, 0.45),
    *(Target(case, way, least) for case in SMALL for way, least in (("eager", 10), ("torch.compile", 4))),
    *(Target(f"{of} {way}", "torch.compile", 1.5) for of in (IMAGES, f"{LAYER} d16", f"{LAYER} d1") for way in PASSES),
    *(Target(f"affine_coupling tanh 64x128x128x128 {way}", OF_COPY, 0.9) for way in PASSES),
    Target(f"{NETWORK}, 1 stream", SAMPLES, 60_000),
    Target(f"{NETWORK}, 256 streams", REAL_TIME, 1),
    Target(f"{NETWORK}, 256 streams", SAMPLES, 4_000_000),
    Target("pixelcnn_generate 10 x 128, 28x28 bfloat16, 256 images", "one eager forward pass", 1 / 1.5),
]


def measured(target: Target, report: dict[str, Any]) -> float | None:
    case = next((c for c in report["cases"] if c["case"] == target.case), {"seconds": {}})
    seconds, limits = case["seconds"], report["limits"]
    ours = seconds.get("fastgen")
    if ours is None:
        return None
    if target.measure == OF_MATRIX:
        return float(case["operations"] / ours / limits["bf16_operations"])
    if target.measure == OF_COPY:
        return float(case["bytes"] / ours / limits["copy_bytes"])
    if target.measure in (SAMPLES, REAL_TIME):
        return float(case["samples_per_second" if target.measure == SAMPLES else "times_real_time"]["fastgen"])
    return seconds[target.measure] / ours if target.measure in seconds else None


def judged(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The targets, with what was measured and whether it is enough."""
    values = [(t, measured(t, report)) for t in TARGETS]
    return [asdict(t) | {"measured": v, "met": None if v is None else v >= t.least} for t, v in values]


def ratios(case: CaseReport) -> dict[str, float]:
    """How much longer the others take."""
    ours = case["seconds"].get("fastgen")
    return {} if ours is None else {way: t / ours for way, t in case["seconds"].items() if way != "fastgen"}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def case_table(cases: list[CaseReport]) -> str:
    rows = []
    for case in cases:
        times, peak, ours = ratios(case), case["peak_bytes"], case["seconds"].get("fastgen")
        usual = [f"{times.pop(way):.1f}x" if way in times else "" for way in USUAL]
        alone = case.get("graph_seconds", {})
        gpu = [f"{alone[way] * 1e3:.3f}" for way in ("fastgen", *USUAL) if way in alone]
        megabytes = [f"{peak[way] / 1e6:.0f}" for way in ("fastgen", "eager") if way in peak]
        rows.append([
            case["case"], "failed" if ours is None else f"{ours * 1e3:.3f}", f"{case['least'] * 1e3:.3f}",
            "" if ours is None else f"{case['least'] / ours:.0%}", " / ".join(gpu), *usual,
            "; ".join(f"{way} {times[way]:.1f}x" for way in times), " / ".join(megabytes),
        ])  # fmt: skip
    head = [
        "case",
        "ms",
        "floor, ms",
        "of floor",
        "GPU alone, ms: fastgen / " + " / ".join(USUAL),
        *USUAL,
        "others",
        "extra memory, MB: fastgen / eager",
    ]
    return markdown(head, rows)


def sampling(facts: dict[str, Any], seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    """Rates of each way, of a case that draws samples."""
    if "samples" not in facts:
        return {}
    rates = {way: facts["samples"] / t for way, t in seconds.items()}
    each = {way: rate / facts["streams"] for way, rate in rates.items()}
    return {
        "samples_per_second": rates, "of_each_stream": each,
        "times_real_time": {way: rate / facts["rate"] for way, rate in each.items()},
    }  # fmt: skip


def sampling_rows(cases: list[CaseReport]) -> list[tuple[CaseReport, str, float]]:
    """Case, way, samples/s."""
    return [(c, way, rate) for c in cases for way, rate in c.get("samples_per_second", {}).items()]


def sampling_table(cases: list[CaseReport]) -> str:
    rows = [
        [
            f"{c['network']}, {'PyTorch loop' if way == 'eager' else way}", c["dtype"], str(c["streams"]),
            f"{rate:,.0f}", f"{c['of_each_stream'][way]:,.0f}", f"{c['times_real_time'][way]:.2f}",
        ]
        for c, way, rate in sampling_rows(cases)
    ]  # fmt: skip
    return markdown(["network", "weights", "streams", "samples/s", "of each stream", "times 16-kHz real time"], rows)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def target_table(targets: list[dict[str, Any]]) -> str:
    met = {None: "not measured", True: "yes", False: "no"}
    known = (OF_MATRIX, OF_COPY, SAMPLES, REAL_TIME)
    rows = [
        [
            t["case"], t["measure"] if t["measure"] in known else f"x as fast as {t['measure']}", number(t["least"]),
            number(t["measured"]), met[t["met"]],
        ]
        for t in targets
    ]  # fmt: skip
    return markdown(["case", "measure", "at least", "measured", "met"], rows)


def text(report: dict[str, Any]) -> str:
    """All tables."""
    limits = report["limits"]
    about = (
        f"{report['device']}, torch {report['torch']}, triton {report['triton']}: "
        f"copy {limits['copy_bytes'] / 1e9:.0f} GB/s, bf16 {limits['bf16_operations'] / 1e12:.1f} TFLOP/s."
    )
    failures = "\n".join(f"- {e['case']}{', ' * bool(e['way'])}{e['way']}: {e['error']}" for e in report["errors"])
    parts = [about, case_table(report["cases"]), sampling_table(report["cases"]), target_table(report["targets"])]
    return "\n\n".join([*parts, *([f"Failed:\n\n{failures}"] if failures else [])]) + "\n"


def plot_cases(report: dict[str, Any], path: Path) -> None:
    """How much longer the others take, case by case."""
    from matplotlib.figure import Figure

    cases = [c for c in report["cases"] if "samples" not in c and ratios(c)][::-1]
    figure = Figure(figsize=(11, 2 + 0.42 * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    others = {way for c in cases for way in ratios(c)} - set(USUAL)
    for way, marker in zip([*USUAL, *sorted(others)], "osD^v<>Ph*", strict=False):
        points = [(ratios(c)[way], i) for i, c in enumerate(cases) if way in ratios(c)]
        axes.scatter([x for x, _ in points], [y for _, y in points], marker=marker, s=45, label=way, zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    labels = [f"{c['case']}\n{c['least'] / c['seconds']['fastgen']:.0%} of the limit" for c in cases]
    axes.set_yticks(range(len(cases)), labels, fontsize=8)
    axes.set(xscale="log", xlabel="time, in times of fastgen's (right of the line: slower)", title=report["device"])
    axes.margins(y=0.5 / max(1, len(cases)))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def plot_sampling(report: dict[str, Any], path: Path) -> None:
    """Samples/s against streams: a line for each network and kind of weights."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    lines: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for case, way, rate in sampling_rows(report["cases"]):
        lines.setdefault((case["network"], case["dtype"], way), []).append((case["streams"], rate))
    colors = {network: f"C{i}" for i, network in enumerate(dict.fromkeys(key[0] for key in lines))}
    for (network, dtype, way), points in lines.items():
        style = ":" if way == "eager" else "-" if dtype == "bfloat16" else "--"
        label = f"{network}, {'PyTorch loop, ' * (way == 'eager')}{dtype}"
        axes.plot(*zip(*points, strict=True), style, marker="o", color=colors[network], label=label)
    streams = sorted({case["streams"] for case, _, _ in sampling_rows(report["cases"])})
    if streams:
        rate = next(c["rate"] for c in report["cases"] if "rate" in c)
        axes.plot(streams, [n * rate for n in streams], color="gray", linewidth=0.8, label=f"{rate} Hz for each stream")
        axes.set_xscale("log")
        axes.set_xticks(streams, [str(n) for n in streams])
    axes.minorticks_off()
    axes.set(yscale="log", xlabel="streams", ylabel="samples/s, in all", title=report["device"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
