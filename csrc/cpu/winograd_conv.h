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

// Products of images and a weight, by one thread.
template <Kind K, class T>
class Product {
 public:
  using Of = Form<K>;
  // packed: the weight at the points.
  Product(const TileRows<K>& rows, int64_t width, const Weights<K, T>& weights, const T* packed)
      : rows_(rows),
        weights_(weights),
        packed_(packed),
        at_once_(rows.template at_once<T>(weights.depth())),
        patches_(rows, width, weights.depth(), at_once_),
        results_(rows, at_once_) {}

  // The rows of tiles [begin, end).
  template <class E>
  void run(const Planes<E>& from, const Results<E>& to, int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += at_once_) {
      const int64_t last = std::min(first + at_once_, end);
      patches_.fill(from, first, last);
      for (int64_t panel = 0; panel < weights_.panels().count(); ++panel) {
        multiply(panel, (last - first) * rows_.across());
        for (int64_t row = first; row < last; ++row)
          results_.write(to, weights_.panels(), panel, row, (row - first) * rows_.across());
      }
    }
  }

 private:
  void multiply(int64_t panel, int64_t tiles) {
    const int64_t vectors = weights_.panels().vectors(panel), lanes = vectors * kLanes<T>;
    const T* w = packed_ + weights_.panel(panel);
    for (int64_t i = 0; i < Of::kOutPhases * Of::kPoints; ++i)
      for_each_group(tiles, [&](int64_t tile, int64_t count) {
        Stretch<T> stretches[Of::kInPhases];
        for (int64_t phase = 0; phase < Of::kInPhases; ++phase)
          stretches[phase] = {patches_.at(phase, i % Of::kPoints, tile),
                              w + (phase * Of::kPoints + i) * weights_.matrix(panel), weights_.depth()};
        multiply_rows_of<T, false>(count, vectors)(results_.at(i) + tile * lanes, stretches, Of::kInPhases,
                                                   patches_.stride(), true);
      });
  }

  TileRows<K> rows_;
  Weights<K, T> weights_;
  const T* packed_;
  int64_t at_once_;
  Patches<K, T> patches_;
  ResultTiles<K, T> results_;
};

// to = from convolved with a weight.
template <Kind K, class T, class E>
void winograd_product(const Planes<E>& from, const Weights<K, T>& weights, const E* weight, const Results<E>& to) {
  const TileRows<K> rows{from.batch, to.height, to.width};
  const RawVector<T> packed = weights.at_points(weight);
  share(rows.count(), [&](int64_t begin, int64_t end) {
    Product<K, T>(rows, from.width, weights, packed.data()).run(from, to, begin, end);
  });
}

// The gradient of a weight at the points, summed by one thread. Some channels at a time, so that their sums and patches
// of many tiles stay in a cache.
template <Kind K, class T>
class WeightGradient {
 public:
  using Of = Form<K>;
  WeightGradient(const TileRows<K>& rows, int64_t width, const Weights<K, T>& weights, RawVector<T>& total)
      : rows_(rows),
        weights_(weights),
        blocks_((weights.second + kMost - 1) / kMost),
        at_once_(rows.template at_once<T>(most())),
        patches_(rows, width, most(), at_once_),
        gradients_(rows, at_once_),
        total_(total) {
    total_.resize(weights.size());
  }

  // Adds that of the rows of tiles [begin, end); row_sums: sums of each row's gradients.
  template <class E>
  void add(const Planes<E>& images, const Planes<E>& sums, int64_t begin, int64_t end, T* row_sums) {
    for (int64_t block = 0; block < blocks_; ++block) {
      Planes<E> some = images;
      some.first = block * images.channels / blocks_;
      some.count = (block + 1) * images.channels / blocks_ - some.first;
      for (int64_t first = begin; first < end; first += at_once_) {
        const int64_t last = std::min(first + at_once_, end);
        patches_.fill(some, first, last);
        for (int64_t panel = 0; panel < weights_.panels().count(); ++panel) {
          fill_panel(sums, panel, first, last, row_sums);
          multiply(some, panel, (last - first) * rows_.across(), empty_ && first == begin);
        }
      }
    }
    empty_ = false;
  }

