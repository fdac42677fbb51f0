// Elements of tensors as vectors: bfloat16 is widened to float32 and rounded back, ends of rows are parts of vectors,
// and large results go past the caches.
#pragma once

#include "simd.h"

namespace fastgen {
namespace {

inline float to_float(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float f;
  std::memcpy(&f, &word, 4);
  return f;
}
// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float f) {
  uint32_t word;
  std::memcpy(&word, &f, 4);
  if ((word & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((word >> 16) | 0x40);
  return static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}

// As many bfloat16 as a vector has floats.
using Halves = VectorOf<uint16_t, kVectorBytes / 2>::type;
template <class E>
using Stored = std::conditional_t<std::is_same_v<E, BFloat16>, Halves, Vec<ComputeType<E>>>;

inline VecF widen(Halves v) {
#if defined(__AVX512F__)
  return (VecF)((VecU)_mm512_cvtepu16_epi32((__m256i)v) << 16);  // what the compiler does in halves
#else
  return (VecF)(__builtin_convertvector(v, VecU) << 16);
#endif
}
inline Halves narrow(VecF v) {  // rounds as to_bf16
  const VecU word = (VecU)v;
  return __builtin_convertvector(v != v ? (word >> 16) | 0x40 : (word + 0x7fff + ((word >> 16) & 1)) >> 16, Halves);
}

// A vector of the compute type from or to the element type E.
template <class E>
inline Vec<ComputeType<E>> load_as(const E* p) {
  Stored<E> v;
  std::memcpy(&v, p, sizeof v);
  if constexpr (std::is_same_v<E, BFloat16>)
    return widen(v);
  else
    return v;
}
template <class E>
inline void store_as(E* p, Vec<ComputeType<E>> v) {
  if constexpr (std::is_same_v<E, BFloat16>) {
    const Halves bits = narrow(v);
    std::memcpy(static_cast<void*>(p), &bits, sizeof bits);
  } else {
    store(p, v);
  }
}
// The first `count` lanes alone; those not loaded are zero.
template <class E>
inline Vec<ComputeType<E>> load_some(const E* p, int count) {
#if defined(__AVX512BW__)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(E) == 2) return widen((Halves)_mm256_maskz_loadu_epi16(lanes, p));
  if constexpr (sizeof(E) == 4) return (Vec<ComputeType<E>>)_mm512_maskz_loadu_epi32(lanes, p);
  if constexpr (sizeof(E) == 8) return (Vec<ComputeType<E>>)_mm512_maskz_loadu_epi64(lanes, p);
#else
  E part[kLanes<ComputeType<E>>];
  std::memset(static_cast<void*>(part), 0, sizeof part);
  std::memcpy(static_cast<void*>(part), p, count * sizeof(E));
  return load_as(part);
#endif
}
template <class E>
inline void store_some(E* p, Vec<ComputeType<E>> v, int count) {
#if defined(__AVX512BW__)
  const uint32_t lanes = (1u << count) - 1;
  if constexpr (sizeof(E) == 2) _mm256_mask_storeu_epi16(p, lanes, (__m256i)narrow(v));
  if constexpr (sizeof(E) == 4) _mm512_mask_storeu_epi32(p, lanes, (__m512i)v);
  if constexpr (sizeof(E) == 8) _mm512_mask_storeu_epi64(p, lanes, (__m512i)v);
#else
  E part[kLanes<ComputeType<E>>];
  store_as(part, v);
  std::memcpy(static_cast<void*>(p), part, count * sizeof(E));
#endif
}

// f(i, n) for the vectors of [0, count): n is a constant for those that are whole.
template <class T, class F>
inline void by_vectors(int64_t count, F&& f) {
  constexpr std::integral_constant<int, kLanes<T>> kWhole{};
  int64_t i = 0;
  for (; i + kWhole <= count; i += kWhole) f(i, kWhole);
  if (i < count) f(i, static_cast<int>(count - i));
}
template <class E, int N>
inline auto take(const E* p, std::integral_constant<int, N>) {
  return load_as(p);
}
template <class E>
inline auto take(const E* p, int count) {
  return load_some(p, count);
}
template <class E, int N>
inline void put(E* p, Vec<ComputeType<E>> v, std::integral_constant<int, N>) {
  store_as(p, v);
}
template <class E>
inline void put(E* p, Vec<ComputeType<E>> v, int count) {
  store_some(p, v, count);
}

// Results larger than this are not read again from the caches: they are written past them.
constexpr int64_t kPastCaches = int64_t{32} << 20;

// A result that is written past the caches, if it is large and its place allows.
template <class E>
struct Out {
  using T = ComputeType<E>;
  E* p;
  bool past;
  Out(const Tensor& tensor, int64_t offset)
      : p(static_cast<E*>(tensor.data_ptr()) + offset),
        past(std::is_same_v<E, T> && tensor.numel() * static_cast<int64_t>(sizeof(E)) >= kPastCaches &&
             reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0) {}
  template <int N>
  void put(int64_t i, Vec<T> v, std::integral_constant<int, N>) const {
    if constexpr (std::is_same_v<E, T>)
      if (past) return store_past_caches(p + i, v);
    store_as(p + i, v);
  }
  void put(int64_t i, Vec<T> v, int count) const { store_some(p + i, v, count); }
};

// `count` values to or from the tensor's element type E; the rest of a tile is zero.
template <class T, class E>
inline void load_row(T* to, const E* from, int64_t count, int64_t tile) {
  constexpr int kL = kLanes<T>;
  const int64_t whole = count / kL * kL;
  for (int64_t i = 0; i < whole; i += kL) store(to + i, load_as(from + i));
  const int left = static_cast<int>(count - whole);
  to += whole;
  from += whole;
  tile -= whole;
  if (left > 0 && tile >= kL) {
    store(to, load_some(from, left));
    to += kL;
    tile -= kL;
  } else {
    for (int i = 0; i < left; ++i) to[i] = static_cast<T>(from[i]);
    to += left;
    tile -= left;
  }
  if (tile > 0) std::fill_n(to, tile, T(0));
}
inline void load_row(BFloat16* to, const BFloat16* from, int64_t count, int64_t tile) {
  std::memcpy(static_cast<void*>(to), from, count * sizeof(BFloat16));
  std::fill(to + count, to + tile, BFloat16(0));
}
template <class T>
inline void store_row(T* to, const T* from, int64_t count) {
  std::memcpy(to, from, count * sizeof(T));
}
inline void store_row(BFloat16* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + kF <= count; i += kF) store_as(to + i, load(from + i));
  const int left = static_cast<int>(count - i);
  if (left > 0) store_some(to + i, load_some(from + i, left), left);
}

// A result in the compute type: the tensor itself, or for bfloat16 a buffer that is rounded into it at the end.
template <class E>
class Result {
 public:
  using T = ComputeType<E>;
  explicit Result(const Tensor& tensor) : tensor_(tensor) {
    if constexpr (!std::is_same_v<E, T>) buffer_.resize(tensor.numel());
  }
  T* data() {
    if constexpr (std::is_same_v<E, T>)
      return static_cast<T*>(tensor_.data_ptr());
    else
      return buffer_.data();
  }
  void finish() {
    if constexpr (!std::is_same_v<E, T>)
      store_row(static_cast<E*>(tensor_.data_ptr()), buffer_.data(), tensor_.numel());
  }

