// A row's pixels one after the other, one of the two kernels of pixelcnn_images.cuh.
#pragma once

#include "pixelcnn_steps.cuh"

namespace fastgen::pixelcnn {

template <class W>
class Pixels : Steps<W> {
 public:
  FASTGEN_DEVICE Pixels(const Job& job, Shared&& shared = {})
      : Steps<W>(job, shared),
        groups_((count_ + kShare - 1) / kShare),
        half_threads_(ranks_ > 1 ? threads() / 2 : threads()),
        half_(thread() / half_threads_) {
    static_assert(sizeof(Task) == kTaskBytes);
    arrivals_ = shared.take<Arrival>(kArrivals + ranks_);
    tasks_ = shared.take<Task>(instruction_count_);
    weights_ = shared.take<W>(job.weights);
    old_ = job.far ? this->scratch() : shared.take<float>(job.old_floats());
    if (thread() < kArrivals) begin_arrival(arrivals_ + thread());
    for (int64_t i = thread(); i < job.old_floats(); i += threads()) old_[i] = 0;
    sync_block();
    for (int i = thread(); i < instruction_count_; i += threads())
      if (is_conv(i)) tasks_[i] = task_of(instructions_[i]);
    sync_block();
    take_weights();
    meet();  // none is sent anything before
  }

  FASTGEN_DEVICE void draw() {
    for (int x = job_.back ? width_ - 1 : 0; x >= 0 && x < width_; x += job_.back ? -1 : 1) {
      for (int i = 0; i < instruction_count_; ++i) draw_pixel(i, x);
      if (job_.meets) {
        receive();
        meet();
      }
    }
    receive();
    meet();  // none ends while it is sent something
  }

 private:
  using Images::count_, Images::first_, Images::instruction_count_, Images::instructions_, Images::job_,
      Images::matrices_, Images::activated, Images::meet, Images::planes_, Images::rank_, Images::ranks_, Images::row,
      Images::width_;
  using Steps<W>::number, Steps<W>::room_, Steps<W>::slots_;

  FASTGEN_DEVICE bool is_conv(int i) const { return static_cast<Kind>(instructions_[i].kind) == Kind::kConv; }

  // A convolution, as this block and its warps need it. A block has every ranks_-th of the tiles from `first` on; where
  // there are fewer tiles than blocks, for some of the images only.
  struct Task {
    const W* weights;            // of the first tile, for the pixel itself
    const float* bias;           // of the first image
    float *other, *kept, *old;   // the plane that is added, if it lies in global memory, at the row's begin; the
                                 // result's if it is to lie there; sums of earlier pixels
    int weights_step, tap_size;  // from tile to tile; of what is for one pixel of a window
    int bias_step, other_step, kept_step;
    int src, src_length, added, added_length, dst, dst_length;  // in shared memory; added: -1 for none
    int tiles, first;
    int share, begin, step, groups;  // kShare images that a warp multiplies at once; such shares: the first, the next,
                                     // how many
    int pairs, then;
    int before, steps;  // earlier pixels of its window; steps of a product for one pixel
    int words;          // that come
  };
  FASTGEN_DEVICE Task task_of(const Instruction& i) {
    const Matrix& matrix = matrices_[i.matrix];
    const Tiles m = matrix.tiles();
    const Plane &src = planes_[i.src], &dst = planes_[i.dst];
    const int count = static_cast<int>(m.count()), size = static_cast<int>(m.padded()) * kTileRows;
    const int sharers = count < ranks_ ? ranks_ / count : 1, nth = count < ranks_ ? rank_ / count : 0;
    Task t{};
    t.first = count < ranks_ ? rank_ % count : rank_;
    t.tiles = (count - t.first + ranks_ - 1) / ranks_;
    t.begin = nth;
    t.step = sharers;
    // more images at once where that saves a round of the warps
    const auto shares = [&](int share) { return (groups_ + share - 1) / share; };
    const auto rounds = [&](int share) {  // of any block
      const int most = (shares(share) + sharers - 1) / sharers * ((count + ranks_ - 1) / ranks_);
      return (most + half_threads_ / 32 - 1) / (half_threads_ / 32);
    };
    t.share = rounds(kMostShare) < rounds(1) ? kMostShare : 1;
    const int all = shares(t.share);
    t.groups = nth < sharers && nth < all ? (all - nth + sharers - 1) / sharers : 0;
    const int idle = count < ranks_ ? ranks_ - count * (all < sharers ? all : sharers) : 0;
    t.words = count_ * static_cast<int>(dst.channels) + idle;
    t.before = static_cast<int>(i.extra) - 1;
    t.tap_size = size / static_cast<int>(i.extra);
    t.steps = t.tap_size / (kTileInputs * kTileRows);
    t.weights_step = i.weights >= 0 ? size : ranks_ * size;
    t.weights =
        t.before * t.tap_size +
        (i.weights >= 0 ? weights_ + i.weights : static_cast<const W*>(job_.weights_at) + matrix.at + t.first * size);
    if (i.bias >= 0) t.bias = job_.biases + (job_.own_biases ? first_ * job_.bias_size : 0) + i.bias;
    t.bias_step = job_.own_biases ? static_cast<int>(job_.bias_size) : 0;
    t.added = -1;
    if (i.other >= 0 && planes_[i.other].slot >= 0) {
      t.added = room_ * static_cast<int>(planes_[i.other].slot);
      t.added_length = static_cast<int>(planes_[i.other].length());
    } else if (i.other >= 0) {
      const auto at = row(i.other, job_.y);
      t.other = at.data;
      t.other_step = at.step;
    }
    if (dst.kept) {
      const auto at = row(i.dst, job_.y);
      t.kept = at.data;
      t.kept_step = at.step;
    }
    t.old = old_ + i.old * room_ * kTileRows;
    t.src = room_ * static_cast<int>(src.slot);
    t.src_length = static_cast<int>(src.length());
    t.dst = room_ * static_cast<int>(dst.slot);
    t.dst_length = static_cast<int>(dst.length());
    t.pairs = matrix.pairs != 0;
    t.then = static_cast<int>(i.then);
    return t;
  }

