// Convolutions with fewer products (Winograd; Lavin and Gray 2016), in tiles: the transforms and where they lie.
//
// In one dimension a patch of four inputs and the two or three weights are polynomials; their values at 0, 1, -1 and
// infinity are multiplied, and three or two outputs are read off the products: F(3, 2) and F(2, 3). Along both sides
// 16 products stand for 36. float32 loses no more than in a plain sum: all factors are 1 or 1/2. With three weights an
// output depends on no input that it does not see; with two it may in the last bits, or if that is not finite.
//
// With stride 2 even and odd pixels are images of their own, phases, each seen by two weights of four a side; in the
// transpose they are the results. Channels lie in the lanes.
#pragma once

#include "masked_conv_backward.h"

namespace fastgen {
namespace {

constexpr int kSide = 4, kPoints = kSide * kSide;  // of a patch

// What a convolution makes of an image's size: 3x3; 4x4 with stride 2; the transpose of that.
enum class Resize { kSame, kHalve, kDouble };

template <Resize R>
struct Form {
  static constexpr int kTaps = R == Resize::kSame ? 3 : 2;                                      // a side, of a phase
  static constexpr int kOutputs = kSide + 1 - kTaps;                                            // a side of a tile
  static constexpr int kIn = R == Resize::kHalve ? 2 : 1, kOut = R == Resize::kDouble ? 2 : 1;  // phases a side
  static constexpr int kInPhases = kIn * kIn, kOutPhases = kOut * kOut, kPhases = kInPhases * kOutPhases;
  static constexpr int kKernel = kTaps * kIn * kOut;
};

// A patch's four values at the points.
template <class V>
inline void at_points(V (&d)[kSide]) {
  const V first = d[0] - d[2], last = d[1] - d[3];
  const V sum = d[1] + d[2], difference = d[2] - d[1];
  d[0] = first, d[1] = sum, d[2] = difference, d[3] = last;
}
// The weights' values there, halved at 1 and -1.
template <class V>
inline void weights_at_points(const V (&w)[3], V (&at)[kSide]) {
  const V ends = w[0] + w[2];
  at[0] = w[0], at[1] = (ends + w[1]) * 0.5f, at[2] = (ends - w[1]) * 0.5f, at[3] = w[2];
}
template <class V>
inline void weights_at_points(const V (&w)[2], V (&at)[kSide]) {
  at[0] = w[0], at[1] = (w[0] + w[1]) * 0.5f, at[2] = (w[0] - w[1]) * 0.5f, at[3] = w[1];
}
// Its transpose: the weights' gradients from those at the points.
template <class V>
inline void weights_from_points(const V (&at)[kSide], V (&w)[3]) {
  const V sum = (at[1] + at[2]) * 0.5f;
  w[0] = at[0] + sum, w[1] = (at[1] - at[2]) * 0.5f, w[2] = sum + at[3];
}
template <class V>
inline void weights_from_points(const V (&at)[kSide], V (&w)[2]) {
  w[0] = at[0] + (at[1] + at[2]) * 0.5f, w[1] = (at[1] - at[2]) * 0.5f + at[3];
}
// The outputs from the products, and its transpose, whose value at 1 is the sum of all.
template <class V>
inline void outputs_from_points(const V (&at)[kSide], V (&y)[2]) {
  y[0] = at[0] + at[1] + at[2], y[1] = at[1] - at[2] - at[3];
}
template <class V>
inline void outputs_from_points(const V (&at)[kSide], V (&y)[3]) {
  const V sum = at[1] + at[2];
  y[0] = at[0] + sum, y[1] = at[1] - at[2], y[2] = sum - at[3];
}
template <class V>
inline void outputs_at_points(const V (&y)[2], V (&at)[kSide]) {
  at[0] = y[0], at[1] = y[0] + y[1], at[2] = y[0] - y[1], at[3] = -y[1];
}
template <class V>
inline void outputs_at_points(const V (&y)[3], V (&at)[kSide]) {
  const V ends = y[0] + y[2];
  at[0] = y[0], at[1] = ends + y[1], at[2] = ends - y[1], at[3] = -y[2];
}
// f(row, along) for two sides of an array of vectors: f transforms each of its columns, then each of its rows.
template <int From, int To, class V, class F>
inline void both_sides(const V (&from)[From][From], V (&to)[To][To], F&& f) {
  V half[From][To];
  unroll<From>([&](auto c) FASTGEN_INLINE {
    V column[From];
    unroll<From>([&](auto r) FASTGEN_INLINE { column[r] = from[r][c]; });
    f(column, half[c]);
  });
  unroll<To>([&](auto r) FASTGEN_INLINE {
    V row[From];
    unroll<From>([&](auto c) FASTGEN_INLINE { row[c] = half[c][r]; });
    f(row, to[r]);
  });
}

// Some channels of a batch of images; where the results of a ReLU are given, only what it let through counts.
template <class E>
struct Planes {
  const E *values, *relu;
  int64_t batch, channels, height, width;
  int64_t first = 0, count = channels;

