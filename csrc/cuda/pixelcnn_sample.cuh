// A value of a color from its distribution's parameters.
#pragma once

#include "network.cuh"
#include "pixelcnn_job.h"

namespace fastgen::pixelcnn {

// As in the CPU's pixel_images.h; each lane computes the same.
FASTGEN_DEVICE int64_t sample_logistic_level(const Job& job, const float* parameters, float u) {
  const int64_t mixtures = job.outputs / 3;
  const float *logits = parameters, *means = parameters + mixtures, *log_scales = means + mixtures;
  float top = logits[0];
  for (int64_t m = 1; m < mixtures; ++m) top = fmaxf(top, logits[m]);
  const double temperature = job.temperature;
  double total = 0;
  for (int64_t m = 0; m < mixtures; ++m) total += exp(static_cast<double>(logits[m] - top) / temperature);
  int64_t low = 0, high = job.levels - 1;
  while (low < high) {
    const int64_t level = (low + high) / 2;
    const double edge = (2.0 * level + 1) / (job.levels - 1) - 1;
    double below = 0;
    for (int64_t m = 0; m < mixtures; ++m) {
      const double scale = temperature * exp(static_cast<double>(fmaxf(log_scales[m], job.log_scale_min)));
      below += exp(static_cast<double>(logits[m] - top) / temperature) / (1 + exp((means[m] - edge) / scale));
    }
    if (below / total <= u)
      low = level + 1;
    else
      high = level;
  }
  return low;
}

// By the lanes of a warp, or by one where there is one output.
FASTGEN_APART int64_t draw_value(const Job& job, const float* out, float u) {
  if (job.logistic) return sample_logistic_level(job, out, u);
  const int outputs = static_cast<int>(job.outputs);
  if (outputs > 1 && job.kept.any()) return sample_most_probable(out, outputs, job.temperature, u, job.kept);
  if (outputs > 1) return sample_categorical(out, outputs, job.temperature, u);
  // one logit: of level 1 against level 0
  const float logit = out[0] / job.temperature, top = fmaxf(logit, 0), zero = expf(-top);
  return zero <= u * (zero + expf(logit - top));
}

}  // namespace fastgen::pixelcnn
