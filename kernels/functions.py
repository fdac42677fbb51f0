"""Functions that Triton's language lacks, to float32's last bits, without calls that its interpreter cannot make."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p_unit(e):  # type: ignore[no-untyped-def]
    """log(1 + e) for e in [0, 1]: 2 artanh(e / (2 + e))."""
    u = e / (2 + e)
    w = u * u
    p = w * (1 / 15) + 1 / 13
    p = w * p + 1 / 11
    p = w * p + 1 / 9
    p = w * p + 1 / 7
    p = w * p + 1 / 5
    p = w * p + 1 / 3
    return 2 * (u + u * w * p)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    a = tl.abs(x)
    e = tl.exp(-2 * a)
    w = x * x
    p = w * (62 / 2835) - 17 / 315
    p = w * p + 2 / 15
    p = w * p - 1 / 3
    t = tl.where(a < 0.3, a + a * w * p, (1 - e) / (1 + e))  # 1 - e would lose the digits of small ones
    return tl.where(x < 0, -t, t)


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def tanh_bf16(x):  # type: ignore[no-untyped-def]
    """To eleven bits, by one instruction."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid_bf16(x):  # type: ignore[no-untyped-def]
    """To eleven bits."""
    return 0.5 * tanh_bf16(0.5 * x) + 0.5
