#!/usr/bin/env bash
# Tests of the C++ kernels for ARM, run in emulation on Debian for x86: tests/arm.sh tests/test_nade.py -k ...
# Needs qemu-user-static, debootstrap, g++-aarch64-linux-gnu and .venv (make test). Into $ARM (.arm) go a Python and
# torch for ARM, 6 GB, for its wheel brings CUDA along. CPU=neoverse-n1 is a processor without products of bfloat16.
set -euo pipefail
cd "$(dirname "$0")/.."
HERE=$PWD ARM=$(realpath -m "${ARM:-.arm}")
VENV=$HERE/.venv/lib/python3.11/site-packages
PYTHON=$ARM/root/usr/include
CXX=(aarch64-linux-gnu-g++ -O3 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math
  -fno-schedule-insns -Wall -Wextra -DTORCH_TARGET_VERSION=0x020b000000000000 -I$PYTHON/python3.11 -idirafter $PYTHON
  -I$VENV/pybind11/include -isystem$VENV/torch/include -isystem$VENV/torch/include/torch/csrc/api/include)

if [ ! -e "$ARM/ready" ]; then
  mkdir -p "$ARM/root"
  debootstrap --arch=arm64 --foreign --variant=minbase --include=python3,python3-dev,libgomp1 bookworm "$ARM/root"
  for package in "$ARM"/root/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$ARM/root"; done
  # torch asks what processor it has, and would find this machine's
  mkdir -p "$ARM/root/proc"
  for i in 0 1; do
    identification=$ARM/root/sys/devices/system/cpu/cpu$i/regs/identification
    mkdir -p "$identification"
    echo 0x00000000413fd0c1 > "$identification/midr_el1"
    printf 'processor\t: %d\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\n' $i
    printf 'CPU part\t: 0xd0c\nCPU revision\t: 1\n\n'
  done > "$ARM/root/proc/cpuinfo"
  for list in present possible online; do echo 0-1 > "$ARM/root/sys/devices/system/cpu/$list"; done
  platforms=()
  for glibc in $(seq 17 28); do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
  .venv/bin/pip install --quiet --target "$ARM/site" "${platforms[@]}" --platform manylinux2014_aarch64 \
    --python-version 3.11 --only-binary=:all: "$(grep ^torch== requirements.txt)" numpy scipy pytest hypothesis
  touch "$ARM/ready"
fi

rm -rf "$ARM/tree" "$ARM/objects"
mkdir -p "$ARM/objects" "$ARM/tree"
cp -r fastgen kernels tests bench recipes README.md pyproject.toml "$ARM/tree"
rm -f "$ARM"/tree/fastgen/*.so
(cd "$ARM/objects" && printf '%s\n' "$HERE"/csrc/cpu/*.cpp | xargs -n 1 -P "$(nproc)" "${CXX[@]}" -c)
aarch64-linux-gnu-g++ -shared "$ARM"/objects/*.o -o "$ARM/tree/fastgen/_cpu_generic.so" -L"$ARM/site/torch/lib" \
  -ltorch_cpu -lc10 -Wl,--unresolved-symbols=ignore-in-shared-libs
"${CXX[@]}" -shared '-DFASTGEN_ISAS="generic"' csrc/host.cpp -o "$ARM/tree/fastgen/_host.so"

cd "$ARM/tree"
export QEMU_LD_PREFIX=$ARM/root PYTHONPATH=$ARM/tree:$ARM/site OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec qemu-aarch64-static -cpu "${CPU:-max,sve=off,sme=off}" "$ARM/root/usr/bin/python3.11" -m pytest \
  -p no:cacheprovider "$@"
