// gaussian_rsample_kl and its backward; arguments are checked in fastgen/ops/gaussian_rsample_kl.py.
#include "functions.h"

namespace fastgen {
namespace {

// Values in a piece of work; the divergence is summed piece by piece, so that no thread or batch changes its bits.
constexpr int64_t kPiece = 4096;

template <class F>
void for_each_piece(int64_t samples, int64_t values, F&& f) {
  const int64_t pieces = (values + kPiece - 1) / kPiece;
  share(samples * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % pieces * kPiece;
      f(i, i / pieces, i / pieces * values + first, std::min(kPiece, values - first));
    }
  });
  fence_stores();
}

// mean + e^s * noise, and the sum over a sample of (mean^2 + e^2s - 1) / 2 - s.
std::tuple<Tensor, Tensor> gaussian_rsample_kl(Tensor mean, Tensor log_deviation, Tensor noise) {
  Tensor z = fresh_like(mean), kl;
  dispatch_float(mean.scalar_type(), "gaussian_rsample_kl", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    const int64_t samples = mean.size(0), values = values_from(mean, 1), pieces = (values + kPiece - 1) / kPiece;
    kl = torch::stable::new_empty(mean, {samples}, kTypeOf<T>);
    OwnVector<double> sums(samples * pieces);
    for_each_piece(samples, values, [&](int64_t piece, int64_t, int64_t offset, int64_t count) {
      const Out<E> to(z, offset);
      Vec<T> sum{};
      by_vectors<T>(count, [&](int64_t k, auto n) FASTGEN_INLINE {
        const Vec<T> m = take(data_of<E>(mean) + offset + k, n), s = take(data_of<E>(log_deviation) + offset + k, n);
        const Vec<T> deviation = exp_any(s);
        to.put(k, m + deviation * take(data_of<E>(noise) + offset + k, n), n);
        sum += T(0.5) * (m * m + (deviation * deviation - T(1))) - s;  // zero where nothing was loaded
      });
      sums[piece] = sum_of_lanes<T>(sum);
    });
    for (int64_t b = 0; b < samples; ++b) {
      double total = 0;
      for (int64_t i = b * pieces; i < (b + 1) * pieces; ++i) total += sums[i];
      static_cast<T*>(kl.data_ptr())[b] = static_cast<T>(total);
    }
  });
  return {z, kl};
}

// Gradients of mean and log_deviation, for those of z, or zero where there is none, and of kl (B,).
std::tuple<Tensor, Tensor> gaussian_rsample_kl_backward(std::optional<Tensor> grad_z, Tensor grad_kl, Tensor mean,
                                                        Tensor log_deviation, Tensor noise) {
  Tensor of_mean = fresh_like(mean), of_deviation = fresh_like(mean);
  dispatch_float(mean.scalar_type(), "gaussian_rsample_kl", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    const E* of_z = grad_z ? data_of<E>(*grad_z) : nullptr;
    for_each_piece(mean.size(0), values_from(mean, 1), [&](int64_t, int64_t b, int64_t offset, int64_t count) {
      const Out<E> to_mean(of_mean, offset), to_deviation(of_deviation, offset);
      const Vec<T> of_kl = splat(data_of<T>(grad_kl)[b]);
      by_vectors<T>(count, [&](int64_t k, auto n) FASTGEN_INLINE {
        const Vec<T> m = take(data_of<E>(mean) + offset + k, n);
        const Vec<T> deviation = exp_any(take(data_of<E>(log_deviation) + offset + k, n));
        const Vec<T> g = of_z ? take(of_z + offset + k, n) : Vec<T>{};
        to_mean.put(k, g + of_kl * m, n);
        to_deviation.put(
            k, g * take(data_of<E>(noise) + offset + k, n) * deviation + of_kl * (deviation * deviation - T(1)), n);
      });
    });
  });
  return {of_mean, of_deviation};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("gaussian_rsample_kl", TORCH_BOX(&fastgen::gaussian_rsample_kl));
  m.impl("gaussian_rsample_kl_backward", TORCH_BOX(&fastgen::gaussian_rsample_kl_backward));
}
