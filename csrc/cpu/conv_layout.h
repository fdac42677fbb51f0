// How convolutions lie in memory: shapes, live taps, panels of output channels, rows and images with channels last, and
// packed weights.
#pragma once

#include "bfloat16_pairs.h"
#include "functions.h"

namespace fastgen {
namespace {

enum class Mask { kA = 0, kB = 1, kVertical = 2, kVerticalB = 3, kNone };

// What follows the sums: nothing, max(., 0), or the tanh of the first half of them times the sigmoid of the second.
enum class Activation { kNone, kRelu, kGate };

// Live taps of one kernel row, relative to the pixel: (dy, dx) ... (dy, dx + count - 1).
struct TapRun {
  int64_t dy, dx, count;
};

struct ConvShape {
  int64_t batch, channels, height, width, outs, kernel_h, kernel_w;  // outs: rows of the weight, both halves of a gate
  Mask mask;
  int64_t colors;
  Activation activation;

  bool gated() const { return activation == Activation::kGate; }
  int64_t above() const { return kernel_h / 2; }
  int64_t below() const { return mask == Mask::kNone ? kernel_h - 1 - above() : 0; }
  int64_t left() const { return kernel_w / 2; }
  int64_t right() const { return kernel_w - 1 - left(); }
  int64_t area() const { return kernel_h * kernel_w; }
  int64_t tap(int64_t dy, int64_t dx) const { return (above() + dy) * kernel_w + left() + dx; }
  int64_t results() const { return gated() ? outs / 2 : outs; }

  std::vector<TapRun> runs() const {
    std::vector<TapRun> runs;
    const bool whole_row = mask == Mask::kVerticalB || mask == Mask::kNone;
    for (int64_t dy = -above(); dy < whole_row + below(); ++dy) runs.push_back({dy, -left(), kernel_w});
    const bool center = mask == Mask::kB || (mask == Mask::kA && colors > 1);
    if (mask == Mask::kA || mask == Mask::kB) runs.push_back({0, -left(), left() + center});
    std::erase_if(runs, [](const TapRun& run) { return run.count == 0; });
    return runs;
  }
  // Whether output o may see input c of its own pixel, where taps of that pixel are live at all.
  bool sees(int64_t o, int64_t c) const {
    if (colors == 1 || mask == Mask::kVerticalB) return true;
    const int64_t to = o % results() / (results() / colors), from = c / (channels / colors);
    return mask == Mask::kA ? from < to : from <= to;
  }
  bool live(int64_t o, int64_t c, int64_t dy, int64_t dx) const { return dy || dx || sees(o, c); }
};

inline int64_t taps_of(const std::vector<TapRun>& runs) {
  int64_t taps = 0;
  for (const TapRun& run : runs) taps += run.count;
  return taps;
}

// f(tap, whether it is the pixel itself and its colors are ordered) for each live tap.
template <class F>
void for_each_tap(const ConvShape& s, const std::vector<TapRun>& runs, F&& f) {
  for (const TapRun& run : runs)
    for (int64_t dx = run.dx; dx < run.dx + run.count; ++dx)
      f(s.tap(run.dy, dx), s.colors > 1 && run.dy == 0 && dx == 0);
}

// Pointers to one call's tensors; optional ones may be null.
template <class E>
struct ConvTensors {
  const E *x, *weight, *bias, *cond;
  bool cond_constant;  // cond is (B, outs, 1, 1)
};

// Rows of outputs (or of inputs, for the gradient) in panels of two vectors of lanes, the last perhaps of one. With a
// gate, the first vector is of the tanh half and the second of the sigmoid half.
template <class T>
struct Panels {
  static constexpr int64_t kL = kLanes<T>;
  int64_t rows;
  bool gated;

