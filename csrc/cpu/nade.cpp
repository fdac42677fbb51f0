// nade, its backward, and sampling; arguments are checked in fastgen/ops/nade.py.
//
// The state, a sum of the inputs' columns, stays in the caches for a tile of hidden units: what is stored is the result
// alone. An input of 0 adds nothing, so the hidden units stay as they are: sigmoids are computed only where they
// change. The backward walks in stretches from the last input to the first, a few samples side by side, so that each
// weight and each sum is read once for all of them; of a stretch it computes the states anew from the one at its start.
#include "sampling.h"

namespace fastgen {
namespace {

constexpr int kWide = 64;                                  // hidden units of a tile
constexpr int64_t kRows = 32;                              // samples that share each weight that is read
constexpr int64_t kStretch = 32;                           // inputs, in the backward
constexpr int kTogether = kVectorRegisters == 32 ? 4 : 2;  // samples side by side there
constexpr int64_t kSettled = 64;                           // times as many go into one running sum

inline VecF sigmoid(VecF x) { return quotient(splat(1.0f), 1.0f + exp_bounded(-at_most(at_least(x, -60.0f), 80.0f))); }
inline Vec<double> sigmoid(Vec<double> x) {
  return by_lane(x, [](double v) { return 1 / (1 + std::exp(-v)); });
}

// Sizes of a call: columns in one of D steps are 1, of inputs that are 0 or 1, or as many as there are values.
struct Sizes {
  int64_t batch, steps, columns, outputs, hidden, width, tiles;  // width: hidden units of a tile
  Sizes(int64_t batch, const Tensor& in_weight, const Tensor& out_weight, int64_t width)
      : batch(batch),
        steps(in_weight.size(0)),
        columns(in_weight.size(1)),
        outputs(out_weight.size(1)),
        hidden(in_weight.size(2)),
        width(width),
        tiles((hidden + width - 1) / width) {}
  int64_t units(int64_t tile) const { return std::min(width, hidden - tile * width); }
  // The row of weights that an input adds to the state, or -1.
  int64_t row(int64_t step, int64_t value) const { return columns > 1 ? step * columns + value : value ? step : -1; }
};

// Columns of a tile out of (rows, hidden), padded with zeros.
template <class T>
void cut(const T* from, int64_t rows, const Sizes& s, int64_t tile, OwnVector<T>& to) {
  to.resize(rows * s.width);
  for (int64_t i = 0; i < rows; ++i)
    load_row(to.data() + i * s.width, from + i * s.hidden + tile * s.width, s.units(tile), s.width);
}
template <class T>
void paste(const OwnVector<T>& from, int64_t rows, const Sizes& s, int64_t tile, T* to) {
  for (int64_t i = 0; i < rows; ++i)
    store_row(to + i * s.hidden + tile * s.width, from.data() + i * s.width, s.units(tile));
}

// The units of a tile, as N vectors.
template <class T, int N>
inline void load_state(Vec<T> (&a)[N], const T* p) {
  for (int v = 0; v < N; ++v) a[v] = load(p + v * kLanes<T>);
}
template <class T, int N>
inline void store_state(T* p, const Vec<T> (&a)[N]) {
  for (int v = 0; v < N; ++v) store(p + v * kLanes<T>, a[v]);
}
template <class T, int N>
inline void store_units(T* p, const Vec<T> (&a)[N]) {
  for (int v = 0; v < N; ++v) store(p + v * kLanes<T>, sigmoid(a[v]));
}
template <class T, int N>
inline void add_to(Vec<T> (&a)[N], const T* p) {
  for (int v = 0; v < N; ++v) a[v] += load(p + v * kLanes<T>);
}
template <class T, int N>
inline void add_into(T* p, const Vec<T> (&a)[N]) {
  for (int v = 0; v < N; ++v) store(p + v * kLanes<T>, load(p + v * kLanes<T>) + a[v]);
}

Tensor nade(Tensor x, Tensor in_weight, Tensor in_bias, Tensor out_weight, Tensor out_bias) {
  const Sizes s(x.size(0), in_weight, out_weight, kWide);
  const int64_t most = std::max<int64_t>(1, s.columns - 1);
  for (const int64_t *v = data_of<int64_t>(x), *end = v + s.batch * s.steps; v < end; ++v)
    FASTGEN_CHECK(*v >= 0 && *v <= most, "nade: x must lie in [0, ", most, "], got ", *v);
  Tensor logits = fresh(in_weight, {s.batch, s.steps, s.outputs});
  dispatch_float(in_weight.scalar_type(), "nade", [&](auto zero) {
    using T = ComputeType<decltype(zero)>;
    constexpr int kVectors = kWide / kLanes<T>;
    const int64_t* values = data_of<int64_t>(x);
    const T* bias = data_of<T>(out_bias);
    auto* out = static_cast<T*>(logits.data_ptr());
    share(s.batch, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) store_row(out + b * s.steps * s.outputs, bias, s.steps * s.outputs);
      OwnVector<T> in, from, start, states(kRows * kWide), units(kRows * kWide);
      for (int64_t tile = 0; tile < s.tiles; ++tile) {
        cut(data_of<T>(in_weight), s.steps * s.columns, s, tile, in);
        cut(data_of<T>(out_weight), s.steps * s.outputs, s, tile, from);
        cut(data_of<T>(in_bias), 1, s, tile, start);
        Vec<T> initial[kVectors];
        load_state(initial, start.data());
        for (int64_t first = begin; first < end; first += kRows) {
          const int64_t last = std::min(end, first + kRows);
          for (int64_t b = first; b < last; ++b) {
            store_state(&states[(b - first) * kWide], initial);
            store_units(&units[(b - first) * kWide], initial);
          }
          for (int64_t d = 0; d < s.steps; ++d) {
            for (int64_t o = 0; o < s.outputs; ++o) {
              Vec<T> weight[kVectors];
              load_state(weight, &from[(d * s.outputs + o) * kWide]);
              for (int64_t b = first; b < last; b += kLanes<T>) {
                const int64_t count = std::min<int64_t>(kLanes<T>, last - b);
                Vec<T> rows[kLanes<T>] = {};
                unroll<kLanes<T>>([&](auto i) FASTGEN_INLINE {
                  if (i >= count) return;
                  const T* h = &units[(b - first + i) * kWide];
                  for (int v = 0; v < kVectors; ++v) rows[i] += load(h + v * kLanes<T>) * weight[v];
                });
                const Vec<T> sums = sums_of_rows<T>(rows);
                for (int64_t i = 0; i < count; ++i) out[((b + i) * s.steps + d) * s.outputs + o] += sums[i];
              }
            }
            for (int64_t b = first; b < last; ++b) {
              const int64_t row = s.row(d, values[b * s.steps + d]);
              if (row < 0) continue;
              Vec<T> a[kVectors];
              load_state(a, &states[(b - first) * kWide]);
              add_to(a, &in[row * kWide]);
              store_state(&states[(b - first) * kWide], a);
              store_units(&units[(b - first) * kWide], a);
            }
          }
        }
      }
    });
  });
  return logits;
}

