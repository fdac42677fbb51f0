// Products of a warp with weights that are on their way ahead of the vectors.
#pragma once

#include "network.cuh"
#include "pixelcnn_job.h"

namespace fastgen::pixelcnn {

// Of bfloat16 weights, what a warp's lanes have of a tile of 16 rows by 32 inputs (see `place` in pixelcnn_job.h), and
// of 4 M vectors (see Vectors).
struct Fragment {
  static constexpr int kSize = kTileRows * kTileInputs;
  uint32_t a[2][4];

  FASTGEN_DEVICE void load(const uint16_t* w) {
    const uint16_t* from = w + thread() % 32 * kGroup;
    for (int m = 0; m < 2; ++m) memcpy(a[m], __builtin_assume_aligned(from + m * 32 * kGroup, 16), 16);
  }
  // The place of the lane's column, of eight: two parts of four vectors.
  FASTGEN_DEVICE static const float* column(const float* vectors, int length) {
    const int lane = thread() % 32;
    return vectors + lane / 8 * length + lane % 4 * kGroup + lane / 4 % 2 * (kGroup / 2);
  }
  FASTGEN_DEVICE static void load_column(const float* from, uint32_t (&b)[4]) {
    memcpy(b, __builtin_assume_aligned(from, 16), 16);
  }
  FASTGEN_DEVICE void multiply(const uint32_t (&b)[4], float (&first)[4], float (&second)[4]) const {
    multiply_add(first, a[0], {b[0], b[1]});
    multiply_add(second, a[1], {b[2], b[3]});
  }
};

// A tile's weights for one pixel of a window: the first are on their way from `fetch` on.
template <class W>
struct Ahead {
  static constexpr int kSteps = 4;
  const W* w = nullptr;
  int steps = 0;
  Fragment first[kSteps];

  FASTGEN_DEVICE void fetch(const W* weights, int count) {
    w = weights;
    steps = count;
    if constexpr (sizeof(W) == 2) load(0, first);
  }
  FASTGEN_DEVICE void load(int from, Fragment (&to)[kSteps]) const {
    for (int s = 0; s < kSteps; ++s) {
      if (from + s < steps)
        to[s].load(w + (from + s) * Fragment::kSize);
      else
        to[s] = {};
    }
  }

  // v[k][h] += of row lane / 4 + 8 h of the tile with vector 4 k + lane % 4.
  template <int M>
  FASTGEN_DEVICE void multiply(const float* vectors, int length, float (&v)[M][2]) const {
    if constexpr (sizeof(W) == 2) {
      const float* from = Fragment::column(vectors, length);
      float d[2][M][4] = {};
      const auto some = [&](int begin, const Fragment(&a)[kSteps]) {
        uint32_t b[kSteps][M][4];
        for (int s = 0; s < kSteps; ++s)
          for (int k = 0; k < M; ++k) {
            const int step = begin + s < steps ? begin + s : 0;
            Fragment::load_column(from + k * kShare * length + step * kTileInputs, b[s][k]);
          }
        for (int s = 0; s < kSteps; ++s)
          for (int k = 0; k < M; ++k) a[s].multiply(b[s][k], d[0][k], d[1][k]);
      };
      some(0, first);
      for (int begin = kSteps; begin < steps; begin += kSteps) {
        Fragment a[kSteps];
        load(begin, a);
        some(begin, a);
      }
      for (int k = 0; k < M; ++k)
        for (int h = 0; h < 2; ++h)
          v[k][h] += d[0][k][2 * h] + d[0][k][2 * h + 1] + d[1][k][2 * h] + d[1][k][2 * h + 1];
    } else {
      float sums[2][M] = {};
      multiply_tile<M>(w, steps, Vectors<W>{const_cast<float*>(vectors), length}, 4 * M, sums);
      for (int k = 0; k < M; ++k)
        for (int h = 0; h < 2; ++h) v[k][h] += sums[h][k];
    }
  }
};

}  // namespace fastgen::pixelcnn
