// The time loop of WaveNet sampling on a GPU, a cluster of thread blocks for each group of streams.
//
// The blocks are a pipeline: each has some layers, the last one the output layers, and their weights stay in its shared
// memory for the whole loop. A vector x passes from block to block as soon as it is known; behind it, off the chain on
// which the next sample waits, each block adds its skips to the sum that follows x, and multiplies the past inputs of
// its layers for the next step, whose products then need only a vector's addition. Streams come in tiles of N, which
// share each weight that is read; several tiles keep all blocks of the pipeline busy.
//
// A mailbox is written again only after the sample that its last content led to, so no answer need be awaited.
#pragma once

#include "network.cuh"
#include "wavenet_job.h"

namespace fastgen::wavenet {

using namespace device;

// finish(unit, sums [rows][N]) for each unit of w x, x [N][stride], by one thread each. All threads of a block take
// part.
template <int kRows, int N, class W, class F>
FASTGEN_DEVICE void product(const Matrix& m, const W* w, const float* x, int stride, F&& finish) {
  const int sub = thread() % m.split, steps = m.padded() / (kGroup * m.split);
  for (int first = 0; first < m.units; first += m.stride) {
    const int place = thread() / m.split, unit = first + place;
    const bool live = place < m.stride && unit < m.units;
    float sums[kRows][N] = {};
    if (live) {
      const W* row = w + m.at(unit, 0, sub * kGroup);
      for (int i = 0; i < steps; ++i, row += int64_t{m.stride} * m.split * kRows * kGroup) {
        const float* in = x + (i * m.split + sub) * kGroup;
        for (int r = 0; r < kRows; ++r) {
          const Group<W> g = *reinterpret_cast<const Group<W>*>(row + r * kGroup);
          for (int n = 0; n < N; ++n)
            for (int k = 0; k < kGroup; ++k) sums[r][n] += to_float(g.v[k]) * in[n * stride + k];
        }
      }
    }
    for (int lanes = 1; lanes < m.split; lanes *= 2)
      for (int r = 0; r < kRows; ++r)
        for (int n = 0; n < N; ++n) sums[r][n] += shuffle_xor(sums[r][n], lanes);
    if (live && sub == 0) finish(unit, sums);
  }
}

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

// One block's part, for streams in tiles of N.
template <int N, bool kResident, class W>
class Block {
 public:
  FASTGEN_DEVICE explicit Block(const Job& job)
      : job_(job),
        rank_(block() % job.cluster),
        next_(rank_ + 1 < job.cluster ? rank_ + 1 : rank_),
        share_(job.layout, job.shape, rank_, job.cluster),
        first_(int64_t{block() / job.cluster} * job.tiles * N) {
    Shared shared;
    const W* all = static_cast<const W*>(job.weights);
    weights_ = all + share_.begin;
    if constexpr (kResident) {
      W* own = shared.take<W>(job.largest_share);
      for (int64_t i = int64_t{thread()} * kGroup; i < share_.size; i += int64_t{threads()} * kGroup)
        *reinterpret_cast<Group<W>*>(own + i) = *reinterpret_cast<const Group<W>*>(weights_ + i);
      weights_ = own;
    }
    x_in_ = shared.take<float>(int64_t{job.tiles} * N * job_.lengths.x);
    s_in_ = shared.take<float>(int64_t{job.tiles} * N * job_.lengths.s);
    pending_ = shared.take<float>(int64_t{job.tiles} * job_.lengths.layers * N * 2 * job_.shape.gate);
    x_ = shared.take<float>(3 * N * job_.lengths.x);
    past_ = x_ + 2 * N * job_.lengths.x;
    z_ = shared.take<float>(int64_t{job_.lengths.layers} * N * job_.lengths.z);
    sum_ = shared.take<float>(2 * N * job_.lengths.s);
    hidden_ = sum_ + N * job_.lengths.s;
    out_ = shared.take<float>(N * job_.lengths.out);
    came_ = shared.take<int64_t>(job.tiles * N);
    came_value_ = shared.take<float>(job.tiles * N);
    arrived_ = shared.take<int64_t>(3 * job.tiles);  // steps that have come: of x, of the sum of skips, of samples
    clear(x_, 3 * N * job_.lengths.x);
    clear(x_in_, int64_t{job.tiles} * N * job_.lengths.x);
    clear(z_, int64_t{job_.lengths.layers} * N * job_.lengths.z);
    clear(sum_, 2 * N * job_.lengths.s);
    for (int i = thread(); i < 3 * job.tiles; i += threads()) arrived_[i] = 0;
    sync_cluster();
  }

