// The nearest code of each row, exactly: the code whose distance is least in float64, the lowest index among equals.
//
// |x - c|^2 is least where <x', c'> - |c'|^2 / 2 is largest, x' and c' being measured from the codebook's mean, so that
// data far from the origin loses no digits. A first pass scores all codes as a matrix product, a block of rows against
// a panel of codes, and keeps in each lane the best score, the second best, and the panel of the best. The rounding
// error of a score is bounded, so a row is decided when all scores within that bound of the best are of known codes:
// those few are measured directly, coordinate by coordinate. The other rows are scored once more, and every code within
// the bound is measured.
#pragma once

#include <atomic>
#include <limits>
#include <unordered_map>

#include "simd.h"

namespace fastgen {
namespace {

constexpr int kPanel = 2;                                // vectors of codes in a panel
constexpr int kBlock = kVectorRegisters == 32 ? 12 : 6;  // rows of a block
constexpr int kBlocks = 8;                               // blocks that share a pass over the codebook
constexpr int64_t kDepth = 256, kStride = kDepth + 16;   // coordinates scored in one go; floats between rows
template <class T>
constexpr int kCodes = kPanel * kLanes<T>;
template <class T>
constexpr T kUnit = std::numeric_limits<T>::epsilon() / 2;

// One bit for each lane whose sign bit is set.
template <class T>
inline uint32_t sign_bits(Vec<T> v) {
  if constexpr (sizeof(T) == 4) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)v);
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)v);
#endif
  } else {
#if defined(__AVX512F__)
    return _mm512_movepi64_mask((__m512i)v);
#elif defined(__AVX__)
    return _mm256_movemask_pd((__m256d)v);
#endif
  }
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= static_cast<uint32_t>(std::signbit(v[i])) << i;
  return bits;
}
template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
inline Vec<T> smaller(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}
template <class T>
inline T largest_lane(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = std::max(lanes[i], lanes[i + width]);
  return lanes[0];
}
template <class T>
inline T sum_of_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int width = kLanes<T> / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// sum (x a - c b)^2 in float64.
template <class T>
double exact_distance(const T* x, double a, const T* c, double b, int64_t dim) {
  double sum = 0;
  for (int64_t k = 0; k < dim; ++k) {
    const double d = x[k] * a - c[k] * b;
    sum += d * d;
  }
  return sum;
}
template <class T>
double exact_inverse_norm(const T* x, int64_t dim) {
  const double squared = exact_distance(x, 1.0, x, 0.0, dim);
  return squared > 0 ? 1 / std::sqrt(squared) : 0.0;
}
template <class T>
T squared_norm(const T* x, int64_t dim) {
  Vec<T> sums{};
  int64_t k = 0;
  for (; k + kLanes<T> <= dim; k += kLanes<T>) sums += load(x + k) * load(x + k);
  T sum = sum_of_lanes<T>(sums);
  for (; k < dim; ++k) sum += x[k] * x[k];
  return sum;
}

// A codebook laid out for scoring.
template <class T>
struct Codes {
  int64_t count, dim, panels;
  const T* rows;  // (count, dim)
  bool cosine;
  std::vector<T> mean;     // subtracted from rows and codes; zero for cosine
  std::vector<T> inverse;  // 1 / |c| for cosine, else empty
  OwnVector<T> scored;     // [panel]: kCodes offsets -|c'|^2 / 2, then [coordinate][code]
  T radius = 0;            // largest |c'|
  int64_t first_bad = -1;  // a code with NaN, infinity, or a norm that overflows: it is never chosen

  int64_t panel_size() const { return (dim + 1) * kCodes<T>; }

