// The log-likelihood of binary values under a perceptron's logits; arguments are checked in
// fastgen/ops/bernoulli_perceptron.py.
//
// A block of rows passes through all layers while it lies in the second-level cache; logits stay in registers. Outputs
// lie in the lanes: panels of two vectors of them, stored in the order in which they are read, meet kRows rows at once.
//   log p(x) = sum over d of x l - max(l, 0)  -  log prod over d of (1 + e^-|l|)
// takes one logarithm for kFactors logits of a lane, which a float32 product can hold.
#include "simd.h"

namespace fastgen {
namespace {

constexpr int kRows = kVectorRegisters == 32 ? 14 : 6;
constexpr int kGroups = 4;  // of rows in a block
constexpr int kPanel = 2 * kF;
constexpr int kFactors = 64;
constexpr float kNoLogit = -1e30f;  // in place of an output that there is none of: e^-|l| = 0

struct Layer {
  int64_t in, out;
  OwnVector<float> panels, bias;  // [panel][in][kPanel], [panel][kPanel]

  Layer(const Tensor& weight, const Tensor& of_bias, float filler) : in(weight.size(1)), out(weight.size(0)) {
    const int64_t padded = round_up(out, kPanel);
    panels.assign(padded * in, 0.0f);
    bias.assign(padded, filler);
    std::copy_n(data_of<float>(of_bias), out, bias.data());
    const float* from = data_of<float>(weight);
    for (int64_t o = 0; o < out; ++o)
      for (int64_t k = 0; k < in; ++k) panels[(o / kPanel * in + k) * kPanel + o % kPanel] = from[o * in + k];
  }
  // Apart by no multiple of a page, so that rows do not compete for the same lines of the cache.
  static int64_t stride(int64_t width) { return round_up(width, kPanel) + 16; }
};

// f(row, first vector, second vector) for the outputs of a panel and kRows rows of h.
template <class F>
[[gnu::always_inline]] inline void times_panel(const float* h, int64_t stride, const Layer& layer, int64_t panel,
                                               F&& f) {
  const float *w = &layer.panels[panel * layer.in * kPanel], *bias = &layer.bias[panel * kPanel];
  VecF a[kRows], b[kRows];
  unroll<kRows>([&](auto r) FASTGEN_INLINE { a[r] = load(bias), b[r] = load(bias + kF); });
  for (int64_t k = 0; k < layer.in; ++k) {
    const VecF first = load(w + k * kPanel), second = load(w + k * kPanel + kF);
    unroll<kRows>([&](auto r) FASTGEN_INLINE {
      const VecF value = splat(h[r * stride + k]);
      a[r] += value * first;
      b[r] += value * second;
    });
  }
  unroll<kRows>([&](auto r) FASTGEN_INLINE { f(static_cast<int>(r), a[r], b[r]); });
}

// Sums of one row, lane by lane.
struct LogProb {
  VecF sum{}, factors = splat(1.0f);
  double logs = 0;

  void take_logs() {
    float lanes[kF];
    store(lanes, factors);
    for (float lane : lanes) logs -= std::log(lane);
    factors = splat(1.0f);
  }
  void add(VecF logit, VecF x) {
    const VecF positive = at_least(logit, 0.0f);
    sum += x * logit - positive;
    factors *= 1.0f + exp_any(logit - 2.0f * positive);
  }
};

Tensor bernoulli_perceptron(Tensor z, Tensor x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  std::vector<Layer> layers;
  int64_t widest = z.size(1);
  for (size_t i = 0; i < weights.size(); ++i) {
    layers.emplace_back(weights[i], biases[i], i + 1 < weights.size() ? 0.0f : kNoLogit);
    widest = std::max(widest, layers.back().out);
  }
  const Layer& last = layers.back();
  const int64_t rows = z.size(0), batch = x.size(0), block = kRows * kGroups, width = round_up(last.out, kPanel);
  OwnVector<float> padded(batch * width, 0.0f);
  for (int64_t b = 0; b < batch; ++b) std::copy_n(data_of<float>(x) + b * last.out, last.out, &padded[b * width]);
  Tensor result = torch::stable::new_empty(z, std::vector<int64_t>{rows});
  auto* out = static_cast<float*>(result.data_ptr());
  share((rows + block - 1) / block, [&](int64_t begin, int64_t end) {
    const int64_t stride = Layer::stride(widest);
    OwnVector<float> h(block * stride, 0.0f), next(block * stride, 0.0f);
    for (int64_t first = begin * block; first < std::min(rows, end * block); first += block) {
      const int64_t count = std::min(block, rows - first), groups = (count + kRows - 1) / kRows;
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(data_of<float>(z) + (first + i) * z.size(1), z.size(1), &h[i * stride]);
      for (size_t l = 0; l + 1 < layers.size(); ++l) {
        for (int64_t panel = 0; panel < round_up(layers[l].out, kPanel) / kPanel; ++panel)
          for (int64_t g = 0; g < groups; ++g)
            times_panel(&h[g * kRows * stride], stride, layers[l], panel, [&](int r, VecF a, VecF b) FASTGEN_INLINE {
              float* to = &next[(g * kRows + r) * stride + panel * kPanel];
              store(to, at_least(a, 0.0f));
              store(to + kF, at_least(b, 0.0f));
            });
        std::swap(h, next);
      }
      LogProb sums[kRows * kGroups];
      for (int64_t panel = 0; panel < width / kPanel; ++panel)
        for (int64_t g = 0; g < groups; ++g)
          times_panel(&h[g * kRows * stride], stride, last, panel, [&](int r, VecF a, VecF b) FASTGEN_INLINE {
            LogProb& row = sums[g * kRows + r];
            const float* of_x = &padded[(first + g * kRows + r) % batch * width + panel * kPanel];
            row.add(a, load(of_x));
            row.add(b, load(of_x + kF));
            if ((panel + 1) % (kFactors / 2) == 0) row.take_logs();
          });
      for (int64_t i = 0; i < count; ++i) {
        sums[i].take_logs();
        out[first + i] = static_cast<float>(sums[i].logs + sum_of_lanes<float>(sums[i].sum));
      }
    }
  });
  return result;
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("bernoulli_perceptron", TORCH_BOX(&fastgen::bernoulli_perceptron));
}
