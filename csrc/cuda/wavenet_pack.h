// A WaveNet's weights in the order of wavenet_layout.h, on the host.
#pragma once

#include <cstring>

#include "wavenet_layout.h"

namespace fastgen::wavenet {

// As in fastgen/ops/wavenet_generate.py, contiguous; local: (layers, 2 gate, channels), or null.
struct Weights {
  const float *input, *input_bias, *conv, *residual, *residual_bias, *skip, *skip_bias, *hidden, *hidden_bias, *output,
      *output_bias, *local;
};

// Where a bfloat16 lies that tiles.h has at `i`: a lane's two rows in the order of a tensor core's registers.
inline int64_t for_tensor_cores(int64_t i) {
  const int64_t half = i / 256 % 2, k = i % 8;
  return i / 512 * 512 + k / 4 * 256 + i % 256 / 8 * 8 + k % 4 / 2 * 4 + half * 2 + k % 2;
}

// out: layout.weights of W, zeros; floats: layout.floats.
template <class W>
void pack(const Weights& w, const Shape& s, const Layout& layout, W* out, float* floats) {
  const auto matrix = [&](int64_t at, const Tiles& m, auto&& weight) {
    for (int64_t unit = 0; unit < m.units; ++unit)
      for (int row = 0; row < (m.pairs ? 2 : 1); ++row)
        for (int64_t k = 0; k < m.inputs; ++k) {
          const int64_t place = m.at(unit, row, k);
          convert(weight(row * m.units + unit, k), out + at + (sizeof(W) == 2 ? for_tensor_cores(place) : place));
        }
  };
  const auto plain = [](const float* from, int inputs) {
    return [=](int64_t row, int64_t k) { return from[row * inputs + k]; };
  };
  for (int l = 0; l < s.layers; ++l) {
    const int64_t at = layout.layer * l;
    const float* conv = w.conv + int64_t{l} * 2 * s.gate * s.residual * s.kernel_size;
    const auto tap = [&](int j) {
      return
          [=](int64_t row, int64_t k) { return conv[(row * s.residual + k) * s.kernel_size + s.kernel_size - 1 - j]; };
    };
    matrix(at, layout.tap, tap(0));
    for (int j = 1; j < s.kernel_size; ++j) matrix(at + layout.old_at(j), layout.tap, tap(j));
    matrix(at + layout.residual_at(), layout.residual, plain(w.residual + int64_t{l} * s.residual * s.gate, s.gate));
    matrix(at + layout.skip_at(), layout.skip, plain(w.skip + int64_t{l} * s.skip * s.gate, s.gate));
    if (s.local > 0)
      matrix(at + layout.local_at(), layout.local, plain(w.local + int64_t{l} * 2 * s.gate * s.local, s.local));
  }
  matrix(layout.head, layout.hidden, plain(w.hidden, s.skip));
  matrix(layout.head + layout.hidden.size(), layout.output, plain(w.output, s.skip));
  const auto vector = [&](int64_t at, const float* from, int64_t n) {
    if (n > 0) std::memcpy(floats + at, from, n * sizeof(float));
  };
  vector(layout.residual_bias, w.residual_bias, int64_t{s.layers} * s.residual);
  vector(layout.skip_bias, w.skip_bias, s.skip);
  vector(layout.hidden_bias, w.hidden_bias, s.skip);
  vector(layout.output_bias, w.output_bias, s.outputs);
  vector(layout.input_bias, w.input_bias, s.residual);
  vector(layout.input, w.input, int64_t{s.inputs} * s.residual);
}

}  // namespace fastgen::wavenet
