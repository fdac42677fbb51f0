// The gradients of convolutions; layouts and the forward pass are in masked_conv.h.
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

template <class T>
inline T sum_of_row(const T* row, int64_t padded) {
  Vec<T> sum = {};
  for (int64_t x = 0; x < padded; x += kLanes<T>) sum += load(row + x);
  return sum_of_lanes<T>(sum);
}

// The gradients of the sums for some rows of an image, [panel][y][x][lane], with columns of zeros on both sides.
template <class T, class S>
struct SumGradients {
  std::vector<Pixels<T, S>> panels;
  SumGradients(const ConvShape& s, const Panels<T>& outputs, int64_t rows) {
    for (int64_t q = 0; q < outputs.count(); ++q)
      panels.emplace_back(s.width, s.right(), s.left(), outputs.width(q), rows);
  }
};

// The share that some rows of an image, a band, have in the gradient of the weights: a sum over pixels, so inputs are
// taken across. Rows of x are those that the band sees.
template <class T, class S>
class BandGradient {
 public:
  BandGradient(const ConvShape& s, const Panels<T>&, int64_t rows)
      : s_(s), x_(s.width, s.left(), s.right(), s.channels, rows) {}

  template <class E>
  void pack(const E* image, int64_t first, int64_t last, RowTile<T>& rows) {
    x_.pack(image, s_.height, first, last, rows);
  }
  // Row y of the gradients of a panel's sums, y counted from the band's first one; they are in `da` as well.
  void keep(const RowTile<T>&, int64_t, int64_t, int64_t) {}
  // w += the share of panel q, as packed weights lie, of rows [first, last).
  void add(const std::vector<TapRun>& runs, SumGradients<T, S>& da, int64_t q, int64_t width, int64_t first,
           int64_t last, T* w) {
    for (const TapRun& run : runs) {
      const int64_t n = run.count * s_.channels;
      for_each_group(n, [&](int64_t from, int64_t count) {
        stretches_.clear();
        for (int64_t y = std::max(first, -run.dy); y < std::min(last, s_.height - run.dy); ++y)
          stretches_.push_back({x_.at(y + run.dy, run.dx) + from, da.panels[q].at(y, 0), s_.width});
        multiply_rows_of<T, true>(count, width / kLanes<T>)(
            w + from * width, stretches_.data(), static_cast<int64_t>(stretches_.size()), s_.channels, false);
      });
      w += n * width;
    }
  }

 private:
  const ConvShape& s_;
  Pixels<T> x_;
  std::vector<Stretch<T>> stretches_;
};

// Of pairs of pixels: inputs as the tensor has them, channels first, with zeros on both sides; the gradients of sums
// once more, [panel][y][x / 2][lane][2]. Where the width is odd, a zero follows the last pixel's gradient, and for taps
// on the left a pixel would be its factor: there the last pixel's inputs stand by themselves, with zeros behind them.
template <class T>
class BandGradient<T, BFloat16> {
 public:
  static constexpr int64_t kL = kLanes<T>;
  BandGradient(const ConvShape& s, const Panels<T>& panels, int64_t rows)
      : s_(s),
        panels_(panels),
        row_(s.left() + round_up(s.width, 2) + s.right()),
        x_(rows * s.channels * row_),
        ends_(s.width % 2 && s.left() ? x_.size() : 0) {
    const int64_t own = std::max<int64_t>(rows - s.above() - s.below(), 0);
    for (int64_t q = 0; q < panels.count(); ++q) da_.emplace_back(own * round_up(s.width, 2 * kL) * panels.width(q));
  }

