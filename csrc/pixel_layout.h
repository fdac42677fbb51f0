// How a pixel program (fastgen/ops/pixel_program.py) lies in memory, on any device.
#pragma once

#include <cstdint>

namespace fastgen {
namespace {

constexpr int kPlaneInts = 7, kInstructionInts = 10, kMatrixInts = 4;
constexpr int kChannelBlock = 16;  // channels are padded to whole blocks

// Rows of a matrix as they are stored: a gate's halves in alternating blocks. -> row of the weight, or -1.
inline int64_t stored_row(int64_t r, int64_t rows, int64_t halves) {
  if (halves == 1) return r < rows ? r : -1;
  const int64_t channel = r / (2 * kChannelBlock) * kChannelBlock + r % kChannelBlock;
  if (channel >= rows / 2) return -1;
  return (r / kChannelBlock % 2) * (rows / 2) + channel;
}
inline int64_t stored_rows(int64_t rows, int64_t halves) {
  const int64_t channels = rows / halves;
  return halves * ((channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock);
}

}  // namespace
}  // namespace fastgen
