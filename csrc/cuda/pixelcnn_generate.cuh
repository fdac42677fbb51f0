// Sampling an image pixel by pixel on a GPU, for any model that is a program over planes
// (fastgen/ops/pixel_program.py).
//
// A cluster of blocks draws some images together: each block has a share of the rows of every matrix, which it reads
// for all images, and all meet after each instruction. What is above the current row is multiplied for whole rows;
// planes lie in global memory, the program in shared memory.
#pragma once

#include "network.cuh"
#include "pixelcnn_job.h"

namespace fastgen::pixelcnn {

template <int M, class W>
class Images {
 public:
  FASTGEN_DEVICE explicit Images(const Job& job)
      : job_(job),
        rank_(block() % job.cluster),
        first_(int64_t{block() / job.cluster} * job.images_each),
        count_(static_cast<int>(first_ + job.images_each < job.images ? job.images_each : job.images - first_)) {
    Shared shared;
    planes_ = copied(shared, job.planes, job.plane_count);
    instructions_ = copied(shared, job.instructions, job.instruction_count);
    matrices_ = copied(shared, job.matrices, job.matrix_count);
    windows_ = shared.take<W>(kColumns * job.most_inputs * Vectors<W>::kParts);
    const int64_t scores = job.scores_of_block(threads());
    partial_ = shared.take<float>(split_floats(M, threads()));
    scores_ = job.spilled ? job.scratch + block() * scores : shared.take<float>(scores);
    for (int64_t i = thread(); i < kColumns * job.most_inputs * Vectors<W>::kParts; i += threads()) windows_[i] = 0;
    sync_block();
  }

  FASTGEN_DEVICE void draw() {
    for (int64_t y = job_.first_row; y < job_.last_row; ++y) {
      copy_context(y);
      meet();
      run(false, y, 0, job_.width);
      for (int64_t x = 0; x < job_.width; ++x) run(true, y, x, x + 1);
    }
  }

 private:
  static constexpr int kColumns = 4 * M;

  template <class T>
  FASTGEN_DEVICE static const T* copied(Shared& shared, const T* from, int64_t count) {
    T* to = shared.take<T>(count);
    for (int64_t i = thread(); i < count; i += threads()) to[i] = from[i];
    return to;
  }

  FASTGEN_DEVICE void meet() {
    if (job_.cluster > 1)
      sync_cluster();
    else
      sync_block();
  }

  FASTGEN_DEVICE void run(bool per_pixel, int64_t y, int64_t x0, int64_t x1) {
    for (int64_t i = 0; i < job_.instruction_count; ++i) {
      const Instruction& instruction = instructions_[i];
      if ((instruction.per_pixel != 0) != per_pixel) continue;
      execute(instruction, y, x0, x1);
      meet();
    }
  }

  // Where a plane's row y lies, of the first image.
  struct Row {
    float* data;
    int64_t step;
  };
  FASTGEN_DEVICE Row row(int64_t plane, int64_t y) const {
    const Plane& p = planes_[plane];
    const int rows = static_cast<int>(p.rows), in = static_cast<int>(y) % rows;
    return {job_.memory + first_ * job_.memory_size + p.offset + (in < 0 ? in + rows : in) * p.row_size + p.start,
            p.step};
  }
  FASTGEN_DEVICE float* at(const Row& row, int64_t image, int64_t x) const {
    return row.data + image * job_.memory_size + x * row.step;
  }
  FASTGEN_DEVICE float* at(int64_t plane, int64_t image, int64_t y, int64_t x) const {
    return at(row(plane, y), image, x);
  }

  // f(image, x, channel) for all of them, by all threads of the cluster.
  template <class F>
  FASTGEN_DEVICE void each(int64_t x0, int64_t x1, int64_t channels, F&& f) const {
    const auto columns = static_cast<unsigned>(x1 - x0), size = static_cast<unsigned>(channels);
    const unsigned step = job_.cluster * threads();
    for (unsigned i = rank_ * threads() + thread(); i < count_ * columns * size; i += step)
      f(int64_t{i / size / columns}, x0 + i / size % columns, int64_t{i % size});
  }

  FASTGEN_DEVICE void copy_context(int64_t y) const {
    if (!job_.context) return;
    each(0, job_.width, job_.context_channels, [&](int64_t image, int64_t x, int64_t c) {
      const int64_t pixel = ((job_.own_context ? first_ + image : 0) * job_.height + y) * job_.width + x;
      at(job_.context_plane, image, y, x)[c] = job_.context[pixel * job_.context_channels + c];
    });
  }

