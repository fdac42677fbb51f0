// Factors of products whose sums are of type T: T itself, one term at a time, or BFloat16, two, where the processor
// multiplies pairs of them and adds both in float32.
#pragma once

#include "../processor.h"
#include "elements.h"

namespace fastgen {
namespace {

template <class T, class S>
constexpr int kTerms = std::is_same_v<T, S> ? 1 : 2;
template <class T>
inline auto load_factors(const T* p) {
  return load(p);
}
template <class V, class A>
inline V add_product(V sum, A a, V b) {
  return sum + a * b;
}
template <class T, class V>
inline void store_factors(T* p, V v) {
  store(p, v);
}
#if defined(__AVX512VNNI__) || defined(__aarch64__)
#define FASTGEN_PAIRS
inline VecU load_factors(const BFloat16* p) {
  VecU v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// In assembly, for the rest of this library is compiled for processors without these instructions too.
#if defined(__aarch64__)
#define FASTGEN_BF16 ".arch_extension bf16\n\t"
inline float shared_factor(const BFloat16* p) {
  float pair;
  std::memcpy(&pair, p, sizeof pair);
  return pair;
}
inline VecF add_product(VecF sum, float a, VecU b) {
  asm(FASTGEN_BF16 "bfdot %0.4s, %2.8h, %1.2h[0]" : "+w"(sum) : "w"(a), "w"(b));
  return sum;
}
inline void store_factors(BFloat16* p, VecF v) {
  Halves halves;
  asm(FASTGEN_BF16 "bfcvtn %0.4h, %1.4s" : "=w"(halves) : "w"(v));
  std::memcpy(static_cast<void*>(p), &halves, sizeof halves);
}
#else
inline VecU shared_factor(const BFloat16* p) {
  uint32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return splat(pair);
}
inline VecF add_product(VecF sum, VecU a, VecU b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
inline void store_factors(BFloat16* p, VecF v) {
  __m256i halves;
  asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(v));
  std::memcpy(static_cast<void*>(p), &halves, sizeof halves);
}
#endif
#endif
// f.operator()<S>() with the factors that suit tensors of type E.
template <class E, class F>
inline void with_factors(F&& f) {
#if defined(FASTGEN_PAIRS)
  if constexpr (std::is_same_v<E, BFloat16>) {
    static const bool pairs = multiplies_pairs();
    if (pairs) return f.template operator()<BFloat16>();
  }
#endif
  f.template operator()<ComputeType<E>>();
}

}  // namespace
}  // namespace fastgen
