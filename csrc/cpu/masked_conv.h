// Masked two-dimensional convolutions: shapes, live taps, layouts, and the forward pass.
//
// Only live taps are computed. Pixels are packed channels last, so that the live taps of one kernel row read one
// stretch of memory, (taps x channels) long; output channels lie in the lanes. A block of sums, up to kPixels pixels of
// a row by two vectors of outputs, stays in registers while all stretches go by: for each input, two vectors of weights
// are loaded and each pixel's value is broadcast. With a gate the two vectors are tanh and sigmoid of the same
// channels.
#pragma once

#include <array>

#include "functions.h"

namespace fastgen {
namespace {

constexpr int kPixels = kVectorRegisters == 32 ? 14 : 6;

enum class Mask { kA = 0, kB = 1, kVertical = 2, kVerticalB = 3 };

// Live taps of one kernel row, relative to the pixel: (dy, dx) ... (dy, dx + count - 1).
struct TapRun {
  int64_t dy, dx, count;
};

struct ConvShape {
  int64_t batch, channels, height, width, outs, kernel_h, kernel_w;  // outs: rows of the weight, both halves of a gate
  Mask mask;
  int64_t colors;
  bool gated;

  int64_t above() const { return kernel_h / 2; }
  int64_t left() const { return kernel_w / 2; }
  int64_t results() const { return gated ? outs / 2 : outs; }

  std::vector<TapRun> runs() const {
    std::vector<TapRun> runs;
    for (int64_t dy = -above(); dy < 0; ++dy) runs.push_back({dy, -left(), kernel_w});
    const bool center = mask == Mask::kB || (mask == Mask::kA && colors > 1);
    if (mask == Mask::kVerticalB) runs.push_back({0, -left(), kernel_w});
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
  int64_t weight_at(int64_t o, int64_t c, int64_t dy, int64_t dx) const {
    return ((o * channels + c) * kernel_h + above() + dy) * kernel_w + left() + dx;
  }
};

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

// One part of a product: `count` inputs from a on, each with a row of b.
template <class T>
struct Stretch {
  const T *a, *b;
  int64_t count;
};

// tile[i] += sum over all stretches of a[i * stride + k] * b[k], or, if Across, a[i + k * stride] * b[k], for i < P;
// rows of tile and b are V vectors. Not inlined: among other variables the compiler would keep sums in memory.
template <class T, int P, int V, bool Across>
[[gnu::noinline]] void multiply_rows(T* tile, const Stretch<T>* stretch, int64_t stretches, int64_t stride) {
  constexpr int kL = kLanes<T>;
  Vec<T> sum[P][V];
  unroll<P>([&](auto i) FASTGEN_INLINE {
    unroll<V>([&](auto v) FASTGEN_INLINE { sum[i][v] = load(tile + (i * V + v) * kL); });
  });
  for (const Stretch<T>* end = stretch + stretches; stretch != end; ++stretch) {
    // three rows to a pointer, as far as addresses are free of arithmetic
    constexpr int kPointers = Across ? 1 : (P + 2) / 3;
    const T* a[kPointers];
    unroll<kPointers>([&](auto j) FASTGEN_INLINE { a[j] = stretch->a + 3 * j * stride; });
    const T* b = stretch->b;
    for (int64_t k = stretch->count; k > 0; --k, b += V * kL) {
      Vec<T> right[V];
      unroll<V>([&](auto v) FASTGEN_INLINE { right[v] = load(b + v * kL); });
      unroll<P>([&](auto i) FASTGEN_INLINE {
        const Vec<T> left = splat(Across ? a[0][i] : a[i / 3][i % 3 * stride]);
        unroll<V>([&](auto v) FASTGEN_INLINE { sum[i][v] += left * right[v]; });
      });
      unroll<kPointers>([&](auto j) FASTGEN_INLINE { a[j] += Across ? stride : 1; });
    }
  }
  unroll<P>([&](auto i) FASTGEN_INLINE {
    unroll<V>([&](auto v) FASTGEN_INLINE { store(tile + (i * V + v) * kL, sum[i][v]); });
  });
}

template <class T>
using MultiplyRows = void (*)(T*, const Stretch<T>*, int64_t, int64_t);
template <class T, bool Across>
MultiplyRows<T> multiply_rows_of(int64_t rows, int64_t vectors) {
  static constexpr auto table = []<int... P>(std::integer_sequence<int, P...>) {
    return std::array<std::array<MultiplyRows<T>, 2>, kPixels>{
        {{multiply_rows<T, P + 1, 1, Across>, multiply_rows<T, P + 1, 2, Across>}...}};
  }(std::make_integer_sequence<int, kPixels>{});
  return table[rows - 1][vectors - 1];
}

// f(first, count) for groups of at most kPixels of n, as equal as possible.
template <class F>
void for_each_group(int64_t n, F&& f) {
  const int64_t groups = (n + kPixels - 1) / kPixels;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * n / groups;
    f(first, (g + 1) * n / groups - first);
  }
}

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
  // tile[x * ld + lane]; the tile has room for `padded` pixels.
  void to_tile(T* tile, int64_t ld) const {
    for (int64_t x = 0; x < padded_; x += kL) transpose_square(rows_.data() + x, padded_, tile + x * ld, ld);
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
  void to_narrow_tile(T* tile, int64_t ld, int64_t channels) const {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t x = 0; x < width_; ++x) tile[x * ld + c] = rows_[c * padded_ + x];
  }

