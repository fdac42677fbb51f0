// The gated causal convolution and what a WaveNet layer puts behind it, over tiles of time.
//
// A tile is kTile consecutive samples, which lie in the lanes; its inputs (each tap's channels) are copied next to each
// other, so that every product below is a small matrix product between packed weights and rows of kTile values, with a
// block of kRows x 3 vectors of sums in registers. Everything of layer width lives in per-thread buffers of one tile.
//
// Factors S of products are of the sums' type T, or pairs of bfloat16 (see kTerms). What is summed over is paired: rows
// of weights hold pairs of inputs, and rows of a tile are paired two by two, lane by lane; for sums over time a row is
// taken as it is, for its neighbors in time are pairs.
#pragma once

#include "bfloat16_pairs.h"
#include "functions.h"

namespace fastgen {
namespace {

constexpr int kRows = kVectorRegisters == 32 ? 8 : 4;
constexpr int kWide = 3;  // vectors of a block of sums
template <class T>
constexpr int kTile = kWide * kLanes<T>;
// Elements of a row of factors, and from one row of a tile to the next where it is to be transposed.
template <class T, class S>
constexpr int kFactors = kTile<T> * kTerms<T, S>;
template <class T, class S>
constexpr int kRow = static_cast<int>(round_up(kTile<T>, kLanes<T>* kTerms<T, S>));
template <class T, class S>
constexpr int64_t factors(int64_t terms) {
  return (terms + kTerms<T, S> - 1) / kTerms<T, S>;
}

// sum[i][v] += sum_k a[i * row + k * column] * b[k * ld + v * lanes], of k factors. To be inlined where the sums are
// the only variables: among others the compiler would keep some of them in memory.
template <class T, class S, int Rows, int Wide>
[[gnu::always_inline]] inline void multiply_add_here(Vec<T> (&sum)[Rows][Wide], const S* a, int64_t row, int64_t column,
                                                     const S* b, int64_t ld, int64_t k) {
  for (int64_t c = 0; c < k; ++c, a += column, b += ld) {
    decltype(load_factors(b)) right[Wide];
    unroll<Wide>([&](auto v) FASTGEN_INLINE { right[v] = load_factors(b + v * kLanes<T> * kTerms<T, S>); });
    unroll<Rows>([&](auto i) FASTGEN_INLINE {
      const auto left = shared_factor(a + i * row);
      unroll<Wide>([&](auto v) FASTGEN_INLINE { sum[i][v] = add_product(sum[i][v], left, right[v]); });
    });
  }
}
template <int Rows, int Wide, class F>
[[gnu::always_inline]] inline void each_sum(F&& f) {
  unroll<Rows>([&](auto i) FASTGEN_INLINE { unroll<Wide>([&](auto v) FASTGEN_INLINE { f(i, v); }); });
}
// sums += a panel of pack_rows times rows of factors.
template <class T, class S>
[[gnu::noinline]] void multiply_add(Vec<T> (&sum)[kRows][kWide], const S* a, const S* b, int64_t k) {
  constexpr int kT = kTerms<T, S>;
  Vec<T> local[kRows][kWide];
  each_sum<kRows, kWide>([&](auto i, auto v) FASTGEN_INLINE { local[i][v] = sum[i][v]; });
  multiply_add_here<T, S>(local, a, kT, kRows * kT, b, kFactors<T, S>, k);
  each_sum<kRows, kWide>([&](auto i, auto v) FASTGEN_INLINE { sum[i][v] = local[i][v]; });
}

// Rows packed for multiply_add: panels of kRows rows, each [factor][row]; weight(row, k), zero past `n`.
template <class T, class S, class F>
std::vector<S> pack_rows(int64_t n, int64_t k, F&& weight) {
  constexpr int kT = kTerms<T, S>;
  std::vector<S> packed(round_up(n, kRows) * factors<T, S>(k) * kT);
  S* p = packed.data();
  for (int64_t first = 0; first < n; first += kRows)
    for (int64_t c = 0; c < k; c += kT)
      for (int64_t r = first; r < first + kRows; ++r)
        for (int64_t i = c; i < c + kT; ++i) *p++ = r < n && i < k ? static_cast<S>(weight(r, i)) : S(0);
  return packed;
}

// Rows of a tile for sums over `n` of them; nothing is to be done where they are factors as they are.
template <class T, class S>
void pair_rows(const S* rows, int64_t n, S* to) {
  if constexpr (kTerms<T, S> == 2)
    for (int64_t r = 0; r < n; r += 2, rows += 2 * kRow<T, S>)
      for (int t = 0; t < kTile<T>; t += kLanes<T>, to += 2 * kLanes<T>) {
        const VecU even = (VecU)load_as(rows + t);
        const VecU odd = r + 1 < n ? (VecU)load_as(rows + kRow<T, S> + t) : VecU{};
        store(reinterpret_cast<uint32_t*>(to), even >> 16 | odd);
      }
}

// A row of a tile: `count` values, the rest zero. Whole rows are the rule, and then the compiler knows their length.
template <class T, class S, class E>
inline void load_tile_row(S* __restrict to, const E* __restrict from, int64_t count) {
  if (count == kTile<T>)
    load_row(to, from, kTile<T>, kTile<T>);
  else
    load_row(to, from, count, kTile<T>);
}

// Asks for one of `parts` parts of the next tile's rows: they lie far apart, where no hardware looks ahead.
template <class T, class F>
inline void fetch_rows(int64_t rows, int64_t part, int64_t parts, F&& row) {
  for (int64_t r = part * rows / parts; r < (part + 1) * rows / parts; ++r)
    prefetch_to_l2(row(r), kTile<T> * sizeof(*row(r)) + 63);
}

// One row of a block of sums.
template <class E, class T>
inline void store_sums(E* to, const Vec<T> (&sum)[kWide], int64_t count, bool past_caches) {
  if constexpr (std::is_same_v<E, T>) {
    if (count == kTile<T> && past_caches && reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0) {
      for (int v = 0; v < kWide; ++v) store_past_caches(to + v * kLanes<T>, sum[v]);
      return;
    }
    if (count == kTile<T>) {
      for (int v = 0; v < kWide; ++v) store(to + v * kLanes<T>, sum[v]);
      return;
    }
  }
  T row[kTile<T>];
  for (int v = 0; v < kWide; ++v) store(row + v * kLanes<T>, sum[v]);
  store_row(to, row, count);
}

struct LayerShape {
  int64_t batch, channels, steps, gate, kernel, outs, dilation;  // outs: residual + skip rows, 0 without 1x1s
  int64_t taps() const { return kernel * channels; }
  int64_t reach() const { return (kernel - 1) * dilation; }
  int64_t skips() const { return outs - channels; }
};

// Pointers to the tensors of one layer, in the tensors' element type. Optional ones may be null.
template <class E>
struct LayerTensors {
  const E *x, *weight, *bias, *out_weight, *out_bias, *cond;
  bool cond_constant;  // cond is (B, 2H, 1)
};

// The inputs of a tile at time t: rows [tap][channel].
template <class T, class S, class E>
void load_inputs(const LayerShape& s, const E* x, int64_t t, S* to) {
  for (int64_t k = 0; k < s.kernel; ++k) {
    const int64_t from = t - (s.kernel - 1 - k) * s.dilation;
    const int64_t before = std::clamp<int64_t>(-from, 0, kTile<T>);
    const int64_t count = std::clamp<int64_t>(s.steps - from - before, 0, kTile<T> - before);
    for (int64_t c = 0; c < s.channels; ++c, to += kRow<T, S>) {
      if (before == 0) {
        load_tile_row<T>(to, x + c * s.steps + from, count);
        continue;
      }
      for (int64_t i = 0; i < before; ++i) to[i] = S(0);
      load_row(to + before, x + c * s.steps + from + before, count, kTile<T> - before);
    }
  }
}

// The same for sums over taps and channels.
template <class T, class S>
void pair_inputs(const LayerShape& s, const S* rows, S* to) {
  for (int64_t k = 0; k < s.kernel; ++k)
    pair_rows<T>(rows + k * s.channels * kRow<T, S>, s.channels, to + k * factors<T, S>(s.channels) * kFactors<T, S>);
}

// Weights of the convolution in panels of kRows / 2 tanh rows and the matching sigmoid rows.
template <class T, class S, class E>
struct GateWeights {
  static constexpr int kHalf = kRows / 2, kT = kTerms<T, S>;
  int64_t padded, taps;  // gate channels, padded to whole panels; factors of a row
  std::vector<S> weight;
  std::vector<T> bias;