// A sample's inputs in runs that see the same hidden units.
template <class T>
struct Runs {
  std::vector<int64_t> begins;  // of each run, and at the end the number of inputs
  std::vector<int32_t> of;      // each input's run, counted from the first in its stretch
  std::vector<T> factor;        // what the row of each input is multiplied with, where it has only one
  const int64_t* values = nullptr;
  Runs() = default;
  Runs(const Sizes& s, const int64_t* values) : of(s.steps), factor(values, values + s.steps), values(values) {
    size_t first = 0;
    for (int64_t d = 0; d < s.steps; ++d) {
      if (d == 0 || s.row(d - 1, values[d - 1]) >= 0) begins.push_back(d);
      if (d % kStretch == 0) first = begins.size();
      of[d] = static_cast<int32_t>(begins.size() - first);
    }
    begins.push_back(s.steps);
  }
  // The row of weights that a run adds to the state of the one before.
  int64_t row_of(const Sizes& s, int64_t run) const { return s.row(begins[run] - 1, values[begins[run] - 1]); }
};

// A tile of hidden units in the backward: two vectors of them.
template <class T>
class TileGrads {
 public:
  static constexpr int kVectors = 2, kWidth = kVectors * kLanes<T>;
  OwnVector<T> in, from, start;  // the tile of in_weight, out_weight, in_bias
  OwnVector<T> in_sums, out_sums, bias_sums;

  explicit TileGrads(const Sizes& s)
      : s_(s), states_((s.steps / kStretch + 1) * kTogether * kWidth), units_(kTogether * kStretch * kWidth) {}

  // After a change of the tile.
  void clear() {
    in_sums.assign(in.size(), T(0));
    out_sums.assign(from.size(), T(0));
    bias_sums.assign(kWidth, T(0));
  }

  // What float32 sums of many samples would lose: from time to time they are added to the totals, and begin anew.
  void settle() {
    settle(in_sums, in_total_);
    settle(out_sums, out_total_);
    settle(bias_sums, bias_total_);
  }
  // The sums are then those of all samples.
  void finish() {
    if (bias_total_.empty()) return;
    settle();
    in_sums.swap(in_total_);
    out_sums.swap(out_total_);
    bias_sums.swap(bias_total_);
    for (auto* total : {&in_total_, &out_total_, &bias_total_}) total->clear();
  }

