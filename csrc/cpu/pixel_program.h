// Sampling an image pixel by pixel, for any model that is a program over planes (fastgen/ops/pixel_program.py).
//
// A plane holds a vector of channels for each pixel, as many rows back as convolutions look. Instructions of the row
// phase run once for a whole row, before its first pixel: what they read lies above, or was made from what lies above.
// Those of the pixel phase run for each pixel in turn; they read the row phase's results and the pixels to the left. So
// each multiply-add of the network is done once for each pixel, most of them in large products. Between the two a back
// phase may go through the pixels from right to left, from the second row on.
//
// Images are divided over threads, which never wait for each other. Where there are too few, pairs of threads draw the
// same: each computes half the channels of every plane, so that each core's cache holds half the weights, and the two
// meet before an instruction that reads all channels.
#pragma once

#include "../pixel_layout.h"
#include "../processor.h"
#include "packed_product.h"
#include "partner.h"
#include "sampling.h"

namespace fastgen {
namespace {

enum class Kind {
  kConv = 0,
  kGate = 1,
  kGlu = 2,
  kRelu = 3,
  kElu = 4,
  kAdd = 5,
  kAttention = 6,
  kRemember = 7,
  kSample = 8,
  kGelu = 9,
  kNorm = 10,
  kPrevious = 11,
  kLstm = 12
};
enum class Phase { kRow = 0, kBack = 1, kPixel = 2 };

// Where two threads that share a plane's channels divide them: the same channels of both halves go together.
inline int64_t middle_of(int64_t channels, int64_t halves) {
  return halves * round_up(channels / halves / 2, kChannelBlock);
}

// Planes that nothing reads at another pixel have no rows (row_size is 0), but room for kAhead pixels.
struct Plane {
  int64_t channels, halves;  // padded channels; of a gate's two halves, or an LSTM's four gates, blocks alternate
  int64_t rows, row_size, start, step, offset;

  int64_t middle() const { return middle_of(channels, halves); }
  float* at(float* image, int64_t y, int64_t x) const {
    return image + offset + ((y % rows) + rows) % rows * row_size + start + x * step;
  }
};

// What the fields mean depends on the kind: see fastgen/ops/pixel_program.py.
struct Instruction {
  Kind kind;
  Phase phase;
  int64_t dst, src, other, matrix, bias, dy, dx, extra;
  bool meet;  // before it, where two threads share the channels
  bool late;  // for the pixel before
};

// A matrix in two parts of its rows, one for each of two threads.
template <class W>
struct SplitMatrix {
  PackedMatrix<W> part[2];
  int64_t first[2];
};

// The matrices of a program in one buffer. With data == nullptr it only measures. Each is described by its rows,
// halves, taps, and channels of a tap.
template <class W>
struct PackedProgram {
  std::vector<SplitMatrix<W>> matrices;
  int64_t bytes = 0;

