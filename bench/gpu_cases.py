"""The cases of bench/gpu.py: what is timed, what stands beside it, and the least that a GPU must do for it.

`listing` names them all and makes none. The least work is that of the plan that the kernels follow: every argument is
read once and every result written once; a gate's backward computes the gate again (gated_masked_conv2d keeps the sums
before it instead), and what happens between two passes stays on chip. bench/gpu_peers.py has the peers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from gpu_peers import DEVICE, Peer, coupling_peers, quantizer_peers
from torch import Tensor

from fastgen.backend import use_backend
from fastgen.nn import VectorQuantize
from fastgen.ops import (
    actnorm,
    affine_coupling,
    code_statistics,
    gated_causal_conv1d,
    gated_masked_conv2d,
    gaussian_rsample_kl,
    image_lstm,
    masked_conv2d,
    nade,
    nade_sample,
    nearest_code,
    vector_quantize,
    wavenet_layer,
)
from fastgen.ops.actnorm import actnorm_reference
from fastgen.ops.affine_coupling import affine_coupling_reference
from fastgen.ops.code_statistics import code_statistics_reference
from fastgen.ops.gated_causal_conv1d import gated_causal_conv1d_reference
from fastgen.ops.gated_masked_conv2d import gated_masked_conv2d_reference
from fastgen.ops.gaussian_rsample_kl import gaussian_rsample_kl_reference
from fastgen.ops.image_lstm import image_lstm_reference
from fastgen.ops.masked_conv2d import mask_2d, masked_conv2d_reference
from fastgen.ops.nade import nade_reference
from fastgen.ops.vector_quantize import quantize_given, quantize_reference
from fastgen.ops.wavenet_layer import wavenet_layer_reference

Op = Callable[..., object]
Work = tuple[float, float]  # bytes, operations


@dataclass
class Case:
    name: str
    ways: dict[str, Callable[[], object]]
    bytes: float = 0
    operations: float = 0
    chain: float = 0  # seconds of steps that must wait for each other
    shares: dict[str, float] = field(default_factory=dict)  # of the work, for ways that do not do all of it
    facts: dict[str, Any] = field(default_factory=dict)


def compiled(f: Op) -> Op:
    """For the shapes at hand: left to itself, torch.compile would make later cases' kernels for any shape."""
    torch._dynamo.reset()
    return torch.compile(f, dynamic=False, backend="inductor" if DEVICE == "cuda" else "aot_eager")


def flat(results: object) -> list[Tensor]:
    return list(results) if isinstance(results, tuple | list) else [results]  # type: ignore[list-item]


def with_gradients(call: Op, args: Sequence[Tensor | None], cotangents: list[Tensor]) -> Callable[[], list[Tensor]]:
    """The call and its backward -> gradients of the arguments that have any."""
    leaves = [t for t in args if t is not None and t.requires_grad]

    def both() -> list[Tensor]:
        results = [r for r in flat(call(*args)) if r.requires_grad]
        grads = [c.to(r.dtype) for c, r in zip(cotangents, results, strict=True)]
        return list(torch.autograd.grad(results, leaves, grads))

    return both


def wide(t: Tensor | None) -> Tensor | None:
    return t.detach().float() if t is not None and t.is_floating_point() else t


def leaf(t: Tensor | None) -> Tensor | None:
    return t.detach().requires_grad_() if t is not None and t.is_floating_point() else t


def off(got: Tensor, truth: Tensor) -> float:
    return float((got.detach().double() - truth.detach().double()).norm() / (truth.detach().double().norm() + 1e-30))


def verify(what: str, ours: object, own: object, exact: object) -> None:
    """Our error is at most a few times that of PyTorch's own arithmetic in the same dtype."""
    for i, (a, b, truth) in enumerate(zip(*map(flat, (ours, own, exact)), strict=True)):
        errors = off(a, truth), off(b, truth)
        if not errors[0] <= 3 * errors[1] + 1e-5:
            raise AssertionError(f"{what}: result {i} is off by {errors[0]:.1e}, PyTorch's own by {errors[1]:.1e}")