  Codes(const T* codes, int64_t count_, int64_t dim_, bool cosine_)
      : count(count_),
        dim(dim_),
        panels((count_ + kCodes<T> - 1) / kCodes<T>),
        rows(codes),
        cosine(cosine_),
        mean(dim) {
    const std::vector<uint8_t> absent = find_absent();
    if (!cosine) {
      std::vector<double> sum(dim);
      double present = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (absent[i]) continue;
        ++present;
        for (int64_t k = 0; k < dim; ++k) sum[k] += rows[i * dim + k];
      }
      for (int64_t k = 0; k < dim && present; ++k) mean[k] = static_cast<T>(sum[k] / present);
    } else {
      inverse.resize(count);
    }
    scored.resize(panels * panel_size());
    std::vector<T> radii(panels);
    share(panels, [&](int64_t begin, int64_t end) {
      std::vector<T> code(dim);
      for (int64_t p = begin; p < end; ++p) {
        T* to = scored.data() + p * panel_size();
        for (int64_t j = 0; j < kCodes<T>; ++j) {
          const int64_t i = p * kCodes<T> + j;
          if (i >= count || absent[i]) {
            to[j] = -std::numeric_limits<T>::infinity();
            for (int64_t k = 0; k < dim; ++k) to[(k + 1) * kCodes<T> + j] = 0;
            continue;
          }
          const T* row = rows + i * dim;
          if (cosine) inverse[i] = inverse_norm(squared_norm(row, dim));
          for (int64_t k = 0; k < dim; ++k) code[k] = cosine ? row[k] * inverse[i] : row[k] - mean[k];
          const T norm = squared_norm(code.data(), dim);
          to[j] = cosine ? T(0) : T(-0.5) * norm;
          for (int64_t k = 0; k < dim; ++k) to[(k + 1) * kCodes<T> + j] = code[k];
          radii[p] = std::max(radii[p], std::sqrt(norm));
        }
      }
    });
    for (const T r : radii) radius = std::max(radius, r);
  }

  static T inverse_norm(T squared) { return squared > 0 ? 1 / std::sqrt(squared) : T(0); }

 private:
  // Codes that cannot be chosen: not finite, or equal to an earlier one, which would only need a second look.
  std::vector<uint8_t> find_absent() {
    std::vector<uint8_t> absent(count);
    std::vector<uint64_t> hash(count);
    share(count, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        absent[i] = !std::isfinite(squared_norm(rows + i * dim, dim));
        uint64_t h = 0;
        for (int64_t k = 0; k < dim; ++k)
          h = (h ^ std::bit_cast<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>(rows[i * dim + k])) *
              0x9e3779b97f4a7c15u;
        hash[i] = h ^ (h >> 32);
      }
    });
    std::unordered_map<uint64_t, int64_t> seen(count);
    for (int64_t i = 0; i < count; ++i) {
      if (absent[i] && first_bad < 0) first_bad = i;
      if (absent[i]) continue;
      const auto [other, fresh] = seen.emplace(hash[i], i);
      absent[i] = !fresh && !std::memcmp(rows + i * dim, rows + other->second * dim, dim * sizeof(T));
    }
    return absent;
  }
};

// Of one row, lane by lane.
template <class T>
struct Leaders {
  Vec<T> best, second;
  decltype(best > second) panel;
};

// Scores of a block of rows with a panel of codes; finish(row, scores of the first vector, of the second). Scores of
// earlier coordinates come from and go to `partial` where there are more than kDepth of them.
template <class T, class F>
[[gnu::noinline]] void score(const T* x, const T* panel, int64_t depth, bool first, bool last, Vec<T>* partial,
                             const F& finish) {
  Vec<T> sum[kBlock][kPanel];
  unroll<kBlock>([&](auto i) FASTGEN_INLINE {
    unroll<kPanel>([&](auto v)
                       FASTGEN_INLINE { sum[i][v] = first ? load(panel + v * kLanes<T>) : partial[i * kPanel + v]; });
  });
  if (first) panel += kCodes<T>;
  for (int64_t k = 0; k < depth; ++k, panel += kCodes<T>) {
    Vec<T> code[kPanel];
    unroll<kPanel>([&](auto v) FASTGEN_INLINE { code[v] = load(panel + v * kLanes<T>); });
    unroll<kBlock>([&](auto i) FASTGEN_INLINE {
      const Vec<T> value = splat(x[i * kStride + k]);
      unroll<kPanel>([&](auto v) FASTGEN_INLINE { sum[i][v] += value * code[v]; });
    });
  }
  if (last)
    unroll<kBlock>([&](auto i) FASTGEN_INLINE { finish(i, sum[i][0], sum[i][1]); });
  else
    unroll<kBlock>([&](auto i) FASTGEN_INLINE {
      unroll<kPanel>([&](auto v) FASTGEN_INLINE { partial[i * kPanel + v] = sum[i][v]; });
    });
}

