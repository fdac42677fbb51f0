"""Which backend runs an op: order of precedence, explicit choices, fallbacks, instruction sets, threads."""

from __future__ import annotations

import re
import subprocess
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

import fastgen
import fastgen.backend as backend
from fastgen.ops import Generator, WaveNetWeights, initial_state

CPU = torch.device("cpu")
OP = "wavenet_generate"
Python = Callable[..., subprocess.CompletedProcess[str]]

# prints the backend that Generator chose, and whether the kernel for it was really called
GENERATE = """
import warnings, torch, fastgen
from fastgen.ops import Generator, WaveNetWeights, initial_state
def network():
    shapes = (4, 3), (3,), (1, 6, 3, 2), (1, 3, 3), (1, 3), (1, 5, 3), (5,), (5, 5), (5,), (4, 5), (4,)
    return WaveNetWeights(*(torch.ones(s) / 8 for s in shapes))
def generate(**options):
    loop = Generator(network(), [2], **options)
    state = initial_state(network(), [2], torch.zeros(2, dtype=torch.int64))
    samples, _ = loop.run(state, torch.full((2, 3), 0.5), torch.zeros(1, 1, 6))
    assert samples.shape == (2, 3)
    return loop.backend
"""


def tiny() -> WaveNetWeights:
    shapes = (4, 3), (3,), (1, 6, 3, 2), (1, 3, 3), (1, 3), (1, 5, 3), (5,), (5, 5), (5,), (4, 5), (4,)
    return WaveNetWeights(*(torch.ones(s) / 8 for s in shapes))


def generate(**options: str | None) -> torch.Tensor:
    loop = Generator(tiny(), [2], **options)  # type: ignore[arg-type]
    state = initial_state(tiny(), [2], torch.zeros(2, dtype=torch.int64))
    return loop.run(state, torch.full((2, 3), 0.5), torch.zeros(1, 1, 6))[0]


def test_argument_goes_before_use_backend(
    need: Callable[[str, str], None], ran: Callable[[str, str], AbstractContextManager[None]]
) -> None:
    """An op's backend= wins over the context manager, in both directions."""
    need(OP, "cpu")
    with fastgen.use_backend("cpu"), ran(OP, "reference"):
        generate(backend="reference")
    with fastgen.use_backend("reference"), ran(OP, "cpu"):
        generate(backend="cpu")
    with fastgen.use_backend("reference"), ran(OP, "reference"):
        generate()
    with fastgen.use_backend("reference"), ran(OP, "cpu"):
        generate(backend="auto")


