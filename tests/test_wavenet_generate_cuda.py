"""The CUDA kernel of WaveNet sampling without a GPU: its own source, compiled by g++, in the thread-block emulator."""

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cuda_helpers import ORDERS, built, once, run

from fastgen.ops import distributions
from fastgen.ops.wavenet_generate import Generator, WaveNetWeights, initial_state


def network(layers=5, residual=6, gate=5, skip=9, outputs=11, kernel_size=2, classes=True, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, fan=6):
        return torch.randn(*size, generator=generator) * fan**-0.5

    return WaveNetWeights(
        input=normal(outputs if classes else 1, residual), input_bias=normal(residual),
        conv=normal(layers, 2 * gate, residual, kernel_size, fan=residual * kernel_size),
        residual=normal(layers, residual, gate, fan=gate),
        residual_bias=normal(layers, residual), skip=normal(layers, skip, gate, fan=gate), skip_bias=normal(skip),
        hidden=normal(skip, skip, fan=skip), hidden_bias=normal(skip), output=normal(outputs, skip, fan=skip),
        output_bias=normal(outputs),
    )  # fmt: skip


def call(weights, dilations, distribution="categorical", streams=2, steps=12, cond=False, own_bias=False, given=0,
         local=0):  # fmt: skip
    """Arguments of Generator.run, after some steps that fill the queues."""
    layers, gates, _, _ = weights.conv.shape
    classes = distribution == "categorical"
    start = torch.arange(streams) % weights.input.shape[0] if classes else torch.linspace(-0.5, 0.5, streams)
    state = initial_state(weights, dilations, start)
    args = {
        "uniforms": torch.rand(streams, steps, *(() if classes else (2,))),
        "gate_bias": 0.3 * torch.randn(streams if own_bias else 1, layers, gates),
        "cond": 0.3 * torch.randn(streams, steps, layers, gates) if cond else None,
        "local": torch.randn(streams, steps, local) if local else None,
        "given": (torch.arange(streams * given).view(streams, given) % 3 if classes else torch.zeros(streams, given))
        if given else None,
    }  # fmt: skip
    before = torch.rand(streams, 3, *(() if classes else (2,)))
    first = Generator(weights, dilations, distribution=distribution, backend="reference")
    first.run(state, before, args["gate_bias"])
    return state, args


def emulate(program, folder, weights, dilations, state, args, *, distribution="categorical", temperature=1.0,
            top_k=None, top_p=None, bf16=False, local_weight=None, threads=64,
            cluster=1, tiles=1, tile=1, resident=True, spilled=False, order="forward", fill=0xFF):  # fmt: skip
    """-> samples, parameters, and the state behind them."""
    arrays = {f"weights.{k}": v for k, v in weights._asdict().items()}
    classes = distribution == "categorical"
    arrays |= {k: v for k, v in args.items() if v is not None and k not in ("given", "local")}
    local = args["local"]
    if local is not None:
        arrays |= {"cond": local, "weights.local": local_weight}
    if args["given"] is not None:
        arrays["given_class" if classes else "given_value"] = args["given"]
    arrays |= {"history": state.history, "last_class" if classes else "last_value": state.last}
    arrays["dilations"] = torch.tensor(dilations)
    for name, array in arrays.items():
        (folder / name).write_bytes(array.contiguous().numpy().tobytes())
    layers, gates, residual, kernel_size = weights.conv.shape
    streams, steps = args["uniforms"].shape[:2]
    options = {
        "inputs": weights.input.shape[0], "residual": residual, "gate": gates // 2, "skip": weights.hidden.shape[0],
        "outputs": weights.output.shape[0], "layers": layers, "kernel_size": kernel_size, "streams": streams,
        "steps": steps, "given_steps": 0 if args["given"] is None else args["given"].shape[1],
        "position": state.position, "gate_bias_stride": int(len(args["gate_bias"]) > 1),
        "local": 0 if local is None else local.shape[2],
        "distribution": distributions.KINDS.index(distribution), "temperature": temperature, "log_scale_min": -7.0,
        **dict(zip(("top_k", "top_p"), distributions.truncation(top_k, top_p, len(weights.output)), strict=True)),
        "threads": threads, "cluster": cluster, "tiles": tiles, "tile": tile, "resident": int(resident),
        "spilled": int(spilled), "bf16": int(bf16), "order": ORDERS[order][0], "seed": ORDERS[order][1], "fill": fill,
    }  # fmt: skip
    done = run(program, folder, *(f"{k}={v}" for k, v in options.items()))
    assert done.returncode == 0, done.stderr[-3000:]

    def read(name, dtype):
        return torch.frombuffer(bytearray((folder / f"out.{name}").read_bytes()), dtype=dtype)

    samples = read("classes", torch.int64) if classes else read("values", torch.float32)
    last = read("last_class", torch.int64) if classes else read("last_value", torch.float32)
    history = read("history", torch.float32).view(state.history.shape) if state.history.numel() else state.history
    return samples.view(streams, steps), read("parameters", torch.float32).view(streams, steps, -1), history, last


