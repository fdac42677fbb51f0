"""Machine code of the Triton kernels, compiled without a GPU: every kernel for every architecture."""

import ast
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from gpu_code import ARCHITECTURES, Launch, instructions, recorded
from op_helpers import INTERPRETED

from fastgen.ops.affine_coupling import LAYOUTS, SCALES
from fastgen.ops.nearest_code import PRECISIONS

triton = pytest.importorskip("triton", reason="pip install triton")
pytestmark = pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled in the interpreter")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
WIDTH = {F32: 16, BF16: 128, F16: 32}  # channels: float32's products, which take no tensor cores, are long loops
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
SPILLS = {((3, 7), "_grad_weight", 80), ((3, 7), "_prepare", 80)}  # Tritons that spill what others do not
STACK = 20  # stores to it: a few numbers are put there by ptxas even where registers are free, of a tile hundreds
PRODUCTS = ("_conv", "_gated_conv", "_grad_weight", "_layer", "_search")
LINES = ("_lstm", "_lstm_backward")  # of images, which begin anywhere
SAME_IN_ALL = (  # whatever the dtype, they see the same
    "_sum_rows", "_settle", "_summarize", "_sizes", "_codes", "_sum_added", "_scan", "_outputs", "_sum_passed",
    "_weights", "_draw",
)  # fmt: skip


def affine_coupling(dtype, scale="tanh", layout="scale_shift", masked=False) -> list[Launch]:
    from fastgen.kernels import affine_coupling as module

    x = torch.empty(4, 32, 16, 64, dtype=dtype)
    parts = 1 if scale == "none" else 2
    params = torch.empty(4, parts * (32 if masked else 16), 16, 64, dtype=dtype)
    mask = torch.ones(1, 32, 16, 64, dtype=torch.bool) if masked else None
    options = SCALES.index(scale), 1.5, LAYOUTS.index(layout), False
    with recorded(module) as launches:
        module.affine_coupling(x, params, mask, *options, False)
        module.affine_coupling_backward(x, torch.empty(4), x, params, mask, *options, True)
    return launches


def actnorm(dtype) -> list[Launch]:
    from fastgen.kernels import actnorm as module

    x, v = torch.empty(64, 32, 64, 64, dtype=dtype), torch.empty(32)
    with recorded(module) as launches:
        module.actnorm(x, v, v, v)
        module.actnorm_backward(x, x, v)
    return launches


def gaussian_rsample_kl(dtype) -> list[Launch]:
    from fastgen.kernels import gaussian_rsample_kl as module

    x = torch.empty(256, 4096, dtype=dtype)
    with recorded(module) as launches:
        z, kl = module.gaussian_rsample_kl(x, x, x)
        module.gaussian_rsample_kl_backward(z, kl, x, x, x)
        module.gaussian_rsample_kl_backward(None, kl, x, x, x)
    return launches


def vector_quantize(dtype, rotation=False, masked=False) -> list[Launch]:
    from fastgen.kernels import nearest_code, vector_quantize

    x, codebook = torch.empty(512, 64, dtype=dtype), torch.zeros(128, 64, dtype=dtype)
    mask = torch.ones(512, dtype=torch.bool) if masked else None
    with recorded(nearest_code, vector_quantize) as launches:
        vector_quantize.vector_quantize(x, codebook, mask, False, False)
        vector_quantize.vector_quantize_backward(x, torch.zeros(()), x, x, mask, rotation)
    return [launch for launch in launches if launch.kernel.__name__ in ("_gather", "_summarize", "_backward")]


def nearest_code(dtype, size=(65536, 8192, 256), cosine=False, precision="ieee") -> list[Launch]:
    from fastgen.kernels import nearest_code as module

    rows, codes, dim = size
    with recorded(module) as launches:
        module.nearest_code(
            torch.empty(rows, dim, dtype=dtype), torch.zeros(codes, dim, dtype=dtype), cosine, False,
            PRECISIONS.index(precision),
        )  # fmt: skip
    return launches


