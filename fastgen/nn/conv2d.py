"""torch.nn.Conv2d, ConvTranspose2d and Conv1d with the kernels of `fastgen.ops`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.backend import ON_X86, cpu_features, multiplies_pairs
from fastgen.checks import stands_in
from fastgen.ops.conv2d import conv2d
from fastgen.ops.resampling_conv2d import KERNEL, downsample_conv2d, upsample_conv2d

# pixels of an image: up to there PyTorch's kernels are as fast or faster, by the size of the kernel
SMALL_PIXELS: dict[tuple[int, ...], int] = {(1, 1): 16, (3, 3): 16}
SMALL_PIXELS_ELSE = 100
# where the processor multiplies tiles of bfloat16, PyTorch does so too
IN_BFLOAT16 = ON_X86 and multiplies_pairs and not cpu_features().get("amx_bf16", False)
# of 3x3 kernels in bfloat16: up to so many pixels, and above so many channels, PyTorch's are faster
SMALL_PIXELS_IN_BFLOAT16, MANY_CHANNELS_IN_BFLOAT16 = 36, 192


class Conv2d(nn.Conv2d):
    """torch.nn.Conv2d, and the ReLU behind it: parameters, their initialisation and state are torch.nn.Conv2d's.

    On x86, in float32 and float64, it runs `fastgen.ops.conv2d` where the size of the image stays (stride 1, odd
    kernels), save for small images, and `fastgen.ops.downsample_conv2d` where a kernel of 4x4 with stride 2 and padding
    1 halves even sides; all with dilation and groups 1 and zeros for padding. In bfloat16, by autocast or not, it does
    the same on processors without instructions for it; on those that multiply pairs of bfloat16, but no tiles, it runs
    `conv2d`, save for 3x3 kernels over small images or many channels. Anything else, torch.jit.trace and torch.vmap
    included, is PyTorch's. Gradients of the kernels are first-order.

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
        if _keeps_size(self) and _suits(x, self.kernel_size):
            return conv2d(x, self.weight, self.bias, relu=self.relu)
        if _resamples(self) and _has_planes(x) and not any(size % 2 for size in x.shape[2:]):
            return downsample_conv2d(x, self.weight, self.bias, relu=self.relu)
        y = super().forward(x)
        return F.relu(y) if self.relu else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', relu=True' if self.relu else ''}"


class ConvTranspose2d(nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d, and the ReLU behind it: parameters, initialisation and state are those of PyTorch's.

    With a kernel of 4x4, stride 2 and padding 1, which doubles an image's sides, it runs `fastgen.ops.upsample_conv2d`
    where `Conv2d` would `conv2d`; anything else is PyTorch's.

    Parameters
    ----------
    relu
        Whether max(., 0) follows.

    The rest are those of torch.nn.ConvTranspose2d.
    """

    def __init__(self, *args: Any, relu: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.relu = relu

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        doubles = output_size is None and self.output_padding == (0, 0) and _resamples(self)
        if doubles and _has_planes(x, bfloat16=IN_BFLOAT16):
            return upsample_conv2d(x, self.weight, self.bias, relu=self.relu)
        y = super().forward(x, output_size)
        return F.relu(y) if self.relu else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', relu=True' if self.relu else ''}"


class Conv1d(nn.Conv1d):
    """torch.nn.Conv1d, and the ReLU behind it: parameters, their initialisation and state are torch.nn.Conv1d's.

    Where the length stays it runs `fastgen.ops.conv2d`, of an image of one row, where `Conv2d` would; anything else is
    PyTorch's.

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
        if _keeps_size(self) and _suits(x, (1, *self.kernel_size), 3):
            return conv2d(x.unsqueeze(2), self.weight.unsqueeze(2), self.bias, relu=self.relu).squeeze(2)
        y = super().forward(x)
        return F.relu(y) if self.relu else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', relu=True' if self.relu else ''}"


def _plain(layer: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d) -> bool:
    return layer.padding_mode == "zeros" and layer.groups == 1 and set(layer.dilation) == {1}


def _keeps_size(layer: nn.Conv1d | nn.Conv2d) -> bool:
    odd = all(size % 2 for size in layer.kernel_size)
    half = tuple(size // 2 for size in layer.kernel_size)
    return odd and layer.padding in (half, "same") and set(layer.stride) == {1} and _plain(layer)


def _resamples(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    sizes = layer.kernel_size == (KERNEL, KERNEL) and layer.stride == (2, 2) and layer.padding == (1, 1)
    return sizes and _plain(layer)


def _has_planes(x: Tensor, *, bfloat16: bool = False) -> bool:
    return stands_in(x, bfloat16=bfloat16) and x.dim() == 4


def _suits(x: Tensor, kernel_size: tuple[int, ...], dim: int = 4) -> bool:
    if not stands_in(x, bfloat16=IN_BFLOAT16) or x.dim() != dim:
        return False
    least = SMALL_PIXELS.get(kernel_size, SMALL_PIXELS_ELSE)
    if kernel_size == (3, 3) and not stands_in(x):
        if x.shape[1] > MANY_CHANNELS_IN_BFLOAT16:
            return False
        least = SMALL_PIXELS_IN_BFLOAT16
    # in compiled code the last test would compile anew where images cross the limit
    return torch.compiler.is_compiling() or x.shape[2:].numel() > least
