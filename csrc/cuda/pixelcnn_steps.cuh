// What runs pixel by pixel beside convolutions, in `Pixels`.
#pragma once

#include "pixelcnn_images.cuh"
#include "pixelcnn_sample.cuh"

namespace fastgen::pixelcnn {

// The current pixel's vectors, and what every block does with them for itself.
template <class W>
class Steps : protected Images {
 protected:
  FASTGEN_DEVICE Steps(const Job& job, Shared& shared)
      : Images(job, shared, job.cluster, job.images_each, job.begin, job.end), room_(static_cast<int>(job.room())) {
    slots_ = shared.take<float>(room_ * job.slots);
    outputs_ = shared.take<float>(job.outputs_of_block(threads()));
    scores_ =
        job.spilled ? scratch() + (job.far ? job.old_floats() : 0) : shared.take<float>(job.scores_of_block(threads()));
    for (int64_t i = thread(); i < room_ * job.slots; i += threads()) slots_[i] = 0;
  }

  // Of global memory, this block's.
  FASTGEN_DEVICE float* scratch() const { return job_.scratch + block() * job_.scratch_floats(threads()); }

  FASTGEN_DEVICE void run(const Instruction& i, int x) {
    const Kind kind = static_cast<Kind>(i.kind);
    if (kind == Kind::kSample)
      sample(i, x);
    else if (kind == Kind::kRemember)
      remember(i, x);
    else if (kind == Kind::kAttention)
      attend(i, x);
    else if (kind == Kind::kNorm)
      normalize(i, x);
    else if (kind == Kind::kPrevious)
      look_back(i, x);
    else if (kind == Kind::kLstm)
      remember_cell(i, x);
    else
      activate(i, x);
  }

  // The current pixel's vectors of a plane, of all images.
  FASTGEN_DEVICE Vectors<W> vectors(const Plane& p) const {
    return {reinterpret_cast<W*>(slots_ + room_ * p.slot), static_cast<int>(p.length())};
  }
  FASTGEN_DEVICE static float number(const float* vector, int c) {
    const W* from = reinterpret_cast<const W*>(vector + c / kGroup * kGroup) + c % kGroup;
    float sum = to_float(*from);
    if constexpr (sizeof(W) == 2) sum += to_float(from[kGroup]);
    return sum;
  }
  // Of a plane of either kind.
  FASTGEN_DEVICE float number(int64_t plane, int image, int x, int c) const {
    const Plane& p = planes_[plane];
    if (p.slot < 0) return at(plane, image, job_.y, x)[c];
    return number(slots_ + room_ * p.slot + image * p.length(), c);
  }

  // Every block for itself.
  FASTGEN_DEVICE void activate(const Instruction& i, int x) {
    const Kind kind = static_cast<Kind>(i.kind);
    const Plane& p = planes_[i.dst];
    const int channels = static_cast<int>(p.channels), each = channels / kGroup;
    const bool pairs = kind == Kind::kGate || kind == Kind::kGlu;
    for (int e = thread(); e < count_ * each; e += threads()) {
      const int image = e / each, begin = e % each * kGroup;
      Group<float> v;
      for (int k = 0; k < kGroup; ++k) {
        const int c = begin + k, row = pairs ? static_cast<int>(row_of_pair(c)) : c;
        const float a = number(i.src, image, x, row);
        if (kind == Kind::kAdd)
          v.v[k] = a + number(i.other, image, x, c);
        else if (kind == Kind::kGelu)
          v.v[k] = gelu(a);
        else
          v.v[k] = activated(kind, a, pairs ? number(i.src, image, x, row + kChannelBlock) : 0);
      }
      put(i.dst, image, begin, x, v);
    }
    sync_block();
  }

  // h and the cell, of four gates. A cell that came from the pixel before stays here, in float32; one that came from
  // the row above goes to memory.
  FASTGEN_DEVICE void remember_cell(const Instruction& i, int x) {
    const Plane &h = planes_[i.dst], &c = planes_[i.other];
    const int each = static_cast<int>(h.channels) / kGroup;
    for (int e = thread(); e < count_ * each; e += threads()) {
      const int image = e / each, begin = e % each * kGroup;
      float* cell = i.cell_beside() ? slots_ + room_ * c.slot + image * c.length() : at(i.other, image, job_.y, x);
      const float* before = i.cell_beside() ? cell : at(i.other, image, job_.y + i.dy, x);
      Group<float> v;
      for (int k = 0; k < kGroup; ++k) {
        const auto gate_of = [&](int nth) { return number(i.src, image, x, place_of_gate(begin + k, nth)); };
        const Lstm state = lstm(before[begin + k], gate_of(0), gate_of(1), gate_of(2), gate_of(3));
        if (i.cell_beside() || image % ranks_ == rank_) cell[begin + k] = state.cell;
        v.v[k] = state.h;
      }
      put(i.dst, image, begin, x, v);
    }
    sync_block();
  }

