// One call of pixelcnn_generate on a GPU: host code, without CUDA.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "../pixel_layout.h"
#include "group.h"

namespace fastgen::pixelcnn {

constexpr int kThreads = 256;           // of a block
constexpr int kSplit = 8;               // threads that share a row
constexpr int kStep = kSplit * kGroup;  // inputs that they read together
constexpr int kColumns = 4;             // vectors that share each weight that is read

enum class Kind { kConv, kGate, kGlu, kRelu, kElu, kAdd, kAttention, kRemember, kSample };

struct Plane {
  int64_t channels, halves, rows, row_size, start, step, offset;
};

// What the fields mean depends on the kind: see fastgen/ops/pixel_program.py.
struct Instruction {
  int64_t kind, per_pixel, dst, src, other, matrix, bias, dy, dx, extra;
};

// Slices of threads / kSplit rows, one after the other; in a slice the weights that its threads read together.
struct Matrix {
  int64_t rows, inputs, at;  // stored rows; inputs padded; the first weight
};

struct Job {
  int cluster, images_each;  // blocks that draw the same images, and how many
  int64_t images, colors, height, width, first_row, last_row, memory_size, bias_size, instruction_count;
  int64_t most_inputs;  // of a matrix
  int64_t scores;       // for each warp: pixels, where there is attention
  bool logistic, own_biases, own_context;
  int64_t outputs, levels, features, context_plane, context_channels;
  float temperature, log_scale_min;
  const Plane* planes;
  const Instruction* instructions;
  const Matrix* matrices;
  const void* weights;
  const float *biases, *table, *uniforms, *context;
  const int64_t* given;
  const uint8_t* known;
  float *memory, *parameters;
  int64_t* values;  // -1: the network's outputs were not finite

  // Of shared memory in a block: windows, and the scores of an attention.
  int64_t shared_bytes(int threads) const {
    return (kColumns * most_inputs + (threads / 32) * scores) * int64_t{sizeof(float)} + 32;
  }
};

// shapes: of each matrix its rows, halves, taps, and channels of a tap.
inline std::vector<Matrix> matrices_of(const std::vector<int64_t>& shapes, int threads) {
  std::vector<Matrix> matrices;
  int64_t at = 0;
  const int64_t slice = threads / kSplit;
  for (size_t i = 0; i < shapes.size(); i += kMatrixInts) {
    const int64_t rows = stored_rows(shapes[i], shapes[i + 1]);
    const int64_t inputs = shapes[i + 2] * ((shapes[i + 3] + kChannelBlock - 1) / kChannelBlock * kChannelBlock);
    const int64_t padded = (inputs + kStep - 1) / kStep * kStep;
    matrices.push_back({rows, padded, at});
    at += (rows + slice - 1) / slice * slice * padded;
  }
  matrices.push_back({0, 0, at});  // the end
  return matrices;
}

// put(place, weight) for each weight; weights: (rows, taps, channels) each.
template <class F>
void pack(const std::vector<const float*>& weights, const std::vector<int64_t>& shapes, int threads, F&& put) {
  const std::vector<Matrix> matrices = matrices_of(shapes, threads);
  const int64_t slice = threads / kSplit;
  for (size_t m = 0; m < weights.size(); ++m) {
    const int64_t *shape = shapes.data() + m * kMatrixInts, rows = shape[0], taps = shape[2], channels = shape[3];
    const int64_t padded = (channels + kChannelBlock - 1) / kChannelBlock * kChannelBlock;
    for (int64_t r = 0; r < matrices[m].rows; ++r) {
      const int64_t row = stored_row(r, rows, shape[1]);
      for (int64_t k = 0; row >= 0 && k < taps * padded; ++k) {
        if (k % padded >= channels) continue;
        const int64_t step = r / slice * (matrices[m].inputs / kStep) + k / kStep;
        const int64_t place = ((step * slice + r % slice) * kSplit + k % kStep / kGroup) * kGroup + k % kGroup;
        put(matrices[m].at + place, weights[m][(row * taps + k / padded) * channels + k % padded]);
      }
    }
  }
}

// What pixelcnn_generate.cu does for pixelcnn_generate.cpp. Errors: of the CUDA runtime.
int active(const Job& job, bool bf16);                // clusters that the current device holds at once
int launch(const Job& job, bool bf16, void* stream);  // returns an error, or 0

}  // namespace fastgen::pixelcnn
