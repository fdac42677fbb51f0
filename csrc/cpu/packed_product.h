// Products of a packed weight matrix with a few vectors.
#pragma once

#include "integer_pairs.h"
#include "packed_inputs.h"

namespace fastgen {
namespace {

constexpr int kPanelColumns = kVectorRegisters == 32 ? 6 : 3;  // columns that share one pass over a panel
constexpr int kFetched = 1024;                                 // pairs of weights by which they are asked for ahead

// How many of a panel's vectors of rows are multiplied with a number of columns at once: the sums of a few columns and
// all rows fill the registers; with more columns, half the rows, so that fewer weights are loaded for each product.
template <class Sums>
constexpr int rows_at_once(int vectors, int columns) {
  constexpr int kRegisters = sizeof(Sums) / sizeof(VecF);
  while (columns * vectors * kRegisters > kVectorRegisters * 3 / 4 && vectors > 1) vectors /= 2;
  return vectors;
}

// y[s] = init[s] + panel * x[s] for NS columns, from the first on, and a panel of Width vectors of rows. Several sums
// per output hide the latency of the multiply-adds where there are few outputs.
template <int Width, int NS>
void panel_product(const float* panel, int k, const Inputs<float>& x, int block, int first, const float* const* init,
                   float* const* y, int row) {
  constexpr int NV = rows_at_once<VecF>(Width, NS), kSplit = std::max(8 / (NS * NV), 1), kNext = Width * kF;
  for (int part = 0; part < Width; part += NV, row += NV * kF) {
    const float* w = panel + part * kF;
    VecF sum[kSplit][NS][NV] = {};
    unroll<NS>([&](auto s) FASTGEN_INLINE {
      unroll<NV>([&](auto v) FASTGEN_INLINE { sum[0][s][v] = load(init[first + s] + row + v * kF); });
    });
    int c = 0;
    for (; c + kSplit <= k; c += kSplit, w += kSplit * kNext)
      unroll<kSplit>([&](auto q) FASTGEN_INLINE {
        VecF at[NS];
        unroll<NS>([&](auto s) FASTGEN_INLINE { at[s] = splat(x.at(first + s, block)[c + q]); });
        unroll<NV>([&](auto v) FASTGEN_INLINE {
          const VecF weight = load(w + q * kNext + v * kF);
          unroll<NS>([&](auto s) FASTGEN_INLINE { sum[q][s][v] += weight * at[s]; });
        });
      });
    for (; c < k; ++c, w += kNext)
      unroll<NV>([&](auto v) FASTGEN_INLINE {
        unroll<NS>([&](auto s) FASTGEN_INLINE { sum[0][s][v] += load(w + v * kF) * x.at(first + s, block)[c]; });
      });
    unroll<NS>([&](auto s) FASTGEN_INLINE {
      unroll<NV>([&](auto v) FASTGEN_INLINE {
        unroll<kSplit - 1>([&](auto q) FASTGEN_INLINE { sum[0][s][v] += sum[q + 1][s][v]; });
        store(y[first + s] + row + v * kF, sum[0][s][v]);
      });
    });
  }
}

#if defined(__AVX512BW__)
// The fourth of four vectors of weights, from the lowest bytes of the words of the other three.
inline VecU fourth_weights(VecU a, VecU b, VecU c) {
  const auto moved = [](VecU words, int to) FASTGEN_INLINE {  // the lowest byte of each word; the rest is zero
    const uint32_t from = ~(0xffu << 8 * to) & 0x80808080u;
    const __m512i lanes = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 4 << 8 * to, 8 << 8 * to, 12 << 8 * to));
    return _mm512_shuffle_epi8((__m512i)words, _mm512_or_si512(lanes, _mm512_set1_epi32(static_cast<int>(from))));
  };
  return (VecU)moved(a, 3) | (VecU)moved(b, 2) | (VecU)moved(c, 1);
}