  int64_t count() const {
    const int64_t channels = gated ? rows / 2 : rows, each = gated ? kL : 2 * kL;
    return (channels + each - 1) / each;
  }
  int64_t vectors(int64_t panel) const { return gated || rows - panel * 2 * kL > kL ? 2 : 1; }
  int64_t width(int64_t panel) const { return vectors(panel) * kL; }
  // Lanes before a panel.
  int64_t begin(int64_t panel) const { return panel * 2 * kL; }
  int64_t lanes() const { return rows == 0 ? 0 : begin(count() - 1) + width(count() - 1); }
  // The first row of a vector of a panel, and how many there are in it.
  int64_t first(int64_t panel, int64_t vector) const {
    return gated ? vector * (rows / 2) + panel * kL : (2 * panel + vector) * kL;
  }
  int64_t live(int64_t panel, int64_t vector) const {
    return gated ? std::min(kL, rows / 2 - panel * kL) : std::min(kL, rows - (2 * panel + vector) * kL);
  }
};

// One row of an image, channels first in the tensor and lanes last in a tile: transposes between the two.
template <class T>
class RowTile {
 public:
  static constexpr int64_t kL = kLanes<T>, kRowsAhead = 2;
  explicit RowTile(int64_t width) : width_(width), padded_(round_up(width, kL)), rows_(kL * padded_) {}

  int64_t padded() const { return padded_; }
  T* row(int64_t channel) { return rows_.data() + channel * padded_; }

  // Asks for `channels` rows of the tensor, `plane` elements apart: they lie too far from each other for the processor
  // to see them coming.
  template <bool Write = false, class E>
  void expect(const E* rows, int64_t plane, int64_t channels) const {
    constexpr int64_t kLine = 64 / sizeof(E);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t x = 0; x < width_ + kLine - 1; x += kLine) __builtin_prefetch(rows + c * plane + x, Write);
  }

  // Those rows; the others become zero. Asks for a later row of the image.
  template <class E>
  void read(const E* from, int64_t plane, int64_t channels) {
    expect(from + kRowsAhead * width_, plane, channels);
    for (int64_t c = 0; c < kL; ++c) {
      if (c < channels)
        load_row(row(c), from + c * plane, width_, padded_);
      else
        std::fill_n(row(c), padded_, T(0));
    }
  }
  template <class E>
  void write(E* to, int64_t plane, int64_t channels) {
    for (int64_t c = 0; c < channels; ++c) store_row(to + c * plane, row(c), width_);
  }
  // What a ReLU, whose results are `of`, lets through; the rest becomes zero.
  void clear_where_zero(const RowTile& of) {
    for (size_t i = 0; i < rows_.size(); i += kL) {
      const Vec<T> y = load(of.rows_.data() + i), zero = {};
      store(rows_.data() + i, y <= zero ? zero : load(rows_.data() + i));
    }
  }
  // tile[x * ld + lane]; the tile has room for `padded` pixels.
  template <class S>
  void to_tile(S* tile, int64_t ld) const {
    for (int64_t x = 0; x < padded_; x += kL)
      transpose_square(rows_.data() + x, padded_,
                       [&](auto i, Vec<T> row) FASTGEN_INLINE { store_factors(tile + (x + i) * ld, row); });
  }
  void add_to_tile(T* tile, int64_t ld) const {
    T square[kL * kL];
    for (int64_t x = 0; x < width_; x += kL) {
      transpose_square(rows_.data() + x, padded_, square, kL);
      for (int64_t i = 0; i < std::min(kL, width_ - x); ++i) {
        T* to = tile + (x + i) * ld;
        store(to, load(to) + load(square + i * kL));
      }
    }
  }
  void from_tile(const T* tile, int64_t ld) {
    for (int64_t x = 0; x < padded_; x += kL) transpose_square(tile + x * ld, ld, rows_.data() + x, padded_);
  }
  // The same for fewer lanes than a vector has, and no room for more pixels.
  template <class S>
  void to_narrow_tile(S* tile, int64_t ld, int64_t channels) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t x = 0; x < width_; ++x) tile[x * ld + c] = static_cast<S>(rows_[c * padded_ + x]);
  }
  // tile[(x / 2 * ld + lane) * 2 + x % 2]; the tile has room for whole vectors of pairs.
  template <class S>
  void to_pairs(S* tile, int64_t ld) const {
    T pairs[kL * kL];  // two of them in each T
    for (int64_t x = 0; x < padded_; x += 2 * kL) {
      for (int64_t c = 0; c < kL; ++c) {
        auto* to = reinterpret_cast<S*>(pairs + c * kL);
        store_factors(to, load(rows_.data() + c * padded_ + x));
        store_factors(to + kL, x + kL < padded_ ? load(rows_.data() + c * padded_ + x + kL) : Vec<T>{});
      }
      transpose_square(pairs, kL, reinterpret_cast<T*>(tile + x * ld), ld);
    }
  }

 private:
  int64_t width_, padded_;
  OwnVector<T> rows_;
};

