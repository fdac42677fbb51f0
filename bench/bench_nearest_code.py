"""The search beside eager PyTorch, torch.compile, cdist and faiss."""

import pytest
import torch
from conftest import peak_extra_bytes

from fastgen import backend
from fastgen.ops import nearest_code

SHAPES = [(65536, 512, 64), (16384, 1024, 64), (16384, 8192, 256), (32768, 1024, 8)]  # rows, codes, features


def expanded(x, codebook):
    return (x.square().sum(1, keepdim=True) - 2 * x @ codebook.T + codebook.square().sum(1)).argmin(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_search(shape, contest, limits, benchmark):
    faiss = pytest.importorskip("faiss", reason="pip install faiss-cpu")
    rows, codes, features = shape
    generator = torch.Generator().manual_seed(0)
    x, codebook = (torch.randn(n, features, generator=generator) for n in (rows, codes))
    index = faiss.IndexFlatL2(features)
    index.add(codebook.numpy())
    faiss.omp_set_num_threads(torch.get_num_threads())
    array = x.numpy()

    found = nearest_code(x, codebook, backend="cpu")[0]
    centred, centred_codes = x.double() - codebook.double().mean(0), codebook.double() - codebook.double().mean(0)
    for part, chosen in zip(centred.split(4096), found.split(4096), strict=True):  # against float64
        score = part @ centred_codes.T - centred_codes.square().sum(1) / 2
        assert float((score.max(1).values - score.gather(1, chosen[:, None])[:, 0]).max()) < 1e-11
    compiled = torch.compile(expanded)
    contestants = {
        "fastgen": lambda: nearest_code(x, codebook, backend="cpu"),
        "eager": lambda: expanded(x, codebook),
        "torch.compile": lambda: compiled(x, codebook),
        "cdist": lambda: torch.cdist(x, codebook).argmin(1),
        "faiss": lambda: index.search(array, 1),
    }
    median = contest(contestants, rounds=9)
    flops = 2 * rows * codes * features
    benchmark.extra_info.update(
        case=f"search N{rows} K{codes} D{features}",
        search=True,
        gflops=flops / median["fastgen"] / 1e9,
        of_fma_peak=flops / median["fastgen"] / 1e9 / limits["gflops"],
        limits=limits,
        peak_extra_bytes={name: peak_extra_bytes(contestants[name]) for name in ("fastgen", "eager")},
        isa=backend.cpu_isa,
    )
