// How a pixel program (fastgen/ops/pixel_program.py) lies in memory, on any device.
#pragma once

#include <cstdint>

namespace fastgen {
namespace {

constexpr int kPlaneInts = 7, kInstructionInts = 10, kMatrixInts = 4;
constexpr int kChannelBlock = 16;  // channels are padded to whole blocks
constexpr float kNormEps = 1e-5f;  // of layer norms

// Rows of a matrix as they are stored: a gate's halves in alternating blocks. -> row of the weight, or -1.
inline int64_t stored_row(int64_t r, int64_t rows, int64_t halves) {
  const int64_t channel = r / (halves * kChannelBlock) * kChannelBlock + r % kChannelBlock;
  if (channel >= rows / halves) return -1;
  return (r / kChannelBlock % halves) * (rows / halves) + channel;
}
inline int64_t stored_rows(int64_t rows, int64_t halves) {
  const int64_t channels = rows / halves;
  return halves * ((channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock);
}

}  // namespace
}  // namespace fastgen
