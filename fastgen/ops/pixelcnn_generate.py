"""Sampling from PixelCNN and its kin: a pixel costs what it costs in a forward pass, and the loop is inside one op.

A model hands over a `PixelProgram` (see there for what is computed when). Values are drawn by inversion: a sample is
the number of levels whose cumulative probability is <= u.

Sources: van den Oord et al., "Conditional Image Generation with PixelCNN Decoders" (2016); Ramachandran et al., "Fast
Generation for Convolutional Autoregressive Models" (2017).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import NO_ROOM, instead, lib, resolve
from fastgen.checks import check_classes, check_temperature, check_tensor, check_truncation, refused
from fastgen.ops import distributions
from fastgen.ops.pixel_layout import bias_places, encoded, layout_of, not_on_cuda
from fastgen.ops.pixel_program import AHEAD, NORM_EPS, Instruction, PixelProgram

DTYPES = (torch.float32, torch.bfloat16)
TOO_LARGE = "(its weights or its context are too large)"
DISTRIBUTIONS = ("bernoulli", "categorical", "logistic")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "elu": F.elu, "gelu": F.gelu}


@dataclass(frozen=True)
class PixelDistribution:
    """Of one color of one pixel: `outputs` parameters, `levels` values."""

    kind: str
    levels: int
    outputs: int
    log_scale_min: float = -7.0

    def sample(
        self, parameters: Tensor, uniforms: Tensor, temperature: float, top_k: int | None = None,
        top_p: float | None = None,
    ) -> Tensor:  # fmt: skip
        """parameters (..., outputs), uniforms (...) -> int64 (...)."""
        return distributions.sample_levels(
            self.kind, parameters, uniforms, self.levels, temperature, self.log_scale_min, top_k=top_k, top_p=top_p
        )


lib.define("pixelcnn_pack(Tensor[] matrices, int[] shapes, bool bf16) -> Tensor")
lib.define("pixelcnn_pack_cuda(Tensor[] matrices, int[] shapes, bool bf16) -> Tensor")
lib.define(
    "pixelcnn_fits(Tensor packed, int[] shapes, int[] planes, int[] instructions, bool bf16, int outputs) -> bool"
)
lib.define(
    "pixelcnn_generate(Tensor packed, int[] shapes, int[] planes, int[] instructions, bool bf16, Tensor biases, "
    "Tensor? context, int context_plane, Tensor table, int distribution, int outputs, float log_scale_min, "
    "float temperature, int top_k, float top_p, Tensor uniforms, Tensor? given, Tensor? known, int first_row, "
    "int last_row, Tensor(a!) memory, Tensor(b!) values, Tensor(c!)? parameters) -> ()"
)


@torch.library.register_fake("fastgen::pixelcnn_generate", lib=lib)
def _(*args: object) -> None:
    return None


class PixelGenerator:
    """A program's weights, laid out once for a backend; `run` draws images.

    Parameters
    ----------
    program
        The network.
    table
        (levels, features of one color) float32: what the network sees of each value.
    distribution
        Of each color of a pixel.
    dtype
        Of the weights inside the loop: float32, or bfloat16 (sums stay float32).
    backend
        See `fastgen.backend`; "reference" runs the program in plain PyTorch.

    Raises
    ------
    ValueError
        If the table or the distribution does not fit the program, or weights are not finite.
    """

    def __init__(
        self,
        program: PixelProgram,
        table: Tensor,
        distribution: PixelDistribution,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"pixelcnn_generate: dtype must be float32 or bfloat16, got {dtype}")
        matrices = program.matrices
        _check_finite(matrices)
        self.distribution, self.dtype = distribution, dtype
        self._structure, self._weights = program.structure, [w.detach().clone() for w in program.weights]
        self._offsets, self._places = bias_places(program, table.device)
        self._layouts: dict[tuple[int, int], tuple[list[int], list[int], int]] = {}
        self._use(program, table)
        self.backend = resolve("pixelcnn_generate", backend, table.device)
        self._shapes = [n for shape in program.shapes for n in shape]
        if self.backend == "cuda" and (reason := not_on_cuda(program)):
            self.backend = instead("pixelcnn_generate", backend, "cuda", table.device, reason)
        if self.backend == "cuda":
            packed = torch.ops.fastgen.pixelcnn_pack_cuda(
                [m.cpu() for m in matrices], self._shapes, dtype == torch.bfloat16
            )
            self._packed = packed.to(table.device)
            planes, caches, _ = layout_of(program, 1, 1, 1)
            instructions = encoded(program, self._offsets, caches)
            if not torch.ops.fastgen.pixelcnn_fits(
                self._packed, self._shapes, planes, instructions, dtype == torch.bfloat16, distribution.outputs
            ):
                self.backend = instead("pixelcnn_generate", backend, "cuda", table.device, NO_ROOM)
        elif self.backend == "cpu":
            bf16 = dtype == torch.bfloat16
            self._packed = torch.ops.fastgen.pixelcnn_pack(matrices, self._shapes, bf16)
        if self.backend == "reference":
            self._matrices = [m.to(dtype).float() for m in matrices]

    def is_of(self, program: PixelProgram) -> bool:
        """Whether a program differs from this generator's in its biases at most."""
        # the values themselves are compared: version counters do not see what is written through `.data`
        return self._structure == program.structure and all(
            copy.dtype == weight.dtype and torch.equal(copy, weight)
            for copy, weight in zip(self._weights, program.weights, strict=True)
        )

    def updated(self, program: PixelProgram, table: Tensor) -> PixelGenerator:
        """This generator with the table, and the biases of a program that it `is_of`."""
        other = copy.copy(self)
        other._use(program, table)
        return other

    def _use(self, program: PixelProgram, table: Tensor) -> None:
        batches = {len(bias) for bias in program.biases if bias.dim() == 2}
        if len(batches) > 1:
            raise ValueError(f"pixelcnn_generate: the program's biases are for {sorted(batches)} images at once")
        batch = max(batches, default=1)
        rows = [bias if bias.dim() == 2 else bias.expand(batch, -1) for bias in program.biases]
        biases = torch.cat([*rows, table.new_zeros(batch, 1, dtype=torch.float32)], 1)
        _check_finite([biases, table])
        if table.dim() != 2 or len(table) != self.distribution.levels or program.features % max(1, table.shape[1]):
            raise ValueError(
                f"pixelcnn_generate: table must be ({self.distribution.levels}, a divisor of {program.features}), got "
                f"{tuple(table.shape)}"
            )
        self.colors = program.features // table.shape[1]
        drawn = [i for i in program.instructions if i.kind == "sample"]
        if [i.extra for i in drawn] != list(range(self.colors)) or program.later:
            raise ValueError(
                f"pixelcnn_generate: program must sample the colors 0 to {self.colors - 1} in order and be finished, "
                f"got {[i.extra for i in drawn]}"
            )
        for i in drawn:
            if program.planes[i.src].channels != self.distribution.outputs:
                raise ValueError(
                    f"pixelcnn_generate: program must sample from {self.distribution.outputs} parameters, got "
                    f"{program.planes[i.src].channels}"
                )
        self.program, self.table, self._biases = program, table.detach().float().contiguous(), biases

    @torch.no_grad()
    def run(
        self,
        uniforms: Tensor,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        given: Tensor | None = None,
        known: Tensor | None = None,
        context: Tensor | None = None,
        parameters: bool = False,
        report: Callable[[int], object] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Draw as many images as there are uniforms.

        Parameters
        ----------
        uniforms
            (B, C, H, W) float32 in [0, 1).
        top_k, top_p
            Draw from the `top_k` most probable levels, and of these from the fewest whose probabilities reach `top_p`
            of theirs, once the temperature is applied; levels as probable as the last one kept are kept. None keeps
            all. For categorical distributions.
        given, known
            (B, C, H, W) int64 values, and bool: where `known`, the network sees the given value in place of its own.
        context
            (B or 1, context channels, H, W) float32.
        parameters
            Also return the distributions' parameters.
        report
            Called with the number of rows that are done.

        Returns
        -------
        values (B, C, H, W) int64; parameters (B, C, H, W, outputs) float32 or None.

        Raises
        ------
        ValueError
            For a tensor of another shape or type, values outside the levels, or a network whose outputs are not finite.
        """
        self._check_call(uniforms, given, known, context)
        check_temperature("pixelcnn_generate", temperature)
        check_truncation("pixelcnn_generate", top_k, top_p, self.distribution.kind)
        uniforms = uniforms.float().clamp(max=1 - 2**-24).contiguous()  # float64's may round to 1
        batch, colors, height, width = uniforms.shape
        values = torch.zeros(batch, colors, height, width, dtype=torch.int64, device=uniforms.device)
        kept = uniforms.new_empty(*values.shape, self.distribution.outputs) if parameters else None
        if self.backend == "reference":
            draw = partial(self.distribution.sample, temperature=temperature, top_k=top_k, top_p=top_p)
            run = _Reference(self.program, self._matrices, self.table, draw, context, values, kept)
            for row in range(height if batch else 0):
                run.row(row, uniforms, given, known)
                if report is not None:
                    report(row + 1)
            return values, kept
        if (height, width) not in self._layouts:
            on_cpu = self.backend == "cpu"
            halved = on_cpu and self.dtype == torch.bfloat16
            planes, caches, size = layout_of(self.program, height, width, AHEAD if on_cpu else 1, halved)
            self._layouts[height, width] = planes, encoded(self.program, self._offsets, caches), size
        planes, instructions, size = self._layouts[height, width]
        memory, biases = uniforms.new_zeros(batch, size), self._biases.index_select(1, self._places)
        if context is not None:
            context = context.permute(0, 2, 3, 1).float().contiguous()
        given = None if given is None else given.contiguous()
        seen = None if known is None else known.to(torch.uint8).contiguous()
        rows = 1 if report is not None else max(height, 1)
        kind = distributions.KINDS.index("logistic" if self.distribution.kind == "logistic" else "categorical")
        for row in range(0, height, rows):
            with refused():
                torch.ops.fastgen.pixelcnn_generate(
                    self._packed, self._shapes, planes, instructions, self.dtype == torch.bfloat16, biases, context,
                    self.program.context, self.table, kind, self.distribution.outputs, self.distribution.log_scale_min,
                    temperature, *distributions.truncation(top_k, top_p, self.distribution.outputs), uniforms,
                    given, seen, row, row + rows, memory, values, kept,
                )  # fmt: skip
            if report is not None:
                report(row + 1)
        if self.backend == "cuda" and bool((values < 0).any()):
            raise ValueError(f"pixelcnn_generate: the network's outputs are not finite {TOO_LARGE}")
        return values, kept

    def _check_call(
        self, uniforms: Tensor, given: Tensor | None, known: Tensor | None, context: Tensor | None
    ) -> None:  # fmt: skip
        """The kernels read these tensors as they lie in memory: nothing that does not fit may reach them."""
        op = "pixelcnn_generate"
        check_tensor(op, "uniforms", uniforms)
        if uniforms.dim() != 4 or uniforms.shape[1] != self.colors or not uniforms.is_floating_point():
            came = f"{tuple(uniforms.shape)} {uniforms.dtype}"
            raise ValueError(f"{op}: uniforms must be (B, {self.colors}, H, W) floating point, got {came}")
        if (given is None) != (known is None):
            raise ValueError(f"{op}: given and known belong together, got one of the two")
        for name, tensor, dtype in (("given", given, torch.int64), ("known", known, torch.bool)):
            if tensor is not None and (tensor.shape != uniforms.shape or tensor.dtype != dtype):
                came = f"{tuple(tensor.shape)} {tensor.dtype}"
                raise ValueError(f"{op}: {name} must be {tuple(uniforms.shape)} {dtype}, got {came}")
        if given is not None and known is not None:
            check_classes(op, "given", given[known], self.distribution.levels)
        batch, channels = len(uniforms), self.program.context_channels
        wanted = (channels, *uniforms.shape[2:])
        if (context is None) != (channels == 0):
            raise ValueError(f"{op}: context must be there where the program has context channels ({channels})")
        if context is not None and (tuple(context.shape[1:]) != wanted or len(context) not in (1, batch)):
            raise ValueError(f"{op}: context must be ({batch} or 1, *{wanted}), got {tuple(context.shape)}")
        for bias in self.program.biases:
            if bias.dim() == 2 and len(bias) != batch:
                raise ValueError(f"{op}: the program's biases are for {len(bias)} images, uniforms for {batch}")


def _check_finite(tensors: list[Tensor]) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise ValueError("pixelcnn_generate: the model's weights must be finite, one holds NaN or infinity")


class _Reference:
    """The program in plain PyTorch, one instruction after another."""

    def __init__(
        self, program: PixelProgram, matrices: list[Tensor], table: Tensor, draw: Callable[[Tensor, Tensor], Tensor],
        context: Tensor | None, values: Tensor, kept: Tensor | None,
    ) -> None:  # fmt: skip
        self.program, self.matrices, self.table, self.draw = program, matrices, table, draw
        self.values, self.kept = values, kept
        batch, _, height, self.width = values.shape
        # rows and columns of zeros for what windows reach beyond the image
        self.planes = [
            table.new_zeros(batch, p.rows - 1 + height, p.left + self.width + p.right, p.channels)
            for p in program.planes
        ]
        self.caches = [
            tuple(table.new_zeros(batch, height * self.width, n) for n in (c.keys, c.values)) for c in program.caches
        ]
        if context is not None:
            p = program.planes[program.context]
            image = self.planes[program.context][:, p.rows - 1 :, p.left : p.left + self.width]
            image.copy_(context.permute(0, 2, 3, 1))

    def row(self, y: int, uniforms: Tensor, given: Tensor | None, known: Tensor | None) -> None:
        every = slice(0, self.width)
        for i in self.program.instructions:
            if i.phase == "row":
                self._at(i.dst, y, every).copy_(self._result(i, y, every))
        for x in reversed(range(self.width if y else 0)):
            for i in self.program.instructions:
                if i.phase == "back":
                    self._at(i.dst, y, slice(x, x + 1)).copy_(self._result(i, y, slice(x, x + 1)))
        for x in range(self.width):
            for i in self.program.instructions:
                if i.phase != "pixel":
                    continue
                here = slice(x, x + 1)
                if i.kind == "remember":
                    for cache, plane in zip(self.caches[i.extra], (i.src, i.other), strict=True):
                        cache[:, y * self.width + x] = self._at(plane, y, here)[:, 0]
                elif i.kind == "sample":
                    out = self._at(i.src, y, here)[:, 0]  # (B, outputs)
                    if not bool(torch.isfinite(out).all()):
                        raise ValueError(f"pixelcnn_generate: the network's outputs are not finite {TOO_LARGE}")
                    value = self.draw(out, uniforms[:, i.extra, y, x])
                    if known is not None and given is not None:
                        value = torch.where(known[:, i.extra, y, x], given[:, i.extra, y, x], value)
                    self.values[:, i.extra, y, x] = value
                    if self.kept is not None:
                        self.kept[:, i.extra, y, x] = out
                    size = self.table.shape[1]
                    self._at(i.dst, y, here)[:, 0, i.extra * size : (i.extra + 1) * size] = self.table[value]
                else:
                    self._at(i.dst, y, here).copy_(self._result(i, y, here))

    def _at(self, plane: int, y: int, columns: slice) -> Tensor:
        """(B, columns, channels), a view."""
        p = self.program.planes[plane]
        return self.planes[plane][:, p.rows - 1 + y, p.left + columns.start : p.left + columns.stop]

    def _result(self, i: Instruction, y: int, columns: slice) -> Tensor:
        x = self._at(i.src, y, columns)
        if i.kind == "conv":
            windows = [
                self._at(i.src, y + i.dy, slice(columns.start + dx, columns.stop + dx))
                for dx in range(i.dx, i.dx + i.extra)
            ]
            result = F.linear(torch.cat(windows, 2), self.matrices[i.matrix].flatten(1))
            if i.bias >= 0:
                bias = self.program.biases[i.bias]
                result = result + (bias[:, None] if bias.dim() == 2 else bias)
            return result if i.other < 0 else result + self._at(i.other, y, columns)
        if i.kind in ("gate", "glu"):
            first, second = x.chunk(2, 2)
            return (torch.tanh(first) if i.kind == "gate" else first) * torch.sigmoid(second)
        if i.kind == "add":
            return x + self._at(i.other, y, columns)
        if i.kind == "attention":
            heads, pixels = self.program.caches[i.extra].heads, y * self.width + columns.start + i.dx
            # the first is of zeros, where a pixel does not attend to itself
            key, value = (F.pad(c[:, :pixels], (0, 0, 1 - i.dx, 0)) for c in self.caches[i.extra])
            query, key, value = (c.unflatten(2, (heads, -1)).transpose(1, 2) for c in (x, key, value))
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        if i.kind == "norm":
            scale, shift = self.program.biases[i.bias].chunk(2)
            return F.layer_norm(x, (i.extra,), scale, shift, NORM_EPS)
        if i.kind == "previous":
            if columns.start:
                return self._at(i.src, y, slice(columns.start - 1, columns.start))
            return self._at(i.src, y - 1, slice(self.width - 1, self.width))
        if i.kind == "lstm":
            o, f, j, g = x.chunk(4, 2)
            before = self._at(i.other, y + i.dy, slice(columns.start + i.dx, columns.stop + i.dx))
            c = torch.sigmoid(f) * before + torch.sigmoid(j) * torch.tanh(g)
            self._at(i.other, y, columns).copy_(c)
            return torch.sigmoid(o) * torch.tanh(c)
        return ACTIVATIONS[i.kind](x)
