// actnorm and the sums of its backward; arguments are checked in fastgen/ops/actnorm.py.
#include "elements.h"

namespace fastgen {
namespace {

constexpr int64_t kGroups = 32;  // of samples that are summed apart, whatever the number of threads

// Per-channel values of x (B, C, *S): one for each stretch of S values, or where S is shorter than a vector, a pattern
// of C * S values.
template <class T>
struct Channels {
  int64_t rows, length;  // stretches of a sample
  bool pattern;
  Channels(const Tensor& x) : rows(x.size(1)), length(values_from(x, 2)), pattern(length < kLanes<T>) {
    if (pattern) std::tie(rows, length) = std::make_tuple(int64_t{1}, rows * length);
  }
  std::vector<T> spread(const Tensor& values, int64_t channels) const {
    const T* p = data_of<T>(values);
    std::vector<T> result(p, p + channels);
    if (!pattern) return result;
    result.resize(length);
    for (int64_t i = length; i-- > 0;) result[i] = p[i * channels / length];
    return result;
  }
};

// (x + before) * factor + after, (C,) each.
Tensor actnorm(Tensor x, Tensor before, Tensor factor, Tensor after) {
  Tensor y = fresh_like(x);
  dispatch_float(x.scalar_type(), "actnorm", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    const Channels<T> at(x);
    const int64_t channels = x.size(1), batch = x.size(0);
    const auto a = at.spread(before, channels), f = at.spread(factor, channels), b = at.spread(after, channels);
    share(batch * at.rows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % at.rows;
        const E* from = data_of<E>(x) + i * at.length;
        E* to = static_cast<E*>(y.data_ptr()) + i * at.length;
        by_vectors<T>(at.length, [&](int64_t k, auto n) FASTGEN_INLINE {
          const auto of = [&](const std::vector<T>& v)
                              FASTGEN_INLINE { return at.pattern ? take(v.data() + k, n) : splat(v[row]); };
          put(to + k, (take(from + k, n) + of(a)) * of(f) + of(b), n);
        });
      }
    });
  });
  return y;
}

// grad * factor, and the sums (C,) of grad and of grad * kept.
std::tuple<Tensor, Tensor, Tensor> actnorm_backward(Tensor grad, Tensor kept, Tensor factor) {
  Tensor grad_x = fresh_like(grad), sum, product;
  dispatch_float(grad.scalar_type(), "actnorm", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    const Channels<T> at(grad);
    const int64_t channels = grad.size(1), batch = grad.size(0);
    const int64_t groups = std::min(batch, kGroups), slots = at.pattern ? at.length : channels;
    const auto f = at.spread(factor, channels);
    OwnVector<double> sums(groups * slots), products(groups * slots);
    share(groups, [&](int64_t first, int64_t last) {
      for (int64_t group = first; group < last; ++group) {
        const int64_t begin = group * batch / groups * at.rows, end = (group + 1) * batch / groups * at.rows;
        for (int64_t i = begin; i < end; ++i) {
          const int64_t row = i % at.rows, offset = i * at.length;
          double *s = sums.data() + group * slots + row, *p = products.data() + group * slots + row;
          Vec<T> of_row{}, products_of_row{};
          by_vectors<T>(at.length, [&](int64_t k, auto n) FASTGEN_INLINE {
            const Vec<T> g = take(data_of<E>(grad) + offset + k, n);
            const Vec<T> gv = g * take(data_of<E>(kept) + offset + k, n);
            put(static_cast<E*>(grad_x.data_ptr()) + offset + k,
                g * (at.pattern ? take(f.data() + k, n) : splat(f[row])), n);
            if (at.pattern) {
              for (int lane = 0; lane < n; ++lane) {
                s[k + lane] += g[lane];
                p[k + lane] += gv[lane];
              }
            } else {
              of_row += g;
              products_of_row += gv;
            }
          });
          if (at.pattern) continue;
          *s += sum_of_lanes<T>(of_row);
          *p += sum_of_lanes<T>(products_of_row);
        }
      }
    });
    const auto finish = [&](const OwnVector<double>& parts) {
      Tensor result = torch::stable::new_empty(grad, {channels}, kTypeOf<T>);
      for (int64_t c = 0; c < channels; ++c) {
        double total = 0;
        for (int64_t group = 0; group < groups; ++group)
          for (int64_t k = c * slots / channels; k < (c + 1) * slots / channels; ++k) total += parts[group * slots + k];
        static_cast<T*>(result.data_ptr())[c] = static_cast<T>(total);
      }
      return result;
    };
    sum = finish(sums);
    product = finish(products);
  });
  return {grad_x, sum, product};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("actnorm", TORCH_BOX(&fastgen::actnorm));
  m.impl("actnorm_backward", TORCH_BOX(&fastgen::actnorm_backward));
}
