// 3x3 convolutions with 16 products in place of 36 for each 2x2 pixels: Winograd's F(2x2, 3x3) (Lavin and Gray 2016).
//
// In one dimension a patch of four inputs and the three weights are polynomials; their values at 0, 1, -1 and infinity
// are multiplied, and the two outputs are read off the products. Both are done along both sides. An output depends on
// no input that it does not see, and float32 loses no more than a plain sum does: all factors are 1 or 1/2.
//
// Channels lie in the lanes. For some rows of tiles at a time: patches at their 16 points, [point][tile][channel], and
// for each panel of two vectors of outputs 16 products of matrices, which stay in the second-level cache.
#pragma once

#include "masked_conv_backward.h"

namespace fastgen {
namespace {

// Of fewer channels the transforms take longer than what they save.
inline bool suits_winograd(const ConvShape& s) {
  return s.kernel_h == 3 && s.kernel_w == 3 && s.mask == Mask::kNone && s.channels >= 4;
}

constexpr int kSide = 4, kTilePoints = kSide * kSide;  // of a patch; the outputs of a tile are half as many a side

// A patch's four values at the points.
template <class V>
inline void at_points(V (&d)[kSide]) {
  const V first = d[0] - d[2], last = d[1] - d[3];
  const V sum = d[1] + d[2], difference = d[2] - d[1];
  d[0] = first, d[1] = sum, d[2] = difference, d[3] = last;
}
// Three weights' values there, halved at 1 and -1.
template <class V>
inline void weights_at_points(const V (&w)[3], V (&at)[kSide]) {
  const V ends = w[0] + w[2];
  at[0] = w[0], at[1] = (ends + w[1]) * 0.5f, at[2] = (ends - w[1]) * 0.5f, at[3] = w[2];
}
// Its transpose: the weights' gradients from those at the points.
template <class V>
inline void weights_from_points(const V (&at)[kSide], V (&w)[3]) {
  const V sum = (at[1] + at[2]) * 0.5f;
  w[0] = at[0] + sum, w[1] = (at[1] - at[2]) * 0.5f, w[2] = sum + at[3];
}
// Two outputs from the products, and its transpose.
template <class V>
inline void outputs_from_points(const V (&at)[kSide], V (&y)[2]) {
  y[0] = at[0] + at[1] + at[2], y[1] = at[1] - at[2] - at[3];
}
template <class V>
inline void outputs_at_points(const V (&y)[2], V (&at)[kSide]) {
  at[0] = y[0], at[1] = y[0] + y[1], at[2] = y[0] - y[1], at[3] = -y[1];
}

// A batch of images in rows of tiles, which are counted through all images.
struct TileRows {
  int64_t batch, height, width;
  int64_t down() const { return (height + 1) / 2; }
  int64_t across() const { return (width + 1) / 2; }
  int64_t count() const { return batch * down(); }
  int64_t image(int64_t row) const { return row / down(); }
  int64_t top(int64_t row) const { return row % down() * 2; }  // the first of its two rows of pixels

  // How many to work on at once: their patches, and the products for a panel, leave room in the second-level cache.
  template <class T>
  int64_t at_once(int64_t channels) const {
    constexpr int64_t kCache = 640 << 10, kPanel = 2 * kLanes<T>;
    const int64_t tiles = kCache / (kTilePoints * static_cast<int64_t>(sizeof(T)) * (channels + kPanel));
    return std::clamp<int64_t>(tiles / across(), 1, std::max<int64_t>(count(), 1));
  }
};

// The distance between points, so that not all of them lie in the same set of a cache.
template <class T>
int64_t apart(int64_t size) {
  return size + 5 * kLanes<T>;
}

// Some channels of images; where the results of a ReLU are given, only what it let through counts.
template <class E>
struct Planes {
  const E *values, *relu;
  int64_t channels, first, count;
};

// One line of up to a vector of them.
template <class T, class E>
void read_line(const Planes<E>& planes, const TileRows& rows, int64_t image, int64_t channel, int64_t live, int64_t y,
               RowTile<T>& line, RowTile<T>& kept) {
  const int64_t plane = rows.height * rows.width;
  const int64_t at = (image * planes.channels + planes.first + channel) * plane + y * rows.width;
  line.read(planes.values + at, plane, live);
  if (!planes.relu) return;
  kept.read(planes.relu + at, plane, live);
  line.clear_where_zero(kept);
}

// Patches of 4x4 pixels, two pixels apart, at their points: [point][tile][channel].
template <class T>
class Patches {
 public:
  static constexpr int64_t kL = kLanes<T>;
  Patches(const TileRows& rows, int64_t channels, int64_t at_once)
      : rows_(rows),
        channels_(round_up(channels, kL)),
        row_size_((round_up(rows.width, kL) + 3) * channels_),
        point_size_(apart<T>(at_once * rows.across() * channels_)),
        line_(rows.width),
        kept_(rows.width),
        pixels_(kSide * row_size_),
        points_(kTilePoints * point_size_) {}