  PackedProgram(const std::vector<int64_t>& shapes, const uint8_t* data) {
    for (size_t i = 0; i < shapes.size(); i += kMatrixInts) {
      const int64_t halves = shapes[i + 1], rows = stored_rows(shapes[i], halves);
      const int64_t k = shapes[i + 2] * round_up(shapes[i + 3], kChannelBlock);
      SplitMatrix<W> matrix;
      matrix.first[0] = 0;
      matrix.first[1] = middle_of(rows, halves);
      for (int p = 0; p < 2; ++p) {
        const int64_t end = p == 0 ? matrix.first[1] : rows;
        matrix.part[p] = {static_cast<int>(end - matrix.first[p]), static_cast<int>(k),
                          reinterpret_cast<const W*>(data ? data + bytes : nullptr)};
        bytes = round_up(bytes + matrix.part[p].bytes(), 64);
      }
      matrices.push_back(matrix);
    }
    for (SplitMatrix<W>& matrix : matrices)
      for (PackedMatrix<W>& part : matrix.part) part.far = bytes > shared_cache_bytes() / 2;
  }
};

template <class W>
void pack_program(const std::vector<Tensor>& weights, const std::vector<int64_t>& shapes, uint8_t* out) {
  const PackedProgram<W> program(shapes, out);
  share(static_cast<int64_t>(weights.size()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t rows = shapes[i * kMatrixInts], halves = shapes[i * kMatrixInts + 1];
      const int64_t taps = shapes[i * kMatrixInts + 2], channels = shapes[i * kMatrixInts + 3];
      const int64_t padded = round_up(channels, kChannelBlock);
      const auto* weight = static_cast<const float*>(weights[i].data_ptr());
      for (int p = 0; p < 2; ++p) {
        const PackedMatrix<W>& part = program.matrices[i].part[p];
        pack_matrix(part, const_cast<W*>(part.data), [&](int r, int k) {
          const int64_t row = stored_row(program.matrices[i].first[p] + r, rows, halves), c = k % padded;
          return row < 0 || c >= channels ? 0.0f : weight[(row * taps + k / padded) * channels + c];
        });
      }
    }
  });
}

// One call's arguments.
struct PixelJob {
  std::vector<Plane> planes;
  std::vector<Instruction> instructions, last;  // last: of the pixel phase, for a row's last pixel, once it is drawn
  int64_t images, colors, height, width, first_row, last_row, memory_size, bias_size;
  bool goes_back;  // some instruction is of the back phase
  int64_t ahead;   // pixels in a row that may be computed at once
  int64_t input;   // the plane of the values' features
  Distribution distribution;
  int64_t outputs, levels, features;
  float temperature, log_scale_min;
  Truncation kept;
  const float *biases, *table, *uniforms;
  bool own_biases;
  const float* context;
  bool own_context;
  int64_t context_plane, context_channels;
  const int64_t* given;
  const uint8_t* known;
  float *memory, *parameters;
  int64_t* values;
  std::atomic<bool>* not_finite;  // set where the network's outputs were not
};

// Where two threads must meet: before an instruction that reads all channels of what was written since they last met,
// or that overwrites what the other may still be reading, or what holds another plane, whose channels may be divided
// elsewhere. They also meet before a row's first instruction, and a pixel's.
inline void mark_meetings(std::vector<Instruction>& instructions, const std::vector<Plane>& planes) {
  const auto has = [](const std::vector<int64_t>& v, int64_t p) { return std::find(v.begin(), v.end(), p) != v.end(); };
  for (const Phase phase : {Phase::kRow, Phase::kBack, Phase::kPixel}) {
    std::vector<int64_t> written, across, read, used;  // across: by heads, not by channels
    for (Instruction& i : instructions) {
      if (i.phase != phase) continue;
      std::vector<int64_t> whole;
      if (i.kind == Kind::kConv || i.kind == Kind::kSample || i.kind == Kind::kAttention || i.kind == Kind::kNorm)
        whole = {i.src};
      if (i.kind == Kind::kRemember) whole = {i.src, i.other};
      i.meet = i.kind == Kind::kSample || has(read, i.dst) || (i.kind == Kind::kLstm && has(read, i.other)) ||
               has(across, i.src) || has(across, i.other);
      for (int64_t p : whole) i.meet = i.meet || has(written, p);
      for (int64_t p : used) i.meet = i.meet || (i.dst >= 0 && p != i.dst && planes[p].offset == planes[i.dst].offset);
      if (i.meet) written.clear(), across.clear(), read.clear(), used.clear();
      for (int64_t p : {i.dst, i.src, i.other})
        if (p >= 0) used.push_back(p);
      written.push_back(i.dst);
      if (i.kind == Kind::kLstm) written.push_back(i.other);
      if (i.kind == Kind::kAttention) across.push_back(i.dst);
      read.insert(read.end(), whole.begin(), whole.end());
    }
  }
}

}  // namespace
}  // namespace fastgen
