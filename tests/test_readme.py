"""The README's examples run as they stand, on fewer samples; tables are of what was measured."""

import json
import re
from pathlib import Path

import torch

from fastgen import bench, bench_report

README = Path(__file__).parent.parent / "README.md"
BENCH = README.parent / "bench"


def test_examples(one_thread):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    names = {"torch": torch, "my_network": torch.nn.Conv2d(32, 64, 1), "other_network": torch.nn.Conv2d(32, 64, 1)}
    for block in blocks:
        code = block.replace("16000", "160").replace("chunk=1600", "chunk=80")
        if "my_network" in code:
            names["x"] = torch.randn(2, 64, 4, 4)
        exec(code, names)


def test_tables_are_of_the_results():
    results = [json.loads(path.read_text()) for path in sorted((BENCH / "results").glob("*.json"))]
    results = [result for result in results if "benchmarks" in result]
    trained = json.loads((BENCH / "trained.json").read_text())
    assert bench_report.tables(results) in (BENCH / "README.md").read_text()
    assert bench_report.summary(bench.foremost(results)) in README.read_text()
    assert bench_report.trained(trained) in README.read_text()
