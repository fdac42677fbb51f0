// One call of pixelcnn_generate on a GPU: host code, without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../pixel_layout.h"
#include "tiles.h"

namespace fastgen::pixelcnn {

constexpr int kThreads = 256;     // of a block
constexpr int kMostColumns = 16;  // vectors that share each weight that is read

enum class Kind { kConv, kGate, kGlu, kRelu, kElu, kAdd, kAttention, kRemember, kSample };

struct Plane {
  int64_t channels, halves, rows, row_size, start, step, offset;
};

// What the fields mean depends on the kind: see fastgen/ops/pixel_program.py.
struct Instruction {
  int64_t kind, per_pixel, dst, src, other, matrix, bias, dy, dx, extra;
  int64_t then;  // the kind of an activation of the convolution's result, or -1
};

struct Matrix {
  int64_t rows, inputs, at, pairs;  // stored rows; the first weight; whether the rows are a gate's halves

  FASTGEN_HOST_DEVICE Tiles tiles() const { return {pairs ? rows / 2 : rows, inputs, pairs != 0}; }
};
// The stored row of a unit of a pair's first half; that of its second is kChannelBlock further.
FASTGEN_HOST_DEVICE inline int64_t row_of_pair(int64_t unit) {
  return unit / kChannelBlock * 2 * kChannelBlock + unit % kChannelBlock;
}

struct Job {
  int cluster, images_each;  // blocks that draw the same images, and how many
  int64_t images, colors, height, width, first_row, last_row, memory_size, bias_size;
  int64_t plane_count, instruction_count, matrix_count;
  int64_t most_inputs;  // of a matrix, padded
  int64_t scores;       // for each warp: pixels, where there is attention
  bool spilled;         // the scores lie in global memory, at `scratch`
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
  float *memory, *parameters, *scratch;
  int64_t* values;  // -1: the network's outputs were not finite

  // Of shared memory in a block: the program, windows, parts of sums, and the scores of an attention.
  int64_t shared_bytes(int64_t columns, int threads) const {
    const int64_t program = round_up(plane_count * sizeof(Plane), 16) +
                            round_up(instruction_count * sizeof(Instruction), 16) +
                            round_up(matrix_count * sizeof(Matrix), 16);
    return program + round_up(columns * most_inputs * 4, 16) + columns / 4 * 2 * threads * 4 +
           (spilled ? 0 : round_up(scores_of_block(threads) * 4, 16));
  }
  FASTGEN_HOST_DEVICE int64_t scores_of_block(int threads) const { return (threads / 32) * scores; }
};

// shapes: of each matrix its rows, halves, taps, and channels of a tap.
inline std::vector<Matrix> matrices_of(const std::vector<int64_t>& shapes) {
  std::vector<Matrix> matrices;
  int64_t at = 0;
  for (size_t i = 0; i < shapes.size(); i += kMatrixInts) {
    const int64_t rows = stored_rows(shapes[i], shapes[i + 1]);
    matrices.push_back({rows, shapes[i + 2] * round_up(shapes[i + 3], kChannelBlock), at, shapes[i + 1] == 2});
    at += matrices.back().tiles().size();
  }
  matrices.push_back({0, 0, at, 0});  // the end
  return matrices;
}

// The instructions (kInstructionInts numbers each), of which an activation is part of the convolution before it where
// nothing else reads what that gives, and its result does not lie where the convolution still reads: one meeting of the
// blocks less.
inline std::vector<Instruction> fused(const std::vector<int64_t>& numbers, const std::vector<Matrix>& matrices,
                                      const std::vector<int64_t>& plane_numbers) {
  const auto* planes = reinterpret_cast<const Plane*>(plane_numbers.data());
  const auto apart = [&](int64_t a, int64_t b) {  // in memory
    return b < 0 || planes[a].offset + planes[a].rows * planes[a].row_size <= planes[b].offset ||
           planes[b].offset + planes[b].rows * planes[b].row_size <= planes[a].offset;
  };
  std::vector<Instruction> all;
  for (size_t i = 0; i < numbers.size(); i += kInstructionInts) {
    const int64_t* n = numbers.data() + i;
    all.push_back({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], -1});
  }
  std::vector<Instruction> kept;
  for (size_t i = 0; i < all.size(); ++i) {
    kept.push_back(all[i]);
    if (i + 1 == all.size() || static_cast<Kind>(all[i].kind) != Kind::kConv) continue;
    const Instruction& next = all[i + 1];
    const Kind kind = static_cast<Kind>(next.kind);
    const bool of_pairs = kind == Kind::kGate || kind == Kind::kGlu, of_one = kind == Kind::kRelu || kind == Kind::kElu;
    bool joins = next.src == all[i].dst && next.per_pixel == all[i].per_pixel &&
                 (matrices[all[i].matrix].pairs ? of_pairs : of_one) && apart(next.dst, all[i].src) &&
                 apart(next.dst, all[i].other);
    for (size_t j = 0; j < all.size(); ++j)
      if (j != i && j != i + 1 && (j > i || all[j].dst != all[i].dst))  // the first parts of a sum are read by the next
        joins = joins && all[j].src != all[i].dst && all[j].other != all[i].dst;
    if (!joins) continue;
    kept.back().then = next.kind;
    kept.back().dst = next.dst;
    ++i;
  }
  return kept;
}

inline int64_t most_inputs_of(const std::vector<Matrix>& matrices) {
  int64_t most = 0;
  for (const Matrix& m : matrices) most = std::max(most, m.tiles().padded());
  return most;
}

// Where the weight of a stored row and an input lies in a matrix.
inline int64_t place(const Matrix& m, int64_t row, int64_t input) {
  if (!m.pairs) return m.tiles().at(row, 0, input);
  const int64_t unit = row / (2 * kChannelBlock) * kChannelBlock + row % kChannelBlock;
  return m.tiles().at(unit, row / kChannelBlock % 2, input);
}

// weights: (rows, taps, channels) each; out: zeros.
template <class W>
void pack(const std::vector<const float*>& weights, const std::vector<int64_t>& shapes, W* out) {
  const std::vector<Matrix> matrices = matrices_of(shapes);
  for (size_t m = 0; m < weights.size(); ++m) {
    const int64_t *shape = shapes.data() + m * kMatrixInts, rows = shape[0], taps = shape[2], channels = shape[3];
    const int64_t padded = round_up(channels, kChannelBlock);
    for (int64_t r = 0; r < matrices[m].rows; ++r) {
      const int64_t row = stored_row(r, rows, shape[1]);
      for (int64_t tap = 0; row >= 0 && tap < taps; ++tap)
        for (int64_t c = 0; c < channels; ++c)
          convert(weights[m][(row * taps + tap) * channels + c],
                  out + matrices[m].at + place(matrices[m], r, tap * padded + c));
    }
  }
}

// What pixelcnn_generate.cu does for pixelcnn_generate.cpp. Errors: of the CUDA runtime.
// columns: 4 or kMostColumns.
int active(const Job& job, int columns, bool bf16);                // clusters that the current device holds at once
int launch(const Job& job, int columns, bool bf16, void* stream);  // returns an error, or 0

}  // namespace fastgen::pixelcnn
