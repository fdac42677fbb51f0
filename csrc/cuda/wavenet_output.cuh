// The end of the pipeline: the output layers, and the sample.
#pragma once

#include "../normal_quantile.h"
#include "wavenet_generate.cuh"

namespace fastgen::wavenet {

// One value from a mixture, as sampling.h in the CPU's kernels. By one warp.
FASTGEN_APART float sample_mixture(const Job& job, const float* parameters, float u, float v) {
  const int outputs = job.shape.outputs, mixtures = outputs == 2 ? 1 : outputs / 3;
  const float* means = parameters + outputs - 2 * mixtures;
  const int i = mixtures == 1 ? 0 : sample_categorical(parameters, mixtures, job.temperature, u);
  const double p = fmin(fmax(static_cast<double>(v), 1e-7), 1.0 - 1e-7);
  const double unit = job.distribution == Distribution::kLogisticMixture ? log(p) - log1p(-p) : normal_quantile(p);
  const float log_scale = fmaxf(means[mixtures + i], job.log_scale_min);
  const double x = means[i] + static_cast<double>(job.temperature) * exp(static_cast<double>(log_scale)) * unit;
  return static_cast<float>(fmin(fmax(x, -1.0), 1.0));
}

// The output layers, and the sample.
template <int M, bool kResident, class W>
FASTGEN_DEVICE void Block<M, kResident, W>::emit(int tile, int live, int64_t t) {
  const int skip = job_.shape.skip, outputs = job_.shape.outputs;
  const int each_has = job_.distribution == Distribution::kCategorical ? 1 : 2, uniform = thread();
  float u = 0;
  if (uniform < live * each_has)
    u = job_.uniforms[(stream(tile, uniform / each_has) * job_.steps + t) * each_has + uniform % each_has];
  const W* w = weights_ + (job_.layout.head - share_.begin);
  Product<M, false, 1, kHead, W> hidden;
  Product<M, false, kResident ? 2 : 1, kHead, W> output;
  hidden.hold(job_.hidden, w);
  output.hold(job_.output, w);
  hidden.run(
      job_.hidden, w, skips_, live, [&](int unit, int, int) { return head_bias_[unit]; },
      [&] {
        if (job_.cluster > 1) take_skips(tile, live, t);
        sync_block();
      },
      [] {}, [&](int unit, int n, float v) { put(hidden_, n, unit, fmaxf(v, 0.0f)); });
  if (uniform < live * each_has) uniforms_[uniform] = u;
  output.run(
      job_.output, w, hidden_, live, [&](int unit, int, int) { return head_bias_[skip + unit]; }, [] { sync_block(); },
      [] {}, [&](int unit, int n, float v) { out_[n * job_.lengths.outputs + unit] = v; });
  sync_block();
  for (int n = thread() / 32; n < live; n += threads() / 32) choose(tile, n, t);
  if (job_.parameters)
    each(0, live, outputs, [&](int n, int o) {
      job_.parameters[(stream(tile, n) * job_.steps + t) * outputs + o] = out_[n * job_.lengths.outputs + o];
    });
  sync_block();
}

template <int M, bool kResident, class W>
FASTGEN_DEVICE void Block<M, kResident, W>::take_skips(int tile, int live, int64_t t) {
  receive(kSum, tile, live, t);
  each_pair(of_s_, 0, live, [&](int n, int i) {
    const Pair v = pair(s_in_ + (tile * N + n) * job_.lengths.s + i);
    put(skips_, n, i, Pair{fmaxf(v.v[0], 0.0f), fmaxf(v.v[1], 0.0f)});
  });
}

template <int M, bool kResident, class W>
FASTGEN_DEVICE void Block<M, kResident, W>::choose(int tile, int n, int64_t t) {
  const int64_t b = stream(tile, n), at = b * job_.steps + t;
  const int outputs = job_.shape.outputs;
  const float* out = out_ + n * job_.lengths.outputs;
  const bool is_given = t < job_.given_steps, ends = t + 1 == job_.steps;
  const auto pass = [&](auto* samples, auto* last, auto* mailbox, auto sample) {
    if (thread() % 32) return;
    if (!ends) post(mailbox + tile * N + n, sample, arrival(kSample, tile), 0);
    samples[at] = sample;
    if (ends) last[b] = sample;
  };
  if (job_.distribution == Distribution::kCategorical) {
    int32_t sample = job_.kept.any() ? sample_most_probable(out, outputs, job_.temperature, uniforms_[n], job_.kept)
                                     : quick_categorical(out, outputs, scale_, uniforms_[n]);
    if (is_given) sample = static_cast<int32_t>(job_.given_class[b * job_.given_steps + t]);
    pass(job_.classes, job_.last_class, came_, sample);
  } else {
    float sample = sample_mixture(job_, out, uniforms_[2 * n], uniforms_[2 * n + 1]);
    if (is_given) sample = job_.given_value[b * job_.given_steps + t];
    pass(job_.values, job_.last_value, came_value_, sample);
  }
}

}  // namespace fastgen::wavenet