  FASTGEN_DEVICE void run() {
    for (int tile = 0; tile < job_.tiles && begins(tile); ++tile) prepare(tile, 0);
    for (int64_t t = 0; t < job_.steps; ++t)
      for (int tile = 0; tile < job_.tiles && begins(tile); ++tile) {
        if (share_.layers() > 0 || rank_ == 0) walk(tile, t);
        if (share_.head) emit(tile, t);
        if (t + 1 < job_.steps) prepare(tile, t + 1);
      }
    sync_cluster();  // so that no block's memory goes while another writes there
  }

 private:
  FASTGEN_DEVICE void clear(float* p, int64_t n) {
    for (int64_t i = thread(); i < n; i += threads()) p[i] = 0;
  }

  FASTGEN_DEVICE bool begins(int tile) const { return stream(tile, 0) < job_.streams; }
  FASTGEN_DEVICE int64_t stream(int tile, int n) const { return first_ + tile * N + n; }
  FASTGEN_DEVICE float* mail(float* box, int tile, int length) const { return box + int64_t{tile} * N * length; }
  FASTGEN_DEVICE float* z(int own) const { return z_ + int64_t{own} * N * job_.lengths.z; }
  FASTGEN_DEVICE float* pending(int tile, int own, int n) const {
    return pending_ + ((int64_t{tile} * job_.lengths.layers + own) * N + n) * 2 * job_.shape.gate;
  }

  enum Kind { kX = 0, kSum = 1, kSample = 2 };

  // All of a block has written; the block `rank` may read it.
  FASTGEN_DEVICE void send(Kind kind, int tile, int rank, int64_t step) {
    sync_block();
    if (thread() == 0) store_release(in_block(arrived_ + kind * job_.tiles + tile, rank), step);
  }

  FASTGEN_DEVICE void receive(Kind kind, int tile, int64_t step) {
    if (thread() == 0)
      while (load_acquire(arrived_ + kind * job_.tiles + tile) < step) pause();
    sync_block();
  }

  // The layers of this block, from x to x, and their skips.
  FASTGEN_DEVICE void walk(int tile, int64_t t) {
    if (rank_ == 0) {
      embed(tile, t);
    } else {
      receive(kX, tile, t + 1);
      const float* in = mail(x_in_, tile, job_.lengths.x);
      for (int i = thread(); i < N * job_.lengths.x; i += threads()) x_[i] = in[i];
    }
    sync_block();
    const bool more = share_.last < job_.shape.layers;  // layers in the next block
    for (int own = 0; own < share_.layers(); ++own) {
      const W* w = weights_ + job_.layout.layer * own;
      const float* x = x_ + (own & 1) * N * job_.lengths.x;
      product<2, N>(job_.layout.tap, w, x, job_.lengths.x, [&](int unit, const float(&sums)[2][N]) {
        for (int n = 0; n < N; ++n) {
          const float* before = pending(tile, own, n);
          z(own)[n * job_.lengths.z + unit] =
              gate(before[unit] + sums[0][n], before[job_.shape.gate + unit] + sums[1][n]);
        }
      });
      sync_block();
      const bool passes = own + 1 == share_.layers();
      if (!passes || more) {
        const float* bias = job_.floats + job_.layout.residual_bias + int64_t{share_.first + own} * job_.shape.residual;
        float* to = x_ + ((own + 1) & 1) * N * job_.lengths.x;
        if (passes) to = in_block(mail(x_in_, tile, job_.lengths.x), next_);
        product<1, N>(job_.layout.residual, w + job_.layout.residual_at(), z(own), job_.lengths.z,
                      [&](int unit, const float(&sums)[1][N]) {
                        for (int n = 0; n < N; ++n)
                          to[n * job_.lengths.x + unit] = x[n * job_.lengths.x + unit] + sums[0][n] + bias[unit];
                      });
      }
      if (passes && more)
        send(kX, tile, next_, t + 1);
      else
        sync_block();
      remember(tile, share_.first + own, t, x);
    }
    add_skips(tile, t);
  }

