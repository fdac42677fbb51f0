// Products of a packed weight matrix with a few vectors, for generation, where each weight is read once for each
// sample.
//
// Rows (outputs) lie in the lanes. A matrix is cut into panels of a few vectors of rows, and each panel is stored in
// the order in which it is read. Four formats:
//   - float: [panel][k][row]. Activations and sums are float32.
//   - Int24, for float32 where the machine reads weights slower than it multiplies: whole numbers of a unit of the row,
//     its largest weight, / 2^31. Four vectors of rows are three vectors of words: the upper 24 bits of each word are a
//     weight of the first three, the lower 8 a third of the fourth's. A word is multiplied as it is; what its upper
//     bits hold takes account of the lower ones. The error of a weight is at most 2^-24 of the row's largest one, as
//     much as one rounding to float32 there. Activations and sums are float32.
//   - int16_t, for weights rounded to bfloat16: fixed point, in blocks of kBlock inputs. Within a block each row of
//     weights, and each column of activations, is a whole number of a unit of its own. Units of weights are chosen so
//     that no sum over a block leaves 32 bits: products and sums within a block are exact, and one instruction
//     multiplies and adds two inputs for each lane. Stored as [block][panel][k / 2][row][2], then the units of the
//     panel's rows. Against bfloat16 that costs nothing: for each weight as many bits are read, and the error that is
//     added, about 2^-12 of a row's typical weight, is a seventh of what rounding to bfloat16 made.
//   - Int12, the same in three quarters of the bytes, for machines with AVX-512: four vectors of rows are three vectors
//     of words, whose upper 12 bits are the first three's numbers and whose lower 4 give the fourth's. As in Int24 a
//     word is multiplied as it is. Activations have 12 bits, so that more is left for the words' sums. The error of a
//     typical weight is 2^-11 of it; with that of activations it is a third of what rounding to bfloat16 made.
#pragma once

#include <array>

#include "simd.h"

namespace fastgen {
namespace {

constexpr int kPanelVectors = 8;
constexpr int kPanelColumns = kVectorRegisters == 32 ? 6 : 3;  // columns that share one pass over a panel
constexpr int kBlock = 64;                                     // inputs that share a unit
constexpr int kFetched = 1024;                                 // pairs of weights by which they are asked for ahead

// Matrices of words that vectors of rows share.
struct Int24 {};
struct Int12 {};
template <class W>
constexpr bool kShared = std::is_same_v<W, Int24> || std::is_same_v<W, Int12>;
template <class W>
constexpr bool kFixed = std::is_same_v<W, int16_t> || std::is_same_v<W, Int12>;
// How weights are stored where each is read for a few columns alone.
using Float32Weight = std::conditional_t<kVectorBytes == 64, Int24, float>;
using BFloat16Weight = std::conditional_t<kVectorBytes == 64, Int12, int16_t>;
// The largest activation in fixed point, as a power of two.
template <class W>
constexpr int kActivationBits = kShared<W> ? 12 : 15;

// A matrix of `rows` x `k` in units of W; rows are padded to whole vectors.
template <class W>
struct PackedMatrix {
  int rows = 0, k = 0;
  const W* data = nullptr;

