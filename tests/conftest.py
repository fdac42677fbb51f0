"""What every test shares: seeds, backends and the proof of which one ran.

FASTGEN_REQUIRE=cpu,avx512 names backends and instruction sets that must be there: where one is missing, tests fail
instead of being skipped.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import register_random, settings

import fastgen.backend

sys.path.append(str(Path(__file__).parent))  # for the helpers that several tests import

from op_helpers import DEVICE, KERNELS

if DEVICE == "cuda":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # its products are then deterministic

REQUIRED = {name.strip() for name in os.environ.get("FASTGEN_REQUIRE", "").split(",") if name.strip()}
INTEGER_PRODUCTS = {"nearest_code", "wavenet_generate", "pixelcnn_generate"}  # in which VNNI is all of a difference
PAIRS = INTEGER_PRODUCTS | {"wavenet_layer", "masked_conv2d", "conv2d"}  # ... and instructions for bfloat16
CPU_FEATURE = {"generic": None} | {isa: isa for isa in fastgen.backend.ISAS[1:]}

_counts: Counter[str] = Counter()

settings.register_profile("same", derandomize=True)
settings.load_profile("same")  # a failure is then the code's; --hypothesis-profile default draws anew


class _TorchRandom:
    """torch's generator, which hypothesis then seeds for every example, so that a failure can be repeated."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> bytes:
        return torch.get_rng_state().numpy().tobytes()

    def setstate(self, state: bytes) -> None:
        torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


_torch_random = _TorchRandom()  # hypothesis holds it weakly
register_random(_torch_random)


