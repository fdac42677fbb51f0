// A codebook as the search reads it: the codes, measured from their mean, on a grid of 16-bit integers.
#pragma once

#include <limits>
#include <unordered_map>

#include "elements.h"

namespace fastgen {
namespace {

constexpr int kPanel = 2;  // vectors of codes in a panel
constexpr int kCodes = kPanel * kF;
template <class T>
constexpr T kUnit = std::numeric_limits<T>::epsilon() / 2;

constexpr float kNoDirection = 1e-30f;  // vectors no longer than this are zero to the cosine
constexpr int64_t kFewPairs = 8;        // of coordinates: vectors so short are scored by a kernel of their own

// Integer vectors are at most this long before rounding, so that no sum of products, nor one with the allowance for
// rounding on top, leaves 32 bits.
inline float reach(int64_t dim) {
  if ((dim + 1) / 2 <= kFewPairs) return 32767.0f;  // short of what would do, so that no coordinate can be too large
  return 46339.0f - std::sqrt(static_cast<float>(dim));
}
// ... and after rounding.
inline float reach_rounded(int64_t dim) { return reach(dim) + 0.5f * std::sqrt(static_cast<float>(dim)); }

// Vectors are padded with zeros to whole registers: `width` values each.
template <class T>
int64_t padded(int64_t dim) {
  return round_up(dim, kLanes<T>);
}

// sum (x a - c b)^2 in float64.
template <class T>
double exact_distance(const T* x, double a, const T* c, double b, int64_t width) {
  double sum = 0;
  for (int64_t k = 0; k < width; ++k) {
    const double d = x[k] * a - c[k] * b;
    sum += d * d;
  }
  return sum;
}
template <class T>
double exact_length(const T* x, int64_t width) {
  return std::sqrt(exact_distance(x, 1.0, x, 0.0, width));
}

// to = x - origin -> its squared length.
template <class T>
inline T subtract(const T* x, const T* origin, T* to, int64_t width) {
  Vec<T> squares{};
  for (int64_t k = 0; k < width; k += kLanes<T>) {
    const Vec<T> d = load(x + k) - load(origin + k);
    store(to + k, d);
    squares += d * d;
  }
  return sum_of_lanes<T>(squares);
}
// ... its length, also where small squares have vanished.
template <class T>
T length_of(const T* x, T squared, int64_t width) {
  return squared > T(1e-30) ? std::sqrt(squared) : static_cast<T>(exact_length(x, width));
}
template <class T>
inline T largest_magnitude(const T* x, int64_t width) {
  Vec<T> tops{};
  for (int64_t k = 0; k < width; k += kLanes<T>) tops = larger<T>(tops, larger<T>(load(x + k), -load(x + k)));
  return largest_lane<T>(tops);
}

// v * scale, rounded, as pairs of integers: to[i] holds coordinates 2 i and 2 i + 1.
// -> the squares, lane by lane, of what rounding took.
template <class T>
inline Vec<T> round_to_grid(const T* v, T scale, int64_t width, int32_t* to) {
  using Words = typename VectorOf<uint32_t, 4 * kLanes<T>>::type;
  using Twos = typename VectorOf<uint64_t, 4 * kLanes<T>>::type;
  using Pairs = typename VectorOf<int32_t, 2 * kLanes<T>>::type;
  constexpr T kShift = sizeof(T) == 4 ? T(12582912) : T(6755399441055744);  // 1.5 * 2^23 or 2^52: adding it rounds
  Vec<T> errors{};
  for (int64_t k = 0; k < width; k += kLanes<T>, to += kLanes<T> / 2) {
    const Vec<T> scaled = load(v + k) * scale, shifted = scaled + kShift;
    const Vec<T> lost = scaled - (shifted - kShift);
    errors += lost * lost;
    Words words;  // the integers are their low 16 bits
    if constexpr (sizeof(T) == 4)
      words = (Words)shifted;
    else
      words = __builtin_convertvector((Vec<uint64_t>)shifted, Words);
    const Twos twos = (Twos)words;
    const Pairs pairs = __builtin_convertvector((twos & 0xffffu) | (twos >> 16 & 0xffff0000u), Pairs);
    std::memcpy(to, &pairs, sizeof pairs);
  }
  return errors;
}
// A bound of the length of what it took.
template <class T>
float rounding_error(Vec<T> squares) {
  return static_cast<float>(std::sqrt(sum_of_lanes<T>(squares))) * (1 + 1e-3f);
}

// With R the largest length of a code, s and g the scales of a row and a code on the grid, and all lengths in units of
// R:
//   score = s (<x, c> - |c|^2 / 2) <= factor (sum of integer products + x's allowance) + slack + s offset
// where factor = 1 / g, and the allowances are the most that rounding can take away.
struct Panel {
  float factor[kCodes], slack[kCodes], offset[kCodes];
};
constexpr float kAbsent = -3e38f;  // slack of a code that cannot be chosen

template <class T>
struct Codes {
  int64_t count, dim, width, panels, pairs;
  std::vector<T> copy;  // of the codebook, where its type or width is another
  const T* rows;        // (count, width)
  bool cosine;
  std::vector<T> mean;          // subtracted from rows and codes; zero for cosine
  std::vector<T> inverse;       // 1 / |c| for cosine, else empty
  OwnVector<Panel> heads;       // [panel]
  OwnVector<int32_t> integers;  // [panel][pair of coordinates][code]
  T radius = 0;                 // R
  T most_scale = 1;             // keeps factors and s offset far from overflow
  int64_t first_bad = -1;       // a code with NaN, infinity, or a norm that overflows: it is never chosen
  bool empty = true;            // no code can be chosen