  int padded_rows() const { return static_cast<int>(round_up(rows, kF)); }
  int padded_k() const { return kFixed<W> ? static_cast<int>(round_up(k, 16)) : k; }
  // For each row of a block of k inputs, in a panel of so many vectors; a unit is a float.
  static int row_bytes(int vectors, int k) {
    const int words = (kFixed<W> ? 2 : 4) * k, shared = kShared<W> && vectors >= 4 ? words / 4 * 3 : words;
    return shared + (std::is_same_v<W, float> ? 0 : static_cast<int>(sizeof(float)));
  }
  int64_t bytes() const {
    int64_t n = 0;
    for_each_panel([&](int, int vectors) {
      for_each_block([&](int, int k) { n += int64_t{vectors} * kF * row_bytes(vectors, k); });
    });
    return round_up(n, 64);
  }
  // f(first input, inputs) for each block that is stored by itself.
  template <class F>
  void for_each_block(F&& f) const {
    const int most = kFixed<W> ? kBlock : std::max(k, 1);
    for (int begin = 0; begin < padded_k(); begin += most) f(begin, std::min(most, padded_k() - begin));
  }
  // f(first row, vectors of rows) for each panel: kPanelVectors, and at the end up to 4.
  template <class F>
  void for_each_panel(F&& f) const {
    for (int row = 0, width; row < padded_rows(); row += width * kF) {
      const int left = (padded_rows() - row) / kF;
      f(row, width = left >= kPanelVectors ? kPanelVectors : std::min(left, 4));
    }
  }
};

// Zeros for packed weights: on huge pages from the first byte on, also where the process' own heap has small ones.
inline Tensor packed_buffer(const Tensor& like, int64_t bytes) {
  constexpr int64_t kHuge = int64_t{2} << 20;
  Tensor buffer = large_buffer(like, {round_up(std::max<int64_t>(bytes, 1), kHuge)}, true);
  std::memset(buffer.data_ptr(), 0, buffer.numel());
  return torch::stable::narrow(buffer, 0, 0, bytes);
}

// weight(row, k) -> panels.
template <class F>
void pack_matrix(const PackedMatrix<float>& m, float* out, F&& weight) {
  m.for_each_panel([&](int first, int vectors) {
    for (int k = 0; k < m.k; ++k)
      for (int r = first; r < first + vectors * kF; ++r) *out++ = r < m.rows ? weight(r, k) : 0.0f;
  });
}

template <class F>
void pack_matrix(const PackedMatrix<Int24>& m, Int24* out, F&& weight) {
  constexpr double kMost = 2147483000;  // rounding to 24 of 32 bits stays below 2^31
  auto* word = reinterpret_cast<uint32_t*>(out);
  m.for_each_panel([&](int first, int vectors) {
    std::vector<float> units(vectors * kF, 1.0f);
    for (int r = 0; r < vectors * kF && first + r < m.rows; ++r) {
      double most = 0;
      for (int c = 0; c < m.k; ++c) most = std::max(most, std::fabs(static_cast<double>(weight(first + r, c))));
      if (most > 0) units[r] = std::max(static_cast<float>(most * (0x1p31 / kMost)), 1e-37f);
    }
    const auto in_units = [&](int r, int c) {
      return first + r < m.rows ? static_cast<int64_t>(std::llrint(weight(first + r, c) / double{units[r]} * 0x1p31))
                                : 0;
    };
    for (int c = 0; c < m.k; ++c)
      for (int v = 0; v < vectors; v += 4) {
        const int shared = vectors < 4 ? 0 : 3;  // vectors of words, for one more of rows
        for (int r = 0; r < vectors * kF && !shared; ++r) *word++ = static_cast<uint32_t>(in_units(r, c));
        for (int part = 0; part < shared; ++part)
          for (int lane = 0; lane < kF; ++lane) {
            const int64_t fourth = (in_units((v + 3) * kF + lane, c) + 128) >> 8;
            const int64_t low = (fourth >> (16 - 8 * part)) & 255;
            const int64_t high = (in_units((v + part) * kF + lane, c) - low + 128) >> 8;
            *word++ = static_cast<uint32_t>(high << 8 | low);
          }
      }
    std::memcpy(word, units.data(), units.size() * sizeof(float));
    word += units.size();
  });
}

// The words of the first three of four numbers, which give the fourth as (a << 4) ^ (b << 8) ^ (c << 12). Each number
// is met within 8.
inline std::array<int16_t, 3> share_words(const std::array<int16_t, 4>& number) {
  std::array<int16_t, 3> words;
  int fourth = (number[3] + 8) >> 4 << 4;
  for (int i = 0, shift = 4; i < 3; ++i, shift += 4) {
    const int low = (fourth >> shift) & 15;
    words[i] = static_cast<int16_t>(((number[i] - low + 8) >> 4 << 4) | low);
    fourth ^= words[i] << shift;
  }
  return words;
}

template <class W, class F>
  requires kFixed<W>
void pack_matrix(const PackedMatrix<W>& m, W* to, F&& weight) {
  // with each number's rounding, no sum over a block leaves 31 bits
  constexpr double kRounding = kShared<W> ? 8.5 : 0.5, kMost = 32767 - (kShared<W> ? 16 : 0);
  constexpr double kMostSum = (1 << (31 - kActivationBits<W>)) - kBlock * kRounding - 36;
  auto* out = reinterpret_cast<int16_t*>(to);
  m.for_each_block([&](int begin, int k) {
    m.for_each_panel([&](int first, int vectors) {
      const int width = vectors * kF;
      std::vector<int16_t> numbers(width * k);  // as they lie where words are not shared
      std::vector<float> units(width);
      for (int r = 0; r < width; ++r) {
        double row[kBlock] = {}, sum = 0, most = 0;
        for (int c = 0; c < k && first + r < m.rows && begin + c < m.k; ++c) {
          row[c] = to_float(to_bf16(weight(first + r, begin + c)));
          sum += std::fabs(row[c]);
          most = std::max(most, std::fabs(row[c]));
        }
        if (most == 0) continue;  // its unit is zero, whatever its words will hold of others' bits
        units[r] = std::max(static_cast<float>(std::max(sum / kMostSum, most / kMost)), 1e-37f);
        for (int c = 0; c < k; ++c)
          numbers[(c / 2 * width + r) * 2 + c % 2] = static_cast<int16_t>(std::lrint(row[c] / units[r]));
      }
      constexpr int kVector = 2 * kF;
      if (kShared<W> && vectors >= 4) {
        for (size_t at = 0; at < numbers.size(); at += 4 * kVector, out += 3 * kVector)
          for (int i = 0; i < kVector; ++i) {
            const int16_t* n = &numbers[at + i];
            const auto words = share_words({n[0], n[kVector], n[2 * kVector], n[3 * kVector]});
            for (int v = 0; v < 3; ++v) out[v * kVector + i] = words[v];
          }
      } else {
        out = std::copy(numbers.begin(), numbers.end(), out);
      }
      std::memcpy(out, units.data(), units.size() * sizeof(float));
      out += 2 * units.size();
    });
  });
}

// A block of activations as whole numbers of `unit`, a power of two; not a number if one of them is not finite.
template <int Bits>
struct FixedBlock {
  int16_t x[kBlock];
  float unit;

