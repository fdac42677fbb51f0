// The time loop of WaveNet sampling on a GPU, a cluster of thread blocks for each group of streams.
//
// The blocks are a pipeline: each has some layers, the last one the output layers, and their weights stay in its shared
// memory for the whole loop. A vector x passes from block to block as soon as it is known; behind it, off the chain on
// which the next sample waits, each block adds its skips to the sum that follows x, and multiplies the past inputs of
// its layers for the next step, whose products then need only a vector's addition. Streams come in tiles, which share
// each weight that is read; several tiles keep all blocks of the pipeline busy.
//
// Where the weights are on the chip, nothing on the chain waits for global memory but the first layer's input: biases,
// uniforms and the rows of the queues are in shared memory by then.
//
// A mailbox is written again only after the sample that its last content led to, so no answer need be awaited.
#pragma once

#include "network.cuh"
#include "wavenet_job.h"

namespace fastgen::wavenet {

// One value from a mixture, as sampling.h in the CPU's kernels. By one warp.
FASTGEN_DEVICE float sample_mixture(const Job& job, const float* parameters, float u, float v) {
  const int outputs = job.shape.outputs, mixtures = outputs == 2 ? 1 : outputs / 3;
  const float* means = parameters + outputs - 2 * mixtures;
  const int i = mixtures == 1 ? 0 : sample_categorical(parameters, mixtures, job.temperature, u);
  const double p = fmin(fmax(static_cast<double>(v), 1e-7), 1.0 - 1e-7);
  const double unit = job.distribution == Distribution::kLogisticMixture ? log(p) - log1p(-p) : normal_quantile(p);
  const float log_scale = fmaxf(means[mixtures + i], job.log_scale_min);
  const double x = means[i] + static_cast<double>(job.temperature) * exp(static_cast<double>(log_scale)) * unit;
  return static_cast<float>(fmin(fmax(x, -1.0), 1.0));
}

// One block's part, for streams in tiles of at most N = 4 M. A group of one stream has room in its products for some
// steps at once: the past that a long enough dilation reaches is multiplied for four of them together.
template <int M, bool kResident, class W>
class Block {
 public:
  FASTGEN_DEVICE explicit Block(const Job& job)
      : job_(job),
        rank_(block() % job.cluster),
        next_(rank_ + 1 < job.cluster ? rank_ + 1 : rank_),
        share_(job.layout, job.shape, rank_, job.cluster),
        first_(int64_t{block() / job.cluster} * job.tiles * job.tile),
        alone_(job.tiles == 1 && streams_of(0) == 1) {
    Shared shared;
    x_in_ = shared.take<float>(int64_t{job.tiles} * N * job.shape.residual);
    s_in_ = shared.take<float>(int64_t{job.tiles} * N * job.shape.skip);
    came_ = shared.take<int64_t>(job.tiles * N);
    came_value_ = shared.take<float>(job.tiles * N);
    arrived_ = shared.take<int64_t>(3 * job.tiles);  // steps that have come: of x, of the sum of skips, of samples
    // the arrays above are where other blocks write: the same in each
    weights_ = static_cast<const W*>(job.weights) + share_.begin;
    W* own = shared.take<W>(kResident ? share_.size : 0);
    if constexpr (kResident) {
      for (int64_t i = int64_t{thread()} * kGroup; i < share_.size; i += int64_t{threads()} * kGroup)
        *reinterpret_cast<Group<W>*>(own + i) = *reinterpret_cast<const Group<W>*>(weights_ + i);
      weights_ = own;
    }
    input_ = vectors(shared.take<W>(parts(2, job.lengths.x)), 2, job.lengths.x);
    past_ = vectors(shared.take<W>(parts(1, job.lengths.past)), 1, job.lengths.past);
    sum_ = shared.take<float>(N * job.shape.skip);
    skip_bias_ = shared.take<float>((rank_ == 0) * job.shape.skip);
    for (int i = thread(); rank_ == 0 && i < job.shape.skip; i += threads())
      skip_bias_[i] = job.floats[job.layout.skip_bias + i];
    skips_ = vectors(shared.take<W>(parts(share_.head, job.lengths.s)), share_.head, job.lengths.s);
    hidden_ = vectors(shared.take<W>(parts(share_.head, job.lengths.s)), share_.head, job.lengths.s);
    out_ = shared.take<float>(share_.head * N * job.shape.outputs);
    head_bias_ = shared.take<float>(share_.head * (job.shape.skip + job.shape.outputs));
    uniforms_ = shared.take<float>(2 * N);
    class_ = shared.take<int64_t>(N);
    value_ = shared.take<float>(N);
    for (int i = thread(); share_.head && i < job.shape.skip + job.shape.outputs; i += threads())
      head_bias_[i] = job.floats[job.layout.hidden_bias + i];  // the output's lie behind the hidden ones'
    if (!kResident && job.scratch) {
      Spilled spilled{job.scratch + block() * job.scratch_bytes};
      take_of_layers(spilled);
    } else {
      take_of_layers(shared);
    }
    for (int i = thread(); i < 3 * job.tiles; i += threads()) arrived_[i] = 0;
    sync_cluster();
  }

