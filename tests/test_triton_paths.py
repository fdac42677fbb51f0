"""Paths through the Triton kernels that the ops' own tests do not take: by test_ptx.py, and on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from op_helpers import DEVICE, DTYPES, FLOOR, KERNELS, compare, error
from test_masked_conv2d import arguments as image_arguments
from test_nearest_code import exact_distances
from test_wavenet_layer import arguments, gate_arguments

from fastgen.ops import gated_causal_conv1d, gated_masked_conv2d, masked_conv2d, nearest_code, wavenet_layer

pytest.importorskip("triton", reason="pip install triton")
pytestmark = [
    pytest.mark.skipif(KERNELS != "triton", reason="test_ptx.py runs these"),
    pytest.mark.on_device,
]
CONDITIONS = ("none", "local", "constant")


@contextmanager
def launched(module: Any, name: str) -> Iterator[list[dict[str, Any]]]:
    """Arguments of the launches of a kernel, which run."""
    kernel, launches = getattr(module, name), []

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*args: Any, **options: Any) -> None:
                launches.append(dict(zip(kernel.arg_names, args, strict=False)) | options)
                kernel[grid](*args, **options)

            return launch

    setattr(module, name, Watched())
    try:
        yield launches
    finally:
        setattr(module, name, kernel)


def test_memory_starts_as_nan():
    assert torch.empty(5, device=DEVICE).isnan().all()
    assert torch.zeros(5, device=DEVICE).new_empty(5, dtype=DTYPES[-1]).isnan().all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("cond", CONDITIONS)
@pytest.mark.parametrize(("steps", "dilation"), [(48, 16), (48, 32), (16, 48), (48, 5), (31, 16)])
def test_a_gate_with_channels_first_and_last(steps, dilation, cond, biased):
    from fastgen.kernels import convolution

    args = gate_arguments(arguments(2, 5, steps, 9, 2, 1, cond))
    args = args if biased else args | {"bias": None}
    with launched(convolution, "_gated_conv") as launches:
        compare(gated_causal_conv1d, args, torch.float32, dilation=dilation)
    first = steps % 16 == 0 and min(dilation, steps) % 16 == 0
    assert [(run["LAST"], run["BACKWARD"]) for run in launches] == [(not first, False), (not first, True)]


@pytest.mark.parametrize("cond", CONDITIONS)
@pytest.mark.parametrize(("steps", "dilation", "taps"), [(48, 16, 2), (32, 16, 3), (16, 1, 1)])
def test_a_layer_with_channels_first(steps, dilation, taps, cond):
    from fastgen.kernels import wavenet_layer as module

    with launched(module, "_layer") as launches:
        compare(wavenet_layer, arguments(2, 5, steps, 6, taps, 3, cond), torch.float32, dilation=dilation)
    assert [(run["LAST"], run["BACKWARD"]) for run in launches] == [(False, False), (False, True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_whose_tiles_are_as_large_as_they_get(dtype):
    """Its backward has several tiles of the gradients that come in, which are summed and multiplied."""
    compare(wavenet_layer, arguments(1, 3, 16, 130, 2, 65, "constant"), dtype, dilation=2)


@pytest.mark.parametrize("cond", CONDITIONS)
@pytest.mark.parametrize("biased", [False, True])
def test_more_gates_than_are_held_on_chip(cond, biased):
    args = arguments(1, 3, 9, 260, 2, 4, cond)
    args = args if biased else args | {"bias": None, "out_bias": None}
    compare(wavenet_layer, args, torch.float32, dilation=2)


@pytest.mark.parametrize("cond", ["none", "position", "image"])
@pytest.mark.parametrize("mask", ["A", "vertical_B"])
def test_images_of_more_channels_than_a_tile_has(mask, cond):
    args = image_arguments(1, 70, 2, 5, 140, (2, 2), cond)
    compare(gated_masked_conv2d, args, torch.float32, mask=mask)
    args.pop("cond", None)
    compare(masked_conv2d, args, torch.float32, mask=mask)


@pytest.mark.parametrize("cond", ["none", "position", "image"])
@pytest.mark.parametrize("dtype", DTYPES[-1:], ids=str)
def test_a_gate_whose_sums_nobody_keeps(dtype, cond):
    """More rows of it fit a tile then."""
    args = {
        k: v if v is None else v.to(DEVICE, dtype) for k, v in image_arguments(2, 70, 5, 6, 140, (3, 3), cond).items()
    }
    with torch.no_grad():
        out = gated_masked_conv2d(**args, mask="B", backend="triton")
        exact = {k: v if v is None else v.double() for k, v in args.items()}
        expected = gated_masked_conv2d(**exact, mask="B", backend="reference")
    assert error(out, expected) < FLOOR[dtype]


@pytest.mark.parametrize("which", range(5))
def test_sizes_of_one(which):
    """Of which Triton makes constants."""
    sizes = [1 if place == which else 3 for place in range(5)]
    batch, channels, height, width, pairs = sizes
    compare(gated_masked_conv2d, image_arguments(*sizes[:4], 2 * pairs, (3, 3), "position"), torch.float32, mask="B")
    compare(masked_conv2d, image_arguments(*sizes, (1, 3)), torch.float32, mask="B")
    args = arguments(batch, channels, height, pairs, width, 1, "local")
    compare(wavenet_layer, args, torch.float32)
    compare(gated_causal_conv1d, gate_arguments(args), torch.float32)


def assert_nearest(x, codebook, metric="euclidean", precision="ieee"):
    index, distance = nearest_code(x, codebook, metric=metric, precision=precision, backend=KERNELS)
    exact = exact_distances(x, codebook, metric)
    got, best = exact.gather(1, index[:, None])[:, 0], exact.min(1).values
    torch.testing.assert_close(distance.double(), got, rtol=1e-4, atol=1e-5)
    assert bool((got <= best * (1 + 1e-4 if precision == "ieee" else 1.05) + 1e-6).all())
    return index


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("size", [(7, 50, 300), (1, 1, 257), (5, 1, 512)], ids=str)
def test_rows_too_long_to_be_held_whole(size, metric, precision):
    rows, codes, dim = size
    assert_nearest(torch.randn(rows, dim), torch.randn(codes, dim), metric, precision)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dim", [20, 300])
@pytest.mark.parametrize("kind", ["ties", "outlier"])
def test_rows_that_the_scan_leaves_undecided(kind, dim, metric):
    centre = torch.randn(dim)
    near = centre + 1e-5 * torch.randn(40, dim)  # closer to each other than roundings are, in more lanes than are kept
    if kind == "ties":
        codebook = torch.cat([near, near, torch.randn(90, dim) + 5])  # most, so that the centre is not amid the near
    else:
        codebook = torch.cat([near, torch.randn(50, dim) + 5])
        codebook[7] = 1e4 * torch.randn(dim)
    x = centre + torch.randn(5, dim)
    index = assert_nearest(x, codebook, metric)
    if kind == "ties":
        assert int(index.max()) < 40, "the lowest of equal codes"
    else:
        assert 7 not in index.tolist()
