// Products of a packed weight matrix with a few vectors, for generation, where each weight is read once for each sample.
//
// Rows (outputs) lie in the lanes. A matrix is cut into panels of up to four vectors of rows, and each panel is stored in
// the order in which it is read: [k][row] for float32 weights, [k / 2][row][2] for bfloat16, so that one load brings both
// k's of a pair and a shift or a mask turns them into float32. Activations and sums are float32.
#pragma once

#include "simd.h"

namespace fastgen {
namespace {

constexpr int kPanelVectors = 4;
constexpr int kPanelColumns = kVectorRegisters == 32 ? 6 : 2;  // columns that share one pass over a panel

template <class W>
constexpr int kPair = sizeof(W) == 2 ? 2 : 1;

// A matrix of `rows` x `k` in units of W; rows are padded to whole vectors, k to whole pairs.
template <class W>
struct PackedMatrix {
  int rows = 0, k = 0;
  const W* data = nullptr;

  int padded_rows() const { return static_cast<int>(round_up(rows, kF)); }
  int padded_k() const { return static_cast<int>(round_up(k, kPair<W>)); }
  int64_t size() const { return round_up(static_cast<int64_t>(padded_rows()) * padded_k(), 64); }
};

template <class W>
inline W convert_weight(float f) {
  if constexpr (sizeof(W) == 2)
    return to_bf16(f);
  else
    return f;
}

// weight(row, k) -> panels.
template <class W, class F>
void pack_matrix(const PackedMatrix<W>& m, W* out, F&& weight) {
  for (int first = 0; first < m.padded_rows(); first += kPanelVectors * kF) {
    const int width = std::min(kPanelVectors * kF, m.padded_rows() - first);
    for (int k = 0; k < m.padded_k(); k += kPair<W>)
      for (int r = 0; r < width; ++r)
        for (int pair = 0; pair < kPair<W>; ++pair) {
          const bool inside = first + r < m.rows && k + pair < m.k;
          *out++ = convert_weight<W>(inside ? weight(first + r, k + pair) : 0.0f);
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
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[0][s][v] = load(init[s] + row + v * kF);
  int c = 0;
  for (; c + kSplit <= k; c += kSplit, w += kSplit * NV * kF)
#pragma GCC unroll 8
    for (int q = 0; q < kSplit; ++q)
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const VecF weight = load(w + (q * NV + v) * kF);
#pragma GCC unroll 8
        for (int s = 0; s < NS; ++s) sum[q][s][v] += weight * x[s][c + q];
      }
  for (; c < k; ++c, w += NV * kF)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
#pragma GCC unroll 8
      for (int s = 0; s < NS; ++s) sum[0][s][v] += load(w + v * kF) * x[s][c];
#pragma GCC unroll 8
  for (int s = 0; s < NS; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
#pragma GCC unroll 8
      for (int q = 1; q < kSplit; ++q) sum[0][s][v] += sum[q][s][v];
      store(y[s] + row + v * kF, sum[0][s][v]);
    }
}

// The same for bfloat16 weights; k is even.
template <int NV, int NS>
void panel_product(const uint16_t* w, int k, const float* const* x, const float* const* init, float* const* y,
                   int row) {
  constexpr int kSplit = NS * NV >= 8 ? 1 : 2;
  VecF sum[kSplit][NS][NV] = {};
#pragma GCC unroll 8
  for (int s = 0; s < NS; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) sum[0][s][v] = load(init[s] + row + v * kF);
  for (int c = 0; c < k; c += 2, w += 2 * NV * kF)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      VecU pair;
      std::memcpy(&pair, w + 2 * v * kF, sizeof pair);
      const VecF even = (VecF)(pair << 16), odd = (VecF)(pair & 0xffff0000u);
#pragma GCC unroll 8
      for (int s = 0; s < NS; ++s) {
        sum[0][s][v] += even * x[s][c];
        sum[kSplit - 1][s][v] += odd * x[s][c + 1];
      }
    }
#pragma GCC unroll 8
  for (int s = 0; s < NS; ++s)
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      if (kSplit == 2) sum[0][s][v] += sum[kSplit - 1][s][v];
      store(y[s] + row + v * kF, sum[0][s][v]);
    }
}

template <class W, int NV>
void panel_columns(const W* w, int k, const float* const* x, const float* const* init, float* const* y, int row,
                   int columns) {
  for (int s = 0; s < columns; s += kPanelColumns) {
    switch (std::min(kPanelColumns, columns - s)) {
      case 1:
        panel_product<NV, 1>(w, k, x + s, init + s, y + s, row);
        break;
      case 2:
        panel_product<NV, 2>(w, k, x + s, init + s, y + s, row);
        break;
#if defined(__AVX512F__)
      case 3:
        panel_product<NV, 3>(w, k, x + s, init + s, y + s, row);
        break;
      case 4:
        panel_product<NV, 4>(w, k, x + s, init + s, y + s, row);
        break;
      case 5:
        panel_product<NV, 5>(w, k, x + s, init + s, y + s, row);
        break;
      default:
        panel_product<NV, 6>(w, k, x + s, init + s, y + s, row);
#endif
    }
  }
}

// y[s] = init[s] + matrix * x[s]. Every x[s] holds padded_k finite values, every init[s] and y[s] padded_rows.
template <class W>
void product(const PackedMatrix<W>& m, const float* const* x, const float* const* init, float* const* y, int columns) {
  const W* w = m.data;
  for (int row = 0; row < m.padded_rows(); row += kPanelVectors * kF) {
    const int vectors = std::min(kPanelVectors, (m.padded_rows() - row) / kF);
    const int k = m.padded_k();
    switch (vectors) {
      case 1:
        panel_columns<W, 1>(w, k, x, init, y, row, columns);
        break;
      case 2:
        panel_columns<W, 2>(w, k, x, init, y, row, columns);
        break;
      case 3:
        panel_columns<W, 3>(w, k, x, init, y, row, columns);
        break;
      default:
        panel_columns<W, 4>(w, k, x, init, y, row, columns);
    }
    w += static_cast<int64_t>(vectors) * kF * k;
  }
}

}  // namespace
}  // namespace fastgen