  int64_t size() const { return height * width; }
  // A line of up to a vector of them.
  template <class T>
  void read(int64_t image, int64_t channel, int64_t y, RowTile<T>& line, RowTile<T>& kept) const {
    const int64_t live = std::min<int64_t>(kLanes<T>, count - channel);
    const int64_t at = (image * channels + first + channel) * size() + y * width;
    line.read(values + at, size(), live);
    if (!relu) return;
    kept.read(relu + at, size(), live);
    line.clear_where_zero(kept);
  }
};

// The tiles of a batch, in rows that are counted through all images.
template <Resize R>
struct TileRows {
  using Of = Form<R>;
  int64_t batch, height, width;  // of the results

  int64_t down() const { return tiles(height); }
  int64_t across() const { return tiles(width); }
  int64_t count() const { return batch * down(); }
  int64_t image(int64_t row) const { return row / down(); }
  int64_t top(int64_t row) const { return row % down() * Of::kOutputs; }  // the first line, of each phase

  // How many to work on at once: their patches, and the products for a panel, leave room in the second-level cache.
  template <class T>
  int64_t at_once(int64_t channels) const {
    constexpr int64_t kCache = 640 << 10, kPanels = Of::kOutPhases * 2 * kLanes<T>;
    const int64_t size = kPoints * static_cast<int64_t>(sizeof(T)) * (Of::kInPhases * channels + kPanels);
    return std::clamp<int64_t>(kCache / size / std::max<int64_t>(across(), 1), 1, std::max<int64_t>(count(), 1));
  }

 private:
  // The transpose's first phase begins a pixel before the image.
  static int64_t tiles(int64_t pixels) {
    const int64_t outputs = pixels / Of::kOut + Of::kOut - 1;
    return (outputs + Of::kOutputs - 1) / Of::kOutputs;
  }
};

// The distance between points, so that not all of them lie in the same set of a cache.
template <class T>
int64_t apart(int64_t size) {
  return size + 5 * kLanes<T>;
}

// Patches of 4x4 pixels of each phase of the inputs at their points: [phase][point][tile][channel].
template <Resize R, class T>
class Patches {
 public:
  using Of = Form<R>;
  static constexpr int64_t kL = kLanes<T>, kLines = kSide * Of::kIn, kStep = Of::kOutputs * Of::kIn;

  Patches(const TileRows<R>& rows, int64_t width, int64_t channels, int64_t at_once)
      : rows_(rows),
        channels_(round_up(channels, kL)),
        line_size_(std::max(round_up(width, kL) + 1, (rows.across() - 1) * kStep + kLines) * channels_),
        point_size_(apart<T>(at_once * rows.across() * channels_)),
        line_(width),
        kept_(width),
        pixels_(kLines * line_size_),
        points_(Of::kInPhases * kPoints * point_size_) {}

  int64_t stride() const { return channels_; }
  const T* at(int64_t phase, int64_t point, int64_t tile) const {
    return points_.data() + (phase * kPoints + point) * point_size_ + tile * channels_;
  }

  // Of the rows [first, last).
  template <class E>
  void fill(const Planes<E>& planes, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t top = rows_.top(row) * Of::kIn - 1, end = top + kLines;
      for (int64_t y = row == first || top < 0 ? top : end - kStep; y < end; ++y) read(planes, rows_.image(row), y);
      for (int64_t c = 0; c < channels_; c += kL)
        for (int64_t phase = 0; phase < Of::kInPhases; ++phase)
          transform(top, phase, c, (row - first) * rows_.across());
    }
  }

 private:
  // As many lines as a patch sees, channels last; zeros lie around an image.
  T* pixel(int64_t y, int64_t x) { return pixels_.data() + (y + 1) % kLines * line_size_ + (x + 1) * channels_; }

  template <class E>
  void read(const Planes<E>& planes, int64_t image, int64_t y) {
    T* const line = pixel(y, -1);
    if (y < 0 || y >= planes.height) {
      std::fill_n(line, line_size_, T(0));
      return;
    }
    for (int64_t c = 0; c < planes.count; c += kL) {
      planes.read(image, c, y, line_, kept_);
      line_.to_tile(pixel(y, 0) + c, channels_);
    }
    std::fill(pixel(y, planes.width), line + line_size_, T(0));
  }

