// Products of a packed weight matrix with a few vectors, for generation, where each weight is read once for each
// sample.
//
// Rows (outputs) lie in the lanes. A matrix is cut into panels of a few vectors of rows, and each panel is stored in
// the order in which it is read: [k][row] for float32 weights, [k / 2][row][2] for bfloat16, so that one load brings
// both k's of a pair. Activations and sums are float32.
//
// A pair of bfloat16 weights is one 32-bit word: shifted left it is the first weight as float32, and read as it stands
// it is the second, with the first's bits as the tail of its mantissa. Packing rounds the second with that tail in
// mind, so that it is as near to the true weight as bfloat16 allows, and no instruction is spent on clearing it. With
// dot products of pairs both are plain bfloat16, and the activations are rounded likewise.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace fastgen {
namespace {

constexpr int kPanelVectors = kVectorRegisters == 32 ? 8 : 4;
constexpr int kPanelColumns = kVectorRegisters == 32 ? 3 : 2;  // columns that share one pass over a panel
constexpr int kPrefetch = 1024;  // bf16 weights ahead; float32 ones already come as fast as the cache gives them
#if defined(__AVX512BF16__)
constexpr bool kDotPairs = true;
#else
constexpr bool kDotPairs = false;
#endif

template <class W>
constexpr int kMultiple = sizeof(W) == 2 ? 4 : 1;  // k is padded to it

// A matrix of `rows` x `k` in units of W; rows are padded to whole vectors.
template <class W>
struct PackedMatrix {
  int rows = 0, k = 0;
  const W* data = nullptr;

  int padded_rows() const { return static_cast<int>(round_up(rows, kF)); }
  int padded_k() const { return static_cast<int>(round_up(k, kMultiple<W>)); }
  int64_t size() const { return round_up(static_cast<int64_t>(padded_rows()) * padded_k(), 64); }
};

// The upper half of the float32 nearest to f among those whose lower half is `tail`. Never a denormal, which would cost
// a multiply-add a hundred cycles: a weight of zero becomes 1e-38.
inline uint16_t to_bf16_with_tail(float f, uint16_t tail) {
  const uint16_t rounded = to_bf16(f);
  uint16_t best = static_cast<uint16_t>((rounded & 0x8000) | 0x0080);
  float least = INFINITY;
  for (int step = -1; step <= 1; ++step) {
    const uint16_t upper = static_cast<uint16_t>(rounded + step);
    if ((upper & 0x7f80) == 0) continue;
    const uint32_t word = static_cast<uint32_t>(upper) << 16 | tail;
    float candidate;
    std::memcpy(&candidate, &word, 4);
    if (std::fabs(candidate - f) < least) {
      least = std::fabs(candidate - f);
      best = upper;
    }
  }
  return best;
}

// weight(row, k) -> panels.
template <class W, class F>
void pack_matrix(const PackedMatrix<W>& m, W* out, F&& weight) {
  for (int first = 0; first < m.padded_rows(); first += kPanelVectors * kF) {
    const int width = std::min(kPanelVectors * kF, m.padded_rows() - first);
    const auto at = [&](int r, int k) { return first + r < m.rows && k < m.k ? weight(first + r, k) : 0.0f; };
    for (int k = 0; k < m.padded_k(); k += sizeof(W) == 2 ? 2 : 1)
      for (int r = 0; r < width; ++r) {
        if constexpr (sizeof(W) == 2) {
          const uint16_t even = to_bf16(at(r, k));
          *out++ = even;
          *out++ = kDotPairs ? to_bf16(at(r, k + 1)) : to_bf16_with_tail(at(r, k + 1), even);
        } else {
          *out++ = at(r, k);
        }
      }
  }
}

// y[s] = init[s] + panel * x[s] for NS columns and NV vectors of rows. Several sums per output hide the latency of the
// multiply-adds where there are few outputs.
template <int NV, int NS>
void panel_product(const float* w, int k, const float* const* x, const float* const* init, float* const* y, int row) {
  constexpr int kSplit = NS * NV >= 8 ? 1 : 8 / (NS * NV);
  VecF sum[kSplit][NS][NV] = {};
#pragma GCC unroll 8
  for (int s = 0; s < NS; ++s)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[0][s][v] = load(init[s] + row + v * kF);
  int c = 0;
  for (; c + kSplit <= k; c += kSplit, w += kSplit * NV * kF)
#pragma GCC unroll 8
    for (int q = 0; q < kSplit; ++q)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const VecF weight = load(w + (q * NV + v) * kF);
#pragma GCC unroll 8
        for (int s = 0; s < NS; ++s) sum[q][s][v] += weight * x[s][c + q];
      }
  for (; c < k; ++c, w += NV * kF)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v)
#pragma GCC unroll 8
      for (int s = 0; s < NS; ++s) sum[0][s][v] += load(w + v * kF) * x[s][c];
#pragma GCC unroll 8
  for (int s = 0; s < NS; ++s)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 8
      for (int q = 1; q < kSplit; ++q) sum[0][s][v] += sum[q][s][v];
      store(y[s] + row + v * kF, sum[0][s][v]);
    }
}

