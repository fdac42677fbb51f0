// The log-likelihood of binary values under a perceptron's logits; arguments are checked in
// fastgen/ops/bernoulli_perceptron.py.
//
// A block of rows passes through all layers while it lies in the second-level cache; logits stay in registers. Outputs
// lie in the lanes: panels of two vectors of them, stored in the order in which they are read, meet kRows rows at once.
//   log p(x) = sum over d of x l - max(l, 0)  -  log prod over d of (1 + e^-|l|)
// takes one logarithm for kFactors logits of a lane, which a float32 product can hold.
#include "functions.h"

namespace fastgen {
namespace {

constexpr int kRows = kVectorRegisters == 32 ? 14 : 6;
constexpr int kGroups = 4;  // of rows in a block
template <class T>
constexpr int kPanel = 2 * kLanes<T>;
constexpr int kFactors = 64;
constexpr float kNoLogit = -1e30f;  // in place of an output that there is none of: e^-|l| = 0

template <class T>
struct Layer {
  static constexpr int kPanel = fastgen::kPanel<T>;
  int64_t in, out;
  OwnVector<T> panels, bias;  // [panel][in][kPanel], [panel][kPanel]

  Layer(const Tensor& weight, const Tensor& of_bias, T filler) : in(weight.size(1)), out(weight.size(0)) {
    const int64_t padded = round_up(out, kPanel);
    panels.assign(padded * in, T(0));
    bias.assign(padded, filler);
    std::copy_n(data_of<T>(of_bias), out, bias.data());
    const T* from = data_of<T>(weight);
    for (int64_t o = 0; o < out; ++o)
      for (int64_t k = 0; k < in; ++k) panels[(o / kPanel * in + k) * kPanel + o % kPanel] = from[o * in + k];
  }
  // Apart by no multiple of a page, so that rows do not compete for the same lines of the cache.
  static int64_t stride(int64_t width) { return round_up(width, kPanel) + 16; }
};

// f(row, first vector, second vector) for the outputs of a panel and kRows rows of h.
template <class T, class F>
[[gnu::always_inline]] inline void times_panel(const T* h, int64_t stride, const Layer<T>& layer, int64_t panel,
                                               F&& f) {
  constexpr int kWidth = kPanel<T>, kSecond = kLanes<T>;
  const T *w = &layer.panels[panel * layer.in * kWidth], *bias = &layer.bias[panel * kWidth];
  Vec<T> a[kRows], b[kRows];
  unroll<kRows>([&](auto r) FASTGEN_INLINE { a[r] = load(bias), b[r] = load(bias + kSecond); });
  for (int64_t k = 0; k < layer.in; ++k) {
    const Vec<T> first = load(w + k * kWidth), second = load(w + k * kWidth + kSecond);
    unroll<kRows>([&](auto r) FASTGEN_INLINE {
      const Vec<T> value = splat(h[r * stride + k]);
      a[r] += value * first;
      b[r] += value * second;
    });
  }
  unroll<kRows>([&](auto r) FASTGEN_INLINE { f(static_cast<int>(r), a[r], b[r]); });
}

// Sums of one row, lane by lane.
template <class T>
struct LogProb {
  Vec<T> sum{}, factors = splat(T(1));
  double logs = 0;

  void take_logs() {
    T lanes[kLanes<T>];
    store(lanes, factors);
    for (T lane : lanes) logs -= std::log(lane);
    factors = splat(T(1));
  }
  void add(Vec<T> logit, Vec<T> x) {
    const Vec<T> positive = positive_part(logit);
    sum += x * logit - positive;
    factors *= T(1) + exp_any(logit - T(2) * positive);
  }
};

template <class T>
void log_prob(const Tensor& z, const Tensor& x, const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
              T* out) {
  constexpr int kWidth = kPanel<T>;
  std::vector<Layer<T>> layers;
  int64_t widest = z.size(1);
  for (size_t i = 0; i < weights.size(); ++i) {
    layers.emplace_back(weights[i], biases[i], i + 1 < weights.size() ? T(0) : T(kNoLogit));
    widest = std::max(widest, layers.back().out);
  }
  const Layer<T>& last = layers.back();
  const int64_t rows = z.size(0), batch = x.size(0), block = kRows * kGroups, width = round_up(last.out, kWidth);
  OwnVector<T> padded(batch * width, T(0));
  for (int64_t b = 0; b < batch; ++b) std::copy_n(data_of<T>(x) + b * last.out, last.out, &padded[b * width]);
  share((rows + block - 1) / block, [&](int64_t begin, int64_t end) {
    const int64_t stride = Layer<T>::stride(widest);
    OwnVector<T> h(block * stride, T(0)), next(block * stride, T(0));
    for (int64_t first = begin * block; first < std::min(rows, end * block); first += block) {
      const int64_t count = std::min(block, rows - first), groups = (count + kRows - 1) / kRows;
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(data_of<T>(z) + (first + i) * z.size(1), z.size(1), &h[i * stride]);
      for (size_t l = 0; l + 1 < layers.size(); ++l) {
        for (int64_t panel = 0; panel < round_up(layers[l].out, kWidth) / kWidth; ++panel)
          for (int64_t g = 0; g < groups; ++g)
            times_panel(&h[g * kRows * stride], stride, layers[l], panel,
                        [&](int r, Vec<T> a, Vec<T> b) FASTGEN_INLINE {
                          T* to = &next[(g * kRows + r) * stride + panel * kWidth];
                          store(to, positive_part(a));
                          store(to + kLanes<T>, positive_part(b));
                        });
        std::swap(h, next);
      }
      LogProb<T> sums[kRows * kGroups];
      for (int64_t panel = 0; panel < width / kWidth; ++panel)
        for (int64_t g = 0; g < groups; ++g)
          times_panel(&h[g * kRows * stride], stride, last, panel, [&](int r, Vec<T> a, Vec<T> b) FASTGEN_INLINE {
            LogProb<T>& row = sums[g * kRows + r];
            const T* of_x = &padded[(first + g * kRows + r) % batch * width + panel * kWidth];
            row.add(a, load(of_x));
            row.add(b, load(of_x + kLanes<T>));
            if ((panel + 1) % (kFactors / 2) == 0) row.take_logs();
          });
      for (int64_t i = 0; i < count; ++i) {
        sums[i].take_logs();
        out[first + i] = static_cast<T>(sums[i].logs + sum_of_lanes<T>(sums[i].sum));
      }
    }
  });
}

Tensor bernoulli_perceptron(Tensor z, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  Tensor result = torch::stable::new_empty(z, std::vector<int64_t>{z.size(0)});
  if (z.scalar_type() == ScalarType::Double)
    log_prob(z, x, weights, biases, static_cast<double*>(result.data_ptr()));
  else
    log_prob(z, x, weights, biases, static_cast<float*>(result.data_ptr()));
  return result;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("bernoulli_perceptron", TORCH_BOX(&fastgen::bernoulli_perceptron));
}
