// Samples from the parameters of one step, by inversion: the same uniforms give the same samples on every backend.
#pragma once

#include "../normal_quantile.h"
#include "functions.h"

namespace fastgen {
namespace {

enum class Distribution { kCategorical = 0, kLogisticMixture = 1, kGaussianMixture = 2 };

// What sample_categorical needs to work in.
inline int64_t sampling_scratch(int classes) { return 2 * round_up(classes, kF); }

// The number of classes whose cumulative probability is <= u, for softmax(logits / temperature).
inline int64_t sample_categorical(const float* logits, int classes, float temperature, float u, float* p) {
  const int padded = static_cast<int>(round_up(classes, kF));
  const float scale = 1.0f / temperature;
  for (int i = 0; i < classes; ++i) p[i] = logits[i] * scale;
  for (int i = classes; i < padded; ++i) p[i] = -INFINITY;
  VecF tops = load(p);
  for (int i = kF; i < padded; i += kF) {
    const VecF x = load(p + i);
    tops = x > tops ? x : tops;
  }
  const float top = largest_lane<float>(tops);
  float total = 0;
  float* sum = p + padded;
  for (int i = 0; i < padded; i += kF) {
    const VecF e = exp_bounded(at_least(load(p + i) - top, -87.0f));
    store(p + i, e);
    total += sum[i / kF] = sum_of_lanes<float>(e);
  }
  const float threshold = u * total;
  float below = 0;
  for (int i = 0; i < padded; i += kF) {
    if (below + sum[i / kF] <= threshold) {
      below += sum[i / kF];
      continue;
    }
    int c = i;
    for (; c < i + kF - 1; ++c) {
      below += p[c];
      if (below > threshold) break;
    }
    return std::min(c, classes - 1);
  }
  return classes - 1;
}

// One value from a mixture of logistics or Gaussians, in [-1, 1]. parameters: [logits | means | log scales], without
// logits where there is one component (outputs == 2). u chooses the component, v the value within it.
inline float sample_mixture(Distribution kind, const float* parameters, int outputs, float temperature,
                            float log_scale_min, float u, float v, float* scratch) {
  const int mixtures = outputs == 2 ? 1 : outputs / 3;
  const float* means = parameters + outputs - 2 * mixtures;
  const int64_t i = mixtures == 1 ? 0 : sample_categorical(parameters, mixtures, temperature, u, scratch);
  const double p = std::min(std::max(static_cast<double>(v), 1e-7), 1.0 - 1e-7);
  const double unit = kind == Distribution::kLogisticMixture ? std::log(p) - std::log1p(-p) : normal_quantile(p);
  const float log_scale = std::max(means[mixtures + i], log_scale_min);
  const double x = means[i] + static_cast<double>(temperature) * std::exp(static_cast<double>(log_scale)) * unit;
  return static_cast<float>(std::min(std::max(x, -1.0), 1.0));
}

}  // namespace
}  // namespace fastgen