  FASTGEN_DEVICE void run() {
    for (int64_t t = 0; t < job_.steps; ++t) {
      for (int tile = 0; tile < job_.tiles && streams_of(tile) > 0; ++tile) {
        if (share_.head) take_uniforms(tile, t);
        prepare(tile, t);
        if (share_.layers() > 0 || rank_ == 0) walk(tile, t);
        if (share_.head) emit(tile, t);
      }
      sync_block();
      for (int own = thread(); own < share_.layers(); own += threads())
        queues_[own].now = queues_[own].now + 1 < queues_[own].length ? queues_[own].now + 1 : 0;
      sync_block();
    }
    sync_cluster();  // so that no block's memory goes while another writes there
  }

 private:
  static constexpr int N = 4 * M, kAhead = 4;

  // A layer's past inputs: rows of the history from `first`, the current step's at `now`.
  struct Queue {
    int64_t first, length, now, dilation;
    // the row of the input `distance` <= length before the step `ahead` from now
    FASTGEN_DEVICE int64_t row(int64_t ahead, int64_t distance) const {
      const int64_t i = now + ahead - distance;
      return first + (i < 0 ? i + length : i < length ? i : i - length);
    }
  };

  // Memory of this block elsewhere, taken as `Shared` is.
  struct Spilled {
    unsigned char* at;
    template <class T>
    FASTGEN_DEVICE T* take(int64_t n) {
      T* p = reinterpret_cast<T*>(at);
      at += round_up(n * sizeof(T), 16);
      return p;
    }
  };

  // What is kept of each of this block's layers; see Job::of_layers.
  template <class Memory>
  FASTGEN_DEVICE void take_of_layers(Memory& memory) {
    const int layers = share_.layers(), residual = job_.shape.residual;
    x_ = memory.template take<float>(int64_t{layers > 1 ? layers : 1} * N * job_.lengths.x);
    pending_ = memory.template take<float>(int64_t{layers} * N * 2 * job_.shape.gate);
    z_ = vectors(memory.template take<W>(parts(layers, job_.lengths.z)), layers, job_.lengths.z);
    bias_ = memory.template take<float>(int64_t{layers} * residual);
    queues_ = memory.template take<Queue>(layers);
    for (int i = thread(); i < layers * residual; i += threads())
      bias_[i] = job_.floats[job_.layout.residual_bias + int64_t{share_.first} * residual + i];
    for (int own = thread(); own < layers; own += threads()) {
      const int64_t dilation = job_.dilations[share_.first + own], length = (job_.shape.kernel_size - 1) * dilation;
      queues_[own] = {job_.history_at[share_.first + own], length, length ? job_.position % length : 0, dilation};
    }
  }

  // Of `count` times N vectors; filled with zeros, so that a product may read what no stream has.
  FASTGEN_DEVICE static int64_t parts(int count, int length) {
    return int64_t{count} * N * length * Vectors<W>::kParts;
  }
  FASTGEN_DEVICE static Vectors<W> vectors(W* data, int count, int length) {
    for (int64_t i = thread(); i < parts(count, length); i += threads()) data[i] = 0;
    return {data, length};
  }

