// nade, its backward, and sampling; arguments are checked in fastgen/ops/nade.py.
//
// The state, a sum of the inputs' columns, stays in the caches for a tile of hidden units: what is stored is the result
// alone. An input of 0 adds nothing, so the hidden units stay as they are: sigmoids are computed only where they
// change. The backward walks in stretches from the last input to the first; of each it computes the states anew from
// the one at its start.
#include "sampling.h"

namespace fastgen {
namespace {

constexpr int kHidden = 64;       // units of a tile
constexpr int64_t kRows = 32;     // samples that share each weight that is read
constexpr int64_t kStretch = 32;  // runs of inputs

inline VecF sigmoid(VecF x) { return quotient(splat(1.0f), 1.0f + exp_bounded(-at_most(at_least(x, -60.0f), 80.0f))); }
inline Vec<double> sigmoid(Vec<double> x) {
  return by_lane(x, [](double v) { return 1 / (1 + std::exp(-v)); });
}

template <class T>
constexpr int kVectors = kHidden / kLanes<T>;

// Sizes of a call: columns in one of D steps are 1, of inputs that are 0 or 1, or as many as there are values.
struct Sizes {
  int64_t batch, steps, columns, outputs, hidden, tiles;
  Sizes(int64_t batch, const Tensor& in_weight, const Tensor& out_weight)
      : batch(batch),
        steps(in_weight.size(0)),
        columns(in_weight.size(1)),
        outputs(out_weight.size(1)),
        hidden(in_weight.size(2)),
        tiles((hidden + kHidden - 1) / kHidden) {}
  int64_t units(int64_t tile) const { return std::min<int64_t>(kHidden, hidden - tile * kHidden); }
  // The row of weights that an input adds to the state, or -1.
  int64_t row(int64_t step, int64_t value) const { return columns > 1 ? step * columns + value : value ? step : -1; }
};

// Columns of a tile out of (rows, hidden), padded with zeros.
template <class T>
void cut(const T* from, int64_t rows, const Sizes& s, int64_t tile, OwnVector<T>& to) {
  to.resize(rows * kHidden);
  for (int64_t i = 0; i < rows; ++i)
    load_row(to.data() + i * kHidden, from + i * s.hidden + tile * kHidden, s.units(tile), kHidden);
}
template <class T>
void paste(const OwnVector<T>& from, int64_t rows, const Sizes& s, int64_t tile, T* to) {
  for (int64_t i = 0; i < rows; ++i)
    store_row(to + i * s.hidden + tile * kHidden, from.data() + i * kHidden, s.units(tile));
}

template <class T>
using State = Vec<T>[kVectors<T>];

template <class T>
inline void load_state(State<T>& a, const T* p) {
  for (int v = 0; v < kVectors<T>; ++v) a[v] = load(p + v * kLanes<T>);
}
template <class T>
inline void store_state(T* p, const State<T>& a) {
  for (int v = 0; v < kVectors<T>; ++v) store(p + v * kLanes<T>, a[v]);
}
template <class T>
inline void store_units(T* p, const State<T>& a) {
  for (int v = 0; v < kVectors<T>; ++v) store(p + v * kLanes<T>, sigmoid(a[v]));
}
template <class T>
inline void add_to(State<T>& a, const T* p) {
  for (int v = 0; v < kVectors<T>; ++v) a[v] += load(p + v * kLanes<T>);
}

template <class T>
inline void add_into(T* p, const State<T>& a) {
  for (int v = 0; v < kVectors<T>; ++v) store(p + v * kLanes<T>, load(p + v * kLanes<T>) + a[v]);
}

Tensor nade(Tensor x, Tensor in_weight, Tensor in_bias, Tensor out_weight, Tensor out_bias) {
  const Sizes s(x.size(0), in_weight, out_weight);
  const int64_t most = std::max<int64_t>(1, s.columns - 1);
  for (const int64_t *v = data_of<int64_t>(x), *end = v + s.batch * s.steps; v < end; ++v)
    FASTGEN_CHECK(*v >= 0 && *v <= most, "nade: x must lie in [0, ", most, "], got ", *v);
  Tensor logits = fresh(in_weight, {s.batch, s.steps, s.outputs});
  dispatch_float(in_weight.scalar_type(), "nade", [&](auto zero) {
    using T = ComputeType<decltype(zero)>;
    const int64_t* values = data_of<int64_t>(x);
    const T* bias = data_of<T>(out_bias);
    auto* out = static_cast<T*>(logits.data_ptr());
    share(s.batch, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) store_row(out + b * s.steps * s.outputs, bias, s.steps * s.outputs);
      OwnVector<T> in, from, start, states(kRows * kHidden), units(kRows * kHidden);
      for (int64_t tile = 0; tile < s.tiles; ++tile) {
        cut(data_of<T>(in_weight), s.steps * s.columns, s, tile, in);
        cut(data_of<T>(out_weight), s.steps * s.outputs, s, tile, from);
        cut(data_of<T>(in_bias), 1, s, tile, start);
        State<T> initial;
        load_state(initial, start.data());
        for (int64_t first = begin; first < end; first += kRows) {
          const int64_t last = std::min(end, first + kRows);
          for (int64_t b = first; b < last; ++b) {
            store_state(&states[(b - first) * kHidden], initial);
            store_units(&units[(b - first) * kHidden], initial);
          }
          for (int64_t d = 0; d < s.steps; ++d)
            for (int64_t b = first; b < last; ++b) {
              const T* h = &units[(b - first) * kHidden];
              T* to = out + (b * s.steps + d) * s.outputs;
              for (int64_t o = 0; o < s.outputs; ++o) {
                const T* w = &from[(d * s.outputs + o) * kHidden];
                Vec<T> sum{};
                for (int v = 0; v < kVectors<T>; ++v) sum += load(h + v * kLanes<T>) * load(w + v * kLanes<T>);
                to[o] += sum_of_lanes<T>(sum);
              }
              const int64_t row = s.row(d, values[b * s.steps + d]);
              if (row < 0) continue;
              State<T> a;
              load_state(a, &states[(b - first) * kHidden]);
              add_to(a, &in[row * kHidden]);
              store_state(&states[(b - first) * kHidden], a);
              store_units(&units[(b - first) * kHidden], a);
            }
        }
      }
    });
  });
  return logits;
}

