// The time loop of WaveNet sampling.
//
// Each step reads every weight of the current sample once; what bounds it is weight bytes, so:
//   - products with past samples (the "old taps") are computed for several steps ahead, as far as the dilation allows,
//     so that their weights are read once for up to kAhead samples;
//   - many streams share each weight that is read; streams are divided over threads, which never wait for each other;
//   - a single stream uses two threads with different roles. One walks the layers (current tap, gate, residual); the
//     other takes each layer's gate output, adds the skips, runs the output layers, samples, and prepares old taps. All
//     messages go one way at a time, so neither thread waits except at the turn of a step. A message can be on its way
//     for as long as a layer takes: the second thread hears of some layers at a time, and of the last ones at once.
//     What one thread writes lies on other cache lines than what both read; lines that the other one has read are asked
//     for ahead.
#pragma once

#include <bit>
#include <cstring>
#include <memory>

#include "packed_product.h"
#include "partner.h"
#include "sampling.h"
#include "wavenet_history.h"
#include "wavenet_weights.h"

namespace fastgen {
namespace {

constexpr int kAhead = 8;       // samples for which old taps are computed together
constexpr int kTold = 4;        // layers of which the helping thread hears at a time
constexpr int kOwned = 3;       // layers by which lines are asked for ahead
constexpr int kFewStreams = 2;  // up to here old taps are computed ahead; above, streams share the weights anyway

// One call's arguments.
struct Job {
  Shape shape;
  std::vector<int64_t> dilations;
  Distribution distribution;
  float temperature, log_scale_min;
  int64_t streams, steps, given_steps, position, uniforms_per_step;
  const float *gate_bias, *cond, *uniforms;
  int64_t gate_bias_stride;  // 0 where all streams share it
  float *history, *parameters;
  const int64_t* given_class;
  const float* given_value;
  int64_t *classes, *last_class;
  float *values, *last_value;
};

inline float* aligned(float* p) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 127) & ~uintptr_t{127});
}

// to += from; n is a multiple of kF.
inline void add(float* to, const float* from, int n) {
  for (int i = 0; i < n; i += kF) store(to + i, load(to + i) + load(from + i));
}