  FASTGEN_DEVICE int64_t stream(int tile, int n) const { return first_ + tile * job_.tile + n; }
  FASTGEN_DEVICE int streams_of(int tile) const {
    const int64_t left = job_.streams - stream(tile, 0);
    return left < 0 ? 0 : left < job_.tile ? static_cast<int>(left) : job_.tile;
  }
  FASTGEN_DEVICE float* mail(float* box, int tile, int length) const { return box + int64_t{tile} * N * length; }
  FASTGEN_DEVICE Vectors<W> nth(const Vectors<W>& v, int i) const { return {v.group(i * N, 0, 0), v.length}; }
  FASTGEN_DEVICE float* pending(int own, int column) const {
    return pending_ + (int64_t{own} * N + column) * 2 * job_.shape.gate;
  }

  // f(n, i) for n in [from, to) and i < length, by all threads.
  template <class F>
  FASTGEN_DEVICE void each(int from, int to, int length, F&& f) const {
    for (int i = from * length + thread(); i < to * length; i += threads()) f(i / length, i % length);
  }

  enum Kind { kX = 0, kSum = 1, kSample = 2 };

  // All of a block has written; the block `rank` may read it.
  FASTGEN_DEVICE void send(Kind kind, int tile, int rank, int64_t step) {
    sync_block();
    if (thread() == 0 && job_.cluster > 1) store_release(in_block(arrived_ + kind * job_.tiles + tile, rank), step);
  }

  FASTGEN_DEVICE void receive(Kind kind, int tile, int64_t step) {
    if (job_.cluster == 1) return;  // the sender's own sync is enough
    if (thread() == 0) wait_for(arrived_ + kind * job_.tiles + tile, step);
    sync_block();
  }

  // The layers of this block, from x to x, and their skips.
  FASTGEN_DEVICE void walk(int tile, int64_t t) {
    const int live = streams_of(tile), residual = job_.shape.residual, length = job_.lengths.x;
    if (rank_ == 0) {
      embed(tile, t);
    } else {
      receive(kX, tile, t + 1);
      const float* in = mail(x_in_, tile, residual);
      each(0, live, residual, [&](int n, int r) { set_x(0, n, r, in[n * residual + r]); });
    }
    sync_block();
    const bool more = share_.last < job_.shape.layers;  // layers in the next block
    for (int own = 0; own < share_.layers(); ++own) {
      const W* w = weights_ + job_.layout.layer * own;
      const float* x = x_ + int64_t{own} * N * length;
      const Vectors<W> z = nth(z_, own);
      product<M, true>(job_.layout.tap, w, nth(input_, own & 1), live, [&](int unit, int n, float a, float b) {
        const float* before = pending(own, alone_ ? static_cast<int>(t % kAhead) : n);
        z.put(n, unit, gate(before[unit] + a, before[job_.shape.gate + unit] + b));
      });
      sync_block();
      const bool passes = own + 1 == share_.layers();
      if (!passes || more) {
        const float* bias = bias_ + own * residual;
        float* to = in_block(mail(x_in_, tile, residual), next_);
        product<M>(job_.layout.residual, w + job_.layout.residual_at(), z, live, [&](int unit, int n, float v) {
          v += x[n * length + unit] + bias[unit];
          if (passes)
            to[n * residual + unit] = v;
          else
            set_x(own + 1, n, unit, v);
        });
      }
      if (passes && more)
        send(kX, tile, next_, t + 1);
      else
        sync_block();
    }
    add_skips(tile, t);
    // only now: a message to another block waits for what was stored before it
    for (int own = 0; own < share_.layers(); ++own) remember(tile, queues_[own], x_ + int64_t{own} * N * length);
  }

  // The input of this block's layer `own`.
  FASTGEN_DEVICE void set_x(int own, int n, int r, float v) {
    x_[(int64_t{own} * N + n) * job_.lengths.x + r] = v;
    input_.put((own & 1) * N + n, r, v);
  }

  FASTGEN_DEVICE void embed(int tile, int64_t t) {
    const bool categorical = job_.distribution == Distribution::kCategorical;
    if (t > 0) receive(kSample, tile, t);
    each(0, streams_of(tile), job_.shape.residual, [&](int n, int r) {
      const int64_t b = stream(tile, n);
      const float* row = job_.floats + job_.layout.input;
      float value = 1;
      if (categorical)
        row += (t > 0 ? came_[tile * N + n] : job_.last_class[b]) * job_.shape.residual;
      else
        value = t > 0 ? came_value_[tile * N + n] : job_.last_value[b];
      set_x(0, n, r, row[r] * value + job_.floats[job_.layout.input_bias + r]);
    });
  }

