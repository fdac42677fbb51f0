"""Triton kernels without a GPU: their results in Triton's interpreter, and their heuristics."""

import dataclasses
import json

import pytest
import torch
from op_helpers import INTERPRETED

from fastgen import backend

pytest.importorskip("triton", reason="pip install triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled in the interpreter")

OPS = {  # the test file of each, and a few of its tests: test_ptx.py runs more, faster than the interpreter
    "affine_coupling": ("affine_coupling", "(values_and_gradients and sizes5) or overflow"),
    "actnorm": ("actnorm", "values_and_gradients and sizes4"),
    "nearest_code": ("nearest_code", "float32_answer and gaussian"),
    "vector_quantize": ("vector_quantize", "matches_reference and 31"),
    "code_statistics": ("code_statistics", "(matches_reference and 33) or without_coordinates"),
    "update_codebook": ("code_statistics", "update_matches or codes_stay"),
    "gated_causal_conv1d": ("wavenet_layer", "gate_alone and (local or constant) and 503"),
    "masked_conv2d": ("masked_conv2d", "(weights_behind and 3 and plain) or nan_reaches or live_tap"),
    "gated_masked_conv2d": ("masked_conv2d", "vertical_stacks or empty"),
    "wavenet_layer": ("wavenet_layer", "(matches_reference and (local or constant) and 503) or without_biases"),
    "image_lstm": ("image_lstm", "matches_reference and 2 and 3 and 5 and 6 and not anywhere"),
    "gaussian_rsample_kl": ("gaussian_rsample_kl", "values_and_gradients and 33"),
    "nade": ("nade", "values_and_gradients and sizes5"),
}


@pytest.mark.parametrize("op", OPS)
def test_results_in_the_interpreter(op, again):
    check = f"from fastgen import backend; assert backend.why_not({op!r}, 'triton') is None"
    file, selection = OPS[op]
    again(selection, file, check=check, TRITON_INTERPRET="1", FASTGEN_BACKEND="triton")


@pytest.mark.parametrize("op", OPS)
def test_why_not_and_what_is_said_of_it(op):
    if torch.cuda.is_available():
        assert backend.why_not(op, "triton") is None
        return
    assert "finds no GPU" in backend.why_not(op, "triton")
    with pytest.raises(backend.BackendError, match=f"{op}: backend 'triton' was requested but cannot run"):
        backend.resolve(op, "triton", torch.device("cuda"), torch.float32)
    assert backend.why_not("invertible_conv1x1", "triton") == "this version has no GPU kernel for it"


