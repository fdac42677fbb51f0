// What is above a row, for the whole row, one of the two kernels of pixelcnn_images.cuh.
#pragma once

#include "pixelcnn_images.cuh"

namespace fastgen::pixelcnn {

template <class W>
class Rows : Images {
 public:
  FASTGEN_DEVICE Rows(const Job& job, Shared&& shared = {})
      : Images(job, shared, job.row_cluster, job.row_images, 0, job.row_count) {
    windows_ = shared.take<W>(job.columns * job.most_inputs * Vectors<W>::kParts);
    partial_ = shared.take<float>(split_floats(job.columns / 4, threads()));
    columns_ = shared.take<Column>(job.columns);
    sync_block();
  }

  FASTGEN_DEVICE void draw() {
    copy_context();
    for (int i = 0; i < instruction_count_; ++i) {
      meet();
      draw_row(instructions_[i], job_.y);
    }
  }

 private:
  struct Column {
    int64_t memory;  // where the image's begins
    int image, x;
  };
  FASTGEN_DEVICE static float* at(const Row& row, const Column& c) { return row.data + c.memory + c.x * row.step; }
  using Images::at;

  FASTGEN_DEVICE void copy_context() const {
    if (!job_.context) return;
    const auto channels = static_cast<unsigned>(job_.context_channels), size = channels * width_;
    for (unsigned i = rank_ * threads() + thread(); i < count_ * size; i += ranks_ * threads()) {
      const int image = i / size, x = i % size / channels, c = i % channels;
      const int64_t pixel = ((job_.own_context ? first_ + image : 0) * job_.height + job_.y) * job_.width + x;
      at(job_.context_plane, image, job_.y, x)[c] = job_.context[pixel * channels + c];
    }
  }

  // This block's pixels of a row of all images, which it shares with `sharers` blocks, of which it is number `nth`.
  struct Share {
    int begin, end, nth, sharers;
  };
  FASTGEN_DEVICE Share share() const {
    constexpr int kLeast = 16;
    const int columns = width_ * count_;
    int parts = 1;
    while (ranks_ % (2 * parts) == 0 && columns >= 2 * parts * kLeast) parts *= 2;
    const int part = rank_ % parts;
    return {static_cast<int>(int64_t{columns} * part / parts), static_cast<int>(int64_t{columns} * (part + 1) / parts),
            rank_ / parts, ranks_ / parts};
  }

  FASTGEN_DEVICE void draw_row(const Instruction& i, int64_t y) {
    const Kind kind = static_cast<Kind>(i.kind);
    const Share own = share();
    if (kind == Kind::kConv) {
      for (int begin = own.begin; begin < own.end; begin += job_.columns) {
        const int live = own.end - begin < job_.columns ? own.end - begin : job_.columns;
        for (int n = thread(); n < live; n += threads()) {
          const int image = (begin + n) / width_;
          columns_[n] = {image * job_.memory_size, image, (begin + n) % width_};
        }
        sync_block();
        convolve_row(i, y, live, own);
      }
      return;
    }
    const Row src = row(i.src, y), dst = row(i.dst, y), other = kind == Kind::kAdd ? row(i.other, y) : src;
    const auto channels = static_cast<unsigned>(planes_[i.dst].channels);
    for (unsigned e = own.nth * threads() + thread(); e < (own.end - own.begin) * channels;
         e += own.sharers * threads()) {
      const int column = own.begin + e / channels, c = e % channels, image = column / width_, x = column % width_;
      const float* from = at(src, image, x);
      if (kind == Kind::kLstm) {
        const auto gate_of = [&](int nth) { return from[place_of_gate(static_cast<int>(c), nth)]; };
        const float before = at(i.other, image, y + i.dy, x)[c];
        const Lstm state = lstm(before, gate_of(0), gate_of(1), gate_of(2), gate_of(3));
        at(i.other, image, y, x)[c] = state.cell;
        at(dst, image, x)[c] = state.h;
        continue;
      }
      at(dst, image, x)[c] = kind == Kind::kAdd ? from[c] + at(other, image, x)[c] : activated_of(kind, from, c);
    }
  }

  // An activation of channel c.
  FASTGEN_DEVICE static float activated_of(Kind kind, const float* from, int c) {
    if (kind == Kind::kGelu) return gelu(from[c]);
    if (kind == Kind::kRelu || kind == Kind::kElu) return activated(kind, from[c], 0);
    return activated(kind, from[row_of_pair(c)], from[row_of_pair(c) + kChannelBlock]);
  }

  // dst = bias + other + matrix * window of src, or an activation of that, for `live` pixels.
  FASTGEN_DEVICE void convolve_row(const Instruction& i, int64_t y, int live, const Share& own) {
    const Tiles tiles = matrices_[i.matrix].tiles();
    const int padded = static_cast<int>(tiles.padded()), taps = static_cast<int>(i.extra), each = padded / taps;
    const int channels = static_cast<int>(planes_[i.src].channels);
    const Vectors<W> windows{windows_, padded};
    Row src = row(i.src, y + i.dy);
    src.data += i.dx * src.step;
    const int groups = padded / kGroup;  // of a window
    constexpr int kAtOnce = 4;           // on their way from memory
    for (int begin = thread(); begin < live * groups; begin += kAtOnce * threads()) {
      Group<float> v[kAtOnce];
      for (int j = 0; j < kAtOnce; ++j) {
        const int e = begin + j * threads(), n = e / groups, k = e % groups * kGroup, tap = k / each, c = k % each;
        v[j] = {};
        if (n < live && c < channels)
          v[j] = *reinterpret_cast<const Group<float>*>(at(src, columns_[n]) + tap * src.step + c);
      }
      for (int j = 0; j < kAtOnce; ++j) {
        const int e = begin + j * threads();
        if (e < live * groups) windows.put(e / groups, e % groups * kGroup, v[j]);
      }
    }
    sync_block();
    if (sizeof(W) == 4 || live <= 16)
      multiply_row<4>(i, tiles, y, live, own);
    else if constexpr (sizeof(W) == 2)
      multiply_row<16>(i, tiles, y, live, own);
    sync_block();
  }

