// Products of a chain, each of which waits for the one before: all that need not wait is loaded ahead.
#pragma once

#include "network.cuh"
#include "wavenet_job.h"

namespace fastgen::wavenet {

constexpr float kFarBelow = -3.4e38f;

constexpr float kLog2e = 1.4426950409f;

// tanh(a) / (1 + exp(-b)), good to 1e-6, with one division.
FASTGEN_DEVICE float quick_gate(float a, float b) {
  const float u = quick_exp2(-2 * kLog2e * (a < -15 ? -15 : a)), v = quick_exp2(-kLog2e * b);
  return quick_divide(1 - u, (1 + u) * (1 + v));
}

// As sample_categorical for probabilities in proportion to 2^(scale logits), of logits padded to a multiple of eight by
// ones far below: a lane has eight after eight of them. By one warp.
FASTGEN_APART int quick_categorical(const float* logits, int classes, float scale, float u) {
  const int lane = thread() % 32, own = (classes + 255) / 256 * kGroup, begin = lane * own;
  const int end = begin + own < classes ? begin + own : classes;
  const auto eight = [&](int c) {
    Group<float> v;
    for (float& each : v.v) each = kFarBelow;
    if (c < end) v = *reinterpret_cast<const Group<float>*>(logits + c);
    return v;
  };
  Group<float> v = eight(begin);
  const auto most = [](const Group<float>& g) {
    return fmaxf(fmaxf(fmaxf(g.v[0], g.v[1]), fmaxf(g.v[2], g.v[3])),
                 fmaxf(fmaxf(g.v[4], g.v[5]), fmaxf(g.v[6], g.v[7])));
  };
  float top = most(v);
#pragma unroll 1
  for (int c = begin + kGroup; c < end; c += kGroup) top = fmaxf(top, most(eight(c)));
  top = most_in_warp(top);
  // sums of probabilities, times a factor, up to each of the eight
  const auto add = [&](Group<float> g, float before) {
    for (float& each : g.v) each = before += quick_exp2((each - top) * scale);
    return g;
  };
  v = add(v, 0);
  float sum = v.v[kGroup - 1];
#pragma unroll 1
  for (int c = begin + kGroup; c < end; c += kGroup) sum = add(eight(c), sum).v[kGroup - 1];
  float until = sum;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const float before = shuffle_up(until, lanes);
    if (lane >= lanes) until += before;
  }
  const float threshold = u * shuffle_from(until, 31), below = until - sum;
  int count = 0;
  for (const float each : v.v) count += below + each <= threshold;
  float last = v.v[kGroup - 1];
#pragma unroll 1
  for (int c = begin + kGroup; c < end; c += kGroup) {
    const Group<float> more = add(eight(c), last);
    for (const float each : more.v) count += below + each <= threshold;
    last = more.v[kGroup - 1];
  }
  const int chosen = sum_in_warp(count);
  return chosen < classes ? chosen : classes - 1;
}

// Two numbers of a vector, from an even one on, and one.
struct alignas(8) Pair {
  float v[2];
};
FASTGEN_DEVICE Pair& pair(float* at) { return *reinterpret_cast<Pair*>(at); }

FASTGEN_DEVICE void put(const Vectors<float>& to, int vector, int number, const Pair& v) {
  pair(to.data + vector * to.length + number) = v;
}
FASTGEN_DEVICE void put(const Vectors<uint16_t>& to, int vector, int number, const Pair& v) {
  uint16_t* at = to.data + vector * to.length * 2 + number + (number & ~7);
  split(v.v, at, at + kGroup);
}
FASTGEN_DEVICE void put(const Vectors<float>& to, int vector, int number, float v) {
  to.data[vector * to.length + number] = v;
}
FASTGEN_DEVICE void put(const Vectors<uint16_t>& to, int vector, int number, float v, bool exists = true) {
  uint16_t *at = to.data + vector * to.length * 2 + number + (number & ~7), high, low;
  split(v, &high, &low);
  if (!exists) return;
  at[0] = high;
  at[kGroup] = low;
}

// The weights of a tile's first kHeld steps (of 32 inputs), as a warp's lanes have them; kExact: there are no more and
// no fewer steps.
template <int kHeld, bool kExact, class W>
class Held;

// What a lane has of 4 M vectors in those steps.
template <int M, int kHeld, bool kExact, class W>
class Inputs;

