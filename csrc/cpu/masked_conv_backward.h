// The gradients of masked convolutions; layouts and the forward pass are in masked_conv.h.
#pragma once

#include "masked_conv.h"

namespace fastgen {
namespace {

// Gradients in the compute type, but x and cond in the tensors'. Null where not wanted.
template <class T, class E>
struct ConvGradients {
  E *x, *cond;
  T *weight, *bias, *image_cond;  // image_cond: (B, outs), of conditioning that is constant over an image
};

// Weights for the gradient of x: [panel of inputs][panel of outputs][run][tap, reversed][output][input lane].
template <class T, class E>
OwnVector<T> pack_weights_back(const ConvShape& s, const std::vector<TapRun>& runs, const Panels<T>& inputs,
                               const Panels<T>& outputs, const E* weight) {
  int64_t taps = 0;
  for (const TapRun& run : runs) taps += run.count;
  const int64_t k = taps * outputs.lanes();
  OwnVector<T> packed(k * inputs.lanes());
  share(inputs.count(), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      T* to = packed.data() + k * inputs.begin(panel);
      for (int64_t q = 0; q < outputs.count(); ++q)
        for (const TapRun& run : runs)
          for (int64_t dx = run.dx + run.count - 1; dx >= run.dx; --dx)
            for (int64_t i = 0; i < outputs.width(q); ++i) {
              const int64_t o = outputs.first(q, i / kLanes<T>) + i % kLanes<T>;
              const bool row = i % kLanes<T> < outputs.live(q, i / kLanes<T>);
              for (int64_t v = 0; v < inputs.vectors(panel); ++v)
                for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
                  const int64_t c = inputs.first(panel, v) + lane;
                  const bool live = row && lane < inputs.live(panel, v) && s.live(o, c, run.dy, dx);
                  *to++ = live ? static_cast<T>(weight[s.weight_at(o, c, run.dy, dx)]) : T(0);
                }
            }
    }
  });
  return packed;
}

template <class T>
inline T sum_of_row(const T* row, int64_t padded) {
  Vec<T> sum = {};
  for (int64_t x = 0; x < padded; x += kLanes<T>) sum += load(row + x);
  return sum_of_lanes<T>(sum);
}

// The gradients of the sums for some rows of an image, [panel][y][x][lane], with columns of zeros on both sides.
template <class T>
struct SumGradients {
  std::vector<Pixels<T>> panels;
  SumGradients(const ConvShape& s, const Panels<T>& outputs, int64_t rows) {
    for (int64_t q = 0; q < outputs.count(); ++q)
      panels.emplace_back(s.width, s.kernel_w - 1 - s.left(), s.left(), outputs.width(q), rows);
  }
};

