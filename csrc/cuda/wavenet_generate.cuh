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

#include "wavenet_product.cuh"

namespace fastgen::wavenet {

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
        alone_(job.tiles == 1 && streams_of(0) == 1),
        of_x_(job.lengths.x),
        of_s_(job.lengths.s),
        scale_(kLog2e / job.temperature) {
    Shared shared;
    x_in_ = zeros(shared.take<float>(int64_t{job.tiles} * N * job.lengths.x), int64_t{job.tiles} * N * job.lengths.x);
    s_in_ = zeros(shared.take<float>(int64_t{job.tiles} * N * job.lengths.s), int64_t{job.tiles} * N * job.lengths.s);
    came_ = shared.take<int32_t>(job.tiles * N);
    came_value_ = shared.take<float>(job.tiles * N);
    arrivals_ = shared.take<Arrival>(3 * job.tiles);
    // the arrays above are where other blocks write: the same in each
    for (int i = thread(); rank_ == 0 && i < job.tiles * N; i += threads()) {
      const int64_t b = stream(i / N, i % N);
      if (i % N >= streams_of(i / N)) continue;
      if (job.distribution == Distribution::kCategorical)
        came_[i] = static_cast<int32_t>(job.last_class[b]);
      else
        came_value_[i] = job.last_value[b];
    }
    weights_ = static_cast<const W*>(job.weights) + share_.begin;
    W* own = shared.take<W>(kResident ? share_.size : 0);
    if constexpr (kResident) {
      for (int64_t i = int64_t{thread()} * kGroup; i < share_.size; i += int64_t{threads()} * kGroup)
        *reinterpret_cast<Group<W>*>(own + i) = *reinterpret_cast<const Group<W>*>(weights_ + i);
      weights_ = own;
    }
    input_ = vectors(shared.take<W>(parts(1, job.lengths.input)), 1, job.lengths.input);
    skips_ = vectors(shared.take<W>(parts(share_.head, job.lengths.s)), share_.head, job.lengths.s);
    hidden_ = vectors(shared.take<W>(parts(share_.head, job.lengths.s)), share_.head, job.lengths.s);
    out_ = shared.take<float>(share_.head * N * job.lengths.outputs);
    for (int i = thread(); i < share_.head * N * job.lengths.outputs; i += threads()) out_[i] = kFarBelow;
    // the output's biases lie behind the hidden ones'
    head_bias_ = floats(shared, job.layout.hidden_bias, share_.head * (job.shape.skip + job.shape.outputs));
    uniforms_ = shared.take<float>(share_.head * 2 * N);
    skip_bias_ = floats(shared, job.layout.skip_bias, (rank_ == 0) * job.shape.skip);
    input_bias_ = floats(shared, job.layout.input_bias, (rank_ == 0) * job.shape.residual);
    if (!kResident && job.scratch) {
      Spilled spilled{job.scratch + block() * job.scratch_bytes};
      take_of_layers(spilled);
    } else {
      take_of_layers(shared);
    }
    if (thread() == 0)
      for (int tile = 0; tile < job.tiles; ++tile)
        for (const Kind kind : {kX, kSum, kSample}) {
          begin_arrival(arrival(kind, tile));
          expect_next(kind, tile, streams_of(tile));
        }
    sync_cluster();
  }

  FASTGEN_DEVICE void run() {
    bool keeps = false;
    if constexpr (kKeeps) {
      keeps = job_.tap.steps == kChain && job_.residual.steps == kChain && job_.tap.tiles <= threads() / 32 &&
              job_.residual.tiles <= threads() / 32 && share_.layers() > 0 && share_.layers() <= kKept && !share_.head;
      if (keeps) {
        const Kept kept = keep();
        each_step([&](int tile, int live, int64_t t) {
          prepare(tile, live, t);
          walk(kept, tile, live, t);
        });
      }
    }
    if (!keeps)
      each_step([&](int tile, int live, int64_t t) {
        prepare(tile, live, t);
        if (share_.layers() > 0 || rank_ == 0) walk(tile, live, t);
        if (share_.head) emit(tile, live, t);
      });
    sync_cluster();  // so that no block's memory goes while another writes there
  }