  // This block's tiles into shared memory.
  FASTGEN_DEVICE void take_weights() {
    for (int k = 0; k < instruction_count_; ++k) {
      if (!is_conv(k) || instructions_[k].weights < 0) continue;
      const Task& task = tasks_[k];
      const Matrix& matrix = matrices_[instructions_[k].matrix];
      const int size = task.weights_step / kGroup;
      for (int nth = 0; nth < task.tiles; ++nth) {
        const auto* from = static_cast<const Group<W>*>(job_.weights_at) + matrix.at / kGroup +
                           int64_t{task.first + ranks_ * nth} * size;
        auto* to = reinterpret_cast<Group<W>*>(weights_ + instructions_[k].weights) + nth * size;
        for (int e = thread(); e < size; e += threads()) to[e] = from[e];
      }
    }
  }

  // One message for each stage, in turns: so many that a thread whose half waits for it still finds its own.
  static constexpr int kArrivals = 4;

  // Words that blocks without a share send: behind the arrivals, for each half.
  FASTGEN_DEVICE uint32_t* token() const {
    return reinterpret_cast<uint32_t*>(arrivals_ + kArrivals) + half_ * ranks_ + rank_;
  }

  // All that was sent has come.
  FASTGEN_DEVICE void receive() {
    for (; received_ < stage_; ++received_)
      if (ranks_ > 1) await(arrivals_ + received_ % kArrivals, received_ / kArrivals % 2);
  }

  // To all blocks; a lane has number lane / 4 of eight that lie at `to`, whose eight words become two messages of four,
  // each of them four lanes': each sends it to every fourth block.
  FASTGEN_DEVICE void send(float* to, bool live, float v) const {
    const int lane = thread() % 32;
    uint32_t words[4];
    int part, nth;
    const auto both = [&](uint32_t own, int lanes, uint32_t* low, uint32_t* high) {
      const uint32_t got = shuffle_xor(own, lanes);
      *low = lane & lanes ? got : own;
      *high = lane & lanes ? own : got;
    };
    uint32_t pair[2];
    if constexpr (sizeof(W) == 2) {  // the leading parts, and what remains
      W parts[2];
      convert(v, &parts[0]);
      convert(v - to_float(parts[0]), &parts[1]);
      uint32_t low, high;
      both(parts[0] | uint32_t{parts[1]} << 16, 4, &low, &high);
      part = lane / 4 % 2;
      nth = lane / 8;
      both(part ? low >> 16 | (high & 0xFFFF0000u) : (low & 0xFFFFu) | high << 16, 8, &pair[0], &pair[1]);
      both(pair[0], 16, &words[0], &words[2]);
      both(pair[1], 16, &words[1], &words[3]);
    } else {
      uint32_t own;
      memcpy(&own, &v, 4);
      part = lane / 16;
      nth = lane / 4 % 4;
      both(own, 4, &pair[0], &pair[1]);
      both(pair[0], 8, &words[0], &words[2]);
      both(pair[1], 8, &words[1], &words[3]);
    }
    if (!live) return;
    auto* place = reinterpret_cast<uint32_t*>(to) + part * 4;
    if (ranks_ == 1) {
      for (int k = 0; nth == 0 && k < 4; ++k) place[k] = words[k];
    } else {
      for (int r = nth; r < ranks_; r += 4) post_four(place, words, arrivals_ + stage_ % kArrivals, r);
    }
  }

  FASTGEN_DEVICE void draw_pixel(int number, int x) {
    if (is_conv(number)) {
      if (ranks_ == 1 || stage_ % 2 == half_) take_turn(tasks_[number], x);
      ++stage_;
      return;
    }
    receive();
    sync_block();
    this->run(instructions_[number], x);
  }

