// What the kernels that sample from networks share: products, the gate, a categorical sample.
#pragma once

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

// How many of the classes have a cumulative probability <= u, for softmax(logits / temperature). By one warp.
FASTGEN_DEVICE int sample_categorical(const float* logits, int classes, float temperature, float u) {
  const int lane = thread() % 32, each = (classes + 31) / 32;
  const int begin = lane * each < classes ? lane * each : classes;
  const int end = begin + each < classes ? begin + each : classes;
  const float scale = 1 / temperature;
  float top = -3.4e38f;
  for (int c = begin; c < end; ++c) top = fmaxf(top, logits[c] * scale);
  top = most_of_warp(top);
  float own = 0;
  for (int c = begin; c < end; ++c) own += expf(logits[c] * scale - top);
  float until = own;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float before = shuffle_up(until, lanes);
    if (lane >= lanes) until += before;
  }
  const float threshold = u * sum_of_warp(own);
  float below = until - own, count = 0;
  for (int c = begin; c < end; ++c) {
    below += expf(logits[c] * scale - top);
    if (below <= threshold) ++count;
  }
  const int chosen = static_cast<int>(sum_of_warp(count));
  return chosen < classes ? chosen : classes - 1;
}

}  // namespace fastgen