// Rows [first, last) of an image as factors S, channels last, with columns of zeros on both sides; the channels of a
// pixel are whole factors.
template <class T, class S = T>
class Pixels {
 public:
  static constexpr int64_t kL = kLanes<T>;
  static int64_t stored(int64_t channels) { return round_up(channels, kTerms<T, S>); }
  static int64_t row_size(int64_t width, int64_t left, int64_t right, int64_t channels) {
    return (round_up(width, kL) + left + right) * stored(channels);
  }
  Pixels(int64_t width, int64_t left, int64_t right, int64_t channels, int64_t rows)
      : width_(width),
        left_(left),
        channels_(channels),
        stored_(stored(channels)),
        row_(row_size(width, left, right, channels)),
        data_(rows * row_ + kL) {}

  template <class E>
  void pack(const E* image, int64_t height, int64_t first, int64_t last, RowTile<T>& rows) {
    start(first);
    for (int64_t c = 0; c < channels_; c += kL) {
      const int64_t n = std::min(kL, channels_ - c);
      for (int64_t y = first; y < last; ++y) {
        rows.read(image + (c * height + y) * width_, height * width_, n);
        if (n == kL)
          rows.to_tile(at(y, 0) + c, stored_);
        else
          rows.to_narrow_tile(at(y, 0) + c, stored_, n);
      }
    }
    for (int64_t y = first; y < last; ++y) finish_row(y);
  }
  void start(int64_t first) { first_ = first; }
  // A tile reaches beyond the row.
  void finish_row(int64_t y) { std::fill(at(y, width_), at(y, 0) + row_ - left_ * stored_, S(0)); }
  S* at(int64_t y, int64_t x) { return data_.data() + (y - first_) * row_ + (x + left_) * stored_; }

 private:
  int64_t width_, left_, channels_, stored_, row_, first_ = 0;
  OwnVector<S> data_;
};

// Weights for the forward pass: [panel][run][tap][channel][lane], of pairs [panel][run][tap][channel / 2][lane][2].
template <class T, class S, class E>
OwnVector<S> pack_weights(const ConvShape& s, const std::vector<TapRun>& runs, const Panels<T>& panels,
                          const E* weight) {
  constexpr int64_t kL = kLanes<T>, kT = kTerms<T, S>;
  const int64_t k = taps_of(runs) * Pixels<T, S>::stored(s.channels), row = s.channels * s.area();
  OwnVector<S> packed(k * panels.lanes());
  share(panels.count(), [&](int64_t begin, int64_t end) {
    RowTile<T> rows(row);
    OwnVector<T> turned(rows.padded() * kL);
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t v = 0; v < panels.vectors(panel); ++v) {
        const int64_t first = panels.first(panel, v), live = panels.live(panel, v);
        rows.read(weight + first * row, row, live);
        rows.to_tile(turned.data(), kL);
        S* to = packed.data() + k * panels.begin(panel) + v * kL * kT;
        for_each_tap(s, runs, [&](int64_t tap, bool center) {
          for (int64_t c = 0; c < s.channels; c += kT, to += panels.width(panel) * kT) {
            const auto of = [&](int64_t channel) { return load(turned.data() + (channel * s.area() + tap) * kL); };
            if constexpr (kT == 1)
              store(to, of(c));
            else  // the weights have 16 bits already
              store(reinterpret_cast<uint32_t*>(to),
                    (VecU)of(c) >> 16 | (c + 1 < s.channels ? (VecU)of(c + 1) >> 16 << 16 : VecU{}));
            for (int64_t i = 0; center && i < live * kT; ++i)
              if (c + i % kT < s.channels && !s.sees(first + i / kT, c + i % kT)) to[i] = S(0);
          }
        });
      }
  });
  return packed;
}