 private:
  const Tensor& tensor_;
  std::vector<T> buffer_;
};

// One factor of products for all lanes: a vector of it, or on ARM, where multiply-adds take it from a lane, itself.
template <class T>
inline auto shared_factor(const T* p) {
#if defined(__aarch64__)
  T factor = *p;
#if defined(__clang__)
  pin(factor);  // or it is copied to all lanes as it is loaded, which costs as much as a multiply-add
#endif
  return factor;
#else
  return splat(*p);
#endif
}

// A square of lanes x lanes: blocks off the diagonal change places, ever smaller ones. put(i, row i).
template <class T, class F>
inline void transpose_square(const T* from, int64_t from_ld, F&& put) {
  constexpr int kSide = kLanes<T>;
  Vec<T> rows[kSide];
  unroll<kSide>([&](auto i) FASTGEN_INLINE { rows[i] = load(from + i * from_ld); });
  unroll<std::bit_width(static_cast<unsigned>(kSide)) - 1>([&](auto level) FASTGEN_INLINE {
    constexpr int kBlock = 1 << level;
    const auto exchange = [&]<int... L>(Vec<T>& upper, Vec<T>& lower, std::integer_sequence<int, L...>) FASTGEN_INLINE {
      const Vec<T> above = upper;
      upper = __builtin_shufflevector(above, lower, (L & kBlock ? kSide + L - kBlock : L)...);
      lower = __builtin_shufflevector(above, lower, (L & kBlock ? kSide + L : L + kBlock)...);
    };
    unroll<kSide>([&](auto i) FASTGEN_INLINE {
      if constexpr ((i & kBlock) == 0) exchange(rows[i], rows[i + kBlock], std::make_integer_sequence<int, kSide>{});
    });
  });
  unroll<kSide>([&](auto i) FASTGEN_INLINE { put(i, rows[i]); });
}
template <class T>
inline void transpose_square(const T* from, int64_t from_ld, T* to, int64_t to_ld) {
  transpose_square(from, from_ld, [&](auto i, Vec<T> row) FASTGEN_INLINE { store(to + i * to_ld, row); });
}

}  // namespace
}  // namespace fastgen
