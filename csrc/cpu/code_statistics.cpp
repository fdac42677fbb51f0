// code_statistics and update_codebook; arguments are checked in fastgen/ops/code_statistics.py.
#include <numeric>

#include "elements.h"

namespace fastgen {
namespace {

// Rows summed before they are added to a float64 total: a hot code loses no digits to its own size.
constexpr int64_t kRun = 64;

// counts (K,), sums (K, D) of x (N, D), less `minus` if it is given, by code. Rows of one code are summed by one thread
// in their order, so that the result does not depend on the number of threads. A row of code -1 is left out.
std::tuple<Tensor, Tensor> code_statistics(Tensor x, std::optional<Tensor> minus, Tensor indices, int64_t num_codes) {
  const int64_t rows = x.size(0), dim = x.size(1);
  const auto* index = data_of<int64_t>(indices);
  std::vector<int64_t> begin(num_codes + 1);  // of each code's rows in `order`
  for (int64_t i = 0; i < rows; ++i) {
    FASTGEN_CHECK(-1 <= index[i] && index[i] < num_codes, "code_statistics: indices must lie in [-1, ", num_codes,
                  "), got ", index[i], " at ", i);
    if (index[i] >= 0) ++begin[index[i] + 1];
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<int64_t> order(begin[num_codes]), next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < rows; ++i)
    if (index[i] >= 0) order[next[index[i]]++] = i;

  Tensor counts, sums;
  dispatch_float(x.scalar_type(), "code_statistics", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    const ScalarType dtype = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
    counts = torch::stable::new_empty(x, {num_codes}, dtype);
    sums = torch::stable::new_empty(x, {num_codes, dim}, dtype);
    auto* count = static_cast<T*>(counts.data_ptr());
    auto* sum = static_cast<T*>(sums.data_ptr());
    const int64_t workers = std::max<int64_t>(1, std::min<int64_t>(num_codes, torch::stable::get_num_threads()));
    const auto first_code = [&](int64_t worker) -> int64_t {  // shares of about as many rows
      if (worker == workers) return num_codes;
      const int64_t row = worker * static_cast<int64_t>(order.size()) / workers;
      return worker == 0 ? 0 : std::lower_bound(begin.begin(), begin.end() - 1, row) - begin.begin();
    };
    for_each_worker(workers, [&](int64_t worker) {
      std::vector<T> run(dim), row(dim);
      std::vector<double> total(dim);
      for (int64_t code = first_code(worker), end = first_code(worker + 1); code < end; ++code) {
        count[code] = static_cast<T>(begin[code + 1] - begin[code]);
        std::fill(total.begin(), total.end(), 0.0);
        for (int64_t i = begin[code]; i < begin[code + 1]; i += kRun) {
          std::fill(run.begin(), run.end(), T(0));
          for (int64_t j = i; j < std::min(i + kRun, begin[code + 1]); ++j) {
            if (j + 4 < static_cast<int64_t>(order.size()))
              __builtin_prefetch(data_of<E>(x) + order[j + 4] * x.stride(0));
            const E* values = data_of<E>(x) + order[j] * x.stride(0);
            if constexpr (std::is_same_v<T, E>) {
              for (int64_t k = 0; k < dim; ++k) run[k] += values[k];
            } else {
              load_row(row.data(), values, dim, dim);
              for (int64_t k = 0; k < dim; ++k) run[k] += row[k];
            }
            if (!minus) continue;
            load_row(row.data(), data_of<E>(*minus) + order[j] * minus->stride(0), dim, dim);
            for (int64_t k = 0; k < dim; ++k) run[k] -= row[k];
          }
          for (int64_t k = 0; k < dim; ++k) total[k] += run[k];
        }
        for (int64_t k = 0; k < dim; ++k) sum[code * dim + k] = static_cast<T>(total[k]);
      }
    });
  });
  return {counts, sums};
}

// cluster_size, embed_avg <- decay * old + (1 - decay) * new; embed <- embed_avg / cluster_size with Laplace smoothing,
// for cosine scaled to unit length.
void update_codebook(Tensor cluster_size, Tensor embed_avg, Tensor embed, Tensor counts, Tensor sums, double decay,
                     double eps, bool cosine) {
  const int64_t num_codes = embed.size(0), dim = embed.size(1);
  dispatch_float(embed.scalar_type(), "update_codebook", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    if constexpr (std::is_same_v<T, E>) {
      auto* size = static_cast<T*>(cluster_size.data_ptr());
      double total = 0;
      for (int64_t i = 0; i < num_codes; ++i) {
        size[i] += static_cast<T>((1 - decay) * (static_cast<double>(data_of<T>(counts)[i]) - size[i]));
        total += size[i];
      }
      if (total == 0) return;  // nothing has been seen: the codes stay
      const double spread = total / (total + num_codes * eps);
      share(num_codes, [&](int64_t begin, int64_t end) {
        const T share_of_new = static_cast<T>(1 - decay);
        for (int64_t i = begin; i < end; ++i) {
          T* average = static_cast<T*>(embed_avg.data_ptr()) + i * dim;
          T* code = static_cast<T*>(embed.data_ptr()) + i * dim;
          const T* sum = data_of<T>(sums) + i * dim;
          const T scale = static_cast<T>(1 / ((size[i] + eps) * spread));
          T squared = 0;
          for (int64_t k = 0; k < dim; ++k) {
            average[k] += share_of_new * (sum[k] - average[k]);
            code[k] = average[k] * scale;
            squared += code[k] * code[k];
          }
          if (!cosine) continue;
          const T inverse = 1 / std::max(std::sqrt(squared), T(1e-6));
          for (int64_t k = 0; k < dim; ++k) code[k] *= inverse;
        }
      });
    } else {
      FASTGEN_CHECK(false, "update_codebook: dtype must be float32 or float64");
    }
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("code_statistics", TORCH_BOX(&fastgen::code_statistics));
  m.impl("update_codebook", TORCH_BOX(&fastgen::update_codebook));
}