// The same for words that vectors of rows share.
template <int Width, int NS>
void panel_product(const Int24* panel, int k, const Inputs<Int24>& x, int block, int first, const float* const* init,
                   float* const* y, int row) {
  constexpr int NV = rows_at_once<VecF>(Width, NS), kSplit = std::max(8 / (NS * NV), 1);
  constexpr int kNext = (Width >= 4 ? Width / 4 * 3 : Width) * kF;
  const auto* words = reinterpret_cast<const uint32_t*>(panel);
  const auto* units = reinterpret_cast<const float*>(words + int64_t{k} * kNext);
  for (int part = 0; part < Width; part += NV, row += NV * kF) {
    const uint32_t* w = words + part / 4 * 3 * kF;
    VecF sum[kSplit][NS][NV] = {};
    const auto add = [&](const uint32_t* w, int c, auto q) FASTGEN_INLINE {
      VecF at[NS];
      unroll<NS>([&](auto s) FASTGEN_INLINE { at[s] = splat(x.at(first + s, block)[c]) * 0x1p-31f; });
      const auto multiply = [&](VecU weights, auto v) FASTGEN_INLINE {
        const VecF weight = __builtin_convertvector((VecI)weights, VecF);
        unroll<NS>([&](auto s) FASTGEN_INLINE { sum[q][s][v] += weight * at[s]; });
      };
      if constexpr (Width < 4)
        unroll<NV>([&](auto v) FASTGEN_INLINE { multiply(load(w + v * kF), v); });
      else
        unroll<NV / 4>([&](auto i) FASTGEN_INLINE {
          constexpr int kFirst = 4 * i;
          VecU a = load(w + 3 * i * kF), b = load(w + (3 * i + 1) * kF), d = load(w + (3 * i + 2) * kF);
          pin(a), pin(b), pin(d);  // or the compiler loads each twice
          multiply(a, std::integral_constant<int, kFirst>{});
          multiply(b, std::integral_constant<int, kFirst + 1>{});
          multiply(d, std::integral_constant<int, kFirst + 2>{});
          multiply(fourth_weights(a, b, d), std::integral_constant<int, kFirst + 3>{});
        });
    };
    int c = 0;
    for (; c + kSplit <= k; c += kSplit, w += kSplit * kNext)
      unroll<kSplit>([&](auto q) FASTGEN_INLINE { add(w + q * kNext, c + q, q); });
    for (; c < k; ++c, w += kNext) add(w, c, std::integral_constant<int, 0>{});
    unroll<NS>([&](auto s) FASTGEN_INLINE {
      unroll<NV>([&](auto v) FASTGEN_INLINE {
        unroll<kSplit - 1>([&](auto q) FASTGEN_INLINE { sum[0][s][v] += sum[q + 1][s][v]; });
        const int at = row + v * kF;
        store(y[first + s] + at, load(init[first + s] + at) + sum[0][s][v] * load(units + (part + v) * kF));
      });
    });
  }
}
#endif

#if defined(__AVX512BW__)
// The fourth of four vectors of numbers, from the words of the other three: see share_words.
inline VecU fourth_numbers(VecU a, VecU b, VecU c) {
  const __m512i low = _mm512_slli_epi16((__m512i)a, 4), middle = _mm512_slli_epi16((__m512i)b, 8);
  return (VecU)_mm512_ternarylogic_epi64(low, middle, _mm512_slli_epi16((__m512i)c, 12), 0x96);
}
#else
inline VecU fourth_numbers(VecU a, VecU b, VecU c) {
  using Words = Vec<uint16_t>;
  return (VecU)((Words)a << 4 ^ (Words)b << 8 ^ (Words)c << 12);
}
#endif

// The same in fixed point, for one block; k is a multiple of 16. With one column it takes as long as the weights take
// to come: they are asked for well ahead, for the processor loses track of them between matrices.
template <int Width, int NS, class W>
  requires kFixed<W>
void panel_product(const W* panel, int k, const Inputs<W>& x, int block, int first, const float* const* init,
                   float* const* y, int row) {
  constexpr int NV = rows_at_once<PairSums>(Width, NS), kSplit = std::max(8 / (NS * NV), 1);
  constexpr bool kShares = kShared<W> && Width >= 4;
  constexpr int kNext = (kShares ? Width / 4 * 3 : Width) * kF;
  const auto* words = reinterpret_cast<const uint32_t*>(panel);
  const auto* units = reinterpret_cast<const float*>(words + int64_t{k} / 2 * kNext);
  for (int part = 0; part < Width; part += NV, row += NV * kF) {
    const uint32_t* w = words + (kShares ? part / 4 * 3 : part) * kF;
    PairSums sum[kSplit][NS][NV] = {};
#pragma GCC unroll 16
    for (int c = 0; c < k; c += 2 * kSplit, w += kSplit * kNext)
      unroll<kSplit>([&](auto q) FASTGEN_INLINE {
        VecU at[NS];
        unroll<NS>([&](auto s) FASTGEN_INLINE {
          uint32_t pair;
          std::memcpy(&pair, x.at(first + s, block).x + c + 2 * q, sizeof pair);
          at[s] = splat(pair);
        });
        const auto fetched = [&](int v) FASTGEN_INLINE {
          const uint32_t* from = w + q * kNext + v * kF;
          if (NS == 1 && (v * kVectorBytes) % 64 == 0) __builtin_prefetch(from + kFetched);
          return load(from);
        };
        const auto multiply = [&](VecU weights, auto v) FASTGEN_INLINE {
          unroll<NS>([&](auto s) FASTGEN_INLINE { sum[q][s][v] = add_pairs(sum[q][s][v], weights, at[s]); });
        };
        if constexpr (kShares)
          unroll<NV / 4>([&](auto i) FASTGEN_INLINE {
            constexpr int kFirst = 4 * i;
            VecU a = fetched(3 * i), b = fetched(3 * i + 1), d = fetched(3 * i + 2);
            pin(a), pin(b), pin(d);  // or the compiler loads each twice
            multiply(a, std::integral_constant<int, kFirst>{});
            multiply(b, std::integral_constant<int, kFirst + 1>{});
            multiply(d, std::integral_constant<int, kFirst + 2>{});
            multiply(fourth_numbers(a, b, d), std::integral_constant<int, kFirst + 3>{});
          });
        else
          unroll<NV>([&](auto v) FASTGEN_INLINE { multiply(fetched(v), v); });
      });
    unroll<NS>([&](auto s) FASTGEN_INLINE {
      unroll<NV>([&](auto v) FASTGEN_INLINE {
        unroll<kSplit - 1>([&](auto q) FASTGEN_INLINE { sum[0][s][v] += sum[q + 1][s][v]; });
        const VecF weighted = __builtin_convertvector((VecI)total(sum[0][s][v]), VecF) * load(units + (part + v) * kF);
        const int at = row + v * kF;
        store(y[first + s] + at, load(init[first + s] + at) + weighted * x.at(first + s, block).unit);
      });
    });
  }
}

