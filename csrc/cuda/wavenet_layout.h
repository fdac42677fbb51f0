// Where a WaveNet's weights lie for wavenet_generate.cuh, and which of them a block of a cluster has.
#pragma once

#include "tiles.h"

namespace fastgen::wavenet {

struct Shape {
  int inputs, residual, gate, skip, outputs, layers, kernel_size, local;  // local: channels of conditioning, or 0
};

// Weights: for each layer the current tap, residual, skip, the old taps and the conditioning's; then hidden and output.
// Behind them floats: residual biases, skip bias, hidden bias, output bias, input bias, input table.
struct Layout {
  Tiles tap, residual, skip, local, hidden, output;
  int64_t layer, head, weights;  // sizes, in weights
  int64_t residual_bias, skip_bias, hidden_bias, output_bias, input_bias, input, floats;

  FASTGEN_HOST_DEVICE explicit Layout(const Shape& s)
      : tap{s.gate, s.residual, true},
        residual{s.residual, s.gate, false},
        skip{s.skip, s.gate, false},
        local{s.gate, s.local, true},
        hidden{s.skip, s.skip, false},
        output{s.outputs, s.skip, false} {
    layer = tap.size() * s.kernel_size + residual.size() + skip.size() + local.size();
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
  FASTGEN_HOST_DEVICE int64_t local_at() const { return skip_at() + skip.size(); }
  FASTGEN_HOST_DEVICE int64_t old_at(int j) const { return local_at() + local.size() + (j - 1) * tap.size(); }
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

// Lengths of vectors, padded so that a product may read whole tiles, and a sampler whole groups.
struct Lengths {
  int x, input, z, s, outputs;
  FASTGEN_HOST_DEVICE explicit Lengths(const Layout& layout)
      : x(static_cast<int>(layout.tap.padded())),
        input(static_cast<int>(layout.local.padded() > x ? layout.local.padded() : x)),
        z(static_cast<int>(layout.skip.padded())),
        s(static_cast<int>(layout.hidden.padded())),
        outputs(static_cast<int>(round_up(layout.output.units, kGroup))) {}
};

}  // namespace fastgen::wavenet
