"""The recurrence of PixelRNN's LSTMs: along the rows of an image, all pixels of a row at once, or along its diagonals.

    row:       z(i, j) = gates(i, j) + sum over k of W_k h(i - 1, j + k - K // 2),         c before: c(i - 1, j)
    diagonal:  z(i, j) = gates(i, j) + W_0 h(i - 1, j) + W_1 h(i, j - 1),                  c before: c(i, j - 1)

    o, f, i, g = z in four parts,   c = sigmoid(f) c before + sigmoid(i) tanh(g),   h = sigmoid(o) tanh(c)

States outside the image are zero.

Source: van den Oord et al., "Pixel Recurrent Neural Networks" (2016).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.backend import has_triton_kernels, lib, resolve
from fastgen.checks import autocast, check, check_tensor, differentiates, first_order, quick_apply

CHANNELS = 16  # the kernel stores a multiple of


def image_lstm_reference(gates: Tensor, weight: Tensor, *, diagonal: bool = False) -> Tensor:
    """The specification, in plain PyTorch: any device and dtype, differentiable."""
    batch, channels, height, width = gates.shape
    if gates.numel() == 0:
        return gates.new_zeros(batch, channels // 4, height, width) + 0 * (gates.sum() + weight.sum())
    if not diagonal:
        h = c = gates.new_zeros(batch, channels // 4, width)
        rows = []
        for z in gates.unbind(2):
            h, c = _cell(z + F.conv1d(h, weight, padding=weight.shape[2] // 2), c, 1)
            rows.append(h)
        return torch.stack(rows, 2)
    columns = skewed(gates).permute(3, 0, 2, 1)  # (diagonals, B, H, 4 hidden)
    inside = skewed(gates.new_ones(1, 1, height, width)).permute(3, 0, 2, 1)
    h = c = gates.new_zeros(batch, height, channels // 4)
    both = torch.cat((weight[:, :, 1], weight[:, :, 0]), 1)
    done = []
    for z, image in zip(columns, inside, strict=True):
        above = F.pad(h[:, :-1], (0, 0, 1, 0))
        h, c = _cell(z + F.linear(torch.cat((h, above), 2), both), c, 2)
        h, c = h * image, c * image  # beside the image there is no state
        done.append(h)
    return unskewed(torch.stack(done, 3).transpose(1, 2), width)


def _cell(gates: Tensor, c: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The gates o, f, i, g side by side in `dim`, and the state before -> h, c."""
    o, f, i, g = gates.chunk(4, dim)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def skewed(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H, W + H - 1): row i moved i places to the right, zeros around."""
    batch, channels, height, width = x.shape
    flat = F.pad(x, (0, height)).flatten(2)[:, :, : height * (width + height - 1)]
    return flat.view(batch, channels, height, width + height - 1)


def unskewed(x: Tensor, width: int) -> Tensor:
    """What `skewed` was given: (B, C, H, W + H - 1) -> (B, C, H, W)."""
    batch, channels, height, _ = x.shape
    flat = F.pad(x.flatten(2), (0, height))
    return flat.view(batch, channels, height, width + height)[..., :width]


def kept_values(weight: Tensor, height: int, width: int, diagonal: bool) -> int:
    """How many numbers the backward needs of an image: four gates, h and c, with margins."""
    margin = 1 if diagonal else weight.shape[2] // 2
    places = (height + 1) * (width + 2 * margin) + 2 * margin
    return places * 6 * (-(-weight.shape[1] // CHANNELS) * CHANNELS)


lib.define("image_lstm(Tensor gates, Tensor weight, bool diagonal, bool keep) -> (Tensor, Tensor)")
lib.define("image_lstm_backward(Tensor grad, Tensor weight, Tensor kept, bool diagonal) -> (Tensor, Tensor)")


@torch.library.register_fake("fastgen::image_lstm", lib=lib)
def _(gates: Tensor, weight: Tensor, diagonal: bool, keep: bool) -> tuple[Tensor, Tensor]:
    batch, _, height, width = gates.shape
    values = kept_values(weight, height, width, diagonal)
    kind = torch.promote_types(gates.dtype, torch.float32)
    return gates.new_empty(batch, weight.shape[1], height, width), gates.new_empty(batch, values * keep, dtype=kind)


@torch.library.register_fake("fastgen::image_lstm_backward", lib=lib)
def _(grad: Tensor, weight: Tensor, kept: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    batch, _, height, width = grad.shape
    return grad.new_empty(batch, weight.shape[0], height, width), weight.new_empty(weight.shape)


has_triton_kernels("image_lstm", "image_lstm_backward")


@quick_apply
class _ImageLstm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gates: Tensor, weight: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
        return torch.ops.fastgen.image_lstm(gates, weight, diagonal, True)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, weight, ctx.diagonal = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # what is kept has none, as large as itself
        ctx.save_for_backward(weight, output[1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None
        weight, kept = ctx.saved_tensors
        return *torch.ops.fastgen.image_lstm_backward(grad.contiguous(), weight, kept, ctx.diagonal), None


def image_lstm(gates: Tensor, weight: Tensor, *, diagonal: bool = False, backend: str | None = None) -> Tensor:
    """An LSTM over the pixels of an image, whose gates are known but for what the states before add.

    Parameters
    ----------
    gates
        (B, 4 H, height, width) float32, bfloat16 or float64: the gates o, f, i and g of H states each; any strides.
    weight
        (4 H, H, K), same dtype: of the states of the row above, K odd; with `diagonal` (4 H, H, 2), of the pixel above
        and of the one to the left.
    diagonal
        Along the diagonals from the upper left, in place of down the rows.
    backend
        See `fastgen.backend`.

    Returns
    -------
    h (B, H, height, width), dtype of gates. Sums and states are float32 (float64 for float64) in the kernel.

    Raises
    ------
    TypeError, ValueError
        Shapes, dtypes or devices that do not fit: the message names the argument, what was expected and what came.
    BackendError
        An explicit backend that cannot run here.
    """
    op = "image_lstm"
    check_tensor(op, "gates", gates, "(B, 4 H, height, width)")
    gates, weight = autocast(op, gates, weight)  # type: ignore[assignment]
    check(op, "gates", gates, gates, (None, None, None, None))
    hidden = gates.shape[1] // 4
    if gates.shape[1] % 4 or hidden < 1:
        raise ValueError(f"{op}: gates must have 4 H channels, H at least 1, got {gates.shape[1]}")
    if not isinstance(diagonal, bool):
        raise TypeError(f"{op}: diagonal must be True or False, got {diagonal!r}")
    check(op, "weight", weight, gates, (4 * hidden, hidden, 2 if diagonal else None), of="gates")
    if not diagonal and weight.shape[2] % 2 == 0:
        raise ValueError(f"{op}: weight must have an odd number of taps, got {weight.shape[2]}")
    if resolve(op, backend, gates.device, gates.dtype) == "reference" or gates.numel() == 0:
        return image_lstm_reference(gates, weight, diagonal=diagonal)
    args = gates.contiguous(), weight.contiguous()
    if differentiates(*args):
        return _ImageLstm.apply(*args, diagonal)[0]  # type: ignore[no-any-return,no-untyped-call]
    return torch.ops.fastgen.image_lstm(*args, diagonal, False)[0]  # type: ignore[no-any-return]