  // One vector of channels of a row of tiles; the first columns of a patch are the last ones of that before.
  void transform(int64_t top, int64_t phase, int64_t channel, int64_t tile) {
    constexpr int kShared = Of::kTaps - 1;
    const T* lines[kSide];
    unroll<kSide>([&](auto i) FASTGEN_INLINE {
      lines[i] = pixel(top + phase / Of::kIn + Of::kIn * i, phase % Of::kIn - 1) + channel;
    });
    Vec<T> columns[kSide][kSide];  // [column][point of the lines]
    const auto column = [&](int64_t x, Vec<T>(&to)[kSide]) FASTGEN_INLINE {
      unroll<kSide>([&](auto i) FASTGEN_INLINE { to[i] = load(lines[i] + x * Of::kIn * channels_); });
      at_points(to);
    };
    unroll<kShared>([&](auto c) FASTGEN_INLINE { column(c, columns[c]); });
    T* to = points_.data() + phase * kPoints * point_size_ + tile * channels_ + channel;
    for (int64_t i = 0; i < rows_.across(); ++i, to += channels_) {
      unroll<kSide - kShared>([&](auto c)
                                  FASTGEN_INLINE { column(i * Of::kOutputs + kShared + c, columns[kShared + c]); });
      unroll<kSide>([&](auto r) FASTGEN_INLINE {
        Vec<T> d[kSide] = {columns[0][r], columns[1][r], columns[2][r], columns[3][r]};
        at_points(d);
        unroll<kSide>([&](auto c) FASTGEN_INLINE { store(to + (r * kSide + c) * point_size_, d[c]); });
        unroll<kShared>([&](auto c) FASTGEN_INLINE { columns[c][r] = columns[kSide - kShared + c][r]; });
      });
    }
  }

  TileRows<R> rows_;
  int64_t channels_, line_size_, point_size_;
  RowTile<T> line_, kept_;
  OwnVector<T> pixels_;
  RawVector<T> points_;
};

// Gradients of the results, at the points, for a panel of them: [point][tile][lane].
template <Resize R, class T>
class ResultGradients {
 public:
  using Of = Form<R>;
  static constexpr int64_t kL = kLanes<T>;

  ResultGradients(const TileRows<R>& rows, int64_t at_once)
      : rows_(rows),
        line_(rows.width),
        kept_(rows.width),
        line_size_(std::max(line_.padded(), rows.across() * Of::kOutputs) * kL),
        point_size_(apart<T>(at_once * rows.across() * 2 * kL)),
        pixels_(Of::kOutputs * line_size_),
        points_(kPoints * point_size_) {}

  const T* at(int64_t point) const { return points_.data() + point * point_size_; }

  // Of the channels from `channel` on, into lanes [lane, lane + kL) of `width`. Returns their sums.
  template <class E>
  Vec<T> fill(const Planes<E>& planes, int64_t channel, int64_t lane, int64_t width, int64_t first, int64_t last) {
    Vec<T> total = {};
    T* to = points_.data() + lane;
    for (int64_t row = first; row < last; ++row) {
      for (int64_t r = 0; r < Of::kOutputs; ++r) {
        T* const line = pixels_.data() + r * line_size_;
        if (rows_.top(row) + r < rows_.height) {
          planes.read(rows_.image(row), channel, rows_.top(row) + r, line_, kept_);
          line_.to_tile(line, kL);
        } else {
          std::fill_n(line, line_size_, T(0));
        }
      }
      Vec<T> sum = {};
      const T* from = pixels_.data();
      for (int64_t i = 0; i < rows_.across(); ++i, to += width, from += Of::kOutputs * kL) {
        Vec<T> y[Of::kOutputs][Of::kOutputs], at[kSide][kSide];
        unroll<Of::kOutputs>([&](auto r) FASTGEN_INLINE {
          unroll<Of::kOutputs>([&](auto c) FASTGEN_INLINE { y[r][c] = load(from + r * line_size_ + c * kL); });
        });
        both_sides(y, at, [](const auto& line, auto& points) FASTGEN_INLINE { outputs_at_points(line, points); });
        unroll<kPoints>([&](auto p) FASTGEN_INLINE { store(to + p * point_size_, at[p / kSide][p % kSide]); });
        sum += at[1][1];
      }
      total += sum;
    }
    return total;
  }

