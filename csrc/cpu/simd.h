// Vectors of the width this translation unit is compiled for, with GCC's and Clang's vector extensions: one source for
// SSE2, AVX2, AVX-512 and NEON. Everything is in an anonymous namespace, so that no two instruction sets mix.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "../fastgen.h"

namespace fastgen {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

template <class T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <class T>
using Vec = typename VectorOf<T, kVectorBytes>::type;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

using VecF = Vec<float>;
using VecI = Vec<int32_t>;
using VecU = Vec<uint32_t>;
constexpr int kF = kLanes<float>;

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
// Past the caches, for results too large to be read from there: saves reading each line before it is overwritten.
template <class T>
inline void store_past_caches(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store(p, v);
#endif
}
// Makes such stores visible to other threads.
inline void fence_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
// Asks for cache lines ahead of their use: to be read, or to be written although another thread has read them.
[[gnu::always_inline]] inline void prefetch(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}
[[gnu::always_inline]] inline void own(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    const char* line = static_cast<const char*>(p) + i;
#if defined(__SSE2__)
    asm volatile("prefetchw %0" ::"m"(*line));  // the builtin does not write it without an option of its own
#else
    __builtin_prefetch(line, 1);
#endif
  }
}
// No nearer than the second-level cache: for what is needed only after much else.
inline void prefetch_to_l2(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    const char* line = static_cast<const char*>(p) + i;
#if defined(__SSE2__)
    asm volatile("prefetcht1 %0" ::"m"(*line));  // the compiler drops calls of functions whose only effect is a builtin
#else
    __builtin_prefetch(line, 0, 2);
#endif
  }
}
template <class T>
inline Vec<T> splat(T s) {
  return s - Vec<T>{};
}

// Nothing is known of v from here on but that it lies in a register of its own.
template <class V>
[[gnu::always_inline]] inline void pin(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// For lambdas: inlined whatever the compiler thinks of the size, so that what they capture can live in registers.
#define FASTGEN_INLINE __attribute__((always_inline))

// f(0) ... f(N - 1) with constant arguments, unrolled by the front end: arrays that are indexed with them live in
// registers, which loops left to the optimiser's unroller do not guarantee.
template <int N, class F>
[[gnu::always_inline]] inline void unroll(F&& f) {
  [&]<int... I>(std::integer_sequence<int, I...>)
      FASTGEN_INLINE { (f(std::integral_constant<int, I>{}), ...); }(std::make_integer_sequence<int, N>{});
}

// One bit for each lane whose sign bit is set.
template <class T>
inline uint32_t sign_bits(Vec<T> v) {
  if constexpr (sizeof(T) == 4) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)v);
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)v);
#elif defined(__aarch64__)
    return vaddvq_u32((VecU)v >> 31 << VecU{0, 1, 2, 3});
#endif
  } else {
#if defined(__AVX512F__)
    return _mm512_movepi64_mask((__m512i)v);
#elif defined(__AVX__)
    return _mm256_movemask_pd((__m256d)v);
#endif
  }
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= static_cast<uint32_t>(std::signbit(v[i])) << i;
  return bits;
}
template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
inline Vec<T> smaller(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}
// All lanes folded into each by f, in a tree.
template <class T, class F>
inline Vec<T> fold_lanes(Vec<T> v, F&& f) {
  constexpr int kN = kLanes<T>;
  unroll<std::countr_zero(unsigned{kN})>([&](auto i) FASTGEN_INLINE {
    v = f(v, [&]<int... L>(std::integer_sequence<int, L...>) FASTGEN_INLINE {
      return __builtin_shufflevector(v, v, ((L + (kN >> (i + 1))) % kN)...);
    }(std::make_integer_sequence<int, kN>{}));
  });
  return v;
}
template <class T>
inline T largest_lane(Vec<T> v) {
  return fold_lanes<T>(v, [](Vec<T> a, Vec<T> b) FASTGEN_INLINE { return larger<T>(a, b); })[0];
}
template <class T>
inline T sum_of_lanes(Vec<T> v) {
  return fold_lanes<T>(v, [](Vec<T> a, Vec<T> b) FASTGEN_INLINE { return a + b; })[0];
}

// In each lane the sum of the lanes up to it.
template <class T>
inline Vec<T> running_sums(Vec<T> v) {
  constexpr int kN = kLanes<T>;
  unroll<std::countr_zero(unsigned{kN})>([&](auto i) FASTGEN_INLINE {
    v += [&]<int... L>(std::integer_sequence<int, L...>) FASTGEN_INLINE {
      return __builtin_shufflevector(v, Vec<T>{}, (L < (1 << i) ? kN : L - (1 << i))...);
    }(std::make_integer_sequence<int, kN>{});
  });
  return v;
}

// The sum of the lanes of each vector, of rows[i] in lane i; the rows are used up.
template <class T>
inline Vec<T> sums_of_rows(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int kN = kLanes<T>;
  unroll<std::countr_zero(unsigned{kN})>([&](auto level) FASTGEN_INLINE {
    constexpr int kGroup = kN >> level, kHalf = kGroup / 2;  // lanes of a row, whose halves are added
    const auto halves = [&]<int... L>(Vec<T> a, Vec<T> b, int from, std::integer_sequence<int, L...>) FASTGEN_INLINE {
      const Vec<T> low =
          __builtin_shufflevector(a, b, (L / kGroup * kGroup + L % kHalf + (L % kGroup < kHalf ? 0 : kN))...);
      const Vec<T> high =
          __builtin_shufflevector(a, b, (L / kGroup * kGroup + L % kHalf + (L % kGroup < kHalf ? 0 : kN) + kHalf)...);
      rows[from] = low + high;
    };
    unroll<kHalf>([&](auto i)
                      FASTGEN_INLINE { halves(rows[i], rows[i + kHalf], i, std::make_integer_sequence<int, kN>{}); });
  });
  return rows[0];
}

}  // namespace
}  // namespace fastgen