  // Layer norm of the first i.extra channels, of which the bias holds scales and shifts: every block for itself, a warp
  // for each image.
  FASTGEN_DEVICE void normalize(const Instruction& i, int x) {
    const int lane = thread() % 32, live = static_cast<int>(i.extra);
    const int groups = static_cast<int>(planes_[i.dst].channels) / kGroup;
    for (int image = thread() / 32; image < count_; image += threads() / 32) {
      float sum = 0, squares = 0;
      for (int c = lane; c < live; c += 32) sum += number(i.src, image, x, c);
      const float mean = sum_of_warp(sum) / live;
      for (int c = lane; c < live; c += 32) {
        const float d = number(i.src, image, x, c) - mean;
        squares += d * d;
      }
      const float scale = 1 / sqrtf(sum_of_warp(squares) / live + kNormEps);
      const float* of_image = job_.biases + (job_.own_biases ? (first_ + image) * job_.bias_size : 0) + i.bias;
      for (int g = lane; g < groups; g += 32) {
        Group<float> v;
        for (int k = 0; k < kGroup; ++k) {
          const int c = g * kGroup + k;
          const float* pair = of_image + row_of_pair(c);
          v.v[k] = (number(i.src, image, x, c) - mean) * scale * pair[0] + pair[kChannelBlock];
        }
        put(i.dst, image, g * kGroup, x, v);
      }
    }
    sync_block();
  }

  // The pixel before: its vector is still here, save that of the row above.
  FASTGEN_DEVICE void look_back(const Instruction& i, int x) {
    const int each = static_cast<int>(planes_[i.dst].channels) / kGroup;
    for (int e = thread(); e < count_ * each; e += threads()) {
      const int image = e / each, begin = e % each * kGroup;
      Group<float> v;
      if (x == 0)
        v = *reinterpret_cast<const Group<float>*>(at(i.src, image, job_.y - 1, width_ - 1) + begin);
      else
        for (int k = 0; k < kGroup; ++k) v.v[k] = number(i.src, image, x, begin + k);
      put(i.dst, image, begin, x, v);
    }
    sync_block();
  }

  // Eight channels into the current pixel's vector, and where rows below read them.
  FASTGEN_DEVICE void put(int64_t plane, int image, int begin, int x, const Group<float>& v) const {
    const Plane& p = planes_[plane];
    vectors(p).put(image, begin, v);
    if (p.kept && image % ranks_ == rank_) *reinterpret_cast<Group<float>*>(at(plane, image, job_.y, x) + begin) = v;
  }

  // Keys [head][block of pixels][channel][pixel] and values [head][pixel][channel], padded, of all pixels drawn.
  struct Cache {
    int keys, values, padded, room;  // keys and values of a head
    float *key, *value;
  };
  FASTGEN_DEVICE Cache cache_of(const Instruction& i, int64_t image) const {
    const int heads = static_cast<int>(i.bias), keys = static_cast<int>(i.dy) / heads;
    const int values = static_cast<int>(i.dx) / heads, room = whole_blocks(static_cast<int>(job_.height) * width_);
    float* key = job_.memory + (first_ + image) * job_.memory_size + i.extra;
    return {keys, values, whole_blocks(values), room, key, key + heads * keys * room};
  }
  FASTGEN_DEVICE static int whole_blocks(int n) { return (n + kChannelBlock - 1) / kChannelBlock * kChannelBlock; }

  FASTGEN_DEVICE void remember(const Instruction& i, int x) {
    const int pixel = static_cast<int>(job_.y) * width_ + x, lane = pixel % kChannelBlock;
    const auto channels = static_cast<unsigned>(i.dy + i.dx);
    for (unsigned e = rank_ * threads() + thread(); e < count_ * channels; e += ranks_ * threads()) {
      const int image = e / channels, c = e % channels, v = c - static_cast<int>(i.dy);
      const Cache cache = cache_of(i, image);
      if (v < 0) {
        const int k = c % cache.keys;
        cache.key[(c - k) * cache.room + (pixel - lane) * cache.keys + k * kChannelBlock + lane] =
            number(i.src, image, x, c);
      } else {
        cache.value[(v / cache.values * cache.room + pixel) * cache.padded + v % cache.values] =
            number(i.other, image, x, v);
      }
    }
    meet();
  }