  // x becomes part of the layer's past.
  FASTGEN_DEVICE void remember(int tile, const Queue& queue, const float* x) {
    if (queue.length == 0) return;
    const int64_t row = queue.row(0, 0);
    each(0, streams_of(tile), job_.shape.residual,
         [&](int n, int r) { past_row(stream(tile, n), row)[r] = x[n * job_.lengths.x + r]; });
  }

  FASTGEN_DEVICE float* past_row(int64_t b, int64_t row) const {
    return job_.history + (b * job_.history_rows + row) * job_.history_stride;
  }

  FASTGEN_DEVICE void add_skips(int tile, int64_t t) {
    const int live = streams_of(tile), skip = job_.shape.skip;
    if (rank_ > 0) receive(kSum, tile, t + 1);
    const float* in = mail(s_in_, tile, skip);
    each(0, live, skip, [&](int n, int k) { sum_[n * skip + k] = rank_ > 0 ? in[n * skip + k] : skip_bias_[k]; });
    sync_block();
    for (int own = 0; own < share_.layers(); ++own)  // a unit is always the same thread's
      product<M>(job_.layout.skip, weights_ + job_.layout.layer * own + job_.layout.skip_at(), nth(z_, own), live,
                 [&](int unit, int n, float v) { sum_[n * skip + unit] += v; });
    sync_block();
    if (share_.head) return;
    float* to = in_block(mail(s_in_, tile, skip), next_);
    each(0, live, skip, [&](int n, int k) { to[n * skip + k] = sum_[n * skip + k]; });
    send(kSum, tile, next_, t + 1);
  }

  // What the past and the conditioning give the gates of step t. Columns of the products are streams, or the steps from
  // t on that a stream alone prepares together.
  FASTGEN_DEVICE void prepare(int tile, int64_t t) {
    const int gates = 2 * job_.shape.gate, now = alone_ ? static_cast<int>(t % kAhead) : 0;
    const int64_t left = job_.steps - t;
    const int columns = alone_ ? static_cast<int>(left < kAhead ? left : kAhead) : streams_of(tile);
    const auto stream_of = [&](int n) { return alone_ ? first_ : stream(tile, n); };
    const auto step_of = [&](int n) { return alone_ ? t + n : t; };
    for (int own = 0; own < share_.layers(); ++own) {
      const int l = share_.first + own;
      const W* w = weights_ + job_.layout.layer * own;
      const auto add = [&](const Tiles& tiles, int64_t at, int from, int to) {
        sync_block();
        product<M, true>(tiles, w + at, past_, to, [&](int unit, int n, float a, float b) {
          if (n < from) return;
          pending(own, n)[unit] += a;
          pending(own, n)[job_.shape.gate + unit] += b;
        });
        sync_block();
      };
      if (now == 0) {
        each(0, columns, gates, [&](int n, int g) {
          float v = job_.gate_bias[(stream_of(n) * job_.gate_bias_stride * job_.shape.layers + l) * gates + g];
          if (job_.cond && job_.shape.local == 0)
            v += job_.cond[((stream_of(n) * job_.steps + step_of(n)) * job_.shape.layers + l) * gates + g];
          pending(own, n)[g] = v;
        });
        if (job_.cond && job_.shape.local > 0) {
          each(0, columns, job_.shape.local, [&](int n, int k) {
            past_.put(n, k, job_.cond[(stream_of(n) * job_.steps + step_of(n)) * job_.shape.local + k]);
          });
          add(job_.layout.local, job_.layout.local_at(), 0, columns);
        }
      }
      const Queue& queue = queues_[own];
      for (int j = 1; j < job_.shape.kernel_size; ++j) {
        const int64_t distance = j * queue.dilation;
        const bool one = alone_ && distance < kAhead;  // the later steps' past is yet to come
        if (alone_ && !one && now > 0) continue;
        const int from = one ? now : 0, to = one ? now + 1 : columns;
        each(from, to, job_.shape.residual, [&](int n, int r) {
          const int64_t row = queue.row(one || !alone_ ? 0 : n, distance);
          past_.put(n, r, past_row(stream_of(n), row)[r]);
        });
        add(job_.layout.tap, job_.layout.old_at(j), from, to);
      }
    }
    sync_block();
  }

