// The gradients of a gated causal convolution and of a WaveNet layer; the forward pass is in gated_conv.h.
#pragma once

#include "gated_conv.h"

namespace fastgen {
namespace {

// Gradients in the compute type; see LayerBackward.
template <class T>
struct LayerGradients {
  T *x, *weight, *bias, *out_weight, *out_bias;  // the last two null without 1x1s
  T* cond;                                       // null where not wanted; (B, 2H, T) or (B, 2H, 1)
};

// Rows of a tile to columns of factors, (rows, time) -> (time, ld): a factor is moved as if it were a T.
template <class T, class S>
void transpose(const S* rows_of_tile, int64_t rows, S* to_columns, int64_t ld) {
  constexpr int kSide = kLanes<T>, kT = kTerms<T, S>, kLd = kRow<T, S> / kT;
  const auto* from = reinterpret_cast<const T*>(rows_of_tile);
  auto* to = reinterpret_cast<T*>(to_columns);
  int64_t r = 0;
  for (; r + kSide <= rows; r += kSide)
    for (int64_t i = 0; i < kLd; i += kSide) transpose_square(from + r * kLd + i, kLd, to + i * ld + r, ld);
  for (; r < rows; ++r)
    for (int64_t i = 0; i < kLd; ++i) std::memcpy(to + i * ld + r, from + r * kLd + i, sizeof(T));
}

// c (rows, ld) += a (rows, time) * b (time, ld); rows a multiple of kRows, ld of the lanes.
template <class T, class S, int Wide>
[[gnu::noinline]] void accumulate_block(const S* a, const S* b, T* c, int64_t rows, int64_t ld) {
  constexpr int kT = kTerms<T, S>;
  for (int64_t r = 0; r < rows; r += kRows, a += kRows * kRow<T, S>, c += kRows * ld) {
    Vec<T> sum[kRows][Wide] = {};  // a tile's own sum first: c may be far larger, and would round every product away
    multiply_add_here<T, S>(sum, a, kRow<T, S>, kT, b, ld * kT, kTile<T> / kT);
    each_sum<kRows, Wide>([&](auto i, auto v) FASTGEN_INLINE {
      T* to = c + i * ld + v * kLanes<T>;
      store(to, load(to) + sum[i][v]);
    });
  }
}
template <class T, class S>
void accumulate(const S* a, const S* b, T* c, int64_t rows, int64_t ld) {
  const int64_t vectors = ld / kLanes<T>;
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v, n = v * kLanes<T>, m = n * kTerms<T, S>;
    const int wide = left == 4 ? 2 : std::min<int64_t>(left, 3);  // one vector alone would wait for its sums
    if (wide == 3) accumulate_block<T, S, 3>(a, b + m, c + n, rows, ld);
    if (wide == 2) accumulate_block<T, S, 2>(a, b + m, c + n, rows, ld);
    if (wide == 1) accumulate_block<T, S, 1>(a, b + m, c + n, rows, ld);
    v += wide;
  }
}

// Each row of a tile, vector by vector, added to a vector of sums.
template <class T, class S>
void add_row_vectors(const S* tile, int64_t rows, T* sums) {
  for (int64_t r = 0; r < rows; ++r, tile += kRow<T, S>, sums += kLanes<T>) {
    Vec<T> sum = load_as(tile);
    for (int v = 1; v < kWide; ++v) sum += load_as(tile + v * kLanes<T>);
    store(sums, load(sums) + sum);
  }
}

// One pass over time, ascending. The gate is recomputed; its gradient da lives only in the tile at hand, and what it
// gives to x at t - shift is added there at once. A thread owns segments of time: it alone writes x's gradient in them,
// and runs on past the end of each, without counting weights, as far as the convolution reaches back.
template <class T, class S, class E>
class LayerBackward {
 public:
  static constexpr int kT = kTerms<T, S>;

