"""Triton kernels without a GPU: their results in Triton's interpreter, their machine code, their heuristics."""

import json

import pytest
import torch
from gpu_code import ARCHITECTURES, instructions, recorded
from op_helpers import INTERPRETED

from fastgen import backend
from fastgen.ops.affine_coupling import LAYOUTS, SCALES
from fastgen.ops.nearest_code import PRECISIONS

pytest.importorskip("triton", reason="pip install triton==3.6.0")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled in the interpreter")

OPS = {  # the test file of each, and which of its tests
    "affine_coupling": ("affine_coupling", "values_and_gradients or layouts_and_halves or masks or halves or behind"),
    "actnorm": ("actnorm", "values_and_gradients"),
    "nearest_code": ("nearest_code", "float32_answer and not (sphere or clusters or integers or dominates or uniform)"),
    "vector_quantize": ("vector_quantize", "matches_reference and not anywhere"),
    "code_statistics": ("code_statistics", "matches_reference and not anywhere"),
    "gated_causal_conv1d": ("wavenet_layer", "gate_alone and local"),
    "masked_conv2d": (
        "masked_conv2d",
        "(matches_reference and not anywhere and not 64) or behind or nan_reaches or live_tap",
    ),
    "gated_masked_conv2d": ("masked_conv2d", "colors or empty or two_runs or strided or without_bias"),
    "wavenet_layer": ("wavenet_layer", "(matches_reference and local) or without_biases or poison"),
}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.parametrize("op", OPS)
def test_results_in_the_interpreter(op, again):
    check = f"from fastgen import backend; assert backend.why_not({op!r}, 'triton') is None"
    file, selection = OPS[op]
    again(selection, file, check=check, TRITON_INTERPRET="1", FASTGEN_BACKEND="triton")


def affine_coupling_launches(dtype, scale, layout=0, masked=False):
    from fastgen.kernels import affine_coupling as module

    x = torch.empty(4, 32, 16, 16, dtype=dtype)
    parts = 1 if SCALES[scale] == "none" else 2
    params = torch.empty(4, parts * (32 if masked else 16), 16, 16, dtype=dtype)
    mask = torch.ones(1, 32, 16, 16, dtype=torch.bool) if masked else None
    with recorded(module) as launches:
        module.affine_coupling(x, params, mask, scale, 1.5, layout, False, False)
        module.affine_coupling_backward(x, torch.empty(4), x, params, mask, scale, 1.5, layout, False, True)
    return launches


def actnorm_launches(dtype):
    from fastgen.kernels import actnorm as module

    x, v = torch.empty(16, 32, 16, 16, dtype=dtype), torch.empty(32)
    with recorded(module) as launches:
        module.actnorm(x, v, v, v)
        module.actnorm_backward(x, x, v)
    return launches


def vector_quantize_launches(dtype, rotation):
    from fastgen.kernels import nearest_code, vector_quantize

    x, codebook = torch.empty(512, 64, dtype=dtype), torch.zeros(128, 64, dtype=dtype)
    mask = torch.ones(512, dtype=torch.bool)
    with recorded(nearest_code, vector_quantize) as launches:
        vector_quantize.vector_quantize(x, codebook, mask, False, False)
        vector_quantize.vector_quantize_backward(x, torch.zeros(()), x, x, mask, rotation)
    return [launch for launch in launches if launch.kernel.__name__ in ("_gather", "_backward")]


CASES = {
    **{f"affine_coupling {s}": lambda d, i=i: affine_coupling_launches(d, i) for i, s in enumerate(SCALES)},
    **{f"affine_coupling {s}": lambda d, i=i: affine_coupling_launches(d, 0, i) for i, s in enumerate(LAYOUTS)},
    "affine_coupling masked": lambda d: affine_coupling_launches(d, 1, masked=True),
    "actnorm": actnorm_launches,
    "vector_quantize": lambda d: vector_quantize_launches(d, False),
    "vector_quantize rotation": lambda d: vector_quantize_launches(d, True),
}


def assert_fits(compiled, architecture):
    spilled = [line for line in instructions(compiled) if " LDL" in line or " STL" in line]
    assert not spilled, f"sm_{architecture}: registers are spilled: {spilled[:3]}"
    assert compiled.metadata.shared <= SHARED_MEMORY[architecture]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_memory_bound_kernels_move_128_bits_at_a_time(case, dtype):
    launches = [launch for launch in CASES[case](dtype) if "sum_rows" not in launch.kernel.__name__]
    assert len(launches) == 2
    for launch in launches:
        several = dtype == torch.bfloat16 and case in ("affine_coupling tanh", "actnorm", "vector_quantize rotation")
        for architecture in ARCHITECTURES if several else (90,):
            compiled = launch.compile(architecture)
            code = instructions(compiled)
            assert any("LDG.E.128" in line for line in code), f"sm_{architecture}: no 128-bit loads"
            assert any("STG.E.128" in line for line in code), f"sm_{architecture}: no 128-bit stores"
            assert_fits(compiled, architecture)


