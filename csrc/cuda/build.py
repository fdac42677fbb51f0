"""Compile the CUDA kernels: python csrc/cuda/build.py TARGET. torch may be a build without CUDA; nvcc must be there.

The library links the CUDA runtime statically and registers its operators through the LibTorch stable ABI.
"""

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# machine code for 8.0 (and 8.6, 8.9) and for 9.0, which has clusters; later GPUs compile PTX
ARCHITECTURES = ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_90,code=compute_90"]
TORCH_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"


def command(target: Path) -> list[str]:
    from torch.utils.cpp_extension import include_paths, library_paths

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("fastgen: nvcc was not found")
    sources = [*sorted(HERE.glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    return [
        nvcc, "-shared", "-cudart", "static", "-std=c++20", "-O3", "-Werror", "all-warnings", "-Xptxas", "-warn-spills",
        "-Xcompiler", "-fPIC,-fvisibility=hidden", TORCH_ABI, *(f"-gencode={a}" for a in ARCHITECTURES),
        *(f"-isystem={p}" for p in include_paths()), *map(str, sources),
        *(f"-L{p}" for p in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", "-o", str(target),
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(subprocess.run(command(Path(sys.argv[1]))).returncode)
