// The time loop of WaveNet sampling.
//
// Each step reads every weight of the current sample once; what bounds it is weight bytes, so:
//   - products with past samples (the "old taps") are computed for several steps ahead, as far as the dilation allows,
//     so that their weights are read once for up to kAhead samples;
//   - many streams share each weight that is read; streams are divided over threads, which never wait for each other;
//   - where threads are left, a stream has two with different roles. One walks the layers (current tap, gate,
//   residual); the
//     other takes each layer's gate output, adds the skips, runs the output layers, samples, and prepares old taps. All
//     messages go one way at a time, so neither thread waits except at the turn of a step. A message can be on its way
//     for as long as a layer takes: the second thread hears of some layers at a time, and of the last ones at once.
//     What one thread writes lies on other cache lines than what both read; lines that the other one has read are asked
//     for ahead;
//   - where layers are large enough to meet twice in each, and it is one stream or no cache holds them, threads walk
//   the layers as a team, each with its rows of every
//     matrix: each weight is read by one of them alone, for all streams.
#pragma once

#include <bit>
#include <cstring>
#include <memory>

#include "packed_product.h"
#include "partner.h"
#include "wavenet_history.h"
#include "wavenet_plan.h"

namespace fastgen {
namespace {

inline float* aligned(float* p) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 127) & ~uintptr_t{127});
}

// to += from; n is a multiple of kF.
inline void add(float* to, const float* from, int n) {
  for (int i = 0; i < n; i += kF) store(to + i, load(to + i) + load(from + i));
}

// In how many rows of every matrix, in which all panels lie whole, threads can share it.
template <class W>
int row_unit(const Packed<W>& net) {
  return net.far ? kBlock : std::max(kBlock, kPanelVectors<W> * kF);
}

// The streams [first, first + count) of a job, advanced by one thread, by two, or by a team: then one of these is each
// thread's, with its own inputs of products, and their memory is the leader's.
template <class W>
class Streams {
 public:
  Streams(const Job& job, const Packed<W>& net, int64_t first, int64_t count, bool two_threads,
          const Streams* leader = nullptr)
      : job_(job),
        net_(net),
        first_(first),
        n_(static_cast<int>(count)),
        two_threads_(two_threads),
        r_(job.shape.residual_padded()),
        h_(job.shape.gate_padded()),
        s_(static_cast<int>(round_up(job.shape.skip, 32))),
        o_(static_cast<int>(round_up(job.shape.outputs, 16))),
        plan_(job, n_, two_threads),
        x_in_(n_, job.shape.residual),
        skip_in_(n_, job.shape.skip),
        hidden_in_(n_, job.shape.skip),
        leads_(n_ * kAhead, job.shape.residual),
        helps_(two_threads ? n_ * kAhead : 0, job.shape.residual),
        history_(job.history, job.dilations, job.shape.kernel_size, first, n_, r_, job.position, job.steps,
                 leader ? &leader->history_ : nullptr) {
    const Shape& s = job.shape;
    // a place for each layer's z, where the helper finds it, and which guesses its unit; else this layer's and the last
    // one's
    const int places = two_threads || (kFixed<W> && n_ <= kFewStreams) ? s.layers : 2;
    z_in_.reserve(places);
    for (int i = 0; i < places; ++i) z_in_.emplace_back(n_, s.gate);
    if (two_threads && kFixed<W>) place_messages();
    bias_rows_ = job.gate_bias_stride ? n_ : 1;
    const int64_t floats =
        plan_.pending + int64_t{n_} * (2 * r_ + (2 + places) * h_ + 2 * s_ + o_) + s_ + bias_rows_ * s.layers * 2 * h_;
    if (!leader) memory_.reset(new float[floats + 64 * 16]());
    float* p = aligned(leader ? leader->memory_.get() : memory_.get());
    const auto take = [&](int64_t n) {
      float* q = p;
      p = aligned(p + n);
      return q;
    };
    pending_ = take(plan_.pending);
    x_ = take(int64_t{2} * n_ * r_);
    a_ = take(int64_t{n_} * 2 * h_);
    z_ = take(int64_t{places} * n_ * h_);
    skip_ = take(int64_t{n_} * s_);
    led_skip_ = take(s_);
    hidden_ = take(int64_t{n_} * s_);
    out_ = take(int64_t{n_} * o_);
    scratch_.resize(sampling_scratch(s.outputs));
    bias_ = take(bias_rows_ * s.layers * 2 * h_);
    if (!leader) {
      const float* bias = job.gate_bias + job.gate_bias_stride * first * s.layers * 2 * s.gate;
      for (int64_t row = 0; row < bias_rows_ * s.layers; ++row, bias += 2 * s.gate)
        for (int j = 0; j < s.gate; ++j) {
          bias_[row * 2 * h_ + tanh_row(j)] = bias[j];
          bias_[row * 2 * h_ + sigmoid_row(j)] = bias[s.gate + j];
        }
    }
    gated_ = std::vector<Flag>(two_threads ? plan_.told.size() : 0);
    for (auto* at : {&a_at_, &z_at_, &x_at_, &next_x_at_, &skip_at_, &hidden_at_, &out_at_, &pre_at_}) at->resize(n_);
    hidden_bias_at_.assign(n_, net.hidden_bias);
    output_bias_at_.assign(n_, net.output_bias);
    for (int i = 0; i < n_; ++i) {
      a_at_[i] = a_ + int64_t{i} * 2 * h_;
      skip_at_[i] = skip_ + int64_t{i} * s_;
      hidden_at_[i] = hidden_ + int64_t{i} * s_;
      out_at_[i] = out_ + int64_t{i} * o_;
    }
  }

