// vector_quantize and its backward; arguments are checked in fastgen/ops/vector_quantize.py.
#include <numeric>

#include "nearest_code.h"

namespace fastgen {
namespace {

// -> quantized (N, D), indices (N,), mean squared error (), counts (K,). Rows outside the mask: zeros, -1, not counted.
std::tuple<Tensor, Tensor, Tensor, Tensor> vector_quantize(Tensor x, Tensor codebook, std::optional<Tensor> mask,
                                                           bool cosine, bool strict, int64_t /*precision*/) {
  const int64_t rows = x.size(0), dim = x.size(1), count = codebook.size(0);
  Tensor quantized = fresh(x, {rows, dim});
  Tensor indices = empty_of(x, {rows}, ScalarType::Long);
  Tensor error, counts;
  dispatch_float(x.scalar_type(), "vector_quantize", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    error = empty_of(x, {}, kTypeOf<T>);
    counts = empty_of(x, {count}, kTypeOf<T>);
    const Codes<T> codes = codes_of<T>(codebook, cosine);
    const bool* taken = data_of<bool>(mask);
    auto* index = static_cast<int64_t*>(indices.data_ptr());
    auto* to = static_cast<E*>(quantized.data_ptr());
    const int64_t workers = workers_for(rows);
    std::vector<T> squared(rows);
    std::vector<OwnVector<int64_t>> histogram(workers, OwnVector<int64_t>(count));
    search<T, E>("vector_quantize", x, codes, strict, workers,
                 [&](int64_t worker, int64_t row, const T* values, int64_t code, T d) {
                   E* q = to + row * dim;
                   if (taken && !taken[row]) {
                     index[row] = -1;
                     std::fill_n(q, dim, E(0.0f));
                     return;
                   }
                   const T* c = codes.rows + code * codes.width;
                   index[row] = code;
                   store_row(q, c, dim);
                   if (cosine) {  // the search measured directions
                     d = 0;
                     for (int64_t k = 0; k < dim; ++k) d += (values[k] - c[k]) * (values[k] - c[k]);
                   }
                   squared[row] = d;
                   ++histogram[worker][code];
                 });
    auto* number = static_cast<T*>(counts.data_ptr());
    int64_t used = 0;
    for (int64_t k = 0; k < count; ++k) {
      int64_t n = 0;
      for (const auto& part : histogram) n += part[k];
      number[k] = static_cast<T>(n);
      used += n;
    }
    const double total = std::accumulate(squared.begin(), squared.end(), 0.0);
    *static_cast<T*>(error.data_ptr()) = static_cast<T>(used > 0 ? total / (used * dim) : 0.0);
  });
  return {quantized, indices, error, counts};
}

// The gradient of one row straight through, and `error` (x - q).
template <class T>
void pass_through(T* result, const T* g, const T* x, const T* q, int64_t width, T error) {
  for (int64_t k = 0; k < width; k += kLanes<T>) store(result + k, load(g + k) + error * (load(x + k) - load(q + k)));
}

// The gradient of one row through the quantizer by the rotation that takes x to q (arXiv:2410.06424, section 4.2):
// g <- lambda (g - 2 <g, w> w + 2 <g, q^> u), with u = x / |x|, q^ = q / |q|, w = (u + q^) / |u + q^|, lambda = |q| /
// |x|.
template <class T>
void rotate_back(T* result, const T* g, const T* x, const T* q, int64_t width, T error) {
  constexpr T kLeast = T(1e-6);
  Vec<T> xx{}, qq{}, gx{}, gq{};
  for (int64_t k = 0; k < width; k += kLanes<T>) {
    const Vec<T> from = load(x + k), to = load(q + k), grad = load(g + k);
    xx += from * from;
    qq += to * to;
    gx += grad * from;
    gq += grad * to;
  }
  const T from_norm = std::sqrt(sum_of_lanes<T>(xx)), to_norm = std::sqrt(sum_of_lanes<T>(qq));
  const T a = 1 / std::max(from_norm, kLeast), b = 1 / std::max(to_norm, kLeast);
  Vec<T> sums{};
  for (int64_t k = 0; k < width; k += kLanes<T>) {
    const Vec<T> sum = load(x + k) * a + load(q + k) * b;
    sums += sum * sum;
  }
  const T w = 1 / std::max(std::sqrt(sum_of_lanes<T>(sums)), kLeast);
  const T g_u = sum_of_lanes<T>(gx) * a, g_q = sum_of_lanes<T>(gq) * b, g_w = (g_u + g_q) * w, scale = to_norm * a;
  for (int64_t k = 0; k < width; k += kLanes<T>) {
    const Vec<T> u = load(x + k) * a, v = load(q + k) * b;
    store(result + k,
          scale * (load(g + k) - 2 * g_w * w * (u + v) + 2 * g_q * u) + error * (load(x + k) - load(q + k)));
  }
}

// grad_x from the gradients of quantized and of the mean squared error.
Tensor vector_quantize_backward(Tensor grad_quantized, Tensor grad_error, Tensor x, Tensor quantized,
                                std::optional<Tensor> mask, bool rotation) {
  const int64_t rows = x.size(0), dim = x.size(1);
  Tensor grad_x = fresh(x, {rows, dim});
  const bool* taken = data_of<bool>(mask);
  const int64_t used = taken ? std::count(taken, taken + rows, true) : rows;
  dispatch_float(x.scalar_type(), "vector_quantize", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    const T scale = used ? *data_of<T>(grad_error) * T(2) / (static_cast<T>(used) * static_cast<T>(dim)) : T(0);
    share(rows, [&](int64_t begin, int64_t end) {
      const int64_t width = padded<T>(dim);
      const bool as_they_are = std::is_same_v<T, E> && width == dim;
      std::vector<T> buffer(as_they_are ? 0 : 4 * width);
      const auto values = [&](const E* row, int64_t slot) -> const T* {  // padded vectors of T
        if constexpr (std::is_same_v<T, E>)
          if (as_they_are) return row;
        load_row(buffer.data() + slot * width, row, dim, dim);
        return buffer.data() + slot * width;
      };
      for (int64_t i = begin; i < end; ++i) {
        E* to = static_cast<E*>(grad_x.data_ptr()) + i * dim;
        if (taken && !taken[i]) {
          std::fill_n(to, dim, E(0.0f));
          continue;
        }
        const T* g = values(data_of<E>(grad_quantized) + i * grad_quantized.stride(0), 0);
        const T* from = values(data_of<E>(x) + i * x.stride(0), 1);
        const T* q = values(data_of<E>(quantized) + i * dim, 2);
        T* result = buffer.data() + 3 * width;
        if constexpr (std::is_same_v<T, E>)
          if (as_they_are) result = to;
        (rotation ? rotate_back<T> : pass_through<T>)(result, g, from, q, width, scale);
        if (!as_they_are) store_row(to, result, dim);
      }
    });
  });
  return grad_x;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("vector_quantize", TORCH_BOX(&fastgen::vector_quantize));
  m.impl("vector_quantize_backward", TORCH_BOX(&fastgen::vector_quantize_backward));
}
