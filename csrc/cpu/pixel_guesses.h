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

// Whether a pixel may be computed before the one to its left is known, from a guess of its values: not where an
// instruction reads at the left what a later one writes there.
inline bool takes_guesses(const std::vector<Instruction>& instructions) {
  std::vector<int64_t> left;  // planes that have been read there, and not been written
  for (const Instruction& i : instructions) {
    if (i.phase != Phase::kPixel || i.kind == Kind::kSample) continue;
    if (i.kind == Kind::kAttention && !i.matrix) return false;  // of what is remembered once values are drawn
    const bool conv = i.kind == Kind::kConv && i.dy == 0 && i.dx < 0;
    if (std::ranges::count(left, i.dst) || (i.kind == Kind::kLstm && std::ranges::count(left, i.other))) return false;
    if (conv || i.kind == Kind::kPrevious) left.push_back(i.src);
    if (i.kind == Kind::kLstm && i.dx < 0) left.push_back(i.other);  // it writes there itself, pixel after pixel
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
  static constexpr double kKept = 0.9;   // of what was seen before, each time
  static constexpr double kShare = 0.2;  // of the time for one pixel that a further one adds
  double right_ = 0, all_ = 0;
};

}  // namespace
}  // namespace fastgen
