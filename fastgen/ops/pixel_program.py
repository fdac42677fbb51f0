"""A masked network over pixels as a program that draws an image pixel by pixel.

A plane holds a vector of channels for each pixel. Planes of the row phase are complete for a whole row before its first
pixel is drawn: they were made from what lies above. Planes of the pixel phase grow from left to right. A masked
convolution over a pixel-phase plane falls into two parts: the taps above, which run once for the row as one large
product, and those of the pixel's own row, which run for each pixel. Every multiply-add of the network is done once for
each pixel; nothing is computed again, but for wrong guesses where the CPU computes several pixels at once.

Recurrent layers have states, planes that are read before they are written: a pixel reads them at the row above or at a
pixel beside it. The back phase, between the other two, goes through the pixels of a row from right to left, for an LSTM
that reads the row above, which is known, from its end. It begins with the second row.

    p = PixelProgram(features=1)
    v = p.conv(p.input, weight, bias, mask="vertical")        # row phase
    h = p.conv(p.input, weight_h, bias_h, mask="A")           # pixel phase
    z = p.gate(p.conv(h, weight_2, bias_2, mask="B", add=p.conv(v, link, halves=2), halves=2))
    p.sample(p.conv(z, head, head_bias), color=0)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops.masked_conv2d import MASKS, weight_mask

KINDS = (
    "conv", "gate", "glu", "relu", "elu", "add", "attention", "remember", "sample", "gelu", "norm", "previous", "lstm",
)  # fmt: skip
BLOCK = 16  # channels are padded to whole blocks
AHEAD = 8  # pixels of an image that the CPU computes at once, at most (kAhead in csrc/cpu/pixel_guesses.h)
NORM_EPS = 1e-5  # of layer norms
Phase = Literal["row", "back", "pixel"]
PHASES: tuple[Phase, ...] = ("row", "back", "pixel")  # in the order in which they run


@dataclass
class Plane:
    """channels: with both halves of a gate where halves is 2, all gates of an LSTM where it is 4; rows: kept, the
    current one included; left, right: columns of zeros; apart: used at other pixels than the current one."""

    channels: int
    phase: Phase
    halves: int = 1
    rows: int = 1
    left: int = 0
    right: int = 0
    apart: bool = False

    @property
    def padded(self) -> int:
        return self.halves * (-(-(self.channels // self.halves) // BLOCK) * BLOCK)


class Instruction(NamedTuple):
    """dst, src, other: planes, -1 for none.

    conv: dst = bias + other + matrix * (src at row dy, `extra` columns from dx on); gate, glu, relu, elu, gelu: of src;
    add: src + other; attention: of the queries src to what the cache `extra` holds, dx: 1 where a pixel attends to
    itself, 0 where to zeros in its place; remember: the key src and the value other, into the cache `extra`; sample:
    color `extra` from the parameters src, its features into dst; norm: of the `extra` channels of src, times the first
    half of bias, plus the second; previous: src at the pixel before in raster order; lstm: h into dst, of the gates src
    and the state c in the plane other, as it was (dy, dx) away and will be here.
    """

    kind: str
    phase: Phase
    dst: int
    src: int
    other: int = -1
    matrix: int = -1
    bias: int = -1
    dy: int = 0
    dx: int = 0
    extra: int = 0


class Cache(NamedTuple):
    """Of an attention's keys and values; channels of all heads."""

    keys: int
    values: int
    heads: int