  int64_t stride() const { return channels_; }
  const T* at(int64_t point, int64_t tile) const { return points_.data() + point * point_size_ + tile * channels_; }

  template <class E>
  void fill(const Planes<E>& planes, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t top = rows_.top(row), start = row == first || top == 0 ? top - 1 : top + 1;
      for (int64_t y = start; y < top + 3; ++y) read(planes, rows_.image(row), y);
      for (int64_t c = 0; c < channels_; c += kL) transform(top, c, (row - first) * rows_.across());
    }
  }

 private:
  // Four rows of pixels at a time, channels last, a column of zeros before them and two behind.
  T* pixel(int64_t y, int64_t x) { return pixels_.data() + (y & 3) * row_size_ + (x + 1) * channels_; }

  template <class E>
  void read(const Planes<E>& planes, int64_t image, int64_t y) {
    if (y < 0 || y >= rows_.height) {
      std::fill_n(pixel(y, -1), row_size_, T(0));
      return;
    }
    for (int64_t c = 0; c < planes.count; c += kL) {
      read_line(planes, rows_, image, c, std::min(kL, planes.count - c), y, line_, kept_);
      line_.to_tile(pixel(y, 0) + c, channels_);
    }
    std::fill(pixel(y, rows_.width), pixel(y, -1) + row_size_, T(0));
  }

  // One vector of channels of a row of tiles; each shares two columns of pixels with the next.
  void transform(int64_t top, int64_t channel, int64_t tile) {
    const T* lines[kSide];
    unroll<kSide>([&](auto i) FASTGEN_INLINE { lines[i] = pixel(top - 1 + i, -1) + channel; });
    Vec<T> columns[kSide][kSide];  // [column][point of the rows]
    const auto column = [&](int64_t x, Vec<T>(&to)[kSide]) FASTGEN_INLINE {
      unroll<kSide>([&](auto i) FASTGEN_INLINE { to[i] = load(lines[i] + x * channels_); });
      at_points(to);
    };
    column(0, columns[0]);
    column(1, columns[1]);
    T* to = points_.data() + tile * channels_ + channel;
    for (int64_t i = 0; i < rows_.across(); ++i, to += channels_) {
      column(2 * i + 2, columns[2]);
      column(2 * i + 3, columns[3]);
      unroll<kSide>([&](auto r) FASTGEN_INLINE {
        Vec<T> d[kSide] = {columns[0][r], columns[1][r], columns[2][r], columns[3][r]};
        at_points(d);
        unroll<kSide>([&](auto c) FASTGEN_INLINE { store(to + (r * kSide + c) * point_size_, d[c]); });
        columns[0][r] = columns[2][r];
        columns[1][r] = columns[3][r];
      });
    }
  }

