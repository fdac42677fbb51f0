// Where convolutions by the transforms of winograd.h lie in memory: images in tiles, their patches, and weights.
#pragma once

#include "masked_conv_backward.h"
#include "winograd.h"

namespace fastgen {
namespace {

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
template <Kind K>
struct TileRows {
  using Of = Form<K>;
  int64_t batch, height, width;  // of the results

  int64_t down() const { return tiles(height, Of::kResultsY); }
  int64_t across() const { return tiles(width, Of::kResultsX); }
  int64_t count() const { return batch * down(); }
  int64_t image(int64_t row) const { return row / down(); }
  int64_t top(int64_t row) const { return row % down() * Of::kResultsY; }  // the first line, of each phase

  // How many to work on at once: their patches, and the products for a panel, leave room in the second-level cache.
  template <class T>
  int64_t at_once(int64_t channels) const {
    constexpr int64_t kCache = 640 << 10, kPanels = Of::kOutPhases * 2 * kLanes<T>;
    const int64_t size = Of::kPoints * static_cast<int64_t>(sizeof(T)) * (Of::kInPhases * channels + kPanels);
    return std::clamp<int64_t>(kCache / size / std::max<int64_t>(across(), 1), 1, std::max<int64_t>(count(), 1));
  }

 private:
  // The transpose's first phase begins a pixel before the image.
  static int64_t tiles(int64_t pixels, int64_t results) {
    return (pixels / Of::kOut + Of::kOut - 1 + results - 1) / results;
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
  static constexpr int64_t kL = kLanes<T>, kLines = Of::kPatchY * Of::kIn, kStep = Of::kResultsY * Of::kIn;

  Patches(const TileRows<K>& rows, int64_t width, int64_t channels, int64_t at_once)
      : rows_(rows),
        channels_(round_up(channels, kL)),
        line_size_(
            std::max(round_up(width, kL) + 1, ((rows.across() - 1) * Of::kResultsX + Of::kPatchX) * Of::kIn + 1) *
            channels_),
        point_size_(apart<T>(at_once * rows.across() * channels_)),
        line_(width),
        kept_(width),
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
      planes.read(image, c, y, line_, kept_);
      line_.to_tile(pixel(y, 0) + c, channels_);
    }
    std::fill(pixel(y, planes.width), line + line_size_, T(0));
  }

  // One vector of channels of a row of tiles.
  void transform(int64_t top, int64_t phase, int64_t channel, int64_t tile) {
    const T* lines[Of::kPatchY];
    unroll<Of::kPatchY>([&](auto i) FASTGEN_INLINE {
      lines[i] = pixel(top + phase / Of::kIn + Of::kIn * i, phase % Of::kIn - 1) + channel;
    });
    T* to = points_.data() + phase * Of::kPoints * point_size_ + tile * channels_ + channel;
    for (int64_t i = 0; i < rows_.across(); ++i, to += channels_) {
      Vec<T> patch[Of::kPatchY * Of::kPatchX], at[Of::kPoints];
      const int64_t x = i * Of::kResultsX * Of::kIn * channels_;
      unroll<Of::kPatchY * Of::kPatchX>([&](auto d) FASTGEN_INLINE {
        patch[d] = load(lines[d / Of::kPatchX] + x + d % Of::kPatchX * Of::kIn * channels_);
      });
      Of::patch_at(patch, at);
      unroll<Of::kPoints>([&](auto p) FASTGEN_INLINE { store(to + p * point_size_, at[p]); });
    }
  }

  TileRows<K> rows_;
  int64_t channels_, line_size_, point_size_;
  RowTile<T> line_, kept_;
  OwnVector<T> pixels_;
  RawVector<T> points_;
};

// Gradients of the sums, at the points, for a panel of them: [point][tile][lane].
template <Kind K, class T>
class SumGradientTiles {
 public:
  using Of = Form<K>;
  static constexpr int64_t kL = kLanes<T>;

  SumGradientTiles(const TileRows<K>& rows, int64_t at_once)
      : rows_(rows),
        line_(rows.width),
        kept_(rows.width),
        line_size_(std::max(line_.padded(), rows.across() * Of::kResultsX) * kL),
        point_size_(apart<T>(at_once * rows.across() * 2 * kL)),
        pixels_(Of::kResultsY * line_size_),
        points_(Of::kPoints * point_size_) {}

  const T* at(int64_t point) const { return points_.data() + point * point_size_; }