  void set(const float* from, int k) {
    set(k, [&](int c) FASTGEN_INLINE { return load(from + c); });
  }
  // value(c) is the vector of the activations from c on; k is a multiple of its lanes.
  template <class F>
  void set(int k, F&& value) {
    k == kBlock ? set_vectors(kBlock / kF, value) : set_vectors(k / kF, value);
  }

 private:
  template <class F>
  [[gnu::always_inline]] void set_vectors(int count, F& value) {
    using Narrow = VectorOf<int16_t, kVectorBytes / 2>::type;
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
    constexpr int32_t kLargest = std::bit_cast<int32_t>(kShift) + 32767;
    const auto each = [&](auto&& f) FASTGEN_INLINE {
      unroll<kBlock / kF>([&](auto i) FASTGEN_INLINE {
        if (i < count) f(i);
      });
    };
    const auto larger_of = [](VecU a, VecU b) FASTGEN_INLINE { return larger<uint32_t>(a, b); };
    VecF v[kBlock / kF];
    VecU most = {};
    each([&](auto i) FASTGEN_INLINE {
      v[i] = value(i * kF);
      most = larger_of(most, (VecU)v[i] & 0x7fffffff);
    });
    most = fold_lanes<uint32_t>(most, larger_of);
    VecU exponent = most >> 23;
    exponent = exponent > 32 ? exponent : 32 + VecU{};  // the unit is at least 2^-109
    const VecF scale = (VecF)((Bits + 253 - exponent) << 23);
    each([&](auto i) FASTGEN_INLINE {
      VecI shifted = (VecI)(v[i] * scale + kShift);
      if (Bits == 15) shifted = shifted < kLargest ? shifted : kLargest + VecI{};
      const Narrow narrow = __builtin_convertvector(shifted, Narrow);
      std::memcpy(x + i * kF, &narrow, sizeof narrow);
    });
    unit = ((VecF)((exponent - (Bits - 1)) << 23) + ((VecF)most - (VecF)most))[0];
  }
};

// Columns of activations as products take them: where they are for float32, copies in fixed point otherwise.
template <class W>
class Inputs {
 public:
  using Block = FixedBlock<kActivationBits<W>>;

