// What a block of the pipeline does with past inputs and the conditioning.
#pragma once

#include "wavenet_generate.cuh"

namespace fastgen::wavenet {

// What the past and the conditioning give the gates of step t. Columns of the products are streams, or the steps from
// t on that a stream alone prepares together.
template <int M, bool kResident, class W>
FASTGEN_DEVICE void Block<M, kResident, W>::prepare(int tile, int live, int64_t t) {
  const int gates = 2 * job_.shape.gate, layers = share_.layers();
  const int now = alone_ ? static_cast<int>(t % kAhead) : 0;
  Product<M, true, 1, kChain, W> taps;
  const int64_t left = job_.steps - t;
  const int columns = alone_ ? static_cast<int>(left < kAhead ? left : kAhead) : live;
  const auto stream_of = [&](int n) { return alone_ ? first_ : stream(tile, n); };
  const auto step_of = [&](int n) { return alone_ ? t + n : t; };
  // unless they are there already, the sums begin with the first tap's
  const bool begun = alone_ || job_.cond || job_.gate_bias_stride || job_.shape.kernel_size == 1;
  const auto add = [&](const Matrix& m, const W* w, const Past& p, auto&& meanwhile) {
    float* sums = pending(p.own, 0);
    const float* bias = gate_bias_ + p.own * gates;
    const bool begins = !begun && p.tap == 1;
    taps.run(
        m, w, input_, p.to,
        [&](int unit, int n, int row) {
          return begins ? bias[row * job_.shape.gate + unit] : sums[(2 * n + row) * job_.shape.gate + unit];
        },
        [] { sync_block(); }, meanwhile,
        [&](int unit, int n, float a, float b) {
          if (n < p.from) return;
          sums[2 * n * job_.shape.gate + unit] = a;
          sums[(2 * n + 1) * job_.shape.gate + unit] = b;
        });
    sync_block();
  };
  if (begun && now == 0) {
    for (int own = 0; own < layers; ++own)
      each(0, columns, gates, [&](int n, int g) {
        const int l = share_.first + own;
        float v = job_.gate_bias_stride ? job_.gate_bias[(stream_of(n) * job_.shape.layers + l) * gates + g]
                                        : gate_bias_[own * gates + g];
        if (job_.cond && job_.shape.local == 0)
          v += job_.cond[((stream_of(n) * job_.steps + step_of(n)) * job_.shape.layers + l) * gates + g];
        pending(own, n)[g] = v;
      });
    if (job_.cond && job_.shape.local > 0)
      each(0, columns, job_.shape.local, [&](int n, int k) {
        put(input_, n, k, job_.cond[(stream_of(n) * job_.steps + step_of(n)) * job_.shape.local + k]);
      });
    sync_block();
    if (job_.cond && job_.shape.local > 0)
      for (int own = 0; own < layers; ++own) {
        taps.hold(job_.local, layer(own));
        add(job_.local, layer(own), Past{own, 0, 0, columns, false, 0}, [] {});
      }
  }

  // the next that is due after tap `tap` of layer `own`
  const auto after = [&](int own, int tap) {
    for (;;) {
      if (++tap >= job_.shape.kernel_size) {
        ++own;
        tap = 1;
      }
      if (own >= layers || job_.shape.kernel_size == 1) return Past{layers, 0, 0, 0, false, 0};
      const int64_t distance = tap * queues_[own].dilation;
      const bool one = alone_ && distance < kAhead;  // the later steps' past is yet to come
      if (alone_ && !one && now > 0) continue;
      return Past{own, tap, one ? now : 0, one ? now + 1 : columns, alone_ && !one, distance};
    }
  };
  const auto past = [&](const Past& p, int n, int i) {
    const int64_t row = queues_[p.own].row(p.ahead ? n : 0, p.distance);
    return pair(past_row(stream_of(n), row) + i);
  };
  const auto weights = [&](const Past& p) {
    return p.own < layers ? layer(p.own) + job_.old_at + (p.tap - 1) * job_.old_size : weights_;
  };
  // each thread's first pairs come while the products before are made
  Pair coming[kComing] = {};
  Past p[kComing + 1];
  for (int k = 0; k < kComing; ++k) {
    p[k] = k ? after(p[k - 1].own, p[k - 1].tap) : after(0, 0);
    if (p[k].from + of_x_.vector < p[k].to) coming[k] = past(p[k], p[k].from + of_x_.vector, of_x_.number);
  }
  taps.hold(job_.tap, weights(p[0]), p[0].own < layers);
#pragma unroll 1
  while (p[0].own < layers) {
    each_pair(of_x_, p[0].from, p[0].to, [&](int n, int i) {
      const bool first = n == p[0].from + of_x_.vector && i == of_x_.number;
      put(input_, n, i, first ? Pair{coming[0].v[0], coming[0].v[1]} : past(p[0], n, i));
    });
    p[kComing] = after(p[kComing - 1].own, p[kComing - 1].tap);
    for (int k = 0; k + 1 < kComing; ++k) coming[k] = coming[k + 1];
    const Past& last = p[kComing];
    if (last.from + of_x_.vector < last.to) coming[kComing - 1] = past(last, last.from + of_x_.vector, of_x_.number);
    add(job_.tap, weights(p[0]), p[0], [&] { taps.hold(job_.tap, weights(p[1]), p[1].own < layers); });
    for (int k = 0; k < kComing; ++k) p[k] = p[k + 1];
  }
  sync_block();
}

// The layers' inputs become part of their past.
template <int M, bool kResident, class W>
FASTGEN_DEVICE void Block<M, kResident, W>::remember(int tile, int live) {
  for (int own = 0; own < share_.layers(); ++own) {
    const Queue queue = queues_[own];
    if (queue.length == 0) continue;
    const int64_t row = queue.row(0, 0);
    each_pair(of_x_, 0, live,
              [&](int n, int i) { pair(past_row(stream(tile, n), row) + i) = pair(x(own) + n * job_.lengths.x + i); });
  }
}

}  // namespace fastgen::wavenet
