// What a kernel says to the machine: to CUDA, or with FASTGEN_EMULATED to the thread-block emulator in tests/emulator,
// so that the same source runs on both. Kernels take shared memory from `Shared` and wait through these calls alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef FASTGEN_EMULATED
#include "emulator.h"
#define FASTGEN_DEVICE inline
#else
#include <cooperative_groups.h>
#define FASTGEN_DEVICE __device__ __forceinline__
#endif

namespace fastgen::device {

#ifdef FASTGEN_EMULATED

using namespace fastgen::emulator;

#else

FASTGEN_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FASTGEN_DEVICE int threads() { return static_cast<int>(blockDim.x); }
FASTGEN_DEVICE int block() { return static_cast<int>(blockIdx.x); }
FASTGEN_DEVICE void sync_block() { __syncthreads(); }
FASTGEN_DEVICE void sync_warp() { __syncwarp(); }
FASTGEN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
FASTGEN_DEVICE float shuffle_xor(float v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
FASTGEN_DEVICE float shuffle_up(float v, int lanes) { return __shfl_up_sync(0xffffffffu, v, lanes); }

// d += a b for a warp on its tensor cores: a of 16 x 16, b of 16 x 8 bfloat16, two to a register, as mma.m16n8k16 has
// them in its lanes.
using Left = uint32_t[4];
using Right = uint32_t[2];
FASTGEN_DEVICE void multiply_add(float (&d)[4], const Left& a, const Right& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same place in the shared memory of another block of the cluster.
template <class T>
FASTGEN_DEVICE T* in_block(T* p, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
#else
  return p;
#endif
}

// Flags between blocks: what was written before a store_release is seen after a wait_for that ends by it.
FASTGEN_DEVICE void wait_for(const int64_t* p, int64_t least) {
  int64_t v;
#if __CUDA_ARCH__ >= 900  // one fence at the end: with each load it would empty the nearest cache
  do asm volatile("ld.relaxed.cluster.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  while (v < least);
  asm volatile("fence.acq_rel.cluster;" ::: "memory");
#else
  do asm volatile("ld.acquire.gpu.b64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  while (v < least);
#endif
}
FASTGEN_DEVICE void store_release(int64_t* p, int64_t v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.release.cluster.b64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
#else
  asm volatile("st.release.gpu.b64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
#endif
}

// Arrays of a block's dynamic shared memory, one after the other; every thread takes the same ones in the same order.
class Shared {
 public:
  template <class T>
  FASTGEN_DEVICE T* take(int64_t n) {
    extern __shared__ __align__(16) unsigned char memory[];
    T* p = reinterpret_cast<T*>(memory + used_);
    used_ += (n * sizeof(T) + 15) / 16 * 16;
    return p;
  }

 private:
  int64_t used_ = 0;
};

#endif

}  // namespace fastgen::device
