"""Triton's launches carried out on the CPU, from the PTX that it compiles for a GPU that need not be there."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from gpu_code import Launch
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from .machine import Machine, Memory
from .memory import TensorMap
from .program import Program, parse

AT_ONCE = 4096  # threads that a machine has
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}


class Compiled:
    """What a launch returns: code that other arguments of the same kinds can be given."""

    def __init__(self, launch: Launch, architecture: int, late: bool) -> None:
        self.launch, self.late = launch, late
        self.compiled = launch.compile(architecture)
        self.program: Program = parse(self.compiled.asm["ptx"])
        if self.compiled.metadata.shared > SHARED_MEMORY[architecture]:
            raise OutOfResources(self.compiled.metadata.shared, SHARED_MEMORY[architecture], "shared memory")

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            names = [p.name for p in self.launch.kernel.params]
            self.run(grid[0], dict(zip(names, args, strict=True)))

        return run

    def run(self, grid: int, values: dict[str, Any]) -> None:
        maps = iter(getattr(self.compiled.metadata, "tensordesc_meta", None) or ())
        arguments: list[Any] = []
        tensors: list[torch.Tensor] = []
        for name, kind in self.compiled.src.signature.items():
            value = values[name]
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                arguments.append(value.data_ptr())
                tensors.append(value)
            elif kind.startswith("tensordesc"):
                arguments += tensor_map(value, next(maps, None))
                tensors.append(value.base)
            else:
                arguments.append(float(value) if kind == "fp32" else int(value))
        arguments += [0, 0]  # memory of Triton's own, of which none is asked for
        storages = [(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()) for t in tensors]
        ranges = [(begin, begin + size) for begin, size in storages]
        blocks = max(1, AT_ONCE // self.program.threads)
        for first in range(0, grid, blocks):
            part = range(first, min(first + blocks, grid))
            Machine(self.program, arguments, part, grid, self.compiled.metadata.shared, Memory(ranges), self.late).run()


def tensor_map(tiles: Any, known: dict[str, Any] | None) -> list[Any]:
    """The arguments that Triton makes of a descriptor of a tensor: before Hopper its pointer, then a map of it."""
    sizes = [*tiles.shape, *tiles.strides]
    if known is None:
        # later Tritons than 3.6 ask one thing more
        more = [tiles.round_f32_to_tf32] if hasattr(TensorDescriptor, "round_f32_to_tf32") else []
        return [tiles.base.data_ptr(), *sizes, tiles.padding == "nan", *more, *sizes]
    described = TensorMap(
        tiles.base.data_ptr(), tuple(tiles.shape), tuple(tiles.strides), tuple(known["block_size"]),
        known["elem_size"], known["swizzle"], tiles.padding == "nan",
    )  # fmt: skip
    return [described, *sizes]


codes: dict[Any, Compiled] = {}  # what has been carried out, by kernel and what it was compiled for


def emulate(architecture: int, late: bool) -> None:
    """From now on Triton's kernels take tensors on the CPU, and are carried out there."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    def without_machine_code(*compilation: Any) -> tuple[str, str] | None:
        """Triton asks for what its cache is to know of this, or with the stages of a compilation."""
        if not compilation:
            return "ptx", "ptx"
        compilation[1]["cubin"] = lambda code, metadata: b""
        return None

    knobs.runtime.add_stages_inspection_hook = without_machine_code
    knobs.cache.dir = f"{knobs.cache.dir}/ptx"  # for Triton 3.6 asks too late
    for name in ("convolution", "grad_weight", "nearest_code", "wavenet_layer"):  # which choose tiles by it
        module = importlib.import_module(f"fastgen.kernels.{name}")
        module.shared_memory = lambda x: SHARED_MEMORY[architecture]

    def run(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **keywords: Any) -> Compiled:
        names = [p.name for p in kernel.params]
        given = dict(zip(names, args, strict=False)) | {k: v for k, v in keywords.items() if k in names}
        options = {k: v for k, v in keywords.items() if k not in names}
        launch = Launch(kernel, grid, given, options)
        key = id(kernel), repr((launch.specialized(), sorted(options.items())))
        if key not in codes:
            codes[key] = Compiled(launch, architecture, late)
        codes[key].run(grid[0], given)
        return codes[key]

    JITFunction.run = run