  // The output layers, and the sample.
  FASTGEN_DEVICE void emit(int tile, int64_t t) {
    const int live = streams_of(tile), skip = job_.shape.skip, outputs = job_.shape.outputs;
    const float* in = sum_;
    if (job_.cluster > 1) {
      receive(kSum, tile, t + 1);
      in = mail(s_in_, tile, skip);
    }
    each(0, live, skip, [&](int n, int k) { skips_.put(n, k, fmaxf(in[n * skip + k], 0.0f)); });
    sync_block();
    const W* w = weights_ + (job_.layout.head - share_.begin);
    product<M>(job_.layout.hidden, w, skips_, live,
               [&](int unit, int n, float v) { hidden_.put(n, unit, fmaxf(v + head_bias_[unit], 0.0f)); });
    sync_block();
    product<M>(job_.layout.output, w + job_.layout.hidden.size(), hidden_, live, [&](int unit, int n, float v) {
      v += head_bias_[skip + unit];
      out_[n * outputs + unit] = v;
    });
    sync_block();
    for (int n = thread() / 32; n < live; n += threads() / 32) choose(tile, n, t);
    send(kSample, tile, 0, t + 1);
    publish(tile, t);
  }

  FASTGEN_DEVICE void take_uniforms(int tile, int64_t t) {
    const int each_has = job_.distribution == Distribution::kCategorical ? 1 : 2;
    for (int i = thread(); i < streams_of(tile) * each_has; i += threads())
      uniforms_[i] = job_.uniforms[(stream(tile, i / each_has) * job_.steps + t) * each_has + i % each_has];
  }

  // The results of a step, once the next has begun.
  FASTGEN_DEVICE void publish(int tile, int64_t t) {
    const int live = streams_of(tile), outputs = job_.shape.outputs;
    if (job_.parameters)
      each(0, live, outputs, [&](int n, int o) {
        job_.parameters[(stream(tile, n) * job_.steps + t) * outputs + o] = out_[n * outputs + o];
      });
    each(0, live, 1, [&](int n, int) {
      const int64_t b = stream(tile, n), at = b * job_.steps + t;
      if (job_.distribution == Distribution::kCategorical) {
        job_.classes[at] = class_[n];
        if (t + 1 == job_.steps) job_.last_class[b] = class_[n];
      } else {
        job_.values[at] = value_[n];
        if (t + 1 == job_.steps) job_.last_value[b] = value_[n];
      }
    });
  }

  FASTGEN_DEVICE void choose(int tile, int n, int64_t t) {
    const int64_t b = stream(tile, n);
    const float* out = out_ + n * job_.shape.outputs;
    const bool is_given = t < job_.given_steps;
    if (job_.distribution == Distribution::kCategorical) {
      int64_t sample = sample_categorical(out, job_.shape.outputs, job_.temperature, uniforms_[n]);
      if (is_given) sample = job_.given_class[b * job_.given_steps + t];
      if (thread() % 32) return;
      class_[n] = *in_block(came_ + tile * N + n, 0) = sample;
    } else {
      float sample = sample_mixture(job_, out, uniforms_[2 * n], uniforms_[2 * n + 1]);
      if (is_given) sample = job_.given_value[b * job_.given_steps + t];
      if (thread() % 32) return;
      value_[n] = *in_block(came_value_ + tile * N + n, 0) = sample;
    }
  }

  const Job& job_;
  const int rank_, next_;
  const Share share_;
  const int64_t first_;
  const bool alone_;
  const W* weights_;
  float *x_in_, *s_in_, *came_value_, *pending_, *x_, *sum_, *out_, *bias_, *head_bias_, *skip_bias_, *uniforms_,
      *value_;
  Queue* queues_;
  Vectors<W> input_, past_, z_, skips_, hidden_;
  int64_t *came_, *arrived_, *class_;
};

}  // namespace fastgen::wavenet