  template <int M>
  FASTGEN_DEVICE void multiply_row(const Instruction& i, const Tiles& m, int64_t y, int live, const Share& own) {
    const bool pairs = m.pairs;
    const Row dst = row(i.dst, y), other = i.other >= 0 ? row(i.other, y) : dst;
    const Kind then = static_cast<Kind>(i.then);
    const W* w = static_cast<const W*>(job_.weights_at) + matrices_[i.matrix].at;
    const float* bias = i.bias >= 0 ? job_.biases + (job_.own_biases ? first_ * job_.bias_size : 0) + i.bias : nullptr;
    const int warps = threads() / 32, warp = thread() / 32, lane = thread() % 32;
    const int steps = static_cast<int>(m.padded()) / kTileInputs, count = static_cast<int>(m.count());
    const int tiles = (count - own.nth + own.sharers - 1) / own.sharers;
    int parts = 1;  // warps that share the inputs of a tile
    while (2 * parts * tiles <= warps && 2 * parts <= steps) parts *= 2;
    const int part = warp % parts, at_once = warps / parts;
    for (int begin = 0; begin < tiles; begin += at_once) {
      const int nth = begin + warp / parts, tile = own.nth + own.sharers * nth;
      const bool works = warp / parts < at_once && nth < tiles;
      const int unit = tile * static_cast<int>(m.each()) + lane / 4;
      const int rows[2] = {pairs ? static_cast<int>(row_of_pair(unit)) : unit,
                           pairs ? static_cast<int>(row_of_pair(unit)) + kChannelBlock : unit + 8};
      float sums[2][M] = {};
      if (works) {
        const int from = steps * part / parts;
        const W* weights = w + (tile * m.padded() + from * kTileInputs) * kTileRows;
        multiply_windows<M>(weights, steps * (part + 1) / parts - from, from * kTileInputs,
                            static_cast<int>(m.padded()), live, sums);
      }
      if (parts > 1) {
        float* of_warp = partial_ + warp * 2 * M * 32 + lane;
        for (int h = 0; h < 2; ++h)
          for (int k = 0; k < M; ++k) of_warp[(h * M + k) * 32] = sums[h][k];
        sync_block();
#pragma unroll
        for (int k = 0; k < M; ++k) {  // each has some of the columns
          if (!works || (k & (parts - 1)) != part) continue;
          for (int h = 0; h < 2; ++h) {
            float sum = 0;
            for (int p = 0; p < parts; ++p) sum += of_warp[(((p - part) * 2 + h) * M + k) * 32];
            sums[h][k] = sum;
          }
        }
      }
      if (works) {
#pragma unroll
        for (int k = 0; k < M; ++k) {  // all are read before any is written
          const int n = 4 * k + lane % 4;
          if (n >= live || (k & (parts - 1)) != part) continue;
          const Column column = columns_[n];
          for (int h = 0; h < 2; ++h) {
            sums[h][k] += bias ? bias[(job_.own_biases ? column.image * job_.bias_size : 0) + rows[h]] : 0;
            if (i.other >= 0) sums[h][k] += at(other, column)[rows[h]];
          }
        }
#pragma unroll
        for (int k = 0; k < M; ++k) {
          const int n = 4 * k + lane % 4;
          if (n >= live || (k & (parts - 1)) != part) continue;
          float* to = at(dst, columns_[n]);
          if (pairs && i.then >= 0) {
            to[unit] = activated(then, sums[0][k], sums[1][k]);
          } else {
            for (int h = 0; h < 2; ++h) to[rows[h]] = i.then >= 0 ? activated(then, sums[h][k], 0) : sums[h][k];
          }
        }
      }
      if (parts > 1) sync_block();
    }
  }

  // sums[h][k]: of row lane / 4 + 8 h of a tile with window 4 k + lane % 4, from an input on.
  template <int M>
  FASTGEN_DEVICE void multiply_windows(const W* w, int steps, int input, int length, int live,
                                       float (&sums)[2][M]) const {
    if constexpr (sizeof(W) == 2) {
      const float* from = Fragment::column(reinterpret_cast<const float*>(windows_), length) + input;
      Fragment now, next;
      next.load(w);
      float d[M][4] = {};
      for (int s = 0; s < steps; ++s) {
        now = next;
        if (s + 1 < steps) next.load(w + (s + 1) * Fragment::kSize);
        for (int k = 0; k < M; ++k) {
          if (k * kShare >= live) break;
          uint32_t b[4];
          Fragment::load_column(from + k * kShare * length + s * kTileInputs, b);
          now.multiply(b, d[k], d[k]);
        }
      }
      for (int k = 0; k < M; ++k)
        for (int h = 0; h < 2; ++h) sums[h][k] = d[k][2 * h] + d[k][2 * h + 1];
    } else {
      multiply_tile<M>(w, steps, Vectors<W>{windows_ + input, length}, live, sums);
    }
  }

  W* windows_;
  float* partial_;
  Column* columns_;
};

}  // namespace fastgen::pixelcnn