  GateWeights(const LayerShape& s, const E* w, const E* b)
      : padded(round_up(s.gate, kHalf)), taps(s.kernel * factors<T, S>(s.channels)) {
    const auto source = [&](int64_t r) {  // row of a panel -> row of the weight, or -1
      const int64_t h = r / kRows * kHalf + r % kHalf;
      return h >= s.gate ? -1 : (r % kRows < kHalf ? h : s.gate + h);
    };
    weight.resize(2 * padded * taps * kT);
    S* to = weight.data();
    for (int64_t first = 0; first < 2 * padded; first += kRows)
      for (int64_t k = 0; k < s.kernel; ++k)
        for (int64_t c = 0; c < s.channels; c += kT)
          for (int64_t r = first; r < first + kRows; ++r)
            for (int64_t i = c; i < c + kT; ++i) {
              const int64_t row = source(r);
              const bool live = row >= 0 && i < s.channels;
              *to++ = live ? static_cast<S>(w[(row * s.channels + i) * s.kernel + k]) : S(0);
            }
    bias.resize(2 * padded);
    for (int64_t r = 0; r < 2 * padded && b; ++r)
      if (source(r) >= 0) bias[r] = static_cast<T>(b[source(r)]);
  }

  // The sums of the panel of gate channels h .. h + kHalf: convolution, bias and conditioning.
  void sums(const LayerShape& s, const LayerTensors<E>& in, const S* inputs, int64_t b, int64_t t, int64_t h,
            Vec<T> (&sum)[kRows][kWide]) const {
    const int64_t panel = 2 * h;
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kWide; ++v) sum[i][v] = splat(bias[panel + i]);
    if (in.cond) {
      for (int i = 0; i < kRows; ++i) {
        const int64_t channel = h + i % kHalf;
        if (channel >= s.gate) continue;
        const int64_t row = b * 2 * s.gate + (i < kHalf ? 0 : s.gate) + channel;
        T values[kTile<T>];
        if (in.cond_constant)
          std::fill_n(values, kTile<T>, static_cast<T>(in.cond[row]));
        else
          load_row(values, in.cond + row * s.steps + t, std::min<int64_t>(kTile<T>, s.steps - t), kTile<T>);
        for (int v = 0; v < kWide; ++v) sum[i][v] += load(values + v * kLanes<T>);
      }
    }
    multiply_add<T, S>(sum, weight.data() + panel * taps * kT, inputs, taps);
  }
};

template <class T>
T* tile_aligned(std::vector<T>& memory, int64_t count) {
  memory.resize(count + 64 / sizeof(T));
  return reinterpret_cast<T*>(round_up(reinterpret_cast<uintptr_t>(memory.data()), 64));
}

// z (B, H, T) if outs == 0, else residual (B, C, T) and skip (B, S, T).
template <class T, class S, class E>
void layer_forward(const LayerShape& s, const LayerTensors<E>& in, E* z_out, E* residual, E* skip) {
  const GateWeights<T, S, E> gates(s, in.weight, in.bias);
  constexpr int kHalf = GateWeights<T, S, E>::kHalf, kT = kTerms<T, S>;
  std::vector<S> out_weight;
  std::vector<T> out_bias;
  const int64_t residual_rows = round_up(s.channels, kRows), rows = residual_rows + round_up(s.skips(), kRows);
  const auto row_of = [&](int64_t r) {  // padded output row -> row of out_weight, or -1
    if (r < residual_rows) return r < s.channels ? r : -1;
    return r - residual_rows < s.skips() ? r - residual_rows + s.channels : -1;
  };
  if (s.outs) {
    out_weight = pack_rows<T, S>(rows, s.gate, [&](int64_t r, int64_t k) {
      return row_of(r) < 0 ? E(0) : in.out_weight[row_of(r) * s.gate + k];
    });
    out_bias.resize(rows);
    for (int64_t r = 0; r < rows && in.out_bias; ++r)
      if (row_of(r) >= 0) out_bias[r] = static_cast<T>(in.out_bias[row_of(r)]);
  }
  constexpr int64_t kLarge = 8 << 20;  // bytes of results that no core's cache would keep
  const bool past_caches = s.batch * s.outs * s.steps * static_cast<int64_t>(sizeof(E)) > kLarge;
  const int64_t tiles = (s.steps + kTile<T> - 1) / kTile<T>;
  share(s.batch * tiles, [&](int64_t begin, int64_t end) {
    std::vector<S> memory[4];
    S* inputs = tile_aligned(memory[0], (s.taps() + kRows) * kRow<T, S>);
    S* z = tile_aligned(memory[1], gates.padded * kRow<T, S>);
    S* paired = kT == 1 ? inputs : tile_aligned(memory[2], gates.taps * kFactors<T, S>);
    S* paired_z = kT == 1 ? z : tile_aligned(memory[3], factors<T, S>(s.gate) * kFactors<T, S>);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / tiles, t = item % tiles * kTile<T>, count = std::min<int64_t>(kTile<T>, s.steps - t);
      const E* x = in.x + b * s.channels * s.steps;
      load_inputs<T>(s, x, t, inputs);
      pair_inputs<T>(s, inputs, paired);
      for (int64_t h = 0; h < gates.padded; h += kHalf) {
        fetch_rows<T>(s.channels, h / kHalf, gates.padded / kHalf,
                      [&](int64_t c) { return x + c * s.steps + t + kTile<T>; });
        Vec<T> sum[kRows][kWide];
        gates.sums(s, in, paired, b, t, h, sum);
#pragma GCC unroll 4
        for (int i = 0; i < kHalf; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < kWide; ++v)
            store_factors(z + (h + i) * kRow<T, S> + v * kLanes<T>, gate(sum[i][v], sum[i + kHalf][v]));
      }
      if (!s.outs) {
        for (int64_t h = 0; h < s.gate; ++h)
          store_row(z_out + (b * s.gate + h) * s.steps + t, z + h * kRow<T, S>, count);
        continue;
      }
      pair_rows<T>(z, s.gate, paired_z);
      const S* current = inputs + (s.taps() - s.channels) * kRow<T, S>;  // the last tap: the residual's input
      for (int64_t r = 0; r < rows; r += kRows) {
        Vec<T> sum[kRows][kWide];
        for (int i = 0; i < kRows; ++i)
          for (int v = 0; v < kWide; ++v) {
            sum[i][v] = splat(out_bias[r + i]);
            if (r < residual_rows) sum[i][v] += load_as(current + (r + i) * kRow<T, S> + v * kLanes<T>);
          }
        multiply_add<T, S>(sum, out_weight.data() + r * factors<T, S>(s.gate) * kT, paired_z, factors<T, S>(s.gate));
        for (int i = 0; i < kRows; ++i) {
          if (row_of(r + i) < 0) continue;
          E* to = r < residual_rows ? residual + (b * s.channels + r + i) * s.steps + t
                                    : skip + (b * s.skips() + r + i - residual_rows) * s.steps + t;
          store_sums<E, T>(to, sum[i], count, past_caches);
        }
      }
    }
    fence_stores();
  });
}

}  // namespace
}  // namespace fastgen