  TileRows rows_;
  int64_t channels_, row_size_, point_size_;
  RowTile<T> line_, kept_;
  OwnVector<T> pixels_, points_;
};

// Weights at the points, [panel of outputs][point][input][lane]; for the gradient of the input outputs and inputs
// change places, and each kernel is turned around.
template <class T, class E>
OwnVector<T> weights_at_points(const ConvShape& s, bool back, const E* weight) {
  constexpr int64_t kL = kLanes<T>, kTaps = 9;
  const Panels<T> panels{back ? s.channels : s.outs, false};
  const int64_t depth = back ? s.outs : s.channels;
  const int64_t lane_stride = back ? kTaps : s.channels * kTaps, depth_stride = back ? s.channels * kTaps : kTaps;
  OwnVector<T> packed(kTilePoints * depth * panels.lanes());
  share(depth, [&](int64_t begin, int64_t end) {
    RowTile<T> rows(kTaps);
    OwnVector<T> turned(rows.padded() * kL);
    for (int64_t panel = 0; panel < panels.count(); ++panel)
      for (int64_t k = begin; k < end; ++k)
        for (int64_t v = 0; v < panels.vectors(panel); ++v) {
          rows.read(weight + panels.first(panel, v) * lane_stride + k * depth_stride, lane_stride,
                    panels.live(panel, v));
          rows.to_tile(turned.data(), kL);
          Vec<T> half[3][kSide];
          unroll<3>([&](auto i) FASTGEN_INLINE {
            const auto tap = [&](int j) { return load(turned.data() + (back ? 8 - 3 * i - j : 3 * i + j) * kL); };
            const Vec<T> w[3] = {tap(0), tap(1), tap(2)};
            weights_at_points(w, half[i]);
          });
          const int64_t width = panels.width(panel), size = depth * width;
          T* to = packed.data() + kTilePoints * depth * panels.begin(panel) + k * width + v * kL;
          unroll<kSide>([&](auto c) FASTGEN_INLINE {
            const Vec<T> w[3] = {half[0][c], half[1][c], half[2][c]};
            Vec<T> at[kSide];
            weights_at_points(w, at);
            unroll<kSide>([&](auto r) FASTGEN_INLINE { store(to + (r * kSide + c) * size, at[r]); });
          });
        }
  });
  return packed;
}

// The gradient of the weights from the threads' sums, which lie as weights at their points do; in a fixed order.
template <class T>
void weights_from_points(const ConvShape& s, const Panels<T>& panels, const std::vector<OwnVector<T>>& sums,
                         T* weight) {
  constexpr int64_t kL = kLanes<T>, kTaps = 9;
  share(s.channels, [&](int64_t begin, int64_t end) {
    RowTile<T> rows(kTaps);
    OwnVector<T> turned(rows.padded() * kL);
    for (int64_t panel = 0; panel < panels.count(); ++panel)
      for (int64_t k = begin; k < end; ++k)
        for (int64_t v = 0; v < panels.vectors(panel); ++v) {
          const int64_t width = panels.width(panel);
          const int64_t at = kTilePoints * s.channels * panels.begin(panel) + k * width + v * kL;
          Vec<T> half[kSide][3];
          unroll<kSide>([&](auto c) FASTGEN_INLINE {
            Vec<T> points[kSide] = {};
            for (const OwnVector<T>& sum : sums)
              unroll<kSide>([&](auto r) FASTGEN_INLINE {
                points[r] += load(sum.data() + at + (r * kSide + c) * s.channels * width);
              });
            weights_from_points(points, half[c]);
          });
          unroll<3>([&](auto i) FASTGEN_INLINE {
            const Vec<T> points[kSide] = {half[0][i], half[1][i], half[2][i], half[3][i]};
            Vec<T> w[3];
            weights_from_points(points, w);
            unroll<3>([&](auto j) FASTGEN_INLINE { store(turned.data() + (3 * i + j) * kL, w[j]); });
          });
          rows.from_tile(turned.data(), kL);
          rows.write(weight + (panels.first(panel, v) * s.channels + k) * kTaps, s.channels * kTaps,
                     panels.live(panel, v));
        }
  });
}

// out (B, panels.rows, H, W) = from convolved with weights at their points.
template <class T, class E>
void winograd_product(const TileRows& rows, const Planes<E>& from, const OwnVector<T>& weights, const Panels<T>& panels,
                      const E* bias, bool relu, E* out) {
  constexpr int64_t kL = kLanes<T>;
  const int64_t at_once = rows.at_once<T>(from.count), plane = rows.height * rows.width;
  share(rows.count(), [&](int64_t begin, int64_t end) {
    Patches<T> patches(rows, from.count, at_once);
    const int64_t point_size = apart<T>(at_once * rows.across() * 2 * kL);
    OwnVector<T> products(kTilePoints * point_size);
    RowTile<T> line(rows.width);
    OwnVector<T> outputs(2 * (line.padded() + 1) * 2 * kL);
    for (int64_t first = begin; first < end; first += at_once) {
      const int64_t last = std::min(first + at_once, end), tiles = (last - first) * rows.across();
      patches.fill(from, first, last);
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int64_t vectors = panels.vectors(panel), width = vectors * kL;
        const T* w = weights.data() + kTilePoints * from.channels * panels.begin(panel);
        for (int64_t point = 0; point < kTilePoints; ++point, w += from.channels * width)
          for_each_group(tiles, [&](int64_t tile, int64_t count) {
            const Stretch<T> stretch{patches.at(point, tile), w, from.channels};
            multiply_rows_of<T, false>(count, vectors)(products.data() + point * point_size + tile * width, &stretch, 1,
                                                       patches.stride(), true);
          });
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t o = panels.first(panel, v), live = panels.live(panel, v);
          Vec<T> added = {};
          for (int64_t i = 0; bias && i < live; ++i) added[i] = static_cast<T>(bias[o + i]);
          const int64_t line_size = (line.padded() + 1) * kL;
          for (int64_t row = first; row < last; ++row) {
            const T* at = products.data() + (row - first) * rows.across() * width + v * kL;
            E* to = out + (rows.image(row) * panels.rows + o) * plane + rows.top(row) * rows.width;
            for (int64_t x = 0; x < rows.width; x += 2, at += width) {
              Vec<T> half[kSide][2];
              unroll<kSide>([&](auto c) FASTGEN_INLINE {
                Vec<T> m[kSide];
                unroll<kSide>([&](auto r) FASTGEN_INLINE { m[r] = load(at + (r * kSide + c) * point_size); });
                outputs_from_points(m, half[c]);
              });
              unroll<2>([&](auto r) FASTGEN_INLINE {
                const Vec<T> m[kSide] = {half[0][r], half[1][r], half[2][r], half[3][r]};
                Vec<T> y[2];
                outputs_from_points(m, y);
                unroll<2>([&](auto c) FASTGEN_INLINE {
                  const Vec<T> sum = y[c] + added;
                  store(outputs.data() + r * line_size + (x + c) * kL, relu ? positive_part(sum) : sum);
                });
              });
            }
            for (int64_t r = 0; r < std::min<int64_t>(2, rows.height - rows.top(row)); ++r) {
              line.from_tile(outputs.data() + r * line_size, kL);
              line.write(to + r * rows.width, plane, live);
            }
          }
        }
      }
    }
  });
}