// panel_product for each width (1 to 4, and a panel's) and number of columns.
template <class W>
using PanelProduct = void (*)(const W*, int, const Inputs<W>&, int, int, const float* const*, float* const*, int);
template <class W, int... NS>
constexpr std::array<std::array<PanelProduct<W>, 5>, kPanelColumns> panel_products(std::integer_sequence<int, NS...>) {
  return {{{panel_product<1, NS + 1>, panel_product<2, NS + 1>, panel_product<3, NS + 1>, panel_product<4, NS + 1>,
            panel_product<kPanelVectors<W>, NS + 1>}...}};
}
template <class W>
constexpr auto kPanelProducts = panel_products<W>(std::make_integer_sequence<int, kPanelColumns>{});

// Some rows of a matrix, or of a column, from one panel to another.
struct Rows {
  int begin = 0, end = std::numeric_limits<int>::max();
  int count() const { return end - begin; }
  bool hold(int row) const { return row >= begin && row < end; }
};

// y[s] = init[s] + matrix * x[s], of the rows asked for. Every init[s] and y[s] holds padded_rows values.
template <class W>
void product(const PackedMatrix<W>& m, const Inputs<W>& x, const float* const* init, float* const* y, int columns,
             Rows rows = {}) {
  int64_t far = 16 << 10;  // bytes by which weights are asked for ahead
  const auto* w = reinterpret_cast<const uint8_t*>(m.data);
  const int groups = (columns + kPanelColumns - 1) / kPanelColumns;
  // where the columns' products take longer than one row of weights takes to come, the next ones come meanwhile
  const bool ahead = m.far && (kFixed<W> ? columns : groups) > 1;
  // in a block beyond the rows asked for come those of the next one
  const uint8_t* end = nullptr;
  int64_t left_out = 0;
  // some inputs of a panel
  const auto multiply = [&](int row, int vectors, int block, int k, const float* const* from) {
    const int bytes = vectors * kF * m.row_bytes(vectors, k);
    for (int g = 0, s = 0; g < groups && rows.hold(row); ++g) {
      const int n = (columns - s) / (groups - g);  // sizes as equal as possible: 4 columns are 2 + 2, not 3 + 1
      if (ahead)
        for (int i = bytes / groups * g; i < bytes / groups * (g + 1); i += 64) {
          const uint8_t* next = w + far + i;
          __builtin_prefetch(end && next >= end ? next + left_out : next);
        }
      kPanelProducts<W>[n - 1][std::min(vectors, 5) - 1](reinterpret_cast<const W*>(w), k, x, block, s, from, y, row);
      s += n;
    }
    w += bytes;
  };
  if constexpr (kFixed<W>) {
    int block = 0;
    m.for_each_block([&](int, int k) {
      if (rows.end < m.padded_rows() || rows.begin > 0) {
        const int64_t row_bytes = m.row_bytes(m.panel_vectors(), k);
        const int last = std::min(rows.end, m.padded_rows());
        end = w + last * row_bytes;
        far = std::min(far, (last - rows.begin) * row_bytes);  // no further than in the next block
        left_out = (m.padded_rows() - last + rows.begin) * row_bytes;
      }
      m.for_each_panel([&](int row, int vectors) { multiply(row, vectors, block, k, block > 0 ? y : init); });
      ++block;
    });
  } else {
    // with many columns some inputs at a time, whose weights stay in the nearest cache
    const int most = groups > 1 && !kShared<W> ? kBlock : std::max(m.k, 1);
    m.for_each_panel([&](int row, int vectors) {
      for (int k = 0; k < m.k; k += most) multiply(row, vectors, k / most, std::min(most, m.k - k), k > 0 ? y : init);
    });
  }
}

}  // namespace
}  // namespace fastgen