  template <class C>
  Codes(const C* codes, int64_t count_, int64_t dim_, bool cosine_)
      : count(count_),
        dim(dim_),
        width(padded<T>(dim_)),
        panels((count_ + kCodes - 1) / kCodes),
        pairs((dim_ + 1) / 2),
        cosine(cosine_),
        mean(width) {
    if constexpr (std::is_same_v<C, T>) rows = codes;
    if (!std::is_same_v<C, T> || width != dim) {
      copy.resize(count * width);
      for (int64_t i = 0; i < count; ++i) load_row(copy.data() + i * width, codes + i * dim, dim, width);
      rows = copy.data();
    }
    const std::vector<uint8_t> absent = find_absent();
    std::vector<double> sum(dim);
    double present = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (absent[i]) continue;
      ++present;
      for (int64_t k = 0; k < dim && !cosine; ++k) sum[k] += rows[i * width + k];
    }
    empty = present == 0;
    for (int64_t k = 0; k < dim && !empty; ++k) mean[k] = static_cast<T>(sum[k] / present);

    if (cosine) inverse.resize(count);
    std::vector<T> length(count);
    share(count, [&](int64_t begin, int64_t end) {
      std::vector<T> code(width);
      for (int64_t i = begin; i < end; ++i) {
        if (absent[i]) continue;
        const T squared = subtract(rows + i * width, mean.data(), code.data(), width);
        length[i] = length_of(code.data(), squared, width);
        if (!cosine) continue;
        inverse[i] = length[i] > kNoDirection ? 1 / length[i] : T(0);
        length[i] = length[i] > kNoDirection ? T(1) : T(0);
      }
    });
    for (const T l : length) radius = std::max(radius, l);
    most_scale = radius > 0 ? std::min(T(1e30) / radius, std::numeric_limits<T>::max()) : T(1);

    const float longest = reach(dim);
    heads.resize(panels);
    integers.resize(panels * pairs * kCodes);
    share(panels, [&](int64_t begin, int64_t end) {
      std::vector<T> code(width);
      std::vector<int32_t> rounded(width / 2);
      for (int64_t i = begin * kCodes; i < end * kCodes; ++i) {
        Panel& head = heads[i / kCodes];
        const int64_t j = i % kCodes;
        head.factor[j] = head.offset[j] = 0;
        head.slack[j] = kAbsent;
        if (i >= count || absent[i]) continue;
        for (int64_t k = 0; k < width; ++k)
          code[k] = cosine ? rows[i * width + k] * inverse[i] : rows[i * width + k] - mean[k];
        const T scale = grid_scale(length[i], few() ? T(0) : largest_magnitude(code.data(), width));
        const Vec<T> lost = round_to_grid(code.data(), scale, width, rounded.data());
        int32_t* to = integers.data() + i / kCodes * pairs * kCodes + j;
        for (int64_t k = 0; k < pairs; ++k) to[k * kCodes] = rounded[k];
        const T relative = radius > 0 ? length[i] / radius : T(0);
        head.factor[j] = scale > 0 ? static_cast<float>(1 / (scale * radius)) : 0.0f;
        head.slack[j] =
            head.factor[j] * (rounding_error<T>(lost) * reach_rounded(dim) + 16 * kUnit<float> * longest * longest);
        head.offset[j] = cosine ? 0.0f : static_cast<float>(T(-0.5) * relative * relative) * (1 - 16 * kUnit<float>);
      }
    });
  }

  // The scale that brings a vector of this length to the grid; `top` is its largest magnitude, or 0 if there are few
  // coordinates.
  T grid_scale(T length, T top) const {
    const T scale = std::min(std::min(reach(dim) / length, 32767 / top), most_scale);
    return length > 0 ? scale : T(0);
  }
  bool few() const { return pairs <= kFewPairs; }

 private:
  // Codes that cannot be chosen: not finite, or equal to an earlier one, which would only need a second look.
  std::vector<uint8_t> find_absent() {
    std::vector<uint8_t> absent(count);
    std::vector<uint64_t> hash(count);
    share(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* row = rows + i * width;
        Vec<T> squares{};
        for (int64_t k = 0; k < width; k += kLanes<T>) squares += load(row + k) * load(row + k);
        absent[i] = !std::isfinite(sum_of_lanes<T>(squares));
        uint64_t h = 0;
        for (int64_t k = 0; k < dim; ++k)
          h = (h ^ std::bit_cast<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>(row[k])) * 0x9e3779b97f4a7c15u;
        hash[i] = h ^ (h >> 32);
      }
    });
    std::unordered_map<uint64_t, int64_t> seen(count);
    for (int64_t i = 0; i < count; ++i) {
      if (absent[i] && first_bad < 0) first_bad = i;
      if (absent[i]) continue;
      const auto [other, fresh] = seen.emplace(hash[i], i);
      absent[i] = !fresh && !std::memcmp(rows + i * width, rows + other->second * width, dim * sizeof(T));
    }
    return absent;
  }
};

}  // namespace
}  // namespace fastgen
