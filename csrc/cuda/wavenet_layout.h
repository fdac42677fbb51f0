// Where a WaveNet's weights lie for wavenet_generate.cuh, and how large what a block holds is.
//
// `split` threads of a block share a row, or the tanh and the sigmoid row of a gate, which are one unit. Each takes
// every split-th group of 8 inputs; the groups that the block's threads read together lie side by side, 16 bytes or
// more for each thread.
#pragma once

#include <cstdint>

#include "../normal_quantile.h"
#include "group.h"

namespace fastgen::wavenet {

struct Shape {
  int inputs, residual, gate, skip, outputs, layers, kernel_size;
};

FASTGEN_HOST_DEVICE inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A matrix of `units` rows, or pairs of rows, for blocks of `threads`.
struct Matrix {
  int units, inputs, rows, split, stride;  // rows: 1, or 2 for pairs; stride: units that are computed together

  FASTGEN_HOST_DEVICE Matrix(int units, int inputs, int rows, int threads)
      : units(units), inputs(inputs), rows(rows), split(1) {
    while (split < 32 && 2 * split * units <= threads && split * kGroup < inputs) split *= 2;
    const int together = threads / split;
    stride = units < together ? units : together;
  }
  FASTGEN_HOST_DEVICE int padded() const { return static_cast<int>(round_up(inputs, kGroup * split)); }
  FASTGEN_HOST_DEVICE int64_t size() const { return round_up(units, stride) * padded() * rows; }
  FASTGEN_HOST_DEVICE int64_t at(int unit, int row, int input) const {
    const int group = input / kGroup;
    const int64_t step = int64_t{unit / stride} * (padded() / (kGroup * split)) + group / split;
    return (((step * stride + unit % stride) * split + group % split) * rows + row) * kGroup + input % kGroup;
  }
};

// Weights: for each layer the current tap, residual, skip and the old taps; then hidden and output. Behind them floats:
// residual biases, skip bias, hidden bias, output bias, input bias, input table.
struct Layout {
  Matrix tap, residual, skip, hidden, output;
  int64_t layer, head, weights;  // sizes, in weights
  int64_t residual_bias, skip_bias, hidden_bias, output_bias, input_bias, input, floats;

  FASTGEN_HOST_DEVICE Layout(const Shape& s, int threads)
      : tap(s.gate, s.residual, 2, threads),
        residual(s.residual, s.gate, 1, threads),
        skip(s.skip, s.gate, 1, threads),
        hidden(s.skip, s.skip, 1, threads),
        output(s.outputs, s.skip, 1, threads) {
    layer = tap.size() * s.kernel_size + residual.size() + skip.size();
    head = layer * s.layers;
    weights = head + hidden.size() + output.size();
    residual_bias = 0;
    skip_bias = residual_bias + int64_t{s.layers} * s.residual;
    hidden_bias = skip_bias + s.skip;
    output_bias = hidden_bias + s.skip;
    input_bias = output_bias + s.outputs;
    input = input_bias + s.residual;
    floats = input + int64_t{s.inputs} * s.residual;
  }
  FASTGEN_HOST_DEVICE int64_t residual_at() const { return tap.size(); }
  FASTGEN_HOST_DEVICE int64_t skip_at() const { return residual_at() + residual.size(); }
  FASTGEN_HOST_DEVICE int64_t old_at(int j) const { return skip_at() + skip.size() + (j - 1) * tap.size(); }
};

// The share of block `rank` of a cluster: all but the last have layers, the last the output layers; one alone has all.
struct Share {
  int first, last;  // layers
  bool head;
  int64_t begin, size;  // weights

  FASTGEN_HOST_DEVICE Share(const Layout& layout, const Shape& s, int rank, int cluster) {
    const int workers = cluster > 1 ? cluster - 1 : 1;
    head = rank == cluster - 1;
    first = rank < workers ? static_cast<int>(int64_t{s.layers} * rank / workers) : s.layers;
    last = rank < workers ? static_cast<int>(int64_t{s.layers} * (rank + 1) / workers) : s.layers;
    begin = layout.layer * first;
    size = (head ? layout.weights : layout.layer * last) - begin;
  }
  FASTGEN_HOST_DEVICE int layers() const { return last - first; }
};

// Vectors of a block, padded so that a product may read past their ends; the same in every block of a cluster.
struct Vectors {
  int x, z, s, out;  // lengths
  int layers;        // that a block may have
  FASTGEN_HOST_DEVICE Vectors(const Layout& layout, const Shape& shape, int cluster)
      : x(layout.tap.padded()),
        z(layout.residual.padded() > layout.skip.padded() ? layout.residual.padded() : layout.skip.padded()),
        s(layout.hidden.padded() > layout.output.padded() ? layout.hidden.padded() : layout.output.padded()),
        out(shape.outputs),
        layers((shape.layers + (cluster > 1 ? cluster - 2 : 0)) / (cluster > 1 ? cluster - 1 : 1)) {}
};

}  // namespace fastgen::wavenet