// Sums of a tile's products with 4 M vectors: begin(h, i, v) gives what one starts from, add(held, inputs, w, steps, x,
// live) multiplies; in the end they are as multiply_tile has them.
template <int M, class W>
class Sums;

template <int kHeld, bool kExact>
class Held<kHeld, kExact, uint16_t> {
 public:
  // A lane's weights for the two multiplications of a step, in the order of for_tensor_cores.
  struct Step {
    uint32_t of[2][4];
  };

  FASTGEN_DEVICE static Step load_step(const uint16_t* w, int step) {
    w += step * kTileRows * kTileInputs + thread() % 32 * kGroup;
    Step a;
    memcpy(a.of[0], __builtin_assume_aligned(w, 16), 16);
    memcpy(a.of[1], __builtin_assume_aligned(w + 32 * kGroup, 16), 16);
    return a;
  }
  // Zeros where there is nothing: registers that only some iterations set would be taken throughout the kernel.
  FASTGEN_DEVICE void load(const uint16_t* w, int steps, bool exists = true) {
    for (int s = 0; s < kHeld; ++s) {
      step[s] = {};
      if (exists && (kExact || s < steps)) step[s] = load_step(w, s);
    }
  }

  Step step[kHeld];
};

template <int M, int kHeld, bool kExact>
class Inputs<M, kHeld, kExact, uint16_t> {
 public:
  FASTGEN_DEVICE void load(const Vectors<uint16_t>& x, int steps, int live) {
    const int lane = thread() % 32, column = lane / 4;  // of 8: two parts of four vectors
    for (int i = 0; i < M; ++i) {
      const int n = 4 * i + column / 2;
      const uint16_t* in = x.data + (n * x.length + lane % 4 * kGroup) * 2 + column % 2 * kGroup;
      for (int s = 0; s < kHeld; ++s) {
        const uint16_t* at = in + (kExact || s < steps ? s : 0) * kTileInputs * 2;
        of[s][i] = {};
        if (n < live) memcpy(of[s][i].v, __builtin_assume_aligned(at, 16), 16);
      }
    }
  }

  struct Part {
    uint32_t v[4];
  };
  Part of[kHeld][M];
};

template <int M>
class Sums<M, uint16_t> {
 public:
  FASTGEN_DEVICE void begin(int h, int i, float v) { d_[i][0][2 * h] = v; }
  template <int kHeld, bool kExact>
  FASTGEN_DEVICE void add(const Held<kHeld, kExact, uint16_t>& held, const Inputs<M, kHeld, kExact, uint16_t>& inputs,
                          const uint16_t* w, int steps, const Vectors<uint16_t>& x, int live) {
    for (int s = 0; s < kHeld; ++s) multiply(held.step[s], inputs.of[s]);
#pragma unroll 1
    for (int s = kHeld; !kExact && s < steps; ++s) {
      const Vectors<uint16_t> from{x.data + s * kTileInputs * 2, x.length};
      Inputs<M, 1, true, uint16_t> more;
      more.load(from, 1, live);
      multiply(held.load_step(w, s), more.of[0]);
    }
  }
  FASTGEN_DEVICE void get(float (&to)[2][M]) const {
    for (int i = 0; i < M; ++i)
      for (int h = 0; h < 2; ++h)
        to[h][i] = (d_[i][0][2 * h] + d_[i][0][2 * h + 1]) + (d_[i][1][2 * h] + d_[i][1][2 * h + 1]);
  }

 private:
  template <class Step, class Part>
  FASTGEN_DEVICE void multiply(const Step& a, const Part (&b)[M]) {
    for (int i = 0; i < M; ++i) {
      multiply_add(d_[i][0], a.of[0], {b[i].v[0], b[i].v[1]});
      multiply_add(d_[i][1], a.of[1], {b[i].v[2], b[i].v[3]});
    }
  }

  float d_[M][2][4] = {};  // two sums that do not wait for each other
};

template <int kHeld, bool kExact>
class Held<kHeld, kExact, float> {
 public:
  FASTGEN_DEVICE void load(const float*, int, bool = true) {}
};

template <int M, int kHeld, bool kExact>
class Inputs<M, kHeld, kExact, float> {
 public:
  FASTGEN_DEVICE void load(const Vectors<float>&, int, int) {}
};

