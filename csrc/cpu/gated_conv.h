// The gated causal convolution and what a WaveNet layer puts behind it, forward and backward, over tiles of time.
//
// A tile is kTile consecutive samples, which lie in the lanes; its inputs (each tap's channels) are copied next to each
// other, so that every product below is a small matrix product between packed weights and rows of kTile values, with a
// block of kRows x 3 vectors of sums in registers. Everything of layer width lives in per-thread buffers of one tile.
#pragma once

#include <bit>

#include "simd.h"

namespace fastgen {
namespace {

constexpr int kRows = kVectorRegisters == 32 ? 8 : 4;
constexpr int kWide = 3;  // vectors of a block of sums
template <class T>
constexpr int kTile = kWide * kLanes<T>;

// sum[i][v] += sum_k a[i * row + k * column] * b[k * ld + v * lanes]. Not inlined: among other variables the compiler
// would keep some of the sums in memory.
template <class T, int Rows, int Wide>
[[gnu::noinline]] void multiply_add(Vec<T> (&sum)[Rows][Wide], const T* a, int64_t row, int64_t column, const T* b,
                                    int64_t ld, int64_t k) {
  Vec<T> local[Rows][Wide];
  unroll<Rows>([&](auto i) FASTGEN_INLINE { unroll<Wide>([&](auto v) FASTGEN_INLINE { local[i][v] = sum[i][v]; }); });
  for (int64_t c = 0; c < k; ++c, a += column, b += ld) {
    Vec<T> right[Wide];
    unroll<Wide>([&](auto v) FASTGEN_INLINE { right[v] = load(b + v * kLanes<T>); });
    unroll<Rows>([&](auto i) FASTGEN_INLINE {
      const Vec<T> left = splat(a[i * row]);
      unroll<Wide>([&](auto v) FASTGEN_INLINE { local[i][v] += left * right[v]; });
    });
  }
  unroll<Rows>([&](auto i) FASTGEN_INLINE { unroll<Wide>([&](auto v) FASTGEN_INLINE { sum[i][v] = local[i][v]; }); });
}

// Rows packed for multiply_add: panels of `rows` rows, each [k][rows]; weight(row, k), zero past `n`.
template <class T, class F>
std::vector<T> pack_rows(int64_t n, int64_t k, int rows, F&& weight) {
  std::vector<T> packed(round_up(n, rows) * k);
  T* p = packed.data();
  for (int64_t first = 0; first < n; first += rows)
    for (int64_t c = 0; c < k; ++c)
      for (int64_t r = first; r < first + rows; ++r) *p++ = r < n ? weight(r, c) : T(0);
  return packed;
}

// `count` values to or from the tensor's element type E; the rest of a tile is zero.
template <class T, class E>
inline void load_row(T* to, const E* from, int64_t count, int64_t tile) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(from[i]);
  for (int64_t i = count; i < tile; ++i) to[i] = T(0);
}
template <class T>
inline void load_row(T* to, const BFloat16* from, int64_t count, int64_t tile) {
  const auto* bits = reinterpret_cast<const uint16_t*>(from);
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(bits[i]);
  for (int64_t i = count; i < tile; ++i) to[i] = T(0);
}
template <class T>
inline void store_row(T* to, const T* from, int64_t count) {
  std::memcpy(to, from, count * sizeof(T));
}
inline void store_row(BFloat16* to, const float* from, int64_t count) {
  auto* bits = reinterpret_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; ++i) bits[i] = to_bf16(from[i]);
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

// The inputs of a tile at time t: rows [tap][channel] of kTile values.
template <class T, class E>
void load_inputs(const LayerShape& s, const E* x, int64_t t, T* to) {
  for (int64_t k = 0; k < s.kernel; ++k) {
    const int64_t from = t - (s.kernel - 1 - k) * s.dilation;
    const int64_t before = std::clamp<int64_t>(-from, 0, kTile<T>);
    const int64_t count = std::clamp<int64_t>(s.steps - from - before, 0, kTile<T> - before);
    for (int64_t c = 0; c < s.channels; ++c, to += kTile<T>) {
      for (int64_t i = 0; i < before; ++i) to[i] = T(0);
      load_row(to + before, x + c * s.steps + from + before, count, kTile<T> - before);
    }
  }
}

// Weights of the convolution in panels of kRows / 2 tanh rows and the matching sigmoid rows.
template <class T, class E>
struct GateWeights {
  static constexpr int kHalf = kRows / 2;
  int64_t padded;  // gate channels, padded to whole panels
  std::vector<T> weight, bias;