def verified(peer: Peer, truth: Tensor) -> Op:
    """Its call, which raises if the first result is another: then the peer alone is not measured."""
    unseen = [truth]

    def run(*args: Tensor | None) -> object:
        results = peer.call(*args)
        if unseen:
            if not (error := off(flat(results)[0], unseen[0])) <= peer.tolerance:
                raise AssertionError(f"{peer.name} computes something else, by {error:.1e}")
            unseen.clear()
        return results

    return run


def op_cases(
    name: str, op: Op, reference: Op, args: list[Tensor | None], options: dict[str, Any], forward: Work,
    both: Work | None = None, peers: Sequence[Peer] = (), compiles: bool = True,
) -> Iterator[Case]:  # fmt: skip
    """Forward, and with `both` forward and backward, verified; beside what torch.compile makes, unless that takes it
    minutes.
    """
    eager = partial(reference, **options)
    calls: dict[str, tuple[Op, list[Tensor | None]]] = {
        "fastgen": (partial(op, backend="triton", **options), args), "eager": (eager, args),
    }  # fmt: skip
    if compiles:
        calls["torch.compile"] = compiled(eager), args
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = flat(eager(*map(wide, args)))
    verify(name, calls["fastgen"][0](*args), eager(*args), exact)
    calls |= {peer.name: (verified(peer, exact[0]), peer.args) for peer in peers}
    yield Case(f"{name} forward", {way: partial(f, *a) for way, (f, a) in calls.items()}, *forward)
    if both is None:
        return
    given = {way: (f, [leaf(t) for t in a]) for way, (f, a) in calls.items()}
    cotangents = [torch.randn_like(r) for r in flat(eager(*given["eager"][1])) if r.requires_grad]
    compiled(eager)  # forgets what was compiled for the forward pass alone
    ways = {way: with_gradients(f, a, cotangents) for way, (f, a) in given.items()}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        exact = with_gradients(eager, [leaf(wide(t)) for t in args], cotangents)()
    verify(f"{name}, gradients", ways["fastgen"](), ways["eager"](), exact)
    yield Case(f"{name} forward and backward", dict(ways), *both)


def normal(*size: int, scale: float = 1.0, dtype: torch.dtype) -> Tensor:
    return (torch.randn(size, device=DEVICE) * scale).to(dtype)


def coupling_cases(name: str, size: tuple[int, ...], dtype: torch.dtype, scale: str, inverse: bool) -> Iterator[Case]:
    x, params = normal(*size, dtype=dtype), normal(*size, scale=0.3, dtype=dtype)
    params += 0.2  # no log-determinant near zero, of which every error would be a large part
    options = {"scale": scale, "inverse": inverse, "layout": "shift_scale" if scale == "sigmoid" else "scale_shift"}
    one = x.numel() * x.element_size()
    # x and params in, y out; backward: its gradient, half of x and the scales in, two gradients out
    both = None if inverse else (7.0 * one, 0.0)
    peers = [] if inverse else coupling_peers(scale, x, params)
    return op_cases(name, affine_coupling, affine_coupling_reference, [x, params], options, (3 * one, 0), both, peers)


def actnorm_cases(name: str, size: tuple[int, ...], dtype: torch.dtype, inverse: bool) -> Iterator[Case]:
    args: list[Tensor | None] = [normal(*size, dtype=dtype), *(normal(size[1], dtype=dtype) for _ in range(2))]
    one = math.prod(size) * dtype.itemsize
    both = None if inverse else (5.0 * one, 0.0)
    return op_cases(name, actnorm, actnorm_reference, args, {"inverse": inverse}, (2 * one, 0), both)


def gaussian_cases(name: str, dtype: torch.dtype, *size: int) -> Iterator[Case]:
    args: list[Tensor | None] = [normal(*size, scale=scale, dtype=dtype) for scale in (1.0, 0.5, 1.0)]
    one = math.prod(size) * dtype.itemsize
    # mean, deviation and noise in, z out; backward: those and a gradient in, two out
    works = (4.0 * one, 0.0), (10.0 * one, 0.0)
    return op_cases(name, gaussian_rsample_kl, gaussian_rsample_kl_reference, args, {}, *works)