  // Of a row of tiles and the channels from `channel` on, as tiles from `tile` on, into lanes [lane, lane + kL) of
  // `width`. Returns their sums.
  template <class E>
  Vec<T> fill(const Planes<E>& planes, int64_t row, int64_t channel, int64_t tile, int64_t lane, int64_t width) {
    for (int64_t r = 0; r < Of::kResultsY; ++r) {
      T* const line = pixels_.data() + r * line_size_;
      const int64_t y = rows_.top(row) + r;
      if (y < rows_.height) {
        planes.read(rows_.image(row), channel, y, line_, kept_);
        line_.to_tile(line, kL);
      } else {
        std::fill_n(line, line_size_, T(0));
      }
    }
    Vec<T> sum = {};
    T* to = points_.data() + tile * width + lane;
    const T* from = pixels_.data();
    for (int64_t i = 0; i < rows_.across(); ++i, to += width, from += Of::kResultsX * kL) {
      Vec<T> y[Of::kResultsY * Of::kResultsX], at[Of::kPoints];
      unroll<Of::kResultsY * Of::kResultsX>([&](auto r) FASTGEN_INLINE {
        y[r] = load(from + r / Of::kResultsX * line_size_ + r % Of::kResultsX * kL);
        sum += y[r];
      });
      Of::results_at(y, at);
      unroll<Of::kPoints>([&](auto p) FASTGEN_INLINE { store(to + p * point_size_, at[p]); });
    }
    return sum;
  }

 private:
  TileRows<K> rows_;
  RowTile<T> line_, kept_;
  int64_t line_size_, point_size_;
  OwnVector<T> pixels_;
  RawVector<T> points_;
};

// A weight (first, second, width, width) and its place at the points, [panel of lanes][phase][point][depth][lane]:
// lanes are its first dimension; or, `back`, its second, and the kernels are turned around.
template <Kind K, class T>
struct Weights {
  using Of = Form<K>;
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
    each([&](const Kernels& k, RowTile<T>& rows, T* turned) {
      rows.read(weight + k.index, k.stride, k.live);
      rows.to_tile(turned, kL);
      T* to = packed.data() + k.at_points;
      for (int64_t phase = 0; phase < Of::kPhases; ++phase, to += Of::kPoints * k.point_size) {
        Vec<T> w[Of::kTaps], values[Of::kPoints];
        unroll<Of::kTaps>([&](auto i) FASTGEN_INLINE {
          w[i] = load(turned + Of::place(phase, back ? Of::kTaps - 1 - i : int{i}) * kL);
        });
        Of::weights_at(w, values);
        unroll<Of::kPoints>([&](auto p) FASTGEN_INLINE { store(to + p * k.point_size, values[p]); });
      }
    });
    return packed;
  }

  // The gradient of the weight from the threads' sums at the points; in a fixed order.
  void from_points(const std::vector<RawVector<T>>& sums, T* weight) const {
    each([&](const Kernels& k, RowTile<T>& rows, T* turned) {
      int64_t at = k.at_points;
      for (int64_t phase = 0; phase < Of::kPhases; ++phase, at += Of::kPoints * k.point_size) {
        Vec<T> values[Of::kPoints] = {}, w[Of::kTaps];
        for (const RawVector<T>& sum : sums)
          unroll<Of::kPoints>([&](auto p) FASTGEN_INLINE { values[p] += load(sum.data() + at + p * k.point_size); });
        Of::weights_from(values, w);
        unroll<Of::kTaps>([&](auto i) FASTGEN_INLINE { store(turned + Of::place(phase, i) * kL, w[i]); });
      }
      rows.from_tile(turned, kL);
      rows.write(weight + k.index, k.stride, k.live);
    });
  }

 private:
  // A vector of kernels: the first and their distance in the tensor, how many there are, and where their values at the
  // points begin and how far those lie apart.
  struct Kernels {
    int64_t index, stride, live, at_points, point_size;
  };
  // f(kernels, room for them as they lie in the tensor, room for them with lanes last).
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
            const int64_t index = outs.first(i, v) * lane_stride + k * depth_stride;
            const int64_t at_points = panel(i) + k * outs.width(i) + v * kL;
            f(Kernels{index, lane_stride, outs.live(i, v), at_points, matrix(i)}, rows, turned.data());
          }
    });
  }
};

}  // namespace
}  // namespace fastgen
