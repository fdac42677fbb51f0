"""The thread-block emulator finds planted faults: kernels that are tested in it would not hide them."""

import pytest
from cuda_helpers import ORDERS, built, run

RIGHT = "8128 8128 8128 8128 "


def outcomes(fault, mode="plain"):
    return [run(built("planted.cpp", mode), fault, *order) for order in ORDERS.values()]


@pytest.mark.parametrize("mode", ["plain", "address", "thread"])
def test_a_sound_kernel(mode):
    for done in outcomes("none", mode):
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout == RIGHT


@pytest.mark.parametrize("fault", ["no barrier", "no cluster barrier"])
def test_a_missing_barrier(fault):
    assert any(done.stdout != RIGHT for done in outcomes(fault))
    for done in outcomes(fault, "thread"):
        assert "WARNING: ThreadSanitizer: data race" in done.stderr
        assert "planted.cpp" in done.stderr


def test_a_shuffle_is_no_barrier():
    assert all(done.returncode == 0 for done in outcomes("a shuffle for a barrier"))
    for done in outcomes("a shuffle for a barrier", "thread"):
        assert "WARNING: ThreadSanitizer: data race" in done.stderr


def test_an_index_out_of_bounds():
    for done in outcomes("index out of bounds", "address"):
        assert "heap-buffer-overflow" in done.stderr
        assert "planted.cpp" in done.stderr


def test_an_uninitialised_read():
    assert all("nan" in done.stdout for done in outcomes("uninitialised read"))


@pytest.mark.parametrize(("fault", "message"), [
    ("divergent barrier", r"threads of a block wait at different barriers: planted.cpp:\d+ and planted.cpp:\d+"),
    ("a barrier that some miss", "deadlock: threads wait for ever"),
    ("a flag that never comes", "livelock: threads spin for ever"),
])  # fmt: skip
def test_threads_that_do_not_meet(fault, message):
    import re

    for done in outcomes(fault):
        assert done.returncode == 3
        assert re.search(message, done.stderr), done.stderr
