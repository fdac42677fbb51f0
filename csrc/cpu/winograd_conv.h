// Convolutions by the transforms of winograd.h: for some rows of tiles at a time the patches at their points, and for
// each panel of two vectors of results a product of matrices for each point, all of which stay in the second-level
// cache.
#pragma once

#include "winograd.h"

namespace fastgen {
namespace {

// Of fewer channels the transforms take longer than what they save.
inline bool suits_winograd(const ConvShape& s) {
  return s.kernel_h == 3 && s.kernel_w == 3 && s.mask == Mask::kNone && s.channels >= 4;
}

// to (B, channels, H, W) = from convolved with a weight.
template <Resize R, class T, class E>
void winograd_product(const Planes<E>& from, const Weights<R, T>& weights, const E* weight, const E* bias, bool relu,
                      E* to, int64_t height, int64_t width) {
  using Of = Form<R>;
  constexpr int64_t kL = kLanes<T>, kBefore = Of::kOut - 1;  // pixels of a tile's lines before the image
  const TileRows<R> rows{from.batch, height, width};
  const RawVector<T> packed = weights.at_points(weight);
  const Panels<T> panels = weights.panels();
  const int64_t at_once = rows.template at_once<T>(from.count), plane = height * width;
  share(rows.count(), [&](int64_t begin, int64_t end) {
    Patches<R, T> patches(rows, from.width, from.count, at_once);
    const int64_t point_size = apart<T>(at_once * rows.across() * 2 * kL);
    RawVector<T> products(Of::kOutPhases * kPoints * point_size);
    RowTile<T> line(width);
    const int64_t line_size = std::max(line.padded() + kBefore, rows.across() * Of::kOutputs * Of::kOut) * kL;
    OwnVector<T> results(Of::kOutputs * Of::kOut * line_size);

    // A vector of results of a row of tiles, from the products.
    const auto write_row = [&](int64_t row, const T* at, int64_t lanes, Vec<T> added, int64_t channel, int64_t live) {
      for (int64_t phase = 0; phase < Of::kOutPhases; ++phase)
        for (int64_t i = 0; i < rows.across(); ++i) {
          Vec<T> m[kSide][kSide], y[Of::kOutputs][Of::kOutputs];
          const T* tile = at + phase * kPoints * point_size + i * lanes;
          unroll<kPoints>([&](auto p) FASTGEN_INLINE { m[p / kSide][p % kSide] = load(tile + p * point_size); });
          both_sides(m, y, [](const auto& points, auto& out) FASTGEN_INLINE { outputs_from_points(points, out); });
          T* const first =
              results.data() + phase / Of::kOut * line_size + (i * Of::kOutputs * Of::kOut + phase % Of::kOut) * kL;
          unroll<Of::kOutputs * Of::kOutputs>([&](auto o) FASTGEN_INLINE {
            constexpr int kRow = o / Of::kOutputs, kColumn = o % Of::kOutputs;
            const Vec<T> sum = y[kRow][kColumn] + added;
            store(first + kRow * Of::kOut * line_size + kColumn * Of::kOut * kL, relu ? positive_part(sum) : sum);
          });
        }
      const int64_t top = rows.top(row) * Of::kOut - kBefore;
      for (int64_t y = std::max<int64_t>(top, 0); y < std::min<int64_t>(top + Of::kOutputs * Of::kOut, height); ++y) {
        line.from_tile(results.data() + (y - top) * line_size + kBefore * kL, kL);
        line.write(to + (rows.image(row) * panels.rows + channel) * plane + y * width, plane, live);
      }
    };

    for (int64_t first = begin; first < end; first += at_once) {
      const int64_t last = std::min(first + at_once, end);
      patches.fill(from, first, last);
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int64_t vectors = panels.vectors(panel), lanes = vectors * kL, matrix = weights.matrix(panel);
        const T* w = packed.data() + weights.panel(panel);
        for (int64_t i = 0; i < Of::kOutPhases * kPoints; ++i)
          for_each_group((last - first) * rows.across(), [&](int64_t tile, int64_t count) {
            Stretch<T> stretches[Of::kInPhases];
            for (int64_t phase = 0; phase < Of::kInPhases; ++phase)
              stretches[phase] = {patches.at(phase, i % kPoints, tile), w + (phase * kPoints + i) * matrix, from.count};
            multiply_rows_of<T, false>(count, vectors)(products.data() + i * point_size + tile * lanes, stretches,
                                                       Of::kInPhases, patches.stride(), true);
          });
        for (int64_t v = 0; v < vectors; ++v) {
          const int64_t channel = panels.first(panel, v), live = panels.live(panel, v);
          Vec<T> added = {};
          for (int64_t i = 0; bias && i < live; ++i) added[i] = static_cast<T>(bias[channel + i]);
          for (int64_t row = first; row < last; ++row)
            write_row(row, products.data() + (row - first) * rows.across() * lanes + v * kL, lanes, added, channel,
                      live);
        }
      }
    }
  });
}

// The gradient of a weight (results, images, kernel, kernel), and of a bias unless that is null.
template <Resize R, class T, class E>
void winograd_gradient(const Planes<E>& images, const Planes<E>& gradients, T* weight, T* bias) {
  using Of = Form<R>;
  // Some channels at a time, so that their sums and patches of many tiles stay in a cache.
  constexpr int64_t kL = kLanes<T>, kMost = 128 / Of::kInPhases;
  const TileRows<R> rows{gradients.batch, gradients.height, gradients.width};
  const Weights<R, T> weights{gradients.channels, images.channels};
  const Panels<T> panels = weights.panels();
  const int64_t blocks = (images.channels + kMost - 1) / kMost, most = (images.channels + blocks - 1) / blocks;
  const int64_t at_once = rows.template at_once<T>(most);
  const int64_t workers = std::min<int64_t>(rows.count(), torch::stable::get_num_threads());
  std::vector<RawVector<T>> weight_sums(workers);
  std::vector<OwnVector<T>> bias_sums(workers);
  for_each_worker(workers, [&](int64_t worker) {
    Patches<R, T> patches(rows, images.width, most, at_once);
    ResultGradients<R, T> results(rows, at_once);
    weight_sums[worker].resize(weights.size());
    OwnVector<T>& totals = bias_sums[worker];
    const int64_t begin = worker * rows.count() / workers, end = (worker + 1) * rows.count() / workers;
    for (int64_t block = 0; block < blocks; ++block) {
      Planes<E> some = images;
      some.first = block * images.channels / blocks;
      some.count = (block + 1) * images.channels / blocks - some.first;
      totals.assign(panels.lanes(), T(0));
      for (int64_t first = begin; first < end; first += at_once) {
        const int64_t last = std::min(first + at_once, end), tiles = (last - first) * rows.across();
        patches.fill(some, first, last);
        for (int64_t panel = 0; panel < panels.count(); ++panel) {
          const int64_t vectors = panels.vectors(panel), lanes = vectors * kL;
          for (int64_t v = 0; v < vectors; ++v) {
            T* total = totals.data() + panels.begin(panel) + v * kL;
            store(total, load(total) + results.fill(gradients, panels.first(panel, v), v * kL, lanes, first, last));
          }
          T* sum = weight_sums[worker].data() + weights.panel(panel) + some.first * lanes;
          for (int64_t i = 0; i < Of::kInPhases * kPoints; ++i, sum += weights.matrix(panel))
            for_each_group(some.count, [&](int64_t c, int64_t count) {
              const Stretch<T> stretch{patches.at(i / kPoints, i % kPoints, 0) + c, results.at(i % kPoints), tiles};
              multiply_rows_of<T, true>(count, vectors)(sum + c * lanes, &stretch, 1, patches.stride(), first == begin);
            });
        }
      }
    }
  });
  weights.from_points(weight_sums, weight);
  if (!bias) return;
  std::fill_n(bias, gradients.channels, T(0));
  for (const OwnVector<T>& totals : bias_sums)
    for (int64_t o = 0; o < gradients.channels; ++o) bias[o] += totals[o];
}

template <class T, class E>
void winograd_forward(const ConvShape& s, const ConvTensors<E>& in, E* out) {
  const Planes<E> from{in.x, nullptr, s.batch, s.channels, s.height, s.width};
  winograd_product(from, Weights<Resize::kSame, T>{s.outs, s.channels}, in.weight, in.bias,
                   s.activation == Activation::kRelu, out, s.height, s.width);
}

// kept: the results of a ReLU.
template <class T, class E>
void winograd_backward(const ConvShape& s, const ConvTensors<E>& in, const E* grad, const E* kept,
                       const ConvGradients<T, E>& out) {
  const Planes<E> gradients{grad, kept, s.batch, s.outs, s.height, s.width};
  const Planes<E> images{in.x, nullptr, s.batch, s.channels, s.height, s.width};
  if (out.x)
    winograd_product(gradients, Weights<Resize::kSame, T>{s.outs, s.channels, true}, in.weight,
                     static_cast<const E*>(nullptr), false, out.x, s.height, s.width);
  winograd_gradient<Resize::kSame>(images, gradients, out.weight, out.bias);
}

}  // namespace
}  // namespace fastgen
