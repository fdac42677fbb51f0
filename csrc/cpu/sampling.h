// Samples from the parameters of one step, by inversion: the same uniforms give the same samples on every backend.
#pragma once

#include "../normal_quantile.h"
#include "../truncation.h"
#include "functions.h"

namespace fastgen {
namespace {

enum class Distribution { kCategorical = 0, kLogisticMixture = 1, kGaussianMixture = 2 };

// What sample_categorical needs to work in.
inline int64_t sampling_scratch(int classes) { return 2 * round_up(classes, kF); }

// Weights in proportion to probabilities, zero where the class is not drawn from.
[[gnu::noinline]] inline void truncate(float* p, int vectors, const Truncation& kept) {
  const auto reaching = [&](float t, auto&& of) {
    VecF sum{};
    for (int v = 0; v < vectors; ++v) {
      const VecF weights = load(p + v * kF), zero{};
      sum += weights >= t ? of(weights) : zero;
    }
    return sum_of_lanes<float>(sum);
  };
  const float least = least_kept(
      kept, [&](float t) { return reaching(t, [](VecF) FASTGEN_INLINE { return splat(1.0f); }); },
      [&](float t) { return reaching(t, [](VecF weights) FASTGEN_INLINE { return weights; }); });
  for (int v = 0; v < vectors; ++v) {
    const VecF weights = load(p + v * kF), zero{};
    store(p + v * kF, weights >= least ? weights : zero);
  }
}

// The number of classes whose cumulative probability is <= u, for softmax(logits / temperature) of what is kept.
inline int64_t sample_categorical(const float* logits, int classes, float temperature, float u, float* p,
                                  const Truncation& kept = {}) {
  const int vectors = static_cast<int>(round_up(classes, kF)) / kF;
  float* sums = p + vectors * kF;  // of each vector's lanes
  const auto logits_at = [&](int v) {
    if ((v + 1) * kF <= classes) return load(logits + v * kF);
    VecF some = splat(-INFINITY);
    std::memcpy(&some, logits + v * kF, (classes - v * kF) * sizeof(float));
    return some;
  };
  VecF tops = logits_at(0), totals = {};
  for (int v = 1; v < vectors; ++v) tops = larger<float>(logits_at(v), tops);
  const float top = largest_lane<float>(tops), scale = 1.0f / temperature;
  for (int v = 0; v < vectors; ++v) {
    const VecF x = (logits_at(v) - top) * scale, zero = {};
    store(p + v * kF,
          x < -87.0f ? zero : exp_bounded(x));  // zero, or a uniform of 0 would draw a class of probability 0
  }
  if (kept.any()) truncate(p, vectors, kept);
  for (int first = 0; first < vectors; first += kF) {
    VecF rows[kF];
    unroll<kF>([&](auto i) FASTGEN_INLINE { rows[i] = first + i < vectors ? load(p + (first + i) * kF) : VecF{}; });
    const VecF of_rows = sums_of_rows<float>(rows);
    store(sums + first, of_rows);
    totals += of_rows;
  }
  const float threshold = u * sum_of_lanes<float>(totals);
  float below = 0;                            // the sum of all that is passed
  const auto passed = [&](const float* at) {  // how many of a vector's lanes are
    const VecF upto = running_sums<float>(load(at)) + below;
    const int n = std::popcount(sign_bits<float>((VecF)(upto <= threshold)));
    if (n > 0) below = upto[n - 1];
    return n;
  };
  int drawn = classes - 1;
  for (int first = 0; first < vectors; first += kF) {
    const int n = passed(sums + first);
    if (n == kF) continue;
    const int v = first + n;
    if (v < vectors) drawn = std::min(v * kF + passed(p + v * kF), classes - 1);
    break;
  }
  while (drawn > 0 && p[drawn] == 0) --drawn;  // all sums may round to less than the threshold
  return drawn;
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