  // A block without a share sends a word, so that none goes on before all have come as far.
  FASTGEN_DEVICE void take_turn(const Task& task, int x) {
    const int nth = thread() % half_threads_;
    Arrival* arrival = arrivals_ + stage_ % kArrivals;
    if (ranks_ > 1 && nth == 0) expect(arrival, task.words * 4);
    if (task.share == 1)
      convolve<1>(task, x);
    else
      convolve<kMostShare>(task, x);
    receive();
    if (ranks_ == 1) return sync_block();
    if (task.groups == 0 && nth < ranks_) post(token(), uint32_t{}, arrival, nth);
    sync_half();
  }

  // This block's rows, a warp for each tile and 4 M images. The blocks wait for each other in a long chain of these, so
  // little stands between what comes and what is sent.
  template <int M>
  FASTGEN_DEVICE void convolve(const Task& task, int x) {
    const int lane = thread() % 32, before = task.before, apart = task.pairs ? kChannelBlock : kGroup;
    const int turn = before > 1 ? x % before : 0, steps = task.steps, groups = task.groups, items = task.tiles * groups;
    const bool one = task.pairs && task.then >= 0;  // result of two rows
    const Kind then = static_cast<Kind>(task.then);
    for (int item = thread() % half_threads_ / 32; item < items; item += half_threads_ / 32) {
      int nth = 0, group = item;
      for (; group >= groups; group -= groups) ++nth;
      group = task.begin + group * task.step;
      const int tile = task.first + ranks_ * nth, image = group * kShare * M + lane % 4;  // the first
      const int row = (task.pairs ? tile / 2 * 2 * kChannelBlock + tile % 2 * kGroup : tile * kTileRows) + lane / 4;
      const int result = one ? tile * kGroup + lane / 4 : row;
      const W* w = task.weights + int64_t{nth} * task.weights_step;
      float* old = task.old + (nth * before * room_ + group * kShare * M) * kTileRows + lane;
      const auto old_of = [&](int turn, int k, int h) -> float& {
        return old[turn * room_ * kTileRows + k * kShare * kTileRows + h * 32];
      };
      // what does not come from the stage before
      Ahead<W> now, late;
      now.fetch(w, steps);
      float v[M][2] = {};
      for (int k = 0; k < M; ++k) {
        const int n = image + k * kShare;
        if (n >= count_) continue;
        if (const float* other = task.other)
          for (int h = 0; h < 2; ++h) v[k][h] += other[n * job_.memory_size + x * task.other_step + row + h * apart];
        if (const float* bias = task.bias)
          for (int h = 0; h < 2; ++h) v[k][h] += bias[int64_t{n} * task.bias_step + row + h * apart];
        if (before > 0)
          for (int h = 0; h < 2; ++h) v[k][h] += old_of(turn, k, h);
      }
      const int length = task.src_length, added_length = task.added_length, dst_length = task.dst_length;
      const float* src = slots_ + task.src + group * kShare * M * length;
      const float* added = task.added < 0 ? nullptr : slots_ + task.added + image * added_length;
      float* dst = slots_ + task.dst + image * dst_length + result - lane / 4;
      float* kept = task.kept;
      const int tap_size = task.tap_size;
      receive();
      if (added)
        for (int k = 0; k < M; ++k)
          for (int h = 0; h < 2; ++h) v[k][h] += number(added + k * kShare * added_length, row + h * apart);
      now.template multiply<M>(src, length, v);
      if (before > 0) late.fetch(w - tap_size, steps);
      for (int k = 0; k < M; ++k) {
        const bool live = image + k * kShare < count_;
        if (task.then >= 0) {
          v[k][0] = activated(then, v[k][0], v[k][1]);
          if (!one) v[k][1] = activated(then, v[k][1], 0);
        }
        send(dst + k * kShare * dst_length, live, v[k][0]);
        if (!one) send(dst + k * kShare * dst_length + apart, live, v[k][1]);
        if (kept && live) {
          float* to = kept + ((image + k * kShare) * job_.memory_size + x * task.kept_step + result);
          to[0] = v[k][0];
          if (!one) to[apart] = v[k][1];
        }
      }
      for (int d = 1; d <= before; ++d) {  // for the d-th pixel after this one
        float sums[M][2] = {};
        late.template multiply<M>(src, length, sums);
        if (d < before) late.fetch(w - (d + 1) * tap_size, steps);
        const int at = turn + d < before ? turn + d : turn + d - before;
        for (int k = 0; k < M; ++k)
          for (int h = 0; h < 2; ++h)
            old_of(at, k, h) = d == before ? sums[k][h] : old_of(at, k, h) + sums[k][h];  // the first for that pixel
      }
    }
  }

  const int groups_;               // of kShare images
  const int half_threads_, half_;  // a block alone is one half
  int stage_ = 0, received_ = 0;
  Arrival* arrivals_;
  Task* tasks_;
  W* weights_;
  float* old_;
};

}  // namespace fastgen::pixelcnn