  LayerBackward(const LayerShape& shape, const LayerTensors<E>& in, const E* grad_z, const E* grad_residual,
                const E* grad_skip, const LayerGradients<T>& out)
      : s_(shape),
        in_(in),
        grad_z_(grad_z),
        grad_residual_(grad_residual),
        grad_skip_(grad_skip),
        out_(out),
        gates_(shape, in.weight, in.bias),
        hp_(round_up(shape.gate, kRows)),
        op_(round_up(shape.outs, kRows)),
        ld_(round_up(shape.taps(), kLanes<T>)),
        zld_(round_up(shape.gate, kLanes<T>)),
        sum_rows_(2 * hp_ + op_) {
    const int64_t gate = s_.gate, outs = s_.outs, channels = s_.channels, kernel = s_.kernel;
    if (outs)
      back_out_ = pack_rows<T, S>(gate, outs, [&](int64_t h, int64_t o) { return in.out_weight[o * gate + h]; });
    for (int64_t k = 0; k < kernel; ++k)
      back_.push_back(pack_rows<T, S>(channels, 2 * hp_, [&](int64_t c, int64_t r) {
        const int64_t half = r < hp_ ? 0 : 1, h = r - half * hp_;
        return h < gate ? in.weight[((half * gate + h) * channels + c) * kernel + k] : E(0);
      }));

    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = s_.batch % threads == 0 ? 1 : s_.steps / (2 * s_.reach() + kTile<T>);
    segments_ = std::clamp<int64_t>(wanted, 1, threads);
    length_ = std::max<int64_t>(kTile<T>, round_up((s_.steps + segments_ - 1) / segments_, kTile<T>));
    segments_ = (s_.steps + length_ - 1) / length_;
    items_ = s_.batch * segments_;
    workers_.resize(std::clamp<int64_t>(items_, 1, threads));  // one also for no items: its sums are zero
    row_sums_.resize(items_ * sum_rows_);
  }

  void run() {
    const int64_t workers = workers_.size();
    for_each_worker(workers, [&](int64_t i) {
      workers_[i].reserve(*this);
      for (int64_t item = i * items_ / workers; item < (i + 1) * items_ / workers; ++item) segment(workers_[i], item);
    });
    sum_weights();
    sum_rows();
  }

 private:
  // A thread's buffers of one tile, and its sums.
  struct Worker {
    std::vector<S> factor_memory;
    std::vector<T> memory;
    S *inputs, *da, *z, *grad_out;              // (rows, time)
    S *paired_inputs, *paired_da, *paired_out;  // the same for sums over rows: see pair_rows
    S *inputs_t, *z_t;                          // (time, rows)
    T *grad_gate, *weight_sum, *out_sum;        // (hp, kTile), (2 hp, ld), (op, zld)
    T* row_sums;                                // (sum_rows, lanes), of one item

    void reserve(const LayerBackward& l) {
      constexpr int64_t row = kRow<T, S>, pair = kT == 1 ? 0 : kFactors<T, S>;
      const int64_t taps = l.s_.taps(), sums = l.sum_rows_ * kLanes<T>;
      place<S>(factor_memory, {{&inputs, taps * row},
                               {&da, 2 * l.hp_ * row},
                               {&z, l.hp_ * row},
                               {&grad_out, l.op_ * row},
                               {&paired_inputs, l.gates_.taps * pair},
                               {&paired_da, l.hp_ * pair},
                               {&paired_out, l.op_ * pair},
                               {&inputs_t, l.ld_ * row},
                               {&z_t, l.zld_ * row}});
      place<T>(memory, {{&grad_gate, l.hp_ * kTile<T>},
                        {&weight_sum, 2 * l.hp_ * l.ld_},
                        {&out_sum, l.op_ * l.zld_},
                        {&row_sums, sums}});
      if (kT == 1) paired_inputs = inputs, paired_da = da, paired_out = grad_out;
    }

   private:
    // Parts of one piece of memory.
    template <class V>
    static void place(std::vector<V>& memory, std::initializer_list<std::pair<V**, int64_t>> parts) {
      constexpr int64_t kApart = 4096 / sizeof(V);  // one thread's fetching ahead does not reach another's sums
      int64_t total = 2 * kApart;
      for (auto& [part, size] : parts) total += size;
      V* next = tile_aligned(memory, total) + kApart;
      for (auto& [part, size] : parts) *part = std::exchange(next, next + size);
    }
  };

  void segment(Worker& w, int64_t item) {
    const int64_t b = item / segments_, first = item % segments_ * length_;
    const int64_t last = std::min(first + length_, s_.steps);
    std::fill_n(w.row_sums, sum_rows_ * kLanes<T>, T(0));
    for (int64_t t = first; t < std::min(s_.steps, last + s_.reach()); t += kTile<T>) {
      load_inputs<T>(s_, in_.x + b * s_.channels * s_.steps, t, w.inputs);
      pair_inputs<T>(s_, w.inputs, w.paired_inputs);
      gradient_of_z(w, b, t);
      gradient_of_gate(w, b, t, t < last);
      for (int64_t k = s_.kernel - 1; k >= 0; --k) gradient_of_x(w, b, t, k, first, last);
      if (t >= last) continue;
      count_weights(w);
      gradient_of_cond(w, b, t);
    }
    for (int64_t r = 0; r < sum_rows_; ++r)
      row_sums_[item * sum_rows_ + r] = sum_of_lanes<T>(load(w.row_sums + r * kLanes<T>));
  }

  int64_t count(int64_t t) const { return std::min<int64_t>(kTile<T>, s_.steps - t); }

