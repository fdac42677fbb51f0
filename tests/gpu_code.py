"""Machine code of Triton kernels without a GPU: what a launcher launches, compiled ahead of time."""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)
POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.bool: "*i1", torch.int64: "*i64",
    torch.int32: "*i32",
}  # fmt: skip


@dataclass
class Launch:
    """A kernel with the arguments of one launch."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def specialized(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
        """(types, constants, attributes) as Triton has them: a 1 is a constant, what 16 divides is known to be so."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
                signature[parameter.name] = "constexpr"
                constants[parameter.name] = value
                continue
            if isinstance(value, TensorDescriptor):
                of = POINTERS[value.base.dtype][1:]
                signature[parameter.name], divisible = f"tensordesc<{of}{value.block_shape}>", False
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
                divisible = value.data_ptr() % 16 == 0
            elif isinstance(value, float):
                signature[parameter.name], divisible = "fp32", False
            else:
                signature[parameter.name] = "i32" if value < 2**31 else "i64"
                divisible = value % 16 == 0
            if divisible:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return signature, constants, attributes

    def compile(self, architecture: int) -> Any:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, attributes = self.specialized()
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        return compiled_for(source, GPUTarget("cuda", architecture, 32), self.options)


def compiled_for(source: Any, target: Any, options: dict[str, int]) -> Any:
    import triton

    return triton.compile(source, target=target, options=options)


def bound(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """As Triton's launcher binds the arguments; it has variables of its own, after which none may be named."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", ARCHITECTURES[0], 32))
    create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **keywords)


@contextlib.contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Within it, the kernels of the modules and those that all share are not run: their launches are listed."""
    from fastgen.kernels import launch as shared
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **keywords: Any) -> None:
                bound(self.kernel, args, keywords)
                names = [p.name for p in self.kernel.params]
                given = dict(zip(names, args, strict=False)) | {k: v for k, v in keywords.items() if k in names}
                options = {k: v for k, v in keywords.items() if k not in names}
                launches.append(Launch(self.kernel, grid, given, options))

            return launch

    kept = [(m, n, v) for m in (*modules, shared) for n, v in vars(m).items() if isinstance(v, JITFunction)]
    for place, name, kernel in kept:
        setattr(place, name, Recorder(kernel))
    try:
        yield launches
    finally:
        for place, name, kernel in kept:
            setattr(place, name, kernel)


def instructions(compiled: Any) -> list[str]:
    """The machine code, an instruction a line: all of it, while compiled.asm["sass"] ends after 64 KiB."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        listing = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", file.name], capture_output=True, text=True, check=True
        )
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", listing.stdout)