  FASTGEN_DEVICE void execute(const Instruction& i, int64_t y, int64_t x0, int64_t x1) {
    const Kind kind = static_cast<Kind>(i.kind);
    if (kind == Kind::kConv) return convolve(i, y, x0, x1);
    if (kind == Kind::kSample) return sample(i, y, x0);
    if (kind == Kind::kRemember) return remember(i, y, x0);
    if (kind == Kind::kAttention) return attend(i, y, x0);
    const Row src = row(i.src, y), dst = row(i.dst, y), other = kind == Kind::kAdd ? row(i.other, y) : src;
    each(x0, x1, planes_[i.dst].channels, [&](int64_t image, int64_t x, int64_t c) {
      const float* from = at(src, image, x);
      float v = 0;
      if (kind == Kind::kAdd)
        v = from[c] + at(other, image, x)[c];
      else if (kind == Kind::kRelu || kind == Kind::kElu)
        v = activated(kind, from[c], 0);
      else
        v = activated(kind, from[row_of_pair(c)], from[row_of_pair(c) + kChannelBlock]);
      at(dst, image, x)[c] = v;
    });
  }

  // b: the second half of a gate.
  FASTGEN_DEVICE static float activated(Kind kind, float a, float b) {
    if (kind == Kind::kGate) return gate(a, b);
    if (kind == Kind::kGlu) return a / (1 + expf(-b));
    if (kind == Kind::kRelu) return a > 0 || a != a ? a : 0.0f;
    return a > 0 ? a : expm1f(a);
  }

  // dst = bias + other + matrix * window of src, or an activation of that: for kColumns pixels or images at a time,
  // this block's share of rows.
  FASTGEN_DEVICE void convolve(const Instruction& i, int64_t y, int64_t x0, int64_t x1) {
    const Matrix& m = matrices_[i.matrix];
    const Tiles tiles = m.tiles();
    const int inputs = static_cast<int>(i.extra * planes_[i.src].channels), padded = static_cast<int>(tiles.padded());
    const auto width = static_cast<unsigned>(x1 - x0), columns = width * count_;
    const Vectors<W> windows{windows_, padded};
    const Row src = row(i.src, y + i.dy), dst = row(i.dst, y), other = i.other >= 0 ? row(i.other, y) : dst;
    const W* w = static_cast<const W*>(job_.weights) + m.at;
    const Kind then = static_cast<Kind>(i.then);
    for (unsigned begin = 0; begin < columns; begin += kColumns) {
      const int live = static_cast<int>(columns - begin < kColumns ? columns - begin : kColumns);
      const auto image_of = [&](int n) { return int64_t{(begin + n) / width}; };
      const auto x_of = [&](int n) { return x0 + (begin + n) % width; };
      for (int n = thread() / 32; n < live; n += threads() / 32) {  // a warp for each window, which is contiguous
        const float* from = at(src, image_of(n), x_of(n) + i.dx);
        for (int k = thread() % 32 * kGroup; k < padded; k += 32 * kGroup)
          windows.put(n, k, k < inputs ? *reinterpret_cast<const Group<float>*>(from + k) : Group<float>{});
      }
      sync_block();
      const auto whole = [&](int64_t row, int n, float v) {
        if (i.bias >= 0) v += job_.biases[(job_.own_biases ? first_ + image_of(n) : 0) * job_.bias_size + i.bias + row];
        if (i.other >= 0) v += at(other, image_of(n), x_of(n))[row];
        return v;
      };
      const auto result = [&](int n) { return at(dst, image_of(n), x_of(n)); };
      if (m.pairs)
        split_product<M, true>(tiles, w, windows, live, rank_, job_.cluster, partial_,
                               [&](int unit, int n, float a, float b) {
                                 const int64_t row = row_of_pair(unit);
                                 float* to = result(n);
                                 a = whole(row, n, a);
                                 b = whole(row + kChannelBlock, n, b);
                                 if (i.then >= 0) {
                                   to[unit] = activated(then, a, b);
                                 } else {
                                   to[row] = a;
                                   to[row + kChannelBlock] = b;
                                 }
                               });
      else
        split_product<M>(tiles, w, windows, live, rank_, job_.cluster, partial_, [&](int row, int n, float v) {
          v = whole(row, n, v);
          result(n)[row] = i.then >= 0 ? activated(then, v, 0) : v;
        });
      sync_block();
    }
  }

