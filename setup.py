"""Build the compiled part of fastgen.  FASTGEN_BUILD = auto | none | cpu | cuda (default: auto).

The C++ kernels are one set of sources, compiled once for each instruction set into a library of its own
(`fastgen/_cpu_avx2.so`, ...); the one that suits the machine is loaded at import. Each library registers the same
operators with the PyTorch dispatcher through the LibTorch stable ABI, so it survives an upgrade of torch.
The CUDA kernels are one more such library, built where torch has CUDA and nvcc is there, or with FASTGEN_BUILD=cuda.
"""

import os
import platform
import shutil
import sys
from glob import glob

from setuptools import Extension, setup

WANT = os.environ.get("FASTGEN_BUILD", "auto")
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11: the oldest release the libraries load under
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
CUDA = "fastgen._cuda"
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


def skip(why: str) -> None:
    """An explicit request fails; the automatic one says what is left out."""
    if WANT not in ("auto", "none"):
        sys.exit(f"fastgen: FASTGEN_BUILD={WANT}, but {why}")
    print(f"\n*** fastgen: NOT building the C++ kernels: {why}. The PyTorch reference will run.\n", file=sys.stderr)


def extensions() -> tuple[list[Extension], dict[str, type]]:
    if WANT not in ("auto", "none", "cpu", "cuda"):
        sys.exit(f"FASTGEN_BUILD={WANT!r}: expected auto, none, cpu or cuda")
    if WANT == "none":
        skip("FASTGEN_BUILD=none")
        return [], {}
    if WANT == "cuda" and not shutil.which("nvcc"):
        sys.exit("fastgen: FASTGEN_BUILD=cuda, but nvcc was not found; use auto, none or cpu")
    if not shutil.which(os.environ.get("CXX", "c++").split()[0]):
        skip("no C++ compiler was found")
        return [], {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        sys.exit("fastgen: install torch first, then: pip install --no-build-isolation -e .")
    import pybind11

    class Build(BuildExtension):
        """Objects of each library in a folder of their own: the sources are shared, the flags are not."""

        def build_extension(self, ext: Extension) -> None:
            if ext.name == CUDA:
                target = self.get_ext_fullpath(ext.name)
                os.makedirs(os.path.dirname(target), exist_ok=True)
                return self.spawn([sys.executable, "csrc/cuda/build.py", target])
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, ext.name)
            os.makedirs(self.build_temp, exist_ok=True)
            super().build_extension(ext)
            self.build_temp = shared

    headers = sorted(glob("csrc/*.h") + glob("csrc/cpu/*.h"))
    kernels = [
        CppExtension(
            f"fastgen._cpu_{isa}",
            sorted(glob("csrc/cpu/*.cpp")),
            depends=headers,
            extra_compile_args={"cxx": [*FLAGS, TORCH_ABI, *flags]},
            extra_link_args=["-pthread"],
        )
        for isa, flags in ISAS.items()
    ]
    host = CppExtension(
        "fastgen._host",
        ["csrc/host.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": [*FLAGS, f'-DFASTGEN_ISAS="{" ".join(ISAS)}"']},
    )
    with_cuda = WANT == "cuda" or (WANT == "auto" and torch.version.cuda and shutil.which("nvcc"))
    # no .cu among the sources: torch would ask for the toolkit of its own CUDA, which this library does not need
    device = sorted(glob("csrc/*.h") + glob("csrc/cuda/*.cu*") + glob("csrc/cuda/*.h"))
    cuda = [Extension(CUDA, sorted(glob("csrc/cuda/*.cpp")), depends=device)] if with_cuda else []
    return [host, *kernels, *cuda], {"build_ext": Build.with_options(no_python_abi_suffix=True)}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