@pytest.mark.parametrize(("size", "cosine", "precision"), [
    ((65536, 8192, 256), False, "ieee"), ((8192, 1024, 64), True, "ieee"), ((4096, 1024, 8), False, "ieee"),
    ((4096, 8192, 400), False, "ieee"), ((8192, 1024, 128), False, "tf32"), ((8192, 1024, 256), False, "bf16"),
], ids=str)  # fmt: skip
def test_the_search_multiplies_on_tensor_cores(size, cosine, precision):
    from fastgen.kernels import nearest_code as module

    rows, codes, dim = size
    x, codebook = torch.empty(rows, dim, dtype=torch.bfloat16), torch.zeros(codes, dim, dtype=torch.bfloat16)
    with recorded(module) as launches:
        module.nearest_code(x, codebook, cosine, False, PRECISIONS.index(precision))
    names = [] if cosine else ["_centre"]
    names += ["_round", "_round", "_scan", "_measure"]
    names += ["_compare", "_settle"] if precision == "ieee" else []
    assert [launch.kernel.__name__ for launch in launches] == names
    for launch in launches:
        is_scan = launch.kernel.__name__ == "_scan"
        for architecture in ARCHITECTURES if is_scan else (80,):
            compiled = launch.compile(architecture)
            code = "\n".join(instructions(compiled))
            assert_fits(compiled, architecture)
            assert (TENSOR_CORES[architecture] in code) == is_scan, f"sm_{architecture}"
            if is_scan and dim >= 64:
                assert "LDGSTS.E.BYPASS.128" in code, f"sm_{architecture}: no asynchronous 128-bit loads"


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


def gated_causal_conv1d_launches(dtype, channels, dilation):
    from fastgen.kernels import convolution
    from fastgen.kernels import gated_causal_conv1d as module

    x, weight = (torch.empty(size, dtype=dtype) for size in ((2, channels, 4096), (2 * channels, channels, 2)))
    bias, cond = torch.empty(2 * channels, dtype=dtype), torch.empty(2, 2 * channels, 4096, dtype=dtype)
    with recorded(convolution) as launches:
        module.gated_causal_conv1d(x, weight, bias, cond, dilation)
        module.gated_causal_conv1d_backward(x, x, weight, None, cond, dilation)
    assert [launch.kernel.__name__ for launch in launches] == ["_gated_conv", "_gated_conv", "_conv", "_grad_weight"]
    return launches


def wavenet_layer_launches(dtype, channels, skips, dilation):
    from fastgen.kernels import convolution
    from fastgen.kernels import wavenet_layer as module

    x, skip = (torch.empty(2, n, 4096, dtype=dtype) for n in (channels, skips))
    weights = [torch.empty(size, dtype=dtype) for size in ((2 * channels, channels, 2), (channels + skips, channels))]
    bias, out_bias = (w.new_empty(w.shape[0]) for w in weights)
    cond = torch.empty(2, 2 * channels, 1, dtype=dtype)
    args = x, weights[0], bias, weights[1], out_bias, cond, dilation
    with recorded(convolution, module) as launches:
        module.wavenet_layer(*args)
        module.wavenet_layer_backward(x, skip, *args)
    assert [launch.kernel.__name__ for launch in launches if launch.kernel.__name__ != "_sum_rows"] == [
        "_layer", "_layer", "_grad_weight", "_grad_weight", "_conv", "_grad_weight",
    ]  # fmt: skip
    return [launch for launch in launches if launch.kernel.__name__ == "_layer"]


def masked_conv2d_launches(dtype, channels, gated):
    from fastgen.kernels import convolution
    from fastgen.kernels import masked_conv2d as module

    x, weight = torch.empty(8, channels, 32, 32, dtype=dtype), torch.empty(2 * channels, channels, 5, 5, dtype=dtype)
    bias, cond = torch.empty(2 * channels, dtype=dtype), torch.empty(8, 2 * channels, 32, 32, dtype=dtype)
    with recorded(convolution) as launches:
        if gated:
            out, kept = module.gated_masked_conv2d(x, weight, bias, cond, 1, 1, True)
            module.masked_conv2d_backward(out, kept, x, weight, cond, 1, 1, True)
        else:
            module.masked_conv2d_backward(
                module.masked_conv2d(x, weight, bias, 1, 1), None, x, weight, None, 1, 1, True
            )
    names = ["_gated_conv", "_gate_grad", "_conv", "_grad_weight"] if gated else ["_conv", "_conv", "_grad_weight"]
    assert [launch.kernel.__name__ for launch in launches] == names
    return launches