// The inputs of a sample in runs that see the same hidden units: where each begins, and at the end the number of
// inputs.
std::vector<int64_t> runs_of(const Sizes& s, const int64_t* values) {
  std::vector<int64_t> begins;
  for (int64_t d = 0; d < s.steps; ++d)
    if (d == 0 || s.row(d - 1, values[d - 1]) >= 0) begins.push_back(d);
  begins.push_back(s.steps);
  return begins;
}

// Gradients of in_weight, in_bias and out_weight, for grad (B, D, O).
std::tuple<Tensor, Tensor, Tensor> nade_backward(Tensor grad, Tensor x, Tensor in_weight, Tensor in_bias,
                                                 Tensor out_weight) {
  const Sizes s(x.size(0), in_weight, out_weight);
  Tensor of_in = fresh_like(in_weight), of_bias = fresh_like(in_bias), of_out = fresh_like(out_weight);
  std::vector<std::vector<int64_t>> all(s.batch);
  for (int64_t b = 0; b < s.batch; ++b) all[b] = runs_of(s, data_of<int64_t>(x) + b * s.steps);
  dispatch_float(in_weight.scalar_type(), "nade", [&](auto zero) {
    using T = ComputeType<decltype(zero)>;
    share(s.tiles, [&](int64_t begin, int64_t end) {
      OwnVector<T> in, from, start, states((s.steps / kStretch + 1) * kHidden), units(kStretch * kHidden);
      for (int64_t tile = begin; tile < end; ++tile) {
        cut(data_of<T>(in_weight), s.steps * s.columns, s, tile, in);
        cut(data_of<T>(out_weight), s.steps * s.outputs, s, tile, from);
        cut(data_of<T>(in_bias), 1, s, tile, start);
        OwnVector<T> in_sums(in.size()), out_sums(from.size()), bias_sums(kHidden);
        for (int64_t b = 0; b < s.batch; ++b) {
          const std::vector<int64_t>& begins = all[b];
          const int64_t* values = data_of<int64_t>(x) + b * s.steps;
          const T* own_grad = data_of<T>(grad) + b * s.steps * s.outputs;
          const auto row_before = [&](int64_t run) { return s.row(begins[run] - 1, values[begins[run] - 1]); };
          const int64_t runs = static_cast<int64_t>(begins.size()) - 1;
          State<T> a, later{};  // later: the gradient of the state, from all runs behind
          load_state(a, start.data());
          for (int64_t run = 0; run < runs; ++run) {
            if (run > 0) add_to(a, &in[row_before(run) * kHidden]);
            if (run % kStretch == 0) store_state(&states[run / kStretch * kHidden], a);
          }
          for (int64_t first = (runs - 1) / kStretch * kStretch; first >= 0; first -= kStretch) {
            const int64_t last = std::min(runs, first + kStretch);
            load_state(a, &states[first / kStretch * kHidden]);
            for (int64_t run = first; run < last; ++run) {
              if (run > first) add_to(a, &in[row_before(run) * kHidden]);
              store_units(&units[(run - first) * kHidden], a);
            }
            for (int64_t run = last; run-- > first;) {
              State<T> h, of_h{};
              load_state(h, &units[(run - first) * kHidden]);
              for (int64_t i = begins[run] * s.outputs; i < begins[run + 1] * s.outputs; ++i) {
                const T g = own_grad[i];
                T* sum = &out_sums[i * kHidden];
                for (int v = 0; v < kVectors<T>; ++v) {
                  store(sum + v * kLanes<T>, load(sum + v * kLanes<T>) + g * h[v]);
                  of_h[v] += g * load(&from[i * kHidden + v * kLanes<T>]);
                }
              }
              for (int v = 0; v < kVectors<T>; ++v) later[v] += of_h[v] * (h[v] * (T(1) - h[v]));
              if (run > 0) add_into(&in_sums[row_before(run) * kHidden], later);
            }
          }
          add_into(bias_sums.data(), later);
        }
        paste(in_sums, s.steps * s.columns, s, tile, static_cast<T*>(of_in.data_ptr()));
        paste(out_sums, s.steps * s.outputs, s, tile, static_cast<T*>(of_out.data_ptr()));
        paste(bias_sums, 1, s, tile, static_cast<T*>(of_bias.data_ptr()));
      }
    });
  });
  return {of_in, of_bias, of_out};
}

// Fills x (B, D) where it is negative, by uniforms (B, D). All float32.
void nade_sample(Tensor in_weight, Tensor in_bias, Tensor out_weight, Tensor out_bias, Tensor uniforms,
                 double temperature, Tensor x) {
  const Sizes s(x.size(0), in_weight, out_weight);
  auto* values = static_cast<int64_t*>(x.data_ptr());
  const float *w = data_of<float>(in_weight), *from = data_of<float>(out_weight), *bias = data_of<float>(out_bias);
  share(s.batch, [&](int64_t begin, int64_t end) {
    const int classes = static_cast<int>(std::max<int64_t>(2, s.outputs));
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