  // Rows of the gradient that is given, and row r of it from time t on.
  int64_t given_rows() const { return s_.outs ? s_.outs : s_.gate; }
  const E* given(int64_t b, int64_t r, int64_t t) const {
    if (!s_.outs) return grad_z_ + (b * s_.gate + r) * s_.steps + t;
    return r < s_.channels ? grad_residual_ + (b * s_.channels + r) * s_.steps + t
                           : grad_skip_ + (b * s_.skips() + r - s_.channels) * s_.steps + t;
  }

  void gradient_of_z(Worker& w, int64_t b, int64_t t) const {
    for (int64_t r = 0; r < given_rows(); ++r) {
      if (s_.outs)
        load_tile_row<T>(w.grad_out + r * kRow<T, S>, given(b, r, t), count(t));
      else
        load_tile_row<T>(w.grad_gate + r * kTile<T>, given(b, r, t), count(t));
    }
    if (!s_.outs) return;
    pair_rows<T>(w.grad_out, s_.outs, w.paired_out);
    const int64_t outs = factors<T, S>(s_.outs);
    for (int64_t h = 0; h < hp_; h += kRows) {
      Vec<T> sum[kRows][kWide] = {};
      multiply_add<T, S>(sum, back_out_.data() + h * outs * kT, w.paired_out, outs);
      for (int i = 0; i < kRows; ++i)
        for (int v = 0; v < kWide; ++v) store(w.grad_gate + (h + i) * kTile<T> + v * kLanes<T>, sum[i][v]);
    }
  }

  // Its sums over time too, where they count: of what rounding has not touched yet.
  void gradient_of_gate(Worker& w, int64_t b, int64_t t, bool counts) const {
    constexpr int kHalf = GateWeights<T, S, E>::kHalf;
    for (int64_t h = 0; h < gates_.padded; h += kHalf) {
      const int64_t panel = h / kHalf, panels = gates_.padded / kHalf, next = t + kTile<T>;
      fetch_rows<T>(given_rows(), panel, panels, [&](int64_t r) { return given(b, r, next); });
      fetch_rows<T>(s_.channels, panel, panels,
                    [&](int64_t c) { return in_.x + (b * s_.channels + c) * s_.steps + next; });
      Vec<T> sum[kRows][kWide];
      gates_.sums(s_, in_, w.paired_inputs, b, t, h, sum);
      for (int i = 0; i < kHalf && h + i < s_.gate; ++i) {  // rows of padding stay zero, also where x is infinite
        Vec<T> total[2] = {};
        for (int v = 0; v < kWide; ++v) {
          Vec<T> tanh, sigmoid;
          gate_parts(sum[i][v], sum[i + kHalf][v], tanh, sigmoid);
          const int64_t at = (h + i) * kRow<T, S> + v * kLanes<T>;
          const Vec<T> g = load(w.grad_gate + (h + i) * kTile<T> + v * kLanes<T>) * sigmoid;
          const Vec<T> of_tanh = g * (T(1) - tanh * tanh), of_sigmoid = g * tanh * (T(1) - sigmoid);
          store_factors(w.z + at, tanh * sigmoid);
          store_factors(w.da + at, of_tanh);
          store_factors(w.da + hp_ * kRow<T, S> + at, of_sigmoid);
          total[0] += of_tanh;
          total[1] += of_sigmoid;
        }
        for (int64_t half = 0; half < 2 && counts; ++half) {
          T* sums = w.row_sums + (half * hp_ + h + i) * kLanes<T>;
          store(sums, load(sums) + total[half]);
        }
      }
    }
    pair_rows<T>(w.da, 2 * hp_, w.paired_da);
  }

  void gradient_of_cond(Worker& w, int64_t b, int64_t t) const {
    if (!out_.cond || in_.cond_constant) return;
    for (int64_t r = 0; r < 2 * s_.gate; ++r)
      load_row(out_.cond + (b * 2 * s_.gate + r) * s_.steps + t, w.da + padded_row(r) * kRow<T, S>, count(t), count(t));
  }

