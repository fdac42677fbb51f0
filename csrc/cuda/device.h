// What a kernel says to the machine: to CUDA, or with FASTGEN_EMULATED to the thread-block emulator in tests/emulator,
// so that the same source runs on both. Kernels take shared memory from `Shared` and wait through these calls alone.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef FASTGEN_EMULATED
#include "emulator.h"
#define FASTGEN_DEVICE inline
#define FASTGEN_APART inline  // a function whose code is to stay by itself
#else
#include <cooperative_groups.h>
#define FASTGEN_DEVICE __device__ __forceinline__
#define FASTGEN_APART inline __device__ __noinline__
#endif

namespace fastgen::device {

#ifdef FASTGEN_EMULATED

using namespace fastgen::emulator;

#else

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kClusters = false;
#else
constexpr bool kClusters = true;
#endif
FASTGEN_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FASTGEN_DEVICE int threads() { return static_cast<int>(blockDim.x); }
FASTGEN_DEVICE int block() { return static_cast<int>(blockIdx.x); }
FASTGEN_DEVICE void sync_block() { __syncthreads(); }
FASTGEN_DEVICE void sync_warp() { __syncwarp(); }
FASTGEN_DEVICE void sync_half() {  // of the block's threads, the first half or the second
  const int half = threads() / 2;
  __syncwarp();
  asm volatile("bar.sync %0, %1;" ::"r"(1 + thread() / half), "r"(half) : "memory");
}
FASTGEN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
FASTGEN_DEVICE float shuffle_xor(float v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
FASTGEN_DEVICE uint32_t shuffle_xor(uint32_t v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
FASTGEN_DEVICE float shuffle_up(float v, int lanes) { return __shfl_up_sync(0xffffffffu, v, lanes); }
FASTGEN_DEVICE float shuffle_from(float v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
FASTGEN_DEVICE int sum_in_warp(int v) { return __reduce_add_sync(0xffffffffu, v); }
FASTGEN_DEVICE float most_in_warp(float v) {  // by the order of the bits of floats, those below zero turned
  int bits = __float_as_int(v);
  bits = __reduce_max_sync(0xffffffffu, bits ^ (bits >> 31 & 0x7fffffff));
  return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
}

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

// A message to a block of a cluster: words that `post` sends, each with its arrival, which counts their bytes. The
// block says with `expect`, by one thread and once for each message, how many come; all its threads `await` them,
// `parity`: the message's number modulo 2. Where there are no clusters a block only tells itself.
using Arrival = uint64_t;
FASTGEN_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
FASTGEN_DEVICE void begin_arrival([[maybe_unused]] Arrival* a) {  // by one thread; then sync_cluster
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(a)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
FASTGEN_DEVICE void expect([[maybe_unused]] Arrival* a, [[maybe_unused]] int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes)
               : "memory");
#endif
}
FASTGEN_DEVICE void await([[maybe_unused]] Arrival* a, [[maybe_unused]] int parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred came;\nagain: mbarrier.try_wait.parity.shared::cta.b64 came, [%0], %1;\n"
      "@!came bra again;\n}" ::"r"(shared_address(a)),
      "r"(parity)
      : "memory");
#else
  __syncthreads();
#endif
}
template <class T>
FASTGEN_DEVICE void post(T* to, T v, [[maybe_unused]] Arrival* a, [[maybe_unused]] int rank) {
  static_assert(sizeof(T) == 4);
#if __CUDA_ARCH__ >= 900
  uint32_t word, there, arrival;
  memcpy(&word, &v, 4);
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(arrival) : "r"(shared_address(a)), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(there), "r"(word),
               "r"(arrival)
               : "memory");
#else
  *to = v;
#endif
}

// Four words that lie one after the other, from a multiple of 16 bytes on, in clusters alone.
FASTGEN_DEVICE void post_four([[maybe_unused]] uint32_t* to, [[maybe_unused]] const uint32_t (&v)[4],
                              [[maybe_unused]] Arrival* a, [[maybe_unused]] int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t there, arrival;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(arrival) : "r"(shared_address(a)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(there),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(arrival)
      : "memory");
#endif
}

// 2^v, e^v and a / b; good to some units in the last place, e^v to 1e-7 of |v| more; zero below 1e-38.
FASTGEN_DEVICE float quick_exp2(float v) {
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(v));
  return v;
}
FASTGEN_DEVICE float quick_exp(float v) { return quick_exp2(v * 1.4426950408889634f); }
FASTGEN_DEVICE float quick_divide(float a, float b) {
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(b) : "f"(b));
  return a * b;
}

// The bfloat16 nearest to v, and the one nearest to what remains.
FASTGEN_DEVICE void split(float v, uint16_t* high, uint16_t* low) {
  uint32_t bits;  // in the upper half
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(v), "f"(0.0f));
  *high = static_cast<uint16_t>(bits >> 16);
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(0.0f), "f"(v - __uint_as_float(bits)));
  *low = static_cast<uint16_t>(bits);
}

// The same for two numbers that lie side by side.
FASTGEN_DEVICE void split(const float (&v)[2], uint16_t* high, uint16_t* low) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(v[1]), "f"(v[0]));
  *reinterpret_cast<uint32_t*>(high) = bits;
  const float rest = v[0] - __uint_as_float(bits << 16), more = v[1] - __uint_as_float(bits & 0xffff0000u);
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(more), "f"(rest));
  *reinterpret_cast<uint32_t*>(low) = bits;
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