  // Softmax of the products with the keys of all pixels before, and with the pixel's own, or a key of zeros whose value
  // is zero, over their values: matrix is 1 or 0. A warp for each head of an image; the results go through global
  // memory.
  FASTGEN_DEVICE void attend(const Instruction& i, int x) {
    const int pixels = static_cast<int>(job_.y) * width_ + x + static_cast<int>(i.matrix), warps = threads() / 32,
              heads = static_cast<int>(i.bias);
    const int lane = thread() % 32;
    float* score = scores_ + thread() / 32 * job_.scores;
    for (int item = rank_ * warps + thread() / 32; item < count_ * heads; item += ranks_ * warps) {
      const int image = item / heads, h = item % heads;
      const Cache cache = cache_of(i, image);
      const float scale = 1 / sqrtf(static_cast<float>(cache.keys));
      float top = i.matrix * -1e30f;  // of the zeros, where they do not count
      for (int j = lane; j < pixels; j += 32) {
        const float* key = cache.key + h * cache.keys * cache.room + (j - j % kChannelBlock) * cache.keys;
        float sum = 0;
        for (int k = 0; k < cache.keys; ++k)
          sum += key[k * kChannelBlock + j % kChannelBlock] * (number(i.src, image, x, h * cache.keys + k) * scale);
        score[j] = sum;
        top = fmaxf(top, sum);
      }
      top = most_of_warp(top);
      float total = 0;
      for (int j = lane; j < pixels; j += 32) total += score[j] = expf(score[j] - top);
      total = sum_of_warp(total) + expf(i.matrix * -1e30f - top);
      sync_warp();
      float* to = at(i.dst, image, job_.y, x) + h * cache.values;
      for (int c = lane; c < cache.values; c += 32) {
        float sum = 0;
        for (int j = 0; j < pixels; ++j) sum += score[j] * cache.value[(h * cache.room + j) * cache.padded + c];
        to[c] = sum / total;
      }
      sync_warp();
    }
    meet();
    const int each = static_cast<int>(planes_[i.dst].channels) / kGroup;
    for (int e = thread(); e < count_ * each; e += threads()) {
      const int image = e / each, c = e % each * kGroup;
      vectors(planes_[i.dst]).put(image, c, *reinterpret_cast<const Group<float>*>(at(i.dst, image, job_.y, x) + c));
    }
    sync_block();
  }

  // The values of one color of one pixel, and what the network sees of them: every block for itself, a warp for each
  // image, or a thread where there is one parameter. One block tells the caller.
  FASTGEN_DEVICE void sample(const Instruction& i, int x) {
    const int64_t plane = job_.height * job_.width;
    const int lanes = job_.outputs > 1 ? 32 : 1, lane = thread() % lanes, at_once = threads() / lanes;
    const int features = static_cast<int>(job_.features), begin = static_cast<int>(i.extra) * features;
    float* out = outputs_ + thread() / lanes * job_.outputs;
    for (int image = thread() / lanes; image < count_; image += at_once) {
      const bool tells = image % ranks_ == rank_;
      const int64_t pixel = ((first_ + image) * job_.colors + i.extra) * plane + job_.y * job_.width + x;
      const float u = job_.uniforms[pixel];
      float zero = 0;
      for (int o = lane; o < job_.outputs; o += lanes) {
        out[o] = number(i.src, image, x, o);
        zero += 0.0f * out[o];
        if (tells && job_.parameters) job_.parameters[pixel * job_.outputs + o] = out[o];
      }
      if (lanes == 32) {
        zero = sum_of_warp(zero);
        sync_warp();
      }
      int64_t value = draw_value(job_, out, u);
      if (job_.known && job_.known[pixel]) value = job_.given[pixel];
      if (zero == 0)
        for (int f = lane; f < features; f += lanes) {
          const float v = job_.table[value * features + f];
          vectors(planes_[i.dst]).put(image, begin + f, v);
          if (tells && planes_[i.dst].kept) at(i.dst, image, job_.y, x)[begin + f] = v;
        }
      if (tells && lane == 0) job_.values[pixel] = zero == 0 ? value : -1;
      if (lanes == 32) sync_warp();
    }
    sync_block();
  }

  const int room_;  // places for images
  float *slots_, *outputs_, *scores_;
};

}  // namespace fastgen::pixelcnn
