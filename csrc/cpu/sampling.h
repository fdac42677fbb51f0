// Samples from the parameters of one step, by inversion: the same uniforms give the same samples on every backend.
#pragma once

#include "simd.h"

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
  float top = tops[0];
  for (int i = 1; i < kF; ++i) top = tops[i] > top ? tops[i] : top;
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

// The inverse of the standard normal distribution function (Wichura's AS 241, 1988), good to 1e-15.
inline double normal_quantile(double p) {
  const double q = p - 0.5;
  if (std::fabs(q) <= 0.425) {
    const double r = 0.180625 - q * q;
    return q *
           (((((((2.5090809287301226727e3 * r + 3.3430575583588128105e4) * r + 6.7265770927008700853e4) * r +
                4.5921953931549871457e4) *
                   r +
               1.3731693765509461125e4) *
                  r +
              1.9715909503065514427e3) *
                 r +
             1.3314166789178437745e2) *
                r +
            3.3871328727963666080e0) /
           (((((((5.2264952788528545610e3 * r + 2.8729085735721942674e4) * r + 3.9307895800092710610e4) * r +
                2.1213794301586595867e4) *
                   r +
               5.3941960214247511077e3) *
                  r +
              6.8718700749205790830e2) *
                 r +
             4.2313330701600911252e1) *
                r +
            1.0);
  }
  double r = std::sqrt(-std::log(q < 0 ? p : 1.0 - p));
  double value;
  if (r <= 5.0) {
    r -= 1.6;
    value = (((((((7.74545014278341407640e-4 * r + 2.27238449892691845833e-2) * r + 2.41780725177450611770e-1) * r +
                 1.27045825245236838258e0) *
                    r +
                3.64784832476320460504e0) *
                   r +
               5.76949722146069140550e0) *
                  r +
              4.63033784615654529590e0) *
                 r +
             1.42343711074968357734e0) /
            (((((((1.05075007164441684324e-9 * r + 5.47593808499534494600e-4) * r + 1.51986665636164571966e-2) * r +
                 1.48103976427480074590e-1) *
                    r +
                6.89767334985100004550e-1) *
                   r +
               1.67638483018380384940e0) *
                  r +
              2.05319162663775882187e0) *
                 r +
             1.0);
  } else {
    r -= 5.0;
    value = (((((((2.01033439929228813265e-7 * r + 2.71155556874348757815e-5) * r + 1.24266094738807843860e-3) * r +
                 2.65321895265761230930e-2) *
                    r +
                2.96560571828504891230e-1) *
                   r +
               1.78482653991729133580e0) *
                  r +
              5.46378491116411436990e0) *
                 r +
             6.65790464350110377720e0) /
            (((((((2.04426310338993978564e-15 * r + 1.42151175831644588870e-7) * r + 1.84631831751005468180e-5) * r +
                 7.86869131145613259100e-4) *
                    r +
                1.48753612908506148525e-2) *
                   r +
               1.36929880922735805310e-1) *
                  r +
              5.99832206555887937690e-1) *
                 r +
             1.0);
  }
  return q < 0 ? -value : value;
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
