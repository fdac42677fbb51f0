// Launches of wavenet_generate.cuh.
#include "launch.cuh"
#include "wavenet_generate.cuh"
#include "wavenet_launch.h"

namespace fastgen::wavenet {
namespace {

template <int M, bool kResident, class W>
__global__ void __launch_bounds__(kThreads, 1) generate(const __grid_constant__ Job job) {
  Block<M, kResident, W>(job).run();
}

using Kernel = void (*)(Job);

template <class W>
Kernel of(const Plan& plan) {
  if (plan.resident) return plan.vectors() == 1 ? generate<1, true, W> : generate<2, true, W>;
  return plan.vectors() == 1 ? generate<1, false, W> : generate<2, false, W>;
}

Launch<Job> launch_of(const Plan& plan, const Job& job, bool bf16, int64_t groups, void* stream) {
  const Kernel kernel = bf16 ? of<uint16_t>(plan) : of<float>(plan);
  const int64_t weight_bytes = plan.resident ? (bf16 ? 2 : 4) : 0;
  return {kernel, plan.cluster, groups, kThreads, job.shared_bytes(plan, weight_bytes), stream};
}

}  // namespace

int active(const Plan& plan, const Shape& shape, bool bf16) {
  return launch_of(plan, Job(shape, plan), bf16, 1, nullptr).active();
}

int launch(const Plan& plan, const Job& job, bool bf16, void* stream) {
  return launch_of(plan, job, bf16, job.groups(), stream).run(job);
}

}  // namespace fastgen::wavenet
