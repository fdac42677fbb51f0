// Sums of products of pairs of 16-bit integers, for which some processors have an instruction of their own (VNNI).
#pragma once

#include "simd.h"

namespace fastgen {
namespace {

// add_pairs adds a0 * b0 + a1 * b1 in each lane. NEON has no instruction for both, only for one product with each, so
// that there the two stay apart until the total is asked for.
#if defined(__aarch64__)
struct PairSums {
  int32x4_t low, high;  // lanes 0 and 1, 2 and 3
  PairSums& operator+=(const PairSums& other) {
    low += other.low;
    high += other.high;
    return *this;
  }
};
inline PairSums pair_sums(uint32_t start) {
  const auto first = (int32x4_t)VecU{start, 0, start, 0};
  return {first, first};
}
inline PairSums add_pairs(PairSums sum, VecU a, VecU b) {
  return {vmlal_s16(sum.low, vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b)),
          vmlal_high_s16(sum.high, (int16x8_t)a, (int16x8_t)b)};
}
inline VecU total(PairSums sum) { return (VecU)vpaddq_s32(sum.low, sum.high); }
#else
using PairSums = VecU;
inline PairSums pair_sums(uint32_t start) { return PairSums{} + start; }
inline PairSums add_pairs(PairSums sum, VecU a, VecU b) {
#if defined(__AVX512VNNI__)
  return (VecU)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (VecU)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__)
  return (VecU)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return sum + (VecU)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return sum + (VecU)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const VecU low = (VecU)((VecI)(a << 16) >> 16) * (VecU)((VecI)(b << 16) >> 16);
  return sum + low + (VecU)((VecI)a >> 16) * (VecU)((VecI)b >> 16);
#endif
}
inline VecU total(PairSums sum) { return sum; }
#endif

}  // namespace
}  // namespace fastgen
