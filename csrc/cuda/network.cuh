// What the kernels that sample from networks share: products, the gate, a categorical sample.
#pragma once

#include "../truncation.h"
#include "product.cuh"

namespace fastgen {

FASTGEN_DEVICE float gate(float a, float b) { return tanhf(a) / (1 + expf(-b)); }

FASTGEN_DEVICE float sum_of_warp(float v) {
  for (int lanes = 1; lanes < 32; lanes *= 2) v += shuffle_xor(v, lanes);
  return v;
}

FASTGEN_DEVICE float most_of_warp(float v) {
  for (int lanes = 1; lanes < 32; lanes *= 2) v = fmaxf(v, shuffle_xor(v, lanes));
  return v;
}

// The weights exp((logit - top) / temperature) of some classes, by one warp, whose lanes each have some in a row.
struct ClassWeights {
  const float* logits;
  float scale, top = -3.4e38f;
  int begin, end;

  FASTGEN_DEVICE ClassWeights(const float* logits, int classes, float temperature)
      : logits(logits), scale(1 / temperature) {
    const int each = (classes + 31) / 32, first = thread() % 32 * each;
    begin = first < classes ? first : classes;
    end = begin + each < classes ? begin + each : classes;
    for (int c = begin; c < end; ++c) top = fmaxf(top, logits[c]);
    top = most_of_warp(top);
  }
  FASTGEN_DEVICE float of(int c) const { return expf((logits[c] - top) * scale); }
};

// How many of the classes have a cumulative probability <= u, of those whose weight is `least` or more.
FASTGEN_DEVICE int sample_classes(const ClassWeights& weights, float u, float least = 0) {
  float own = 0, last = 0;  // last: the last class that is drawn from
  for (int c = weights.begin; c < weights.end; ++c) {
    const float w = weights.of(c);
    if (w >= least) own += w;
    if (w > 0 && w >= least) last = static_cast<float>(c);
  }
  float until = own;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float before = shuffle_up(until, lanes);
    if (thread() % 32 >= lanes) until += before;
  }
  const float threshold = u * sum_of_warp(own);
  float below = until - own, count = 0;
  for (int c = weights.begin; c < weights.end; ++c) {
    const float w = weights.of(c);
    if (w >= least) below += w;
    if (below <= threshold) ++count;
  }
  return static_cast<int>(fminf(sum_of_warp(count), most_of_warp(last)));
}

// A sample of softmax(logits / temperature), by one warp.
FASTGEN_DEVICE int sample_categorical(const float* logits, int classes, float temperature, float u) {
  return sample_classes({logits, classes, temperature}, u);
}

// The same of what is kept.
FASTGEN_APART int sample_most_probable(const float* logits, int classes, float temperature, float u,
                                       const Truncation& kept) {
  const ClassWeights weights(logits, classes, temperature);
  const auto reaching = [&](float t, bool count) {
    float own = 0;
    for (int c = weights.begin; c < weights.end; ++c) {
      const float w = weights.of(c);
      if (w >= t) own += count ? 1 : w;
    }
    return sum_of_warp(own);
  };
  const float least =
      least_kept(kept, [&](float t) { return reaching(t, true); }, [&](float t) { return reaching(t, false); });
  return sample_classes(weights, u, least);
}

}  // namespace fastgen