  Inputs(int columns, int k)
      : blocks_((k + kBlock - 1) / kBlock),
        k_(k),
        fixed_(kFixed<W> ? columns * blocks_ : 0),
        x_(columns),
        at_(columns) {
    for (int s = 0; s < columns; ++s) place(s);
  }
  Inputs(Inputs&&) = default;

  // Column s is to be, or is already, in blocks that are kept elsewhere; or in its own ones.
  void place(int s, Block* at = nullptr) { at_[s] = at ? at : fixed_.data() + s * blocks_; }

  // x[s] holds k values, up to the next multiple of 16.
  void set(const float* const* x, int columns) {
    for (int s = 0; s < columns; ++s) set(s, x[s]);
  }
  void set(int s, const float* x) {
    if constexpr (kFixed<W>)
      fill(s, nullptr, [&](int c) FASTGEN_INLINE { return load(x + c); });
    else
      x_[s] = x;
  }
  // x[s] from vectors, value(c) of them from c on, which float32 keeps at `to`.
  template <class F>
  [[gnu::always_inline]] void fill(int s, float* to, F&& value) {
    if constexpr (kFixed<W>) {
      for (int b = 0; b < blocks_; ++b)
        at_[s][b].set(std::min(kBlock, static_cast<int>(round_up(k_ - b * kBlock, 16))),
                      [&](int c) FASTGEN_INLINE { return value(b * kBlock + c); });
    } else {
      for (int c = 0; c < k_; c += kF) store(to + c, value(c));
      x_[s] = to;
    }
  }
  // Columns [s, s + count): windows of `taps` pixels of `channels` (a multiple of 16) each, one pixel after another.
  void set_windows(int s, const float* pixels, int count, int taps, int channels) {
    if constexpr (!kFixed<W>) {
      for (int i = 0; i < count; ++i) x_[s + i] = pixels + i * channels;
    } else if (channels % kBlock == 0) {  // pixels share nothing: each is converted once
      const int pixel_blocks = channels / kBlock;
      place(s);
      for (int b = 0; b < (count + taps - 1) * pixel_blocks; ++b) at_[s][b].set(pixels + b * kBlock, kBlock);
      for (int i = 1; i < count; ++i) place(s + i, at_[s] + i * pixel_blocks);
    } else {
      const int k = taps * channels;
      for (int i = 0; i < count; ++i) {
        place(s + i);
        for (int b = 0; b * kBlock < k; ++b)
          at_[s + i][b].set(pixels + i * channels + b * kBlock, std::min(kBlock, k - b * kBlock));
      }
    }
  }
  // f(place, bytes) for each block that was copied.
  template <class F>
  void each_copy(F&& f) const {
    for (const auto& block : fixed_) f(&block, sizeof block);
  }
  decltype(auto) at(int s, int block) const {
    if constexpr (kFixed<W>)
      return (std::as_const(at_[s][block]));
    else
      return x_[s] + block * kBlock;
  }

