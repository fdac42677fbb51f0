// One call of wavenet_generate on a GPU, and how it is laid out there: host code, without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "runtime.h"
#include "wavenet_layout.h"

namespace fastgen::wavenet {

constexpr int kThreads = 256;    // of a block
constexpr int kLargestTile = 8;  // streams

enum class Distribution { kCategorical = 0, kLogisticMixture = 1, kGaussianMixture = 2 };

// cluster: blocks of a group; tiles: of `tile` streams each that it takes; resident: weights on the chip.
struct Plan {
  int cluster, tile, tiles;
  bool resident;

  int vectors() const { return tile > 4 ? 2 : 1; }  // fours of vectors that a product takes
};

struct Job {
  Shape shape;
  int cluster, tile, tiles;
  Layout layout;
  Lengths lengths;
  Distribution distribution;
  float temperature, log_scale_min;
  int64_t streams, steps, given_steps, position, history_rows, history_stride;
  const void* weights;
  const float* floats;
  const int64_t *dilations, *history_at;  // of each layer: the dilation, and its first row of the history
  // cond: (streams, steps, layers, 2 gate), or features (streams, steps, local), or null
  const float *gate_bias, *cond, *uniforms;
  int64_t gate_bias_stride;
  float *history, *parameters;
  const int64_t* given_class;
  const float* given_value;
  int64_t *classes, *last_class;
  float *values, *last_value;

  Job(const Shape& shape, const Plan& plan)
      : shape(shape), cluster(plan.cluster), tile(plan.tile), tiles(plan.tiles), layout(shape), lengths(layout) {}

  // Of shared memory in the block that needs most; weight_bytes: of a weight that lies there, or 0.
  int64_t shared_bytes(const Plan& plan, int64_t weight_bytes) const {
    const int64_t n = 4 * plan.vectors();
    int64_t most = 0;
    for (int rank = 0; rank < cluster; ++rank) {
      const Share share(layout, shape, rank, cluster);
      const int64_t head = share.head, layers = share.layers();
      int64_t bytes = 0;
      for (const int64_t array :
           {4 * tiles * n * shape.residual, 4 * tiles * n * shape.skip, 8 * tiles * n, 4 * tiles * n,
            int64_t{24} * tiles, share.size * weight_bytes, 4 * layers * n * 2 * shape.gate, 8 * n * lengths.x,
            8 * n * lengths.x, 4 * n * lengths.past, 4 * layers * n * lengths.z, 4 * n * shape.skip,
            4 * head * n * lengths.s, 4 * head * n * lengths.s, 4 * head * n * shape.outputs})
        bytes += round_up(array, 16);
      most = std::max(most, bytes);
    }
    return most;
  }

  int64_t groups() const { return (streams + tiles * tile - 1) / (tiles * tile); }
};

// The smallest cluster on whose chips the weights fit, or the largest, which reads them from memory: then every step
// costs their traffic. `active(plan)`: how many such clusters the GPU can hold at once; 0 if none.
template <class F>
Plan choose(const Shape& shape, int64_t streams, int64_t weight_bytes, const Device& device, F&& active) {
  const auto fits = [&](const Plan& p) {
    return Job(shape, p).shared_bytes(p, p.resident ? weight_bytes : 0) <= device.shared_bytes && active(p) > 0;
  };
  const int most = std::max(1, std::min(device.largest_cluster, shape.layers + 1));
  Plan plan{0, 1, 1, true};
  for (int cluster = 1; cluster <= most && plan.cluster == 0; ++cluster)
    if (fits({cluster, 1, 1, true})) plan.cluster = cluster;
  for (int cluster = most; cluster >= 1 && plan.cluster == 0; --cluster)
    if (fits({cluster, 1, 1, false})) plan = {cluster, 1, 1, false};
  if (plan.cluster == 0) return plan;  // not even the vectors of one stream fit
  // as many streams in a group as leave no group waiting for another: a product takes four as fast as one
  const int64_t groups = std::max(1, active(plan)), each = (streams + groups - 1) / groups;
  for (const int64_t largest : {int64_t{kLargestTile}, int64_t{4}}) {
    const int64_t tiles = std::min<int64_t>(64, (each + largest - 1) / largest);
    plan.tile = static_cast<int>(std::min((each + tiles - 1) / tiles, largest));
    for (plan.tiles = static_cast<int>(tiles); plan.tiles > 1 && !fits(plan);) --plan.tiles;
    if (fits(plan)) break;
  }
  return plan;
}

}  // namespace fastgen::wavenet
