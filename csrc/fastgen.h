// The few lines every operator shares: checks, dtype dispatch, threads, large buffers.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

namespace fastgen {

// Memory that large results share one after another (buffers.cpp, once in each library).
torch::stable::Tensor large_buffer(const torch::stable::Tensor& like, const std::vector<int64_t>& size,
                                   bool of_bytes = false);

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define FASTGEN_CHECK(condition, ...) STD_TORCH_CHECK(condition, "fastgen: ", __VA_ARGS__)

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Calls f with a value of the tensor's element type.
template <class F>
void dispatch_float(ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    default:
      FASTGEN_CHECK(false, op, ": dtype must be float32, bfloat16 or float64");
  }
}

// A tensor for a result, of the dtype of `like`; see buffers.cpp.
inline Tensor fresh(const Tensor& like, const std::vector<int64_t>& size) { return large_buffer(like, size); }
inline Tensor fresh_like(const Tensor& like) {
  return large_buffer(like, std::vector<int64_t>(like.sizes().begin(), like.sizes().end()));
}

// For std::vector: on cache lines of its own, so that what one thread writes never costs another that reads something
// else.
template <class T>
struct OwnLines {
  using value_type = T;
  static constexpr std::align_val_t kAlign{128};
  OwnLines() = default;
  template <class U>
  OwnLines(const OwnLines<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(::operator new(round_up(n * sizeof(T), 128), kAlign)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kAlign); }
  bool operator==(const OwnLines&) const { return true; }
};
template <class T>
using OwnVector = std::vector<T, OwnLines<T>>;

// The same, for what is written before it is read: elements begin as whatever lies there.
template <class T>
struct RawLines : OwnLines<T> {
  template <class U>
  struct rebind {
    using other = RawLines<U>;
  };
  template <class U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;
  }
};
template <class T>
using RawVector = std::vector<T, RawLines<T>>;

// f(i) for i in [0, n), each on a thread of PyTorch's pool.
template <class F>
void for_each_worker(int64_t n, F&& f) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

// Contiguous shares of `items` for the threads of the pool: f(begin, end).
template <class F>
void share(int64_t items, F&& f) {
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  for_each_worker(workers, [&](int64_t i) { f(i * items / workers, (i + 1) * items / workers); });
}

// Compute type of an element type.
template <class E>
using ComputeType = std::conditional_t<std::is_same_v<E, double>, double, float>;
template <class T>
constexpr ScalarType kTypeOf = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

// The product of a tensor's sizes from dimension `first` on.
inline int64_t values_from(const Tensor& tensor, int64_t first) {
  int64_t n = 1;
  for (int64_t i = first; i < tensor.dim(); ++i) n *= tensor.size(i);
  return n;
}

template <class E>
const E* data_of(const Tensor& tensor) {
  return static_cast<const E*>(tensor.data_ptr());
}
template <class E>
const E* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const E*>(tensor->data_ptr()) : nullptr;
}

}  // namespace
}  // namespace fastgen