 private:
  static constexpr int N = 4 * M, kAhead = 4;
  static constexpr int kChain = 2, kHead = 4;  // steps of a product whose weights are loaded ahead
  static constexpr int kComing = 3;            // past inputs that are on their way at once

  // Where a block has few layers, a warp keeps its tiles of the chain's weights in its registers.
  static constexpr int kKept = 3;
  static constexpr bool kKeeps = kResident && M == 1 && sizeof(W) == 2;
  struct Kept {
    Held<kChain, true, W> tap[kKept], residual[kKept];
    float bias[kKept][2];  // of the residual's units
  };

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
    const int64_t numbers = int64_t{layers > 1 ? layers : 1} * N * job_.lengths.x;
    x_ = zeros(memory.template take<float>(numbers), numbers);
    pending_ = memory.template take<float>(int64_t{layers} * N * 2 * job_.shape.gate);
    z_ = vectors(memory.template take<W>(parts(layers, job_.lengths.z)), layers, job_.lengths.z);
    bias_ = memory.template take<float>(int64_t{layers} * residual);
    gate_bias_ = memory.template take<float>(int64_t{layers} * 2 * job_.shape.gate);
    queues_ = memory.template take<Queue>(layers);
    for (int i = thread(); job_.gate_bias_stride == 0 && i < layers * 2 * job_.shape.gate; i += threads())
      gate_bias_[i] = job_.gate_bias[int64_t{share_.first} * 2 * job_.shape.gate + i];
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
    return {zeros(data, parts(count, length)), length};
  }
  template <class T>
  FASTGEN_DEVICE static T* zeros(T* data, int64_t n) {
    for (int64_t i = thread(); i < n; i += threads()) data[i] = 0;
    return data;
  }
  // `n` of the packed floats, in shared memory.
  FASTGEN_DEVICE float* floats(Shared& shared, int64_t at, int n) const {
    float* to = shared.take<float>(n);
    for (int i = thread(); i < n; i += threads()) to[i] = job_.floats[at + i];
    return to;
  }

  FASTGEN_DEVICE int64_t stream(int tile, int n) const { return first_ + tile * job_.tile + n; }
  FASTGEN_DEVICE int streams_of(int tile) const {
    const int64_t left = job_.streams - stream(tile, 0);
    return left < 0 ? 0 : left < job_.tile ? static_cast<int>(left) : job_.tile;
  }
  FASTGEN_DEVICE Vectors<W> z(int own) const { return {z_.data + own * N * z_.length * Vectors<W>::kParts, z_.length}; }
  FASTGEN_DEVICE float* x(int own) const { return x_ + own * N * job_.lengths.x; }
  FASTGEN_DEVICE float* pending(int own, int column) const {
    return pending_ + (own * N + column) * 2 * job_.shape.gate;
  }

  // f(n, i) for n in [from, to) and i < length, by all threads.
  template <class F>
  FASTGEN_DEVICE void each(int from, int to, int length, F&& f) const {
#pragma unroll 1
    for (int n = from + thread() / 32; n < to; n += threads() / 32)
#pragma unroll 2
      for (int i = thread() % 32; i < length; i += 32) f(n, i);
  }
  // The first pair of numbers that is this thread's among those of vectors of a length.
  struct Place {
    int vector, number, length;
    FASTGEN_DEVICE explicit Place(int length)
        : vector(2 * thread() / length), number(2 * thread() % length), length(length) {}
  };
  // f(n, i) for each pair of numbers, from i, and for n in [from, to).
  template <class F>
  FASTGEN_DEVICE void each_pair(const Place& first, int from, int to, F&& f) const {
    if (from + first.vector < to) f(from + first.vector, first.number);
#pragma unroll 1
    for (int i = 2 * (thread() + threads()); i < (to - from) * first.length; i += 2 * threads())
      f(from + i / first.length, i % first.length);
  }

  // Messages, of each kind one in a step.
  enum Kind { kX = 0, kSum = 1, kSample = 2 };

  FASTGEN_DEVICE Arrival* arrival(Kind kind, int tile) const { return arrivals_ + kind * job_.tiles + tile; }
  FASTGEN_DEVICE void expect_next(Kind kind, int tile, int live) const {
    const int words = kind == kX ? job_.shape.residual : kind == kSum ? job_.shape.skip : 1;
    expect(arrival(kind, tile), live * words * 4);
  }
  FASTGEN_DEVICE void receive(Kind kind, int tile, int live, int64_t number) const {
    await(arrival(kind, tile), static_cast<int>(number & 1));
    if (thread() == threads() - 1) expect_next(kind, tile, live);  // who has least to do with what has come
  }

  template <class F>
  FASTGEN_DEVICE void each_step(F&& f) {
    for (int64_t t = 0; t < job_.steps; ++t) {
      for (int tile = 0; tile < job_.tiles && streams_of(tile) > 0; ++tile) f(tile, streams_of(tile), t);
      sync_block();
      for (int own = thread(); own < share_.layers(); own += threads())
        queues_[own].now = queues_[own].now + 1 < queues_[own].length ? queues_[own].now + 1 : 0;
      sync_block();
    }
  }

  FASTGEN_DEVICE const W* layer(int own) const { return weights_ + job_.layout.layer * own; }

  // The layers of this block, from x to x, and their skips.
  FASTGEN_DEVICE void walk(int tile, int live, int64_t t) {
    const int residual = job_.shape.residual, gates = job_.shape.gate, length = job_.lengths.x;
    const int layers = share_.layers();
    if (layers == 0 && t > 0) receive(kSample, tile, live, t - 1);
    Product<M, true, 1, kChain, W> taps;
    Product<M, false, 1, kChain, W> residuals;
    taps.hold(job_.tap, layer(0), layers > 0);
    for (int own = 0; own < layers; ++own) {
      const float* before = pending(own, alone_ ? static_cast<int>(t % kAhead) : 0);
      const bool passes = own + 1 == layers;
      const Vectors<W> to = z(own);
      taps.run(
          job_.tap, layer(own), input_, live,
          [&](int unit, int n, int row) { return before[(n * 2 + row) * gates + unit]; },
          [&] {
            if (own == 0) take_x(tile, live, t);
            sync_block();
          },
          [&] {
            residuals.hold(job_.residual, layer(own));
            taps.hold(job_.tap, layer(passes ? own : own + 1));
          },
          [&](int unit, int n, float a, float b) { put(to, n, unit, quick_gate(a, b)); });
      if (share_.first + own + 1 == job_.shape.layers) break;  // no layer takes its x
      const float *from = x(own), *bias = bias_ + own * residual;
      residuals.run(
          job_.residual, layer(own), to, live,
          [&](int unit, int n, int) { return from[n * length + unit] + bias[unit]; }, [] { sync_block(); }, [] {},
          [&](int unit, int n, float v) {
            if (passes)
              post(x_in_ + (tile * N + n) * length + unit, v, arrival(kX, tile), next_);
            else
              set_x(own + 1, n, unit, v);
          });
    }
    sync_block();
    add_skips(tile, live, t);
    remember(tile, live);
  }

  FASTGEN_DEVICE Kept keep() const {
    const int tile = thread() / 32, unit = tile * kTileRows + thread() % 32 / 4;
    Kept kept;
    for (int k = 0; k < kKept; ++k) {
      const bool exists = k < share_.layers();
      const W* of_tile = layer(exists ? k : 0) + tile * kChain * kTileRows * kTileInputs;
      kept.tap[k].load(of_tile + job_.tap.at, kChain, exists && tile < job_.tap.tiles);
      kept.residual[k].load(of_tile + job_.residual.at, kChain, exists && tile < job_.residual.tiles);
      for (int h = 0; h < 2; ++h) {
        const bool has = exists && unit + 8 * h < job_.shape.residual;
        kept.bias[k][h] = has ? bias_[k * job_.shape.residual + unit + 8 * h] : 0;
      }
    }
    return kept;
  }

  // The same with weights that are kept.
  FASTGEN_DEVICE void walk(const Kept& kept, int tile, int live, int64_t t) {
    const int layers = share_.layers(), lane = thread() % 32, warp = thread() / 32, length = job_.lengths.x;
    const int gate = warp * kTileRows / 2 + lane / 4, unit = warp * kTileRows + lane / 4, n = lane % 4;
    const bool gates = n < live && gate < job_.shape.gate;
    const bool units[2] = {n < live && unit < job_.shape.residual, n < live && unit + 8 < job_.shape.residual};
    float before[kKept][2] = {}, v[2] = {};
    for (int k = 0; k < kKept; ++k)
      for (int row = 0; row < 2; ++row)
        if (k < layers && gates)
          before[k][row] = pending(k, alone_ ? static_cast<int>(t % kAhead) : n)[row * job_.shape.gate + gate];
    take_x(tile, live, t);
    for (int k = 0; k < kKept; ++k) {
      if (k >= layers) break;
      sync_block();
      if (k == 0)
        for (int h = 0; h < 2; ++h)
          if (units[h]) v[h] = x_[n * length + unit + 8 * h];
      if (warp < job_.tap.tiles) {
        const auto sums = multiply(kept.tap[k], input_, live, before[k]);
        put(z(k), n, gate, quick_gate(sums.v[0], sums.v[1]), gates);
      }
      if (share_.first + k + 1 == job_.shape.layers) break;  // no layer takes its x
      sync_block();
      if (warp >= job_.residual.tiles) continue;
      for (int h = 0; h < 2; ++h) v[h] += kept.bias[k][h];
      const auto sums = multiply(kept.residual[k], z(k), live, v);
      for (int h = 0; h < 2; ++h) v[h] = sums.v[h];
      if (k + 1 == layers) {
        for (int h = 0; h < 2; ++h)
          if (units[h]) post(x_in_ + (tile * N + n) * length + unit + 8 * h, v[h], arrival(kX, tile), next_);
      } else {
        for (int h = 0; h < 2; ++h) {
          put(input_, n, unit + 8 * h, v[h], units[h]);
          if (units[h]) x(k + 1)[n * length + unit + 8 * h] = v[h];
        }
      }
    }
    sync_block();
    add_skips(tile, live, t);
    remember(tile, live);
  }

  // A kept tile's product with four vectors, on top of `begin`.
  FASTGEN_DEVICE static Pair multiply(const Held<kChain, true, W>& held, const Vectors<W>& x, int live,
                                      const float (&begin)[2]) {
    Sums<1, W> sums;
    for (int h = 0; h < 2; ++h) sums.begin(h, 0, begin[h]);
    Inputs<1, kChain, true, W> inputs;
    inputs.load(x, kChain, live);
    sums.add(held, inputs, nullptr, kChain, x, live);
    float all[2][1];
    sums.get(all);
    return {all[0][0], all[1][0]};
  }

  // The input of this block's layer `own`.
  FASTGEN_DEVICE void set_x(int own, int n, int r, float v) {
    put(input_, n, r, v);
    x(own)[n * job_.lengths.x + r] = v;
  }

  // The input of this block's first layer.
  FASTGEN_DEVICE void take_x(int tile, int live, int64_t t) {
    if (rank_ == 0) {
      if (t > 0) receive(kSample, tile, live, t - 1);
      embed(tile, live);
    } else {
      receive(kX, tile, live, t);
      each_pair(of_x_, 0, live, [&](int n, int i) {
        const Pair v = pair(x_in_ + (tile * N + n) * job_.lengths.x + i);
        put(input_, n, i, v);
        pair(x_ + n * job_.lengths.x + i) = v;
      });
    }
  }

  FASTGEN_DEVICE void embed(int tile, int live) {
    const bool categorical = job_.distribution == Distribution::kCategorical;
    const int residual = job_.shape.residual;
#pragma unroll 1
    for (int n = thread() / 32; n < live; n += threads() / 32) {
      const float value = categorical ? 1 : came_value_[tile * N + n];
      const float* row = job_.floats + job_.layout.input + (categorical ? int64_t{came_[tile * N + n]} * residual : 0);
#pragma unroll 1
      for (int r = thread() % 32; r < residual; r += 64) {
        const bool two = r + 32 < residual;
        const float v = row[r], w = two ? row[r + 32] : 0;  // both on their way at once
        set_x(0, n, r, v * value + input_bias_[r]);
        if (two) set_x(0, n, r + 32, w * value + input_bias_[r + 32]);
      }
    }
  }

  // All own layers' skips on top of the sum that comes from the block before.
  FASTGEN_DEVICE void add_skips(int tile, int live, int64_t t) {
    const Matrix& m = job_.skip;
    const int layers = share_.layers(), warps = threads() / 32;
    const auto with = [&](int of_warp, auto&& known) {
      const bool exists = of_warp < m.tiles;
      const auto weights = [&](int own) {
        return layer(own < layers ? own : 0) + m.at + of_warp * m.steps * kTileRows * kTileInputs;
      };
      Held<kChain, false, W> even, odd;  // layers' weights, one's on their way while the other's are used
      Inputs<M, kChain, false, W> inputs;
      Sums<M, W> sums;
      even.load(weights(0), m.steps, exists && layers > 0);
#pragma unroll 1
      for (int own = 0; exists && own < layers; own += 2) {
        odd.load(weights(own + 1), m.steps);
        inputs.load(z(own), m.steps, live);
        sums.add(even, inputs, weights(own), m.steps, z(own), live);
        even.load(weights(own + 2), m.steps);
        if (own + 1 == layers) break;
        inputs.load(z(own + 1), m.steps, live);
        sums.add(odd, inputs, weights(own + 1), m.steps, z(own + 1), live);
      }
      known();
      float all[2][M];
      sums.get(all);
      each_sum<M, false>(m, of_warp, live, [&](int unit, int n, int h, int i) {
        const int at = (tile * N + n) * job_.lengths.s + unit;
        const float v = all[h][i] + (rank_ > 0 ? s_in_[at] : skip_bias_[unit]);
        if (share_.head)
          put(skips_, n, unit, fmaxf(v, 0.0f));
        else
          post(s_in_ + at, v, arrival(kSum, tile), next_);
      });
    };
    with(thread() / 32, [&] {
      if (rank_ > 0) receive(kSum, tile, live, t);
    });
#pragma unroll 1
    for (int of_warp = thread() / 32 + warps; of_warp < m.tiles; of_warp += warps) with(of_warp, [] {});
  }

  // The past inputs of a layer at one tap, for vectors from `from` to `to`.
  struct Past {
    int own, tap, from, to;
    bool ahead;  // the vectors are steps
    int64_t distance;
  };

  FASTGEN_DEVICE void prepare(int tile, int live, int64_t t);
  FASTGEN_DEVICE void remember(int tile, int live);
  FASTGEN_DEVICE float* past_row(int64_t b, int64_t row) const {
    return job_.history + (b * job_.history_rows + row) * job_.history_stride;
  }

  FASTGEN_DEVICE void emit(int tile, int live, int64_t t);
  FASTGEN_DEVICE void take_skips(int tile, int live, int64_t t);
  FASTGEN_DEVICE void choose(int tile, int n, int64_t t);

  const Job& job_;
  const int rank_, next_;
  const Share share_;
  const int64_t first_;
  const bool alone_;
  const Place of_x_, of_s_;
  const float scale_;  // of logits
  const W* weights_;
  float *x_in_, *s_in_, *came_value_, *pending_, *x_, *out_, *bias_, *gate_bias_, *head_bias_, *skip_bias_,
      *input_bias_, *uniforms_;
  Queue* queues_;
  Vectors<W> input_, z_, skips_, hidden_;
  int32_t* came_;
  Arrival* arrivals_;
};

}  // namespace fastgen::wavenet

#include "wavenet_output.cuh"
#include "wavenet_past.cuh"
