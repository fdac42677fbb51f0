// Kernels with a fault each, for tests of the emulator itself: planted FAULT ORDER SEED. Prints what the kernel
// computed: the sum of 0 .. 127 reversed through shared memory by a cluster of two blocks, 8128 in each place where all
// is well.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.h"

using namespace fastgen::device;

namespace {

constexpr int kThreads = 64;

std::string fault;

bool planted(const char* name) { return fault == name; }

void kernel(float* out) {
  Shared shared;
  float* own = shared.take<float>(kThreads);
  float* reversed = shared.take<float>(kThreads);
  float* total = shared.take<float>(1);
  int64_t* ready = shared.take<int64_t>(1);
  const int t = thread(), rank = block() % 2;
  if (t == 0) *ready = 0;
  if (!planted("uninitialised read") || t != 5)
    own[planted("index out of bounds") && t == 63 ? t + 1 : t] = rank * kThreads + t;
  if (planted("no barrier")) {
  } else if (planted("divergent barrier") && t > 40) {
    sync_block();
  } else if (planted("a barrier that some miss") && t > 40) {
    return;
  } else if (planted("a shuffle for a barrier")) {
    shuffle_xor(0.0f, 1);
  } else {
    sync_block();
  }
  reversed[t] = own[planted("a shuffle for a barrier") ? t ^ 1 : kThreads - 1 - t];
  sync_block();
  if (t == 0) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += reversed[i];
    *total = sum;
  }
  if (!planted("no cluster barrier")) sync_cluster();
  if (t == 1) out[block()] = *total + *in_block(total, 1 - rank);
  sync_cluster();
  if (t == 2 && rank == 0) store_release(in_block(ready, 1), planted("a flag that never comes") ? 0 : 1);
  if (rank == 1) {
    if (t == 3) wait_for(ready, 1);
    sync_block();
  }
  sync_cluster();
}

}  // namespace

int main(int, char** words) {
  fault = words[1];
  fastgen::emulator::Launch how{4, 2, kThreads};
  how.order = static_cast<fastgen::emulator::Order>(std::atoi(words[2]));
  how.seed = std::atoi(words[3]);
  std::vector<float> out(4);
  try {
    fastgen::emulator::launch(how, [&] { kernel(out.data()); });
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 3;
  }
  for (const float v : out) std::printf("%g ", v);
}
