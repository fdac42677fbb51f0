// Convolutions by the transforms of winograd.h: for some rows of tiles at a time the patches at their points, and for
// each panel of two vectors of results a product of matrices for each point, all of which stay in the second-level
// cache.
#pragma once

#include "winograd_tiles.h"

namespace fastgen {
namespace {

// What becomes of the sums of a convolution.
template <class E>
struct Results {
  E *values, *sums;  // sums: those before a gate, unless null
  int64_t height, width;
  const E* bias = nullptr;
  Activation activation = Activation::kNone;
  const E* cond = nullptr;
  bool cond_constant = false;
};

// A row of tiles of one panel of results, from the products at the points.
template <Kind K, class T>
class ResultTiles {
 public:
  using Of = Form<K>;
  static constexpr int64_t kL = kLanes<T>, kBefore = Of::kOut - 1;  // pixels of a tile's lines before the image

  ResultTiles(const TileRows<K>& rows, int64_t at_once)
      : rows_(rows),
        line_(rows.width),
        line_size_(std::max(line_.padded() + kBefore, rows.across() * Of::kResultsX * Of::kOut) * kL),
        point_size_(apart<T>(at_once * rows.across() * 2 * kL)),
        pixels_(2 * kLinesOf * line_size_),
        products_(Of::kOutPhases * Of::kPoints * point_size_) {}

  // Products of a phase and point, of all tiles.
  T* at(int64_t point) { return products_.data() + point * point_size_; }

  // `tile`: the first of the row, in the products.
  template <class E>
  void write(const Results<E>& to, const Panels<T>& panels, int64_t panel, int64_t row, int64_t tile) {
    const int64_t vectors = panels.vectors(panel), plane = to.height * to.width, image = rows_.image(row);
    const bool gated = to.activation == Activation::kGate;
    for (int64_t v = 0; v < vectors; ++v) {
      Vec<T> added = {};
      for (int64_t i = 0; i < panels.live(panel, v); ++i) {
        const int64_t channel = panels.first(panel, v) + i;
        if (to.bias) added[i] = static_cast<T>(to.bias[channel]);
        if (to.cond && to.cond_constant) added[i] += static_cast<T>(to.cond[image * panels.rows + channel]);
      }
      for (int64_t phase = 0; phase < Of::kOutPhases; ++phase)
        transform(products_.data() + phase * Of::kPoints * point_size_ + tile * vectors * kL + v * kL, vectors * kL,
                  phase, v, added, to.activation == Activation::kRelu);
    }
    const int64_t top = rows_.top(row) * Of::kOut - kBefore;
    for (int64_t y = std::max<int64_t>(top, 0); y < std::min<int64_t>(top + kLinesOf, to.height); ++y) {
      const auto put = [&](E* images, int64_t channels, int64_t channel, const T* pixels, int64_t live) {
        line_.from_tile(pixels, kL);
        line_.write(images + (image * channels + channel) * plane + y * to.width, plane, live);
      };
      E* const raw = gated ? to.sums : to.values;  // the sums, where they are wanted
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t channel = panels.first(panel, v), live = panels.live(panel, v);
        if (to.cond && !to.cond_constant) {
          line_.read(to.cond + (image * panels.rows + channel) * plane + y * to.width, plane, live);
          line_.add_to_tile(pixels(v, y - top), kL);
        }
        if (raw) put(raw, panels.rows, channel, pixels(v, y - top), live);
      }
      if (!gated) continue;
      T *const tanh_half = pixels(0, y - top), *const sigmoid_half = pixels(1, y - top);
      for (int64_t i = 0; i < to.width * kL; i += kL)
        store(tanh_half + i, gate(load(tanh_half + i), load(sigmoid_half + i)));
      put(to.values, panels.rows / 2, panel * kL, tanh_half, panels.live(panel, 0));
    }
  }

 private:
  static constexpr int64_t kLinesOf = Of::kResultsY * Of::kOut;  // a row of tiles
  T* pixels(int64_t v, int64_t line) { return pixels_.data() + (v * kLinesOf + line) * line_size_ + kBefore * kL; }

  void transform(const T* from, int64_t lanes, int64_t phase, int64_t v, Vec<T> added, bool relu) {
    T* to = pixels(v, phase / Of::kOut) + (phase % Of::kOut - kBefore) * kL;
    for (int64_t i = 0; i < rows_.across(); ++i, from += lanes, to += Of::kResultsX * Of::kOut * kL) {
      Vec<T> m[Of::kPoints], y[Of::kResultsY * Of::kResultsX];
      unroll<Of::kPoints>([&](auto p) FASTGEN_INLINE { m[p] = load(from + p * point_size_); });
      Of::results_from(m, y);
      unroll<Of::kResultsY * Of::kResultsX>([&](auto r) FASTGEN_INLINE {
        const Vec<T> sum = y[r] + added;
        T* pixel = to + r / Of::kResultsX * Of::kOut * line_size_ + r % Of::kResultsX * Of::kOut * kL;
        store(pixel, relu ? positive_part(sum) : sum);
      });
    }
  }

