// One call of wavenet_generate on a GPU, and how it is laid out there: host code, without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../truncation.h"
#include "runtime.h"
#include "wavenet_layout.h"

namespace fastgen::wavenet {

constexpr int kThreads = 256;    // of a block
constexpr int kLargestTile = 8;  // streams

enum class Distribution { kCategorical = 0, kLogisticMixture = 1, kGaussianMixture = 2 };

// cluster: blocks of a group; tiles: of `tile` streams each that it takes; resident: weights on the chip; spilled: what
// grows with the number of layers lies in global memory.
struct Plan {
  int cluster, tile, tiles;
  bool resident, spilled;

  int vectors() const { return tile > 4 ? 2 : 1; }  // fours of vectors that a product takes
};

// What a product needs of a matrix: its units, tiles and steps through them; where it lies behind the layer's or the
// head's first weight.
struct Matrix {
  int units, tiles, steps;
  int64_t at;

  Matrix(const Tiles& m, int64_t at)
      : units(static_cast<int>(m.units)),
        tiles(static_cast<int>(m.count())),
        steps(static_cast<int>(m.padded()) / kTileInputs),
        at(at) {}
};

struct Job {
  Shape shape;
  int cluster, tile, tiles;
  Layout layout;
  Lengths lengths;
  Matrix tap, residual, skip, local, hidden, output;
  int64_t old_at, old_size;  // of a layer's taps before the current one
  Distribution distribution;
  float temperature, log_scale_min;
  Truncation kept;
  int64_t streams, steps, given_steps, position, history_rows, history_stride;
  const void* weights;
  const float* floats;
  const int64_t *dilations, *history_at;  // of each layer: the dilation, and its first row of the history
  // cond: (streams, steps, layers, 2 gate), or features (streams, steps, local), or null
  const float *gate_bias, *cond, *uniforms;
  int64_t gate_bias_stride;
  float *history, *parameters;
  unsigned char* scratch;  // of each block `scratch_bytes`, where the plan is spilled; else null
  int64_t scratch_bytes;
  const int64_t* given_class;
  const float* given_value;
  int64_t *classes, *last_class;
  float *values, *last_value;

  Job(const Shape& shape, const Plan& plan)
      : shape(shape),
        cluster(plan.cluster),
        tile(plan.tile),
        tiles(plan.tiles),
        layout(shape),
        lengths(layout),
        tap(layout.tap, 0),
        residual(layout.residual, layout.residual_at()),
        skip(layout.skip, layout.skip_at()),
        local(layout.local, layout.local_at()),
        hidden(layout.hidden, 0),
        output(layout.output, layout.hidden.size()),
        old_at(layout.old_at(1)),
        old_size(layout.tap.size()),
        scratch(nullptr),
        scratch_bytes(plan.spilled ? most_of_layers(plan) : 0) {}

  // Of shared memory in the block that needs most; weight_bytes: of a weight that lies there, or 0.
  int64_t shared_bytes(const Plan& plan, int64_t weight_bytes) const {
    const int64_t n = 4 * plan.vectors();
    int64_t most = 0;
    for (int rank = 0; rank < cluster; ++rank) {
      const Share share(layout, shape, rank, cluster);
      const int64_t head = share.head;
      int64_t bytes = plan.spilled ? 0 : of_layers(plan, share.layers());
      for (const int64_t array :
           {4 * tiles * n * lengths.x, 4 * tiles * n * lengths.s, 4 * tiles * n, 4 * tiles * n, int64_t{24} * tiles,
            share.size * weight_bytes, 4 * n * lengths.input, 4 * head * n * lengths.s, 4 * head * n * lengths.s,
            4 * head * n * lengths.outputs, 4 * head * (shape.skip + shape.outputs), 8 * head * n,
            int64_t{rank == 0} * 4 * shape.skip, int64_t{rank == 0} * 4 * shape.residual})
        bytes += round_up(array, 16);
      most = std::max(most, bytes);
    }
    return most;
  }

  int64_t groups() const { return (streams + tiles * tile - 1) / (tiles * tile); }

 private:
  // What a block keeps of each of its layers: x, pending sums, z, the residual's and the gates' biases, the queue.
  int64_t of_layers(const Plan& plan, int64_t layers) const {
    const int64_t n = layers * 4 * plan.vectors();
    return round_up(std::max<int64_t>(n, 4 * plan.vectors()) * 4 * lengths.x, 16) +
           round_up(4 * n * 2 * shape.gate, 16) + round_up(4 * n * lengths.z, 16) +
           round_up(4 * layers * shape.residual, 16) + round_up(8 * layers * shape.gate, 16) + 32 * layers;
  }
  int64_t most_of_layers(const Plan& plan) const {
    int64_t most = 0;
    for (int rank = 0; rank < cluster; ++rank)
      most = std::max(most, of_layers(plan, Share(layout, shape, rank, cluster).layers()));
    return most;
  }
};

// The smallest cluster on whose chips the weights fit, or the largest, which reads them from memory: then every step
// costs their traffic; and if need be that of what a block keeps of its layers. `active(plan)`: how many such clusters
// the GPU can hold at once; 0 if none.
template <class F>
Plan choose(const Shape& shape, int64_t streams, int64_t weight_bytes, const Device& device, F&& active) {
  const auto fits = [&](const Plan& p) {
    return Job(shape, p).shared_bytes(p, p.resident ? weight_bytes : 0) <= device.shared_bytes && active(p) > 0;
  };
  const int most = std::max(1, std::min(device.largest_cluster, shape.layers + 1));
  Plan plan{0, 1, 1, true, false};
  for (int cluster = 1; cluster <= most && plan.cluster == 0; ++cluster)
    if (fits({cluster, 1, 1, true, false})) plan.cluster = cluster;
  for (const bool spilled : {false, true})
    for (int cluster = most; cluster >= 1 && plan.cluster == 0; --cluster)
      if (fits({cluster, 1, 1, false, spilled})) plan = {cluster, 1, 1, false, spilled};
  if (plan.cluster == 0) return plan;  // not even the vectors of one stream fit
  // As many streams in a group as leave no group waiting for another. A product takes four as fast as one, eight not
  // quite as fast; some tiles are on their way through the blocks at once, of which none waits for another.
  const int64_t groups = std::max(1, active(plan)), each = (streams + groups - 1) / groups;
  for (const int64_t largest : {int64_t{each <= 16 ? 4 : kLargestTile}, int64_t{4}}) {
    const int64_t tiles = std::min<int64_t>(64, (each + largest - 1) / largest);
    plan.tile = static_cast<int>(std::min((each + tiles - 1) / tiles, largest));
    for (plan.tiles = static_cast<int>(tiles); plan.tiles > 1 && !fits(plan);) --plan.tiles;
    if (fits(plan)) break;
  }
  return plan;
}

}  // namespace fastgen::wavenet