def code_statistics(dtype, subtract=False) -> list[Launch]:
    from fastgen.kernels import code_statistics as module

    x, indices = torch.empty(4096, 64, dtype=dtype), torch.zeros(4096, dtype=torch.int64)
    with recorded(module) as launches:
        module.code_statistics(x, x if subtract else None, indices, 512)
    return launches


def update_codebook(dtype) -> list[Launch]:
    from fastgen.kernels import update_codebook as module

    sizes, codes = torch.empty(512), torch.empty(512, 64)
    with recorded(module) as launches:
        module.update_codebook(sizes, codes, codes, sizes, codes, 0.9, 1e-5, True)
    return launches


def of_convolutions() -> tuple[ModuleType, ...]:
    from fastgen.kernels import convolution, grad_weight, tiles

    return tiles, convolution, grad_weight


def gated_causal_conv1d(dtype, dilation=1, channels=0) -> list[Launch]:
    from fastgen.kernels import gated_causal_conv1d as module

    channels = channels or max(32, WIDTH[dtype])
    x, weight = (torch.empty(size, dtype=dtype) for size in ((2, channels, 4096), (2 * channels, channels, 2)))
    bias, cond = torch.empty(2 * channels, dtype=dtype), torch.empty(2, 2 * channels, 4096, dtype=dtype)
    with recorded(*of_convolutions()) as launches:
        module.gated_causal_conv1d(x, weight, bias, cond, dilation)
        module.gated_causal_conv1d_backward(x, x, weight, bias, cond, dilation)
    return launches


def wavenet_layer(dtype, dilation=1, channels=0, skips=256) -> list[Launch]:
    from fastgen.kernels import wavenet_layer as module

    channels = channels or WIDTH[dtype]
    x, skip = (torch.empty(2, n, 4096, dtype=dtype) for n in (channels, skips))
    weights = [torch.empty(size, dtype=dtype) for size in ((2 * channels, channels, 2), (channels + skips, channels))]
    bias, out_bias = (w.new_empty(w.shape[0]) for w in weights)
    cond = torch.empty(2, 2 * channels, 1, dtype=dtype)
    args = x, weights[0], bias, weights[1], out_bias, cond, dilation
    with recorded(*of_convolutions(), module) as launches:
        module.wavenet_layer(*args)
        module.wavenet_layer_backward(x, skip, *args)
    return launches[:6]  # the rest is as in gated_causal_conv1d


def masked_conv2d(dtype, gated=False, channels=0) -> list[Launch]:
    from fastgen.kernels import masked_conv2d as module

    channels = channels or min(64, WIDTH[dtype])
    x, weight = torch.empty(8, channels, 32, 32, dtype=dtype), torch.empty(2 * channels, channels, 5, 5, dtype=dtype)
    bias, cond = torch.empty(2 * channels, dtype=dtype), torch.empty(8, 2 * channels, 32, 32, dtype=dtype)
    with recorded(*of_convolutions()) as launches:
        if gated:
            out, kept = module.gated_masked_conv2d(x, weight, bias, cond, 1, 1, True)
            module.masked_conv2d_backward(out, kept, x, weight, cond, 1, 1, False, True)
        else:
            out = module.masked_conv2d(x, weight, bias, 1, 1, False)
            module.masked_conv2d_backward(out, None, x, weight, None, 1, 1, False, True)
    return launches


def image_lstm(dtype, diagonal=False, states=64) -> list[Launch]:
    from fastgen.kernels import image_lstm as module

    gates, weight = torch.empty(2, 4 * states, 28, 28, dtype=dtype), torch.empty(4 * states, states, 3, dtype=dtype)
    weight = weight[:, :, :2].contiguous() if diagonal else weight
    with recorded(module) as launches:
        h, kept = module.image_lstm(gates, weight, diagonal, True)
        module.image_lstm_backward(h, weight, kept, diagonal)
    return launches