def test_sizes_of_one_compile():
    """Triton makes a constant of an argument that is 1."""
    cases = [
        gated_causal_conv1d_launches(torch.bfloat16, 1, 1),
        masked_conv2d_launches(torch.bfloat16, 1, True),
        masked_conv2d_launches(torch.bfloat16, 1, False),
        wavenet_layer_launches(torch.bfloat16, 1, 1, 1),
    ]
    for launches in cases:
        for launch in launches:
            assert_fits(launch.compile(90), 90)


PRODUCTS = {
    "gated_causal_conv1d 32, unaligned": lambda d: gated_causal_conv1d_launches(d, 32, 1),
    "gated_causal_conv1d 128, aligned": lambda d: gated_causal_conv1d_launches(d, 128, 64),
    "wavenet_layer 128 256": lambda d: wavenet_layer_launches(d, 128, 256, 64),
    "wavenet_layer 256 256": lambda d: wavenet_layer_launches(d, 256, 256, 1),
    "masked_conv2d 64": lambda d: masked_conv2d_launches(d, 64, False),
    "gated_masked_conv2d 128": lambda d: masked_conv2d_launches(d, 128, True),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PRODUCTS)
def test_convolutions_multiply_on_tensor_cores(case, dtype):
    """And take 16 bytes at a time, on their way while the last ones are multiplied."""
    for launch in PRODUCTS[case](dtype):
        for architecture in ARCHITECTURES if dtype == torch.bfloat16 else (80,):
            compiled = launch.compile(architecture)
            code = "\n".join(instructions(compiled))
            assert_fits(compiled, architecture)
            if launch.kernel.__name__ == "_gate_grad":
                assert "LDG.E.128" in code
                assert "STG.E.128" in code
            else:
                product = TENSOR_CORES[architecture]
                assert dtype == torch.float32 or product in code, f"sm_{architecture}: no {product}"
                assert "LDGSTS.E.BYPASS.128" in code, f"sm_{architecture}: no asynchronous 128-bit loads"
                assert "LDGSTS.E " not in code, f"sm_{architecture}: narrow asynchronous loads"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_codes_load_128_bits_and_use_no_atomics(dtype):
    from fastgen.kernels import code_statistics as module

    with recorded(module) as launches:
        module.code_statistics(torch.empty(4096, 64, dtype=dtype), None, torch.zeros(4096, dtype=torch.int64), 512)
    (launch,) = launches
    for architecture in ARCHITECTURES:
        compiled = launch.compile(architecture)
        assert_fits(compiled, architecture)
        code = "\n".join(instructions(compiled))
        assert "LDG.E.128" in code
        assert "RED" not in code
        assert "ATOM" not in code


def test_heuristics_of_products():
    from fastgen.kernels import convolution, launch
    from fastgen.kernels.code_statistics import shares_for
    from fastgen.kernels.nearest_code import chunk_for, keep_for, splits_for
    from fastgen.kernels.vector_quantize import rows_for
    from fastgen.kernels.wavenet_layer import options_for

    assert [rows_for(d) for d in (1, 64, 65, 2048, 5000)] == [2048, 32, 16, 1, 1]
    assert [shares_for(*size) for size in ((1, 1 << 20), (256, 65536), (8192, 65536), (1, 3))] == [64, 8, 4, 1]
    assert [chunk_for(d) for d in (1, 16, 17, 64, 100, 129, 256, 257)] == [16, 16, 32, 64, 128, 256, 256, 128]
    small, large = convolution.tile_for(3, 5, 1, 16), convolution.tile_for(16000, 512, 256, 16)
    assert [small[k] for k in ("ROWS", "COLUMNS", "CHUNK", "num_warps")] == [16, 16, 16, 4]
    assert [large[k] for k in ("ROWS", "COLUMNS", "CHUNK", "num_warps")] == [128, 128, 64, 8]
    assert convolution.tile_for(16000, 512, 256, 32)["CHUNK"] == 32
    for gates, bits in ((1, 16), (100, 16), (256, 16), (128, 32)):
        tile = options_for(gates, 256, bits)
        assert gates <= tile["GATES"]
        assert tile["ROWS"] * tile["GATES"] <= (16384 if bits == 16 else 4096)
    assert [keep_for(k) for k in (1, 2048, 2049)] == [4, 4, 8]
    for programs in (1, 8, 1000):
        for tiles in (1, 7, 5000):
            for most in (64, tiles):
                share, splits = launch.splits_for(programs, tiles, most)
                assert (splits - 1) * share < tiles <= splits * share
                assert splits <= most
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