  void run() { walk(0); }

  // The two threads' roles: see wavenet_roles.h.
  void lead();
  void help();

  void run_with(Team& team, int part) {
    part_ = part;
    parts_ = team.parts();
    if (parts_ > 1) team_ = &team;
    walk(0);
  }

 private:
  using Block = typename Inputs<W>::Block;

  // What a thread needs to multiply several columns of the past.
  struct Past {
    Inputs<W> x;
    OwnVector<const float*> in;
    OwnVector<float*> out;
    Past(int columns, int k) : x(columns, k), in(columns), out(columns) {}
  };

  int64_t lead_together();
  void place_messages();

  // Where messages are slow the leader has old taps in fixed point sooner than the helper's word of them.
  bool helped(int l) const { return plan_.layers[l].helped && (!kFixed<W> || meeting_.is_quick()); }

  bool begins_block(int l, int64_t t) const {
    return ((t - plan_.layers[l].offset) & (plan_.layers[l].ahead - 1)) == 0;
  }

  // This thread's share of a column's or a matrix' rows, in which all panels of a matrix lie whole.
  Rows mine(int rows, bool from_the_end = false) const {
    if (parts_ == 1) return {0, rows};
    const int unit = row_unit(net_), units = (rows + unit - 1) / unit;
    const int part = from_the_end ? parts_ - 1 - part_ : part_;
    const auto begin = [&](int i) { return std::min((units * i + parts_ - 1) / parts_ * unit, rows); };
    return {begin(part), begin(part + 1)};
  }
  Rows my_gates() const { return mine(2 * h_); }
  Rows my_skips() const { return mine(s_, true); }  // who has more of the other rows has fewer of these
  bool is_mine(int stream) const { return stream % parts_ == part_; }

  // Where a team meets: all rows are there.
  void meet() {
    if (team_) team_->meet(part_, ++met_);
  }
  // A column, of which this thread makes its rows as value(row): an input for it alone, or, at `to`, for all once they
  // have met and each receives it.
  template <bool Guess = false, class F>
  [[gnu::always_inline]] void fill(Inputs<W>& in, int i, float* to, Rows rows, F&& value) {
    if (!team_) return in.template fill<Guess>(i, to, value);
    for (int j = rows.begin; j < rows.end; j += kF) store(to + j, value(j));
  }
  void receive(Inputs<W>& in, const OwnVector<float*>& at) {
    if (team_) in.set(at.data(), n_);
  }

