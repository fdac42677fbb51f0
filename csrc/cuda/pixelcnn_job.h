// One call of pixelcnn_generate on a GPU: host code, without CUDA.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../pixel_layout.h"
#include "../truncation.h"
#include "tiles.h"

namespace fastgen::pixelcnn {

constexpr int kRowThreads = 256, kPixelThreads = 384;  // of a block
constexpr int kLargestCluster = 16;
constexpr int kShare = 4;  // images that a warp multiplies at once, for one pixel, or up to kMostShare times as many
constexpr int kMostShare = 2;
constexpr int kTaskBytes = 128;

enum class Phase { kRow, kBack, kPixel };
enum class Kind {
  kConv,
  kGate,
  kGlu,
  kRelu,
  kElu,
  kAdd,
  kAttention,
  kRemember,
  kSample,
  kGelu,
  kNorm,
  kPrevious,
  kLstm
};

struct Plane {
  int64_t channels, halves, rows, row_size, start, step, offset;
  int64_t slot;  // where the current pixel's vector lies in shared memory, or -1: in numbers of an image
  int64_t kept;  // whether another kernel reads it, or the next row: it lies in global memory too

  FASTGEN_HOST_DEVICE int64_t length() const { return round_up(channels, kTileInputs); }  // of that vector
};

// What the fields mean depends on the kind: see fastgen/ops/pixel_program.py.
struct Instruction {
  int64_t kind, phase, dst, src, other, matrix, bias, dy, dx, extra;
  int64_t then;  // the kind of an activation of the convolution's result, or -1
  int64_t weights,
      old;  // where a block keeps its tiles, -1 in global memory; and sums of earlier pixels for later ones

  bool is(Kind k) const { return static_cast<Kind>(kind) == k; }
  bool in(Phase p) const { return static_cast<Phase>(phase) == p; }
  // Where an LSTM's cell comes from the pixel before, it is in shared memory.
  FASTGEN_HOST_DEVICE bool cell_beside() const { return static_cast<Kind>(kind) == Kind::kLstm && dx != 0; }
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
  int cluster, images_each;     // blocks that draw the same images, and how many: pixel by pixel,
  int row_cluster, row_images;  // and what is above a row
  int columns;                  // pixels of a row that a block multiplies at once: 16 or 64
  int64_t images, colors, height, width, memory_size, bias_size;
  int64_t y;  // the row to draw
  int64_t plane_count, matrix_count;
  int64_t row_count;    // instructions for whole rows, which come first
  int64_t begin, end;   // those that run pixel by pixel
  int64_t most_inputs;  // of a matrix, padded
  int64_t slots;        // numbers of an image in shared memory
  int64_t weights;      // that a block has in shared memory
  int64_t old;          // tiles of sums that it keeps from pixel to pixel
  int64_t scores;       // for each warp: pixels, where there is attention
  bool far;             // those sums lie in global memory, at `scratch`
  bool spilled;         // the scores lie in global memory, at `scratch`
  bool meets;           // after each pixel all blocks wait for each other
  bool back;            // from right to left
  bool logistic, own_biases, own_context;
  int64_t outputs, levels, features, context_plane, context_channels;
  float temperature, log_scale_min;
  Truncation kept;
  const Plane* planes;
  const Instruction* instructions;
  const Matrix* matrices;
  const void* weights_at;
  const float *biases, *table, *uniforms, *context;
  const int64_t* given;
  const uint8_t* known;
  float *memory, *parameters, *scratch;
  int64_t* values;  // -1: the network's outputs were not finite

