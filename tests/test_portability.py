"""The C++ kernels elsewhere: Clang for ARM takes every source without a warning, and keeps the sums of the innermost
loops in registers. Nothing that it builds runs here; tests/arm.sh runs what GCC builds, in emulation."""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("ziglang", reason="no Clang with headers for other machines: pip install ziglang")

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
INCLUDE = Path(torch.__file__).parent / "include"
FLAGS = [
    "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror",
    "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{INCLUDE}", f"-isystem{INCLUDE}/torch/csrc/api/include",
]  # fmt: skip
FRONT_END = ["-emit-llvm", "-Xclang", "-disable-llvm-passes"]  # which is where warnings come from
# source -> part of a kernel's mangled name, and how often its innermost loop multiplies and adds
LOOPS = {
    "masked_conv2d": [
        ("multiply_rowsIffLi10ELi2ELb0E", {"fmla": 20}),
        ("multiply_rowsIffLi10ELi2ELb1E", {"fmla": 20}),
        ("multiply_rowsIfN3c108BFloat16ELi10ELi2ELb0E", {"bfdot": 20}),
    ],
    "wavenet_layer": [("multiply_addIffE", {"fmla": 24}), ("multiply_addIfN3c108BFloat16E", {"bfdot": 24})],
    "linear": [("product_tileILi12ELi2EfE", {"fmla": 24})],
    "nearest_code": [("4scanE", {"smlal": 24})],
}


def clang(target: str, source: Path, out: Path, *flags: str) -> None:
    command = [sys.executable, "-m", "ziglang", "c++", "-target", target, *FLAGS, *flags, str(source), "-o", str(out)]
    with tempfile.TemporaryDirectory() as cache:  # or hundreds of megabytes would stay in the home directory
        environment = os.environ | {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def innermost_loop(assembly: str, function: str) -> Counter[str]:
    """How often each instruction stands in the longest loop without a branch in it."""
    body = re.search(rf"^(_\S*{function}\S*):(.*?)^\s*; -- End function", assembly, re.MULTILINE | re.DOTALL)
    assert body, f"{function} is not there"
    blocks = re.split(r"^(LBB\w+):", body[2], flags=re.MULTILINE)
    loops = []
    for label, block in zip(blocks[1::2], blocks[2::2], strict=True):
        instructions = re.findall(r"^\t([a-z][\w.]*)[\t ]*([^;\n]*)", block, re.MULTILINE)
        back = [i for i, (_, operands) in enumerate(instructions) if re.search(rf"\b{label}\b", operands)]
        if back:
            loops.append(Counter(name.partition(".")[0] for name, _ in instructions[: back[0] + 1]))
    assert loops, f"{function} has no loop"
    return max(loops, key=Counter.total)


@pytest.mark.parametrize("source", [path.stem for path in sorted((CSRC / "cpu").glob("*.cpp"))])
def test_clang_for_arm(source, tmp_path):
    out = tmp_path / "out.s"
    looked_at = LOOPS.get(source, [])
    clang("aarch64-macos", CSRC / f"cpu/{source}.cpp", out, "-O3", "-S", *([] if looked_at else FRONT_END))
    assembly = out.read_text(errors="replace")
    for function, products in looked_at:
        found = innermost_loop(assembly, function)
        assert {name: found[name] for name in products} == products, f"{function}: {found}"
        assert not [name for name in found if name.startswith("st")], f"{function} spills: {found}"


def test_instructions_that_the_compiler_does_not_know(tmp_path):
    """bfdot and bfcvtn stand in assembly, which is looked at only when it becomes machine code."""
    for target in ("aarch64-macos", "aarch64-linux-gnu"):
        clang(target, CSRC / "cpu/gated_causal_conv1d.cpp", tmp_path / "out.o", "-O3", "-c")