def masked_cases(
    name: str, dtype: torch.dtype, batch: int, channels: int, side: int, kernel: int, gated: bool
) -> Iterator[Case]:
    taps, outs = int(mask_2d("B", (kernel, kernel)).sum()), channels * (1 + gated)
    args: list[Tensor | None] = [
        normal(batch, channels, side, side, dtype=dtype),
        normal(outs, channels, kernel, kernel, scale=(channels * taps) ** -0.5, dtype=dtype),
        normal(outs, dtype=dtype),
    ]  # fmt: skip
    if gated:
        args.append(normal(batch, outs, 1, 1, dtype=dtype))
    pixels = batch * side * side
    one, products = pixels * channels * dtype.itemsize, 2.0 * pixels * outs * channels * taps
    # x in, result out; backward: its gradient and x in, x's gradient out; of a gate the sums before it out and in
    both = (5 + 4 * gated) * one, 3 * products
    op, reference = (
        (gated_masked_conv2d, gated_masked_conv2d_reference) if gated else (masked_conv2d, masked_conv2d_reference)
    )
    return op_cases(name, op, reference, args, {"mask": "B"}, (2 * one, products), both)


def sequence_cases(
    name: str, dtype: torch.dtype, batch: int, steps: int, width: int, skips: int, kernel: int, dilation: int
) -> Iterator[Case]:
    """A WaveNet layer; without skips, its gated convolution alone."""
    args: list[Tensor | None] = [
        normal(batch, width, steps, dtype=dtype),
        normal(2 * width, width, kernel, scale=(width * kernel) ** -0.5, dtype=dtype), normal(2 * width, dtype=dtype),
    ]  # fmt: skip
    samples, options = batch * steps, {"dilation": dilation}
    one, gate = samples * dtype.itemsize, 2.0 * samples * 2 * width * width * kernel
    if not skips:
        works = (one * 2 * width, gate), (one * 5 * width, 4 * gate)
        return op_cases(name, gated_causal_conv1d, gated_causal_conv1d_reference, args, options, *works)
    args += [normal(width + skips, width, scale=width**-0.5, dtype=dtype), normal(width + skips, dtype=dtype)]
    outs = 2.0 * samples * (width + skips) * width
    works = (one * (2 * width + skips), gate + outs), (one * (5 * width + 2 * skips), 4 * gate + 3 * outs)
    return op_cases(name, wavenet_layer, wavenet_layer_reference, args, options, *works)


def lstm_cases(name: str, dtype: torch.dtype, batch: int, states: int, side: int, diagonal: bool) -> Iterator[Case]:
    taps = 2 if diagonal else 3
    args: list[Tensor | None] = [
        normal(batch, 4 * states, side, side, dtype=dtype),
        normal(4 * states, states, taps, scale=(states * taps) ** -0.5, dtype=dtype),
    ]
    pixels = batch * side * side
    one, products = pixels * states * dtype.itemsize, 8.0 * pixels * states * states * taps
    # gates in, h out; backward: its gradient in, those of the gates out, and six numbers of float32 out and in
    works = (5 * one, products), (10 * one + 48 * pixels * states, 3 * products)
    options = {"diagonal": diagonal}
    return op_cases(name, image_lstm, image_lstm_reference, args, options, *works, compiles=False)


def nade_cases(name: str, batch: int, inputs: int, hidden: int) -> Iterator[Case]:
    """Of binary vectors: training, and sampling beside the loop over inputs."""
    x, uniforms = torch.randint(2, (batch, inputs), device=DEVICE), torch.rand(batch, inputs, device=DEVICE)
    args: list[Tensor | None] = [
        normal(*size, scale=scale, dtype=torch.float32)
        for size, scale in (
            ((inputs, 1, hidden), 0.05),
            ((hidden,), 1.0),
            ((inputs, 1, hidden), 0.05),
            ((inputs, 1), 1.0),
        )
    ]
    weights, numbers, products = 8 * inputs * hidden, batch * inputs, 4.0 * batch * inputs * hidden
    works = (weights + 12 * numbers, products), (2 * weights + 24 * numbers, 4 * products)
    yield from op_cases(name, partial(nade, x), partial(nade_reference, x), args, {}, *works)
    ways = {
        way: partial(nade_sample, *args, uniforms, backend=backend)
        for way, backend in (("fastgen", "triton"), ("eager", "reference"))
    }
    if float((ways["fastgen"]() == ways["eager"]()).all(1).float().mean()) < 0.9:
        raise AssertionError(f"{name}: other samples than the loop's")
    yield Case(f"{name} sampling", dict(ways), weights + 20 * numbers, products, chain=inputs * 0.4e-6)


