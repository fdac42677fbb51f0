// Where convolutions by the transforms of winograd.h lie in memory: images in tiles, their patches, and weights.
#pragma once

#include "masked_conv_backward.h"
#include "winograd.h"

namespace fastgen {
namespace {

// Room for lines of an image.
template <class T>
struct Lines {
  explicit Lines(int64_t width) : line(width), second(width), third(width) {}
  RowTile<T> line, second, third;
};

// Some channels of a batch of images. Where the results of a ReLU are given, only what it let through counts; where the
// sums before a gate are, the values are gradients of its results, and what is read is those of the sums.
template <class E>
struct Planes {
  const E *values, *relu, *sums;
  int64_t batch, channels, height, width;  // channels: both halves of a gate
  int64_t first = 0, count = channels;

  int64_t size() const { return height * width; }
  // A line of up to a vector of them; both halves of a gate are whole vectors.
  template <class T>
  void read(int64_t image, int64_t channel, int64_t y, Lines<T>& to) const {
    const int64_t live = std::min<int64_t>(kLanes<T>, count - channel), c = first + channel;
    const auto at = [&](int64_t row) { return row * size() + y * width; };
    if (sums) {
      const int64_t half = channels / 2, h = c % half;
      to.line.read(values + at(image * half + h), size(), live);
      to.second.read(sums + at(image * channels + h), size(), live);
      to.third.read(sums + at(image * channels + half + h), size(), live);
      to.line.gate_gradient(to.second, to.third, c < half);
      return;
    }
    to.line.read(values + at(image * channels + c), size(), live);
    if (!relu) return;
    to.second.read(relu + at(image * channels + c), size(), live);
    to.line.clear_where_zero(to.second);
  }
};

// The tiles of a batch, in rows that are counted through all images.
template <Kind K>
struct TileRows {
  using Of = Form<K>;
  int64_t batch, height, width;  // of the results

  int64_t down() const { return tiles(height, Of::Y::kOutputs); }
  int64_t across() const { return tiles(width, Of::X::kOutputs); }
  int64_t count() const { return batch * down(); }
  int64_t image(int64_t row) const { return row / down(); }
  int64_t top(int64_t row) const { return row % down() * Of::Y::kOutputs; }  // the first line, of each phase

  // How many to work on at once: their patches, and the products for a panel, leave room in the second-level cache.
  template <class T>
  int64_t at_once(int64_t channels) const {
    constexpr int64_t kCache = 640 << 10, kPanels = Of::kOutPhases * 2 * kLanes<T>;
    const int64_t size = Of::kPoints * static_cast<int64_t>(sizeof(T)) * (Of::kInPhases * channels + kPanels);
    return std::clamp<int64_t>(kCache / size / std::max<int64_t>(across(), 1), 1, std::max<int64_t>(count(), 1));
  }

 private:
  // The transpose's first phase begins a pixel before the image.
  static int64_t tiles(int64_t pixels, int64_t outputs) {
    return (pixels / Of::kOut + Of::kOut - 1 + outputs - 1) / outputs;
  }
};

// The distance between points, so that not all of them lie in the same set of a cache.
template <class T>
int64_t apart(int64_t size) {
  return size + 5 * kLanes<T>;
}

// Patches of each phase of the inputs at their points: [phase][point][tile][channel].
template <Kind K, class T>
class Patches {
 public:
  using Of = Form<K>;
  using X = typename Of::X;
  using Y = typename Of::Y;
  static constexpr int64_t kL = kLanes<T>, kLines = Y::kPoints * Of::kIn, kStep = Y::kOutputs * Of::kIn;

  Patches(const TileRows<K>& rows, int64_t width, int64_t channels, int64_t at_once)
      : rows_(rows),
        channels_(round_up(channels, kL)),
        line_size_(std::max(round_up(width, kL) + 1, (rows.across() * X::kOutputs + X::kTaps - 1) * Of::kIn) *
                   channels_),
        point_size_(apart<T>(at_once * rows.across() * channels_)),
        lines_(width),
        pixels_(kLines * line_size_),
        points_(Of::kInPhases * Of::kPoints * point_size_) {}

  int64_t stride() const { return channels_; }
  const T* at(int64_t phase, int64_t point, int64_t tile) const {
    return points_.data() + (phase * Of::kPoints + point) * point_size_ + tile * channels_;
  }

  // Of the rows [first, last).
  template <class E>
  void fill(const Planes<E>& planes, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t top = rows_.top(row) * Of::kIn - Of::kAbove, end = top + kLines;
      const bool seen = row > first && rows_.top(row) > 0;  // the lines that it shares with the row of tiles before
      for (int64_t y = seen ? end - kStep : top; y < end; ++y) read(planes, rows_.image(row), y);
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
      planes.read(image, c, y, lines_);
      lines_.line.to_tile(pixel(y, 0) + c, channels_);
    }
    std::fill(pixel(y, planes.width), line + line_size_, T(0));
  }

