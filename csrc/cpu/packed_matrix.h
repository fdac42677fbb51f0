// Weight matrices packed for generation, where each weight is read once for each sample: packed_product.h multiplies
// them by activations in the form of packed_inputs.h.
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

#include "elements.h"

namespace fastgen {
namespace {

constexpr int kBlock = 64;  // inputs that share a unit

// Matrices of words that vectors of rows share.
struct Int24 {};
struct Int12 {};
template <class W>
constexpr bool kShared = std::is_same_v<W, Int24> || std::is_same_v<W, Int12>;
// Vectors of rows in a panel. As many as one pass over it multiplies, so that weights are read in the order in which
// they lie, which is what processors fetch ahead best; where words are shared, a single column has room for eight sums.
template <class W>
constexpr int kPanelVectors = kShared<W> ? 8 : 4;
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
  bool far = false;  // no cache holds it until it is read the next time

  int padded_rows() const { return static_cast<int>(round_up(rows, kF)); }
  // Narrow where reading takes longest, so that more threads find one.
  int panel_vectors() const { return far ? 4 : kPanelVectors<W>; }
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
  // f(first row, vectors of rows) for each panel: panel_vectors, and at the end fewer, up to 4.
  template <class F>
  void for_each_panel(F&& f) const {
    for (int row = 0, width; row < padded_rows(); row += width * kF) {
      const int left = (padded_rows() - row) / kF;
      f(row, width = left >= panel_vectors() ? panel_vectors() : std::min(left, 4));
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

}  // namespace
}  // namespace fastgen