  TileRows<K> rows_;
  RowTile<T> line_;
  int64_t line_size_, point_size_;
  OwnVector<T> pixels_;
  RawVector<T> products_;
};

// to = from convolved with a weight.
template <Kind K, class T, class E>
void winograd_product(const Planes<E>& from, const Weights<K, T>& weights, const E* weight, const Results<E>& to) {
  using Of = Form<K>;
  const TileRows<K> rows{from.batch, to.height, to.width};
  const RawVector<T> packed = weights.at_points(weight);
  const Panels<T> panels = weights.panels();
  const int64_t at_once = rows.template at_once<T>(from.count);
  share(rows.count(), [&](int64_t begin, int64_t end) {
    Patches<K, T> patches(rows, from.width, from.count, at_once);
    ResultTiles<K, T> results(rows, at_once);
    for (int64_t first = begin; first < end; first += at_once) {
      const int64_t last = std::min(first + at_once, end);
      patches.fill(from, first, last);
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int64_t vectors = panels.vectors(panel), lanes = panels.width(panel), matrix = weights.matrix(panel);
        const T* w = packed.data() + weights.panel(panel);
        for (int64_t i = 0; i < Of::kOutPhases * Of::kPoints; ++i)
          for_each_group((last - first) * rows.across(), [&](int64_t tile, int64_t count) {
            Stretch<T> stretches[Of::kInPhases];
            for (int64_t phase = 0; phase < Of::kInPhases; ++phase)
              stretches[phase] = {patches.at(phase, i % Of::kPoints, tile), w + (phase * Of::kPoints + i) * matrix,
                                  from.count};
            multiply_rows_of<T, false>(count, vectors)(results.at(i) + tile * lanes, stretches, Of::kInPhases,
                                                       patches.stride(), true);
          });
        for (int64_t row = first; row < last; ++row)
          results.write(to, panels, panel, row, (row - first) * rows.across());
      }
    }
  });
}

// The gradients of a weight (sums, images, width, width) and of what is added to the sums; not those of x.
template <Kind K, class T, class E>
void winograd_gradient(const Planes<E>& images, const Planes<E>& sums, const ConvGradients<T, E>& out) {
  using Of = Form<K>;
  // Some channels at a time, so that their sums and patches of many tiles stay in a cache.
  constexpr int64_t kL = kLanes<T>, kMost = 128 / Of::kInPhases;
  const TileRows<K> rows{sums.batch, sums.height, sums.width};
  const Weights<K, T> weights{sums.channels, images.channels};
  const Panels<T> panels = weights.panels();
  const int64_t blocks = (images.channels + kMost - 1) / kMost, most = (images.channels + blocks - 1) / blocks;
  const int64_t at_once = rows.template at_once<T>(most);
  const int64_t workers = std::min<int64_t>(rows.count(), torch::stable::get_num_threads());
  std::vector<RawVector<T>> weight_sums(workers);
  RawVector<T> row_sums(rows.count() * panels.lanes());
  for_each_worker(workers, [&](int64_t worker) {
    Patches<K, T> patches(rows, images.width, most, at_once);
    SumGradientTiles<K, T> gradients(rows, at_once);
    weight_sums[worker].resize(weights.size());
    const int64_t begin = worker * rows.count() / workers, end = (worker + 1) * rows.count() / workers;
    for (int64_t block = 0; block < blocks; ++block) {
      Planes<E> some = images;
      some.first = block * images.channels / blocks;
      some.count = (block + 1) * images.channels / blocks - some.first;
      for (int64_t first = begin; first < end; first += at_once) {
        const int64_t last = std::min(first + at_once, end), tiles = (last - first) * rows.across();
        patches.fill(some, first, last);
        for (int64_t panel = 0; panel < panels.count(); ++panel) {
          const int64_t vectors = panels.vectors(panel), lanes = vectors * kL;
          for (int64_t v = 0; v < vectors; ++v)
            for (int64_t row = first; row < last; ++row)
              store(row_sums.data() + row * panels.lanes() + panels.begin(panel) + v * kL,
                    gradients.fill(sums, row, panels.first(panel, v), (row - first) * rows.across(), v * kL, lanes));
          T* sum = weight_sums[worker].data() + weights.panel(panel) + some.first * lanes;
          for (int64_t i = 0; i < Of::kInPhases * Of::kPoints; ++i, sum += weights.matrix(panel))
            for_each_group(some.count, [&](int64_t c, int64_t count) {
              const Stretch<T> stretch{patches.at(i / Of::kPoints, i % Of::kPoints, 0) + c,
                                       gradients.at(i % Of::kPoints), tiles};
              multiply_rows_of<T, true>(count, vectors)(sum + c * lanes, &stretch, 1, patches.stride(), first == begin);
            });
        }
      }
    }
  });
  weights.from_points(weight_sums, out.weight);
  if (out.bias) std::fill_n(out.bias, sums.channels, T(0));
  for (int64_t b = 0; b < sums.batch; ++b)
    for (int64_t o = 0; o < sums.channels; ++o) {
      T sum = 0;
      for (int64_t row = b * rows.down(); row < (b + 1) * rows.down(); ++row) sum += row_sums[row * panels.lanes() + o];
      if (out.bias) out.bias[o] += sum;
      if (out.image_cond) out.image_cond[b * sums.channels + o] = sum;
    }
}