// Each word shifted left by 16, with a shift or a byte shuffle, whichever execution port the multiply-adds leave free:
// with 512-bit vectors both ports are shared, so alternate; with 256-bit ones the shuffles' port is idle.
inline VecF first_of_pairs(VecU pairs, int vector) {
#if defined(__AVX512F__)
  const __m512i to_upper = _mm512_set1_epi32(0x01008080);
  const __m512i lanes = _mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
  return vector % 2 ? (VecF)_mm512_shuffle_epi8((__m512i)pairs, _mm512_or_si512(to_upper, lanes)) : (VecF)(pairs << 16);
#elif defined(__AVX2__)
  const __m256i to_upper = _mm256_set1_epi32(0x01008080);
  const __m256i lanes = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
  (void)vector;
  return (VecF)_mm256_shuffle_epi8((__m256i)pairs, _mm256_or_si256(to_upper, lanes));
#else
  (void)vector;
  return (VecF)(pairs << 16);
#endif
}

// The same for bfloat16 weights; k is even.
using Activation16 = std::conditional_t<kDotPairs, uint16_t, float>;

template <int NV, int NS>
void panel_product(const uint16_t* w, int k, const Activation16* const* x, const float* const* init, float* const* y,
                   int row) {
  constexpr int kSplit = NS * NV >= 8 ? 1 : 2;
  VecF sum[kSplit][NS][NV] = {};
#pragma GCC unroll 8
  for (int s = 0; s < NS; ++s)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sum[0][s][v] = load(init[s] + row + v * kF);
#if defined(__AVX512BF16__)
  for (int c = 0; c < k; c += 2 * kSplit, w += 2 * kSplit * NV * kF)
#pragma GCC unroll 2
    for (int q = 0; q < kSplit; ++q)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) {
        const auto pairs = (__m512bh)load(reinterpret_cast<const uint32_t*>(w) + (q * NV + v) * kF);
#pragma GCC unroll 8
        for (int s = 0; s < NS; ++s) {
          int32_t pair;
          std::memcpy(&pair, x[s] + c + 2 * q, sizeof pair);
          sum[q][s][v] = (VecF)_mm512_dpbf16_ps((__m512)sum[q][s][v], pairs, (__m512bh)_mm512_set1_epi32(pair));
        }
      }
#else
  for (int c = 0; c < k; c += 2, w += 2 * NV * kF)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      __builtin_prefetch(w + 2 * v * kF + kPrefetch);
      const VecU pairs = load(reinterpret_cast<const uint32_t*>(w) + v * kF);
      const VecF even = first_of_pairs(pairs, v), odd = (VecF)pairs;
#pragma GCC unroll 8
      for (int s = 0; s < NS; ++s) {
        add_product(sum[0][s][v], splat(x[s][c]), even);
        add_product(sum[kSplit - 1][s][v], splat(x[s][c + 1]), odd);
      }
    }
#endif
#pragma GCC unroll 8
  for (int s = 0; s < NS; ++s)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      if (kSplit == 2) sum[0][s][v] += sum[kSplit - 1][s][v];
      store(y[s] + row + v * kF, sum[0][s][v]);
    }
}

// A group of up to kPanelColumns columns through all panels.
template <class W, int NS, class X>
void group_product(const PackedMatrix<W>& m, const X* const* x, const float* const* init, float* const* y) {
  const W* w = m.data;
  const int k = m.padded_k();
  int row = 0;
  for (; row + kPanelVectors * kF <= m.padded_rows(); row += kPanelVectors * kF, w += kPanelVectors * kF * int64_t{k})
    panel_product<kPanelVectors, NS>(w, k, x, init, y, row);
  switch ((m.padded_rows() - row) / kF) {
#define FASTGEN_REST(NV) \
  case NV:               \
    return panel_product<NV, NS>(w, k, x, init, y, row)
    FASTGEN_REST(1);
    FASTGEN_REST(2);
    FASTGEN_REST(3);
#if defined(__AVX512F__)
    FASTGEN_REST(4);
    FASTGEN_REST(5);
    FASTGEN_REST(6);
    FASTGEN_REST(7);
#endif
#undef FASTGEN_REST
  }
}

template <class W, class X>
void group_product(const PackedMatrix<W>& m, const X* const* x, const float* const* init, float* const* y,
                   int columns) {
  switch (columns) {
    case 1:
      return group_product<W, 1>(m, x, init, y);
    case 2:
      return group_product<W, 2>(m, x, init, y);
#if defined(__AVX512F__)
    case 3:
      return group_product<W, 3>(m, x, init, y);
#endif
  }
}

// y[s] = init[s] + matrix * x[s]. Every x[s] holds padded_k finite values, every init[s] and y[s] padded_rows.
template <class W>
void product(const PackedMatrix<W>& m, const float* const* x, const float* const* init, float* const* y, int columns) {
  // as few groups as possible, of sizes as equal as possible: 4 columns are 2 + 2, not 3 + 1
  const int groups = (columns + kPanelColumns - 1) / kPanelColumns;
  for (int g = 0, s = 0; g < groups; ++g) {
    const int n = (columns - s) / (groups - g);
#if defined(__AVX512BF16__)
    if constexpr (sizeof(W) == 2) {
      constexpr int kMost = 1024;
      if (m.padded_k() <= kMost) {
        alignas(64) uint16_t rounded[kPanelColumns * kMost];
        const uint16_t* at[kPanelColumns];
        for (int i = 0; i < n; ++i) {
          uint16_t* to = rounded + i * round_up(m.padded_k(), 32);
          at[i] = to;
          for (int k = 0; k < m.padded_k(); k += 16)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x[s + i] + k)));
        }
        group_product<W>(m, at, init + s, y + s, n);
      }
    } else
#endif
      group_product<W>(m, x + s, init + s, y + s, n);
    s += n;
  }
}

}  // namespace
}  // namespace fastgen
