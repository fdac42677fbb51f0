"""torch.nn.Conv2d and Conv1d with the kernel of `fastgen.ops.conv2d`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.checks import stands_in
from fastgen.ops.conv2d import conv2d

# pixels of an image: up to there PyTorch's kernels are as fast or faster, by the size of the kernel
SMALL_PIXELS = {(1, 1): 16, (3, 3): 16}
SMALL_PIXELS_ELSE = 100


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d, and the ReLU behind it: parameters, their initialisation and state are torch.nn.Conv2d's.

    Where the size of the image stays (stride, dilation and groups 1, odd kernels, zeros for padding) it runs
    `fastgen.ops.conv2d` on a CPU in float32 and float64, save for small images; anything
    else, bfloat16, autocast and torch.jit.trace included, is PyTorch's.

    Parameters
    ----------
    relu
        Whether max(., 0) follows.

    The rest are those of torch.nn.Conv2d.
    """

    def __init__(self, *args: Any, relu: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        if self._keeps_size() and _suits(x, self.kernel_size):
            return conv2d(x, self.weight, self.bias, relu=self.relu)
        y = super().forward(x)
        return F.relu(y) if self.relu else y

    def _keeps_size(self) -> bool:
        odd = all(size % 2 for size in self.kernel_size)
        half = tuple(size // 2 for size in self.kernel_size)
        return (
            odd and self.padding in (half, "same") and self.padding_mode == "zeros" and self.groups == 1
            and self.stride == self.dilation == (1, 1)
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', relu=True' if self.relu else ''}"


class Conv1d(nn.Conv1d):
    """torch.nn.Conv1d, and the ReLU behind it: parameters, their initialisation and state are torch.nn.Conv1d's.

    Of kernels of 1 it runs `fastgen.ops.conv2d` where `Conv2d` would; anything else is PyTorch's.

    Parameters
    ----------
    relu
        Whether max(., 0) follows.

    The rest are those of torch.nn.Conv1d.
    """

    def __init__(self, *args: Any, relu: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        plain = self.kernel_size == self.stride == (1,) and self.padding in ((0,), "same", "valid")
        if plain and self.groups == 1 and _suits(x, (1, 1), 3):
            return conv2d(x.unsqueeze(2), self.weight.unsqueeze(2), self.bias, relu=self.relu).squeeze(2)
        y = super().forward(x)
        return F.relu(y) if self.relu else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', relu=True' if self.relu else ''}"


def _suits(x: Tensor, kernel_size: tuple[int, ...], dim: int = 4) -> bool:
    if not stands_in(x) or x.dim() != dim:
        return False
    # in compiled code the last test would compile anew where images cross the limit
    least = SMALL_PIXELS.get(kernel_size, SMALL_PIXELS_ELSE)
    return torch.compiler.is_compiling() or x.shape[2:].numel() > least
