// Launches of wavenet_generate.cuh.
#include "wavenet_generate.cuh"
#include "wavenet_launch.h"

namespace fastgen::wavenet {
namespace {

template <int N, bool kResident, class W>
__global__ void __launch_bounds__(kThreads, 1) generate(const __grid_constant__ Job job) {
  Block<N, kResident, W>(job).run();
}

using Kernel = void (*)(Job);

template <class W>
Kernel of(int tile, bool resident) {
  if (resident) return tile == 1 ? generate<1, true, W> : generate<kTile, true, W>;
  return tile == 1 ? generate<1, false, W> : generate<kTile, false, W>;
}

// A launch of `groups` clusters, as the runtime wants it.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};
  Kernel kernel;

  Launch(const Plan& plan, const Job& job, bool bf16, int64_t groups, cudaStream_t stream)
      : kernel(bf16 ? of<uint16_t>(plan.tile, plan.resident) : of<float>(plan.tile, plan.resident)) {
    config.gridDim = dim3(static_cast<unsigned>(groups * plan.cluster));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = job.shared_bytes(plan.tile, plan.resident ? (bf16 ? 2 : 4) : 0);
    config.stream = stream;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
    config.attrs = &attribute;
    config.numAttrs = plan.cluster > 1 ? 1 : 0;
  }
  cudaError_t allow() const {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(config.dynamicSmemBytes));
  }
};

}  // namespace

int device_of(int index, Device* device) {
  int shared = 0, count = 0, major = 0;
  cudaError_t error = cudaSetDevice(index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  *device = {shared, count, major >= 9 ? 8 : 1};
  return error;
}

int active(const Plan& plan, const Shape& shape, bool bf16) {
  const Job job(shape, kThreads, plan.cluster, plan.tiles);
  Launch launch(plan, job, bf16, 1, nullptr);
  int count = 0;
  if (launch.allow() == cudaSuccess) {
    if (plan.cluster > 1) {
      if (cudaOccupancyMaxActiveClusters(&count, launch.kernel, &launch.config) != cudaSuccess) count = 0;
    } else if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, launch.kernel, kThreads,
                                                             launch.config.dynamicSmemBytes) != cudaSuccess) {
      count = 0;
    } else {
      int index = 0, processors = 0;
      cudaGetDevice(&index);
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index);
      count *= processors;
    }
  }
  cudaGetLastError();  // what did not fit is no error of later calls
  return count;
}

int launch(const Plan& plan, const Job& job, bool bf16, void* stream) {
  Launch launch(plan, job, bf16, job.groups(plan.tile), static_cast<cudaStream_t>(stream));
  const cudaError_t error = launch.allow();
  return error != cudaSuccess ? error : cudaLaunchKernelEx(&launch.config, launch.kernel, job);
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int current_device() {
  int index = 0;
  cudaGetDevice(&index);
  return index;
}

void set_device(int index) { cudaSetDevice(index); }

}  // namespace fastgen::wavenet
