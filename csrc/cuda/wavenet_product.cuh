// Products of a chain, each of which waits for the one before: all that need not wait is loaded ahead.
#pragma once

#include "network.cuh"
#include "wavenet_job.h"

namespace fastgen::wavenet {

constexpr float kFarBelow = -3.4e38f;

// tanh(a) / (1 + exp(-b)), good to 1e-6, with one division.
FASTGEN_DEVICE float quick_gate(float a, float b) {
  const float u = quick_exp(-2 * (a < -15 ? -15 : a)), v = quick_exp(-b);
  return quick_divide(1 - u, (1 + u) * (1 + v));
}

// As sample_categorical, of logits that are padded to a multiple of eight by ones far below. By one warp.
FASTGEN_APART int quick_categorical(const float* logits, int classes, float temperature, float u) {
  const int lane = thread() % 32, own = (classes + 255) / 256 * 8, begin = lane * own;
  const int end = begin + own < classes ? begin + own : classes;
  const float scale = 1 / temperature;
  const auto each = [&](auto&& f) {
#pragma unroll 1
    for (int c = begin; c < end; c += kGroup) {
      const auto group = *reinterpret_cast<const Group<float>*>(logits + c);
      for (const float v : group.v) f(v * scale);
    }
  };
  float top = kFarBelow;
  each([&](float v) { top = fmaxf(top, v); });
  top = most_in_warp(top);
  float sum = 0;
  each([&](float v) { sum += quick_exp(v - top); });
  float until = sum;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float before = shuffle_up(until, lanes);
    if (lane >= lanes) until += before;
  }
  const float threshold = u * shuffle_from(until, 31);
  float below = until - sum;
  int count = 0;
  each([&](float v) { count += (below += quick_exp(v - top)) <= threshold; });
  const int chosen = sum_in_warp(count);
  return chosen < classes ? chosen : classes - 1;
}

// A number of a vector, and eight of them from a multiple of eight.
FASTGEN_DEVICE void put(const Vectors<float>& to, int vector, int number, float v) {
  to.data[vector * to.length + number] = v;
}
FASTGEN_DEVICE void put(const Vectors<uint16_t>& to, int vector, int number, float v) {
  uint16_t* at = to.data + vector * to.length * 2 + number + (number & ~7);
  split(v, at, at + kGroup);
}
FASTGEN_DEVICE void put(const Vectors<float>& to, int vector, int number, const Group<float>& v) {
  *reinterpret_cast<Group<float>*>(to.data + vector * to.length + number) = v;
}
FASTGEN_DEVICE void put(const Vectors<uint16_t>& to, int vector, int number, const Group<float>& v) {
  Group<uint16_t> high, low;
  for (int k = 0; k < kGroup; ++k) split(v.v[k], &high.v[k], &low.v[k]);
  auto* at = reinterpret_cast<Group<uint16_t>*>(to.data + (vector * to.length + number) * 2);
  at[0] = high;
  at[1] = low;
}

// A warp's product of a tile of weights, `steps` times 32 inputs wide, with 4 M vectors: begin(h, i, v) gives what the
// sum starts from, hold(w, steps) loads the first kHeld steps' weights, add(w, steps, x, live) multiplies; sums are as
// multiply_tile has them. kSmall: there are no more and no fewer steps.
template <int M, int kHeld, bool kSmall, class W>
class TileProduct;

template <int M, int kHeld, bool kSmall>
class TileProduct<M, kHeld, kSmall, uint16_t> {
 public:
  FASTGEN_DEVICE void begin(int h, int i, float v) { d_[i][0][2 * h] = v; }
  FASTGEN_DEVICE void hold(const uint16_t* w, int steps) {
    w += thread() % 32 * kGroup;
    held_[0] = load(w);
    for (int s = 1; s < kHeld; ++s) {
      if (!kSmall) held_[s] = {};
      if (kSmall || s < steps) held_[s] = load(w + s * kStep);
    }
  }
  FASTGEN_DEVICE void add(const uint16_t* w, int steps, const Vectors<uint16_t>& x, int /*live*/) {
    const int lane = thread() % 32, column = lane / 4;  // of 8: two parts of four vectors
    const uint16_t* in = x.data + (column / 2 * x.length + lane % 4 * kGroup) * 2 + column % 2 * kGroup;
    w += lane * kGroup;
    for (int s = 0; s < kHeld; ++s) multiply(held_[s], in + (kSmall || s < steps ? s : 0) * 2 * kTileInputs, x.length);
#pragma unroll 1
    for (int s = kHeld; !kSmall && s < steps; s += 2) {
      const Step a = load(w + s * kStep), b = s + 1 < steps ? load(w + (s + 1) * kStep) : Step{};
      multiply(a, in + s * 2 * kTileInputs, x.length);
      multiply(b, in + (s + 1 < steps ? s + 1 : s) * 2 * kTileInputs, x.length);
    }
  }
  FASTGEN_DEVICE void sums(float (&to)[2][M]) const {
    for (int i = 0; i < M; ++i)
      for (int h = 0; h < 2; ++h)
        to[h][i] = (d_[i][0][2 * h] + d_[i][0][2 * h + 1]) + (d_[i][1][2 * h] + d_[i][1][2 * h + 1]);
  }

