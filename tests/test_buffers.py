"""Large results take memory that earlier ones have freed, and only then."""

import threading
from pathlib import Path

import pytest
import torch

import fastgen
from fastgen.ops import actnorm

pytestmark = pytest.mark.skipif(fastgen.backend.cpu_isa is None, reason="the C++ kernels are not live")
ROWS = 1 << 19  # with four channels 8 MB


@pytest.fixture(autouse=True)
def _empty():
    fastgen.release_memory()
    yield
    torch.ops.fastgen.keep_buffers(1 << 30, True)
    fastgen.release_memory()


def result(rows=ROWS, fill=1.0):
    x = torch.full((rows, 4), fill)
    return actnorm(x, torch.zeros(4), torch.zeros(4), backend="cpu")[0]


def test_what_is_freed_is_used_again():
    a = result()
    place = a.data_ptr()
    b = result(fill=2.0)
    assert b.data_ptr() != place, "what is alive is left alone"
    view = a[5:, 1:]
    del a
    c = result(fill=3.0)
    assert c.data_ptr() != place, "so is what a view holds"
    assert bool((view == 1).all())
    del view
    d = result(fill=4.0)
    assert d.data_ptr() == place
    assert bool((b == 2).all())
    assert bool((c == 3).all())
    assert bool((d == 4).all())


def test_only_for_about_the_same_size():
    place = result().data_ptr()
    assert result(ROWS // 2).data_ptr() != place
    assert result(2 * ROWS).data_ptr() != place
    assert result(ROWS - 1000).data_ptr() == place


def resident():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def test_idle_memory_is_bounded_and_can_be_released():
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    x, zero = torch.ones(16 * ROWS, 4), torch.zeros(4)  # 128 MB

    def grown(before):
        y = actnorm(x, zero, zero, backend="cpu")[0]
        del y
        return resident() - before

    grown(0)
    fastgen.release_memory()
    before = resident()
    assert grown(before) > 100e6
    fastgen.release_memory()
    assert abs(resident() - before) < 20e6
    torch.ops.fastgen.keep_buffers(1 << 26, True)
    assert grown(before) < 20e6, "more than may lie idle goes back at once"


def test_many_threads():
    torch.set_num_threads(1)
    wrong = []

    def work(k):
        kept = [result(fill=float(k))]
        for i in range(20):
            kept.append(result(ROWS + 4096 * (i % 3), fill=float(100 * k + i)))
            if not bool((kept[-1] == 100 * k + i).all()):
                wrong.append((k, i))
            kept = kept[-2:]
        if not bool((kept[0] == 100 * k + 18).all()):
            wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_results_behave_as_tensors(tmp_path):
    y = result()
    torch.save(y, tmp_path / "a.pt")
    assert torch.equal(torch.load(tmp_path / "a.pt"), y)
    assert y.is_contiguous()
    z = y.clone().share_memory_()
    assert torch.equal(z, y)
    y.share_memory_()
    assert torch.equal(z, y)
    y.add_(1)
    assert (y.numpy() == z.numpy() + 1).all()


def test_variable(python):
    code = (
        "import fastgen, torch; x, z = torch.ones(1 << 20, 4), torch.zeros(4); "
        "f = lambda: fastgen.ops.actnorm(x, z, z)[0]; a = f().data_ptr(); b = f(); print(a == b.data_ptr())"
    )
    assert python(code).stdout.strip() == "True"
    assert (
        "FASTGEN_KEEP_MB: expected a number of megabytes, got 'x'"
        in python("import fastgen", FASTGEN_KEEP_MB="x").stderr
    )
