// The few lines that every operator of this library shares.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>
#include <vector>

#include "runtime.h"

namespace fastgen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define FASTGEN_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fastgen: ", __VA_ARGS__)

// The current stream of the torch that runs; this library loads under one without CUDA too.
inline void* current_stream(int device) {
  using Get = int (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<Get>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  FASTGEN_CHECK(get != nullptr, "this torch has no CUDA streams");
  void* stream = nullptr;
  FASTGEN_CHECK(get(device, &stream) == 0, "torch gives no current stream of device ", device);
  return stream;
}

class OnDevice {
 public:
  OnDevice() : before_(current_device()) {}
  ~OnDevice() { set_device(before_); }

 private:
  int before_;
};

inline void check(int error, const char* op, const char* what) {
  FASTGEN_CHECK(error == 0, op, ": ", what, ": ", error_text(error));
}

template <class E>
const E* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const E*>(tensor->data_ptr()) : nullptr;
}

}  // namespace
}  // namespace fastgen