 private:
  static constexpr int kStep = kTileRows * kTileInputs;

  // A lane's weights for the two multiplications of a step, in the order of for_tensor_cores.
  struct Step {
    uint32_t of[2][4];
  };

  FASTGEN_DEVICE static Step load(const uint16_t* w) {
    Step a;
    memcpy(a.of[0], __builtin_assume_aligned(w, 16), 16);
    memcpy(a.of[1], __builtin_assume_aligned(w + 32 * kGroup, 16), 16);
    return a;
  }
  FASTGEN_DEVICE void multiply(const Step& a, const uint16_t* in, int length) {
    for (int i = 0; i < M; ++i) {
      uint32_t b[4];
      memcpy(b, __builtin_assume_aligned(in + 4 * i * length * 2, 16), 16);
      multiply_add(d_[i][0], a.of[0], {b[0], b[1]});
      multiply_add(d_[i][1], a.of[1], {b[2], b[3]});
    }
  }

  Step held_[kHeld];
  float d_[M][2][4] = {};  // two sums that do not wait for each other
};

template <int M, int kHeld, bool kSmall>
class TileProduct<M, kHeld, kSmall, float> {
 public:
  FASTGEN_DEVICE void begin(int h, int i, float v) { sums_[h][i] = v; }
  FASTGEN_DEVICE void hold(const float*, int) {}
  FASTGEN_DEVICE void add(const float* w, int steps, const Vectors<float>& x, int live) {
    float more[2][M] = {};
    multiply_tile<M>(w, steps, x, live, more);
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < M; ++i) sums_[h][i] += more[h][i];
  }
  FASTGEN_DEVICE void sums(float (&to)[2][M]) const {
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < M; ++i) to[h][i] = sums_[h][i];
  }

 private:
  float sums_[2][M] = {};
};

// Calls f(unit, vector, half, i) for what a lane has of a tile's sums, sums[half][i]: where units are pairs, `half` is
// the row of the pair.
template <int M, bool kPairs, class F>
FASTGEN_DEVICE void each_sum(const Matrix& m, int tile, int live, F&& f) {
  const int lane = thread() % 32;
  for (int i = 0; i < M; ++i)
    for (int h = 0; h < 2; ++h) {
      const int n = 4 * i + lane % 4, unit = tile * (kPairs ? 8 : 16) + lane / 4 + (kPairs ? 0 : 8 * h);
      if (n < live && unit < m.units) f(unit, n, h, i);
    }
}

// A warp for each tile. start(unit, vector, row of the pair) gives what is added to the product: read, like the first
// weights, before wait(), which all threads call once, and after which the vectors are known. Then finish(unit, vector,
// sum) or, for pairs, finish(unit, vector, sum, second sum). kSmall: each tile has a warp of its own and kHeld steps.
template <int M, bool kPairs, int kHeld, bool kSmall, class W, class Start, class Wait, class Finish>
FASTGEN_DEVICE void product(const Matrix& m, const W* w, const Vectors<W>& x, int live, Start&& start, Wait&& wait,
                            Finish&& finish) {
  const auto with = [&](int tile, auto&& known) {
    // loaded where there is no tile too: registers that only some iterations set would be taken in all the kernel
    const W* of_tile = w + m.at + (tile < m.tiles ? tile : 0) * (kSmall ? kHeld : m.steps) * kTileRows * kTileInputs;
    TileProduct<M, kHeld, kSmall, W> p;
    p.hold(of_tile, m.steps);
    each_sum<M, kPairs>(m, tile, live, [&](int unit, int n, int h, int i) { p.begin(h, i, start(unit, n, h)); });
    known();
    if (tile >= m.tiles) return;
    p.add(of_tile, m.steps, x, live);
    float sums[2][M];
    p.sums(sums);
    each_sum<M, kPairs>(m, tile, live, [&](int unit, int n, int h, int i) {
      if constexpr (!kPairs)
        finish(unit, n, sums[h][i]);
      else if (h == 1)
        finish(unit, n, sums[0][i], sums[1][i]);
    });
  };
  const int warps = threads() / 32, warp = thread() / 32;
  with(warp, wait);
#pragma unroll 1
  for (int tile = warp + warps; !kSmall && tile < m.tiles; tile += warps) with(tile, [] {});
}

}  // namespace fastgen::wavenet
