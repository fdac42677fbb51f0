#include "runtime.h"

namespace fastgen {

int device_of(int index, Device* device) {
  int shared = 0, count = 0, major = 0;
  cudaError_t error = cudaSetDevice(index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  *device = {shared, count, major >= 9 ? 8 : 1};
  return error;
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int current_device() {
  int index = 0;
  cudaGetDevice(&index);
  return index;
}

void set_device(int index) { cudaSetDevice(index); }

int copy_to_device(void* to, const void* from, int64_t bytes, void* stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream));
}

}  // namespace fastgen