def nade(_, values=1) -> list[Launch]:
    """Of whatever dtype, it sees float32."""
    from fastgen.kernels import nade as module

    x, in_weight, in_bias = torch.zeros(100, 784, dtype=torch.int64), torch.empty(784, values, 512), torch.empty(512)
    out_weight, out_bias = torch.empty(784, values, 512), torch.empty(784, values)
    with recorded(module) as launches:
        out = module.nade(x, in_weight, in_bias, out_weight, out_bias)
        module.nade_backward(out, x, in_weight, in_bias, out_weight)
        module.nade_sample(in_weight, in_bias, out_weight, out_bias, torch.empty(100, 784), 1.0, x)
    return launches


def sums(dtype) -> list[Launch]:
    from fastgen.kernels import launch

    with recorded() as launches:
        launch.sum_rows(torch.empty(8, 4096))
    return launches


def channels_first(op: Callable[..., list[Launch]], dtype: torch.dtype) -> list[Launch]:
    return [launch for launch in op(dtype, dilation=64) if not launch.arguments.get("LAST", True)]


CASES = {  # compiled for every architecture; in float16, whose code is much as bfloat16's, for one
    "affine_coupling": affine_coupling,
    "actnorm": actnorm,
    "gaussian_rsample_kl": gaussian_rsample_kl,
    "vector_quantize": vector_quantize,
    "nearest_code": lambda dtype: [*nearest_code(dtype), *nearest_code(dtype, (64, 8192, 256))[1:]],  # and in splits
    "code_statistics": code_statistics,
    "update_codebook": update_codebook,
    "gated_causal_conv1d": gated_causal_conv1d,
    "wavenet_layer": wavenet_layer,
    "gated_masked_conv2d": lambda dtype: masked_conv2d(dtype, gated=True)[:3],  # the rest is as above
    "image_lstm": image_lstm,
    "nade": nade,
    "sums": sums,
}
VARIANTS = {  # each for some, since what differs is not what differs between those
    **{f"affine_coupling {s}": (partial(affine_coupling, scale=s), F16, 90) for s in ("exp", "sigmoid", "none")},
    **{f"affine_coupling {s}": (partial(affine_coupling, layout=s), BF16, 100) for s in LAYOUTS[1:]},
    "affine_coupling masked": (partial(affine_coupling, masked=True), F32, 80),
    "vector_quantize masked rotation": (partial(vector_quantize, masked=True, rotation=True), BF16, 80),
    "nearest_code cosine": (partial(nearest_code, size=(8192, 1024, 64), cosine=True), F32, 80),
    "nearest_code 8": (partial(nearest_code, size=(4096, 1024, 8)), BF16, 100),
    "nearest_code 400": (partial(nearest_code, size=(4096, 8192, 400)), F16, 90),
    "nearest_code tf32": (partial(nearest_code, size=(8192, 1024, 128), precision="tf32"), F32, 90),
    "nearest_code bf16": (partial(nearest_code, precision="bf16"), BF16, 90),
    "code_statistics less": (partial(code_statistics, subtract=True), BF16, 80),
    **{
        f"{op.__name__} aligned {a}": (partial(channels_first, op), BF16, a)
        for op in (gated_causal_conv1d, wavenet_layer)
        for a in ARCHITECTURES
    },
    "wavenet_layer 256": (partial(wavenet_layer, channels=256), F16, 90),
    "masked_conv2d": (masked_conv2d, BF16, 90),
    "nade of 16 values": (partial(nade, values=16), F32, 90),
    "image_lstm diagonal": (partial(image_lstm, diagonal=True, states=128), BF16, 90),
    **{
        f"{name} of 1": (partial(case, channels=1), BF16, 90)  # Triton makes a constant of an argument that is 1
        for name, case in (
            ("gated_causal_conv1d", gated_causal_conv1d), ("wavenet_layer", partial(wavenet_layer, skips=1)),
            ("masked_conv2d", masked_conv2d), ("gated_masked_conv2d", partial(masked_conv2d, gated=True)),
        )
    },
}  # fmt: skip
ALL = {
    f"{name} {str(d)[6:]} {a}": (case, d, a)
    for name, case in CASES.items()
    for d in (F32, BF16, F16)
    for a in ARCHITECTURES
    if d != F16 or a == 90
}