  // Adds the gradients of N samples; grad: that of their outputs, a sample's D * O after another's.
  template <int N>
  void add(const Runs<T>* samples, const T* grad) {
    const int32_t* run[N];
    const T* factor[N];
    int64_t behind[N];  // the run behind the stretch
    for (int k = 0; k < N; ++k) {
      run[k] = samples[k].of.data();
      factor[k] = samples[k].factor.data();
      behind[k] = keep_states(samples[k], k);
    }
    Vec<T> later[N][kVectors] = {};  // the gradient of the state, from all inputs behind
    for (int64_t first = round_up(s_.steps, kStretch) - kStretch; first >= 0; first -= kStretch) {
      const int64_t last = std::min(s_.steps, first + kStretch);
      for (int k = 0; k < N; ++k) compute_units(samples[k], k, first, last, behind[k]);
      for (int64_t d = last; d-- > first;) {
        Vec<T> h[N][kVectors], of_h[N][kVectors] = {};
        unroll<N>([&](auto k) FASTGEN_INLINE { load_state(h[k], &units_[(k * kStretch + run[k][d]) * kWidth]); });
        for (int64_t i = d * s_.outputs; i < (d + 1) * s_.outputs; ++i) {
          Vec<T> sum[kVectors], weight[kVectors];
          load_state(sum, &out_sums[i * kWidth]);
          load_state(weight, &from[i * kWidth]);
          unroll<N>([&](auto k) FASTGEN_INLINE {
            const Vec<T> g = splat(grad[k * s_.steps * s_.outputs + i]);
            for (int v = 0; v < kVectors; ++v) {
              sum[v] += g * h[k][v];
              of_h[k][v] += g * weight[v];
            }
          });
          store_state(&out_sums[i * kWidth], sum);
        }
        unroll<N>([&](auto k) FASTGEN_INLINE {
          for (int v = 0; v < kVectors; ++v) later[k][v] += of_h[k][v] * (h[k][v] - h[k][v] * h[k][v]);
        });
        if (d == 0) continue;
        if (s_.columns == 1) {  // times 0 or 1: cheaper than a branch that nothing predicts
          Vec<T> sum[kVectors];
          load_state(sum, &in_sums[(d - 1) * kWidth]);
          unroll<N>([&](auto k) FASTGEN_INLINE {
            for (int v = 0; v < kVectors; ++v) sum[v] += factor[k][d - 1] * later[k][v];
          });
          store_state(&in_sums[(d - 1) * kWidth], sum);
        } else {
          for (int k = 0; k < N; ++k) add_into(&in_sums[s_.row(d - 1, samples[k].values[d - 1]) * kWidth], later[k]);
        }
      }
    }
    for (int k = 0; k < N; ++k) add_into(bias_sums.data(), later[k]);
  }

 private:
  static void settle(OwnVector<T>& sums, OwnVector<T>& total) {
    if (total.empty()) total.resize(sums.size());
    for (size_t k = 0; k < sums.size(); ++k) total[k] += std::exchange(sums[k], T(0));
  }

  // The states at the beginning of each stretch; returns the number of runs.
  int64_t keep_states(const Runs<T>& sample, int k) {
    Vec<T> a[kVectors];
    load_state(a, start.data());
    const int64_t runs = static_cast<int64_t>(sample.begins.size()) - 1;
    for (int64_t run = 0, stretch = 0; run <= runs; ++run) {
      for (; stretch * kStretch < sample.begins[run]; ++stretch)
        store_state(&states_[(stretch * kTogether + k) * kWidth], a);
      if (0 < run && run < runs) add_to(a, &in[sample.row_of(s_, run) * kWidth]);
    }
    return runs;
  }

  // Of the runs in a stretch; `behind`, the run behind it, becomes the one behind the stretch before.
  void compute_units(const Runs<T>& sample, int k, int64_t first, int64_t last, int64_t& behind) {
    const int64_t begin = behind - 1 - sample.of[last - 1];
    Vec<T> a[kVectors];
    load_state(a, &states_[(first / kStretch * kTogether + k) * kWidth]);
    for (int64_t run = begin; run < behind; ++run) {
      if (run > begin) add_to(a, &in[sample.row_of(s_, run) * kWidth]);
      store_units(&units_[(k * kStretch + run - begin) * kWidth], a);
    }
    behind = sample.begins[begin] == first ? begin : begin + 1;
  }

  const Sizes& s_;
  OwnVector<T> states_, units_, in_total_, out_total_, bias_total_;
};