def check(program, folder, weights, dilations, state, args, *, distribution="categorical", bf16=False, drawing=None,
          **how):  # fmt: skip
    """`drawing`: temperature, top_k, top_p."""
    drawing = drawing or {}
    got = emulate(program, folder, weights, dilations, state, args, distribution=distribution, bf16=bf16,
                  **drawing, **how)  # fmt: skip
    dtype = torch.bfloat16 if bf16 else torch.float32
    reference = Generator(
        weights, dilations, distribution=distribution, dtype=dtype, local_weight=how.get("local_weight"),
        backend="reference",
    )  # fmt: skip
    state = state.clone()
    samples, parameters = reference.run(state, **args, **drawing, parameters=True)
    torch.testing.assert_close(got[1], parameters, rtol=1e-4, atol=2e-5)
    if distribution == "categorical":
        assert torch.equal(got[0], samples)
    else:
        torch.testing.assert_close(got[0], samples, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got[2], state.history, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got[3], state.last, rtol=1e-4, atol=2e-5)


DILATIONS = [1, 2, 4, 1, 2]
VARIANTS = {
    "one block": {},
    "one block, weights in memory": {"resident": False, "tile": 2},
    "two blocks": {"cluster": 2},
    "a cluster": {"cluster": 4},
    "a cluster, bfloat16": {"cluster": 4, "bf16": True},
    "a cluster, tiles of streams": {"cluster": 3, "tile": 3, "tiles": 2, "threads": 96},
    "a cluster, large tiles": {"cluster": 3, "tile": 6, "tiles": 2},
    "a cluster, bfloat16, weights in memory": {"cluster": 6, "tile": 4, "bf16": True, "resident": False},
    "one block, bfloat16, large tiles": {"bf16": True, "tile": 8, "threads": 32},
    "one block, all in memory": {"resident": False, "spilled": True, "tile": 3, "tiles": 2},
    "a cluster, bfloat16, all in memory": {"cluster": 3, "bf16": True, "resident": False, "spilled": True, "tile": 5},
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, order, tmp_path):
    how = VARIANTS[variant]
    state, args = call(network(), DILATIONS, streams=11 if how.get("tile", 1) > 1 else 2, cond=True, given=2)
    for mode in ("plain", "address"):
        check(built("wavenet.cpp", mode), tmp_path, network(), DILATIONS, state, args, order=order, **how)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_races(variant, tmp_path):
    how = VARIANTS[variant]
    state, args = call(network(), DILATIONS, streams=5 if how.get("tile", 1) > 1 else 1, steps=9, cond=True)
    check(built("wavenet.cpp", "thread"), tmp_path, network(), DILATIONS, state, args, order="random 1", **how)


@pytest.mark.parametrize("how", [{}, {"cluster": 3, "tile": 3, "tiles": 2, "bf16": True}], ids=str)
def test_no_races_with_features_and_three_taps(how, tmp_path):
    weights = network(kernel_size=3)
    local_weight = 0.5 * torch.randn(len(weights.conv), weights.conv.shape[1], 37)
    state, args = call(weights, [1, 2, 4, 5, 3], streams=5 if how else 1, steps=6, local=37, given=2)
    check(
        built("wavenet.cpp", "thread"), tmp_path, weights, [1, 2, 4, 5, 3], state, args, local_weight=local_weight,
        order="random 2", **how,
    )  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"cluster": 3, "bf16": True}], ids=["one block", "a cluster, bfloat16"])
@pytest.mark.parametrize("distribution", distributions.KINDS)
@pytest.mark.parametrize("sizes", [
    {"kernel_size": 3, "residual": 33, "gate": 40, "skip": 70}, {"kernel_size": 1, "residual": 1, "gate": 1, "skip": 1},
    {"layers": 2, "kernel_size": 5, "residual": 8, "gate": 3},
], ids=str)  # fmt: skip
def test_sizes_and_distributions(sizes, distribution, how, tmp_path):
    outputs = {"categorical": 300, "logistic": 6, "gaussian": 2}[distribution]
    weights = network(outputs=outputs, classes=distribution == "categorical", **sizes)
    dilations = [1, 3, 2, 5, 1][: len(weights.conv)]
    for steps, given in ((1, 0), (9, 3)):
        state, args = call(weights, dilations, distribution, 3, steps, own_bias=True, given=given)
        check(
            built("wavenet.cpp", "address"), tmp_path, weights, dilations, state, args, distribution=distribution,
            drawing={"temperature": 0.7}, **how,
        )  # fmt: skip


@pytest.mark.parametrize("drawing", [{"top_k": 1}, {"top_k": 20}, {"top_p": 0.6}, {"top_k": 40, "top_p": 0.9}], ids=str)
def test_most_probable_classes(drawing, tmp_path):
    weights = network(outputs=300)
    state, args = call(weights, DILATIONS, streams=3)
    drawing = {"temperature": 0.7} | drawing
    check(built("wavenet.cpp", "address"), tmp_path, weights, DILATIONS, state, args, drawing=drawing)