  FASTGEN_DEVICE void embed(int tile, int64_t t) {
    const bool categorical = job_.distribution == Distribution::kCategorical;
    if (t > 0) receive(kSample, tile, t);
    for (int i = thread(); i < N * job_.shape.residual; i += threads()) {
      const int n = i / job_.shape.residual, r = i % job_.shape.residual;
      const int64_t b = stream(tile, n);
      if (b >= job_.streams) continue;
      const float* row = job_.floats + job_.layout.input;
      float value = 1;
      if (categorical)
        row += (t > 0 ? came_[tile * N + n] : job_.last_class[b]) * job_.shape.residual;
      else
        value = t > 0 ? came_value_[tile * N + n] : job_.last_value[b];
      x_[n * job_.lengths.x + r] = row[r] * value + job_.floats[job_.layout.input_bias + r];
    }
  }

  // x becomes part of the layer's past.
  FASTGEN_DEVICE void remember(int tile, int l, int64_t t, const float* x) {
    const int64_t length = (job_.shape.kernel_size - 1) * job_.dilations[l];
    if (length == 0) return;
    const int64_t row = job_.history_at[l] + (job_.position + t) % length;
    for (int i = thread(); i < N * job_.shape.residual; i += threads()) {
      const int n = i / job_.shape.residual, r = i % job_.shape.residual;
      if (stream(tile, n) < job_.streams) past_row(tile, n, row)[r] = x[n * job_.lengths.x + r];
    }
  }

  FASTGEN_DEVICE float* past_row(int tile, int n, int64_t row) const {
    return job_.history + (stream(tile, n) * job_.history_rows + row) * job_.history_stride;
  }

  FASTGEN_DEVICE void add_skips(int tile, int64_t t) {
    if (rank_ > 0) receive(kSum, tile, t + 1);
    const float* in = mail(s_in_, tile, job_.lengths.s);
    for (int i = thread(); i < N * job_.shape.skip; i += threads()) {
      const int n = i / job_.shape.skip, k = i % job_.shape.skip;
      sum_[n * job_.lengths.s + k] = rank_ > 0 ? in[n * job_.lengths.s + k] : job_.floats[job_.layout.skip_bias + k];
    }
    sync_block();
    for (int own = 0; own < share_.layers(); ++own)  // a unit is always the same thread's
      product<1, N>(job_.layout.skip, weights_ + job_.layout.layer * own + job_.layout.skip_at(), z(own),
                    job_.lengths.z, [&](int unit, const float(&sums)[1][N]) {
                      for (int n = 0; n < N; ++n) sum_[n * job_.lengths.s + unit] += sums[0][n];
                    });
    sync_block();
    if (share_.head) return;
    float* to = in_block(mail(s_in_, tile, job_.lengths.s), next_);
    for (int i = thread(); i < N * job_.shape.skip; i += threads()) {
      const int at = i / job_.shape.skip * job_.lengths.s + i % job_.shape.skip;
      to[at] = sum_[at];
    }
    send(kSum, tile, next_, t + 1);
  }