 private:
  int64_t width_, padded_;
  OwnVector<T> rows_;
};

// Rows [first, last) of an image, channels last, with columns of zeros on both sides.
template <class T>
class Pixels {
 public:
  static constexpr int64_t kL = kLanes<T>;
  static int64_t row_size(int64_t width, int64_t left, int64_t right, int64_t channels) {
    return (round_up(width, kL) + left + right) * channels;
  }
  Pixels(int64_t width, int64_t left, int64_t right, int64_t channels, int64_t rows)
      : width_(width),
        left_(left),
        channels_(channels),
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
          rows.to_tile(at(y, 0) + c, channels_);
        else
          rows.to_narrow_tile(at(y, 0) + c, channels_, n);
      }
    }
    for (int64_t y = first; y < last; ++y) finish_row(y);
  }
  void start(int64_t first) { first_ = first; }
  // A tile reaches beyond the row.
  void finish_row(int64_t y) { std::fill(at(y, width_), at(y, 0) + row_ - left_ * channels_, T(0)); }
  T* at(int64_t y, int64_t x) { return data_.data() + (y - first_) * row_ + (x + left_) * channels_; }

 private:
  int64_t width_, left_, channels_, row_, first_ = 0;
  OwnVector<T> data_;
};

// How many bands of rows an image is cut into: what a thread works on at once fits its cache, and threads get equal
// shares.
inline int64_t bands_of(const ConvShape& s, int64_t row_bytes) {
  constexpr int64_t kCache = 768 << 10;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = std::max<int64_t>(1, kCache / std::max<int64_t>(row_bytes, 1) - s.above());
  int64_t bands = (s.height + most - 1) / most;
  while (bands < s.height && s.batch * bands < 4 * threads && s.batch * bands % threads) ++bands;
  return bands;
}

// Weights for the forward pass: [panel][run][tap][channel][lane].
template <class T, class E>
OwnVector<T> pack_weights(const ConvShape& s, const std::vector<TapRun>& runs, const Panels<T>& panels,
                          const E* weight) {
  int64_t taps = 0;
  for (const TapRun& run : runs) taps += run.count;
  const int64_t k = taps * s.channels;
  OwnVector<T> packed(k * panels.lanes());
  share(panels.count(), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      T* to = packed.data() + k * panels.begin(panel);
      for (const TapRun& run : runs)
        for (int64_t dx = run.dx; dx < run.dx + run.count; ++dx)
          for (int64_t c = 0; c < s.channels; ++c)
            for (int64_t v = 0; v < panels.vectors(panel); ++v)
              for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
                const int64_t o = panels.first(panel, v) + lane;
                const bool live = lane < panels.live(panel, v) && s.live(o, c, run.dy, dx);
                *to++ = live ? static_cast<T>(weight[s.weight_at(o, c, run.dy, dx)]) : T(0);
              }
    }
  });
  return packed;
}