 private:
  static constexpr int64_t kL = kLanes<T>, kMost = 128 / Of::kInPhases;
  int64_t most() const { return (weights_.second + blocks_ - 1) / blocks_; }

  template <class E>
  void fill_panel(const Planes<E>& sums, int64_t panel, int64_t first, int64_t last, T* row_sums) {
    const Panels<T> panels = weights_.panels();
    for (int64_t v = 0; v < panels.vectors(panel); ++v)
      for (int64_t row = first; row < last; ++row)
        store(row_sums + row * panels.lanes() + panels.begin(panel) + v * kL,
              gradients_.fill(sums, row, panels.first(panel, v), (row - first) * rows_.across(), v * kL,
                              panels.width(panel)));
  }

  template <class E>
  void multiply(const Planes<E>& some, int64_t panel, int64_t tiles, bool fresh) {
    const int64_t vectors = weights_.panels().vectors(panel), lanes = vectors * kL;
    T* sum = total_.data() + weights_.panel(panel) + some.first * lanes;
    for (int64_t i = 0; i < Of::kInPhases * Of::kPoints; ++i, sum += weights_.matrix(panel))
      for_each_group(some.count, [&](int64_t c, int64_t count) {
        const Stretch<T> stretch{patches_.at(i / Of::kPoints, i % Of::kPoints, 0) + c, gradients_.at(i % Of::kPoints),
                                 tiles};
        multiply_rows_of<T, true>(count, vectors)(sum + c * lanes, &stretch, tiles ? 1 : 0, patches_.stride(), fresh);
      });
  }

  TileRows<K> rows_;
  Weights<K, T> weights_;
  int64_t blocks_, at_once_;
  Patches<K, T> patches_;
  SumGradientTiles<K, T> gradients_;
  RawVector<T>& total_;
  bool empty_ = true;
};

// The gradients of what is added to the sums, from those of rows of tiles.
template <Kind K, class T, class E>
void bias_gradients(const TileRows<K>& rows, const Panels<T>& panels, const RawVector<T>& row_sums,
                    const ConvGradients<T, E>& out) {
  if (out.bias) std::fill_n(out.bias, panels.rows, T(0));
  for (int64_t b = 0; b < rows.batch; ++b)
    for (int64_t o = 0; o < panels.rows; ++o) {
      T sum = 0;
      for (int64_t row = b * rows.down(); row < (b + 1) * rows.down(); ++row) sum += row_sums[row * panels.lanes() + o];
      if (out.bias) out.bias[o] += sum;
      if (out.image_cond) out.image_cond[b * panels.rows + o] = sum;
    }
}

// The gradients of a weight (sums, images, width, width) and of what is added to the sums; not those of x.
template <Kind K, class T, class E>
void winograd_gradient(const Planes<E>& images, const Planes<E>& sums, const ConvGradients<T, E>& out) {
  const TileRows<K> rows{sums.batch, sums.height, sums.width};
  const Weights<K, T> weights{sums.channels, images.channels};
  const int64_t workers = std::min<int64_t>(rows.count(), torch::stable::get_num_threads());
  std::vector<RawVector<T>> totals(workers);
  RawVector<T> row_sums(rows.count() * weights.panels().lanes());
  for_each_worker(workers, [&](int64_t worker) {
    WeightGradient<K, T>(rows, images.width, weights, totals[worker])
        .add(images, sums, worker * rows.count() / workers, (worker + 1) * rows.count() / workers, row_sums.data());
  });
  weights.from_points(totals, out.weight);
  bias_gradients(rows, weights.panels(), row_sums, out);
}

// The gradients of the sums before a gate of one image, from those of its results.
template <class T>
void gate_gradients(const T* grad, const T* sums, int64_t half, T* to) {
  by_vectors<T>(half, [&](int64_t i, auto n) {
    Vec<T> t, g;
    gate_parts(take(sums + i, n), take(sums + half + i, n), t, g);
    const Vec<T> left = take(grad + i, n) * g;
    put(to + i, left * (T(1) - t * t), n);
    put(to + half + i, left * t * (T(1) - g), n);
  });
}