// One worker's search. emit(row, the row's values, code, squared distance), code -1 for a row that holds NaN or
// infinity; in no particular order.
template <class T, class E, class Emit>
class Search {
 public:
  Search(const Codes<T>& codes, const E* x, int64_t stride, Emit& emit)
      : codes_(codes), x_(x), x_stride_(stride), emit_(emit), chunks_((codes.dim + kDepth - 1) / kDepth) {
    centred_.resize(kBlocks * kBlock * kStride * chunks_);
    open_rows_.resize(kBlock * kStride * chunks_);
    if constexpr (!std::is_same_v<T, E>) converted_.resize(codes.dim);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kBlocks * kBlock) {
      const int64_t count = std::min<int64_t>(kBlocks * kBlock, end - first);
      for (int64_t i = 0; i < kBlocks * kBlock; ++i) {
        norm_[i] = i < count ? centre(row(first + i), centred_.data() + i * kStride, kBlocks * kBlock) : T(-1);
        leaders_[i].best = leaders_[i].second = splat(-std::numeric_limits<T>::infinity());
      }
      scan((count + kBlock - 1) / kBlock, centred_.data(), [&](int64_t block, int64_t panel) {
        Leaders<T>* leaders = leaders_ + block * kBlock;
        const auto id = decltype(leaders->panel){} + static_cast<Index>(panel);
        return [=](int i, Vec<T> a, Vec<T> b) FASTGEN_INLINE {
          Leaders<T>& l = leaders[i];
          const Vec<T> high = larger<T>(a, b), best = l.best;
          l.second = larger<T>(l.second, smaller<T>(best, high));
          l.panel = high > best ? id : l.panel;
          l.best = larger<T>(best, high);
        };
      });
      for (int64_t i = 0; i < count; ++i) settle(first + i, i);
    }
    look_again();
  }

 private:
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  struct Nearest {
    int64_t code = -1;
    T distance = std::numeric_limits<T>::infinity();
  };

  const T* row(int64_t i) {
    const E* from = x_ + i * x_stride_;
    if constexpr (std::is_same_v<T, E>) {
      return from;
    } else {
      load_row(converted_.data(), from, codes_.dim, codes_.dim);
      return converted_.data();
    }
  }

  // x - mean in chunks of kDepth coordinates, `rows` rows to a chunk -> |x - mean|, or -1 and zeros if not finite.
  T centre(const T* x, T* to, int64_t rows) {
    Vec<T> sums{};
    T sum = 0;
    for (int64_t c = 0; c < chunks_; ++c) {
      const T *from = x + c * kDepth, *mean = codes_.mean.data() + c * kDepth;
      T* chunk = to + c * rows * kStride;
      const int64_t depth = std::min(kDepth, codes_.dim - c * kDepth);
      int64_t k = 0;
      for (; k + kLanes<T> <= depth; k += kLanes<T>) {
        const Vec<T> d = load(from + k) - load(mean + k);
        store(chunk + k, d);
        sums += d * d;
      }
      for (; k < depth; ++k) {
        const T d = from[k] - mean[k];
        chunk[k] = d;
        sum += d * d;
      }
    }
    sum += sum_of_lanes<T>(sums);
    if (std::isfinite(sum)) return std::sqrt(sum);
    for (int64_t c = 0; c < chunks_; ++c) std::fill_n(to + c * rows * kStride, kDepth, T(0));
    return T(-1);
  }

  // All codes against `blocks` blocks of rows: finish(block, panel) gives what `score` calls with the scores.
  template <class F>
  void scan(int64_t blocks, const T* rows, F&& finish) {
    const int64_t chunk_size = blocks_of(rows) * kBlock * kStride;
    for (int64_t p = 0; p < codes_.panels; ++p) {
      const T* panel = codes_.scored.data() + p * codes_.panel_size();
      for (int64_t c = 0; c < chunks_; ++c) {
        const int64_t depth = std::min(kDepth, codes_.dim - c * kDepth);
        for (int64_t b = 0; b < blocks; ++b)
          score<T>(rows + c * chunk_size + b * kBlock * kStride, panel, depth, c == 0, c + 1 == chunks_,
                   partial_ + b * kBlock * kPanel, finish(b, p));
        panel += (depth + (c == 0)) * kCodes<T>;
      }
    }
  }
  int64_t blocks_of(const T* rows) const { return rows == centred_.data() ? kBlocks : 1; }

  // How far a score may be from the exact one.
  T bound(T norm) const {
    return (T(1.1) * codes_.dim + 16) * kUnit<T> * codes_.radius * (codes_.cosine ? norm : norm + codes_.radius / 2);
  }

  void settle(int64_t index, int64_t i) {
    const T* x = row(index);
    const Leaders<T>& l = leaders_[i];
    if (norm_[i] < 0) return emit_(index, x, -1, std::numeric_limits<T>::quiet_NaN());
    const T best = largest_lane<T>(l.best);
    if (!(best > -std::numeric_limits<T>::infinity())) return emit_(index, x, 0, std::numeric_limits<T>::infinity());
    const T inverse = codes_.cosine ? Codes<T>::inverse_norm(norm_[i] * norm_[i]) : T(1);
    if (inverse == 0) return emit_(index, x, 0, T(2));  // no direction: all cosines are zero
    const T limit = best - 2 * bound(norm_[i]);
    if (sign_bits<T>((Vec<T>)(l.second >= limit))) {
      open_index_[open_] = index;
      open_limit_[open_] = limit;
      open_inverse_[open_] = inverse;
      open_nearest_[open_] = {};
      centre(x, open_rows_.data() + open_ * kStride, kBlock);
      if (++open_ == kBlock) look_again();
      return;
    }
    Nearest nearest;
    for (uint32_t lanes = sign_bits<T>((Vec<T>)(l.best >= limit)); lanes; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      for (int v = 0; v < kPanel; ++v) measure(x, inverse, l.panel[lane] * kCodes<T> + v * kLanes<T> + lane, nearest);
    }
    emit_(index, x, nearest.code, nearest.distance);
  }

  // Scores the open rows again and measures every code within their limits.
  void look_again() {
    if (open_ == 0) return;
    scan(1, open_rows_.data(), [&](int64_t, int64_t panel) {
      return [this, panel](int i, Vec<T> a, Vec<T> b) FASTGEN_INLINE {
        if (i >= open_ || !sign_bits<T>((Vec<T>)(larger<T>(a, b) >= open_limit_[i]))) return;
        measure_lanes(i, panel, 0, a);
        measure_lanes(i, panel, 1, b);
      };
    });
    for (int i = 0; i < open_; ++i)
      emit_(open_index_[i], row(open_index_[i]), open_nearest_[i].code, open_nearest_[i].distance);
    open_ = 0;
  }
  [[gnu::noinline]] void measure_lanes(int i, int64_t panel, int v, Vec<T> scores) {
    for (uint32_t lanes = sign_bits<T>((Vec<T>)(scores >= open_limit_[i])); lanes; lanes &= lanes - 1)
      measure(row(open_index_[i]), open_inverse_[i], panel * kCodes<T> + v * kLanes<T> + std::countr_zero(lanes),
              open_nearest_[i]);
  }

  // Keeps `code` if it is nearer, or as near and of a lower index.
  void measure(const T* x, T a, int64_t code, Nearest& nearest) {
    if (code >= codes_.count) return;
    const T* c = codes_.rows + code * codes_.dim;
    const T b = codes_.cosine ? codes_.inverse[code] : T(1);
    const T distance = this->distance(x, a, c, b);
    const T doubt = 4 * (codes_.dim + 8) * kUnit<T> * distance +
                    (codes_.cosine ? 16 * kUnit<T> * (std::sqrt(distance) + kUnit<T>) : T(0));
    bool nearer = distance < nearest.distance;
    if (nearest.code >= 0 && std::abs(distance - nearest.distance) <= doubt) {
      const T* other = codes_.rows + nearest.code * codes_.dim;
      const double one = exact(x, c), two = exact(x, other);
      nearer = one < two || (one == two && code < nearest.code);
    }
    if (nearer) nearest = {code, distance};
  }
  double exact(const T* x, const T* c) const {
    if (!codes_.cosine) return exact_distance(x, 1.0, c, 1.0, codes_.dim);
    const double inverse = exact_inverse_norm(c, codes_.dim);
    return inverse == 0 ? 2.0 : exact_distance(x, exact_inverse_norm(x, codes_.dim), c, inverse, codes_.dim);
  }
  T distance(const T* x, T a, const T* c, T b) const {
    Vec<T> sums{};
    int64_t k = 0;
    if (b == 0) return T(2);  // as for any two directions whose cosine is zero
    if (codes_.cosine) {
      for (; k + kLanes<T> <= codes_.dim; k += kLanes<T>) {
        const Vec<T> d = load(x + k) * a - load(c + k) * b;
        sums += d * d;
      }
    } else {
      for (; k + kLanes<T> <= codes_.dim; k += kLanes<T>) {
        const Vec<T> d = load(x + k) - load(c + k);
        sums += d * d;
      }
    }
    T sum = k ? sum_of_lanes<T>(sums) : T(0);
    for (; k < codes_.dim; ++k) {
      const T d = x[k] * a - c[k] * b;
      sum += d * d;
    }
    return sum;
  }

  const Codes<T>& codes_;
  const E* x_;
  const int64_t x_stride_;
  Emit& emit_;
  const int64_t chunks_;
  OwnVector<T> centred_, open_rows_;
  std::vector<T> converted_;
  T norm_[kBlocks * kBlock];
  Leaders<T> leaders_[kBlocks * kBlock];
  Vec<T> partial_[kBlocks * kBlock * kPanel];
  int open_ = 0;
  int64_t open_index_[kBlock];
  T open_limit_[kBlock], open_inverse_[kBlock];
  Nearest open_nearest_[kBlock];
};