  void pack(const BFloat16* image, int64_t first, int64_t last, RowTile<T>&) {
    first_ = first;
    for (int64_t y = first; y < last; ++y)
      for (int64_t c = 0; c < s_.channels; ++c) {
        BFloat16* row = x_.data() + row_of(y, c) + s_.left();
        std::memcpy(static_cast<void*>(row), image + (c * s_.height + y) * s_.width, s_.width * sizeof(BFloat16));
        for (int64_t dx = -s_.left(); dx < 0 && !ends_.empty(); ++dx) end_of(y, c, dx)[0] = row[s_.width - 1 + dx];
      }
  }
  void keep(const RowTile<T>& rows, int64_t q, int64_t v, int64_t y) {
    const int64_t width = panels_.width(q);
    rows.to_pairs(da_[q].data() + y * round_up(s_.width, 2 * kL) * width + v * 2 * kL, width);
  }
  void add(const std::vector<TapRun>& runs, SumGradients<T, BFloat16>&, int64_t q, int64_t width, int64_t first,
           int64_t last, T* w) {
    const int64_t da_row = round_up(s_.width, 2 * kL) * width;
    for (const TapRun& run : runs)
      for (int64_t dx = run.dx; dx < run.dx + run.count; ++dx, w += s_.channels * width)
        for_each_group(s_.channels, [&](int64_t from, int64_t count) {
          const bool ends = dx < 0 && !ends_.empty();
          const int64_t pixels = ends ? s_.width - 1 : round_up(s_.width, 2);
          stretches_.clear();
          for (int64_t y = std::max(first, -run.dy); y < std::min(last, s_.height - run.dy); ++y) {
            const BFloat16* da = da_[q].data() + (y - first) * da_row;
            if (pixels > 0) stretches_.push_back({x_.data() + row_of(y + run.dy, from) + s_.left() + dx, da, pixels});
            if (ends) stretches_.push_back({end_of(y + run.dy, from, dx), da + pixels * width, 2});
          }
          multiply_rows_of<T, false, BFloat16>(count, width / kL)(w + from * width, stretches_.data(),
                                                                  static_cast<int64_t>(stretches_.size()), row_, false);
        });
  }

 private:
  int64_t row_of(int64_t y, int64_t channel) const { return ((y - first_) * s_.channels + channel) * row_; }
  BFloat16* end_of(int64_t y, int64_t channel, int64_t dx) { return ends_.data() + row_of(y, channel) - 2 * (dx + 1); }

  const ConvShape& s_;
  const Panels<T>& panels_;
  int64_t row_, first_ = 0;
  OwnVector<BFloat16> x_, ends_;
  std::vector<OwnVector<BFloat16>> da_;
  std::vector<Stretch<BFloat16>> stretches_;
};

