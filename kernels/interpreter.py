"""Triton's interpreter, told that tiles may begin anywhere: it wants multiples of 16 bytes, which no GPU asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import TensorDescHandle, TensorHandle


def _materialize_pointers(self: Any, offsets: list[Any]) -> tuple[Any, Any]:
    """Where the numbers of a tile lie, and which of them are within the tensor."""
    places = np.ix_(*(o.data.item() + np.arange(n) for o, n in zip(offsets, self.block_shape, strict=True)))
    of_type = self.base.dtype.element_ty
    size = of_type.primitive_bitwidth // 8
    pointers, inside = np.full(self.block_shape, self.base.data.item(), np.uint64), np.ones(self.block_shape, bool)
    for place, stride, length in zip(places, self.strides, self.shape, strict=True):
        pointers += (place * stride.data.item() * size).astype(np.uint64)
        inside &= (place >= 0) & (place < length.data.item())
    return TensorHandle(pointers, self.base.dtype.scalar), inside


def take_tiles_from_anywhere() -> None:
    TensorDescHandle.materialize_pointers = _materialize_pointers
