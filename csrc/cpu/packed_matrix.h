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

#include "simd.h"

namespace fastgen {
namespace {

constexpr int kPanelVectors = kVectorRegisters == 32 ? 8 : 4;
constexpr int kPanelColumns = kVectorRegisters == 32 ? 6 : 2;  // columns that share one pass over a panel
constexpr int kPrefetch =
    512;  // pairs of bf16 weights ahead; float32 ones already come as fast as the cache gives them
#if defined(__AVX512BF16__)
constexpr bool kDotPairs = true;
#else
constexpr bool kDotPairs = false;
#endif
#if defined(__AMX_BF16__)
constexpr bool kTiles = true;  // matrix tiles of 16 columns, for bfloat16 weights
#else
constexpr bool kTiles = false;
#endif

template <class W>
constexpr int kMultiple = sizeof(W) == 4 ? 1
                          : kTiles       ? 32
                                         : 4;  // k is padded to it

// A matrix of `rows` x `k` in units of W; rows are padded to whole vectors.
template <class W>
struct PackedMatrix {
  int rows = 0, k = 0;
  const W* data = nullptr;

  int padded_rows() const { return static_cast<int>(round_up(rows, kF)); }
  int padded_k() const { return static_cast<int>(round_up(k, kMultiple<W>)); }
  int64_t size() const { return round_up(static_cast<int64_t>(padded_rows()) * padded_k(), 64); }
};

// The upper half of the float32 nearest to f among those whose lower half is `tail`. At least 2^-64 in magnitude, which
// stands for zero: a denormal, or sums that become denormal, would cost a hundred cycles a multiply-add.
inline uint16_t to_bf16_with_tail(float f, uint16_t tail) {
  constexpr uint16_t kExponent = 0x7f80, kLeast = 0x1f80;  // the exponent's bits; those of 2^-64
  const uint16_t rounded = to_bf16(f);
  uint16_t best = static_cast<uint16_t>((rounded & 0x8000) | kLeast);
  float least = INFINITY;
  for (int step = -1; step <= 1; ++step) {
    const uint16_t upper = static_cast<uint16_t>(rounded + step);
    if ((upper & kExponent) < kLeast) continue;
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

// y[s] = init[s] + panel * x[s] for NS columns and NV vectors of rows, of the `width` that lie side by side in the
// panel. Several sums per output hide the latency of the multiply-adds where there are few outputs.
template <int NV, int NS>
void panel_product(const float* w, int width, int k, const float* const* x, const float* const* init, float* const* y,
                   int row) {
  constexpr int kSplit = NS * NV >= 8 ? 1 : 8 / (NS * NV);
  VecF sum[kSplit][NS][NV] = {};
  unroll<NS>([&](auto s) FASTGEN_INLINE {
    unroll<NV>([&](auto v) FASTGEN_INLINE { sum[0][s][v] = load(init[s] + row + v * kF); });
  });
  const int next = width * kF;
  int c = 0;
  for (; c + kSplit <= k; c += kSplit, w += kSplit * next)
    unroll<kSplit>([&](auto q) FASTGEN_INLINE {
      VecF at[NS];
      unroll<NS>([&](auto s) FASTGEN_INLINE { at[s] = splat(x[s][c + q]); });
      unroll<NV>([&](auto v) FASTGEN_INLINE {
        const VecF weight = load(w + q * next + v * kF);
        unroll<NS>([&](auto s) FASTGEN_INLINE { sum[q][s][v] += weight * at[s]; });
      });
    });
  for (; c < k; ++c, w += next)
    unroll<NV>([&](auto v) FASTGEN_INLINE {
      unroll<NS>([&](auto s) FASTGEN_INLINE { sum[0][s][v] += load(w + v * kF) * x[s][c]; });
    });
  unroll<NS>([&](auto s) FASTGEN_INLINE {
    unroll<NV>([&](auto v) FASTGEN_INLINE {
      unroll<kSplit - 1>([&](auto q) FASTGEN_INLINE { sum[0][s][v] += sum[q + 1][s][v]; });
      store(y[s] + row + v * kF, sum[0][s][v]);
    });
  });
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
void panel_product(const uint16_t* w, int width, int k, const Activation16* const* x, const float* const* init,
                   float* const* y, int row) {
  constexpr int kSplit = NS * NV >= 8 ? 1 : 2;
  VecF sum[kSplit][NS][NV] = {};
  unroll<NS>([&](auto s) FASTGEN_INLINE {
    unroll<NV>([&](auto v) FASTGEN_INLINE { sum[0][s][v] = load(init[s] + row + v * kF); });
  });
  const auto* words = reinterpret_cast<const uint32_t*>(w);
  const int next = width * kF;
#if defined(__AVX512BF16__)
  for (int c = 0; c < k; c += 2 * kSplit, words += kSplit * next)
    unroll<kSplit>([&](auto q) FASTGEN_INLINE {
      unroll<NV>([&](auto v) FASTGEN_INLINE {
        const uint32_t* from = words + q * next + v * kF;
        __builtin_prefetch(from + kPrefetch);
        const auto pairs = (__m512bh)load(from);
        unroll<NS>([&](auto s) FASTGEN_INLINE {
          int32_t pair;
          std::memcpy(&pair, x[s] + c + 2 * q, sizeof pair);
          sum[q][s][v] = (VecF)_mm512_dpbf16_ps((__m512)sum[q][s][v], pairs, (__m512bh)_mm512_set1_epi32(pair));
        });
      });
    });
#else
  for (int c = 0; c < k; c += 2, words += next) {
    VecF even_x[NS], odd_x[NS];
    unroll<NS>([&](auto s) FASTGEN_INLINE {
      even_x[s] = splat(x[s][c]);
      odd_x[s] = splat(x[s][c + 1]);
    });
    unroll<NV>([&](auto v) FASTGEN_INLINE {
      __builtin_prefetch(words + v * kF + kPrefetch);
      const VecU pairs = load(words + v * kF);
      const VecF even = first_of_pairs(pairs, v), odd = (VecF)pairs;
      unroll<NS>([&](auto s) FASTGEN_INLINE {
        sum[kSplit - 1][s][v] += odd * odd_x[s];
        sum[0][s][v] = add_product(sum[0][s][v], even_x[s], even);
      });
    });
  }
#endif
  unroll<NS>([&](auto s) FASTGEN_INLINE {
    unroll<NV>([&](auto v) FASTGEN_INLINE {
      if constexpr (kSplit == 2) sum[0][s][v] += sum[1][s][v];
      store(y[s] + row + v * kF, sum[0][s][v]);
    });
  });
}

// A group of NS columns through all panels. Up to three fill the registers with the sums of a whole panel's rows; more
// take the panel in two halves, so that fewer weights are loaded for each multiply-add.
template <class W, int NS, class X>
void group_product(const PackedMatrix<W>& m, const X* const* x, const float* const* init, float* const* y) {
  constexpr int kStep = NS > 3 ? kPanelVectors / 2 : kPanelVectors;
  constexpr int kUnits = sizeof(W) == 2 ? 2 : 1;  // weights in a lane
  const W* w = m.data;
  const int k = m.padded_k();
  for (int row = 0; row < m.padded_rows();) {
    const int width = std::min(kPanelVectors, (m.padded_rows() - row) / kF);
    for (int v = 0; v < width; v += kStep) switch (std::min(kStep, width - v)) {
#define FASTGEN_PANEL(NV)                                                                                      \
  case NV:                                                                                                     \
    if constexpr (NV <= kStep) panel_product<NV, NS>(w + kUnits * v * kF, width, k, x, init, y, row + v * kF); \
    break
        FASTGEN_PANEL(1);
        FASTGEN_PANEL(2);
        FASTGEN_PANEL(3);
        FASTGEN_PANEL(4);
        FASTGEN_PANEL(5);
        FASTGEN_PANEL(6);
        FASTGEN_PANEL(7);
        FASTGEN_PANEL(8);
#undef FASTGEN_PANEL
      }
    row += width * kF;
    w += int64_t{width} * kF * k;
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
    case 4:
      return group_product<W, 4>(m, x, init, y);
    case 5:
      return group_product<W, 5>(m, x, init, y);
    case 6:
      return group_product<W, 6>(m, x, init, y);
#endif
  }
}

#if defined(__AVX512BF16__)
constexpr int kMostRounded = 1024;  // k up to which activations are rounded on the stack

// Columns rounded to bfloat16, one after the other.
inline void round_columns(const float* const* x, int columns, int k, int stride, uint16_t* to) {
  for (int s = 0; s < columns; ++s)
    for (int c = 0; c < k; c += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + s * stride + c),
                          (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x[s] + c)));
}
#endif

#if defined(__AMX_BF16__)
constexpr int kTileColumns = 16;

// Tiles 0 to 3 hold sums, 4 activations (16 columns x 32 k), 5 to 7 weights (16 pairs of k x 16 rows).
struct TileScope {
  TileScope() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
};

template <int NV>
void panel_tiles(const uint16_t* w, int k, const uint16_t* x, int stride, int columns, const float* const* init,
                 float* const* y, int row) {
  alignas(64) float sums[4][kTileColumns][kF];
  for (int first = 0; first < NV; first += 4) {
    const int n = std::min(4, NV - first);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int c = 0; c < k; c += 32) {
      const uint16_t* from = w + (int64_t{c} * NV + 2 * first) * kF;
      _tile_loadd(4, x + c, stride * 2);
      _tile_loadd(5, from, NV * 64);
      _tile_dpbf16ps(0, 4, 5);
      if (n > 1) {
        _tile_loadd(6, from + 2 * kF, NV * 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      if (n > 2) {
        _tile_loadd(7, from + 4 * kF, NV * 64);
        _tile_dpbf16ps(2, 4, 7);
      }
      if (n > 3) {
        _tile_loadd(5, from + 6 * kF, NV * 64);
        _tile_dpbf16ps(3, 4, 5);
      }
    }
    _tile_stored(0, sums[0], 64);
    if (n > 1) _tile_stored(1, sums[1], 64);
    if (n > 2) _tile_stored(2, sums[2], 64);
    if (n > 3) _tile_stored(3, sums[3], 64);
    for (int s = 0; s < columns; ++s)
      for (int v = 0; v < n; ++v) {
        const int at = row + (first + v) * kF;
        store(y[s] + at, load(init[s] + at) + load(sums[v][s]));
      }
  }
}

// Up to 16 columns of activations, rounded, through all panels.
inline void tile_product(const PackedMatrix<uint16_t>& m, const uint16_t* x, int stride, int columns,
                         const float* const* init, float* const* y) {
  const uint16_t* w = m.data;
  const int k = m.padded_k();
  for (int row = 0; row < m.padded_rows();) {
    const int vectors = std::min(kPanelVectors, (m.padded_rows() - row) / kF);
    switch (vectors) {
#define FASTGEN_PANEL(NV)                                    \
  case NV:                                                   \
    panel_tiles<NV>(w, k, x, stride, columns, init, y, row); \
    break
      FASTGEN_PANEL(1);
      FASTGEN_PANEL(2);
      FASTGEN_PANEL(3);
      FASTGEN_PANEL(4);
      FASTGEN_PANEL(5);
      FASTGEN_PANEL(6);
      FASTGEN_PANEL(7);
      FASTGEN_PANEL(8);
#undef FASTGEN_PANEL
    }
    row += vectors * kF;
    w += int64_t{vectors} * kF * k;
  }
}
#else
struct TileScope {
  TileScope() {}  // nothing to configure
};
#endif

// y[s] = init[s] + matrix * x[s]. Every x[s] holds padded_k finite values, every init[s] and y[s] padded_rows.
template <class W>
void product(const PackedMatrix<W>& m, const float* const* x, const float* const* init, float* const* y, int columns) {
  constexpr int kMost = kTiles && sizeof(W) == 2 ? 16 : kPanelColumns;
  // as few groups as possible, of sizes as equal as possible: 4 columns are 2 + 2, not 3 + 1
  const int groups = (columns + kMost - 1) / kMost;
  for (int g = 0, s = 0; g < groups; ++g) {
    const int n = (columns - s) / (groups - g);
#if defined(__AVX512BF16__)
    if constexpr (sizeof(W) == 2) {
      const int k = m.padded_k(), stride = static_cast<int>(round_up(k, 32));
      alignas(64) uint16_t stack[kMost * kMostRounded];
      std::vector<uint16_t> heap(k > kMostRounded ? kMost * stride : 0);
      uint16_t* rounded = heap.empty() ? stack : heap.data();
      round_columns(x + s, n, k, stride, rounded);
#if defined(__AMX_BF16__)
      if (n > 1) {
        tile_product(m, rounded, stride, n, init + s, y + s);
        s += n;
        continue;
      }
#endif
      const uint16_t* at[kPanelColumns];
      for (int i = 0; i < std::min(n, kPanelColumns); ++i) at[i] = rounded + i * stride;
      group_product<W>(m, at, init + s, y + s, n);
    } else
#endif
      group_product<W>(m, x + s, init + s, y + s, n);
    s += n;
  }
}

}  // namespace
}  // namespace fastgen