def expected_shared(launch: Launch, limit: int) -> int:
    """By what the heuristics go by."""
    from fastgen.kernels import nearest_code, tiles, wavenet_layer
    from fastgen.kernels.launch import BARRIERS

    tile, x = launch.arguments | launch.options, launch.arguments["x"]
    if launch.kernel.__name__ == "_search":
        chunk = tile["CHUNK"] * tile["codes"].element_size()
        # what is known of codes comes beside them
        return 2 * BARRIERS + nearest_code.shared_by(tile, chunk, tile["WHOLE"], tile["PLAIN"])
    if launch.kernel.__name__ == "_layer":
        return BARRIERS + wavenet_layer.shared_by(tile, 8 * x.element_size(), limit)
    paired = launch.kernel.__name__ == "_gated_conv"
    return BARRIERS + tiles.shared_by(tile, 8 * x.base.element_size(), limit, paired)


def spilled(code: list[str]) -> list[str]:
    return [line for line in code if re.match(r"(@!?U?P\w+ )?STL", line)]


def around_products(code: list[str]) -> list[str]:
    """From the branch before the first product to the one after the last."""
    products = [i for i, line in enumerate(code) if "MMA" in line]
    begin = max((i for i in range(products[0]) if "BRA" in code[i]), default=0)
    return code[begin : next((i for i in range(products[-1], len(code)) if "BRA" in code[i]), len(code))]


@pytest.mark.parametrize("name", ALL | VARIANTS)
def test_machine_code(name, monkeypatch):
    """Nothing is spilled, shared memory suffices, memory moves 16 bytes at a time, 16 bits go to tensor cores."""
    from fastgen.kernels import convolution, grad_weight, nearest_code
    from fastgen.kernels import wavenet_layer as layer

    case, dtype, architecture = (ALL | VARIANTS)[name]
    for module in (convolution, grad_weight, layer, nearest_code):
        monkeypatch.setattr(module, "shared_memory", lambda x: SHARED_MEMORY[architecture])
    seen = set()
    for launch in case(dtype):
        kernel = launch.kernel.__name__
        if name in ALL and dtype != F32 and kernel in SAME_IN_ALL:
            continue
        compiled = launch.compile(architecture)
        if compiled.hash in seen:
            continue
        seen.add(compiled.hash)
        code = instructions(compiled)
        text, what = "\n".join(code), f"{kernel} for sm_{architecture}"
        # Triton 3.6 mixes up what is of 8 bits and less on the way from one layout to another; 3.8 does not
        mixed_up = VERSION < (3, 8) and re.search(r"convert_layout.*x(i1|i8),", compiled.asm["ttgir"])
        assert not mixed_up, f"{what}: a mask changes its layout"
        stores = spilled(around_products(code) if kernel == "_search" else code)  # what follows a scan may wait
        known = (VERSION, kernel, architecture) in SPILLS
        assert len(stores) <= STACK or known, f"{what}: registers are spilled: {len(stores)} stores"
        assert compiled.metadata.shared <= SHARED_MEMORY[architecture], what
        if kernel in PRODUCTS:
            short = kernel == "_search" or dtype != F32
            rows = launch.arguments.get("ROWS") or launch.arguments["GATES"]
            product = TENSOR_CORES[architecture] if rows >= 64 else "HMMA"
            assert not short or product in text, f"{what}: no {product}"
            assert compiled.metadata.shared <= expected_shared(launch, SHARED_MEMORY[architecture]), what
        if name.endswith((" of 1", " 8")):
            continue
        if kernel in LINES:
            assert dtype == F32 or "HMMA" in text, f"{what}: no tensor cores"
        elif kernel in PRODUCTS and kernel != "_search":
            # before Hopper there is no copy engine, and loads of a tile that may begin anywhere are narrow
            assert architecture < 90 or "UTMALDG.3D" in text, f"{what}: no tile comes by the copy engine"
        elif kernel in PRODUCTS:
            assert "LDGSTS.E.BYPASS.128" in text, f"{what}: no asynchronous 128-bit loads"
            # but for what little is known of codes
            assert kernel == "_search" or "LDGSTS.E " not in text, f"{what}: narrow asynchronous loads"
        elif kernel == "_turn":
            assert "STG.E.128" in text, f"{what}: no 128-bit stores"
            assert not launch.arguments["PACKED"] or "LDG.E.128" in text, f"{what}: no 128-bit loads"
        elif kernel != "_sum_rows" or name.startswith("sums"):
            assert "LDG.E.128" in text, f"{what}: no 128-bit loads"
        if kernel in ("_forward", "_backward", "_gather", "_gate_grad"):
            assert "STG.E.128" in text, f"{what}: no 128-bit stores"
        if kernel == "_sum_segments":
            assert "RED" not in text, f"{what}: atomics"
            assert "ATOM" not in text, f"{what}: atomics"