template <int M>
class Sums<M, float> {
 public:
  FASTGEN_DEVICE void begin(int h, int i, float v) { sums_[h][i] = v; }
  template <class Held, class Inputs>
  FASTGEN_DEVICE void add(const Held&, const Inputs&, const float* w, int steps, const Vectors<float>& x, int live) {
    float more[2][M] = {};
    multiply_tile<M>(w, steps, x, live, more);
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < M; ++i) sums_[h][i] += more[h][i];
  }
  FASTGEN_DEVICE void get(float (&to)[2][M]) const {
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
#pragma unroll
  for (int i = 0; i < M; ++i)
    for (int h = 0; h < 2; ++h) {
      const int n = 4 * i + lane % 4, unit = tile * (kPairs ? 8 : 16) + lane / 4 + (kPairs ? 0 : 8 * h);
      if (n < live && unit < m.units) f(unit, n, h, i);
    }
}

// A matrix's product with vectors, kTiles tiles to a warp at a time.
template <int M, bool kPairs, int kTiles, int kHeld, class W>
class Product {
 public:
  // Loads a warp's first weights, if there are any; run() takes them.
  FASTGEN_DEVICE void hold(const Matrix& m, const W* w, bool exists = true) { hold_from(m, w, thread() / 32, exists); }

  // start(unit, vector, row of the pair) gives what is added to the product: it is read before wait(), which all
  // threads call once, and after which the vectors are known. meanwhile() may load the next product's weights. Then
  // come finish(unit, vector, sum) or, for pairs, finish(unit, vector, sum, second sum).
  template <class Start, class Wait, class Meanwhile, class Finish>
  FASTGEN_DEVICE void run(const Matrix& m, const W* w, const Vectors<W>& x, int live, Start&& start, Wait&& wait,
                          Meanwhile&& meanwhile, Finish&& finish) {
    const int at_once = kTiles * (threads() / 32);
    round(m, w, thread() / 32, x, live, start, wait, meanwhile, finish);
#pragma unroll 1
    for (int tile = thread() / 32 + at_once; tile < m.tiles; tile += at_once) {
      Product more;  // what this one holds is the next run's
      more.hold_from(m, w, tile, true);
      more.round(m, w, tile, x, live, start, [] {}, [] {}, finish);
    }
  }

 private:
  FASTGEN_DEVICE static const W* weights(const Matrix& m, const W* w, int tile) {
    return w + m.at + tile * m.steps * kTileRows * kTileInputs;
  }
  FASTGEN_DEVICE void hold_from(const Matrix& m, const W* w, int first, bool exists) {
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const int tile = first + k * (threads() / 32);
      held_[k].load(weights(m, w, tile), m.steps, exists && tile < m.tiles);
    }
  }
  template <class Start, class Wait, class Meanwhile, class Finish>
  FASTGEN_DEVICE void round(const Matrix& m, const W* w, int first, const Vectors<W>& x, int live, Start&& start,
                            Wait&& wait, Meanwhile&& meanwhile, Finish&& finish) {
    Sums<M, W> sums[kTiles];
#pragma unroll
    for (int k = 0; k < kTiles; ++k)
      each_sum<M, kPairs>(m, first + k * (threads() / 32), live,
                          [&](int unit, int n, int h, int i) { sums[k].begin(h, i, start(unit, n, h)); });
    wait();
    Inputs<M, kHeld, false, W> inputs;
    inputs.load(x, m.steps, live);
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      const int tile = first + k * (threads() / 32);
      if (tile < m.tiles) sums[k].add(held_[k], inputs, weights(m, w, tile), m.steps, x, live);
    }
    sync_warp();  // so that the compiler leaves what comes meanwhile behind the vectors
    meanwhile();
#pragma unroll
    for (int k = 0; k < kTiles; ++k) {
      float all[2][M];
      sums[k].get(all);
      each_sum<M, kPairs>(m, first + k * (threads() / 32), live, [&](int unit, int n, int h, int i) {
        if constexpr (!kPairs)
          finish(unit, n, all[h][i]);
        else if (h == 1)
          finish(unit, n, all[0][i], all[1][i]);
      });
    }
  }

  Held<kHeld, false, W> held_[kTiles];
};

}  // namespace fastgen::wavenet