// Gradients of the outputs, at the points, for a panel of them: [point][tile][lane].
template <class T>
class OutputGradients {
 public:
  static constexpr int64_t kL = kLanes<T>;
  OutputGradients(const TileRows& rows, int64_t at_once)
      : rows_(rows),
        line_(rows.width),
        kept_(rows.width),
        line_size_((line_.padded() + 1) * kL),
        point_size_(apart<T>(at_once * rows.across() * 2 * kL)),
        pixels_(2 * line_size_),
        points_(kTilePoints * point_size_) {}

  const T* at(int64_t point) const { return points_.data() + point * point_size_; }

  // Of the outputs from `output` on, `live` of them, into lanes [lane, lane + kL) of `width`. Returns their sums.
  template <class E>
  Vec<T> fill(const Planes<E>& planes, int64_t output, int64_t live, int64_t lane, int64_t width, int64_t first,
              int64_t last) {
    Vec<T> total = {};
    T* to = points_.data() + lane;
    for (int64_t row = first; row < last; ++row) {
      for (int64_t r = 0; r < 2; ++r) read(planes, rows_.image(row), output, live, rows_.top(row) + r, r);
      Vec<T> sum = {};
      for (int64_t x = 0; x < rows_.width; x += 2, to += width) {
        Vec<T> half[2][kSide];
        unroll<2>([&](auto c) FASTGEN_INLINE {
          const T* pixel = pixels_.data() + (x + c) * kL;
          const Vec<T> y[2] = {load(pixel), load(pixel + line_size_)};
          outputs_at_points(y, half[c]);
        });
        unroll<kSide>([&](auto r) FASTGEN_INLINE {
          const Vec<T> y[2] = {half[0][r], half[1][r]};
          Vec<T> at[kSide];
          outputs_at_points(y, at);
          unroll<kSide>([&](auto c) FASTGEN_INLINE { store(to + (r * kSide + c) * point_size_, at[c]); });
          if constexpr (r == 1) sum += at[1];  // all four outputs
        });
      }
      total += sum;
    }
    return total;
  }