  FASTGEN_HOST_DEVICE int64_t room() const {  // for images, in whole shares
    const int64_t images = images_each;
    return round_up(images, images > kShare ? kMostShare * kShare : kShare);
  }
  FASTGEN_HOST_DEVICE int64_t old_floats() const { return old * room() * kTileRows; }
  FASTGEN_HOST_DEVICE int64_t scores_of_block(int threads) const { return (threads / 32) * scores; }
  FASTGEN_HOST_DEVICE int64_t outputs_of_block(int threads) const {
    return outputs > 1 ? threads / 32 * outputs : threads;
  }
  FASTGEN_HOST_DEVICE int64_t scratch_floats(int threads) const {  // of a block
    return (far ? old_floats() : 0) + (spilled ? scores_of_block(threads) : 0);
  }
  // Of shared memory, for all arrays that a block takes.
  int64_t program_bytes(int64_t instructions) const {
    return round_up(plane_count * sizeof(Plane), 16) + round_up(instructions * sizeof(Instruction), 16) +
           round_up(matrix_count * sizeof(Matrix), 16);
  }
  int64_t row_bytes(int threads) const {
    return program_bytes(row_count) + columns * (most_inputs * 4 + 16) + columns / 4 * 2 * threads * 4;
  }
  int64_t pixel_bytes(int threads, int weight_bytes) const {
    const int64_t instructions = end - begin;
    return program_bytes(instructions) + 32 + round_up(instructions * kTaskBytes, 16) + round_up(cluster * 8, 16) +
           round_up(weights * weight_bytes, 16) + (far ? 0 : round_up(old_floats() * 4, 16)) +
           round_up(room() * slots * 4, 16) + round_up(outputs_of_block(threads) * 4, 16) +
           (spilled ? 0 : round_up(scores_of_block(threads) * 4, 16));
  }
};

// shapes: of each matrix its rows, halves, taps, and channels of a tap.
inline std::vector<Matrix> matrices_of(const std::vector<int64_t>& shapes) {
  std::vector<Matrix> matrices = {};
  int64_t at = 0;
  for (size_t i = 0; i < shapes.size(); i += kMatrixInts) {
    const int64_t rows = stored_rows(shapes[i], shapes[i + 1]);
    matrices.push_back({rows, shapes[i + 2] * round_up(shapes[i + 3], kTileInputs), at, shapes[i + 1] == 2});
    at += matrices.back().tiles().size();
  }
  matrices.push_back({0, 0, at, 0});  // the end
  return matrices;
}

// The instructions (kInstructionInts numbers each), of which an activation is part of the convolution before it where
// nothing else reads what that gives, and its result does not lie where the convolution still reads: one meeting of the
// blocks less.
inline std::vector<Instruction> fused(const std::vector<int64_t>& numbers, const std::vector<Matrix>& matrices,
                                      const std::vector<Plane>& planes) {
  const auto apart = [&](int64_t a, int64_t b) {  // in memory
    return b < 0 || planes[a].offset + planes[a].rows * planes[a].row_size <= planes[b].offset ||
           planes[b].offset + planes[b].rows * planes[b].row_size <= planes[a].offset;
  };
  std::vector<Instruction> all;
  for (size_t i = 0; i < numbers.size(); i += kInstructionInts) {
    const int64_t* n = numbers.data() + i;
    all.push_back({n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], -1, 0, 0});
  }
  std::vector<Instruction> kept;
  for (size_t i = 0; i < all.size(); ++i) {
    kept.push_back(all[i]);
    if (i + 1 == all.size() || static_cast<Kind>(all[i].kind) != Kind::kConv) continue;
    const Instruction& next = all[i + 1];
    const Kind kind = static_cast<Kind>(next.kind);
    const bool of_pairs = kind == Kind::kGate || kind == Kind::kGlu, of_one = kind == Kind::kRelu || kind == Kind::kElu;
    bool joins = next.src == all[i].dst && next.phase == all[i].phase &&
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

// What the blocks of a cluster run: one of the phases that go from pixel to pixel, and what is above a row.
struct Program {
  Phase phase;
  std::vector<Plane> planes = {};
  std::vector<Matrix> matrices = {};
  std::vector<Instruction> instructions = {};  // by their phases
  int64_t row_count = 0, begin = 0, end = 0, most_inputs = 0, slots = 0, outputs = 0;
  bool meets = false, fits = true;
};

// Gives the planes that are made pixel by pixel their places in shared memory. A convolution's result goes to all
// blocks, in one message: a stage. A block sends what a stage gives when all of the stage before has come. Then another
// block may still read what it needed two stages before: so a place is free for others from kApart stages after its
// last use on. Pixels follow each other without a pause, hence the stages of the next pixel count too; where they are
// too few, all blocks meet after each pixel.
inline void place_planes(Program* program) {
  constexpr int64_t kApart = 3;
  struct Life {
    int64_t from = -1, to = -1;
    bool sent = false, waits = false;  // by another block; for the next pixel
  };
  std::vector<Life> lives(program->planes.size());
  std::vector<int64_t> order;
  int64_t stage = 0;
  for (const Instruction& i : program->instructions) {
    if (!i.in(program->phase)) continue;
    if (i.dst >= 0) program->planes[i.dst].slot = 0;
    if (i.cell_beside()) program->planes[i.other].slot = 0;
  }
  for (const Instruction& i : program->instructions) {
    for (const int64_t plane : {i.src, i.other}) {
      if (plane < 0 || program->planes[plane].slot < 0) continue;
      if (!i.in(program->phase) || i.is(Kind::kPrevious)) program->planes[plane].kept = 1;
      if (!i.in(program->phase)) continue;
      Life& life = lives[plane];
      if (life.from < 0) {
        order.push_back(plane);
        life = {stage, stage, false, true};
      }
      life.to = stage;
    }
    if (!i.in(program->phase)) continue;
    const bool sends = i.is(Kind::kConv);
    if (i.dst >= 0) {
      Life& life = lives[i.dst];
      if (life.from < 0) {
        order.push_back(i.dst);
        life = {stage, stage, sends, false};
      } else if (life.waits && sends) {
        program->fits = false;  // another block may have had it still to read
      }
      life.to = std::max(life.to, stage);
    }
    stage += sends;
  }
  struct Slot {
    int64_t at, length, from, to;
  };
  std::vector<Slot> slots;
  for (const int64_t plane : order) {
    const Life& life = lives[plane];
    Plane& p = program->planes[plane];
    program->meets |= life.sent && life.to + kApart > stage + life.from;
    Slot* place = nullptr;
    for (Slot& slot : slots)
      if (!place && !life.waits && slot.length == p.length() && slot.to + kApart <= life.from &&
          life.to + kApart <= stage + slot.from)
        place = &slot;
    if (!place) {
      slots.push_back({program->slots, p.length(), life.from, life.to});
      place = &slots.back();
      program->slots += p.length();
    }
    p.slot = place->at;
    place->to = life.waits ? 2 * stage + kApart : life.to;
  }
}

// phase: kPixel, or kBack for what runs before it from right to left.
inline Program program_of(const std::vector<int64_t>& planes, const std::vector<int64_t>& instructions,
                          const std::vector<int64_t>& shapes, int64_t outputs, Phase phase = Phase::kPixel) {
  Program program{phase};
  program.outputs = outputs;
  for (size_t i = 0; i < planes.size(); i += kPlaneInts) {
    const int64_t* n = planes.data() + i;
    program.planes.push_back({n[0], n[1], n[2], n[3], n[4], n[5], n[6], -1, 0});
  }
  program.matrices = matrices_of(shapes);
  program.instructions = fused(instructions, program.matrices, program.planes);
  std::ranges::stable_sort(program.instructions, {}, &Instruction::phase);
  for (const Instruction& i : program.instructions) {
    program.begin += i.phase < static_cast<int64_t>(phase);
    program.end += i.phase <= static_cast<int64_t>(phase);
    if (!i.in(Phase::kRow)) continue;
    ++program.row_count;
    if (i.matrix >= 0) program.most_inputs = std::max(program.most_inputs, program.matrices[i.matrix].tiles().padded());
  }
  place_planes(&program);
  return program;
}

// What a job takes of a program, for clusters of so many blocks.
inline void use(Program* program, int cluster, Job* job) {
  job->cluster = cluster;
  job->plane_count = static_cast<int64_t>(program->planes.size());
  job->matrix_count = static_cast<int64_t>(program->matrices.size());
  job->row_count = program->row_count;
  job->begin = program->begin;
  job->end = program->end;
  job->back = program->phase == Phase::kBack;
  job->most_inputs = program->most_inputs;
  job->slots = program->slots;
  job->outputs = program->outputs;
  job->meets = program->meets;
  job->weights = job->old = 0;
  for (Instruction& i : program->instructions) {
    if (!i.in(program->phase) || !i.is(Kind::kConv)) continue;
    const int64_t tiles = program->matrices[i.matrix].tiles().count(), own = (tiles + cluster - 1) / cluster;
    i.weights = -1;
    i.old = job->old;
    job->old += own * (i.extra - 1);
  }
}

// Gives weights the shared memory that is left.
inline void keep_weights(Program* program, int64_t shared_bytes, int threads, int weight_bytes, Job* job) {
  for (Instruction& i : program->instructions) {
    if (!i.in(program->phase) || !i.is(Kind::kConv)) continue;
    const Tiles tiles = program->matrices[i.matrix].tiles();
    const int64_t before = job->weights;
    job->weights += (tiles.count() + job->cluster - 1) / job->cluster * tiles.padded() * kTileRows;
    if (job->pixel_bytes(threads, weight_bytes) <= shared_bytes)
      i.weights = before;
    else
      job->weights = before;
  }
}

// Where the weight of a stored row and an input lies in a matrix. Tensor cores take eight numbers of a lane at once: of
// four inputs, two by two, in a tile's first half and its second.
inline int64_t place(const Matrix& m, int64_t row, int64_t input, bool bf16) {
  const int64_t unit = m.pairs ? row / (2 * kChannelBlock) * kChannelBlock + row % kChannelBlock : row;
  const int64_t at = m.tiles().at(unit, m.pairs ? row / kChannelBlock % 2 : 0, input);
  if (!bf16) return at;
  constexpr int64_t kHalf = 32 * kGroup;
  const int64_t half = at / kHalf % 2, lane = at / kGroup % 32, k = at % kGroup;
  return at / (2 * kHalf) * 2 * kHalf + k / 4 * kHalf + lane * kGroup + k % 4 / 2 * 4 + half * 2 + k % 2;
}

// weights: (rows, taps, channels) each; out: zeros.
template <class W>
void pack(const std::vector<const float*>& weights, const std::vector<int64_t>& shapes, W* out) {
  const std::vector<Matrix> matrices = matrices_of(shapes);
  for (size_t m = 0; m < weights.size(); ++m) {
    const int64_t *shape = shapes.data() + m * kMatrixInts, rows = shape[0], taps = shape[2], channels = shape[3];
    const int64_t padded = round_up(channels, kTileInputs);
    for (int64_t r = 0; r < matrices[m].rows; ++r) {
      const int64_t row = stored_row(r, rows, shape[1]);
      for (int64_t tap = 0; row >= 0 && tap < taps; ++tap)
        for (int64_t c = 0; c < channels; ++c)
          convert(weights[m][(row * taps + tap) * channels + c],
                  out + matrices[m].at + place(matrices[m], r, tap * padded + c, sizeof(W) == 2));
    }
  }
}

// What pixelcnn_generate.cu does for pixelcnn_generate.cpp. Errors: of the CUDA runtime.
int active(const Job& job, bool bf16, bool rows);                // clusters that the current device holds at once
int launch(const Job& job, bool bf16, bool rows, void* stream);  // draws part of row job.y; returns an error, or 0

// Chooses how many blocks draw how many images together, and what lies in shared memory: as few images as leave no
// cluster waiting for another, where that many fit. The largest cluster reads the least; but where images are many
// their vectors cost more on their way to all blocks. -> whether any fit.
inline bool arrange(Program* program, int largest, int64_t shared_bytes, bool bf16, Job* job) {
  constexpr int64_t kFew = 8, kCrowd = 16, kSmall = 4;
  const int weight_bytes = bf16 ? 2 : 4;
  const auto fits = [&](int64_t images) {
    job->images_each = static_cast<int>(images);
    return job->pixel_bytes(kPixelThreads, weight_bytes) <= shared_bytes;
  };
  const auto tried = [&](bool far) {
    job->far = far;
    const int64_t clusters = fits(1) ? active(*job, bf16, false) : 0;
    if (clusters == 0) return false;
    const int64_t wanted = (job->images + clusters - 1) / clusters;
    int64_t most = 1;
    while (most < wanted && fits(most + 1)) ++most;
    fits(most);
    return far || most >= std::min(wanted, kFew);
  };
  if (!program->fits) return false;
  int cluster = largest;
  for (; cluster > 0; cluster /= 2) {
    use(program, cluster, job);
    job->spilled = job->scores_of_block(kPixelThreads) * 16 > shared_bytes;
    if ((tried(false) || tried(true)) && (job->images_each <= kCrowd || cluster <= kSmall)) break;
  }
  if (cluster > 0) keep_weights(program, shared_bytes, kPixelThreads, weight_bytes, job);
  job->columns = bf16 ? 64 : 16;
  if (job->row_bytes(kRowThreads) > shared_bytes) job->columns = 16;
  if (cluster == 0 || job->row_bytes(kRowThreads) > shared_bytes) return false;
  // as many blocks for an image as leave none waiting, down to one for some images
  int64_t clusters = 0;
  for (job->row_cluster = largest;; job->row_cluster /= 2) {
    clusters = active(*job, bf16, true);
    if (job->row_cluster == 1 || clusters >= job->images) break;
  }
  job->row_images = static_cast<int>((job->images + clusters - 1) / std::max(clusters, int64_t{1}));
  return clusters > 0;
}

}  // namespace fastgen::pixelcnn
