// One call of wavenet_generate on a GPU, and how it is laid out there: host code, without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "runtime.h"
#include "wavenet_layout.h"

namespace fastgen::wavenet {

constexpr int kThreads = 256;  // of a block
constexpr int kTile = 4;       // streams that share each weight that is read, where there are many

enum class Distribution { kCategorical = 0, kLogisticMixture = 1, kGaussianMixture = 2 };

struct Job {
  Shape shape;
  int cluster, tiles;  // blocks of a group, tiles of streams that it takes
  Layout layout;
  Vectors lengths;
  int64_t largest_share;  // of a block, in weights
  Distribution distribution;
  float temperature, log_scale_min;
  int64_t streams, steps, given_steps, position, history_rows, history_stride;
  const void* weights;
  const float* floats;
  const int64_t *dilations, *history_at;  // of each layer: the dilation, and its first row of the history
  const float *gate_bias, *cond, *uniforms;
  int64_t gate_bias_stride;
  float *history, *parameters;
  const int64_t* given_class;
  const float* given_value;
  int64_t *classes, *last_class;
  float *values, *last_value;

  Job(const Shape& shape, int threads, int cluster, int tiles)
      : shape(shape), cluster(cluster), tiles(tiles), layout(shape, threads), lengths(layout, shape, cluster) {
    largest_share = 0;
    for (int rank = 0; rank < cluster; ++rank)
      largest_share = std::max(largest_share, Share(layout, shape, rank, cluster).size);
  }

  // Of shared memory in a block, for tiles of n streams; weight_bytes: of a weight that lies there, or 0.
  int64_t shared_bytes(int64_t n, int64_t weight_bytes) const {
    int64_t bytes = 0;
    for (const int64_t array : {
             largest_share * weight_bytes,
             4 * tiles * n * lengths.x,
             4 * tiles * n * lengths.s,
             4 * tiles * lengths.layers * n * 2 * shape.gate,
             12 * n * lengths.x,
             4 * lengths.layers * n * lengths.z,
             8 * n * lengths.s,
             4 * n * lengths.out,
             8 * tiles * n,
             4 * tiles * n,
             int64_t{24} * tiles,
         })
      bytes += round_up(array, 16);
    return bytes;
  }

  int64_t groups(int64_t tile) const { return (streams + tiles * tile - 1) / (tiles * tile); }
};

struct Plan {
  int cluster, tile, tiles;
  bool resident;
};

// The smallest cluster on whose chips the weights fit, or the largest, which reads them from memory: then every step
// costs their traffic. `active(plan)`: how many such clusters the GPU can hold at once; 0 if none.
template <class F>
Plan choose(const Shape& shape, int64_t streams, int64_t weight_bytes, const Device& device, F&& active) {
  const auto fits = [&](const Plan& p) {
    const Job job(shape, kThreads, p.cluster, p.tiles);
    return job.shared_bytes(p.tile, p.resident ? weight_bytes : 0) <= device.shared_bytes && active(p) > 0;
  };
  const int most = std::max(1, std::min(device.largest_cluster, shape.layers + 1));
  Plan plan{0, 1, 1, true};
  for (int cluster = 1; cluster <= most && plan.cluster == 0; ++cluster)
    if (fits({cluster, 1, 1, true})) plan.cluster = cluster;
  for (int cluster = most; cluster >= 1 && plan.cluster == 0; --cluster)
    if (fits({cluster, 1, 1, false})) plan = {cluster, 1, 1, false};
  if (plan.cluster == 0) return plan;  // not even the vectors of one stream fit
  // as many streams in a group as fill the pipeline, or as leave no group waiting for another
  const int64_t groups = std::max<int64_t>(1, active(plan));
  const int64_t each = (streams + groups - 1) / groups;
  if (each <= plan.cluster) {
    plan.tiles = static_cast<int>(std::max<int64_t>(1, each));
  } else {
    plan.tile = kTile;
    plan.tiles = static_cast<int>((each + kTile - 1) / kTile);
  }
  while (plan.tiles > 1 && !fits(plan)) --plan.tiles;
  if (plan.tile > 1 && !fits(plan)) {
    plan.tile = 1;
    plan.tiles = static_cast<int>(std::min<int64_t>(each, 64));
    while (plan.tiles > 1 && !fits(plan)) --plan.tiles;
  }
  return plan;
}

}  // namespace fastgen::wavenet