// f.operator()<Kind, Kind of the gradient of x>() for a convolution that has one, and suits: of fewer channels the
// transforms take longer than what they save. Returns whether it did.
template <class T, class F>
bool with_winograd(const ConvShape& s, F&& f) {
  const bool halves = !s.gated() || s.outs / 2 % kLanes<T> == 0;
  if (s.channels < 4 || s.kernel_h != 3 || s.kernel_w != 3 || !halves) return false;
  if (s.mask == Mask::kNone) {
    f.template operator()<Kind::kSame, Kind::kSame>();
  } else if (s.mask == Mask::kVerticalB) {
    f.template operator()<Kind::kAbove, Kind::kBelow>();
  } else if (s.mask == Mask::kB && s.colors == 1) {
    f.template operator()<Kind::kRaster, Kind::kRasterBack>();
  } else {
    return false;
  }
  return true;
}

template <class T, class E>
bool winograd_forward(const ConvShape& s, const ConvTensors<E>& in, E* out, E* kept) {
  const Planes<E> from{in.x, nullptr, s.batch, s.channels, s.height, s.width};
  const Results<E> to{out, kept, s.height, s.width, in.bias, s.activation, in.cond, in.cond_constant};
  return with_winograd<T>(s, [&]<Kind K, Kind Back>() {
    winograd_product(from, Weights<K, T>{s.outs, s.channels, false, s.gated()}, in.weight, to);
  });
}

// The gradients of the sums before a gate, from those of its results.
template <class T>
void gate_gradients(const ConvShape& s, const T* grad, const T* sums, T* to) {
  const int64_t half = s.results(), plane = s.height * s.width;
  share(s.batch * half, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tanh_half = (i / half * s.outs + i % half) * plane, sigmoid_half = tanh_half + half * plane;
      by_vectors<T>(plane, [&](int64_t x, auto n) {
        Vec<T> t, g;
        gate_parts(take(sums + tanh_half + x, n), take(sums + sigmoid_half + x, n), t, g);
        const Vec<T> left = take(grad + i * plane + x, n) * g;
        put(to + tanh_half + x, left * (T(1) - t * t), n);
        put(to + sigmoid_half + x, left * t * (T(1) - g), n);
      });
    }
  });
}

// kept: the results of a ReLU, or the sums before a gate, whose gradients need room where those of conditioning are not
// wanted: of the dtype of `like`.
template <class T>
bool winograd_backward(const ConvShape& s, const ConvTensors<T>& in, const T* grad, const T* kept,
                       const ConvGradients<T, T>& out, const Tensor& like) {
  return with_winograd<T>(s, [&]<Kind K, Kind Back>() {
    const Planes<T> images{in.x, nullptr, s.batch, s.channels, s.height, s.width};
    Planes<T> sums{grad, kept, s.batch, s.outs, s.height, s.width};
    std::optional<Tensor> room;
    if (s.gated()) {
      T* to = out.cond;
      if (!to) to = static_cast<T*>(room.emplace(fresh(like, {s.batch * s.outs * sums.size()})).data_ptr());
      gate_gradients(s, grad, kept, to);
      sums.values = to;
      sums.relu = nullptr;
    }
    if (out.x)
      winograd_product(sums, Weights<Back, T>{s.outs, s.channels, true}, in.weight,
                       Results<T>{out.x, nullptr, s.height, s.width});
    winograd_gradient<K>(images, sums, out);
  });
}

}  // namespace
}  // namespace fastgen
