"""Build the compiled part of fastgen.  FASTGEN_BUILD = auto | none | cpu | cuda (default: auto).

The C++ kernels are one set of sources, compiled once for each instruction set into a library of its own
(`fastgen/_cpu_avx2.so`, ...); the one that suits the machine is loaded at import. Each library registers the same
operators with the PyTorch dispatcher through the LibTorch stable ABI, so it survives an upgrade of torch.
The CUDA kernels are one more such library, built where torch has CUDA and nvcc is there, or with FASTGEN_BUILD=cuda.
CXX and CXXFLAGS are the compiler's, MAX_JOBS limits how many run at once. What is compiled is kept in build/ninja.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WANT = os.environ.get("FASTGEN_BUILD", "auto")
CXX = shlex.split(os.environ.get("CXX") or "c++")
NINJA = [sys.executable, "-m", "ninja"] if find_spec("ninja") else list(filter(None, [shutil.which("ninja")]))
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
FLAGS += ["-g0"]  # Python asks for -g, which would be nine tenths of a library
FLAGS += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # 2.11: the oldest release the libraries load under
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
AVX512 += ["-Wno-maybe-uninitialized"]  # of GCC's own header
CPU, CUDA = "fastgen._cpu_", "fastgen._cuda"
if sys.platform == "darwin":  # of a Python for both processors this one's half, for a system that torch runs on
    os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
    os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", "11.0")
ISAS = {"generic": []}
if platform.machine() == "aarch64":
    # GCC moves loads ahead of their products there, until sums leave their registers; Clang does not know of that
    ISAS = {"generic": ["-fno-schedule-insns", "-Wno-ignored-optimization-argument"]}
elif platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {"avx2": AVX2, "avx2_vnni": [*AVX2, "-mavxvnni"]}
    ISAS |= {"avx512": AVX512, "avx512_vnni": [*AVX512, "-mavx512vnni"]}
# Libraries that differ from another only where these headers are included: they share its other objects.
VARIANTS = {
    "avx2_vnni": ("avx2", {"csrc/cpu/integer_pairs.h"}),
    "avx512_vnni": ("avx512", {"csrc/cpu/integer_pairs.h", "csrc/cpu/bfloat16_pairs.h"}),
}


def skip(why: str) -> None:
    """An explicit request fails; the automatic one says what is left out."""
    if WANT not in ("auto", "none"):
        sys.exit(f"fastgen: FASTGEN_BUILD={WANT}, but {why}")
    print(f"\n*** fastgen: NOT building the C++ kernels: {why}. The PyTorch reference will run.\n", file=sys.stderr)


def headers(source: str) -> set[str]:
    """The project's own headers that a source includes, through others too."""
    found: set[str] = set()
    paths = [Path(source)]
    while paths:
        path = paths.pop()
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            header = os.path.normpath(path.parent / name)
            if header not in found:
                found.add(header)
                paths.append(Path(header))
    return found


def words(of: list[str]) -> str:
    """As ninja and a shell read them."""
    return shlex.join(of).replace("$", "$$")


class Build(build_ext):
    """All libraries in one run of ninja, which compiles what has changed since the last one."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extensions(self) -> None:
        libraries = [ext for ext in self.extensions if ext.name != CUDA]
        Path("build/ninja").mkdir(parents=True, exist_ok=True)
        Path("build/ninja/build.ninja").write_text(self.plan(libraries))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        self.spawn([*NINJA, "-f", "build/ninja/build.ninja", *jobs])
        for ext in self.extensions:
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            if ext.name == CUDA:
                self.spawn([sys.executable, "csrc/cuda/build.py", str(target)])
            else:
                self.copy_file(f"build/ninja/{target.name}", str(target))

    def plan(self, libraries: list[Extension]) -> str:
        """What ninja reads: how each object and each library is made."""
        import pybind11
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths

        includes = [f"-isystem{path}" for path in (*include_paths(), pybind11.get_include(), *self.include_dirs)]
        compiler = [*CXX, *self.compiler.compiler_so[1:], *FLAGS, *includes]
        linker = [*CXX, *self.compiler.linker_so[1:], "-pthread"]
        linked = [*(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch", "-ltorch_cpu"]
        version = subprocess.run([*CXX, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
        made_for = f"torch {torch.__version__}, {version}"  # as a comment: with another, all is compiled anew
        lines = [
            "builddir = build/ninja",
            f"cxxflags = {words(shlex.split(os.environ.get('CXXFLAGS', '')))}",
            "rule compile",
            f"  command = {words(compiler)} $flags $cxxflags -MD -MF $out.d -c $in -o $out # {made_for}",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {words(linker)} $in {words(linked)} -o $out",
        ]
        for ext in libraries:
            own, objects = ext.name.removeprefix(CPU), []
            other, differing = VARIANTS.get(own, ("", set()))
            for source in ext.sources:
                shared = other and not headers(source) & differing
                objects.append(f"build/ninja/{other if shared else own}/{Path(source).stem}.o")
                if not shared:
                    lines += [
                        f"build {objects[-1]}: compile {source}",
                        f"  flags = {words(ext.extra_compile_args)}",
                    ]
            lines.append(f"build build/ninja/{ext.name.split('.')[-1]}.so: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def extensions() -> list[Extension]:
    if WANT not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"FASTGEN_BUILD={WANT!r}: expected auto, none, cpu or cuda")
    if WANT == "none":
        skip("FASTGEN_BUILD=none")
        return []
    if WANT == "cuda" and not shutil.which("nvcc"):
        sys.exit("fastgen: FASTGEN_BUILD=cuda, but nvcc was not found; use auto, none or cpu")
    if not shutil.which(CXX[0]):
        skip("no C++ compiler was found")
        return []
    try:
        import pybind11  # noqa: F401
        import torch
    except ImportError as missing:
        sys.exit(f"fastgen: install {missing.name} first, then: pip install --no-build-isolation -e .")
    if not NINJA:
        sys.exit("fastgen: install ninja first, then: pip install --no-build-isolation -e .")

    sources = sorted(glob("csrc/cpu/*.cpp"))
    kernels = [Extension(CPU + isa, sources, extra_compile_args=flags) for isa, flags in ISAS.items()]
    host = Extension("fastgen._host", ["csrc/host.cpp"], extra_compile_args=[f'-DFASTGEN_ISAS="{" ".join(ISAS)}"'])
    with_cuda = WANT == "cuda" or (WANT == "auto" and torch.version.cuda and shutil.which("nvcc"))
    cuda = [Extension(CUDA, sorted(glob("csrc/cuda/*.cu")))] if with_cuda else []
    return [host, *kernels, *cuda]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