  // From the step `begin` on, alone or in step with the team.
  void walk(int64_t begin) {
    const int layers = job_.shape.layers;
    for (Layer& layer : plan_.layers) layer.offset = 0;
    const auto prepare_layer = [&](int l, int64_t t) {
      if (l < layers && (t == begin || begins_block(l, t))) prepare(l, t, leads_);
    };
    prepare_layer(0, begin);
    meet();
    for (int64_t t = begin; t < job_.steps; ++t) {
      for (int i = 0; i < n_; ++i)
        if (is_mine(i))
          embed(last_sample(i), i);
        else
          x_at_[i] = input(0, i);
      start_skips();
      start_led_skip();
      if (team_ && part_ == 0) team_->review();
      meet();
      if (team_ && team_->parted()) {
        if (part_ > 0) return;
        team_ = nullptr;
        parts_ = 1;
        x_in_.set(x_at_.data(), n_);
      }
      receive(x_in_, x_at_);
      for (int l = 0; l < layers; ++l) {
        gated(l, t);
        // the processor does these while it waits for the gate
        if (l > 0) add_skip(l - 1);
        prepare_layer(l + 1, t);
        meet();
        receive(z_in(l), z_at_);
        add_residual(l, t);
        if (l + 1 == layers) break;
        meet();
        receive(x_in_, x_at_);
      }
      if (layers > 0) add_skip(layers - 1);
      emit(t, [&] {
        if (t + 1 < job_.steps) prepare_layer(0, t + 1);
      });
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
    const Layer& layer = plan_.layers[l];
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
    const Layer& layer = plan_.layers[l];
    const Rows rows = my_gates();
    t -= (t - layer.offset + kAhead) & (layer.ahead - 1);
    int columns = 0;
    for (int64_t i = 0; i < layer.ahead; ++i)
      for (int s = 0; s < n_; ++s, ++columns) {
        past.out[columns] = pending(l, t + i, s);
        if (helped(l)) own(past.out[columns], 2 * h_ * sizeof(float));
        past.in[columns] = bias_ + ((bias_rows_ > 1 ? s : 0) * int64_t{job_.shape.layers} + l) * 2 * h_;
      }
    if (job_.shape.kernel_size == 1)
      for (int c = 0; c < columns; ++c)
        std::memcpy(past.out[c] + rows.begin, past.in[c] + rows.begin, rows.count() * sizeof(float));
    for (int j = 1; j < job_.shape.kernel_size; ++j) {
      columns = 0;
      const int64_t length = history_.length(l);
      int64_t at = (job_.position + t + 2 * length - j * layer.dilation) % length;
      for (int64_t i = 0; i < layer.ahead; ++i, at = at + 1 < length ? at + 1 : 0)
        for (int s = 0; s < n_; ++s) history_.take(l, t + i - j * layer.dilation, at, s, past.x, columns++);
      product(net_.layers[l].old[j - 1], past.x, j == 1 ? past.in.data() : past.out.data(), past.out.data(), columns,
              rows);
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
    const Rows rows = my_gates(), gates{rows.begin / 2, std::min(rows.end / 2, s.gate)};
    for (int i = 0; i < n_; ++i) {
      float* a = pre_at_[i] = pending(l, t, i);
      if (!job_.cond) continue;
      const float* c = job_.cond + (((first_ + i) * job_.steps + t) * s.layers + l) * 2 * s.gate;
      for (int j = gates.begin; j < gates.end; ++j) a[tanh_row(j)] += c[j];
      for (int j = gates.begin; j < gates.end; ++j) a[sigmoid_row(j)] += c[s.gate + j];
    }
    product(net_.layers[l].current, x_in_, pre_at_.data(), a_at_.data(), n_, rows);
    for (int i = 0; i < n_; ++i) {
      const float* a = a_at_[i];
      z_at_[i] = z(l, i);
      fill<true>(z_in(l), i, z_at_[i], {rows.begin / 2, rows.end / 2},
                 [&](int j) FASTGEN_INLINE { return gate(load(a + tanh_row(j)), load(a + sigmoid_row(j))); });
    }
  }

  // The next layer's input, if there is one; this layer's stays where it is.
  void add_residual(int l, int64_t t) {
    history_.remember(l, t, x_at_.data());
    if (l + 1 < job_.shape.layers) {
      const float* bias = net_.layers[l].residual_bias;
      const Rows rows = mine(r_);
      for (int i = 0; i < n_; ++i) {
        float* to = next_x_at_[i] = input(l + 1, i);
        for (int j = rows.begin; j < rows.end; j += kF) store(to + j, load(x_at_[i] + j) + load(bias + j));
      }
      product(net_.layers[l].residual, z_in(l), next_x_at_.data(), next_x_at_.data(), n_, rows);
      if (!team_) x_in_.set(next_x_at_.data(), n_);
      x_at_.swap(next_x_at_);
    }
  }

  void start_skips() {
    const Rows rows = my_skips();
    for (int i = 0; i < n_; ++i)
      std::memcpy(skip_at_[i] + rows.begin, net_.skip_bias + rows.begin, rows.count() * sizeof(float));
  }
  void start_led_skip() {
    const Rows rows = my_skips();
    std::fill_n(led_skip_ + rows.begin, rows.count(), 0.0f);
  }
  void add_skip(int l) {
    float* const* to = plan_.layers[l].led_skip ? &led_skip_ : skip_at_.data();
    product(net_.layers[l].skip, z_in(l), to, to, n_, my_skips());
  }

  void rectify(const OwnVector<float*>& at, Inputs<W>& in) {
    for (int i = 0; i < n_; ++i)
      fill(in, i, at[i], my_skips(), [&](int j) FASTGEN_INLINE { return at_least(load(at[i] + j), 0.0f); });
    meet();
    receive(in, at);
  }

  // Output layers, the next sample, and what the caller asked to keep.
  template <class F>
  void emit(int64_t t, F&& before_sampling) {
    const Shape& s = job_.shape;
    const Rows rows = my_skips();
    if (n_ == 1) add(skip_ + rows.begin, led_skip_ + rows.begin, rows.count());
    rectify(skip_at_, skip_in_);
    product(net_.hidden, skip_in_, hidden_bias_at_.data(), hidden_at_.data(), n_, rows);
    rectify(hidden_at_, hidden_in_);
    product(net_.output, hidden_in_, output_bias_at_.data(), out_at_.data(), n_, mine(o_));
    before_sampling();
    meet();
    for (int i = 0; i < n_; ++i) {
      if (!is_mine(i)) continue;
      const int64_t b = first_ + i, at = b * job_.steps + t;
      float* out = out_at_[i];
      if (job_.parameters) std::memcpy(job_.parameters + at * s.outputs, out, s.outputs * sizeof(float));
      const float* u = job_.uniforms + at * job_.uniforms_per_step;
      const bool given = t < job_.given_steps;
      if (job_.distribution == Distribution::kCategorical) {
        const int64_t c = given
                              ? job_.given_class[b * job_.given_steps + t]
                              : sample_categorical(out, s.outputs, job_.temperature, u[0], scratch_.data(), job_.kept);
        job_.classes[at] = job_.last_class[b] = c;
      } else {
        const float v = given ? job_.given_value[b * job_.given_steps + t]
                              : sample_mixture(job_.distribution, out, s.outputs, job_.temperature, job_.log_scale_min,
                                               u[0], u[1], scratch_.data());
        job_.values[at] = job_.last_value[b] = v;
      }
    }
  }

  const Job& job_;
  const Packed<W>& net_;
  const int64_t first_;
  const int n_;
  const bool two_threads_;
  int part_ = 0, parts_ = 1;  // of the team's members
  int64_t met_ = 0;           // times that they have met
  Team* team_ = nullptr;      // in whose step this one goes
  const int r_, h_, s_, o_;   // padded channels: residual, gate, skip, outputs
  int64_t bias_rows_ = 1;
  Plan plan_;
  std::unique_ptr<float[]> memory_;
  float *pending_, *x_, *a_, *z_, *skip_, *led_skip_, *hidden_, *out_, *bias_;
  OwnVector<float> scratch_;
  OwnVector<float*> a_at_, z_at_, skip_at_, hidden_at_, out_at_, pre_at_;
  OwnVector<const float*> hidden_bias_at_, output_bias_at_;
  Inputs<W> x_in_, skip_in_, hidden_in_;
  OwnVector<Block> messages_;  // in fixed point, what of z_in_ goes from the leader to the helper
  OwnVector<Inputs<W>> z_in_;
  Past leads_, helps_;
  History<W> history_;
  std::vector<Flag> gated_;                          // by the leader, for each of those told: the gates up to there
  alignas(128) OwnVector<float*> x_at_, next_x_at_;  // which the leader swaps: not on a line that the helper reads
  struct : Flag {
    Sample sample;
  } emitted_;  // by the helper
  Meeting meeting_;
};

}  // namespace
}  // namespace fastgen