// Gradients of in_weight, in_bias and out_weight, for grad (B, D, O).
std::tuple<Tensor, Tensor, Tensor> nade_backward(Tensor grad, Tensor x, Tensor in_weight, Tensor in_bias,
                                                 Tensor out_weight) {
  Tensor of_in = fresh_like(in_weight), of_bias = fresh_like(in_bias), of_out = fresh_like(out_weight);
  dispatch_float(in_weight.scalar_type(), "nade", [&](auto zero) {
    using T = ComputeType<decltype(zero)>;
    const Sizes s(x.size(0), in_weight, out_weight, TileGrads<T>::kWidth);
    std::vector<Runs<T>> samples(s.batch);
    share(s.batch, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) samples[b] = Runs<T>(s, data_of<int64_t>(x) + b * s.steps);
    });
    share(s.tiles, [&](int64_t begin, int64_t end) {
      TileGrads<T> grads(s);
      for (int64_t tile = begin; tile < end; ++tile) {
        cut(data_of<T>(in_weight), s.steps * s.columns, s, tile, grads.in);
        cut(data_of<T>(out_weight), s.steps * s.outputs, s, tile, grads.from);
        cut(data_of<T>(in_bias), 1, s, tile, grads.start);
        grads.clear();
        for (int64_t b = 0; b < s.batch; b += kTogether) {
          if (b > 0 && b / kTogether % kSettled == 0) grads.settle();
          unroll<kTogether>([&](auto less) {
            constexpr int kSamples = kTogether - less;
            if (std::min<int64_t>(s.batch - b, kTogether) == kSamples)
              grads.template add<kSamples>(&samples[b], data_of<T>(grad) + b * s.steps * s.outputs);
          });
        }
        grads.finish();
        paste(grads.in_sums, s.steps * s.columns, s, tile, static_cast<T*>(of_in.data_ptr()));
        paste(grads.out_sums, s.steps * s.outputs, s, tile, static_cast<T*>(of_out.data_ptr()));
        paste(grads.bias_sums, 1, s, tile, static_cast<T*>(of_bias.data_ptr()));
      }
    });
  });
  return {of_in, of_bias, of_out};
}

// Fills x (B, D) where it is negative, by uniforms (B, D). All float32.
void nade_sample(Tensor in_weight, Tensor in_bias, Tensor out_weight, Tensor out_bias, Tensor uniforms,
                 double temperature, Tensor x) {
  const Sizes s(x.size(0), in_weight, out_weight, kWide);
  auto* values = static_cast<int64_t*>(x.data_ptr());
  const float *w = data_of<float>(in_weight), *from = data_of<float>(out_weight), *bias = data_of<float>(out_bias);
  const int classes = static_cast<int>(std::max<int64_t>(2, s.outputs));
  for (int64_t i = 0; i < x.numel(); ++i)
    FASTGEN_CHECK(values[i] < classes, "nade_sample: given must lie in [0, ", classes, "), got ", values[i]);
  share(s.batch, [&](int64_t begin, int64_t end) {
    OwnVector<float> state(s.hidden), h(s.hidden), logits(classes), scratch(sampling_scratch(classes));
    for (int64_t b = begin; b < end; ++b) {
      std::copy_n(data_of<float>(in_bias), s.hidden, state.data());
      bool changed = true;
      for (int64_t d = 0; d < s.steps; ++d) {
        int64_t& value = values[b * s.steps + d];
        if (value < 0) {
          if (changed)
            by_vectors<float>(s.hidden,
                              [&](int64_t k, auto n) FASTGEN_INLINE { put(&h[k], sigmoid(take(&state[k], n)), n); });
          changed = false;
          float* to = logits.data() + (s.outputs == 1 ? 1 : 0);  // one logit: of 1 against 0
          for (int64_t o = 0; o < s.outputs; ++o) {
            const float* row = from + (d * s.outputs + o) * s.hidden;
            VecF sum{};
            by_vectors<float>(s.hidden,
                              [&](int64_t k, auto n) FASTGEN_INLINE { sum += take(&h[k], n) * take(row + k, n); });
            to[o] = sum_of_lanes<float>(sum) + bias[d * s.outputs + o];
          }
          value = sample_categorical(logits.data(), classes, static_cast<float>(temperature),
                                     data_of<float>(uniforms)[b * s.steps + d], scratch.data());
        }
        const int64_t row = s.row(d, value);
        if (row < 0) continue;
        changed = true;
        by_vectors<float>(s.hidden, [&](int64_t k, auto n) FASTGEN_INLINE {
          put(&state[k], take(&state[k], n) + take(w + row * s.hidden + k, n), n);
        });
      }
    }
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("nade", TORCH_BOX(&fastgen::nade));
  m.impl("nade_backward", TORCH_BOX(&fastgen::nade_backward));
  m.impl("nade_sample", TORCH_BOX(&fastgen::nade_sample));
}