@pytest.mark.parametrize("how", [
    {}, {"cluster": 2, "bf16": True}, {"tile": 3, "bf16": True, "tiles": 2}, {"tile": 5, "cluster": 3},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("streams", [1, 7])
def test_features_at_the_rate_of_samples(streams, how, tmp_path):
    """Their 1x1 convolutions are part of the kernel, for four steps at once where a stream is alone."""
    weights = network(kernel_size=3)
    local_weight = 0.5 * torch.randn(len(weights.conv), weights.conv.shape[1], 37)
    state, args = call(weights, [1, 2, 4, 5, 3], streams=streams, steps=11, local=37)
    for mode in ("plain", "address"):
        check(
            built("wavenet.cpp", mode), tmp_path, weights, [1, 2, 4, 5, 3], state, args, local_weight=local_weight,
            order="random 1", **how,
        )  # fmt: skip


@pytest.mark.parametrize("how", [{}, {"cluster": 3}, {"cluster": 3, "tile": 5, "tiles": 2}], ids=str)
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_a_warp_for_each_tile(mode, how, tmp_path):
    """Products of the sizes for which a warp holds all weights of its tile."""
    weights = network(residual=50, gate=34)
    state, args = call(weights, DILATIONS, streams=7 if how.get("tile") else 1, steps=5)
    check(
        built("wavenet.cpp", mode), tmp_path, weights, DILATIONS, state, args, bf16=True, threads=160,
        order="random 1", **how,
    )  # fmt: skip


def test_without_layers(tmp_path):
    weights = network(layers=0)
    state, args = call(weights, [])
    check(built("wavenet.cpp", "address"), tmp_path, weights, [], state, args)


def test_whatever_shared_memory_held(tmp_path):
    state, args = call(network(), DILATIONS)
    for fill in (0x00, 0x41):
        check(built("wavenet.cpp", "plain"), tmp_path, network(), DILATIONS, state, args, cluster=3, fill=fill)


@pytest.fixture(scope="module")
def library():
    """The CUDA library, and what ptxas said of it."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    build = runpy.run_path(str(Path(__file__).parent.parent / "csrc" / "cuda" / "build.py"))

    def build_and_report(path):
        done = subprocess.run([*build["command"](path), "-Xptxas", "-v"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        path.with_suffix(".report").write_text(done.stderr)

    target = once("_cuda.so", build_and_report)
    return target, target.with_suffix(".so.report").read_text()


def test_compiles_without_warnings_or_spills(library):
    report = library[1]
    registers = re.findall(r"entry function '(\S+)' for '.*?Used (\d+) registers", report, re.DOTALL)
    # four or eight vectors, weights on chip and not, float32 and bfloat16; for two machines
    assert sum("wavenet" in name for name, _ in registers) == 16
    assert max(int(n) for _, n in registers) < 255  # that a thread of 256 can have
    assert not re.search(r"[1-9]\d* bytes spill", report)


def test_bfloat16_weights_are_multiplied_on_tensor_cores(library):
    knobs = pytest.importorskip("triton.knobs", reason="no cuobjdump")
    listing = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-sass", library[0]], capture_output=True, text=True, check=True
    ).stdout
    kernels = re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL)
    assert sum("wavenet" in name for name, _ in kernels) == 16
    for name, code in kernels:
        bf16 = re.search(r"[EI]tE+v", name) is not None  # of template arguments the last: unsigned short
        assert ("HMMA.16816.F32.BF16" in code) == bf16, name
        assert "LDS.128" in code
        assert "LDG.E.128" in code


def test_loads_under_a_torch_without_cuda_and_plans(library, python):
    """The weights of a usual network lie on the chips of eight blocks; nothing is planned that does not fit."""
    code = f"""
import torch, fastgen
torch.ops.load_library({str(library[0])!r})
for op in ("wavenet_generate", "pixelcnn_generate"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastgen::{{op}}", "CUDA")
plan = torch.ops.fastgen.wavenet_plan
h100, a100, small = [232448, 132, 8], [166912, 108, 1], [40000, 10, 1]
usual = [256, 64, 64, 128, 256, 20, 2, 0]
assert plan(usual, 1, True, h100) == [8, 1, 1, 1, 0]
assert plan(usual, 1, True, a100) == [1, 1, 1, 0, 0]
assert plan([16, 8, 8, 16, 16, 4, 2, 0], 1, True, h100) == [1, 1, 1, 1, 0]
large = [256, 128, 128, 256, 256, 30, 3, 0]
assert plan(large, 1, True, a100) == [1, 1, 1, 0, 1]
assert plan([256, 4096, 4096, 4096, 256, 4, 2, 0], 1, True, small)[0] == 0
for device in (h100, a100, small):
    for shape in (usual, large, [256, 64, 64, 64, 256, 400, 2, 0], [1, 16, 16, 16, 30, 3, 1, 80]):
        for streams in (1, 2, 7, 100, 5000):
            cluster, tile, tiles, resident, spilled = plan(shape, streams, True, device)
            assert 1 <= cluster <= device[2] and 1 <= tile <= 8 and tiles >= 1, (cluster, tile, tiles)
            assert tile * tiles < streams + 8
            assert not (resident and spilled)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
