// Activations in the form in which products with packed matrices take them.
#pragma once

#include <utility>

#include "packed_matrix.h"

namespace fastgen {
namespace {

// A block of activations as whole numbers of `unit`, a power of two; not a number if one of them is not finite.
template <int Bits>
struct FixedBlock {
  int16_t x[kBlock];
  float unit;

  void set(const float* from, int k) {
    set(k, [&](int c) FASTGEN_INLINE { return load(from + c); });
  }
  // value(c) is the vector of the activations from c on; k is a multiple of its lanes. With Guess they are written in
  // the unit that the block has, before it is known whether that is theirs too: if it mostly is, nobody waits for the
  // largest of them.
  template <bool Guess = false, class F>
  void set(int k, F&& value) {
    k == kBlock ? set_vectors<Guess>(kBlock / kF, value) : set_vectors<Guess>(k / kF, value);
  }

 private:
  template <bool Guess, class F>
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
    VecF v[kBlock / kF] = {};
    VecU most = {};
    each([&](auto i) FASTGEN_INLINE {
      v[i] = value(i * kF);
      most = larger_of(most, (VecU)v[i] & 0x7fffffff);
    });
    const auto write = [&](VecU exponent) FASTGEN_INLINE {
      const VecF scale = (VecF)((Bits + 253 - exponent) << 23);
      each([&](auto i) FASTGEN_INLINE {
        VecI shifted = (VecI)(v[i] * scale + kShift);
        if (Bits == 15) shifted = shifted < kLargest ? shifted : kLargest + VecI{};
        const Narrow narrow = __builtin_convertvector(shifted, Narrow);
        std::memcpy(x + i * kF, &narrow, sizeof narrow);
      });
    };
    const uint32_t guess =
        (std::bit_cast<uint32_t>(unit) >> 23) + (Bits - 1);  // of a unit of 0 it is below all exponents
    if (Guess) write(guess + VecU{});
    most = fold_lanes<uint32_t>(most, larger_of);
    VecU exponent = most >> 23;
    exponent = exponent > 32 ? exponent : 32 + VecU{};  // the unit is at least 2^-109
    if (Guess && exponent[0] == guess) [[likely]]
      return;
    write(exponent);
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
  // x[s] from vectors, value(c) of them from c on, which float32 keeps at `to`. Guess: see FixedBlock.
  template <bool Guess = false, class F>
  [[gnu::always_inline]] void fill(int s, float* to, F&& value) {
    if constexpr (kFixed<W>) {
      for (int b = 0; b < blocks_; ++b)
        at_[s][b].template set<Guess>(std::min(kBlock, static_cast<int>(round_up(k_ - b * kBlock, 16))),
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
  // f(place, bytes) for each column that is a copy.
  template <class F>
  void each_copy(F&& f) const {
    for (const Block* at : at_) f(at, blocks_ * sizeof(Block));
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

}  // namespace
}  // namespace fastgen
