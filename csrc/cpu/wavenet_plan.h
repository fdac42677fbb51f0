// What WaveNet sampling is asked for, and how the work of its layers is laid out: what is computed ahead, and by whom.
#pragma once

#include <algorithm>
#include <bit>

#include "sampling.h"
#include "wavenet_weights.h"

namespace fastgen {
namespace {

constexpr int kAhead = 8;       // samples for which old taps are computed together
constexpr int kTold = 4;        // layers of which the helping thread hears at a time
constexpr int kOwned = 3;       // layers by which lines are asked for ahead
constexpr int kFewStreams = 2;  // up to here old taps are computed ahead; above, streams share the weights anyway

// One call's arguments.
struct Job {
  Shape shape;
  std::vector<int64_t> dilations;
  Distribution distribution;
  float temperature, log_scale_min;
  Truncation kept;
  int64_t streams, steps, given_steps, position, uniforms_per_step;
  const float *gate_bias, *cond, *uniforms;
  int64_t gate_bias_stride;  // 0 where all streams share it
  float *history, *parameters;
  const int64_t* given_class;
  const float* given_value;
  int64_t *classes, *last_class;
  float *values, *last_value;
};

struct Layer {
  int64_t dilation, pending;
  int ahead, offset;
  bool helped;    // its old taps can be the helper's work: they are known more than a block of steps ahead
  bool led_skip;  // its skip is the leader's
};

struct Plan {
  OwnVector<Layer> layers;
  OwnVector<int> told;  // the last of the layers of which a helping thread hears at once
  int64_t pending = 0;  // floats for what is prepared ahead

  // Of some streams; in_roles: for two threads of which one helps.
  Plan(const Job& job, int streams, bool in_roles) {
    const Shape& s = job.shape;
    const int h = s.gate_padded();
    layers.resize(s.layers);
    bool shared_pending = false;
    for (int l = 0; l < s.layers; ++l) {
      Layer& layer = layers[l];
      layer.dilation = job.dilations[l];
      layer.ahead =
          streams > kFewStreams ? 1 : std::bit_floor(static_cast<uint32_t>(std::min<int64_t>(kAhead, layer.dilation)));
      layer.helped = in_roles && s.kernel_size > 1 && layer.dilation >= 2 * kAhead;
      layer.offset = layer.helped ? l % kAhead : 0;
      layer.pending = pending;
      if (in_roles || layer.ahead > 1)
        pending += int64_t{2} * layer.ahead * streams * 2 * h;
      else
        shared_pending = true;
    }
    if (streams == 1) share_skips(s);
    for (int l = s.layers - 1, size = 1; l >= 0; l -= size, size = std::min<int>(told.size(), kTold))
      told.insert(told.begin(), l);
    // layers that prepare nothing ahead use their block at once, so they share one
    for (Layer& layer : layers)
      if (!in_roles && layer.ahead == 1) layer.pending = pending;
    if (shared_pending) pending += int64_t{2} * streams * 2 * h;
  }

 private:
  // Where the helper has more to read in a step than the leader, some skips, never the last, move over. One thread, and
  // a team, sum them apart too, so that the same bits come out.
  void share_skips(const Shape& s) {
    const double conv = 2.0 * s.gate * s.residual, skip = static_cast<double>(s.skip) * s.gate;
    double leader = s.layers * (conv + static_cast<double>(s.gate) * s.residual);
    double helper = s.layers * skip + static_cast<double>(s.skip) * (s.skip + s.outputs);
    for (const Layer& layer : layers)
      (layer.dilation >= 2 * kAhead ? helper : leader) += (s.kernel_size - 1) * conv / layer.ahead;
    const int moved = static_cast<int>(std::clamp((helper - leader) / (2 * skip), 0.0, s.layers / 2.0));
    for (int i = 0; i < moved; ++i) layers[i * s.layers / moved].led_skip = true;
  }
};

}  // namespace
}  // namespace fastgen
