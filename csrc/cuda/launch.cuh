// A launch of clusters of blocks.
#pragma once

#include <cstdint>

namespace fastgen {

template <class Job>
struct Launch {
  using Kernel = void (*)(Job);
  Kernel kernel;
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attribute{};

  Launch(Kernel kernel, int cluster, int64_t groups, int threads, int64_t shared_bytes, void* stream) : kernel(kernel) {
    config.gridDim = dim3(static_cast<unsigned>(groups * cluster));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    config.numAttrs = cluster > 1 ? 1 : 0;
  }

  // Clusters that the current device can hold at once; 0 where one has not the memory.
  int active() {
    int count = 0;
    if (allow() == cudaSuccess) {
      config.attrs = &attribute;
      if (config.numAttrs) {
        if (cudaOccupancyMaxActiveClusters(&count, kernel, &config) != cudaSuccess) count = 0;
      } else if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, config.blockDim.x,
                                                               config.dynamicSmemBytes) != cudaSuccess) {
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

  cudaError_t run(const Job& job) {
    const cudaError_t error = allow();
    if (error != cudaSuccess) return error;
    config.attrs = &attribute;
    return cudaLaunchKernelEx(&config, kernel, job);
  }

 private:
  // The kernel may have all that the device gives: the limit is the process's, and another thread's launch may need
  // more.
  cudaError_t allow() const {
    int index = 0, most = 0;
    cudaGetDevice(&index);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    if (config.dynamicSmemBytes > static_cast<size_t>(most)) return cudaErrorInvalidValue;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
};

}  // namespace fastgen