// The streams [first, first + count) of a job, advanced by one thread or by two.
template <class W>
class Streams {
 public:
  Streams(const Job& job, const Packed<W>& net, int64_t first, int64_t count, bool two_threads)
      : job_(job),
        net_(net),
        first_(first),
        n_(static_cast<int>(count)),
        two_threads_(two_threads),
        r_(job.shape.residual_padded()),
        h_(job.shape.gate_padded()),
        s_(static_cast<int>(round_up(job.shape.skip, 32))),
        o_(static_cast<int>(round_up(job.shape.outputs, 16))),
        x_in_(n_, job.shape.residual),
        skip_in_(n_, job.shape.skip),
        hidden_in_(n_, job.shape.skip),
        leads_(n_ * kAhead, job.shape.residual),
        helps_(two_threads ? n_ * kAhead : 0, job.shape.residual),
        history_(job.history, job.dilations, job.shape.kernel_size, first, n_, r_, job.position, job.steps) {
    const Shape& s = job.shape;
    layers_.resize(s.layers);
    int64_t pending = 0;
    bool shared_pending = false;
    for (int l = 0; l < s.layers; ++l) {
      Layer& layer = layers_[l];
      layer.dilation = job.dilations[l];
      layer.ahead =
          n_ > kFewStreams ? 1 : std::bit_floor(static_cast<uint32_t>(std::min<int64_t>(kAhead, layer.dilation)));
      layer.helped = two_threads && s.kernel_size > 1 && layer.dilation >= 2 * kAhead;
      layer.offset = layer.helped ? l % kAhead : 0;
      layer.pending = pending;
      if (two_threads || layer.ahead > 1)
        pending += int64_t{2} * layer.ahead * n_ * 2 * h_;
      else
        shared_pending = true;
    }
    share_skips();
    for (int l = s.layers - 1, size = 1; l >= 0; l -= size, size = std::min<int>(told_.size(), kTold))
      told_.insert(told_.begin(), l);
    // layers that prepare nothing ahead use their block at once, so they share one
    for (Layer& layer : layers_)
      if (!two_threads && layer.ahead == 1) layer.pending = pending;
    if (shared_pending) pending += int64_t{2} * n_ * 2 * h_;
    // a place for each layer's z, where the helper finds it, and which guesses its unit; else this layer's and the last
    // one's
    const int places = two_threads || (kFixed<W> && n_ <= kFewStreams) ? s.layers : 2;
    z_in_.reserve(places);
    for (int i = 0; i < places; ++i) z_in_.emplace_back(n_, s.gate);
    if (two_threads && kFixed<W>) place_messages();
    bias_rows_ = job.gate_bias_stride ? n_ : 1;
    const int64_t floats = pending + int64_t{n_} * (2 * r_ + (2 + places) * h_ + 2 * s_ + o_) + s_ +
                           sampling_scratch(s.outputs) + bias_rows_ * s.layers * 2 * h_;
    memory_.reset(new float[floats + 64 * 16]());
    float* p = aligned(memory_.get());
    const auto take = [&](int64_t n) {
      float* q = p;
      p = aligned(p + n);
      return q;
    };
    pending_ = take(pending);
    x_ = take(int64_t{2} * n_ * r_);
    a_ = take(int64_t{n_} * 2 * h_);
    z_ = take(int64_t{places} * n_ * h_);
    skip_ = take(int64_t{n_} * s_);
    led_skip_ = take(s_);
    hidden_ = take(int64_t{n_} * s_);
    out_ = take(int64_t{n_} * o_);
    scratch_ = take(sampling_scratch(s.outputs));
    bias_ = take(bias_rows_ * s.layers * 2 * h_);
    const float* bias = job.gate_bias + job.gate_bias_stride * first * s.layers * 2 * s.gate;
    for (int64_t row = 0; row < bias_rows_ * s.layers; ++row, bias += 2 * s.gate) {
      std::memcpy(bias_ + row * 2 * h_, bias, s.gate * sizeof(float));
      std::memcpy(bias_ + row * 2 * h_ + h_, bias + s.gate, s.gate * sizeof(float));
    }
    gated_ = std::vector<Flag>(two_threads ? told_.size() : 0);
    for (auto* at : {&a_at_, &x_at_, &next_x_at_, &skip_at_, &hidden_at_, &out_at_, &pre_at_}) at->resize(n_);
    hidden_bias_at_.assign(n_, net.hidden_bias);
    output_bias_at_.assign(n_, net.output_bias);
    for (int i = 0; i < n_; ++i) {
      a_at_[i] = a_ + int64_t{i} * 2 * h_;
      skip_at_[i] = skip_ + int64_t{i} * s_;
      hidden_at_[i] = hidden_ + int64_t{i} * s_;
      out_at_[i] = out_ + int64_t{i} * o_;
    }
  }

  void run() {
    if (!two_threads_) return alone(0);
    for_each_worker(2, [&](int64_t role) { role == 0 ? lead() : help(); });
  }

 private:
  using Block = typename Inputs<W>::Block;

  struct Layer {
    int64_t dilation, pending;
    int ahead, offset;
    bool helped;    // its old taps can be the helper's work: they are known more than a block of steps ahead
    bool led_skip;  // its skip is the leader's
  };

  // What a thread needs to multiply several columns of the past.
  struct Past {
    Inputs<W> x;
    OwnVector<const float*> in;
    OwnVector<float*> out;
    Past(int columns, int k) : x(columns, k), in(columns), out(columns) {}
  };

  // Where the helper has more to read in a step than the leader, some skips, never the last, move over. One thread sums
  // them apart too, so that the same bits come out.
  void share_skips() {
    if (n_ > 1) return;
    const Shape& s = job_.shape;
    const double conv = 2.0 * s.gate * s.residual, skip = static_cast<double>(s.skip) * s.gate;
    double leader = s.layers * (conv + static_cast<double>(s.gate) * s.residual);
    double helper = s.layers * skip + static_cast<double>(s.skip) * (s.skip + s.outputs);
    for (const Layer& layer : layers_)
      (layer.dilation >= 2 * kAhead ? helper : leader) += (s.kernel_size - 1) * conv / layer.ahead;
    const int moved = static_cast<int>(std::clamp((helper - leader) / (2 * skip), 0.0, s.layers / 2.0));
    for (int i = 0; i < moved; ++i) layers_[i * s.layers / moved].led_skip = true;
  }