def test_refuses_what_it_does_not_take(monkeypatch):
    monkeypatch.setattr(backend, "_why_no_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(backend, "_too_old", backend._too_old.__wrapped__)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert backend.resolve("actnorm", None, cuda, torch.float16) == "triton"
    with pytest.raises(backend.BackendError, match="float64 has no Triton kernel"):
        backend.resolve("actnorm", "triton", cuda, torch.float64)
    with pytest.raises(backend.BackendError, match="the tensors are on cpu"):
        backend.resolve("actnorm", "triton", cpu, torch.float32)
    assert backend.resolve("actnorm", "triton", torch.device("cuda:0"), torch.float32) == "triton"
    with pytest.raises(backend.BackendError, match=r"compute capability 7\.5, below 8\.0"):
        backend.resolve("actnorm", "triton", torch.device("cuda:1"), torch.float32)
    with pytest.warns(RuntimeWarning, match="float64 has no Triton kernel"):
        assert backend.resolve("actnorm", None, cuda, torch.float64) == "reference"


def test_tiles_have_what_triton_asks_of_a_descriptor():
    """The installed Triton's launcher: of later versions it asks more."""
    from fastgen.kernels.launch import tiles_of
    from triton.tools.tensor_descriptor import TensorDescriptor

    tiles = tiles_of(torch.empty(1, 16, 16))
    ours = TensorDescriptor(tiles.base, list(tiles.shape), list(tiles.strides), [1, 16, 16])
    for field in dataclasses.fields(TensorDescriptor):
        if field.name not in ("base", "shape", "strides", "block_shape"):
            assert getattr(tiles, field.name) == getattr(ours, field.name)


def test_heuristics_of_products():
    from fastgen.kernels import launch
    from fastgen.kernels.code_statistics import shares_for
    from fastgen.kernels.nearest_code import chunk_for, splits_for
    from fastgen.kernels.tiles import tile_for
    from fastgen.kernels.vector_quantize import rows_for
    from fastgen.kernels.wavenet_layer import options_for, shared_by

    assert [rows_for(d) for d in (1, 64, 65, 2048, 5000)] == [2048, 32, 16, 1, 1]
    assert [shares_for(*size) for size in ((1, 1 << 20), (256, 65536), (8192, 65536), (1, 3))] == [64, 8, 4, 1]
    assert [chunk_for(d) for d in (1, 16, 17, 64, 100, 129, 256, 257)] == [16, 16, 32, 64, 128, 256, 256, 128]
    small, large = tile_for(3, 5, 1, 16), tile_for(16000, 512, 256, 16)
    assert [small[k] for k in ("ROWS", "STEPS", "CHUNK", "num_warps")] == [16, 16, 16, 4]
    assert [large[k] for k in ("ROWS", "STEPS", "CHUNK", "num_warps")] == [128, 128, 64, 8]
    assert tile_for(16000, 512, 256, 32)["CHUNK"] == 32
    for gates, bits in ((1, 16), (100, 16), (256, 16), (128, 32)):
        for backward, most in ((False, 16384), (True, 8192)):
            tile = options_for(gates, 256, bits, backward=backward)
            assert gates <= tile["GATES"]
            assert tile["STEPS"] * tile["GATES"] <= (most if bits == 16 else 4096)
            three = tile | ({"num_stages": 3} if backward else {})  # what a backward takes at least, on Hopper
            assert shared_by(three, bits, launch.MOST_SHARED) + launch.BARRIERS <= launch.MOST_SHARED
    for programs in (1, 8, 1000):
        for tiles in (1, 7, 5000):
            for wanted in (64, 1000):
                share, splits = launch.splits_for(programs, tiles, wanted)
                assert (splits - 1) * share < tiles <= splits * share
                assert splits * programs <= max(wanted, programs)
    for rows in (1, 128, 4096, 1 << 20):
        for codes in (1, 64, 1000, 8192, 100000):
            share, splits = splits_for(rows, codes, 128, 64, 132)
            assert (splits - 1) * share * 64 < codes <= splits * share * 64
            assert 1 <= splits <= 16
    assert splits_for(1 << 20, 8192, 128, 64, 132)[1] == 1
    assert splits_for(64, 8192, 128, 64, 132)[1] == 16


def test_heuristics():
    from fastgen.kernels.actnorm import tile_for
    from fastgen.kernels.affine_coupling import block_for

    assert block_for(1, 1) == 128
    assert block_for(1 << 20, 1 << 21) == 2048
    for rows, pixels in ((1, 1), (3, 7), (1000, 1), (16, 4096), (5, 1023)):
        tile_rows, columns = tile_for(rows, pixels)
        assert tile_rows * columns <= 2048
        assert columns >= min(pixels, 2048)
        assert tile_rows & (tile_rows - 1) == 0


def test_launches_are_planned_once_for_each_key_and_anew_in_a_trial(monkeypatch):
    from fastgen.kernels import launch, tuning

    monkeypatch.setattr(launch, "MOST_PLANS", len(launch._plans) + 8)
    made = []

    def planned(key, kernel="a kernel"):
        def make():
            made.append(key)
            return launch.Plan(kernel, 1, (), {})

        return launch.planned(kernel, key, make)

    first = planned((2, 3))
    assert planned((2, 3)) is first
    assert planned((2, 4)) is not first
    with tuning.trial("conv", {"ROWS": 16}):
        assert planned((2, 3)) is not first
    planned((2, 3))
    assert made == [(2, 3), (2, 4), (2, 3), (2, 3)]
    for i in range(20):
        planned(i)
    assert len(launch._plans) <= launch.MOST_PLANS


def test_tiles_that_were_tuned_are_taken(tmp_path, monkeypatch):
    from fastgen.kernels import tuning

    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    path = tuning.file_for("NVIDIA H100 80GB HBM3")
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    path.write_text(json.dumps({tuning.key_for("conv", torch.bfloat16, (1000, 64)): {"ROWS": 256}}))
    assert tuning.table_for.__wrapped__("NVIDIA H100 80GB HBM3") == {"conv bfloat16 1024 64": {"ROWS": 256}}
    assert tuning.table_for.__wrapped__("another") == {}
    x, heuristic = torch.empty(0, dtype=torch.bfloat16), {"ROWS": 128, "num_warps": 8}
    assert tuning.tuned("conv", x, (1000, 64), heuristic) == heuristic
    with tuning.trial(tuning.key_for("conv", x.dtype, (700, 33)), {"ROWS": 32}):
        assert tuning.tuned("conv", x, (1024, 64), heuristic) == {"ROWS": 32, "num_warps": 8}
        assert tuning.tuned("conv", x, (1025, 64), heuristic) == heuristic