// One band at a time: the gradients of its sums and of the rows below that it reaches, from what the forward pass kept;
// then its share of the weights' gradient, and the gradient of its own pixels. Each thread sums weights apart.
template <class T, class E>
void conv_backward(const ConvShape& s, const ConvTensors<E>& in, const E* grad, const E* kept,
                   const ConvGradients<T, E>& out) {
  constexpr int64_t kL = kLanes<T>;
  const std::vector<TapRun> runs = s.runs();
  const Panels<T> panels{s.outs, s.gated}, inputs{s.channels, false};
  OwnVector<T> back;
  if (out.x) back = pack_weights_back<T>(s, runs, inputs, panels, in.weight);
  int64_t taps = 0;
  for (const TapRun& run : runs) taps += run.count;
  const int64_t k = taps * s.channels, right = s.kernel_w - 1 - s.left(), plane = s.height * s.width;
  const int64_t row_bytes = sizeof(T) * (Pixels<T>::row_size(s.width, s.left(), right, s.channels) +
                                         Pixels<T>::row_size(s.width, s.left(), right, panels.lanes()));
  const int64_t bands = bands_of(s, row_bytes), items = s.batch * bands;
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  const int64_t weight_size = out.weight ? k * panels.lanes() : 0;
  OwnVector<T> weight_sums(workers * weight_size), row_sums(items * s.outs);

  for_each_worker(workers, [&](int64_t worker) {
    const int64_t most = (s.height + bands - 1) / bands;
    RowTile<T> first_rows(s.width), second_rows(s.width);
    Pixels<T> x(s.width, s.left(), right, s.channels, most + s.above());
    SumGradients<T> da(s, panels, most + s.above());
    OwnVector<T> tile(first_rows.padded() * 2 * kL), product(kPixels * 2 * kL);
    std::vector<Stretch<T>> stretches;
    T* weight_sum = weight_sums.data() + worker * weight_size;
    for (int64_t item = worker * items / workers; item < (worker + 1) * items / workers; ++item) {
      const int64_t b = item / bands, first = item % bands * s.height / bands;
      const int64_t last = (item % bands + 1) * s.height / bands, below = std::min(s.height, last + s.above());
      T* row_sum = row_sums.data() + item * s.outs;

      for (int64_t q = 0; q < panels.count(); ++q) {
        Pixels<T>& to = da.panels[q];
        const int64_t width = panels.width(q);
        const auto keep = [&](RowTile<T>& rows, int64_t v, int64_t y) {
          rows.to_tile(to.at(y, 0) + v * kL, width);
          if (y >= last) return;  // another band's
          const int64_t o = panels.first(q, v), n = panels.live(q, v);
          for (int64_t c = 0; c < n; ++c) row_sum[o + c] += sum_of_row(rows.row(c), rows.padded());
          if (out.cond) rows.write(out.cond + (b * s.outs + o) * plane + y * s.width, plane, n);
        };
        to.start(first);
        for (int64_t y = first; y < below; ++y) {
          if (!s.gated) {
            for (int64_t v = 0; v < panels.vectors(q); ++v) {
              first_rows.read(grad + (b * s.outs + panels.first(q, v)) * plane + y * s.width, plane, panels.live(q, v));
              keep(first_rows, v, y);
            }
          } else {
            const int64_t h = panels.first(q, 0), n = panels.live(q, 0), gate_channels = s.results();
            for (int64_t v = 0; v < 2 && out.cond; ++v)
              first_rows.template expect<true>(out.cond + (b * s.outs + panels.first(q, v)) * plane + y * s.width,
                                               plane, n);
            first_rows.expect(grad + (b * gate_channels + h) * plane + (y + RowTile<T>::kRowsAhead) * s.width, plane,
                              n);
            first_rows.read(kept + (b * s.outs + h) * plane + y * s.width, plane, n);
            second_rows.read(kept + (b * s.outs + gate_channels + h) * plane + y * s.width, plane, n);
            for (int64_t c = 0; c < n; ++c) {
              load_row(tile.data(), grad + (b * gate_channels + h + c) * plane + y * s.width, s.width,
                       first_rows.padded());
              T *tanh_row = first_rows.row(c), *sigmoid_row = second_rows.row(c);
              for (int64_t i = 0; i < first_rows.padded(); i += kL) {
                Vec<T> t, g;
                gate_parts(load(tanh_row + i), load(sigmoid_row + i), t, g);
                const Vec<T> left = load(tile.data() + i) * g;
                store(tanh_row + i, left * (T(1) - t * t));
                store(sigmoid_row + i, left * t * (T(1) - g));
              }
            }
            keep(first_rows, 0, y);
            keep(second_rows, 1, y);
          }
          to.finish_row(y);
        }
      }

      if (out.weight) {
        x.pack(in.x + b * s.channels * plane, s.height, std::max<int64_t>(0, first - s.above()), last, first_rows);
        for (int64_t q = 0; q < panels.count(); ++q) {
          const int64_t width = panels.width(q);
          T* w = weight_sum + k * panels.begin(q);
          for (const TapRun& run : runs) {
            const int64_t n = run.count * s.channels;
            for_each_group(n, [&](int64_t from, int64_t count) {
              stretches.clear();
              for (int64_t y = std::max(first, -run.dy); y < last; ++y)
                stretches.push_back({x.at(y + run.dy, run.dx) + from, da.panels[q].at(y, 0), s.width});
              std::fill_n(product.data(), count * width, T(0));
              multiply_rows_of<T, true>(count, width / kL)(product.data(), stretches.data(),
                                                           static_cast<int64_t>(stretches.size()), s.channels);
              T* to = w + from * width;
              for (int64_t i = 0; i < count * width; i += kL) store(to + i, load(to + i) + load(product.data() + i));
            });
            w += n * width;
          }
        }
      }

      if (!out.x) continue;
      for (int64_t panel = 0; panel < inputs.count(); ++panel) {
        const int64_t vectors = inputs.vectors(panel), width = vectors * kL;
        for (int64_t y = first; y < last; ++y) {
          std::fill_n(tile.data(), s.width * width, T(0));
          for (int64_t v = 0; v < vectors; ++v)
            first_rows.template expect<true>(out.x + (b * s.channels + inputs.first(panel, v)) * plane + y * s.width,
                                             plane, inputs.live(panel, v));
          for (int64_t q = 0; q < panels.count(); ++q)
            for_each_group(s.width, [&](int64_t from, int64_t count) {
              stretches.clear();
              const T* w = back.data() + taps * (panels.lanes() * inputs.begin(panel) + panels.begin(q) * width);
              for (const TapRun& run : runs) {
                const int64_t n = run.count * panels.width(q);
                if (y - run.dy < s.height)
                  stretches.push_back({da.panels[q].at(y - run.dy, from - run.dx - run.count + 1), w, n});
                w += n * width;
              }
              multiply_rows_of<T, false>(count, vectors)(tile.data() + from * width, stretches.data(),
                                                         static_cast<int64_t>(stretches.size()), panels.width(q));
            });
          for (int64_t v = 0; v < vectors; ++v) {
            first_rows.from_tile(tile.data() + v * kL, width);
            first_rows.write(out.x + (b * s.channels + inputs.first(panel, v)) * plane + y * s.width, plane,
                             inputs.live(panel, v));
          }
        }
      }
    }
  });

  // the threads' sums, in a fixed order
  if (out.weight) {
    std::fill_n(out.weight, s.outs * s.channels * s.kernel_h * s.kernel_w, T(0));
    share(panels.count(), [&](int64_t begin, int64_t end) {
      for (int64_t q = begin; q < end; ++q) {
        int64_t at = k * panels.begin(q);
        for (const TapRun& run : runs)
          for (int64_t dx = run.dx; dx < run.dx + run.count; ++dx)
            for (int64_t c = 0; c < s.channels; ++c)
              for (int64_t i = 0; i < panels.width(q); ++i, ++at) {
                const int64_t o = panels.first(q, i / kL) + i % kL;
                if (i % kL >= panels.live(q, i / kL) || !s.live(o, c, run.dy, dx)) continue;
                T sum = 0;
                for (int64_t worker = 0; worker < workers; ++worker) sum += weight_sums[worker * weight_size + at];
                out.weight[s.weight_at(o, c, run.dy, dx)] = sum;
              }
      }
    });
  }
  if (out.bias) std::fill_n(out.bias, s.outs, T(0));
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t o = 0; o < s.outs; ++o) {
      T sum = 0;
      for (int64_t i = b * bands; i < (b + 1) * bands; ++i) sum += row_sums[i * s.outs + o];
      if (out.image_cond) out.image_cond[b * s.outs + o] = sum;
      if (out.bias) out.bias[o] += sum;
    }
}

}  // namespace
}  // namespace fastgen
