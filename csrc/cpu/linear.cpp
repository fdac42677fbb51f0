// linear and its gradients; arguments are checked in fastgen/ops/linear.py.
#include "matrix_product.h"

namespace fastgen {
namespace {

template <class T>
Strided<T> rows_of(const Tensor& matrix) {
  return {data_of<T>(matrix), matrix.size(1), 1};
}
template <class T>
Strided<T> columns_of(const Tensor& matrix) {
  return {data_of<T>(matrix), 1, matrix.size(1)};
}

template <class T>
void matrix_product(const Strided<T>& a, const Strided<T>& b, int64_t depth, const Tensor& c,
                    const Finish<T>& finish = {}) {
  share_product<T>(c.size(0), c.size(1), [&](int64_t first, int64_t last, int64_t begin, int64_t end) {
    MatrixProduct<T>(depth, end - begin)
        .run(a, b, depth, static_cast<T*>(c.data_ptr()), c.size(1), first, last, begin, end, finish);
  });
}

template <class F>
void dispatch_compute(const Tensor& x, F&& f) {
  x.scalar_type() == ScalarType::Double ? f(double{}) : f(float{});
}

// x (N, C), weight (O, C), bias (O,) -> (N, O)
Tensor linear(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  Tensor out = fresh(x, {x.size(0), weight.size(0)});
  dispatch_compute(x, [&](auto zero) {
    using T = decltype(zero);
    matrix_product<T>(rows_of<T>(x), columns_of<T>(weight), x.size(1), out, {data_of<T>(bias)});
  });
  return out;
}

// The sums of the columns of grad (N, O), of blocks of rows first.
template <class T>
void sum_rows(const T* grad, int64_t rows, int64_t columns, T* to) {
  constexpr int64_t kRows = 256, kStrip = 8 * kLanes<T>;
  share((columns + kStrip - 1) / kStrip, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin * kStrip; strip < std::min(end * kStrip, columns); strip += kStrip) {
      const int64_t width = std::min(kStrip, columns - strip);
      double total[kStrip] = {};
      for (int64_t block = 0; block < rows; block += kRows) {
        T sums[kStrip] = {};
        for (int64_t row = block; row < std::min(block + kRows, rows); ++row)
          for (int64_t c = 0; c < width; ++c) sums[c] += grad[row * columns + strip + c];
        for (int64_t c = 0; c < width; ++c) total[c] += sums[c];
      }
      for (int64_t c = 0; c < width; ++c) to[strip + c] = static_cast<T>(total[c]);
    }
  });
}

// -> gradients of x (nothing unless needed), weight and bias.
std::tuple<Tensor, Tensor, Tensor> linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_x) {
  const int64_t rows = x.size(0), inputs = x.size(1), outs = weight.size(0);
  Tensor of_x = need_x ? fresh(x, {rows, inputs}) : fresh(x, {0});
  Tensor of_weight = fresh(x, {outs, inputs}), of_bias = fresh(x, {outs});
  dispatch_compute(x, [&](auto zero) {
    using T = decltype(zero);
    if (need_x) matrix_product<T>(rows_of<T>(grad), rows_of<T>(weight), outs, of_x);
    matrix_product<T>(columns_of<T>(grad), rows_of<T>(x), rows, of_weight);
    sum_rows(data_of<T>(grad), rows, outs, static_cast<T*>(of_bias.data_ptr()));
  });
  return {of_x, of_weight, of_bias};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("linear", TORCH_BOX(&fastgen::linear));
  m.impl("linear_backward", TORCH_BOX(&fastgen::linear_backward));
}
