// What this machine can do at most, measured: the yardstick of the benchmarks.
#include <chrono>

#include "simd.h"

namespace fastgen {
namespace {

// fma_peak() -> float32 GFLOP/s of all threads together: independent multiply-adds, nothing loaded or stored.
double fma_peak() {
  constexpr int kSums = 12;
  constexpr int64_t kRounds = 20'000'000;
  const int64_t threads = torch::stable::get_num_threads();
  const auto start = std::chrono::steady_clock::now();
  for_each_worker(threads, [&](int64_t) {
    VecF sums[kSums], a = splat(0.999f), b = splat(1e-3f);
    for (auto& sum : sums) sum = a;
    for (int64_t i = 0; i < kRounds; ++i) {
      pin(a), pin(b);  // so that nothing is computed before the loop
#pragma GCC unroll 12
      for (auto& sum : sums) sum = sum * a + b;
    }
    VecF total = sums[0];
    for (auto& sum : sums) total += sum;
    volatile float keep = sum_of_lanes<float>(total);
    (void)keep;
  });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return 2e-9 * kSums * kF * static_cast<double>(kRounds * threads) / seconds;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CompositeExplicitAutograd, m) { m.impl("fma_peak", TORCH_BOX(&fastgen::fma_peak)); }
