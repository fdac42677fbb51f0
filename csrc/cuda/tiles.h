// How a matrix's weights lie for product.cuh: in tiles of 16 rows by 32 inputs. A warp multiplies a tile; its lane has
// eight inputs of row lane / 4 and of the row eight below, in the order in which tensor cores take them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../host_device.h"

namespace fastgen {

constexpr int kGroup = 8;  // inputs of a row that a lane reads at once
constexpr int kTileRows = 16, kTileInputs = 32;

FASTGEN_HOST_DEVICE inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct Tiles {
  int64_t units, inputs;
  bool pairs;  // a unit has two rows, one in each half of a tile, as a gate has

  FASTGEN_HOST_DEVICE int64_t each() const { return pairs ? kTileRows / 2 : kTileRows; }  // units
  FASTGEN_HOST_DEVICE int64_t count() const { return (units + each() - 1) / each(); }
  FASTGEN_HOST_DEVICE int64_t padded() const { return round_up(inputs, kTileInputs); }
  FASTGEN_HOST_DEVICE int64_t size() const { return count() * padded() * kTileRows; }
  // row: 0, or 1 for the second of a pair
  FASTGEN_HOST_DEVICE int64_t at(int64_t unit, int row, int64_t input) const {
    const int64_t place = unit % each(), tile = unit / each() * (padded() / kTileInputs) + input / kTileInputs;
    const int64_t half = pairs ? row : place / 8, lane = place % 8 * 4 + input % kTileInputs / kGroup;
    return ((tile * 2 + half) * 32 + lane) * kGroup + input % kGroup;
  }
};

FASTGEN_HOST_DEVICE inline float to_float(float v) { return v; }
FASTGEN_HOST_DEVICE inline float to_float(uint16_t v) {  // bfloat16
  const uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}

FASTGEN_HOST_DEVICE inline void convert(float v, float* to) { *to = v; }
FASTGEN_HOST_DEVICE inline void convert(float v, uint16_t* to) {  // the nearest bfloat16, of two the even one
#ifdef __CUDA_ARCH__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(*to) : "f"(v));
#else
  uint32_t bits;
  memcpy(&bits, &v, sizeof bits);
  *to = v != v ? uint16_t{0x7FFF} : static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
#endif
}

}  // namespace fastgen