// All gradients of a gated convolution, for some images at a time, whose gradients of the sums stay in a cache.
template <Kind K, Kind Back, class T>
void winograd_gate_backward(const ConvShape& s, const ConvTensors<T>& in, const T* grad, const T* kept,
                            const ConvGradients<T, T>& out) {
  const TileRows<K> rows{s.batch, s.height, s.width};
  const Weights<K, T> weights{s.outs, s.channels};
  const Weights<Back, T> back{s.outs, s.channels, true};
  const RawVector<T> packed = out.x ? back.at_points(in.weight) : RawVector<T>();
  const int64_t plane = s.height * s.width, workers = std::min<int64_t>(s.batch, torch::stable::get_num_threads());
  const int64_t group = std::max<int64_t>(1, rows.template at_once<T>(s.channels) / rows.down());
  std::vector<RawVector<T>> totals(workers);
  RawVector<T> row_sums(rows.count() * weights.panels().lanes());
  for_each_worker(workers, [&](int64_t worker) {
    const TileRows<K> some{group, s.height, s.width};
    const TileRows<Back> some_back{group, s.height, s.width};
    RawVector<T> room(out.cond ? 0 : group * s.outs * plane);
    WeightGradient<K, T> of_weight(some, s.width, weights, totals[worker]);
    std::optional<Product<Back, T>> of_x;
    if (out.x) of_x.emplace(some_back, s.width, back, packed.data());
    const int64_t end = (worker + 1) * s.batch / workers;
    for (int64_t b = worker * s.batch / workers; b < end; b += group) {
      const int64_t count = std::min(group, end - b), down = rows.down();
      T* const sums = out.cond ? out.cond + b * s.outs * plane : room.data();
      for (int64_t i = 0; i < count; ++i)
        gate_gradients(grad + (b + i) * s.results() * plane, kept + (b + i) * s.outs * plane, s.results() * plane,
                       sums + i * s.outs * plane);
      const Planes<T> images{in.x + b * s.channels * plane, nullptr, count, s.channels, s.height, s.width};
      const Planes<T> gradients{sums, nullptr, count, s.outs, s.height, s.width};
      of_weight.add(images, gradients, 0, count * down, row_sums.data() + b * down * weights.panels().lanes());
      if (!of_x) continue;
      of_x->run(gradients, Results<T>{out.x + b * s.channels * plane, nullptr, s.height, s.width}, 0,
                count * some_back.down());
    }
  });
  weights.from_points(totals, out.weight);
  bias_gradients(rows, weights.panels(), row_sums, out);
}

// f.operator()<Kind, Kind of the gradient of x>() for a convolution that has one, and suits: of few channels the
// transforms take longer than what they save, and a row of tiles must not leave the caches. Returns whether it did.
template <class T, class F>
bool with_winograd(const ConvShape& s, F&& f) {
  const bool halves = !s.gated() || s.outs / 2 % kLanes<T> == 0;
  constexpr int64_t kFewChannels = 4, kMostBytes = 4 << 20, kPointsOfPixel = 8, kPanel = 2 * kLanes<T>;
  const int64_t row = s.width * kPointsOfPixel * static_cast<int64_t>(sizeof(T)) * (s.channels + kPanel);
  if (s.batch * s.height * s.width == 0) return false;
  if (s.channels < kFewChannels || row > kMostBytes || s.kernel_h != 3 || s.kernel_w != 3 || !halves) return false;
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

// kept: the results of a ReLU, or the sums before a gate.
template <class T>
bool winograd_backward(const ConvShape& s, const ConvTensors<T>& in, const T* grad, const T* kept,
                       const ConvGradients<T, T>& out) {
  const int64_t threads = torch::stable::get_num_threads();
  if (s.gated() && s.batch % threads && s.batch < 4 * threads) return false;  // threads would wait for one another
  return with_winograd<T>(s, [&]<Kind K, Kind Back>() {
    if (s.gated()) return winograd_gate_backward<K, Back>(s, in, grad, kept, out);
    const Planes<T> images{in.x, nullptr, s.batch, s.channels, s.height, s.width};
    const Planes<T> sums{grad, kept, s.batch, s.outs, s.height, s.width};
    if (out.x)
      winograd_product(sums, Weights<Back, T>{s.outs, s.channels, true}, in.weight,
                       Results<T>{out.x, nullptr, s.height, s.width});
    winograd_gradient<K>(images, sums, out);
  });
}

}  // namespace
}  // namespace fastgen
