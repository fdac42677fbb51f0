"""The GPU's benchmarks and tuning without a GPU: rehearsed in Triton's interpreter, targets, what fails."""

import importlib
import json
import re
from pathlib import Path

import pytest
from op_helpers import INTERPRETED

pytest.importorskip("triton", reason="pip install triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="the rehearsals start the interpreter themselves")

BENCH = Path(__file__).parent.parent / "bench"


def rehearsed(python, script, *args):
    done = python(str(BENCH / script), "--tiny", *args, TRITON_INTERPRET="1", FASTGEN_BACKEND="triton")
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_rehearsal_of_the_benchmarks(python, tmp_path):
    printed = rehearsed(python, "gpu.py", "--out", str(tmp_path))
    report = json.loads((tmp_path / "rehearsal.json").read_text())
    assert report["errors"] == []
    assert {case["case"].split()[0] for case in report["cases"]} == {
        "affine_coupling", "actnorm", "nearest_code", "vector_quantize", "code_statistics", "VectorQuantize",
        "gated_masked_conv2d", "masked_conv2d", "wavenet_layer", "gated_causal_conv1d", "wavenet_generate",
        "pixelcnn_generate", "image_lstm", "nade", "gaussian_rsample_kl",
    }  # fmt: skip
    assert all(t > 0 for case in report["cases"] for t in case["seconds"].values())
    assert all(case["least"] > 0 for case in report["cases"])
    assert all(case["case"] in printed for case in report["cases"])
    drawn = [case for case in report["cases"] if "samples" in case]
    assert {case["streams"] for case in drawn} == {1, 5}
    assert {case["dtype"] for case in drawn} == {"bfloat16", "float32"}
    for case in drawn:
        rate, streams = case["samples_per_second"]["fastgen"], case["streams"]
        assert rate == pytest.approx(8 * streams / case["seconds"]["fastgen"])
        assert case["times_real_time"]["fastgen"] == pytest.approx(rate / streams / 16000)
    assert (tmp_path / "rehearsal.md").read_text() in printed


def test_a_rehearsal_of_tuning(python, tmp_path):
    printed = rehearsed(python, "tune.py", "--out", str(tmp_path / "table.json"))
    tried = {line.split(": ")[1].split()[0] for line in printed.splitlines() if "x by " in line}
    assert tried == {
        "scan", "conv", "gated_conv", "gated_conv_kept", "gated_conv_backward", "grad_weight", "layer", "layer_backward"
    }  # fmt: skip
    assert {key.split()[0] for key in json.loads((tmp_path / "table.json").read_text())} <= tried


@pytest.fixture
def bench(monkeypatch):
    """bench("gpu") -> the module."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_targets_are_of_cases_that_there_are(bench):
    names = [name for name, _ in bench("gpu_cases").listing(False) + bench("gpu_generation").generation_listing(False)]
    assert len(set(names)) == len(names)
    ends = "( forward( and backward)?|, [0-9]+ (stream|image)s?)?"
    for target in bench("gpu_report").TARGETS:
        assert sum(re.fullmatch(re.escape(name) + ends, target.case) is not None for name in names) == 1


def test_targets_that_are_met_and_those_that_are_not(bench):
    module = bench("gpu_report")
    limits = {"copy_bytes": 1e12, "bf16_operations": 1e15}
    cases = {
        "nearest_code N65536 K8192 D256": {"seconds": {"fastgen": 2e-3}, "operations": 1e12},
        "nearest_code N65536 K1024 D64": {"seconds": {"fastgen": 1.0, "eager": 9.0, "torch.compile": 5.0}},
        "affine_coupling tanh 64x128x128x128 forward": {"seconds": {"fastgen": 1e-3}, "bytes": 0.91e9},
        "wavenet_generate L20 R64 S128 K2 bfloat16, 256 streams": {
            "seconds": {"fastgen": 1.0},
            **module.sampling({"samples": 256 * 15999, "streams": 256, "rate": 16000}, {"fastgen": 1.0}),
        },
    }  # fmt: skip
    report = {"limits": limits, "cases": [{"case": name, **facts} for name, facts in cases.items()]}
    met = {(t["case"], t["measure"]): t["met"] for t in module.judged(report)}
    wanted = dict.fromkeys(met) | {
        ("nearest_code N65536 K8192 D256", module.OF_MATRIX): True,
        ("nearest_code N65536 K1024 D64", "eager"): False,
        ("nearest_code N65536 K1024 D64", "torch.compile"): True,
        ("affine_coupling tanh 64x128x128x128 forward", module.OF_COPY): True,
        ("wavenet_generate L20 R64 S128 K2 bfloat16, 256 streams", module.REAL_TIME): False,
        ("wavenet_generate L20 R64 S128 K2 bfloat16, 256 streams", module.SAMPLES): True,
    }
    assert met == wanted


def test_what_fails_is_written_down_and_the_rest_measured(bench, capsys):
    gpu, case = bench("gpu"), bench("gpu_cases").Case

    def wrong():
        raise AssertionError("off by 1")

    def broken():
        yield case("half", {"fastgen": int, "peer": wrong})
        wrong()

    written, report = [], {"limits": {"copy_bytes": 1.0, "bf16_operations": 1.0}, "cases": [], "errors": []}
    entries = [("bad", broken), ("lost", lambda: iter([case("none", {"fastgen": wrong, "eager": int})])),
               ("good", lambda: iter([case("whole", {"fastgen": int}, bytes=3)]))]  # fmt: skip
    gpu.measure_all(entries, report, lambda: written.append(len(report["cases"])))
    assert [(c["case"], list(c["seconds"])) for c in report["cases"]] == [
        ("half", ["fastgen"]), ("none", ["eager"]), ("whole", ["fastgen"])
    ]  # fmt: skip
    failures = [(e["case"], e["way"], e["error"]) for e in report["errors"]]
    wrong_was = "AssertionError: off by 1"
    assert failures == [("half", "peer", wrong_was), ("bad", "", wrong_was), ("none", "fastgen", wrong_was)]
    assert written == [1, 1, 2, 3]
    assert report["cases"][2]["least"] == 3
    about = {"device": "a", "torch": "b", "triton": "c"}
    report |= about | {"targets": bench("gpu_report").judged(report)}
    assert "| none | failed |" in bench("gpu_report").text(report)


def test_verification_finds_what_is_wrong(bench):
    import torch

    cases, torch_ones = bench("gpu_cases"), torch.ones(5)
    with pytest.raises(AssertionError, match=r"op: result 0 is off by 1\.0e-01"):
        next(cases.op_cases("op", lambda x, backend: x * 1.1, lambda x: x * 1, [torch_ones], {}, (1, 1)))
    peer = bench("gpu_peers").Peer("other", lambda x: x * 2, [torch_ones])
    case = next(cases.op_cases("op", lambda x, backend: x * 1, lambda x: x * 1, [torch_ones], {}, (1, 1), peers=[peer]))
    case.ways["fastgen"]()
    for _ in range(2):
        with pytest.raises(AssertionError, match="other computes something else"):
            case.ways["other"]()