  // The z of layers of which the helper hears at once lie one after another: fewer lines have to go over.
  void place_messages() {
    const int blocks = (job_.shape.gate + kBlock - 1) / kBlock;
    constexpr int kSpare = 128 / sizeof(Block) + 1;  // where told layers end, the rest of a line is left
    messages_.resize(job_.shape.layers * blocks + told_.size() * kSpare);
    auto* at = reinterpret_cast<uint8_t*>(messages_.data());
    for (int l = 0, told = 0; l < job_.shape.layers; ++l) {
      z_in_[l].place(0, reinterpret_cast<Block*>(at));
      at += blocks * sizeof(Block);
      if (l < told_[told]) continue;
      at = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(at), 128));
      ++told;
    }
  }

  // Where messages are slow the leader has old taps in fixed point sooner than the helper's word of them.
  bool helped(int l) const { return layers_[l].helped && (!kFixed<W> || meeting_.is_quick()); }

  bool begins_block(int l, int64_t t) const { return ((t - layers_[l].offset) & (layers_[l].ahead - 1)) == 0; }

  void alone(int64_t begin) {
    const int layers = job_.shape.layers;
    for (Layer& layer : layers_) layer.offset = 0;
    for (int64_t t = begin; t < job_.steps; ++t) {
      const auto prepare_layer = [&](int l) {
        if (l < layers && (t == begin || begins_block(l, t))) prepare(l, t, leads_);
      };
      prepare_layer(0);
      for (int i = 0; i < n_; ++i) embed(last_sample(i), i);
      start_skips();
      std::fill_n(led_skip_, s_, 0.0f);
      for (int l = 0; l < layers; ++l) {
        gated(l, t);
        // the processor does these while it waits for the gate
        if (l > 0) add_skip(l - 1);
        prepare_layer(l + 1);
        add_residual(l, t);
      }
      if (layers > 0) add_skip(layers - 1);
      emit(t);
    }
  }

  void lead() {
    if (!meeting_.helper_is_near()) return alone(0);
    const int64_t done = lead_together();
    if (done == job_.steps) return;
    meeting_.wait_for_helper_to_leave();
    alone(done);
  }

  // Returns how many steps were made before the threads parted.
  int64_t lead_together() {
    const int layers = job_.shape.layers;
    for (int l = 0; l < layers; ++l) prepare(l, 0, leads_);
    const double start = now();
    double lost = 0;
    for (int64_t t = 0; t < job_.steps; ++t) {
      for (int l = 0; l < std::min(kOwned, layers); ++l) ask_for_messages(l, t);
      const double more = emitted_.wait(t - 1);
      lost += more;
      if (more > 0 && lost > kLostAtLeast && lost > kLostShare * (now() - start)) {
        gated_[0].publish(kParted);
        return t;
      }
      embed(t > 0 ? emitted_.sample : last_sample(0), 0);
      std::fill_n(led_skip_, s_, 0.0f);
      for (int l = 0, told = 0; l < layers; ++l) {
        if (l + kOwned < layers) ask_for_messages(l + kOwned, t);
        gated(l, t);
        if (l == told_[told]) gated_[told++].publish(t);
        if (layers_[l].led_skip) add_skip(l);
        add_residual(l, t);
      }
      for (int l = 0; l < layers; ++l)
        if (!helped(l) && begins_block(l, t + 1)) prepare(l, t + 1, leads_);
    }
    emitted_.wait(job_.steps - 1);
    return job_.steps;
  }

  void help() {
    if (!meeting_.leader_stays()) return;
    const int layers = job_.shape.layers;
    for (int64_t t = 0; t < job_.steps; ++t) {
      for (int l = 0; l < layers; ++l)
        if (helped(l) && begins_block(l, t + 1)) prepare(l, t + 1, helps_);
      start_skips();
      for (int l = 0, told = 0; l < layers; l = told_[told++] + 1) {
        gated_[told].wait(t);
        if (l == 0 && gated_[0].step.load(std::memory_order_relaxed) == kParted) return meeting_.helper_leaves();
        for (int i = l; i <= told_[told]; ++i) each_line_of_z(i, prefetch);
        for (int i = l; i <= told_[told]; ++i)
          if (!layers_[i].led_skip) add_skip(i);
      }
      emit(t);
      emitted_.sample = last_sample(0);
      emitted_.publish(t);
    }
  }

  // Of a layer: what the leader will read that the helper has written, and what it will write that the helper has read.
  void ask_for_messages(int l, int64_t t) {
    prefetch(pending(l, t, 0), 2 * h_ * sizeof(float));
    each_line_of_z(l, own);
  }
  template <class F>
  void each_line_of_z(int l, F&& ask) {
    kFixed<W> ? z_in(l).each_copy(ask) : ask(z(l, 0), h_ * sizeof(float));
  }

  // Steps are counted from the start of the call; blocks of `ahead` steps, a power of two, begin at `offset`. Two
  // blocks alternate.
  float* pending(int l, int64_t t, int stream) {
    const Layer& layer = layers_[l];
    const int64_t slot = (t - layer.offset + kAhead) & (2 * layer.ahead - 1);
    return pending_ + layer.pending + (slot * n_ + stream) * 2 * h_;
  }

  // Where a layer's input of the current step goes: in float32 into the ring buffer.
  float* input(int l, int stream) {
    return history_.input(l, stream, x_in_, x_ + (static_cast<int64_t>(l % 2) * n_ + stream) * r_);
  }

  float* z(int l, int stream) { return z_ + (static_cast<int64_t>(l % z_in_.size()) * n_ + stream) * h_; }
  Inputs<W>& z_in(int l) { return z_in_[l % z_in_.size()]; }

  // bias + old taps for the whole block that holds step t, so that the same steps are always computed together and the
  // same bits come out of one thread and of two.
  void prepare(int l, int64_t t, Past& past) {
    const Layer& layer = layers_[l];
    t -= (t - layer.offset + kAhead) & (layer.ahead - 1);
    int columns = 0;
    for (int64_t i = 0; i < layer.ahead; ++i)
      for (int s = 0; s < n_; ++s, ++columns) {
        past.out[columns] = pending(l, t + i, s);
        if (helped(l)) own(past.out[columns], 2 * h_ * sizeof(float));
        past.in[columns] = bias_ + ((bias_rows_ > 1 ? s : 0) * int64_t{job_.shape.layers} + l) * 2 * h_;
      }
    if (job_.shape.kernel_size == 1)
      for (int c = 0; c < columns; ++c) std::memcpy(past.out[c], past.in[c], 2 * h_ * sizeof(float));
    for (int j = 1; j < job_.shape.kernel_size; ++j) {
      columns = 0;
      const int64_t length = history_.length(l);
      int64_t at = (job_.position + t + 2 * length - j * layer.dilation) % length;
      for (int64_t i = 0; i < layer.ahead; ++i, at = at + 1 < length ? at + 1 : 0)
        for (int s = 0; s < n_; ++s) history_.take(l, t + i - j * layer.dilation, at, s, past.x, columns++);
      product(net_.layers[l].old[j - 1], past.x, j == 1 ? past.in.data() : past.out.data(), past.out.data(), columns);
    }
  }

  // A class, or a value.
  struct Sample {
    int64_t c;
    float value;
  };
  Sample last_sample(int i) const {
    if (job_.distribution == Distribution::kCategorical) return {job_.last_class[first_ + i], 1.0f};
    return {0, job_.last_value[first_ + i]};
  }

  // The first layer's input: the input layer's column of the last sample.
  void embed(Sample last, int i) {
    if (job_.shape.layers == 0) return;
    float* x = x_at_[i] = input(0, i);
    const float* w = net_.input + last.c * r_;
    x_in_.fill(i, x, [&](int j) FASTGEN_INLINE {
      const VecF y = load(w + j) * last.value + load(net_.input_bias + j);
      store(x + j, y);
      return y;
    });
  }

  // z = tanh(a) * sigmoid(b).
  void gated(int l, int64_t t) {
    const Shape& s = job_.shape;
    for (int i = 0; i < n_; ++i) {
      float* a = pre_at_[i] = pending(l, t, i);
      if (!job_.cond) continue;
      const float* c = job_.cond + (((first_ + i) * job_.steps + t) * s.layers + l) * 2 * s.gate;
      for (int j = 0; j < s.gate; ++j) a[j] += c[j];
      for (int j = 0; j < s.gate; ++j) a[h_ + j] += c[s.gate + j];
    }
    product(net_.layers[l].current, x_in_, pre_at_.data(), a_at_.data(), n_);
    for (int i = 0; i < n_; ++i) {
      const float* a = a_at_[i];
      z_in(l).template fill<true>(i, z(l, i),
                                  [&](int j) FASTGEN_INLINE { return gate(load(a + j), load(a + h_ + j)); });
    }
  }

  // The next layer's input, if there is one; this layer's stays where it is.
  void add_residual(int l, int64_t t) {
    history_.remember(l, t, x_at_.data());
    if (l + 1 < job_.shape.layers) {
      const float* bias = net_.layers[l].residual_bias;
      for (int i = 0; i < n_; ++i) {
        float* to = next_x_at_[i] = input(l + 1, i);
        for (int j = 0; j < r_; j += kF) store(to + j, load(x_at_[i] + j) + load(bias + j));
      }
      product(net_.layers[l].residual, z_in(l), next_x_at_.data(), next_x_at_.data(), n_);
      for (int i = 0; i < n_; ++i) x_in_.set(i, next_x_at_[i]);
      x_at_.swap(next_x_at_);
    }
  }

  void start_skips() {
    for (int i = 0; i < n_; ++i) std::memcpy(skip_at_[i], net_.skip_bias, s_ * sizeof(float));
  }
  void add_skip(int l) {
    float* const* to = layers_[l].led_skip ? &led_skip_ : skip_at_.data();
    product(net_.layers[l].skip, z_in(l), to, to, n_);
  }

  void rectify(const OwnVector<float*>& at, Inputs<W>& in) {
    for (int i = 0; i < n_; ++i)
      in.fill(i, at[i], [&](int j) FASTGEN_INLINE { return at_least(load(at[i] + j), 0.0f); });
  }

  // Output layers, the next sample, and what the caller asked to keep.
  void emit(int64_t t) {
    const Shape& s = job_.shape;
    if (n_ == 1) add(skip_, led_skip_, s_);
    rectify(skip_at_, skip_in_);
    product(net_.hidden, skip_in_, hidden_bias_at_.data(), hidden_at_.data(), n_);
    rectify(hidden_at_, hidden_in_);
    product(net_.output, hidden_in_, output_bias_at_.data(), out_at_.data(), n_);
    for (int i = 0; i < n_; ++i) {
      const int64_t b = first_ + i, at = b * job_.steps + t;
      float* out = out_at_[i];
      if (job_.parameters) std::memcpy(job_.parameters + at * s.outputs, out, s.outputs * sizeof(float));
      const float* u = job_.uniforms + at * job_.uniforms_per_step;
      const bool given = t < job_.given_steps;
      if (job_.distribution == Distribution::kCategorical) {
        const int64_t c = given ? job_.given_class[b * job_.given_steps + t]
                                : sample_categorical(out, s.outputs, job_.temperature, u[0], scratch_);
        job_.classes[at] = job_.last_class[b] = c;
      } else {
        const float v = given ? job_.given_value[b * job_.given_steps + t]
                              : sample_mixture(job_.distribution, out, s.outputs, job_.temperature, job_.log_scale_min,
                                               u[0], u[1], scratch_);
        job_.values[at] = job_.last_value[b] = v;
      }
    }
  }

  const Job& job_;
  const Packed<W>& net_;
  const int64_t first_;
  const int n_;
  const bool two_threads_;
  const int r_, h_, s_, o_;  // padded channels: residual, gate, skip, outputs
  int64_t bias_rows_ = 1;
  OwnVector<Layer> layers_;
  std::unique_ptr<float[]> memory_;
  float *pending_, *x_, *a_, *z_, *skip_, *led_skip_, *hidden_, *out_, *bias_, *scratch_;
  OwnVector<float*> a_at_, skip_at_, hidden_at_, out_at_, pre_at_;
  OwnVector<const float*> hidden_bias_at_, output_bias_at_;
  Inputs<W> x_in_, skip_in_, hidden_in_;
  OwnVector<Block> messages_;  // in fixed point, what of z_in_ goes from the leader to the helper
  OwnVector<Inputs<W>> z_in_;
  Past leads_, helps_;
  History<W> history_;
  OwnVector<int> told_;                              // the last of the layers of which the helper hears at once
  std::vector<Flag> gated_;                          // by the leader, for each of told_: the gates up to there
  alignas(128) OwnVector<float*> x_at_, next_x_at_;  // which the leader swaps: not on a line that the helper reads
  struct : Flag {
    Sample sample;
  } emitted_;  // by the helper
  Meeting meeting_;
};

}  // namespace
}  // namespace fastgen