def test_use_backend_goes_before_the_environment(need: Callable[[str, str], None], python: Python) -> None:
    """Argument > use_backend > FASTGEN_BACKEND > auto, in a process that starts with the variable set."""
    need(OP, "cpu")
    code = GENERATE + (
        "print(generate())\n"
        "with fastgen.use_backend('cpu'): print(generate())\n"
        "with fastgen.use_backend('auto'): print(generate())\n"
        "with fastgen.use_backend('cpu'): print(generate(backend='reference'))\n"
        "print(generate(backend='cpu'))\n"
    )
    done = python(code, FASTGEN_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["reference", "cpu", "cpu", "reference", "cpu"]
    done = python(GENERATE + "print(generate())", FASTGEN_BACKEND="")
    assert done.stdout.split() == ["cpu"], done.stderr


def test_wrong_names_are_refused(python: Python) -> None:
    """A name that does not exist is an error that says where it came from and lists the names that do."""
    with pytest.raises(ValueError, match=r"wavenet_generate: backend: expected one of .*reference.*, got 'gpu'"):
        generate(backend="gpu")
    with pytest.raises(ValueError, match=r"got ''"):
        generate(backend="")
    before = chosen()
    with pytest.raises(ValueError, match=r"use_backend: expected one of .*, got 'CPU'"), fastgen.use_backend("CPU"):
        pytest.fail("the block must not run")
    assert chosen() == before
    done = python("import fastgen", FASTGEN_BACKEND="fast")
    assert done.returncode != 0
    assert re.search(r"ValueError: FASTGEN_BACKEND: expected one of .*, got 'fast'", done.stderr)
    done = python("import fastgen", FASTGEN_CPU_ISA="sse2")
    assert done.returncode != 0
    assert re.search(r"ValueError: FASTGEN_CPU_ISA: expected one of generic, avx2, .*, got 'sse2'", done.stderr)


@pytest.mark.parametrize("how", ["argument", "context"])
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_explicit_backend_never_falls_back(name: str, how: str) -> None:
    """It raises, and the message holds the op, the backend, the reason and what to do; nothing is warned about."""
    context = fastgen.use_backend("auto" if how == "argument" else name)
    argument = name if how == "argument" else None
    with warnings.catch_warnings(action="error"), context, pytest.raises(fastgen.BackendError) as caught:
        generate(backend=argument)
    message = str(caught.value)
    reason = backend.why_not(OP, name)
    assert reason
    for part in (f"fastgen.{OP}", repr(name), reason, "backend='reference'", "python -m fastgen info"):
        assert part in message


def test_explicit_cpu_backend_refuses_tensors_elsewhere(need: Callable[[str, str], None]) -> None:
    need(OP, "cpu")
    with pytest.raises(fastgen.BackendError, match=r"wavenet_generate.*'cpu'.*tensors are on cuda:1"):
        backend.resolve(OP, "cpu", torch.device("cuda:1"))
    assert backend.resolve(OP, "cpu", torch.device("meta")) == "cpu"


def test_op_without_kernel() -> None:
    """An op that C++ does not know is reported as such."""
    library = torch.library.Library("fastgen", "FRAGMENT")
    library.define("no_such_op() -> ()")
    assert backend.why_not("no_such_op", "reference") is None
    if backend.cpu_isa:
        assert backend.why_not("no_such_op", "cpu") == "this op has no C++ kernel"
    with pytest.raises(fastgen.BackendError, match=r"fastgen\.no_such_op.*'cpu'"):
        backend.resolve("no_such_op", "cpu", CPU)


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_unknown_names_are_refused(name: str) -> None:
    """An op or backend that does not exist is an error that lists those that do, whatever the other argument."""
    with pytest.raises(ValueError, match=r"why_not: op must be one of .*wavenet_generate, .*, got 'wavenet'"):
        backend.why_not("wavenet", name)
    with pytest.raises(ValueError, match=r"why_not: backend must be one of .*reference, got 'gpu'"):
        backend.why_not(OP, "gpu")


def test_auto_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto falls back to the reference with one warning, which names op and reason, however often it is called."""
    why_not = backend.why_not
    monkeypatch.setattr(backend, "why_not", lambda op, name: "out of order" if name == "cpu" else why_not(op, name))
    monkeypatch.setattr(backend, "_warned", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            generate()
            assert backend.resolve(OP, None, CPU) == "reference"
            assert backend.resolve(OP, "auto", CPU) == "reference"
            assert backend.resolve(OP, "reference", CPU) == "reference"
    assert [w.category for w in caught] == [RuntimeWarning]
    assert OP in str(caught[0].message)
    assert "out of order" in str(caught[0].message)
    with pytest.raises(fastgen.BackendError, match=r"wavenet_generate.*'cpu'.*out of order"):
        generate(backend="cpu")


def test_no_warning_without_a_fallback(need: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    need(OP, "cpu")
    monkeypatch.setattr(backend, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate()
        generate(backend="reference")


def test_without_compiled_kernels(python: Python) -> None:
    """With no C++ kernels loaded the package works on the reference, says so once, and refuses an explicit cpu."""
    code = (
        "import pathlib\n"
        "exists = pathlib.Path.exists\n"
        "pathlib.Path.exists = lambda self: not self.name.startswith('_cpu_') and exists(self)\n"
    ) + GENERATE
    code += (
        "assert fastgen.backend.cpu_isa is None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    model = fastgen.models.WaveNet(2, 1, 4, 4, classes=8)\n"
        "    parameters = model(torch.zeros(1, 5, dtype=torch.int64))\n"
        "    print(generate(), generate(), model.generate(3).shape[1], parameters.shape[1])\n"
        "print(sum('not built' in str(w.message) for w in caught), len(caught))\n"
        "try: generate(backend='cpu')\n"
        "except fastgen.BackendError as error: print(error)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "reference reference 3 8"
    assert lines[1] == "1 1"
    assert OP in lines[2]
    assert "not built" in lines[2]


@pytest.mark.parametrize("isa", backend.ISAS)
def test_instruction_set_is_the_one_asked_for(isa: str, python: Python, need_isa: Callable[[str], None]) -> None:
    """FASTGEN_CPU_ISA loads that instruction set's kernels and no other."""
    need_isa(isa)
    code = (
        GENERATE
        + "maps = open('/proc/self/maps').read() if __import__('os').path.exists('/proc/self/maps') else None\n"
    )
    code += (
        "import re\n"
        "loaded = set(re.findall(r'_cpu_(\\w+)\\.so', maps)) if maps else {fastgen.backend.cpu_isa}\n"
        "print(fastgen.backend.cpu_isa, *loaded, generate(backend='cpu'))"
    )
    done = python(code, FASTGEN_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [isa, isa, "cpu"]


def test_absent_instruction_set(python: Python) -> None:
    """An instruction set that the CPU lacks is no crash: cpu is dead with a reason, auto falls back."""
    code = (
        "import sys, types\n"
        "host = types.ModuleType('fastgen._host')\n"
        "host.cpu_features = lambda: dict.fromkeys(('avx2', 'avx512', 'avx512_vnni'), False)\n"
        "sys.modules['fastgen._host'] = host\n"
    ) + GENERATE
    code += (
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    print(fastgen.backend.cpu_isa, generate(), len(caught))\n"
        "try: generate(backend='cpu')\n"
        "except fastgen.BackendError as error: print(error)\n"
    )
    done = python(code, FASTGEN_CPU_ISA="avx512")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "None reference 1"
    assert "not built" in lines[1] or "FASTGEN_CPU_ISA=avx512" in lines[1]


def chosen() -> str:
    """The backend that is in force here."""
    try:
        return backend.resolve(OP, None, CPU)
    except fastgen.BackendError as error:
        return str(error).split("'")[1]


def fail_after_nesting() -> None:
    with fastgen.use_backend("reference"):
        assert backend.resolve(OP, None, CPU) == "reference"
    assert chosen() == "cuda"
    backend.resolve(OP, None, CPU)


def test_use_backend_nests_and_restores() -> None:
    """Inner blocks win, and every exit, by exception too, restores what was before."""
    before = chosen()
    with fastgen.use_backend("reference"):
        assert backend.resolve(OP, None, CPU) == "reference"
        with pytest.raises(fastgen.BackendError), fastgen.use_backend("cuda"):
            fail_after_nesting()
        assert backend.resolve(OP, None, CPU) == "reference"
    assert chosen() == before


def test_use_backend_holds_for_its_own_thread() -> None:
    """A block in one thread changes nothing in another that runs meanwhile."""
    inside, checked, seen, before = threading.Event(), threading.Event(), {}, chosen()

    def other() -> None:
        with fastgen.use_backend("cuda"):
            inside.set()
            checked.wait(10)
            seen["other"] = chosen()

    thread = threading.Thread(target=other)
    with fastgen.use_backend("reference"):
        thread.start()
        assert inside.wait(10)
        seen["main"] = chosen()
        assert backend.resolve(OP, None, CPU) == "reference"
        checked.set()
        thread.join()
        assert chosen() == "reference"
    assert chosen() == before
    assert seen == {"main": "reference", "other": "cuda"}


def test_what_turns_out_not_to_run() -> None:
    """As where no plan of a kernel fits a GPU: chosen by name an error, else the reference, with a warning."""
    backend._warned.discard("no room for this network")
    gpu = torch.device("cuda")
    with pytest.raises(backend.BackendError, match="'cuda' was requested but cannot run: no room for this network"):
        backend.instead(OP, "cuda", "cuda", gpu, "no room for this network")
    with pytest.warns(RuntimeWarning, match="reference on cuda: no room for this network"):
        assert backend.instead(OP, "auto", "cuda", gpu, "no room for this network") == "reference"


def test_compiled_code_follows_use_backend(python: Python) -> None:
    """Also what was compiled before any choice was made."""
    code = """
import torch, fastgen
from fastgen.ops import masked_conv2d
w, x = torch.randn(4, 2, 3, 3), torch.randn(1, 2, 4, 4)
f = torch.compile(lambda x: masked_conv2d(x, w, mask="B"), fullgraph=True, backend="eager")
f(x)
try:
    with fastgen.use_backend("triton"):
        f(x)
except Exception as error:
    assert "'triton' was requested but cannot run" in str(error), error
    print("refused")
"""
    done = python(code)
    assert done.stdout == "refused\n", done.stderr


def test_written_tensors_are_counted() -> None:
    """So that autograd does not go back through values that are gone."""
    residual, skip = torch.zeros(1, 4, 10), torch.zeros(1, 2, 10)
    args = (torch.randn(1, 4, 10), torch.randn(8, 4, 2), None, torch.randn(6, 4), None)
    p = torch.randn(1, 4, 10, requires_grad=True)
    y = (p * residual).sum()
    fastgen.ops.wavenet_layer(*args, out=(residual, skip))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()
    with pytest.raises(ValueError, match=r"out\[0\] must not require gradients"):
        fastgen.ops.wavenet_layer(*args, out=(residual.clone().requires_grad_(), skip))
    with torch.inference_mode():
        frozen = torch.zeros(1, 4, 10)
        fastgen.ops.wavenet_layer(*args, out=(frozen, skip.clone()))
    with pytest.raises(ValueError, match=r"out\[0\] is an inference tensor"):
        fastgen.ops.wavenet_layer(*args, out=(frozen, skip))
    sizes, sums, embed = torch.ones(3), torch.randn(3, 2), torch.randn(3, 2)
    y = (embed * torch.randn(3, 2, requires_grad=True)).sum()
    fastgen.ops.update_codebook_(sizes, sums.clone(), embed, torch.ones(3), sums, decay=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("which", ["cpu", "reference"])
def test_searches_are_exact_under_autocast(which: str, need: Callable[[str, str], None]) -> None:
    need("nearest_code", which)
    x, codes = torch.randn(500, 16), torch.randn(300, 16)
    index, distance = fastgen.ops.nearest_code(x, codes, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        again, distances = fastgen.ops.nearest_code(x, codes, backend=which)
        quantized, found, _ = fastgen.ops.vector_quantize(x, codes, backend=which)
        narrow, _, _ = fastgen.ops.vector_quantize(x.bfloat16(), codes, backend=which)
    assert torch.equal(again, index)
    assert torch.equal(found, index)
    assert torch.equal(quantized, codes[index])
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(distances, distance, atol=1e-4, rtol=1e-5)


def test_autocast_to_what_no_kernel_takes() -> None:
    """float16 on a CPU: the ops keep the dtype they are given, and refuse what they would refuse without autocast."""
    x, w = torch.randn(1, 2, 6), torch.randn(4, 2, 2)
    with torch.autocast("cpu", torch.float16):
        assert fastgen.ops.gated_causal_conv1d(x, w).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="x must be float32"):
        fastgen.ops.gated_causal_conv1d(torch.ones(1, 2, 6, dtype=torch.int64), w)


def test_a_network_without_taps_is_refused() -> None:
    weights = WaveNetWeights(
        torch.zeros(4, 2), torch.zeros(2), torch.zeros(1, 4, 2, 0), torch.zeros(1, 2, 2), torch.zeros(1, 2),
        torch.zeros(1, 3, 2), torch.zeros(3), torch.zeros(3, 3), torch.zeros(3), torch.zeros(4, 3), torch.zeros(4),
    )  # fmt: skip
    with pytest.raises(ValueError, match="weights must have channels, taps and outputs, got conv"):
        Generator(weights, [1])


INTEGERS, BFLOAT16 = "csrc/cpu/integer_pairs.h", "csrc/cpu/bfloat16_pairs.h"


def test_libraries_share_objects_that_are_the_same():
    """VNNI is asked for in two headers: what includes neither is compiled once for both, as setup.py has it."""
    root = Path(__file__).parents[1]
    files = [path for pattern in ("csrc/*.*", "csrc/cpu/*") for path in root.glob(pattern)]
    asking = {str(path.relative_to(root)): path.read_text() for path in files if "VNNI__" in path.read_text()}
    assert {name for name, text in asking.items() if "__AVX512VNNI__" in text} == {BFLOAT16, INTEGERS}
    assert {name for name, text in asking.items() if "__AVXVNNI__" in text} == {INTEGERS}
    setup = (root / "setup.py").read_text()
    assert f'"avx2_vnni": ("avx2", {{"{INTEGERS}"}})' in setup
    assert f'"avx512_vnni": ("avx512", {{"{INTEGERS}", "{BFLOAT16}"}})' in setup
