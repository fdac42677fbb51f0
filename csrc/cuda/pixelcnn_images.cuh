// Sampling an image pixel by pixel on a GPU, for any model that is a program over planes
// (fastgen/ops/pixel_program.py). Two kernels take turns for each row of the images, by clusters of blocks that have
// some images each.
//
// `Rows`: what is above a row is multiplied for the whole row. A block has a share of its pixels, or of the rows of a
// matrix where pixels are few; planes lie in global memory, and all blocks meet after each instruction.
//
// `Pixels`: one pixel after the other, from left to right, and before that from right to left what begins at the end of
// the row above. A block has a share of the rows of each matrix, in its shared memory if they fit, and so has every
// block the vectors of the current pixel: a convolution's result is sent to all, and its arrival is what the next waits
// for. The halves of a block take turns with these, so that one prepares the next, and multiplies what a pixel gives to
// later ones of its row, while the other has the turn.
#pragma once

#include "pixelcnn_product.cuh"

namespace fastgen::pixelcnn {

template <class T>
FASTGEN_DEVICE const T* copied(Shared& shared, const T* from, int64_t count) {
  T* to = shared.take<T>(count);
  for (int64_t i = thread(); i < count; i += threads()) to[i] = from[i];
  return to;
}

// The images of a cluster.
class Images {
 protected:
  FASTGEN_DEVICE Images(const Job& job, Shared& shared, int cluster, int images_each, int64_t from, int64_t to)
      : job_(job),
        ranks_(kClusters ? cluster : 1),
        rank_(kClusters ? block() % cluster : 0),
        width_(static_cast<int>(job.width)),
        instruction_count_(static_cast<int>(to - from)),
        first_(int64_t{block() / cluster} * images_each),
        count_(static_cast<int>(first_ + images_each < job.images ? images_each : job.images - first_)) {
    planes_ = copied(shared, job.planes, job.plane_count);
    instructions_ = copied(shared, job.instructions + from, to - from);
    matrices_ = copied(shared, job.matrices, job.matrix_count);
  }

  FASTGEN_DEVICE void meet() {
    if (ranks_ > 1)
      sync_cluster();
    else
      sync_block();
  }

  // Where a plane's row y lies, of the first image.
  struct Row {
    float* data;
    int step;
  };
  FASTGEN_DEVICE Row row(int64_t plane, int64_t y) const {
    const Plane& p = planes_[plane];
    const int rows = static_cast<int>(p.rows), in = rows == 1 ? 0 : static_cast<int>(y) % rows;
    return {job_.memory + first_ * job_.memory_size + p.offset + (in < 0 ? in + rows : in) * p.row_size + p.start,
            static_cast<int>(p.step)};
  }
  FASTGEN_DEVICE float* at(const Row& row, int image, int x) const {
    return row.data + image * job_.memory_size + x * row.step;
  }
  FASTGEN_DEVICE float* at(int64_t plane, int image, int64_t y, int x) const { return at(row(plane, y), image, x); }

  FASTGEN_DEVICE static float gelu(float a) { return 0.5f * a * (1 + erff(a * 0.70710678f)); }

  // b: the second half of a gate.
  FASTGEN_DEVICE static float activated(Kind kind, float a, float b) {
    if (kind == Kind::kRelu) return a > 0 || a != a ? a : 0.0f;
    if (kind == Kind::kElu) return a > 0 ? a : quick_exp(a) - 1;
    float part = 1;
    if (kind == Kind::kGate) {  // tanh(a) as a fraction
      const float e = quick_exp(-2 * fminf(fmaxf(a, -15.0f), 15.0f));
      part = 1 + e;
      a = a != a ? a : 1 - e;
    }
    return quick_divide(a, part * (1 + quick_exp(-b)));
  }

  // Of channel c, one of an LSTM's four gates, whose blocks alternate.
  FASTGEN_DEVICE static int place_of_gate(int c, int nth) {
    return (c / kChannelBlock * 4 + nth) * kChannelBlock + c % kChannelBlock;
  }
  struct Lstm {
    float h, cell;
  };
  FASTGEN_DEVICE static Lstm lstm(float cell, float o, float f, float i, float g) {
    cell = activated(Kind::kGlu, cell, f) + activated(Kind::kGate, g, i);
    return {activated(Kind::kGate, cell, o), cell};
  }

  const Job& job_;
  const int ranks_, rank_, width_, instruction_count_;
  const int64_t first_;
  const int count_;
  const Plane* planes_;
  const Instruction* instructions_;
  const Matrix* matrices_;
};

}  // namespace fastgen::pixelcnn