  // One vector of channels of a row of tiles; the first columns of a patch are the last ones of that before.
  void transform(int64_t top, int64_t phase, int64_t channel, int64_t tile) {
    constexpr int kShared = X::kTaps - 1;
    const T* lines[Y::kPoints];
    unroll<Y::kPoints>([&](auto i) FASTGEN_INLINE {
      lines[i] = pixel(top + phase / Of::kIn + Of::kIn * i, phase % Of::kIn - 1) + channel;
    });
    Vec<T> columns[X::kPoints][Y::kPoints];  // [column][point of the lines]
    const auto column = [&](int64_t x, Vec<T>(&to)[Y::kPoints]) FASTGEN_INLINE {
      unroll<Y::kPoints>([&](auto i) FASTGEN_INLINE { to[i] = load(lines[i] + x * Of::kIn * channels_); });
      at_points(to);
    };
    unroll<kShared>([&](auto c) FASTGEN_INLINE { column(c, columns[c]); });
    T* to = points_.data() + phase * Of::kPoints * point_size_ + tile * channels_ + channel;
    for (int64_t i = 0; i < rows_.across(); ++i, to += channels_) {
      unroll<X::kOutputs>([&](auto c) FASTGEN_INLINE { column(i * X::kOutputs + kShared + c, columns[kShared + c]); });
      unroll<Y::kPoints>([&](auto r) FASTGEN_INLINE {
        Vec<T> d[X::kPoints];
        unroll<X::kPoints>([&](auto c) FASTGEN_INLINE { d[c] = columns[c][r]; });
        at_points(d);
        unroll<X::kPoints>([&](auto c) FASTGEN_INLINE { store(to + (r * X::kPoints + c) * point_size_, d[c]); });
        unroll<kShared>([&](auto c) FASTGEN_INLINE { columns[c][r] = columns[X::kOutputs + c][r]; });
      });
    }
  }

  TileRows<K> rows_;
  int64_t channels_, line_size_, point_size_;
  Lines<T> lines_;
  OwnVector<T> pixels_;
  RawVector<T> points_;
};

// Gradients of the sums, at the points, for a panel of them: [point][tile][lane].
template <Kind K, class T>
class SumGradientTiles {
 public:
  using Of = Form<K>;
  using X = typename Of::X;
  using Y = typename Of::Y;
  static constexpr int64_t kL = kLanes<T>;

  SumGradientTiles(const TileRows<K>& rows, int64_t at_once)
      : rows_(rows),
        lines_(rows.width),
        line_size_(std::max(lines_.line.padded(), rows.across() * X::kOutputs) * kL),
        point_size_(apart<T>(at_once * rows.across() * 2 * kL)),
        pixels_(Y::kOutputs * line_size_),
        points_(Of::kPoints * point_size_) {}

  const T* at(int64_t point) const { return points_.data() + point * point_size_; }

  // Of a row of tiles and the channels from `channel` on, as tiles from `tile` on, into lanes [lane, lane + kL) of
  // `width`; and as they are, unless `copy` is null. Returns their sums.
  template <class E>
  Vec<T> fill(const Planes<E>& planes, int64_t row, int64_t channel, int64_t tile, int64_t lane, int64_t width,
              E* copy) {
    for (int64_t r = 0; r < Y::kOutputs; ++r) {
      T* const line = pixels_.data() + r * line_size_;
      const int64_t y = rows_.top(row) + r;
      if (y >= rows_.height) {
        std::fill_n(line, line_size_, T(0));
        continue;
      }
      planes.read(rows_.image(row), channel, y, lines_);
      lines_.line.to_tile(line, kL);
      if (copy)
        lines_.line.write(copy + (rows_.image(row) * planes.channels + channel) * planes.size() + y * planes.width,
                          planes.size(), std::min(kL, planes.channels - channel));
    }
    Vec<T> sum = {};
    T* to = points_.data() + tile * width + lane;
    const T* from = pixels_.data();
    for (int64_t i = 0; i < rows_.across(); ++i, to += width, from += X::kOutputs * kL) {
      Vec<T> y[Y::kOutputs][X::kOutputs], at[Y::kPoints][X::kPoints];
      unroll<Y::kOutputs>([&](auto r) FASTGEN_INLINE {
        unroll<X::kOutputs>([&](auto c) FASTGEN_INLINE { y[r][c] = load(from + r * line_size_ + c * kL); });
      });
      both_sides(y, at, [](const auto& line, auto& points) FASTGEN_INLINE { outputs_at_points(line, points); });
      unroll<Of::kPoints>([&](auto p)
                              FASTGEN_INLINE { store(to + p * point_size_, at[p / X::kPoints][p % X::kPoints]); });
      sum += at[1][1];
    }
    return sum;
  }