@dataclass
class PixelProgram:
    """`features` channels of input for each pixel; `context_channels` of what is known of every pixel beforehand.

    Methods return the index of the plane that they make. biases: (O,), or (B, O) where they differ between images;
    shapes: rows, halves, taps and channels of each matrix.
    """

    features: int
    context_channels: int = 0
    planes: list[Plane] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    shapes: list[tuple[int, int, int, int]] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    caches: list[Cache] = field(default_factory=list)
    later: list[Callable[[], object]] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # that matrices are made of
    masks: list[tuple[object, ...]] = field(default_factory=list)
    unmade: set[int] = field(default_factory=set)  # states that no instruction has filled yet
    _matrices: list[Callable[[], Tensor]] = field(default_factory=list)

    @property
    def matrices(self) -> list[Tensor]:
        """(O, taps, C) float32, made of the weights as they are now."""
        return [make().contiguous() for make in self._matrices]

    @property
    def structure(self) -> tuple[object, ...]:
        """All but weights and biases."""
        sizes = [tuple(weight.shape) for weight in self.weights]
        return self.planes, self.instructions, self.shapes, self.caches, self.masks, sizes

    def __post_init__(self) -> None:
        self.input = self._plane(self.features, "pixel")
        self.context = self._plane(self.context_channels, "row") if self.context_channels else -1

    def conv(
        self, x: int, weight: Tensor, bias: Tensor | None = None, *, mask: str = "B", colors: int = 1, add: int = -1,
        halves: int = 1, offset: int = 0,
    ) -> int:  # fmt: skip
        """masked_conv2d of plane x, of its channels from `offset` on, plus plane `add`. weight (O, C, KH, KW).

        halves: 2 where a gate comes next, 4 where an LSTM does.

        Raises
        ------
        ValueError
            For a plane, weight, mask or sum that does not fit; the message says what came.
        """
        self._check_whole("conv", x)
        after = self.planes[x].channels - offset - weight.shape[1]
        if offset < 0 or after < 0:
            raise ValueError(
                f"PixelProgram: weight must have at most the plane's {self.planes[x].channels} channels, got "
                f"{weight.shape[1]} from channel {offset} on"
            )
        if mask not in MASKS:
            raise ValueError(f"PixelProgram: mask must be one of {MASKS}, got {mask!r}")
        if halves not in (1, 2, 4) or weight.shape[0] % halves:
            raise ValueError(
                f"PixelProgram: halves must be 1, 2 or 4 and divide {weight.shape[0]} outputs, got {halves}"
            )
        if add >= 0:
            self._check_alike(weight.shape[0], halves, add)
        outs, _, height, width = weight.shape
        self.weights.append(weight)
        self.masks.append((mask, colors, offset))
        above, left = height // 2, width // 2
        runs = [(dy, -left, width) for dy in range(-above, 0)]
        # live taps of the pixel's own row, from the left
        here = {"A": left + (colors > 1), "B": left + 1, "vertical": 0, "vertical_B": width}[mask]
        if here > left + 1 and self.planes[x].phase == "pixel":
            raise ValueError(f"PixelProgram: mask {mask!r} sees pixels to the right, which plane {x} has not yet")
        if here and left and self.planes[x].phase == "back":
            raise ValueError(f"PixelProgram: mask {mask!r} sees pixels to the left, which plane {x} has not yet")
        phases: list[tuple[Phase, list[tuple[int, int, int]]]] = [("row", runs)]
        if here:
            phases.append((self.planes[x].phase, [(0, -left, here)]))
        result = -1
        for phase, taps in phases:
            for dy, dx, count in taps:
                init, new = result, result < 0 or self.planes[result].phase != phase
                if new:
                    if result < 0 and add >= 0 and phase == self._later(phase, add):
                        init, add = add, -1
                    if bias is None and init < 0:
                        bias = weight.new_zeros(outs)  # something to begin the sums with
                    number = -1 if bias is None or result >= 0 else self._bias(bias)
                    result = self._plane(outs, phase, halves)
                else:
                    number = -1
                self._window(x, dy, dx, count)
                part = (..., above + dy, slice(left + dx, left + dx + count))

                def matrix(part: tuple[Any, ...] = part) -> Tensor:
                    live = weight_mask(weight, mask, colors, halves)[part]
                    masked = torch.where(live, weight[part].detach().float(), 0)
                    return F.pad(masked.permute(0, 2, 1), (offset, after))

                index = self._matrix(matrix, (outs, halves, count, self.planes[x].channels))
                self._emit("conv", phase, result, x, init, index, number, dy, dx, count)
        if result < 0:
            raise ValueError(f"PixelProgram: no live tap in a kernel of {height} x {width} with mask {mask}")
        return result if add < 0 else self.add(result, add)

    def linear(
        self, x: int, weight: Tensor, bias: Tensor | None = None, *, add: int = -1, halves: int = 1,
        row_above: bool = False,
    ) -> int:  # fmt: skip
        """A 1x1 convolution, weight (O, C), of x at the pixel, or at the one above; arguments as those of `conv`."""
        kernel = F.pad(weight[:, :, None, None], (0, 0, 0, 2 * row_above))
        return self.conv(x, kernel, bias, mask="vertical" if row_above else "B", add=add, halves=halves)

    def gate(self, x: int) -> int:
        """tanh of the first half times the sigmoid of the second; x was made with halves=2."""
        return self._gated("gate", x)

    def glu(self, x: int) -> int:
        """The first half times the sigmoid of the second; x was made with halves=2."""
        return self._gated("glu", x)

    def relu(self, x: int) -> int:
        return self._unary("relu", x, self.planes[x].channels)

    def elu(self, x: int) -> int:
        return self._unary("elu", x, self.planes[x].channels)

    def gelu(self, x: int) -> int:
        return self._unary("gelu", x, self.planes[x].channels)

    def norm(self, x: int, scale: Tensor, shift: Tensor) -> int:
        """Layer norm over the channels of x, with an epsilon of NORM_EPS; scale, shift (channels,)."""
        for name, tensor in (("scale", scale), ("shift", shift)):
            if tuple(tensor.shape) != (self.planes[x].channels,):
                raise ValueError(
                    f"PixelProgram: {name} must be ({self.planes[x].channels},), as the plane's channels, got "
                    f"{tuple(tensor.shape)}"
                )
        result = self._unary("norm", x, self.planes[x].channels)
        self.instructions[-1] = self.instructions[-1]._replace(
            bias=self._bias(torch.cat((scale, shift))), extra=self.planes[x].channels
        )
        return result

    def previous(self, x: int) -> int:
        """x at the pixel before in raster order; zeros at the first."""
        if self.planes[x].phase != "pixel":
            raise ValueError(f"PixelProgram: previous needs a plane of the pixel phase, plane {x} is complete by rows")
        self._window(x, -1, 0, 1)
        return self._unary("previous", x, self.planes[x].channels)

    def state(self, channels: int, phase: Phase = "pixel") -> int:
        """A plane that `lstm` will fill, zeros before the first pixel."""
        plane = self._plane(channels, phase)
        self.planes[plane].apart = True
        self.unmade.add(plane)
        return plane

    def right(self, x: int, matrix: Tensor, add: int) -> int:
        """Plane `add` plus matrix (O, C) times x at the pixel to the right, in the back phase."""
        self._check_alike(len(matrix), self.planes[add].halves, add)
        if matrix.shape[1] != self.planes[x].channels:
            raise ValueError(
                f"PixelProgram: matrix must have the plane's {self.planes[x].channels} channels, got {matrix.shape[1]}"
            )
        if "pixel" in (self.planes[x].phase, self.planes[add].phase):
            raise ValueError(
                "PixelProgram: right runs before the pixels of a row are drawn; x and add must be known then"
            )
        result = self._plane(len(matrix), "back", self.planes[add].halves)
        self._window(x, 0, 1, 1)
        self.weights.append(matrix)
        shape = (len(matrix), self.planes[add].halves, 1, matrix.shape[1])
        number = self._matrix(lambda: matrix.detach().float()[:, None], shape)
        return self._emit("conv", "back", result, x, add, number, dx=1, extra=1)

    def lstm(self, gates: int, h: int, c: int, *, dy: int = 0, dx: int = 0) -> int:
        """The states h and c at a pixel, from the gates o, f, i and g (made with halves=4) and from c at the row dy and
        the column dx beside it."""
        if self.planes[gates].halves != 4:
            raise ValueError(f"PixelProgram: lstm needs a plane of four gates; make plane {gates} with halves=4")
        for state in (h, c):
            if self.planes[state].channels * 4 != self.planes[gates].channels:
                raise ValueError(
                    f"PixelProgram: h and c must have a quarter of the gates' {self.planes[gates].channels} channels, "
                    f"got {self.planes[state].channels}"
                )
        beside = {"pixel": -1, "back": 1}
        if (dy, dx) != (-1, 0) and (dy, dx) != (0, beside.get(self.planes[h].phase)):
            raise ValueError(
                f"PixelProgram: c must come from the row above (dy=-1), or from the pixel before (dx=-1, in the back "
                f"phase 1), got dy={dy}, dx={dx}"
            )
        phases = [self.planes[plane].phase for plane in (h, c, gates)]
        if phases[0] != phases[1] or phases[0] != self._later(phases[0], gates):
            raise ValueError(
                "PixelProgram: h and c must be states of one phase, not before the gates', got {}, {} and {}".format(
                    *phases
                )
            )
        self._window(c, dy, dx, 1)
        return self._emit("lstm", self.planes[h].phase, h, gates, c, dy=dy, dx=dx)

    def add(self, x: int, y: int) -> int:
        self._check_alike(self.planes[x].channels, self.planes[x].halves, y)
        phase = self._later(self.planes[x].phase, y)
        result = self._plane(self.planes[x].channels, phase, self.planes[x].halves)
        return self._emit("add", phase, result, x, y)

    def attention(
        self, query: int, values: int, heads: int, remember: Callable[[], tuple[int, int]], *, own: bool = False
    ) -> int:
        """Of each pixel to all pixels before it, and to a key and a value of zeros; `values` channels.

        remember() appends what makes the key and the value of a pixel, when its own values are drawn. With `own` at
        once: a pixel attends to itself in place of the zeros.
        """
        keys = self.planes[query].channels
        if keys % heads or values % heads:
            raise ValueError(f"PixelProgram: heads must divide {keys} and {values} channels, got {heads}")
        self._check_whole("attention", query)
        self.caches.append(Cache(keys, values, heads))
        cache = len(self.caches) - 1

        def append() -> int:
            key, value = remember()
            for plane, channels in ((key, keys), (value, values)):
                self._check_whole("attention", plane)
                if self.planes[plane].channels != channels:
                    raise ValueError(
                        f"PixelProgram: keys and values must have {keys} and {values} channels, got "
                        f"{self.planes[plane].channels} for {channels}"
                    )
            return self._emit("remember", "pixel", -1, key, value, extra=cache)

        if own:
            append()
        else:
            self.later.append(append)
        return self._emit("attention", "pixel", self._plane(values, "pixel"), query, dx=int(own), extra=cache)

    def sample(self, parameters: int, color: int) -> None:
        self._check_whole("sample", parameters)
        self._emit("sample", "pixel", self.input, parameters, extra=color)

    def finish(self) -> None:
        """Append what runs when a pixel's values are drawn."""
        drawn = len(self.instructions)
        for append in self.later:
            append()
        self.later.clear()
        made = {i.dst for i in self.instructions[drawn:]}
        for i in self.instructions[drawn:]:  # the next pixel may run them, with its own
            for plane in {i.src, i.other} - made - {-1}:
                self._window(plane, 0, -1, 1)

    def _plane(self, channels: int, phase: Phase, halves: int = 1) -> int:
        self.planes.append(Plane(channels, phase, halves))
        return len(self.planes) - 1

    def _emit(
        self, kind: str, phase: Phase, dst: int, src: int, other: int = -1, matrix: int = -1, bias: int = -1,
        dy: int = 0, dx: int = 0, extra: int = 0,
    ) -> int:  # fmt: skip
        beside = kind == "previous" or (kind == "conv" and (dy < 0 or not dx <= 0 < dx + extra))
        for plane in {src, other} & self.unmade:
            if not (plane == src and beside) and not (plane == other and kind == "lstm"):
                raise ValueError(
                    f"PixelProgram: {kind} reads state {plane} at its own pixel, where no lstm has made it yet"
                )
        self.unmade -= {dst, other} if kind == "lstm" else {dst}
        self.instructions.append(Instruction(kind, phase, dst, src, other, matrix, bias, dy, dx, extra))
        return dst

    def _later(self, phase: Phase, plane: int) -> Phase:
        """The later one of a phase and a plane's."""
        return max(phase, self.planes[plane].phase, key=PHASES.index)

    def _check_alike(self, channels: int, halves: int, plane: int) -> None:
        other = self.planes[plane]
        if (other.channels, other.halves) != (channels, halves):
            raise ValueError(
                f"PixelProgram: planes that are added must have the same channels and halves, got {channels} and "
                f"{halves}, {other.channels} and {other.halves}"
            )

    def _gated(self, kind: str, x: int) -> int:
        if self.planes[x].halves != 2:
            raise ValueError(f"PixelProgram: {kind} needs a plane of two halves; make plane {x} with halves=2")
        return self._unary(kind, x, self.planes[x].channels // 2)

    def _check_whole(self, kind: str, x: int) -> None:
        if self.planes[x].halves != 1:
            raise ValueError(f"PixelProgram: {kind} needs a plane that is not of halves; make plane {x} without halves")

    def _unary(self, kind: str, x: int, channels: int) -> int:
        if kind not in ("gate", "glu"):
            self._check_whole(kind, x)
        phase = self.planes[x].phase
        return self._emit(kind, phase, self._plane(channels, phase), x)

    def _matrix(self, make: Callable[[], Tensor], shape: tuple[int, int, int, int]) -> int:
        self._matrices.append(make)
        self.shapes.append(shape)
        return len(self.shapes) - 1

    def _bias(self, bias: Tensor) -> int:
        self.biases.append(bias.detach().float())
        return len(self.biases) - 1

    def _window(self, plane: int, dy: int, dx: int, count: int) -> None:
        p = self.planes[plane]
        p.rows, p.left, p.right = max(p.rows, 1 - dy), max(p.left, -dx), max(p.right, dx + count - 1)
        p.apart |= (dy, dx, count) != (0, 0, 1)
