// What layers have seen: ring buffers of their inputs in past steps.
#pragma once

#include <cstring>
#include <memory>

#include "packed_inputs.h"

namespace fastgen {
namespace {

constexpr int kSoon = 6;  // streams whose rows are fetched while one is read

// Inputs of all layers for the streams [first, first + streams). Rings lie in `data`, (streams, rows of all layers,
// channels), which outlives the call. In fixed point the steps of this call have blocks of their own: products take
// them as they are, and only what later calls will read goes into `data`.
template <class W>
class History {
 public:
  using Block = typename Inputs<W>::Block;

  // position: steps before this call; channels: a multiple of kF. Of threads that advance the same streams one writes
  // blocks, and the others see the `writer`'s.
  History(float* data, const std::vector<int64_t>& dilations, int kernel_size, int64_t first, int streams, int channels,
          int64_t position, int64_t steps, const History* writer)
      : streams_(streams), channels_(channels), steps_(steps), writes_(!writer) {
    for (const int64_t dilation : dilations) {
      const int64_t length = (kernel_size - 1) * dilation;
      rings_.push_back({rows_, length});
      now_.push_back(length ? position % length : 0);
      rows_ += length;
    }
    data_ = data + first * rows_ * channels;
    if (kFixed<W> && writes_) own_blocks_.reset(new Block[rows_ * streams * blocks_of_row()]);
    blocks_ = writer ? writer->blocks_ : own_blocks_.get();
  }

  int64_t length(int l) const { return rings_[l].length; }

  // Where layer l's input of the current step goes, in place of the oldest one, which is not needed any more once the
  // step's old taps are prepared; or `elsewhere`. In fixed point x's column is to be in the ring.
  float* input(int l, int stream, Inputs<W>& x, float* elsewhere) {
    const Ring& ring = rings_[l];
    if constexpr (kFixed<W>) x.place(stream, ring.length && writes_ ? block(ring, stream, now_[l]) : nullptr);
    return !kFixed<W> && ring.length ? row(ring, stream, now_[l]) : elsewhere;
  }

  // Layer l's inputs x of step t of the call become part of its past.
  void remember(int l, int64_t t, const float* const* x) {
    const Ring& ring = rings_[l];
    if (kFixed<W> && writes_ && t >= steps_ - ring.length)
      for (int i = 0; i < streams_; ++i) std::memcpy(row(ring, i, now_[l]), x[i], channels_ * sizeof(float));
    if (ring.length && ++now_[l] == ring.length) now_[l] = 0;
  }

  // Column c of x: layer l's input of step t, before the call's first one if t is negative, at row `at` of the ring.
  void take(int l, int64_t t, int64_t at, int stream, Inputs<W>& x, int c) const {
    const Ring& ring = rings_[l];
    const int soon = std::min(stream + kSoon, streams_ - 1);
    if (kFixed<W> && t >= 0) {
      prefetch(block(ring, soon, at), blocks_of_row() * sizeof(Block));
      return x.place(c, block(ring, stream, at));
    }
    prefetch(row(ring, soon, at), channels_ * sizeof(float));
    x.place(c);
    x.set(c, row(ring, stream, at));
  }

 private:
  struct Ring {
    int64_t first, length;
  };

  float* row(const Ring& ring, int stream, int64_t at) const {
    return data_ + (stream * rows_ + ring.first + at) * channels_;
  }
  Block* block(const Ring& ring, int stream, int64_t at) const {
    return blocks_ + ((ring.first + at) * streams_ + stream) * blocks_of_row();
  }
  int blocks_of_row() const { return (channels_ + kBlock - 1) / kBlock; }

  float* data_;
  const int streams_, channels_;
  const int64_t steps_;
  int64_t rows_ = 0;
  OwnVector<Ring> rings_;
  OwnVector<int64_t> now_;  // the rows of the current step, which change; a second thread reads the rings alone
  const bool writes_;
  std::unique_ptr<Block[]> own_blocks_;
  Block* blocks_;
};

}  // namespace
}  // namespace fastgen