// The codebook in the compute type: the tensor's own memory where that is its type.
template <class T>
struct CodebookRows {
  std::vector<T> buffer;
  const T* data;

  explicit CodebookRows(const Tensor& codebook) : data(static_cast<const T*>(codebook.data_ptr())) {
    if constexpr (sizeof(T) == 4)
      if (codebook.scalar_type() == ScalarType::BFloat16) {
        buffer.resize(codebook.numel());
        load_row(buffer.data(), static_cast<const BFloat16*>(codebook.data_ptr()), codebook.numel(), codebook.numel());
        data = buffer.data();
      }
  }
};

template <class T>
constexpr ScalarType kTypeOf = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

Tensor empty_of(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

// The least of `first` and `candidate`, or the candidate where first is -1.
void note_first(std::atomic<int64_t>& first, int64_t candidate) {
  int64_t seen = first.load();
  while ((seen < 0 || candidate < seen) && !first.compare_exchange_weak(seen, candidate)) {
  }
}

// Searches all rows of x: emit(worker, row, values, code, squared distance). A row that is not finite gets code 0 and
// distance NaN, or with `strict` ends in an error.
template <class T, class E, class Emit>
void search(const char* op, const Tensor& x, const Codes<T>& codes, bool strict, int64_t workers, Emit&& emit) {
  FASTGEN_CHECK(!strict || codes.first_bad < 0, op, ": codebook must be finite, with squared norms below ",
                std::numeric_limits<T>::max(), ", but code ", codes.first_bad, " is not");
  const int64_t rows = x.size(0), blocks = (rows + kBlock - 1) / kBlock;
  std::atomic<int64_t> first_bad{-1};
  for_each_worker(workers, [&](int64_t worker) {
    auto one = [&, worker](int64_t row, const T* values, int64_t code, T distance) {
      if (code < 0) note_first(first_bad, row);
      emit(worker, row, values, std::max<int64_t>(code, 0), distance);
    };
    Search<T, E, decltype(one)> search(codes, data_of<E>(x), x.stride(0), one);
    search.run(worker * blocks / workers * kBlock, std::min((worker + 1) * blocks / workers * kBlock, rows));
  });
  FASTGEN_CHECK(!strict || first_bad < 0, op, ": x must be finite, with squared norms below ",
                std::numeric_limits<T>::max(), ", but row ", first_bad.load(), " is not");
}

int64_t workers_for(int64_t rows) {
  return std::min<int64_t>((rows + kBlock - 1) / kBlock, torch::stable::get_num_threads());
}

}  // namespace
}  // namespace fastgen