 private:
  template <class E>
  void read(const Planes<E>& planes, int64_t image, int64_t output, int64_t live, int64_t y, int64_t r) {
    T* to = pixels_.data() + r * line_size_;
    if (y >= rows_.height) {
      std::fill_n(to, line_size_, T(0));
      return;
    }
    read_line(planes, rows_, image, output, live, y, line_, kept_);
    line_.to_tile(to, kL);
  }

  TileRows rows_;
  RowTile<T> line_, kept_;
  int64_t line_size_, point_size_;
  OwnVector<T> pixels_, points_;  // pixels_: two lines, each with a pixel of zeros behind it
};

template <class T, class E>
void winograd_forward(const ConvShape& s, const ConvTensors<E>& in, E* out) {
  const Panels<T> panels{s.outs, false};
  winograd_product<T, E>({s.batch, s.height, s.width}, {in.x, nullptr, s.channels, 0, s.channels},
                         weights_at_points<T>(s, false, in.weight), panels, in.bias, s.activation == Activation::kRelu,
                         out);
}

// kept: the results of a ReLU.
template <class T, class E>
void winograd_backward(const ConvShape& s, const ConvTensors<E>& in, const E* grad, const E* kept,
                       const ConvGradients<T, E>& out) {
  const TileRows rows{s.batch, s.height, s.width};
  const Planes<E> of_outputs{grad, kept, s.outs, 0, s.outs};
  if (out.x)
    winograd_product<T, E>(rows, of_outputs, weights_at_points<T>(s, true, in.weight), {s.channels, false}, nullptr,
                           false, out.x);

  // Some channels at a time, so that their sums and patches of many tiles stay in a cache.
  constexpr int64_t kL = kLanes<T>, kMost = 128;
  const Panels<T> panels{s.outs, false};
  const int64_t blocks = (s.channels + kMost - 1) / kMost, most = (s.channels + blocks - 1) / blocks;
  const int64_t at_once = rows.at_once<T>(most);
  const int64_t workers = std::min<int64_t>(rows.count(), torch::stable::get_num_threads());
  std::vector<OwnVector<T>> weight_sums(workers), bias_sums(workers);
  for_each_worker(workers, [&](int64_t worker) {
    Patches<T> patches(rows, most, at_once);
    OutputGradients<T> gradients(rows, at_once);
    OwnVector<T>&sums = weight_sums[worker], &totals = bias_sums[worker];
    sums.resize(kTilePoints * s.channels * panels.lanes());
    const int64_t begin = worker * rows.count() / workers, end = (worker + 1) * rows.count() / workers;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channel = block * s.channels / blocks, count = (block + 1) * s.channels / blocks - channel;
      totals.assign(panels.lanes(), T(0));
      for (int64_t first = begin; first < end; first += at_once) {
        const int64_t last = std::min(first + at_once, end), tiles = (last - first) * rows.across();
        patches.fill(Planes<E>{in.x, nullptr, s.channels, channel, count}, first, last);
        for (int64_t panel = 0; panel < panels.count(); ++panel) {
          const int64_t vectors = panels.vectors(panel), width = vectors * kL;
          for (int64_t v = 0; v < vectors; ++v) {
            T* total = totals.data() + panels.begin(panel) + v * kL;
            store(total, load(total) + gradients.fill(of_outputs, panels.first(panel, v), panels.live(panel, v), v * kL,
                                                      width, first, last));
          }
          T* sum = sums.data() + (kTilePoints * panels.begin(panel)) * s.channels + channel * width;
          for (int64_t point = 0; point < kTilePoints; ++point, sum += s.channels * width)
            for_each_group(count, [&](int64_t c, int64_t group) {
              const Stretch<T> stretch{patches.at(point, 0) + c, gradients.at(point), tiles};
              multiply_rows_of<T, true>(group, vectors)(sum + c * width, &stretch, 1, patches.stride(), false);
            });
        }
      }
    }
  });
  weights_from_points(s, panels, weight_sums, out.weight);
  std::fill_n(out.bias, s.outs, T(0));
  for (const OwnVector<T>& totals : bias_sums)
    for (int64_t o = 0; o < s.outs; ++o) out.bias[o] += totals[o];
}

}  // namespace
}  // namespace fastgen
