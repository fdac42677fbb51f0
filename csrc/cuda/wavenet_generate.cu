// wavenet_generate on a GPU: launches of wavenet_generate.cuh.
#include "wavenet_generate.cuh"

namespace fastgen::wavenet {
namespace {

constexpr int kThreads = 256;

template <int N, bool kResident, class W>
__global__ void __launch_bounds__(kThreads, 1) generate(const __grid_constant__ Job job) {
  Block<N, kResident, W>(job).run();
}

template <int N, bool kResident, class W>
cudaError_t run(const Job& job, cudaStream_t stream) {
  const int64_t bytes = Block<N, kResident, W>::shared_bytes(job);
  cudaError_t error = cudaFuncSetAttribute(generate<N, kResident, W>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const int64_t groups = (job.streams + int64_t{job.tiles} * N - 1) / (int64_t{job.tiles} * N);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(groups * job.cluster));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(job.cluster), 1, 1};
  config.attrs = &cluster;
  config.numAttrs = job.cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, generate<N, kResident, W>, job);
}

}  // namespace

cudaError_t launch(const Job& job, int tile, bool resident, bool bf16, cudaStream_t stream) {
  const auto of = [&](auto zero) {
    using W = decltype(zero);
    if (resident) return tile == 1 ? run<1, true, W>(job, stream) : run<4, true, W>(job, stream);
    return tile == 1 ? run<1, false, W>(job, stream) : run<4, false, W>(job, stream);
  };
  return bf16 ? of(uint16_t{0}) : of(0.0f);
}

}  // namespace fastgen::wavenet