def expanded(x: Tensor, codebook: Tensor) -> Tensor:
    return (x.square().sum(1, keepdim=True) - 2 * x @ codebook.T + codebook.square().sum(1)).argmin(1)


def verify_search(name: str, x: Tensor, codebook: Tensor, index: Tensor) -> None:
    exact = torch.cdist(x[:256].double(), codebook.double()).square()
    if not bool((exact.gather(1, index[:256, None])[:, 0] <= exact.min(1).values * (1 + 1e-5)).all()):
        raise AssertionError(f"{name}: a code that is nearer was not found")


def search_cases(name: str, dtype: torch.dtype, rows: int, codes: int, dim: int) -> Iterator[Case]:
    x, codebook = normal(rows, dim, dtype=dtype), normal(codes, dim, dtype=dtype)
    search = partial(nearest_code, x, codebook, backend="triton", nonfinite="first")
    verify_search(name, x, codebook, search()[0])
    ways = {
        "fastgen": search, "eager": partial(expanded, x, codebook),
        "torch.compile": partial(compiled(expanded), x, codebook), "fastgen, bf16": partial(search, precision="bf16"),
    }  # fmt: skip
    moved = (rows + codes) * dim * dtype.itemsize + 12 * rows  # out: index and distance
    yield Case(name, ways, moved, 2.0 * rows * codes * dim)