@pytest.mark.parametrize("limit", [99 << 10, 48 << 10])
def test_tiles_fit_into_the_shared_memory_there_is(limit, monkeypatch):
    """Ada and consumer Blackwell have 99 KiB for a program."""
    from fastgen.kernels import convolution, grad_weight, tiles
    from fastgen.kernels import nearest_code as search
    from fastgen.kernels import wavenet_layer as layer

    for module in (convolution, grad_weight, search, layer):
        monkeypatch.setattr(module, "shared_memory", lambda x: limit)
    for launch in (
        wavenet_layer(BF16)[1], *(run for run in nearest_code(BF16) if run.kernel.__name__ == "_search"),
        gated_causal_conv1d(BF16)[1],
    ):  # fmt: skip
        assert launch.compile(86).metadata.shared <= min(limit, expected_shared(launch, limit))
    for bits in (16, 32):
        for channels in (1, 16, 64, 100, 256, 1000):
            tile = tiles.tile_for(5000, channels, channels, bits, limit)
            assert tiles.shared_by(tile, bits, limit) <= limit
            assert tile["CHUNK"] >= 16
            for backward in (False, True):
                tile = layer.options_for(min(channels, 256), channels, bits, limit, backward=backward)
                assert layer.shared_by(tile, bits, limit) <= limit
    for chunk_bytes in (32, 128, 256, 512):
        for whole in (False, True):
            tile = search.scan_options(65536, chunk_bytes, whole, False, limit)
            assert search.shared_by(tile, chunk_bytes, whole, False) <= limit
            assert tile["ROWS"] >= 16
    assert tiles.tile_for(5000, 128, 128, 16, 99 << 10) == tiles.tile_for(5000, 128, 128, 16, 163 << 10), "all fits"


def test_every_kernel_that_is_launched_is_compiled():
    """In some case: `kernel[grid](...)` or `planned(kernel, ...)` in kernels/*.py."""
    from fastgen import kernels

    launched = set()
    for path in Path(str(kernels.__file__)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.value if isinstance(node.func, ast.Subscript) else None
            if isinstance(node.func, ast.Name) and node.func.id in ("planned", "_plan"):
                called = node.args[0]
            if isinstance(called, ast.Name) and called.id.startswith("_"):
                launched.add((path.stem, called.id))
    compiled = {
        (launch.kernel.fn.__module__.split(".")[-1], launch.kernel.__name__)
        for case in CASES.values()
        for launch in case(BF16)
    }
    missing = launched - compiled
    assert launched, "no launches were found"
    assert not missing, f"compiled in no case: {sorted(missing)}"
