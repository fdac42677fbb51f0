// What the operators, which are compiled without CUDA, ask of its runtime. Errors are the runtime's; 0 is none.
#pragma once

#include <cstdint>

namespace fastgen {

struct Device {
  int64_t shared_bytes;  // that a block may have
  int multiprocessors;
  int largest_cluster;  // 1 where there are no clusters
};

int device_of(int index, Device* device);  // makes it the current one
const char* error_text(int error);
int current_device();
void set_device(int index);
int copy_to_device(void* to, const void* from, int64_t bytes, void* stream);  // of pageable memory, taken at once

}  // namespace fastgen
