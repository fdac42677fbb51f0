// Products of a matrix with a few vectors, by all warps of a block: on tensor cores for bfloat16 weights, whose vectors
// are sums of two bfloat16 so that they keep 16 bits; on the other cores, in float32, for float32 weights.
#pragma once

#include "device.h"
#include "tiles.h"

namespace fastgen {

using namespace device;

template <class W>
struct alignas(16) Group {
  W v[kGroup];
};

// Vectors of `length` numbers, a multiple of 32, in shared memory, groups of eight numbers one after the other; for
// bfloat16 a group has eight leading parts, then the eight that remain.
template <class W>
struct Vectors {
  static constexpr int kParts = 4 / sizeof(W);
  W* data;
  int length;

  FASTGEN_DEVICE W* group(int vector, int number, int part) const {
    return data + (int64_t{vector} * length + number) * kParts + part * kGroup;
  }
  // Eight numbers at once, from `number`, a multiple of eight.
  FASTGEN_DEVICE void put(int vector, int number, const Group<float>& v) const {
    Group<W> parts[kParts];
    for (int k = 0; k < kGroup; ++k) {
      convert(v.v[k], &parts[0].v[k]);
      if constexpr (kParts == 2) convert(v.v[k] - to_float(parts[0].v[k]), &parts[1].v[k]);
    }
    for (int part = 0; part < kParts; ++part) *reinterpret_cast<Group<W>*>(group(vector, number, part)) = parts[part];
  }
  FASTGEN_DEVICE void put(int vector, int number, float v) const {
    W* to = group(vector, number / kGroup * kGroup, 0) + number % kGroup;
    convert(v, to);
    if constexpr (kParts == 2) convert(v - to_float(*to), to + kGroup);
  }
};

// sums[h][i]: of row lane / 4 + 8 h of a tile with vector 4 i + lane % 4.
template <int M>
FASTGEN_DEVICE void multiply_tile(const uint16_t* w, int64_t steps, const Vectors<uint16_t>& x, int /*live*/,
                                  float (&sums)[2][M]) {
  const int lane = thread() % 32, column = lane / 4;  // of 8: two parts of four vectors
  float d[M][4] = {};
  w += lane * kGroup;
#pragma unroll 2  // no more: the kernel's code is to stay in the instruction cache
  for (int64_t s = 0; s < steps; ++s, w += 2 * 32 * kGroup) {
    uint32_t a[2][4], b[4];
    memcpy(a[0], __builtin_assume_aligned(w, 16), 16);
    memcpy(a[1], __builtin_assume_aligned(w + 32 * kGroup, 16), 16);
    for (int i = 0; i < M; ++i) {
      const uint16_t* in =
          x.group(4 * i + column / 2, static_cast<int>(s) * kTileInputs + lane % 4 * kGroup, column % 2);
      memcpy(b, __builtin_assume_aligned(in, 16), 16);
      multiply_add(d[i], {a[0][0], a[1][0], a[0][1], a[1][1]}, {b[0], b[1]});
      multiply_add(d[i], {a[0][2], a[1][2], a[0][3], a[1][3]}, {b[2], b[3]});
    }
  }
  for (int i = 0; i < M; ++i)
    for (int h = 0; h < 2; ++h) sums[h][i] = d[i][2 * h] + d[i][2 * h + 1];
}

template <int M>
FASTGEN_DEVICE void multiply_tile(const float* w, int64_t steps, const Vectors<float>& x, int live,
                                  float (&sums)[2][M]) {
  const int lane = thread() % 32;
  float all[2][4 * M] = {};
  w += lane * kGroup;
  for (int64_t s = 0; s < steps; ++s, w += 2 * 32 * kGroup) {
    const Group<float> rows[2] = {*reinterpret_cast<const Group<float>*>(w),
                                  *reinterpret_cast<const Group<float>*>(w + 32 * kGroup)};
    for (int n = 0; n < 4 * M; ++n) {
      if (n >= live) break;
      const auto in =
          *reinterpret_cast<const Group<float>*>(x.group(n, static_cast<int>(s) * kTileInputs + lane % 4 * kGroup, 0));
      for (int h = 0; h < 2; ++h)
        for (int k = 0; k < kGroup; ++k) all[h][n] += rows[h].v[k] * in.v[k];
    }
  }
  for (int n = 0; n < 4 * M; ++n)
    for (int h = 0; h < 2; ++h) {
      float sum = all[h][n];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (lane % 4 == n % 4) sums[h][n / 4] = sum;
    }
}

// finish(unit, vector, sum), or finish(unit, vector, sum, second sum) where units are pairs, by the lanes of a warp
// that has a tile's sums, for each of its units and each of the first `live` vectors.
template <int M, bool kPairs, class F>
FASTGEN_DEVICE void finish_tile(const Tiles& m, int64_t tile, const float (&sums)[2][M], int live, F&& finish) {
  const int lane = thread() % 32;
  const int64_t unit = tile * (kPairs ? kTileRows / 2 : kTileRows) + lane / 4;
  for (int i = 0; i < M; ++i) {
    const int n = 4 * i + lane % 4;
    if (n >= live) continue;
    if constexpr (kPairs) {
      if (unit < m.units) finish(static_cast<int>(unit), n, sums[0][i], sums[1][i]);
    } else {
      for (int h = 0; h < 2; ++h)
        if (unit + 8 * h < m.units) finish(static_cast<int>(unit) + 8 * h, n, sums[h][i]);
    }
  }
}

// A warp for each tile; of at most 4 M vectors. All threads of a block take part.
template <int M, bool kPairs = false, class W, class F>
FASTGEN_DEVICE void product(const Tiles& m, const W* w, const Vectors<W>& x, int live, F&& finish) {
  for (int64_t tile = thread() / 32; tile < m.count(); tile += threads() / 32) {
    float sums[2][M] = {};
    multiply_tile<M>(w + tile * kTileRows * m.padded(), m.padded() / kTileInputs, x, live, sums);
    finish_tile<M, kPairs>(m, tile, sums, live, finish);
  }
}

// The same, where `ranks` blocks share the tiles and several warps a tile's inputs, so that each weight's way from
// memory is waited for once. partial: shared memory, split_floats(M, threads()) of it.
FASTGEN_HOST_DEVICE inline int64_t split_floats(int m, int threads) { return int64_t{threads} * 2 * m; }

template <int M, bool kPairs = false, class W, class F>
FASTGEN_DEVICE void split_product(const Tiles& m, const W* w, const Vectors<W>& x, int live, int rank, int ranks,
                                  float* partial, F&& finish) {
  const int warps = threads() / 32, warp = thread() / 32, lane = thread() % 32;
  const int64_t steps = m.padded() / kTileInputs, own = (m.count() - rank + ranks - 1) / ranks;
  int parts = 1;
  while (2 * parts * own <= warps && 2 * parts <= steps) parts *= 2;
  const int part = warp % parts, at_once = warps / parts;
  for (int64_t begin = 0; begin < own; begin += at_once) {
    const int64_t nth = begin + warp / parts, tile = rank + ranks * nth;
    const bool works = warp / parts < at_once && nth < own;
    float sums[2][M] = {};
    if (works) {
      const int64_t from = steps * part / parts;
      const Vectors<W> inputs{x.data + from * kTileInputs * Vectors<W>::kParts, x.length};
      multiply_tile<M>(w + (tile * m.padded() + from * kTileInputs) * kTileRows, steps * (part + 1) / parts - from,
                       inputs, live, sums);
    }
    if (parts > 1) {
      float* of_warp = partial + int64_t{warp} * 2 * M * 32 + lane;
      for (int h = 0; h < 2; ++h)
        for (int i = 0; i < M; ++i) of_warp[(h * M + i) * 32] = sums[h][i];
      sync_block();
      for (int p = 1; works && part == 0 && p < parts; ++p)
        for (int h = 0; h < 2; ++h)
          for (int i = 0; i < M; ++i) sums[h][i] += of_warp[((p * 2 + h) * M + i) * 32];
    }
    if (works && part == 0) finish_tile<M, kPairs>(m, tile, sums, live, finish);
    if (parts > 1) sync_block();
  }
}

}  // namespace fastgen
