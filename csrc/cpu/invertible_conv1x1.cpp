// invertible_conv1x1 and mix_channels: the product of every pixel's channels with a small matrix, and its gradients;
// arguments are checked in fastgen/ops/invertible_conv1x1.py.
#include "lu_weight.h"

namespace fastgen {
namespace {

constexpr int kRows = 6;                                                   // output channels in registers
constexpr int kWide = kVectorRegisters == 32 ? 4 : 2;                      // vectors of pixels
constexpr int kGradRows = kVectorRegisters == 32 ? 12 : 6, kGradWide = 2;  // in the matrix's gradient
constexpr int64_t kStretch = 2048;                                         // pixels summed in float32 there
constexpr int64_t kGroups = 32;  // of stretches that are summed apart, for any number of threads

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

// The next tile of x, of which a few channels are asked for at a time: rows lie far apart, which the processor's own
// prefetching does not follow, and all at once would be more than it can wait for.
template <class E>
class NextTile {
 public:
  NextTile(const E* x, const Pixels& at, int64_t begin)
      : from_(x + begin / at.size * at.channels * at.size + begin % at.size),
        size_(at.size),
        channels_(begin + kTile<ComputeType<E>> > at.count() ? 0 : at.channels) {}
  void ask(int64_t count) {
    for (count = std::min(channels_, next_ + count); next_ < count; ++next_)
      for (int64_t line = 0; line < kTile<ComputeType<E>> * static_cast<int64_t>(sizeof(E)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from_ + next_ * size_) + line);
  }

 private:
  const E* from_;
  int64_t size_, channels_, next_ = 0;
};

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

// A matrix that multiplies the channels of a tile of pixels, in panels of kRows outputs each, then the rest: [c][o].
template <class T>
class Mixer {
 public:
  // weight(o, c), row after row
  Mixer(const T* weight, const T* bias, int64_t channels) : Mixer(channels, weight, channels, 1) {
    std::copy_n(bias, channels, bias_.data());
  }
  static Mixer transposed(const T* weight, int64_t channels) { return Mixer(channels, weight, 1, channels); }

  // to[o][p] = bias[o] + sum_c weight[o][c] from[c][p]
  template <class E>
  void tile(const T* from, int64_t from_ld, T* to, int64_t to_ld, NextTile<E>& next) const {
    for (int64_t o = 0; o < full_; o += kRows) {
      next.ask(kRows);
      rows<kRows>(o, from, from_ld, to, to_ld);
    }
    next.ask(kRows);
    unroll<kRows - 1>([&](auto r) {
      if (channels_ - full_ == r + 1) rows<r + 1>(full_, from, from_ld, to, to_ld);
    });
  }

 private:
  Mixer(int64_t channels, const T* weight, int64_t of_output, int64_t of_input)
      : channels_(channels), full_(channels / kRows * kRows), panels_(channels * channels), bias_(channels) {
    for (int64_t o = 0; o < channels; ++o) {
      const int64_t panel = o / kRows * kRows, rows = panel < full_ ? kRows : channels - full_;
      for (int64_t c = 0; c < channels; ++c)
        panels_[panel * channels + c * rows + o - panel] = weight[o * of_output + c * of_input];
    }
  }
  template <int R>
  void rows(int64_t o, const T* from, int64_t from_ld, T* to, int64_t to_ld) const {
    multiply<R>(panels_.data() + o * channels_, bias_.data() + o, channels_, from, from_ld, to + o * to_ld, to_ld);
  }