// One band at a time: the gradients of its sums and of the other rows that see it, from what the forward pass kept (the
// sums before a gate, the results of a ReLU); then its share of the weights' gradient, and the gradient of its own
// pixels. Each thread sums weights apart.
template <class T, class S, class E>
void conv_backward(const ConvShape& s, const ConvTensors<E>& in, const E* grad, const E* kept,
                   const ConvGradients<T, E>& out) {
  constexpr int64_t kL = kLanes<T>;
  const std::vector<TapRun> runs = s.runs();
  const Panels<T> panels{s.outs, s.gated()}, inputs{s.channels, false};
  OwnVector<S> back;
  if (out.x) back = pack_weights_back<T, S>(s, runs, inputs, panels, in.weight);
  const int64_t taps = taps_of(runs), k = taps * s.channels, plane = s.height * s.width;
  const int64_t row_bytes =
      sizeof(S) * (Pixels<T, S>::row_size(s.width, s.left(), s.right(), s.channels) +
                   Pixels<T, S>::row_size(s.width, s.left(), s.right(), panels.lanes()) * kTerms<T, S>);
  const int64_t bands = bands_of(s, row_bytes), items = s.batch * bands;
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  const int64_t weight_size = out.weight ? k * panels.lanes() : 0;
  OwnVector<T> weight_sums(workers * weight_size), row_sums(items * s.outs);

  for_each_worker(workers, [&](int64_t worker) {
    const int64_t most = (s.height + bands - 1) / bands + s.above() + s.below();
    RowTile<T> first_rows(s.width), second_rows(s.width);
    SumGradients<T, S> da(s, panels, most);
    BandGradient<T, S> of_weights(s, panels, out.weight ? most : 0);
    OwnVector<T> tile(first_rows.padded() * 2 * kL);
    std::vector<Stretch<S>> stretches;
    T* weight_sum = weight_sums.data() + worker * weight_size;
    for (int64_t item = worker * items / workers; item < (worker + 1) * items / workers; ++item) {
      const int64_t b = item / bands, first = item % bands * s.height / bands;
      const int64_t last = (item % bands + 1) * s.height / bands;
      const int64_t seen_from = std::max<int64_t>(0, first - s.below()), seen_to = std::min(s.height, last + s.above());
      T* row_sum = row_sums.data() + item * s.outs;

      for (int64_t q = 0; q < panels.count(); ++q) {
        Pixels<T, S>& to = da.panels[q];
        const int64_t width = panels.width(q);
        const auto keep = [&](RowTile<T>& rows, int64_t v, int64_t y) {
          rows.to_tile(to.at(y, 0) + v * kL, width);
          if (y < first || y >= last) return;  // another band's
          if (out.weight) of_weights.keep(rows, q, v, y - first);
          const int64_t o = panels.first(q, v), n = panels.live(q, v);
          for (int64_t c = 0; c < n; ++c) row_sum[o + c] += sum_of_row(rows.row(c), rows.padded());
          if (out.cond) rows.write(out.cond + (b * s.outs + o) * plane + y * s.width, plane, n);
        };
        to.start(seen_from);
        for (int64_t y = seen_from; y < seen_to; ++y) {
          if (!s.gated()) {
            for (int64_t v = 0; v < panels.vectors(q); ++v) {
              const int64_t at = (b * s.outs + panels.first(q, v)) * plane + y * s.width, n = panels.live(q, v);
              first_rows.read(grad + at, plane, n);
              if (kept) {
                second_rows.read(kept + at, plane, n);
                first_rows.clear_where_zero(second_rows);
              }
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
        of_weights.pack(in.x + b * s.channels * plane, std::max<int64_t>(0, first - s.above()),
                        std::min(s.height, last + s.below()), first_rows);
        for (int64_t q = 0; q < panels.count(); ++q)
          of_weights.add(runs, da, q, panels.width(q), first, last, weight_sum + k * panels.begin(q));
      }

      if (!out.x) continue;
      for (int64_t panel = 0; panel < inputs.count(); ++panel) {
        const int64_t vectors = inputs.vectors(panel), width = vectors * kL;
        for (int64_t y = first; y < last; ++y) {
          std::fill_n(tile.data(), s.width * width, T(0));
          for (int64_t v = 0; v < vectors; ++v)
            first_rows.template expect<true>(out.x + (b * s.channels + inputs.first(panel, v)) * plane + y * s.width,
                                             plane, inputs.live(panel, v));
          for_each_group(s.width, [&](int64_t from, int64_t count) {
            const S* w = back.data() + taps * panels.lanes() * inputs.begin(panel);
            for (int64_t q = 0; q < panels.count();) {
              const int64_t step = panels.width(q);  // what all panels but the last share
              stretches.clear();
              for (; q < panels.count() && panels.width(q) == step; ++q)
                for (const TapRun& run : runs) {
                  const int64_t n = run.count * step;
                  if (y - run.dy >= 0 && y - run.dy < s.height)
                    stretches.push_back({da.panels[q].at(y - run.dy, from - run.dx - run.count + 1), w, n});
                  w += n * width;
                }
              multiply_rows_of<T, false, S>(count, vectors)(tile.data() + from * width, stretches.data(),
                                                            static_cast<int64_t>(stretches.size()), step, false);
            }
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

  if (out.weight) unpack_gradients(s, runs, panels, weight_sums, workers, out.weight);
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