  // Keys [head][channel][pixel] and values [head][pixel][channel] of all pixels drawn.
  struct Cache {
    int64_t heads, keys, values, room;
    float *key, *value;
  };
  FASTGEN_DEVICE Cache cache_of(const Instruction& i, int64_t image) const {
    const int64_t pixels = job_.height * job_.width,
                  room = (pixels + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
    float* key = job_.memory + (first_ + image) * job_.memory_size + i.extra;
    return {i.bias, i.dy / i.bias, i.dx / i.bias, room, key, key + i.dy * room};
  }

  FASTGEN_DEVICE void remember(const Instruction& i, int64_t y, int64_t x) const {
    const int64_t pixel = y * job_.width + x;
    each(x, x + 1, i.dy + i.dx, [&](int64_t image, int64_t, int64_t c) {
      const Cache cache = cache_of(i, image);
      if (c < i.dy) {
        cache.key[c * cache.room + pixel] = at(i.src, image, y, x)[c];
      } else {
        const int64_t v = c - i.dy;
        cache.value[(v / cache.values * cache.room + pixel) * cache.values + v % cache.values] =
            at(i.other, image, y, x)[v];
      }
    });
  }

  // Softmax of the products with the keys of all pixels before and with a key of zeros, over their values; the value of
  // the key of zeros is zero. A warp for each head of an image.
  FASTGEN_DEVICE void attend(const Instruction& i, int64_t y, int64_t x) {
    const int64_t pixels = y * job_.width + x, warps = threads() / 32;
    const int lane = thread() % 32;
    float* score = scores_ + thread() / 32 * job_.scores;
    for (int64_t item = rank_ * warps + thread() / 32; item < count_ * i.bias; item += job_.cluster * warps) {
      const Cache cache = cache_of(i, item / i.bias);
      const int64_t h = item % i.bias;
      const float* query = at(i.src, item / i.bias, y, x);
      const float scale = 1 / sqrtf(static_cast<float>(cache.keys));
      float top = 0;
      for (int64_t j = lane; j < pixels; j += 32) {
        float sum = 0;
        for (int64_t k = h * cache.keys; k < (h + 1) * cache.keys; ++k)
          sum += cache.key[k * cache.room + j] * (query[k] * scale);
        score[j] = sum;
        top = fmaxf(top, sum);
      }
      top = most_of_warp(top);
      float total = 0;
      for (int64_t j = lane; j < pixels; j += 32) total += score[j] = expf(score[j] - top);
      total = sum_of_warp(total) + expf(-top);
      sync_warp();
      float* to = at(i.dst, item / i.bias, y, x) + h * cache.values;
      for (int64_t c = lane; c < cache.values; c += 32) {
        float sum = 0;
        for (int64_t j = 0; j < pixels; ++j) sum += score[j] * cache.value[(h * cache.room + j) * cache.values + c];
        to[c] = sum / total;
      }
      sync_warp();
    }
  }

  // The values of one color of one pixel, and what the network sees of them. A warp for each image.
  FASTGEN_DEVICE void sample(const Instruction& i, int64_t y, int64_t x) {
    const int64_t plane = job_.height * job_.width, warps = threads() / 32;
    const int lane = thread() % 32;
    for (int64_t image = rank_ * warps + thread() / 32; image < count_; image += job_.cluster * warps) {
      const int64_t pixel = ((first_ + image) * job_.colors + i.extra) * plane + y * job_.width + x;
      const float* out = at(i.src, image, y, x);
      float zero = 0;
      for (int64_t o = lane; o < job_.outputs; o += 32) {
        zero += 0.0f * out[o];
        if (job_.parameters) job_.parameters[pixel * job_.outputs + o] = out[o];
      }
      zero = sum_of_warp(zero);
      int64_t value = draw_value(out, job_.uniforms[pixel]);
      if (job_.known && job_.known[pixel]) value = job_.given[pixel];
      if (zero == 0) {
        float* features = at(i.dst, image, y, x) + i.extra * job_.features;
        for (int64_t f = lane; f < job_.features; f += 32) features[f] = job_.table[value * job_.features + f];
      }
      if (lane == 0) job_.values[pixel] = zero == 0 ? value : -1;
    }
  }

  FASTGEN_DEVICE int64_t draw_value(const float* out, float u) const {
    if (job_.logistic) return sample_logistic_level(out, u);
    if (job_.outputs > 1) return sample_categorical(out, static_cast<int>(job_.outputs), job_.temperature, u);
    const float pair[2] = {0.0f, out[0]};  // one logit: of level 1 against level 0
    return sample_categorical(pair, 2, job_.temperature, u);
  }

  // As in the CPU's pixel_images.h; each lane computes the same.
  FASTGEN_DEVICE int64_t sample_logistic_level(const float* parameters, float u) const {
    const int64_t mixtures = job_.outputs / 3;
    const float *logits = parameters, *means = parameters + mixtures, *log_scales = means + mixtures;
    float top = logits[0];
    for (int64_t m = 1; m < mixtures; ++m) top = fmaxf(top, logits[m]);
    const double temperature = job_.temperature;
    double total = 0;
    for (int64_t m = 0; m < mixtures; ++m) total += exp(static_cast<double>(logits[m] - top) / temperature);
    int64_t low = 0, high = job_.levels - 1;
    while (low < high) {
      const int64_t level = (low + high) / 2;
      const double edge = (2.0 * level + 1) / (job_.levels - 1) - 1;
      double below = 0;
      for (int64_t m = 0; m < mixtures; ++m) {
        const double scale = temperature * exp(static_cast<double>(fmaxf(log_scales[m], job_.log_scale_min)));
        below += exp(static_cast<double>(logits[m] - top) / temperature) / (1 + exp((means[m] - edge) / scale));
      }
      if (below / total <= u)
        low = level + 1;
      else
        high = level;
    }
    return low;
  }

  const Job& job_;
  const int rank_;
  const int64_t first_;
  const int count_;
  const Plane* planes_;
  const Instruction* instructions_;
  const Matrix* matrices_;
  W* windows_;
  float *partial_, *scores_;
};

}  // namespace fastgen::pixelcnn
