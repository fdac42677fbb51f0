// The gradients of a gated causal convolution and of a WaveNet layer; the forward pass is in gated_conv.h.
#pragma once

#include "gated_conv.h"

namespace fastgen {
namespace {

// Gradients in the compute type; see layer_backward.
template <class T>
struct LayerGradients {
  T *x, *weight, *bias, *out_weight, *out_bias;  // the last two null without 1x1s
  T* cond;                                       // null where not wanted; (B, 2H, T) or (B, 2H, 1)
};

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

}  // namespace
}  // namespace fastgen
