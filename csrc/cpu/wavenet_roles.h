// A WaveNet's single stream by two threads with different roles: see wavenet_streams.h.
#pragma once

#include "wavenet_streams.h"

namespace fastgen {
namespace {

template <class W>
void Streams<W>::lead() {
  if (!meeting_.helper_is_near()) return walk(0);
  const int64_t done = lead_together();
  if (done == job_.steps) return;
  meeting_.wait_for_helper_to_leave();
  walk(done);
}

// Returns how many steps were made before the threads parted.
template <class W>
int64_t Streams<W>::lead_together() {
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
    start_led_skip();
    for (int l = 0, told = 0; l < layers; ++l) {
      if (l + kOwned < layers) ask_for_messages(l + kOwned, t);
      gated(l, t);
      if (l == plan_.told[told]) gated_[told++].publish(t);
      if (plan_.layers[l].led_skip) add_skip(l);
      add_residual(l, t);
    }
    for (int l = 0; l < layers; ++l)
      if (!helped(l) && begins_block(l, t + 1)) prepare(l, t + 1, leads_);
  }
  emitted_.wait(job_.steps - 1);
  return job_.steps;
}

template <class W>
void Streams<W>::help() {
  if (!meeting_.leader_stays()) return;
  const int layers = job_.shape.layers;
  for (int64_t t = 0; t < job_.steps; ++t) {
    for (int l = 0; l < layers; ++l)
      if (helped(l) && begins_block(l, t + 1)) prepare(l, t + 1, helps_);
    start_skips();
    for (int l = 0, told = 0; l < layers; l = plan_.told[told++] + 1) {
      gated_[told].wait(t);
      if (l == 0 && gated_[0].step.load(std::memory_order_relaxed) == kParted) return meeting_.helper_leaves();
      for (int i = l; i <= plan_.told[told]; ++i) each_line_of_z(i, prefetch);
      for (int i = l; i <= plan_.told[told]; ++i)
        if (!plan_.layers[i].led_skip) add_skip(i);
    }
    emit(t, [] {});
    emitted_.sample = last_sample(0);
    emitted_.publish(t);
  }
}

// The z of layers of which the helper hears at once lie one after another: fewer lines have to go over.
template <class W>
void Streams<W>::place_messages() {
  const int blocks = (job_.shape.gate + kBlock - 1) / kBlock;
  constexpr int kSpare = 128 / sizeof(Block) + 1;  // where told layers end, the rest of a line is left
  messages_.resize(job_.shape.layers * blocks + plan_.told.size() * kSpare);
  auto* at = reinterpret_cast<uint8_t*>(messages_.data());
  for (int l = 0, told = 0; l < job_.shape.layers; ++l) {
    z_in_[l].place(0, reinterpret_cast<Block*>(at));
    at += blocks * sizeof(Block);
    if (l < plan_.told[told]) continue;
    at = reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<uintptr_t>(at), 128));
    ++told;
  }
}

}  // namespace
}  // namespace fastgen