def missing(name: str, reason: str) -> None:
    """Skip the test with `reason`, or fail it where FASTGEN_REQUIRE names what is missing."""
    if name in REQUIRED:
        pytest.fail(f"FASTGEN_REQUIRE={','.join(sorted(REQUIRED))}, but {name} is missing: {reason}")
    pytest.skip(f"{name}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    if "FASTGEN_TEST_FOLDER" not in os.environ:  # the first process has one for all of the run
        folder = tempfile.TemporaryDirectory()
        os.environ["FASTGEN_TEST_FOLDER"] = folder.name
        config.add_cleanup(folder.cleanup)
    config.addinivalue_line("markers", "on_device: tensors are made on the device that is tested")
    if KERNELS == "triton":  # PyTorch's own operations need not be deterministic
        config.addinivalue_line("filterwarnings", "ignore:.*deterministic")


def pytest_sessionstart() -> None:
    """What `again` wants to be sure of, in the process that it starts."""
    exec(os.environ.get("FASTGEN_TEST_CHECK", ""))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """FASTGEN_TEST_SHARD=2/8: the second of eight shares of the tests."""
    which, _, shares = os.environ.get("FASTGEN_TEST_SHARD", "1/1").partition("/")
    config.hook.pytest_deselected(items=[t for i, t in enumerate(items) if i % int(shares) != int(which) - 1])
    items[:] = items[int(which) - 1 :: int(shares)]


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Same seeds for every test, whatever ran before; thread count and default dtype as they were."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(1234)
    np.random.seed(1234)  # noqa: NPY002  wavenet_vocoder draws from the global generator
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def _for_triton(_deterministic: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Memory that a Triton kernel leaves unwritten is NaN, and PyTorch's own products are not rounded to TF32."""
    if KERNELS != "triton":
        yield
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what is allocated
    if DEVICE != "cpu" and request.node.get_closest_marker("on_device"):
        torch.set_default_device(DEVICE)
    yield
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> None:
    """Small tensors gain nothing from threads; tests about threads set their own number."""
    torch.set_num_threads(1)


@contextlib.contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Counts the calls of `torch.ops.fastgen.*`."""
    calls: Counter[str] = Counter()
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "fastgen::" in name}
    ops = {name: getattr(torch.ops.fastgen, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return ops[name](*args, **kwargs)

        return call

    for name in ops:
        setattr(torch.ops.fastgen, name, counting(name))
    try:
        yield calls
    finally:
        for name, op in ops.items():
            setattr(torch.ops.fastgen, name, op)


@pytest.fixture
def need() -> Callable[[str, str], None]:
    """need(op, backend): skip, or fail where it is required, unless `backend` can run `op` here."""

    def check(op: str, backend: str) -> None:
        reason = fastgen.backend.why_not(op, backend)
        if reason is not None:
            missing(backend, f"{op}: {reason}")

    return check


@pytest.fixture
def need_isa() -> Callable[[str], None]:
    """need_isa(name): skip, or fail where it is required, unless this CPU and this build have it."""

    def check(isa: str) -> None:
        feature = CPU_FEATURE[isa]
        if feature and not fastgen.backend.cpu_features().get(feature, False):
            missing(isa, "this CPU does not have it, or nothing was compiled")
        if not (Path(fastgen.backend.__file__).parent / f"_cpu_{isa}.so").exists():
            missing(isa, "this build does not have it")

    return check


@pytest.fixture
def again() -> Callable[..., None]:
    """again(selection, *names, check=code, **environment): tests/test_<name>.py in a process with that environment.

    Of the tests, those that -k chooses; `check` is Python code that must succeed there.
    """

    def run(selection: str, *names: str, check: str, **environment: str) -> None:
        if os.environ.get("FASTGEN_TEST_NESTED"):
            pytest.skip("already within another run")
        env = os.environ | {"FASTGEN_TEST_NESTED": "1", "FASTGEN_TEST_CHECK": check} | environment
        files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in names]
        command = [sys.executable, "-P", "-m", "pytest", "-q", *files, "-k", selection]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return run


@pytest.fixture
def run_under(need_isa: Callable[[str], None], again: Callable[..., None]) -> Callable[..., None]:
    """run_under(isa, selection, *names): `again` with that instruction set."""

    def run(isa: str, selection: str, *names: str) -> None:
        need_isa(isa)
        if isa == "avx2_vnni" and INTEGER_PRODUCTS.isdisjoint(names):
            pytest.skip("avx2_vnni differs from avx2 where integers are multiplied, which is not here")
        if (isa, fastgen.backend.cpu_isa) == ("avx512", "avx512_vnni") and PAIRS.isdisjoint(names):
            pytest.skip("avx512 differs from this process's own where pairs are multiplied, which is not here")
        if isa == fastgen.backend.cpu_isa and os.environ.get("FASTGEN_TEST_DEVICE", "cpu") == "cpu":
            pytest.skip(f"{isa} is this process's own: the tests run here as they are")
        code = f"import fastgen.backend as b; assert b.cpu_isa == {isa!r}, b.cpu_isa"
        again(selection, *names, check=code, FASTGEN_CPU_ISA=isa, FASTGEN_REQUIRE="cpu")

    return run


@pytest.fixture
def ran() -> Callable[[str, str], AbstractContextManager[None]]:
    """`with ran(op, backend):` asserts that the op's kernel was called there, or, for "reference", no kernel at all."""

    @contextlib.contextmanager
    def watch(op: str, backend: str) -> Iterator[None]:
        with _counted() as calls:
            yield
        if backend == "reference":
            assert not calls, f"the reference was asked for, but these kernels ran: {dict(calls)}"
        else:
            assert calls[op], f"{op} was asked for on {backend}, but only these ran: {dict(calls)}"
        _counts[backend] += 1

    return watch


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """python(code or arguments, **environment) in a process of its own; FASTGEN_* come from the arguments alone."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTGEN_", "PYTEST_"))}
        command = [sys.executable, *(("-c", *arguments) if len(arguments) == 1 else arguments)]
        return subprocess.run(
            command, env={**kept, **environment}, capture_output=True, text=True, timeout=300, check=False
        )

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts on."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["counts"] = dict(_counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    _counts.update(getattr(node, "workeroutput", {}).get("counts", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _counts:
        line = ", ".join(f"{name} {count}" for name, count in sorted(_counts.items()))
        terminalreporter.write_line(f"checked runs on each backend: {line}; instruction set {fastgen.backend.cpu_isa}")