 private:
  int blocks_, k_;
  OwnVector<Block> fixed_;
  OwnVector<const float*> x_;
  OwnVector<Block*> at_;  // where each column is
};

// How many of a panel's vectors of rows are multiplied with a number of columns at once: the sums of a few columns and
// all rows fill the registers; with more columns, half the rows, so that fewer weights are loaded for each product.
constexpr int rows_at_once(int vectors, int columns) {
  return columns * vectors > kVectorRegisters * 3 / 4 ? vectors / 2 : vectors;
}

// y[s] = init[s] + panel * x[s] for NS columns, from the first on, and a panel of Width vectors of rows. Several sums
// per output hide the latency of the multiply-adds where there are few outputs.
template <int Width, int NS>
void panel_product(const float* panel, int k, const Inputs<float>& x, int block, int first, const float* const* init,
                   float* const* y, int row) {
  constexpr int NV = rows_at_once(Width, NS), kSplit = std::max(8 / (NS * NV), 1), kNext = Width * kF;
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
  constexpr int NV = rows_at_once(Width, NS), kSplit = std::max(8 / (NS * NV), 1);
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
          asm("" : "+v"(a), "+v"(b), "+v"(d));  // or the compiler loads each twice
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
  constexpr int NV = rows_at_once(Width, NS), kSplit = std::max(8 / (NS * NV), 1);
  constexpr bool kShares = kShared<W> && Width >= 4;
  constexpr int kNext = (kShares ? Width / 4 * 3 : Width) * kF;
  const auto* words = reinterpret_cast<const uint32_t*>(panel);
  const auto* units = reinterpret_cast<const float*>(words + int64_t{k} / 2 * kNext);
  for (int part = 0; part < Width; part += NV, row += NV * kF) {
    const uint32_t* w = words + (kShares ? part / 4 * 3 : part) * kF;
    VecU sum[kSplit][NS][NV] = {};
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
            asm("" : "+v"(a), "+v"(b), "+v"(d));  // or the compiler loads each twice
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
        const VecF weighted = __builtin_convertvector((VecI)sum[0][s][v], VecF) * load(units + (part + v) * kF);
        const int at = row + v * kF;
        store(y[first + s] + at, load(init[first + s] + at) + weighted * x.at(first + s, block).unit);
      });
    });
  }
}

// panel_product for each width (1 to 4, and 8) and number of columns.
template <class W>
using PanelProduct = void (*)(const W*, int, const Inputs<W>&, int, int, const float* const*, float* const*, int);
template <class W, int... NS>
constexpr std::array<std::array<PanelProduct<W>, 5>, kPanelColumns> panel_products(std::integer_sequence<int, NS...>) {
  return {{{panel_product<1, NS + 1>, panel_product<2, NS + 1>, panel_product<3, NS + 1>, panel_product<4, NS + 1>,
            panel_product<kPanelVectors, NS + 1>}...}};
}
template <class W>
constexpr auto kPanelProducts = panel_products<W>(std::make_integer_sequence<int, kPanelColumns>{});

// y[s] = init[s] + matrix * x[s]. Every init[s] and y[s] holds padded_rows values.
template <class W>
void product(const PackedMatrix<W>& m, const Inputs<W>& x, const float* const* init, float* const* y, int columns) {
  const auto* data = reinterpret_cast<const uint8_t*>(m.data);
  const uint8_t* w = data;
  const int groups = (columns + kPanelColumns - 1) / kPanelColumns;
  // with many columns, a block of inputs at a time, whose weights stay in the nearest cache
  const int most = kFixed<W> || (groups > 1 && !kShared<W>) ? kBlock : std::max(m.k, 1);
  for (int block = 0, begin = 0; begin < m.padded_k(); ++block, begin += most) {
    const int k = std::min(most, m.padded_k() - begin);
    m.for_each_panel([&](int row, int vectors) {
      if constexpr (std::is_same_v<W, float>) w = data + 4 * (int64_t{row} * m.k + int64_t{begin} * vectors * kF);
      for (int g = 0, s = 0; g < groups; ++g) {
        const int n = (columns - s) / (groups - g);  // sizes as equal as possible: 4 columns are 2 + 2, not 3 + 1
        kPanelProducts<W>[n - 1][std::min(vectors, 5) - 1](reinterpret_cast<const W*>(w), k, x, block, s, init, y, row);
        s += n;
      }
      w += int64_t{vectors} * kF * m.row_bytes(vectors, k);
    });
    init = y;
  }
}

}  // namespace
}  // namespace fastgen