  // Adds what tap k gives to x in [first, last); the last tap is the first to come there, and brings the residual.
  void gradient_of_x(Worker& w, int64_t b, int64_t t, int64_t k, int64_t first, int64_t last) const {
    const int64_t to = t - (s_.kernel - 1 - k) * s_.dilation;
    const int64_t begin = std::clamp<int64_t>(first - to, 0, count(t));
    const int64_t end = std::clamp<int64_t>(last - to, 0, count(t));
    if (begin >= end) return;
    const bool fresh = k == s_.kernel - 1;
    for (int64_t c = 0; c < s_.channels; c += kRows) {
      Vec<T> sum[kRows][kWide] = {};
      multiply_add<T, S>(sum, back_[k].data() + c * 2 * hp_, w.paired_da, 2 * hp_ / kT);
      for (int i = 0; i < kRows && c + i < s_.channels; ++i) {
        T* x = out_.x + (b * s_.channels + c + i) * s_.steps + to;
        const S* residual = fresh && s_.outs ? w.grad_out + (c + i) * kRow<T, S> : nullptr;
        for (int v = 0; v < kWide && residual; ++v) sum[i][v] += load_as(residual + v * kLanes<T>);
        if (end - begin == kTile<T>) {
          for (int v = 0; v < kWide; ++v) {
            T* at = x + v * kLanes<T>;
            store(at, fresh ? sum[i][v] : sum[i][v] + load(at));
          }
          continue;
        }
        T row[kTile<T>];
        for (int v = 0; v < kWide; ++v) store(row + v * kLanes<T>, sum[i][v]);
        for (int64_t j = begin; j < end; ++j) x[j] = fresh ? row[j] : row[j] + x[j];
      }
    }
  }

  void count_weights(Worker& w) const {
    transpose<T>(w.inputs, s_.taps(), w.inputs_t, ld_);
    accumulate<T>(w.da, w.inputs_t, w.weight_sum, 2 * hp_, ld_);
    if (!s_.outs) return;
    transpose<T>(w.z, s_.gate, w.z_t, zld_);
    accumulate<T>(w.grad_out, w.z_t, w.out_sum, op_, zld_);
    add_row_vectors<T>(w.grad_out, s_.outs, w.row_sums + 2 * hp_ * kLanes<T>);
  }

  int64_t padded_row(int64_t r) const { return r < s_.gate ? r : hp_ + r - s_.gate; }

  // The threads' sums, in a fixed order.
  void sum_weights() {
    const Worker& total = workers_[0];
    for (size_t i = 1; i < workers_.size(); ++i) {
      for (int64_t j = 0; j < 2 * hp_ * ld_; ++j) total.weight_sum[j] += workers_[i].weight_sum[j];
      for (int64_t j = 0; j < op_ * zld_; ++j) total.out_sum[j] += workers_[i].out_sum[j];
    }
    for (int64_t r = 0; r < 2 * s_.gate; ++r)
      for (int64_t c = 0; c < s_.channels; ++c)
        for (int64_t k = 0; k < s_.kernel; ++k)
          out_.weight[(r * s_.channels + c) * s_.kernel + k] =
              total.weight_sum[padded_row(r) * ld_ + k * s_.channels + c];
    for (int64_t r = 0; r < s_.outs; ++r) std::copy_n(total.out_sum + r * zld_, s_.gate, out_.out_weight + r * s_.gate);
  }
  void sum_rows() const {
    for (int64_t r = 0; r < 2 * s_.gate; ++r) {
      T total = 0;
      for (int64_t b = 0; b < s_.batch; ++b) {
        T sum = 0;
        for (int64_t i = b * segments_; i < (b + 1) * segments_; ++i) sum += row_sums_[i * sum_rows_ + padded_row(r)];
        if (out_.cond && in_.cond_constant) out_.cond[b * 2 * s_.gate + r] = sum;
        total += sum;
      }
      out_.bias[r] = total;
    }
    for (int64_t r = 0; r < s_.outs; ++r) {
      T sum = 0;
      for (int64_t i = 0; i < items_; ++i) sum += row_sums_[i * sum_rows_ + 2 * hp_ + r];
      out_.out_bias[r] = sum;
    }
  }

  const LayerShape& s_;
  const LayerTensors<E>& in_;
  const E *grad_z_, *grad_residual_, *grad_skip_;
  const LayerGradients<T>& out_;
  GateWeights<T, S, E> gates_;
  int64_t hp_, op_, ld_, zld_;         // rows of half a gate and of the 1x1s, columns of the weights' gradients; padded
  int64_t sum_rows_;                   // rows that are summed over time: both halves of the gate, then the 1x1s
  std::vector<S> back_out_;            // transposed weights: gate channels from outputs,
  std::vector<std::vector<S>> back_;   // and input channels from gate rows for each tap
  int64_t segments_, length_, items_;  // segments of a sequence and their steps; items are all sequences' segments
  std::vector<Worker> workers_;
  std::vector<T> row_sums_;  // (items, sum_rows)
};

// grad_z without 1x1s, else grad_residual and grad_skip.
template <class T, class S, class E>
void layer_backward(const LayerShape& s, const LayerTensors<E>& in, const E* grad_z, const E* grad_residual,
                    const E* grad_skip, const LayerGradients<T>& out) {
  LayerBackward<T, S, E>(s, in, grad_z, grad_residual, grad_skip, out).run();
}

}  // namespace
}  // namespace fastgen