 private:
  TileRows<R> rows_;
  RowTile<T> line_, kept_;
  int64_t line_size_, point_size_;
  OwnVector<T> pixels_;
  RawVector<T> points_;
};

// A weight (first, second, kernel, kernel) and its place at the points, [panel of lanes][phase][point][depth][lane]:
// lanes are its first dimension; or, `back`, its second, and the kernels are turned around.
template <Resize R, class T>
struct Weights {
  using Of = Form<R>;
  static constexpr int64_t kL = kLanes<T>, kArea = Of::kKernel * Of::kKernel;
  int64_t first, second;
  bool back = false;

  Panels<T> panels() const { return {back ? second : first, false}; }
  int64_t depth() const { return back ? first : second; }
  // Where a panel begins, how long its matrix of a point is, and the end of all.
  int64_t panel(int64_t i) const { return Of::kPhases * kPoints * i * apart<T>(depth() * 2 * kL); }
  int64_t matrix(int64_t i) const { return apart<T>(depth() * panels().width(i)); }
  int64_t size() const { return panel(panels().count()); }

  template <class E>
  RawVector<T> at_points(const E* weight) const {
    RawVector<T> packed(size());
    each([&](int64_t at, int64_t lane_stride, int64_t live, int64_t to, int64_t point_size, RowTile<T>& rows,
             T* turned) {
      rows.read(weight + at, lane_stride, live);
      rows.to_tile(turned, kL);
      for (int64_t phase = 0; phase < Of::kPhases; ++phase, to += kPoints * point_size) {
        Vec<T> w[Of::kTaps][Of::kTaps], values[kSide][kSide];
        unroll<Of::kTaps * Of::kTaps>([&](auto i) FASTGEN_INLINE {
          const int tap = back ? Of::kTaps * Of::kTaps - 1 - i : int{i};
          w[i / Of::kTaps][i % Of::kTaps] = load(turned + kernel_index(phase, tap) * kL);
        });
        both_sides(w, values, [](const auto& line, auto& points) FASTGEN_INLINE { weights_at_points(line, points); });
        unroll<kPoints>(
            [&](auto p) FASTGEN_INLINE { store(packed.data() + to + p * point_size, values[p / kSide][p % kSide]); });
      }
    });
    return packed;
  }

  // The gradient of the weight from the threads' sums at the points; in a fixed order.
  void from_points(const std::vector<RawVector<T>>& sums, T* weight) const {
    each([&](int64_t to, int64_t lane_stride, int64_t live, int64_t at, int64_t point_size, RowTile<T>& rows,
             T* turned) {
      for (int64_t phase = 0; phase < Of::kPhases; ++phase, at += kPoints * point_size) {
        Vec<T> values[kSide][kSide] = {}, w[Of::kTaps][Of::kTaps];
        for (const RawVector<T>& sum : sums)
          unroll<kPoints>(
              [&](auto p) FASTGEN_INLINE { values[p / kSide][p % kSide] += load(sum.data() + at + p * point_size); });
        both_sides(values, w, [](const auto& points, auto& line) FASTGEN_INLINE { weights_from_points(points, line); });
        unroll<Of::kTaps * Of::kTaps>([&](auto i) FASTGEN_INLINE {
          store(turned + kernel_index(phase, i) * kL, w[i / Of::kTaps][i % Of::kTaps]);
        });
      }
      rows.from_tile(turned, kL);
      rows.write(weight + to, lane_stride, live);
    });
  }

 private:
  static int64_t kernel_index(int64_t phase, int64_t tap) {
    constexpr int64_t kAside = Of::kIn * Of::kOut;
    const int64_t y = phase / kAside + kAside * (tap / Of::kTaps), x = phase % kAside + kAside * (tap % Of::kTaps);
    return y * Of::kKernel + x;
  }
  // f(index in the tensor, lanes' distance there, live lanes, index at the points, distance of those, room for
  // kernels).
  template <class F>
  void each(F&& f) const {
    const int64_t lane_stride = back ? kArea : second * kArea, depth_stride = back ? second * kArea : kArea;
    const Panels<T> outs = panels();
    share(depth(), [&](int64_t begin, int64_t end) {
      RowTile<T> rows(kArea);
      OwnVector<T> turned(rows.padded() * kL);
      for (int64_t i = 0; i < outs.count(); ++i)
        for (int64_t k = begin; k < end; ++k)
          for (int64_t v = 0; v < outs.vectors(i); ++v) {
            const int64_t width = outs.width(i);
            f(outs.first(i, v) * lane_stride + k * depth_stride, lane_stride, outs.live(i, v),
              panel(i) + k * width + v * kL, matrix(i), rows, turned.data());
          }
    });
  }
};

}  // namespace
}  // namespace fastgen
