// 1x1 convolutions: a product of matrices for each image, with pixels in the lanes, so that nothing is transposed.
#pragma once

#include "masked_conv_backward.h"
#include "matrix_product.h"

namespace fastgen {
namespace {

inline bool is_pointwise(const ConvShape& s) {
  const bool whole = s.mask == Mask::kNone || s.mask == Mask::kVerticalB || (s.mask == Mask::kB && s.colors == 1);
  return s.area() == 1 && whole && !s.gated();
}

// of[b] = a * from[b] for all images; from (B, depth, pixels), of (B, rows, pixels).
template <class T>
void multiply_images(const ConvShape& s, const Strided<T>& a, int64_t rows, int64_t depth, const T* from, T* of,
                     const Finish<T>& finish = {}) {
  constexpr int64_t kColumns = 4 * MatrixProduct<T>::kPanel;
  const int64_t pixels = s.height * s.width, parts = (pixels + kColumns - 1) / kColumns;
  share(s.batch * parts, [&](int64_t begin, int64_t end) {
    MatrixProduct<T> product(depth, kColumns);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / parts, column = i % parts * kColumns;
      product.run(a, {from + b * depth * pixels, pixels, 1}, depth, of + b * rows * pixels, pixels, 0, rows, column,
                  std::min(column + kColumns, pixels), finish);
    }
  });
}

template <class T>
void pointwise_forward(const ConvShape& s, const ConvTensors<T>& in, T* out) {
  multiply_images<T>(s, {in.weight, s.channels, 1}, s.outs, s.channels, in.x, out,
                     {nullptr, in.bias, s.activation == Activation::kRelu});
}

// Some pixels of an image at a time: the gradients of their sums, which stay in a cache, then those of the inputs, and
// a share of the weights'. Each thread sums weights apart. kept: the results of a ReLU.
template <class T>
void pointwise_backward(const ConvShape& s, const ConvTensors<T>& in, const T* grad, const T* kept,
                        const ConvGradients<T, T>& out) {
  const int64_t pixels = s.height * s.width, parts = std::max<int64_t>((pixels + kDepth - 1) / kDepth, 1);
  const int64_t items = s.batch * parts;
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  const int64_t weight_size = s.outs * s.channels, most = (pixels + parts - 1) / parts;
  OwnVector<T> weight_sums(workers * weight_size), row_sums(items * s.outs);
  for_each_worker(workers, [&](int64_t worker) {
    MatrixProduct<T> of_inputs(s.outs, most), of_weights(most, s.channels);
    OwnVector<T> live(kept ? s.outs * most : 0);
    const int64_t start = worker * items / workers, end = (worker + 1) * items / workers;
    for (int64_t item = start; item < end; ++item) {
      const int64_t b = item / parts, first = item % parts * pixels / parts;
      const int64_t count = (item % parts + 1) * pixels / parts - first;
      Strided<T> sums{grad + b * s.outs * pixels + first, pixels, 1};
      for (int64_t o = 0; o < s.outs; ++o) {
        const int64_t at = (b * s.outs + o) * pixels + first;
        Vec<T> sum = {};
        by_vectors<T>(count, [&](int64_t i, auto n) {
          Vec<T> g = take(grad + at + i, n);
          if (kept) {
            const Vec<T> zero = {};
            g = take(kept + at + i, n) <= zero ? zero : g;
            put(live.data() + o * count + i, g, n);
          }
          sum += g;
        });
        row_sums[item * s.outs + o] = sum_of_lanes<T>(sum);
      }
      if (kept) sums = {live.data(), count, 1};
      if (out.x)
        of_inputs.run({in.weight, 1, s.channels}, sums, s.outs, out.x + b * s.channels * pixels + first, pixels, 0,
                      s.channels, 0, count);
      of_weights.run(sums, {in.x + b * s.channels * pixels + first, 1, pixels}, count,
                     weight_sums.data() + worker * weight_size, s.channels, 0, s.outs, 0, s.channels, {}, item > start);
    }
  });
  std::fill_n(out.weight, weight_size, T(0));
  for (int64_t worker = 0; worker < workers; ++worker)
    for (int64_t i = 0; i < weight_size; ++i) out.weight[i] += weight_sums[worker * weight_size + i];
  std::fill_n(out.bias, s.outs, T(0));
  for (int64_t item = 0; item < items; ++item)
    for (int64_t o = 0; o < s.outs; ++o) out.bias[o] += row_sums[item * s.outs + o];
}

}  // namespace
}  // namespace fastgen