// The sums before the gate, kept for the backward pass if `kept` is not null, and the results.
template <class T, class E>
void conv_forward(const ConvShape& s, const ConvTensors<E>& in, E* out, E* kept) {
  constexpr int64_t kL = kLanes<T>;
  const std::vector<TapRun> runs = s.runs();
  const Panels<T> panels{s.outs, s.gated};
  const OwnVector<T> weights = pack_weights<T>(s, runs, panels, in.weight);
  const int64_t k = static_cast<int64_t>(weights.size()) / std::max<int64_t>(panels.lanes(), 1);
  const int64_t right = s.kernel_w - 1 - s.left(), plane = s.height * s.width;
  const int64_t row = Pixels<T>::row_size(s.width, s.left(), right, s.channels);
  const int64_t bands = bands_of(s, row * sizeof(T)), items = s.batch * bands;
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  for_each_worker(workers, [&](int64_t worker) {
    RowTile<T> rows(s.width);
    Pixels<T> x(s.width, s.left(), right, s.channels, (s.height + bands - 1) / bands + s.above());
    OwnVector<T> tile(rows.padded() * 2 * kL), gated(rows.padded() * kL);
    std::vector<Stretch<T>> stretches;
    for (int64_t item = worker * items / workers; item < (worker + 1) * items / workers; ++item) {
      const int64_t b = item / bands, first = item % bands * s.height / bands;
      const int64_t last = (item % bands + 1) * s.height / bands;
      x.pack(in.x + b * s.channels * plane, s.height, std::max<int64_t>(0, first - s.above()), last, rows);
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int64_t vectors = panels.vectors(panel), width = vectors * kL;
        T bias[2 * kL] = {};
        for (int64_t i = 0; i < width; ++i) {
          const int64_t v = i / kL, o = panels.first(panel, v) + i % kL;
          if (i % kL >= panels.live(panel, v)) continue;
          if (in.bias) bias[i] = static_cast<T>(in.bias[o]);
          if (in.cond && in.cond_constant) bias[i] += static_cast<T>(in.cond[b * s.outs + o]);
        }
        const Vec<T> low = load(bias), high = load(bias + width - kL);
        for (int64_t y = first; y < last; ++y) {
          // both vectors by name: a loop over them would become a slow copy of strings
          for (T* to = tile.data(); to != tile.data() + s.width * width; to += width) {
            store(to, low);
            store(to + width - kL, high);
          }
          if (in.cond && !in.cond_constant)
            for (int64_t v = 0; v < vectors; ++v) {
              const int64_t o = panels.first(panel, v);
              rows.read(in.cond + (b * s.outs + o) * plane + y * s.width, plane, panels.live(panel, v));
              rows.add_to_tile(tile.data() + v * kL, width);
            }
          E* raw = s.gated ? kept : out;  // the sums, where they are wanted
          for (int64_t v = 0; v < vectors && raw; ++v)
            rows.template expect<true>(raw + (b * s.outs + panels.first(panel, v)) * plane + y * s.width, plane,
                                       panels.live(panel, v));
          if (s.gated)
            rows.template expect<true>(out + (b * s.results() + panel * kL) * plane + y * s.width, plane,
                                       panels.live(panel, 0));
          for_each_group(s.width, [&](int64_t from, int64_t count) {
            stretches.clear();
            const T* w = weights.data() + k * panels.begin(panel);
            for (const TapRun& run : runs) {
              const int64_t n = run.count * s.channels;
              if (y + run.dy >= 0) stretches.push_back({x.at(y + run.dy, from + run.dx), w, n});
              w += n * width;
            }
            multiply_rows_of<T, false>(count, vectors)(tile.data() + from * width, stretches.data(),
                                                       static_cast<int64_t>(stretches.size()), s.channels);
          });
          const auto write = [&](E* to, const T* from, int64_t ld, int64_t channels) {
            rows.from_tile(from, ld);
            rows.write(to + y * s.width, plane, channels);
          };
          for (int64_t v = 0; v < vectors && raw; ++v)
            write(raw + (b * s.outs + panels.first(panel, v)) * plane, tile.data() + v * kL, width,
                  panels.live(panel, v));
          if (!s.gated) continue;
          for (int64_t i = 0; i < s.width; ++i)
            store(gated.data() + i * kL, gate(load(tile.data() + i * 2 * kL), load(tile.data() + (2 * i + 1) * kL)));
          write(out + (b * s.results() + panel * kL) * plane, gated.data(), kL, panels.live(panel, 0));
        }
      }
    }
  });
}

}  // namespace
}  // namespace fastgen
