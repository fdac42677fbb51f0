// Which classes of a categorical distribution are drawn from: the most probable ones.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastgen {

// Of the `top_k` most probable classes, or of all, the fewest whose probabilities reach `top_p` of theirs; and whatever
// is as probable as the last of them.
struct Truncation {
  int64_t top_k = 0;  // 0: all
  float top_p = 1;

  FASTGEN_HOST_DEVICE bool any() const { return top_k > 0 || top_p < 1; }
};

// The largest t for which what reaches t comes to at least `wanted`; of(t) does not grow with t. Floats above zero have
// the order of their bits.
template <class Of>
FASTGEN_HOST_DEVICE inline float largest_reaching(float wanted, Of&& of) {
  uint32_t low = 0x00800000, high = 0x40000000;  // the least normal float, and 2
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (of(__builtin_bit_cast(float, middle)) >= wanted ? low : high) = middle;
  }
  return __builtin_bit_cast(float, low);
}

// The weight of the least probable class that is kept, of weights in proportion to the probabilities, the greatest 1.
// count(t), sum(t): how many weights reach t, and their sum.
template <class Count, class Sum>
FASTGEN_HOST_DEVICE inline float least_kept(const Truncation& kept, Count&& count, Sum&& sum) {
  const float least = kept.top_k > 0 ? largest_reaching(static_cast<float>(kept.top_k), count) : 0;
  return kept.top_p < 1 ? largest_reaching(kept.top_p * sum(least), sum) : least;
}

}  // namespace fastgen
