// invertible_conv1x1: the product of every pixel's channels with a small matrix, and the gradient of that matrix. The
// matrix is assembled, and inverted, in fastgen/ops/invertible_conv1x1.py.
#include "simd.h"

namespace fastgen {
namespace {

constexpr int kRows = 6;                               // output channels in registers
constexpr int kWide = kVectorRegisters == 32 ? 4 : 2;  // vectors of pixels
constexpr int kGradRows = kVectorRegisters == 32 ? 6 : 3, kGradColumns = 4;
constexpr int64_t kStretch = 2048;  // pixels between sums of lanes in the gradient
constexpr int64_t kGroups = 32;     // of stretches that are summed apart, for any number of threads

template <class T>
constexpr int kTile = kWide * kLanes<T>;  // pixels

// Pixels of all images in a row: pixel i is `at` i % S of image i / S.
struct Pixels {
  int64_t images, channels, size;
  explicit Pixels(const Tensor& x) : images(x.size(0)), channels(x.size(1)), size(values_from(x, 2)) {}
  int64_t count() const { return images * size; }
  // f(first, offset in the tensor's first channel, count) for the stretches of [begin, end) that lie in one image.
  template <class F>
  void stretches(int64_t begin, int64_t end, F&& f) const {
    for (int64_t i = begin; i < end;) {
      const int64_t image = i / size, in = i % size, n = std::min(end - i, size - in);
      f(i - begin, image * channels * size + in, n);
      i += n;
    }
  }
};

// All channels of pixels [begin, end) as rows of `width`, the rest of which is zero.
template <class T, class E>
void gather(const E* x, const Pixels& at, int64_t begin, int64_t end, T* to, int64_t width) {
  for (int64_t c = 0; c < at.channels; ++c) {
    at.stretches(begin, end, [&](int64_t first, int64_t offset, int64_t n) {
      load_row(to + c * width + first, x + offset + c * at.size, n, n);
    });
    std::fill(to + c * width + (end - begin), to + (c + 1) * width, T(0));
  }
}

// to[o][p] = bias[o] + sum_c weight[c][o] from[c][p] for R rows o and a tile of pixels.
template <int R, class T>
void multiply(const T* weight, const T* bias, int64_t channels, const T* from, int64_t from_ld, T* to, int64_t to_ld) {
  Vec<T> sum[R][kWide];
  unroll<R>([&](auto r) FASTGEN_INLINE { unroll<kWide>([&](auto v) FASTGEN_INLINE { sum[r][v] = splat(bias[r]); }); });
  for (int64_t c = 0; c < channels; ++c) {
    Vec<T> pixels[kWide];
    unroll<kWide>([&](auto v) FASTGEN_INLINE { pixels[v] = load(from + c * from_ld + v * kLanes<T>); });
    unroll<R>([&](auto r) FASTGEN_INLINE {
      const Vec<T> w = splat(weight[c * R + r]);
      unroll<kWide>([&](auto v) FASTGEN_INLINE { sum[r][v] += w * pixels[v]; });
    });
  }
  unroll<R>([&](auto r) FASTGEN_INLINE {
    unroll<kWide>([&](auto v) FASTGEN_INLINE { store(to + r * to_ld + v * kLanes<T>, sum[r][v]); });
  });
}

// y[b, o, p] = bias[o] + sum_c weight[o, c] x[b, c, p]
Tensor invertible_conv1x1(Tensor x, Tensor weight, Tensor bias) {
  Tensor y = fresh_like(x);
  dispatch_float(x.scalar_type(), "invertible_conv1x1", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    const Pixels at(x);
    const int64_t channels = at.channels, full = channels / kRows * kRows, tile = kTile<T>;
    const T* w = data_of<T>(weight);
    std::vector<T> panels(channels * channels);  // of kRows outputs each, then the rest: [c][o]
    for (int64_t o = 0; o < channels; ++o) {
      const int64_t panel = o / kRows * kRows, rows = panel < full ? kRows : channels - full;
      for (int64_t c = 0; c < channels; ++c) panels[panel * channels + c * rows + o - panel] = w[o * channels + c];
    }
    share((at.count() + tile - 1) / tile, [&](int64_t first, int64_t last) {
      OwnVector<T> in(channels * tile), out(channels * tile);
      for (int64_t begin = first * tile; begin < std::min(last * tile, at.count()); begin += tile) {
        const int64_t end = std::min(begin + tile, at.count()), in_image = begin % at.size;
        const bool whole = std::is_same_v<E, T> && in_image + tile <= at.size;  // read and written where it lies
        const int64_t offset = begin / at.size * channels * at.size + in_image, ld = whole ? at.size : tile;
        const T* from = in.data();
        T* to = out.data();
        if constexpr (std::is_same_v<E, T>) {
          if (whole) to = static_cast<E*>(y.data_ptr()) + offset;
        }
        // rows far apart fall on few lines of the nearest cache: those read more than once are brought together
        const bool in_place = whole && full <= kRows;
        if (!in_place) gather(data_of<E>(x), at, begin, end, in.data(), tile);
        if constexpr (std::is_same_v<E, T>)
          if (in_place) from = data_of<E>(x) + offset;
        const int64_t from_ld = in_place ? at.size : tile;
        for (int64_t o = 0; o < full; o += kRows)
          multiply<kRows>(panels.data() + o * channels, data_of<T>(bias) + o, channels, from, from_ld, to + o * ld, ld);
        unroll<kRows - 1>([&](auto r) {
          if (channels - full == r + 1)
            multiply<r + 1>(panels.data() + full * channels, data_of<T>(bias) + full, channels, from, from_ld,
                            to + full * ld, ld);
        });
        if (whole) continue;
        for (int64_t o = 0; o < channels; ++o)
          at.stretches(begin, end, [&](int64_t k, int64_t place, int64_t n) {
            store_row(static_cast<E*>(y.data_ptr()) + place + o * at.size, to + o * tile + k, n);
          });
      }
    });
  });
  return y;
}

// sums[r][c] += sum over a stretch of pixels of a[r][p] b[c][p], for R x C rows.
template <int R, int C, class T>
void multiply_stretch(const T* a, const T* b, int64_t width, int64_t count, double* sums, int64_t ld) {
  Vec<T> sum[R][C] = {};
  for (int64_t p = 0; p < count; p += kLanes<T>) {
    Vec<T> of_b[C];
    unroll<C>([&](auto c) FASTGEN_INLINE { of_b[c] = load(b + c * width + p); });
    unroll<R>([&](auto r) FASTGEN_INLINE {
      const Vec<T> of_a = load(a + r * width + p);
      unroll<C>([&](auto c) FASTGEN_INLINE { sum[r][c] += of_a * of_b[c]; });
    });
  }
  unroll<R>([&](auto r) FASTGEN_INLINE {
    unroll<C>([&](auto c) FASTGEN_INLINE { sums[r * ld + c] += sum_of_lanes<T>(sum[r][c]); });
  });
}

// The gradients of weight (O, C) and bias (O,) from those of the result and x.
std::tuple<Tensor, Tensor> invertible_conv1x1_backward(Tensor grad, Tensor x) {
  Tensor grad_weight, grad_bias;
  dispatch_float(x.scalar_type(), "invertible_conv1x1", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    const Pixels at(x);
    const int64_t channels = at.channels, stretches = (at.count() + kStretch - 1) / kStretch;
    const int64_t groups = std::min(stretches, kGroups);
    const int64_t rows = round_up(channels, kGradRows), columns = round_up(channels + 1, kGradColumns);
    OwnVector<double> sums(groups * rows * columns);
    share(groups, [&](int64_t first, int64_t last) {
      const int64_t width = kStretch + kLanes<T>;  // rows on lines of the caches that differ
      OwnVector<T> g(rows * width), v(columns * width);
      std::fill_n(v.data() + channels * width, width, T(1));  // for the bias
      for (int64_t group = first; group < last; ++group) {
        double* to = sums.data() + group * rows * columns;
        for (int64_t i = group * stretches / groups; i < (group + 1) * stretches / groups; ++i) {
          const int64_t begin = i * kStretch, end = std::min(begin + kStretch, at.count());
          gather(data_of<E>(grad), at, begin, end, g.data(), width);
          gather(data_of<E>(x), at, begin, end, v.data(), width);
          for (int64_t r = 0; r < rows; r += kGradRows)
            for (int64_t c = 0; c < columns; c += kGradColumns)
              multiply_stretch<kGradRows, kGradColumns>(g.data() + r * width, v.data() + c * width, width, end - begin,
                                                        to + r * columns + c, columns);
        }
      }
    });
    grad_weight = torch::stable::new_empty(x, {channels, channels}, kTypeOf<T>);
    grad_bias = torch::stable::new_empty(x, {channels}, kTypeOf<T>);
    for (int64_t r = 0; r < channels; ++r)
      for (int64_t c = 0; c <= channels; ++c) {
        double total = 0;
        for (int64_t group = 0; group < groups; ++group) total += sums[(group * rows + r) * columns + c];
        T* to = c < channels ? static_cast<T*>(grad_weight.data_ptr()) + r * channels + c
                             : static_cast<T*>(grad_bias.data_ptr()) + r;
        *to = static_cast<T>(total);
      }
  });
  return {grad_weight, grad_bias};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("invertible_conv1x1", TORCH_BOX(&fastgen::invertible_conv1x1));
  m.impl("invertible_conv1x1_backward", TORCH_BOX(&fastgen::invertible_conv1x1_backward));
}
