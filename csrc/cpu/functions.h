// Functions of the vectors of simd.h: exponentials, logarithms, tanh and gates; in float32 by polynomials, in float64
// by the standard library.
#pragma once

#include "elements.h"

namespace fastgen {
namespace {

// min/max that let NaN in x through, as the instructions do with their second operand.
inline VecF at_least(VecF x, float low) {
#if defined(__AVX512F__)
  return _mm512_max_ps(_mm512_set1_ps(low), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(_mm256_set1_ps(low), x);
#elif defined(__aarch64__)
  return vmaxq_f32(x, splat(low));
#else
  return x < low ? splat(low) : x;
#endif
}
inline VecF at_most(VecF x, float high) {
#if defined(__AVX512F__)
  return _mm512_min_ps(_mm512_set1_ps(high), x);
#elif defined(__AVX2__)
  return _mm256_min_ps(_mm256_set1_ps(high), x);
#elif defined(__aarch64__)
  return vminq_f32(x, splat(high));
#else
  return x > high ? splat(high) : x;
#endif
}

// max(x, 0); NaN stays.
template <class V>
inline V positive_part(V x) {
  const V zero = {};
  return x < zero ? zero : x;
}

// e^x = 2^n (1 + q), both within 2 ulp; q is small where x is (coefficients of Cephes). n comes plus kShift, which
// holds it in the low bits.
constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
inline VecF exp_fraction(VecF x, VecF& shifted) {
  shifted = x * 1.44269504088896341f + kShift;
  const VecF n = shifted - kShift;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const VecF r2 = r * r;  // pairs of terms, not one after another: what calls this waits for it
  const VecF high = (r * 1.9875691500e-4f + 1.3981999507e-3f) * r2 + (r * 8.3334519073e-3f + 4.1665795894e-2f);
  return (high * r2 + (r * 1.6666665459e-1f + 5.0000001201e-1f)) * r2 + r;
}
// power is 2^n; for x in [-87, 88].
inline void exp_parts(VecF x, VecF& power, VecF& q) {
  VecF shifted;
  q = exp_fraction(x, shifted);
  power = (VecF)(((VecU)shifted << 23) + 0x3f800000u);
}
inline VecF exp_bounded(VecF x) {
  VecF power, q;
  exp_parts(x, power, q);
  return power * (1.0f + q);
}
// e^x - 1, exact in the relative sense near zero.
inline VecF expm1_bounded(VecF x) {
  VecF power, q;
  exp_parts(x, power, q);
  return power * q + (power - 1.0f);
}

// e^x for every x: too large gives infinity, too small zero, NaN stays.
inline VecF exp_any(VecF x) {
  VecF shifted;
  const VecF q = exp_fraction(at_most(at_least(x, -104.0f), 89.0f), shifted);
#if defined(__AVX512F__)
  return _mm512_scalef_ps(1.0f + q, shifted - kShift);
#else
  const VecI n = (VecI)shifted - 0x4b400000, half = n >> 1;  // 2^n itself may lie outside the range of floats
  return (1.0f + q) * (VecF)((half + 127) << 23) * (VecF)((n - half + 127) << 23);
#endif
}
// ln(1 + x) for x in [0, 1], exact in the relative sense near zero: 2 artanh(x / (2 + x)).
inline VecF log1p_unit(VecF x) {
  const VecF w = x / (2.0f + x), w2 = w * w, w4 = w2 * w2;
  const VecF high = (w2 * (1.0f / 13) + 1.0f / 11) * w4 + (w2 * (1.0f / 9) + 1.0f / 7);
  return 2.0f * w + 2.0f * w * (w2 * (high * w4 + (w2 * (1.0f / 5) + 1.0f / 3)));
}
inline VecF tanh_of(VecF x) {
  const VecF m = expm1_bounded(-2.0f * at_most(at_least(x, -9.02f), 9.02f));
  return -m / (2.0f + m);
}
template <class F>
inline Vec<double> by_lane(Vec<double> x, F&& f) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = f(x[i]);
  return x;
}
inline Vec<double> exp_any(Vec<double> x) {
  return by_lane(x, [](double v) { return std::exp(v); });
}
inline Vec<double> log1p_unit(Vec<double> x) {
  return by_lane(x, [](double v) { return std::log1p(v); });
}
inline Vec<double> tanh_of(Vec<double> x) {
  return by_lane(x, [](double v) { return std::tanh(v); });
}

// The normal distribution's cumulative probability of x, within 1e-7 (Abramowitz and Stegun, 7.1.26), times x.
inline VecF gelu(VecF x) {
  const VecF z = at_most((VecF)((VecU)x & 0x7fffffffu), 13.0f), t = 1.0f / (1.0f + z * 0.23164189f);
  const VecF series = (((t * 1.061405429f - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f;
  const VecF tail = 0.5f * t * series * exp_bounded(-0.5f * z * z);
  return x < 0.0f ? at_least(x, -13.0f) * tail : x * (1.0f - tail);
}

// a / b for b of ordinary size, within little more than an ulp, in a third of the time of a division of 512 bits.
inline VecF quotient(VecF a, VecF b) {
#if defined(__AVX512F__)
  const VecF r = _mm512_rcp14_ps(b), q = a * r;
  return q + q * (1.0f - b * r);
#else
  return a / b;
#endif
}

// tanh(a) * sigmoid(b) with one division.
inline VecF gate(VecF a, VecF b) {
  const VecF m = expm1_bounded(-2.0f * at_most(at_least(a, -9.02f), 9.02f));
  const VecF f = exp_bounded(-at_most(at_least(b, -60.0f), 80.0f));
  return quotient(-m, (2.0f + m) * (1.0f + f));
}
// tanh(a) and sigmoid(b) apart, for the backward pass.
inline void gate_parts(VecF a, VecF b, VecF& t, VecF& s) {
  const VecF m = expm1_bounded(-2.0f * at_most(at_least(a, -9.02f), 9.02f));
  const VecF f = exp_bounded(-at_most(at_least(b, -80.0f), 80.0f));
  t = -m / (2.0f + m);
  s = 1.0f / (1.0f + f);
}
inline void gate_parts(Vec<double> a, Vec<double> b, Vec<double>& t, Vec<double>& s) {
  for (int i = 0; i < kLanes<double>; ++i) {
    t[i] = std::tanh(a[i]);
    s[i] = 1.0 / (1.0 + std::exp(-b[i]));
  }
}
inline Vec<double> gate(Vec<double> a, Vec<double> b) {
  Vec<double> t, s;
  gate_parts(a, b, t, s);
  return t * s;
}

}  // namespace
}  // namespace fastgen
