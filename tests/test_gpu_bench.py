"""Rehearsals of the GPU benchmarks and of tuning, in Triton's interpreter."""

import json
from pathlib import Path

import pytest
from op_helpers import INTERPRETED

pytest.importorskip("triton", reason="pip install triton==3.6.0")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the rehearsals start the interpreter themselves")


def rehearsed(python, script, *args):
    path = str(Path(__file__).parent.parent / "bench" / script)
    done = python(path, "--tiny", *args, TRITON_INTERPRET="1", FASTGEN_BACKEND="triton")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_rehearsal_of_the_benchmarks(python, tmp_path):
    rehearsed(python, "gpu.py", "--out", str(tmp_path))
    report = json.loads((tmp_path / "rehearsal.json").read_text())
    assert {case["case"].split()[0] for case in report["cases"]} == {
        "affine_coupling", "actnorm", "nearest_code", "vector_quantize", "gated_masked_conv2d", "wavenet_layer",
    }  # fmt: skip
    assert all(t > 0 for case in report["cases"] for t in case["seconds"].values())


def test_a_rehearsal_of_tuning(python, tmp_path):
    printed = rehearsed(python, "tune.py", "--out", str(tmp_path / "table.json"))
    tried = {line.split(": ")[1].split()[0] for line in printed.splitlines() if "x by " in line}
    assert tried == {"scan", "conv", "gated_conv", "grad_weight", "layer", "layer_backward"}
    assert {key.split()[0] for key in json.loads((tmp_path / "table.json").read_text())} <= tried