// Weights for the gradient of x: [panel of inputs][panel of outputs][run][tap, reversed][output][input lane], of pairs
// ... [output / 2][input lane][2].
template <class T, class S, class E>
OwnVector<S> pack_weights_back(const ConvShape& s, const std::vector<TapRun>& runs, const Panels<T>& inputs,
                               const Panels<T>& outputs, const E* weight) {
  constexpr int64_t kT = kTerms<T, S>;
  const int64_t k = taps_of(runs) * outputs.lanes();
  OwnVector<S> packed(k * inputs.lanes());
  share(inputs.count(), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t q = 0; q < outputs.count(); ++q)
        for (int64_t i = 0; i < outputs.width(q); ++i) {
          const int64_t v = i / kLanes<T>, o = outputs.first(q, v) + i % kLanes<T>, width = inputs.width(panel);
          if (i % kLanes<T> >= outputs.live(q, v)) continue;
          S* to = packed.data() + k * inputs.begin(panel) + taps_of(runs) * outputs.begin(q) * width +
                  i / kT * width * kT + i % kT;
          for (int64_t lane = 0; lane < width; ++lane, to += kT) {
            const int64_t c = inputs.begin(panel) + lane;
            if (c >= s.channels) break;
            const E* from = weight + (o * s.channels + c) * s.area();
            int64_t at = 0;
            for (const TapRun& run : runs)
              for (int64_t dx = run.dx + run.count - 1; dx >= run.dx; --dx, at += outputs.width(q) * width)
                if (s.live(o, c, run.dy, dx)) to[at] = static_cast<S>(from[s.tap(run.dy, dx)]);
          }
        }
  });
  return packed;
}

// The gradient of the weights from the threads' sums, each of which lies as packed weights do; in a fixed order.
template <class T>
void unpack_gradients(const ConvShape& s, const std::vector<TapRun>& runs, const Panels<T>& panels,
                      const OwnVector<T>& sums, int64_t workers, T* weight) {
  constexpr int64_t kL = kLanes<T>;
  const int64_t k = taps_of(runs) * s.channels, row = s.channels * s.area(), size = k * panels.lanes();
  share(panels.count(), [&](int64_t begin, int64_t end) {
    RowTile<T> rows(row);
    OwnVector<T> turned(rows.padded() * kL);  // zero where no tap is live
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t v = 0; v < panels.vectors(panel); ++v) {
        const int64_t first = panels.first(panel, v), live = panels.live(panel, v);
        const T* from = sums.data() + k * panels.begin(panel) + v * kL;
        for_each_tap(s, runs, [&](int64_t tap, bool center) {
          for (int64_t c = 0; c < s.channels; ++c, from += panels.width(panel)) {
            Vec<T> sum = {};
            for (int64_t worker = 0; worker < workers; ++worker) sum += load(from + worker * size);
            T* to = turned.data() + (c * s.area() + tap) * kL;
            store(to, sum);
            for (int64_t lane = 0; center && lane < live; ++lane)
              if (!s.sees(first + lane, c)) to[lane] = T(0);
          }
        });
        rows.from_tile(turned.data(), kL);
        rows.write(weight + first * row, row, live);
      }
  });
}

}  // namespace
}  // namespace fastgen