 private:
  TileRows<K> rows_;
  Lines<T> lines_;
  int64_t line_size_, point_size_;
  OwnVector<T> pixels_;
  RawVector<T> points_;
};

// A weight (first, second, width, width) and its place at the points, [panel of lanes][phase][point][depth][lane]:
// lanes are its first dimension; or, `back`, its second, and the kernels are turned around.
template <Kind K, class T>
struct Weights {
  using Of = Form<K>;
  using X = typename Of::X;
  using Y = typename Of::Y;
  static constexpr int64_t kL = kLanes<T>, kArea = Of::kArea;
  int64_t first, second;
  bool back = false, gated = false;

  Panels<T> panels() const { return {back ? second : first, gated}; }
  int64_t depth() const { return back ? first : second; }
  // Where a panel begins, how long its matrix of a point is, and the end of all.
  int64_t panel(int64_t i) const { return Of::kPhases * Of::kPoints * i * apart<T>(depth() * 2 * kL); }
  int64_t matrix(int64_t i) const { return apart<T>(depth() * panels().width(i)); }
  int64_t size() const { return panel(panels().count()); }

  template <class E>
  RawVector<T> at_points(const E* weight) const {
    RawVector<T> packed(size());
    each([&](int64_t at, int64_t lane_stride, int64_t live, int64_t to, int64_t point_size, RowTile<T>& rows,
             T* turned) {
      rows.read(weight + at, lane_stride, live);
      rows.to_tile(turned, kL);
      for (int64_t phase = 0; phase < Of::kPhases; ++phase, to += Of::kPoints * point_size) {
        Vec<T> w[Y::kTaps][X::kTaps], values[Y::kPoints][X::kPoints];
        unroll<Of::kTaps>([&](auto i) FASTGEN_INLINE {
          const int tap = back ? Of::kTaps - 1 - i : int{i};
          w[i / X::kTaps][i % X::kTaps] = load(turned + kernel_index(phase, tap) * kL);
        });
        both_sides(w, values, [](const auto& line, auto& points) FASTGEN_INLINE { weights_at_points(line, points); });
        unroll<Of::kPoints>([&](auto p) FASTGEN_INLINE {
          store(packed.data() + to + p * point_size, values[p / X::kPoints][p % X::kPoints]);
        });
      }
    });
    return packed;
  }

  // The gradient of the weight from the threads' sums at the points; in a fixed order.
  void from_points(const std::vector<RawVector<T>>& sums, T* weight) const {
    each([&](int64_t to, int64_t lane_stride, int64_t live, int64_t at, int64_t point_size, RowTile<T>& rows,
             T* turned) {
      for (int64_t phase = 0; phase < Of::kPhases; ++phase, at += Of::kPoints * point_size) {
        Vec<T> values[Y::kPoints][X::kPoints] = {}, w[Y::kTaps][X::kTaps];
        for (const RawVector<T>& sum : sums)
          unroll<Of::kPoints>([&](auto p) FASTGEN_INLINE {
            values[p / X::kPoints][p % X::kPoints] += load(sum.data() + at + p * point_size);
          });
        both_sides(values, w, [](const auto& points, auto& line) FASTGEN_INLINE { weights_from_points(points, line); });
        unroll<Of::kTaps>(
            [&](auto i) FASTGEN_INLINE { store(turned + kernel_index(phase, i) * kL, w[i / X::kTaps][i % X::kTaps]); });
      }
      rows.from_tile(turned, kL);
      rows.write(weight + to, lane_stride, live);
    });
  }

 private:
  static int64_t kernel_index(int64_t phase, int64_t tap) {
    constexpr int64_t kAside = Of::kIn * Of::kOut;
    const int64_t y = phase / kAside + kAside * (tap / X::kTaps), x = phase % kAside + kAside * (tap % X::kTaps);
    return y * Of::kWidth + x;
  }
  // f(index in the tensor, lanes' distance there, live lanes, index at the points, distance of those, room for
  // kernels).
  template <class F>
  void each(F&& f) const {
    const int64_t lane_stride = back ? kArea : second * kArea, depth_stride = back ? second * kArea : kArea;
    const Panels<T> outs = panels();
    share(depth(), [&](int64_t begin, int64_t end) {
      RowTile<T> rows(kArea);
      OwnVector<T> turned(rows.padded() * kL);  // zero where no tap is live
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