  int64_t channels_, full_;
  OwnVector<T> panels_, bias_;
};

// A tile of pixels [begin, end) of a tensor: where it lies whole in one image, it can be read and written in place.
template <class E>
struct Place {
  int64_t offset;
  bool whole;
  Place(const Pixels& at, int64_t begin, int64_t end) {
    constexpr int64_t kSize = kTile<ComputeType<E>>;
    const int64_t in_image = begin % at.size;
    offset = begin / at.size * at.channels * at.size + in_image;
    whole = std::is_same_v<E, ComputeType<E>> && end - begin == kSize && in_image + kSize <= at.size;
  }
};

// A tile of the result: of `from`, to y.
template <class E, class T = ComputeType<E>>
void mix_tile(const Mixer<T>& mixer, const T* from, int64_t from_ld, const Pixels& at, int64_t begin, int64_t end, E* y,
              T* scratch, NextTile<E>& next) {
  const Place<E> place(at, begin, end);
  if constexpr (std::is_same_v<E, T>)
    if (place.whole) return mixer.tile(from, from_ld, y + place.offset, at.size, next);
  mixer.tile(from, from_ld, scratch, kTile<T>, next);
  for (int64_t o = 0; o < at.channels; ++o)
    at.stretches(begin, end, [&](int64_t k, int64_t offset, int64_t n) {
      store_row(y + offset + o * at.size, scratch + o * kTile<T> + k, n);
    });
}

// y[b, o, p] = bias[o] + sum_c weight[o, c] x[b, c, p]
template <class E>
void mix(const Tensor& x, const Mixer<ComputeType<E>>& mixer, const Tensor& y) {
  using T = ComputeType<E>;
  const Pixels at(x);
  const int64_t channels = at.channels, tile = kTile<T>;
  // rows a multiple of 4 KB apart fall on few lines of the nearest cache: then they are brought together first
  const bool apart = at.size * static_cast<int64_t>(sizeof(T)) % 4096 != 0 || channels <= kRows;
  share((at.count() + tile - 1) / tile, [&](int64_t first, int64_t last) {
    OwnVector<T> in(channels * tile), out(channels * tile);
    for (int64_t begin = first * tile; begin < std::min(last * tile, at.count()); begin += tile) {
      const int64_t end = std::min(begin + tile, at.count());
      const Place<E> place(at, begin, end);
      const T* from = in.data();
      if constexpr (std::is_same_v<E, T>)
        if (place.whole && apart) from = data_of<E>(x) + place.offset;
      if (from == in.data()) gather(data_of<E>(x), at, begin, end, in.data(), tile);
      NextTile<E> next(data_of<E>(x), at, begin + tile);
      mix_tile(mixer, from, from == in.data() ? tile : at.size, at, begin, end, static_cast<E*>(y.data_ptr()),
               out.data(), next);
    }
  });
}

// sums[r][c] += sum over a tile of pixels of a[r][p] b[p][c], for R rows and V vectors of columns.
template <int R, int V, class T>
void multiply_transposed(const T* a, int64_t a_ld, const T* b, int64_t ld, T* sums) {
  Vec<T> sum[R][V];
  unroll<R>([&](auto r) FASTGEN_INLINE {
    unroll<V>([&](auto v) FASTGEN_INLINE { sum[r][v] = load(sums + r * ld + v * kLanes<T>); });
  });
  for (int64_t p = 0; p < kTile<T>; ++p) {
    Vec<T> of_b[V];
    unroll<V>([&](auto v) FASTGEN_INLINE { of_b[v] = load(b + p * ld + v * kLanes<T>); });
    unroll<R>([&](auto r) FASTGEN_INLINE {
      const Vec<T> of_a = splat(a[r * a_ld + p]);
      unroll<V>([&](auto v) FASTGEN_INLINE { sum[r][v] += of_a * of_b[v]; });
    });
  }
  unroll<R>([&](auto r) FASTGEN_INLINE {
    unroll<V>([&](auto v) FASTGEN_INLINE { store(sums + r * ld + v * kLanes<T>, sum[r][v]); });
  });
}

// The gradients of x, weight (O, C) and bias (O,) from that of the result, in one pass.
template <class E>
void mix_backward(const Tensor& grad, const Tensor& x, const ComputeType<E>* weight, const Tensor& grad_x,
                  ComputeType<E>* grad_weight, ComputeType<E>* grad_bias) {
  using T = ComputeType<E>;
  const Pixels at(x);
  const int64_t channels = at.channels, stretches = (at.count() + kStretch - 1) / kStretch;
  const int64_t groups = std::clamp(stretches, int64_t{1}, kGroups), tile = kTile<T>;
  const int64_t ld = round_up(channels, kLanes<T>), wide = kGradWide * kLanes<T>;
  const auto mixer = Mixer<T>::transposed(weight, channels);
  OwnVector<double> sums(groups * channels * (ld + 1));  // of a group: the weight's, the bias's
  share(groups, [&](int64_t first, int64_t last) {
    OwnVector<T> rows(ld * tile), columns(tile * ld), g(channels * tile), part(channels * ld), of_x(channels * tile),
        of_bias(channels * kLanes<T>);
    for (int64_t group = first; group < last; ++group) {
      double *to = sums.data() + group * channels * (ld + 1), *to_bias = to + channels * ld;
      for (int64_t i = group * stretches / groups; i < (group + 1) * stretches / groups; ++i) {
        const int64_t limit = std::min((i + 1) * kStretch, at.count());
        std::fill(part.begin(), part.end(), T(0));
        std::fill(of_bias.begin(), of_bias.end(), T(0));
        for (int64_t begin = i * kStretch; begin < limit; begin += tile) {
          const int64_t end = std::min(begin + tile, limit);
          const Place<E> place(at, begin, end);
          const T *from = rows.data(), *of_grad = g.data();
          if constexpr (std::is_same_v<E, T>) {
            if (place.whole) of_grad = data_of<E>(grad) + place.offset;
            if (place.whole && ld == channels) from = data_of<E>(x) + place.offset;
          }
          if (of_grad == g.data()) gather(data_of<E>(grad), at, begin, end, g.data(), tile);
          if (from == rows.data()) gather(data_of<E>(x), at, begin, end, rows.data(), tile);
          NextTile<E> next_grad(data_of<E>(grad), at, begin + tile), next_x(data_of<E>(x), at, begin + tile);
          const int64_t from_ld = from == rows.data() ? tile : at.size, grad_ld = of_grad == g.data() ? tile : at.size;
          mix_tile(mixer, of_grad, grad_ld, at, begin, end, static_cast<E*>(grad_x.data_ptr()), of_x.data(), next_grad);
          for (int64_t c = 0; c < ld; c += kLanes<T>)
            for (int64_t p = 0; p < tile; p += kLanes<T>)
              transpose_square(from + c * from_ld + p, from_ld, columns.data() + p * ld + c, ld);
          for (int64_t c = 0; c < ld; c += wide) {
            const auto block = [&](auto r, int64_t o) {
              const T *a = of_grad + o * grad_ld, *b = columns.data() + c;
              T* result = part.data() + o * ld + c;
              next_x.ask(r);
              if (ld - c >= wide)
                multiply_transposed<r, kGradWide>(a, grad_ld, b, ld, result);
              else
                multiply_transposed<r, 1>(a, grad_ld, b, ld, result);
            };
            int64_t o = 0;
            for (; o + kGradRows <= channels; o += kGradRows) block(std::integral_constant<int, kGradRows>{}, o);
            unroll<kGradRows - 1>([&](auto r) {
              if (channels - o == r + 1) block(std::integral_constant<int, r + 1>{}, o);
            });
          }
          for (int64_t o = 0; o < channels; ++o) {
            Vec<T> sum = load(&of_bias[o * kLanes<T>]);
            for (int64_t p = 0; p < tile; p += kLanes<T>) sum += load(of_grad + o * grad_ld + p);
            store(&of_bias[o * kLanes<T>], sum);
          }
        }
        for (int64_t o = 0; o < channels; ++o) to_bias[o] += sum_of_lanes<T>(load(&of_bias[o * kLanes<T>]));
        for (int64_t k = 0; k < channels * ld; ++k) to[k] += part[k];
      }
    }
  });
  const int64_t of_group = channels * (ld + 1);
  for (int64_t group = 1; group < groups; ++group)
    for (int64_t k = 0; k < of_group; ++k) sums[k] += sums[group * of_group + k];
  for (int64_t r = 0; r < channels; ++r) {
    std::copy_n(&sums[r * ld], channels, grad_weight + r * channels);
    grad_bias[r] = static_cast<T>(sums[channels * ld + r]);
  }
}

Tensor mix_channels(Tensor x, Tensor weight, Tensor bias) {
  Tensor y = fresh_like(x);
  dispatch_float(x.scalar_type(), "mix_channels", [&](auto zero) {
    using T = ComputeType<decltype(zero)>;
    mix<decltype(zero)>(x, Mixer<T>(data_of<T>(weight), data_of<T>(bias), x.size(1)), y);
  });
  return y;
}

// -> gradients of x, weight, bias.
std::tuple<Tensor, Tensor, Tensor> mix_channels_backward(Tensor grad, Tensor x, Tensor weight) {
  Tensor grad_x = fresh_like(x), grad_weight, grad_bias;
  dispatch_float(x.scalar_type(), "mix_channels", [&](auto zero) {
    using T = ComputeType<decltype(zero)>;
    grad_weight = torch::stable::new_empty(x, {x.size(1), x.size(1)}, kTypeOf<T>);
    grad_bias = torch::stable::new_empty(x, {x.size(1)}, kTypeOf<T>);
    mix_backward<decltype(zero)>(grad, x, data_of<T>(weight), grad_x, static_cast<T*>(grad_weight.data_ptr()),
                                 static_cast<T*>(grad_bias.data_ptr()));
  });
  return {grad_x, grad_weight, grad_bias};
}

// -> y, log_det (B,), and for the backward pass the matrix (C, C) that multiplied the pixels.
std::tuple<Tensor, Tensor, Tensor> invertible_conv1x1(Tensor x, Tensor lower, Tensor upper, Tensor log_diagonal,
                                                      Tensor sign, Tensor permutation, std::optional<Tensor> log_scale,
                                                      std::optional<Tensor> shift, bool inverse) {
  Tensor y = fresh_like(x), log_det, weight;
  dispatch_float(x.scalar_type(), "invertible_conv1x1", [&](auto zero) {
    using T = ComputeType<decltype(zero)>;
    const Factors<T> factors(lower, upper, log_diagonal, sign, permutation, log_scale, shift);
    weight = torch::stable::new_empty(x, {factors.n, factors.n}, kTypeOf<T>);
    log_det = torch::stable::new_empty(x, {x.size(0)}, kTypeOf<T>);
    auto* w = static_cast<T*>(weight.data_ptr());
    std::vector<T> bias(factors.n);
    inverse ? factors.assemble_inverse(w, bias.data()) : factors.assemble(w, bias.data());
    const T total = static_cast<T>(values_from(x, 2)) * factors.log_det;
    std::fill_n(static_cast<T*>(log_det.data_ptr()), x.size(0), inverse ? -total : total);
    mix<decltype(zero)>(x, Mixer<T>(w, bias.data(), factors.n), y);
  });
  return {y, log_det, weight};
}

// -> gradients of x, lower, upper, log_diagonal, log_scale, shift.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> invertible_conv1x1_backward(
    Tensor grad, Tensor grad_log_det, Tensor x, Tensor weight, Tensor lower, Tensor upper, Tensor log_diagonal,
    Tensor sign, Tensor permutation, std::optional<Tensor> log_scale, std::optional<Tensor> shift, bool inverse) {
  Tensor grad_x = fresh_like(x), matrices[2], vectors[3];
  dispatch_float(x.scalar_type(), "invertible_conv1x1", [&](auto zero) {
    using T = ComputeType<decltype(zero)>;
    const Factors<T> factors(lower, upper, log_diagonal, sign, permutation, log_scale, shift);
    const int64_t n = factors.n;
    for (auto& m : matrices) m = torch::stable::new_empty(x, {n, n}, kTypeOf<T>);
    for (auto& v : vectors) v = torch::stable::new_empty(x, {n}, kTypeOf<T>);
    const auto data = [](const Tensor& t) { return static_cast<T*>(t.data_ptr()); };
    const FactorGrads<T> to{data(matrices[0]), data(matrices[1]), data(vectors[0]), data(vectors[1]), data(vectors[2])};
    std::vector<T> grad_weight(n * n), grad_bias(n);
    const T* w = data_of<T>(weight);
    mix_backward<decltype(zero)>(grad, x, w, grad_x, grad_weight.data(), grad_bias.data());
    const T* g = data_of<T>(grad_log_det);
    double total = 0;
    for (int64_t b = 0; b < x.size(0); ++b) total += g[b];
    const T of_log_det = static_cast<T>(total * static_cast<double>(values_from(x, 2)));
    if (inverse)
      assemble_inverse_backward(factors, grad_weight.data(), grad_bias.data(), of_log_det, to);
    else
      assemble_backward(factors, w, grad_weight.data(), grad_bias.data(), of_log_det, to);
  });
  return {grad_x, matrices[0], matrices[1], vectors[0], vectors[1], vectors[2]};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("mix_channels", TORCH_BOX(&fastgen::mix_channels));
  m.impl("mix_channels_backward", TORCH_BOX(&fastgen::mix_channels_backward));
  m.impl("invertible_conv1x1", TORCH_BOX(&fastgen::invertible_conv1x1));
  m.impl("invertible_conv1x1_backward", TORCH_BOX(&fastgen::invertible_conv1x1_backward));
}
