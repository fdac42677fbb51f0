// A GPU's thread blocks on a CPU: threads are fibers, a cluster's blocks run together, clusters one after the other.
// It finds what an order of execution, a sanitizer or a poisoned array can show: see emulator.cpp.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <source_location>

#include "../../csrc/cuda/tiles.h"

namespace fastgen::emulator {

using Where = std::source_location;

enum class Order { kForward, kReverse, kRandom };

struct Launch {
  int blocks, cluster, threads;
  Order order = Order::kForward;
  uint32_t seed = 0;
  int fill = 0xFF;                 // of shared memory: NaN as float; another value for kernels that swallow NaN
  int64_t shared_bytes = 1 << 30;  // that a block may take
};

// Runs `kernel` once for each thread. Throws std::runtime_error for a deadlock, for threads that spin without end, for
// a barrier that some threads of a block reach at another place than others, and for shared memory used wrongly; the
// message names the lines.
void launch(const Launch& how, const std::function<void()>& kernel);

constexpr bool kClusters = true;
int thread();
int threads();
int block();
void sync_block(Where where = Where::current());
void sync_warp(Where where = Where::current());
void sync_half(Where where = Where::current());
void sync_cluster(Where where = Where::current());
float shuffle_xor(float v, int lanes, Where where = Where::current());
inline uint32_t shuffle_xor(uint32_t v, int lanes, Where where = Where::current()) {
  return std::bit_cast<uint32_t>(shuffle_xor(std::bit_cast<float>(v), lanes, where));
}
float shuffle_up(float v, int lanes, Where where = Where::current());
float shuffle_from(float v, int lane, Where where = Where::current());
int sum_in_warp(int v, Where where = Where::current());
float most_in_warp(float v, Where where = Where::current());
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::current());
void pause(Where where = Where::current());
int64_t load_acquire(const int64_t* p);
inline void wait_for(const int64_t* p, int64_t least, Where where = Where::current()) {
  while (load_acquire(p) < least) pause(where);
}
void store_release(int64_t* p, int64_t v);

using Arrival = uint64_t;
void begin_arrival(Arrival* a);
void expect(Arrival* a, int bytes);
bool came(const Arrival* a, int parity);
inline void await(const Arrival* a, int parity, Where where = Where::current()) {
  while (!came(a, parity)) pause(where);
}
void sent(Arrival* a, int bytes);

inline float quick_exp2(float v) { return std::exp2(v); }
inline float quick_exp(float v) { return std::exp(v); }
inline float quick_divide(float a, float b) { return a / b; }
inline void split(float v, uint16_t* high, uint16_t* low) {
  convert(v, high);
  convert(v - to_float(*high), low);
}
inline void split(const float (&v)[2], uint16_t* high, uint16_t* low) {
  for (int k = 0; k < 2; ++k) split(v[k], high + k, low + k);
}

void* shared_chunk(int index, int64_t bytes);
void* chunk_in_block(void* p, int rank);

template <class T>
T* in_block(T* p, int rank) {
  return static_cast<T*>(chunk_in_block(p, rank));
}

// Written here, not in emulator.cpp, so that sanitizers see it.
template <class T>
void post(T* to, T v, Arrival* a, int rank) {
  static_assert(sizeof(T) == 4);
  *in_block(to, rank) = v;
  sent(in_block(a, rank), sizeof(T));
}

inline void post_four(uint32_t* to, const uint32_t (&v)[4], Arrival* a, int rank) {
  for (int k = 0; k < 4; ++k) post(to + k, v[k], a, rank);
}

class Shared {
 public:
  template <class T>
  T* take(int64_t n) {
    return static_cast<T*>(shared_chunk(taken_++, n * static_cast<int64_t>(sizeof(T))));
  }

 private:
  int taken_ = 0;
};

}  // namespace fastgen::emulator
