// Several pixels of a row at once, where few images are drawn: for them reading the weights, and waiting for each
// other, takes two threads longer than the multiply-adds do.
//
// The pixels to the left of which not all is known are computed from guesses of it. A guess is what the pixel's own
// uniform draws from a distribution that is at hand; where it is what comes out, the pixels behind it were computed
// from what is so, and all is as if one had been drawn after the other. Only the time depends on the guesses.
#pragma once

#include "pixel_program.h"

namespace fastgen {
namespace {

constexpr int64_t kAhead = 8;  // pixels of an image that are computed at once, at most

// Moves what runs once a pixel's values are drawn, for an attention to remember, to where the next pixel attends to it,
// which may be before they are. -> What a row's last pixel, which has no next one, runs itself; nothing where it cannot
// be moved.
inline std::vector<Instruction> run_late(std::vector<Instruction>& instructions, const std::vector<Plane>& planes) {
  const auto all_rows = [&](int64_t plane) { return plane < 0 || planes[plane].row_size > 0; };
  size_t drawn = 0;
  for (size_t i = 0; i < instructions.size(); ++i)
    if (instructions[i].kind == Kind::kSample) drawn = i + 1;
  std::vector<Instruction> last(instructions.begin() + drawn, instructions.end()), moved;
  std::vector<int64_t> made;
  for (Instruction& i : last) {
    if (i.phase != Phase::kPixel) return {};
    i.late = true;
    for (int64_t plane : {i.src, i.other})
      if (!all_rows(plane) && !std::ranges::count(made, plane)) return {};
    made.push_back(i.dst);
  }
  for (size_t i = 0; i < drawn; ++i) {
    if (instructions[i].kind == Kind::kAttention && !instructions[i].matrix) {
      const auto remembers = [&](const Instruction& r) {
        return r.kind == Kind::kRemember && r.extra == instructions[i].extra;
      };
      auto begin = last.begin();
      for (auto at = last.begin(); at != last.end(); ++at) {
        if (remembers(*at)) moved.insert(moved.end(), begin, at + 1);
        if (at->kind == Kind::kRemember) begin = at + 1;
      }
    }
    moved.push_back(instructions[i]);
  }
  if (moved.size() != instructions.size()) return {};
  instructions = moved;
  return last;
}

// Whether a pixel may be computed before the one to its left is known, from a guess of its values: not where an
// instruction reads at the left what a later one writes there.
inline bool takes_guesses(const std::vector<Instruction>& instructions, const std::vector<Plane>& planes) {
  if (instructions.back().kind != Kind::kSample) return false;  // something wants values that are drawn
  std::vector<int64_t> left;                                    // planes that have been read there
  for (const Instruction& i : instructions) {
    if (i.phase != Phase::kPixel || i.kind == Kind::kSample) continue;
    if (std::ranges::count(left, i.dst) || (i.kind == Kind::kLstm && std::ranges::count(left, i.other))) return false;
    if ((i.kind == Kind::kConv && i.dy == 0 && i.dx < 0) || i.kind == Kind::kPrevious) left.push_back(i.src);
    if (i.kind == Kind::kLstm && i.dx < 0) left.push_back(i.other);  // it writes there itself, pixel after pixel
    for (int64_t plane : {i.src, i.other})
      if (i.late && plane >= 0 && planes[plane].row_size > 0) left.push_back(plane);
  }
  return true;
}

// How often guesses are right, of late, and how many pixels are best computed at once.
class GuessRate {
 public:
  void saw(int64_t right, int64_t all) {
    right_ = right_ * kKept + static_cast<double>(right), all_ = all_ * kKept + static_cast<double>(all);
  }
  // Of each of `images`: the most values in the time that it takes.
  int64_t pixels_at_once(int64_t images, int64_t most) const {
    const double rate = right_ / (all_ + 1);
    double best = 0, values = 0, still = 1;
    int64_t count = 1;
    for (int64_t n = 1; n <= most; ++n, still *= rate) {
      values += still;
      const double value = values / (1 + kShare * static_cast<double>(images * n - 1));
      if (value > best) best = value, count = n;
    }
    return count;
  }

 private:
  static constexpr double kKept = 0.9;    // of what was seen before, each time
  static constexpr double kShare = 0.35;  // of the time for one pixel that a further one adds
  double right_ = 0, all_ = 0;
};

}  // namespace
}  // namespace fastgen