def quantized(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = quantize_reference(x, codebook, None, metric="euclidean", estimator="straight_through")
    return out.quantized, out.indices, out.codebook_error + 0.25 * out.commitment


def quantize_cases(name: str, dtype: torch.dtype, rows: int, codes: int, dim: int) -> Iterator[Case]:
    given = leaf(normal(rows, dim, dtype=dtype)), leaf(normal(codes, dim, dtype=dtype))
    x, codebook = (t.detach() for t in given)
    ours = partial(vector_quantize, backend="triton", nonfinite="first")
    values, index, loss = ours(x, codebook)
    verify_search(name, x, codebook, index)
    truth = quantize_given(leaf(wide(x)), leaf(wide(codebook)), index, None, estimator="straight_through")
    exact = codebook[index], truth.codebook_error + 0.25 * truth.commitment
    verify(name, (values, loss), exact, exact)
    one, products = rows * dim * dtype.itemsize, 2.0 * rows * codes * dim
    forward = 2 * one + codes * dim * dtype.itemsize + 8 * rows
    ways = {"fastgen": ours, "eager": quantized, "torch.compile": compiled(quantized)}
    yield Case(f"{name} forward", {way: partial(f, x, codebook) for way, f in ways.items()}, forward, products)
    compiled(quantized)
    cotangents = [normal(rows, dim, dtype=dtype), torch.ones((), device=DEVICE)]
    both = {way: with_gradients(f, given, cotangents) for way, f in ways.items()}

    def given_codes(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        out = quantize_given(x, codebook, index, None, estimator="straight_through")
        return out.quantized, out.codebook_error + 0.25 * out.commitment

    truths = with_gradients(given_codes, [leaf(wide(t)) for t in given], cotangents)()
    verify(f"{name}, gradients", both["fastgen"](), [t.to(dtype) for t in truths], truths)
    # backward: its gradient, x and the result in, gradients of x and of the codebook out
    moved = forward + 4 * one + codes * dim * dtype.itemsize
    yield Case(f"{name} forward and backward", dict(both), moved, products)


def statistics_cases(name: str, dtype: torch.dtype, rows: int, codes: int, dim: int) -> Iterator[Case]:
    args = [normal(rows, dim, dtype=dtype), torch.randint(codes, (rows,), device=DEVICE)]
    moved = rows * (dim * dtype.itemsize + 8) + 4 * codes * (dim + 1)
    return op_cases(name, code_statistics, code_statistics_reference, args, {"num_codes": codes}, (moved, 0))


def quantizer_cases(name: str, rows: int, codes: int, dim: int) -> Iterator[Case]:
    """A step of training of a whole layer, whose codebook follows the data; nothing is compiled."""
    x = torch.randn(1, rows, dim, device=DEVICE, requires_grad=True)
    grad, one = torch.randn_like(x), torch.ones((), device=DEVICE)
    ours = VectorQuantize(dim, codes, decay=0.99).to(DEVICE)
    layers = {"fastgen": ours} | quantizer_peers(ours)

    def train(layer: torch.nn.Module) -> Tensor:
        with use_backend("auto"):
            result, _, loss = layer(x)
            return torch.autograd.grad([result, loss.sum()], x, [grad, one])[0]

    with torch.no_grad(), use_backend("auto"):
        chosen = [layer.eval()(x)[1] for layer in layers.values()]
    if not all(float((chosen[0] != other).float().mean()) < 0.01 for other in chosen):  # theirs may err at near-ties
        raise AssertionError(f"{name}: {list(layers)} choose other codes")
    ways = {way: partial(train, layer.train()) for way, layer in layers.items()}
    # x in, result out, and backward their gradients, x and the result; codebook, averages and counts in and out
    moved = 4 * (6 * rows * dim + 5 * codes * dim)
    yield Case(f"{name} training", ways, moved, 2.0 * rows * codes * dim)


Entry = tuple[str, Callable[[], Iterator[Case]]]


def listing(tiny: bool) -> list[Entry]:
    """Names, and what makes the cases of each."""
    dtype = torch.float32 if tiny else torch.bfloat16
    searches = [(20, 30, 16)] if tiny else [(65536, 8192, 256), (65536, 1024, 64), (8192, 1024, 128)]
    images = (1, 4, 5, 3) if tiny else (64, 128, 32, 5)
    layers = [(1, 40, 4, 3, 2, 16)] if tiny else [(16, 16384, 128, 256, 2, 16), (16, 16384, 128, 256, 2, 1)]
    size = (2, 4, 8, 8) if tiny else (64, 128, 128, 128)  # 256 MiB in bfloat16
    makers: list[tuple[str, Callable[..., Iterator[Case]], tuple[Any, ...]]] = []
    for n in searches:
        makers.append(("nearest_code N{} K{} D{}".format(*n), search_cases, (dtype, *n)))
    for n in searches[:2]:
        makers.append(("vector_quantize N{} K{} D{}".format(*n), quantize_cases, (dtype, *n)))
    makers.append(("code_statistics N{} K{} D{}".format(*searches[0]), statistics_cases, (dtype, *searches[0])))
    makers.append(("VectorQuantize N{} K{} D{}".format(*searches[-1]), quantizer_cases, searches[-1]))
    for gated in (True, False):
        batch, channels, side, kernel = images
        of = f"B{batch} C{channels} {side}x{side} k{kernel}"
        makers.append((f"{'gated_' * gated}masked_conv2d {of}", masked_cases, (dtype, *images, gated)))
    for n in layers:
        makers.append(("wavenet_layer B{} T{} R{} S{} K{} d{}".format(*n), sequence_cases, (dtype, *n)))
    batch, steps, width, _, kernel, dilation = layers[0]
    of = f"B{batch} T{steps} C{width} K{kernel} d{dilation}"
    makers.append((f"gated_causal_conv1d {of}", sequence_cases, (dtype, batch, steps, width, 0, kernel, dilation)))
    lines = (1, 4, 5) if tiny else (16, 64, 28)
    for diagonal in (False, True):
        of = "{} B{} H{} {}x{}".format("diagonal" if diagonal else "row", *lines, lines[2])
        makers.append((f"image_lstm {of}", lstm_cases, (dtype, *lines, diagonal)))
    latents = (3, 70) if tiny else (4096, 16384)
    makers.append(("gaussian_rsample_kl {}x{}".format(*latents), gaussian_cases, (dtype, *latents)))
    vectors = (3, 7, 20) if tiny else (100, 784, 500)
    makers.append(("nade B{} D{} H{}".format(*vectors), nade_cases, vectors))
    for scale, inverse in (("exp", False), ("tanh", False), ("sigmoid", False), ("tanh", True)):
        of = f"{'inverse, ' * inverse}{scale} {'x'.join(map(str, size))}"
        makers.append((f"affine_coupling {of}", coupling_cases, (size, dtype, scale, inverse)))
    for inverse in (False, True):
        of = f"{'inverse, ' * inverse}{'x'.join(map(str, size))}"
        makers.append((f"actnorm {of}", actnorm_cases, (size, dtype, inverse)))
    return [(name, partial(make, name, *args)) for name, make, args in makers]