  // What the past and the conditioning give the gates of step t.
  FASTGEN_DEVICE void prepare(int tile, int64_t t) {
    const int gates = 2 * job_.shape.gate;
    for (int own = 0; own < share_.layers(); ++own) {
      const int l = share_.first + own;
      for (int i = thread(); i < N * gates; i += threads()) {
        const int n = i / gates, g = i % gates;
        const int64_t b = stream(tile, n);
        if (b >= job_.streams) continue;
        float v = job_.gate_bias[(b * job_.gate_bias_stride * job_.shape.layers + l) * gates + g];
        if (job_.cond) v += job_.cond[((b * job_.steps + t) * job_.shape.layers + l) * gates + g];
        pending(tile, own, n)[g] = v;
      }
      const int64_t dilation = job_.dilations[l], length = (job_.shape.kernel_size - 1) * dilation;
      for (int j = 1; j < job_.shape.kernel_size; ++j) {
        const int64_t row = job_.history_at[l] + (job_.position + t + length - j * dilation) % length;
        for (int i = thread(); i < N * job_.shape.residual; i += threads()) {
          const int n = i / job_.shape.residual, r = i % job_.shape.residual;
          if (stream(tile, n) < job_.streams) past_[n * job_.lengths.x + r] = past_row(tile, n, row)[r];
        }
        sync_block();
        product<2, N>(job_.layout.tap, weights_ + job_.layout.layer * own + job_.layout.old_at(j), past_,
                      job_.lengths.x, [&](int unit, const float(&sums)[2][N]) {
                        for (int n = 0; n < N; ++n) {
                          pending(tile, own, n)[unit] += sums[0][n];
                          pending(tile, own, n)[job_.shape.gate + unit] += sums[1][n];
                        }
                      });
        sync_block();
      }
    }
    sync_block();
  }

  // The output layers, and the sample.
  FASTGEN_DEVICE void emit(int tile, int64_t t) {
    const float* in = sum_;
    if (job_.cluster > 1) {
      receive(kSum, tile, t + 1);
      in = mail(s_in_, tile, job_.lengths.s);
    }
    for (int i = thread(); i < N * job_.shape.skip; i += threads()) {
      const int at = i / job_.shape.skip * job_.lengths.s + i % job_.shape.skip;
      sum_[at] = fmaxf(in[at], 0.0f);
    }
    sync_block();
    const W* w = weights_ + (job_.layout.head - share_.begin);
    product<1, N>(job_.layout.hidden, w, sum_, job_.lengths.s, [&](int unit, const float(&sums)[1][N]) {
      for (int n = 0; n < N; ++n)
        hidden_[n * job_.lengths.s + unit] = fmaxf(sums[0][n] + job_.floats[job_.layout.hidden_bias + unit], 0.0f);
    });
    sync_block();
    product<1, N>(job_.layout.output, w + job_.layout.hidden.size(), hidden_, job_.lengths.s,
                  [&](int unit, const float(&sums)[1][N]) {
                    for (int n = 0; n < N; ++n) {
                      const float v = sums[0][n] + job_.floats[job_.layout.output_bias + unit];
                      out_[n * job_.lengths.out + unit] = v;
                      if (job_.parameters && stream(tile, n) < job_.streams)
                        job_.parameters[(stream(tile, n) * job_.steps + t) * job_.shape.outputs + unit] = v;
                    }
                  });
    sync_block();
    for (int n = thread() / 32; n < N; n += threads() / 32)
      if (stream(tile, n) < job_.streams) choose(tile, n, t);
    send(kSample, tile, 0, t + 1);
  }

  FASTGEN_DEVICE void choose(int tile, int n, int64_t t) {
    const int64_t b = stream(tile, n), at = b * job_.steps + t;
    const float* out = out_ + n * job_.lengths.out;
    const bool is_given = t < job_.given_steps;
    if (job_.distribution == Distribution::kCategorical) {
      int64_t sample = sample_categorical(out, job_.shape.outputs, job_.temperature, job_.uniforms[at]);
      if (is_given) sample = job_.given_class[b * job_.given_steps + t];
      if (thread() % 32) return;
      job_.classes[at] = *in_block(came_ + tile * N + n, 0) = sample;
      if (t + 1 == job_.steps) job_.last_class[b] = sample;
    } else {
      float sample = sample_mixture(job_, out, job_.uniforms[2 * at], job_.uniforms[2 * at + 1]);
      if (is_given) sample = job_.given_value[b * job_.given_steps + t];
      if (thread() % 32) return;
      job_.values[at] = *in_block(came_value_ + tile * N + n, 0) = sample;
      if (t + 1 == job_.steps) job_.last_value[b] = sample;
    }
  }

  const Job& job_;
  const int rank_, next_;
  const Share share_;
  const int64_t first_;
  const W* weights_;
  float *x_in_, *s_in_, *pending_, *x_, *past_, *z_, *sum_, *hidden_, *out_, *came_value_;
  int64_t *came_, *arrived_;
};

}  // namespace fastgen::wavenet