  GateWeights(const LayerShape& s, const E* w, const E* b) : padded(round_up(s.gate, kHalf)) {
    const auto source = [&](int64_t r) {  // row of a panel -> row of the weight, or -1
      const int64_t h = r / kRows * kHalf + r % kHalf;
      return h >= s.gate ? -1 : (r % kRows < kHalf ? h : s.gate + h);
    };
    weight.resize(2 * padded * s.taps());
    T* to = weight.data();
    for (int64_t first = 0; first < 2 * padded; first += kRows)
      for (int64_t k = 0; k < s.kernel; ++k)
        for (int64_t c = 0; c < s.channels; ++c)
          for (int64_t r = first; r < first + kRows; ++r) {
            const int64_t row = source(r);
            *to++ = row < 0 ? T(0) : static_cast<T>(w[(row * s.channels + c) * s.kernel + k]);
          }
    bias.resize(2 * padded);
    for (int64_t r = 0; r < 2 * padded && b; ++r)
      if (source(r) >= 0) bias[r] = static_cast<T>(b[source(r)]);
  }

  // The sums of the panel of gate channels h .. h + kHalf: convolution, bias and conditioning.
  void sums(const LayerShape& s, const LayerTensors<E>& in, const T* inputs, int64_t b, int64_t t, int64_t h,
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
    multiply_add<T>(sum, weight.data() + panel * s.taps(), 1, kRows, inputs, kTile<T>, s.taps());
  }
};

template <class T>
T* tile_aligned(std::vector<T>& memory, int64_t count) {
  memory.resize(count + 64 / sizeof(T));
  return reinterpret_cast<T*>(round_up(reinterpret_cast<uintptr_t>(memory.data()), 64));
}

// Contiguous shares of `items` for the threads of the pool: f(begin, end).
template <class F>
void share(int64_t items, F&& f) {
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  for_each_worker(workers, [&](int64_t i) { f(i * items / workers, (i + 1) * items / workers); });
}

// z (B, H, T) if outs == 0, else residual (B, C, T) and skip (B, S, T).
template <class T, class E>
void layer_forward(const LayerShape& s, const LayerTensors<E>& in, E* z_out, E* residual, E* skip) {
  const GateWeights<T, E> gates(s, in.weight, in.bias);
  constexpr int kHalf = GateWeights<T, E>::kHalf;
  std::vector<T> out_weight, out_bias;
  const int64_t residual_rows = round_up(s.channels, kRows), rows = residual_rows + round_up(s.skips(), kRows);
  const auto row_of = [&](int64_t r) {  // padded output row -> row of out_weight, or -1
    if (r < residual_rows) return r < s.channels ? r : -1;
    return r - residual_rows < s.skips() ? r - residual_rows + s.channels : -1;
  };
  if (s.outs) {
    out_weight = pack_rows<T>(rows, s.gate, kRows, [&](int64_t r, int64_t k) {
      return row_of(r) < 0 ? T(0) : static_cast<T>(in.out_weight[row_of(r) * s.gate + k]);
    });
    out_bias.resize(rows);
    for (int64_t r = 0; r < rows && in.out_bias; ++r)
      if (row_of(r) >= 0) out_bias[r] = static_cast<T>(in.out_bias[row_of(r)]);
  }
  constexpr int64_t kLarge = 8 << 20;  // bytes of results that no core's cache would keep
  const bool past_caches = s.batch * s.outs * s.steps * static_cast<int64_t>(sizeof(E)) > kLarge;
  const int64_t tiles = (s.steps + kTile<T> - 1) / kTile<T>;
  share(s.batch * tiles, [&](int64_t begin, int64_t end) {
    std::vector<T> input_memory, z_memory;
    T* inputs = tile_aligned(input_memory, (s.taps() + kRows) * kTile<T>);
    T* z = tile_aligned(z_memory, gates.padded * kTile<T>);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / tiles, t = item % tiles * kTile<T>, count = std::min<int64_t>(kTile<T>, s.steps - t);
      load_inputs(s, in.x + b * s.channels * s.steps, t, inputs);
      for (int64_t h = 0; h < gates.padded; h += kHalf) {
        Vec<T> sum[kRows][kWide];
        gates.sums(s, in, inputs, b, t, h, sum);
#pragma GCC unroll 4
        for (int i = 0; i < kHalf; ++i)
#pragma GCC unroll 4
          for (int v = 0; v < kWide; ++v)
            store(z + (h + i) * kTile<T> + v * kLanes<T>, gate(sum[i][v], sum[i + kHalf][v]));
      }
      if (!s.outs) {
        for (int64_t h = 0; h < s.gate; ++h) store_row(z_out + (b * s.gate + h) * s.steps + t, z + h * kTile<T>, count);
        continue;
      }
      const T* current = inputs + (s.taps() - s.channels) * kTile<T>;  // the last tap: the residual's input
      for (int64_t r = 0; r < rows; r += kRows) {
        Vec<T> sum[kRows][kWide];
        for (int i = 0; i < kRows; ++i)
          for (int v = 0; v < kWide; ++v) {
            sum[i][v] = splat(out_bias[r + i]);
            if (r < residual_rows) sum[i][v] += load(current + (r + i) * kTile<T> + v * kLanes<T>);
          }
        multiply_add<T>(sum, out_weight.data() + r * s.gate, 1, kRows, z, kTile<T>, s.gate);
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

// Gradients in the compute type; see layer_backward.
template <class T>
struct LayerGradients {
  T *x, *weight, *bias, *out_weight, *out_bias;  // the last two null without 1x1s
  T* cond;                                       // null where not wanted; (B, 2H, T) or (B, 2H, 1)
};

// A square of lanes x lanes: blocks off the diagonal change places, ever smaller ones.
template <class T>
inline void transpose_square(const T* from, int64_t from_ld, T* to, int64_t to_ld) {
  constexpr int kSide = kLanes<T>;
  using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  Vec<T> rows[kSide];
  unroll<kSide>([&](auto i) FASTGEN_INLINE { rows[i] = load(from + i * from_ld); });
  unroll<std::bit_width(static_cast<unsigned>(kSide)) - 1>([&](auto level) FASTGEN_INLINE {
    constexpr int kBlock = 1 << level;
    Vec<Index> low, high;
    for (int j = 0; j < kSide; ++j) {
      low[j] = j & kBlock ? kSide + j - kBlock : j;
      high[j] = j & kBlock ? kSide + j : j + kBlock;
    }
    unroll<kSide>([&](auto i) FASTGEN_INLINE {
      if constexpr ((i & kBlock) == 0) {
        const Vec<T> upper = rows[i], lower = rows[i + kBlock];
        rows[i] = __builtin_shuffle(upper, lower, low);
        rows[i + kBlock] = __builtin_shuffle(upper, lower, high);
      }
    });
  });
  unroll<kSide>([&](auto i) FASTGEN_INLINE { store(to + i * to_ld, rows[i]); });
}

template <class T>
void transpose(const T* from, int64_t rows, T* to, int64_t ld) {  // (rows, kTile) -> (kTile, ld)
  constexpr int kSide = kLanes<T>;
  int64_t r = 0;
  for (; r + kSide <= rows; r += kSide)
    for (int64_t i = 0; i < kTile<T>; i += kSide)
      transpose_square(from + r * kTile<T> + i, kTile<T>, to + i * ld + r, ld);
  for (; r < rows; ++r)
    for (int64_t i = 0; i < kTile<T>; ++i) to[i * ld + r] = from[r * kTile<T> + i];
}

// c (rows, ld) += a (rows, kTile) * b (kTile, ld); rows a multiple of kRows, ld of the lanes.
template <class T, int Wide>
void accumulate_block(const T* a, const T* b, T* c, int64_t rows, int64_t ld) {
  for (int64_t r = 0; r < rows; r += kRows) {
    Vec<T> sum[kRows][Wide] = {};  // a tile's own sum first: c may be far larger, and would round every product away
    multiply_add<T>(sum, a + r * kTile<T>, kTile<T>, 1, b, ld, kTile<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Wide; ++v) {
        T* to = c + (r + i) * ld + v * kLanes<T>;
        store(to, load(to) + sum[i][v]);
      }
  }
}
template <class T>
void accumulate(const T* a, const T* b, T* c, int64_t rows, int64_t ld) {
  int64_t n = 0;
  for (; n + 3 * kLanes<T> <= ld; n += 3 * kLanes<T>) accumulate_block<T, 3>(a, b + n, c + n, rows, ld);
  if (ld - n == 2 * kLanes<T>) accumulate_block<T, 2>(a, b + n, c + n, rows, ld);
  if (ld - n == kLanes<T>) accumulate_block<T, 1>(a, b + n, c + n, rows, ld);
}

// The sum over each row of a tile, added to `sums`.
template <class T>
void add_row_sums(const T* tile, int64_t rows, T* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    Vec<T> v = load(tile + r * kTile<T>);
    for (int i = 1; i < kWide; ++i) v += load(tile + r * kTile<T> + i * kLanes<T>);
    T lanes[kLanes<T>], sum = T(0);
    store(lanes, v);
    for (int i = 0; i < kLanes<T>; ++i) sum += lanes[i];
    sums[r] += sum;
  }
}

// One pass over time, ascending. The gate is recomputed; its gradient da lives only in the tile at hand, and what it
// gives to x at t - shift is added there at once. A thread owns segments of time: it alone writes x's gradient in them,
// and runs on past the end of each, without counting weights, as far as the convolution reaches back.
template <class T, class E>
void layer_backward(const LayerShape& s, const LayerTensors<E>& in, const E* grad_z, const E* grad_residual,
                    const E* grad_skip, const LayerGradients<T>& out) {
  const GateWeights<T, E> gates(s, in.weight, in.bias);
  constexpr int kHalf = GateWeights<T, E>::kHalf;
  constexpr int64_t tile = kTile<T>;
  const int64_t hp = round_up(s.gate, kRows), cp = round_up(s.channels, kRows), op = round_up(s.outs, kRows);
  const int64_t ld = round_up(s.taps(), kLanes<T>), zld = round_up(s.gate, kLanes<T>);
  // transposed weights: gate channels from outputs, and input channels from gate rows for each tap
  std::vector<T> back_out;
  if (s.outs)
    back_out = pack_rows<T>(s.gate, s.outs, kRows,
                            [&](int64_t h, int64_t o) { return static_cast<T>(in.out_weight[o * s.gate + h]); });
  std::vector<std::vector<T>> back(s.kernel);
  for (int64_t k = 0; k < s.kernel; ++k)
    back[k] = pack_rows<T>(s.channels, 2 * hp, kRows, [&](int64_t c, int64_t r) {
      const int64_t h = r < hp ? r : r - hp;
      return h >= s.gate ? T(0)
                         : static_cast<T>(in.weight[((r < hp ? h : s.gate + h) * s.channels + c) * s.kernel + k]);
    });

  const int64_t threads = torch::stable::get_num_threads();
  int64_t segments = s.batch % threads == 0 ? 1 : std::clamp<int64_t>(s.steps / (2 * s.reach() + tile), 1, threads);
  const int64_t length = std::max(tile, round_up((s.steps + segments - 1) / segments, tile));
  segments = (s.steps + length - 1) / length;
  const int64_t items = s.batch * segments, workers = std::min(items, threads);
  const int64_t weight_size = 2 * hp * ld, out_size = op * zld;
  std::vector<T> weight_sums(workers * weight_size), out_sums(workers * out_size);
  std::vector<T> gate_sums(items * 2 * hp), row_sums(items * op);

  for_each_worker(workers, [&](int64_t worker) {
    T* weight_sum = weight_sums.data() + worker * weight_size;
    T* out_sum = out_sums.data() + worker * out_size;
    std::vector<T> memory;
    T* inputs = tile_aligned(memory, (s.taps() + 2 * hp + 2 * hp + op) * tile + tile * (ld + zld) + tile);
    T* da = inputs + s.taps() * tile;    // (2hp, tile)
    T* grad_gate = da + 2 * hp * tile;   // (hp, tile)
    T* z = grad_gate + hp * tile;        // (hp, tile)
    T* grad_out = z + hp * tile;         // (op, tile)
    T* inputs_t = grad_out + op * tile;  // (tile, ld)
    T* z_t = inputs_t + tile * ld;       // (tile, zld)
    for (int64_t item = worker * items / workers; item < (worker + 1) * items / workers; ++item) {
      const int64_t b = item / segments, first = item % segments * length;
      const int64_t last = std::min(first + length, s.steps);
      T* grad_x = out.x + b * s.channels * s.steps;
      for (int64_t t = first; t < std::min(s.steps, last + s.reach()); t += tile) {
        const bool own = t < last;
        const int64_t count = std::min(tile, s.steps - t);
        load_inputs(s, in.x + b * s.channels * s.steps, t, inputs);
        if (s.outs) {
          for (int64_t r = 0; r < s.outs; ++r)
            load_row(grad_out + r * tile,
                     r < s.channels ? grad_residual + (b * s.channels + r) * s.steps + t
                                    : grad_skip + (b * s.skips() + r - s.channels) * s.steps + t,
                     count, tile);
          for (int64_t h = 0; h < hp; h += kRows) {
            Vec<T> sum[kRows][kWide] = {};
            multiply_add<T>(sum, back_out.data() + h * s.outs, 1, kRows, grad_out, tile, s.outs);
            for (int i = 0; i < kRows; ++i)
              for (int v = 0; v < kWide; ++v) store(grad_gate + (h + i) * tile + v * kLanes<T>, sum[i][v]);
          }
        } else {
          for (int64_t h = 0; h < s.gate; ++h)
            load_row(grad_gate + h * tile, grad_z + (b * s.gate + h) * s.steps + t, count, tile);
        }
        for (int64_t h = 0; h < gates.padded; h += kHalf) {
          Vec<T> sum[kRows][kWide];
          gates.sums(s, in, inputs, b, t, h, sum);
          for (int i = 0; i < kHalf; ++i)
            for (int v = 0; v < kWide; ++v) {
              Vec<T> tanh, sigmoid;
              gate_parts(sum[i][v], sum[i + kHalf][v], tanh, sigmoid);
              const int64_t at = (h + i) * tile + v * kLanes<T>;
              const Vec<T> g = load(grad_gate + at) * sigmoid;
              store(z + at, tanh * sigmoid);
              store(da + at, g * (T(1) - tanh * tanh));
              store(da + hp * tile + at, g * tanh * (T(1) - sigmoid));
            }
        }
        for (int64_t k = s.kernel - 1; k >= 0; --k) {
          const int64_t to = t - (s.kernel - 1 - k) * s.dilation;
          const int64_t begin = std::clamp<int64_t>(first - to, 0, count);
          const int64_t end = std::clamp<int64_t>(last - to, 0, count);
          if (begin >= end) continue;
          for (int64_t c = 0; c < cp; c += kRows) {
            Vec<T> sum[kRows][kWide] = {};
            multiply_add<T>(sum, back[k].data() + c * 2 * hp, 1, kRows, da, tile, 2 * hp);
            for (int i = 0; i < kRows && c + i < s.channels; ++i) {
              T row[kTile<T>];
              for (int v = 0; v < kWide; ++v) store(row + v * kLanes<T>, sum[i][v]);
              T* x = grad_x + (c + i) * s.steps + to;
              if (k == s.kernel - 1) {  // the first to reach these samples
                const T* residual = s.outs ? grad_out + (c + i) * tile : nullptr;
                for (int64_t j = begin; j < end; ++j) x[j] = row[j] + (residual ? residual[j] : T(0));
              } else {
                for (int64_t j = begin; j < end; ++j) x[j] += row[j];
              }
            }
          }
        }
        if (!own) continue;
        transpose(inputs, s.taps(), inputs_t, ld);
        accumulate(da, inputs_t, weight_sum, 2 * hp, ld);
        add_row_sums(da, 2 * hp, gate_sums.data() + item * 2 * hp);
        if (s.outs) {
          transpose(z, s.gate, z_t, zld);
          accumulate(grad_out, z_t, out_sum, op, zld);
          add_row_sums(grad_out, s.outs, row_sums.data() + item * op);
        }
        if (out.cond && !in.cond_constant)
          for (int64_t r = 0; r < 2 * s.gate; ++r)
            std::memcpy(out.cond + (b * 2 * s.gate + r) * s.steps + t, da + (r < s.gate ? r : hp + r - s.gate) * tile,
                        count * sizeof(T));
      }
    }
  });

  // the threads' sums, in a fixed order
  const auto padded_row = [&](int64_t r) { return r < s.gate ? r : hp + r - s.gate; };
  for (int64_t r = 0; r < 2 * s.gate; ++r)
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t k = 0; k < s.kernel; ++k) {
        T sum = 0;
        for (int64_t w = 0; w < workers; ++w)
          sum += weight_sums[w * weight_size + padded_row(r) * ld + k * s.channels + c];
        out.weight[(r * s.channels + c) * s.kernel + k] = sum;
      }
  for (int64_t r = 0; r < 2 * s.gate; ++r) {
    T total = 0;
    for (int64_t b = 0; b < s.batch; ++b) {
      T sum = 0;
      for (int64_t i = b * segments; i < (b + 1) * segments; ++i) sum += gate_sums[i * 2 * hp + padded_row(r)];
      if (out.cond && in.cond_constant) out.cond[b * 2 * s.gate + r] = sum;
      total += sum;
    }
    out.bias[r] = total;
  }
  for (int64_t r = 0; r < s.outs; ++r) {
    for (int64_t h = 0; h < s.gate; ++h) {
      T sum = 0;
      for (int64_t w = 0; w < workers; ++w) sum += out_sums[w * out_size + r * zld + h];
      out.out_weight[r * s.gate + h] = sum;
    }
    T sum = 0;
    for (int64_t i = 0; i < items; ++i) sum += row_sums[i * op + r];
    out.out_bias[r] = sum;
  }
}

// Compute type of an element type.
template <class E>
using ComputeType = std::conditional_t<std::is_same_v<E, double>, double, float>;

template <class E>
const E* data_of(const Tensor& tensor) {
  return static_cast<const E*>(tensor.data_ptr());
}
template <class E>
const E* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const E*>(tensor->data_ptr()) : nullptr;
}

// A result in the compute type: the tensor itself, or for bfloat16 a buffer that is rounded into it at the end.
template <class E>
class Result {
 public:
  using T = ComputeType<E>;
  explicit Result(const Tensor& tensor) : tensor_(tensor) {
    if constexpr (!std::is_same_v<E, T>) buffer_.resize(tensor.numel());
  }
  T* data() {
    if constexpr (std::is_same_v<E, T>)
      return static_cast<T*>(tensor_.data_ptr());
    else
      return buffer_.data();
  }
  void finish() {
    if constexpr (!std::is_same_v<E, T>)
      store_row(static_cast<E*>(tensor_.data_ptr()), buffer_.data(), tensor_.numel());
  }

 private:
  const Tensor& tensor_;
  std::vector<T> buffer_;
};

}  // namespace
}  // namespace fastgen
