"""`python -m fastgen bench`: run the benchmarks of a source checkout, and write tables and plots from their JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastgen import backend, bench_report
from fastgen.files import whole_file
from fastgen.info import processor

ROOT = Path(__file__).parent.parent


def main(table_only: bool = False, only: Sequence[str] = ()) -> int:
    """Run bench/ and write bench/results/<machine>.json, then tables and plots; or those alone.

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
    measured = [json.loads(p.read_text()) for p in sorted(results.parent.glob("*.json"))]
    report([result for result in measured if "benchmarks" in result])  # others are those of GPUs
    return 0


def report(results: list[dict[str, Any]]) -> None:
    """Write the tables of bench/README.md and README.md, and the plots."""
    trained = ROOT / "bench" / "trained.json"
    entries = json.loads(trained.read_text()) if trained.exists() else {}
    if entries:
        bench_report.draw_curves(trained.with_suffix(".png"), entries)
    bench_report.draw_speed(ROOT / "bench" / "speed.png", foremost(results))
    for path, parts in (
        (ROOT / "bench" / "README.md", {"bench": bench_report.tables(results)}),
        (
            ROOT / "README.md",
            {"bench": bench_report.summary(foremost(results)), "trained": bench_report.trained(entries)},
        ),
    ):
        text = path.read_text()
        for name, table in parts.items():
            before, _, rest = text.partition(f"<!-- {name}:begin -->")
            _, end, after = rest.partition(f"<!-- {name}:end -->")
            text = f"{before}<!-- {name}:begin -->\n{table}\n{end}{after}"
        with whole_file(path) as temporary:
            temporary.write_text(text)
        print(f"{path}: {', '.join(parts)}")


def foremost(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest of the best instruction set with which training steps were measured too."""
    whole = [result for result in results if any(b.get("training") for b in result["benchmarks"])]
    return max(whole, key=lambda result: (backend.ISAS.index(result["fastgen"]["isa"]), str(result["datetime"])))


def _machine() -> str:
    """A file name for this machine: its processor, whose name many a generation shares, and its instruction set."""
    best, used = backend.runnable_isas()[-1:], backend.cpu_isa
    name = re.sub(r"[^a-z0-9]+", "-", " ".join([processor(), *best]).lower()).strip("-")
    return name if [used] == best else f"{name}.{used}"


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
