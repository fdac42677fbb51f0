// The nearest code of each row, exactly: the code whose distance is least in float64, the lowest index among equals.
//
// |x - c|^2 is least where <x, c> - |c|^2 / 2 is largest, both measured from the codebook's mean. A first pass scores
// all codes with 16-bit integers (code_panels.h), whose products are exact and cost as little as half a float's; each
// score is the most that the exact one can be. It keeps, in each lane, the best score, the second best, and the panel
// of the best. Rounding to integers loses a known amount, so a row is decided when every score within reach of the best
// is of a known code: those few are measured coordinate by coordinate. The other rows are scored once more, and every
// code within reach is measured.
#pragma once

#include <atomic>

#include "code_panels.h"
#include "integer_pairs.h"

namespace fastgen {
namespace {

constexpr int kSums = kVectorRegisters * sizeof(VecU) / sizeof(PairSums);  // that registers hold
constexpr int kBlock = kSums == 32 ? 12 : kVectorRegisters == 32 ? 6 : 4;  // rows of a block
constexpr int kFew = kSums == 32 ? 4 : 2;                                  // of them at a time, where vectors are short
constexpr int kBlocks = 8;                                                 // that share a pass over the codebook

// Of one row, lane by lane.
struct Leaders {
  VecF best, second;
  VecI panel;
};

// Rows of a block on the grid: `integers` [row][pair of coordinates], rows `stride` apart.
struct Block {
  int32_t* integers;
  int64_t stride;
  int32_t allowance[kBlock];
  float scale[kBlock];  // in units of 1 / R
};

// Integer products of a block of rows with a panel of codes, on top of the rows' allowances: use(row, sums).
// Its callers are not inlined: among other variables the compiler would keep sums in memory.
template <class Use>
FASTGEN_INLINE inline void multiply(const Block& block, const int32_t* codes, int64_t pairs, Use&& use) {
  PairSums sum[kBlock][kPanel];
  unroll<kBlock>([&](auto i) FASTGEN_INLINE {
    unroll<kPanel>([&](auto v) FASTGEN_INLINE { sum[i][v] = pair_sums(block.allowance[i]); });
  });
  const int32_t* rows = block.integers;
  const int64_t stride = block.stride;
  int64_t k = pairs;
  do {
    VecU code[kPanel];
    unroll<kPanel>([&](auto v) FASTGEN_INLINE { code[v] = (VecU)load(codes + v * kF); });
    unroll<kBlock>([&](auto i) FASTGEN_INLINE {
      const VecU row = VecU{} + static_cast<uint32_t>(rows[i * stride]);
      unroll<kPanel>([&](auto v) FASTGEN_INLINE { sum[i][v] = add_pairs(sum[i][v], code[v], row); });
    });
    codes += kCodes;
    ++rows;
  } while (--k);
  unroll<kBlock>([&](auto i) FASTGEN_INLINE { use(i, sum[i]); });
}

// A panel's head in registers.
struct PanelVectors {
  VecF factor[kPanel], slack[kPanel], offset[kPanel];

  explicit PanelVectors(const Panel& panel) {
    unroll<kPanel>([&](auto v) FASTGEN_INLINE {
      factor[v] = load(panel.factor + v * kF);
      slack[v] = load(panel.slack + v * kF);
      offset[v] = load(panel.offset + v * kF);
    });
  }
  // The largest that the exact scores of vector v can be.
  VecF score(PairSums products, int v, float scale) const {
    return __builtin_convertvector((VecI)total(products), VecF) * factor[v] + slack[v] + offset[v] * scale;
  }
};

inline void keep_leaders(Leaders& leaders, VecF a, VecF b, VecI panel) {
  const VecF high = larger<float>(a, b);
  const Leaders l = leaders;
  leaders = {larger<float>(l.best, high), larger<float>(l.second, smaller<float>(l.best, high)),
             high > l.best ? panel : l.panel};
}

// The leaders of a block after one more panel.
[[gnu::noinline]] void scan(const Block& block, const Panel& panel, const int32_t* codes, int64_t pairs, int32_t id,
                            Leaders* leaders) {
  const VecI ids = VecI{} + id;
  multiply(block, codes, pairs, [&](auto i, const PairSums(&sum)[kPanel]) FASTGEN_INLINE {
    const PanelVectors head(panel);
    keep_leaders(leaders[i], head.score(sum[0], 0, block.scale[i]), head.score(sum[1], 1, block.scale[i]), ids);
  });
}

// The scores of a block with a panel.
[[gnu::noinline]] void score(const Block& block, const Panel& panel, const int32_t* codes, int64_t pairs,
                             VecF (&result)[kBlock][kPanel]) {
  multiply(block, codes, pairs, [&](auto i, const PairSums(&sum)[kPanel]) FASTGEN_INLINE {
    const PanelVectors head(panel);
    unroll<kPanel>([&](auto v) FASTGEN_INLINE { result[i][v] = head.score(sum[v], v, block.scale[i]); });
  });
}

// The leaders of a block among `panels` panels of codes. With few coordinates the leaders cost more than the products,
// and stay in registers, a few rows at a time.
template <int Pairs>
void scan_few_coordinates(const Block& block, const Panel* heads, const int32_t* codes, int64_t panels,
                          Leaders* result) {
  for (int first = 0; first < kBlock; first += kFew) {
    Leaders leaders[kFew];
    unroll<kFew>([&](auto i) FASTGEN_INLINE { leaders[i] = result[first + i]; });
    for (int64_t p = 0; p < panels; ++p) {
      PairSums sum[kFew][kPanel];
      unroll<kFew>([&](auto i) FASTGEN_INLINE {
        unroll<kPanel>([&](auto v) FASTGEN_INLINE { sum[i][v] = pair_sums(block.allowance[first + i]); });
      });
      unroll<Pairs>([&](auto k) FASTGEN_INLINE {
        unroll<kFew>([&](auto i) FASTGEN_INLINE {
          const VecU row = VecU{} + static_cast<uint32_t>(block.integers[(first + i) * block.stride + k]);
          unroll<kPanel>([&](auto v) FASTGEN_INLINE {
            sum[i][v] = add_pairs(sum[i][v], (VecU)load(codes + ((p * Pairs + k) * kPanel + v) * kF), row);
          });
        });
      });
      const PanelVectors head(heads[p]);
      const VecI id = VecI{} + static_cast<int32_t>(p);
      unroll<kFew>([&](auto i) FASTGEN_INLINE {
        const float scale = block.scale[first + i];
        keep_leaders(leaders[i], head.score(sum[i][0], 0, scale), head.score(sum[i][1], 1, scale), id);
      });
    }
    unroll<kFew>([&](auto i) FASTGEN_INLINE { result[first + i] = leaders[i]; });
  }
}
using ScanFew = void (*)(const Block&, const Panel*, const int32_t*, int64_t, Leaders*);
constexpr ScanFew kScanFew[] = {scan_few_coordinates<1>, scan_few_coordinates<2>, scan_few_coordinates<3>,
                                scan_few_coordinates<4>, scan_few_coordinates<5>, scan_few_coordinates<6>,
                                scan_few_coordinates<7>, scan_few_coordinates<8>};
static_assert(std::size(kScanFew) == kFewPairs);

// One worker's search. emit(row, the row's values, code, squared distance), code -1 for a row that holds NaN or
// infinity; in no particular order.
template <class T, class E, class Emit>
class Search {
 public:
  Search(const Codes<T>& codes, const E* x, int64_t stride, Emit& emit)
      : codes_(codes),
        x_(x),
        x_stride_(stride),
        emit_(emit),
        centred_(kBlocks * kBlock * codes.width),
        converted_(kBlocks * kBlock * codes.width),
        integers_((kBlocks + 1) * kBlock * codes.width / 2) {
    for (int b = 0; b <= kBlocks; ++b) {
      blocks_[b].stride = codes.width / 2;
      blocks_[b].integers = integers_.data() + b * kBlock * blocks_[b].stride;
    }
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kBlocks * kBlock) {
      const int64_t count = std::min<int64_t>(kBlocks * kBlock, end - first);
      fetch(count, [&](int64_t i) { return first + i; });
      place(count, 0);
      for (int64_t i = 0; i < count; ++i) leaders_[i] = {splat(kAbsent), splat(kAbsent), VecI{}};
      const int64_t blocks = (count + kBlock - 1) / kBlock;
      if (codes_.pairs <= kFewPairs)
        for (int64_t b = 0; b < blocks; ++b)
          kScanFew[codes_.pairs - 1](blocks_[b], codes_.heads.data(), codes_.integers.data(), codes_.panels,
                                     leaders_ + b * kBlock);
      else
        for (int64_t p = 0; p < codes_.panels; ++p)
          for (int64_t b = 0; b < blocks; ++b) {
            if (first + count < end) fetch_ahead(first + count, p * blocks + b, codes_.panels * blocks);
            scan(blocks_[b], codes_.heads[p], codes_.integers.data() + p * codes_.pairs * kCodes, codes_.pairs,
                 static_cast<int32_t>(p), leaders_ + b * kBlock);
          }
      for (int64_t i = 0; i < count; ++i) settle(first + i, i);
      while (open_ >= kBlock) look_again();
    }
    while (open_) look_again();
  }

 private:
  struct Nearest {
    int64_t code = -1;
    T distance = std::numeric_limits<T>::infinity();
  };

  // Asks for one of `parts` parts of the rows from `first` on, which the next pass will read.
  void fetch_ahead(int64_t first, int64_t part, int64_t parts) const {
    const int64_t bytes = kBlocks * kBlock * x_stride_ * sizeof(E);
    const auto* from = reinterpret_cast<const char*>(x_ + first * x_stride_);
    for (int64_t line = part * bytes / parts / 64; line < (part + 1) * bytes / parts / 64; ++line)
      __builtin_prefetch(from + line * 64);
  }

  // Rows index(0), ..., index(count - 1), as padded vectors of T, to values_.
  template <class F>
  void fetch(int64_t count, F&& index) {
    const bool as_they_are = std::is_same_v<T, E> && codes_.width == codes_.dim;
    for (int64_t i = 0; i < count; ++i) {
      const E* from = x_ + index(i) * x_stride_;
      if constexpr (std::is_same_v<T, E>) values_[i] = from;
      if (as_they_are) continue;
      T* to = converted_.data() + i * codes_.width;
      load_row(to, from, codes_.dim, codes_.dim);
      values_[i] = to;
    }
  }

  // Puts values_ on the grid, from the first row of block `first` on. Lengths from the mean go to norm_, -1 (and zeros
  // on the grid) where a row is not finite.
  void place(int64_t count, int64_t first) {
    T top[kBlocks * kBlock] = {}, scale[kBlocks * kBlock];
    for (int64_t i = 0; i < count; ++i) {
      T* centred = centred_.data() + i * codes_.width;
      norm_[i] = subtract(values_[i], codes_.mean.data(), centred, codes_.width);
      if (!codes_.few()) top[i] = largest_magnitude(centred, codes_.width);
    }
    for (int64_t i = 0; i < count; ++i) {
      norm_[i] = std::sqrt(norm_[i]);
      scale[i] = codes_.grid_scale(norm_[i], top[i]);
    }
    for (int64_t i = 0; i < count; ++i) {
      T* centred = centred_.data() + i * codes_.width;
      if (norm_[i] < T(1e-15)) {  // small squares may have vanished
        norm_[i] = length_of(centred, T(0), codes_.width);
        scale[i] = codes_.grid_scale(norm_[i], top[i]);
      } else if (!std::isfinite(norm_[i])) {
        std::fill_n(centred, codes_.width, T(0));
        norm_[i] = -1;
        scale[i] = 0;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      Block& block = blocks_[first + i / kBlock];
      const Vec<T> lost = round_to_grid(centred_.data() + i * codes_.width, scale[i], codes_.width,
                                        block.integers + i % kBlock * block.stride);
      const float error = codes_.few() ? most_error_ : rounding_error<T>(lost);
      block.allowance[i % kBlock] = static_cast<int32_t>(error * reach_) + 1;
      // a row at the mean itself is nearest to the code that is: offsets alone decide
      block.scale[i % kBlock] = scale[i] > 0 ? static_cast<float>(scale[i] * codes_.radius) : 1e30f;
    }
  }

  void settle(int64_t index, int64_t i) {
    const T* x = values_[i];
    const Leaders& l = leaders_[i];
    if (norm_[i] < 0) return emit_(index, x, -1, std::numeric_limits<T>::quiet_NaN());
    if (codes_.empty) return emit_(index, x, 0, std::numeric_limits<T>::quiet_NaN());
    const T inverse = !codes_.cosine ? T(1) : norm_[i] > kNoDirection ? 1 / norm_[i] : T(0);
    if (inverse == 0) return emit_(index, x, 0, T(2));  // no direction: all cosines are zero
    const Block& block = blocks_[i / kBlock];
    const float best = largest_lane<float>(l.best);
    const int lane = std::countr_zero(sign_bits<float>((VecF)(l.best >= best))) % kF;
    const Panel& head = codes_.heads[l.panel[lane]];
    float limit = best;  // less twice what rounding may have cost the leader, one of the two codes of its lane
    for (int v = 0; v < kPanel; ++v) {
      const int j = v * kF + lane;
      if (head.slack[j] == kAbsent) continue;
      const float doubt = head.slack[j] + head.factor[j] * block.allowance[i % kBlock] -
                          32 * kUnit<float> * head.offset[j] * block.scale[i % kBlock];
      limit = std::min(limit, best - 2 * doubt * (1 + 1e-6f) - 8 * kUnit<float> * std::abs(best));
    }
    if (sign_bits<float>((VecF)(l.second >= limit))) {
      open_index_[open_] = index;
      open_limit_[open_] = limit;
      open_inverse_[open_] = inverse;
      open_nearest_[open_] = {};
      ++open_;
      return;
    }
    Nearest nearest;
    for (uint32_t lanes = sign_bits<float>((VecF)(l.best >= limit)); lanes; lanes &= lanes - 1) {
      const int at = std::countr_zero(lanes);
      for (int v = 0; v < kPanel; ++v) measure(x, inverse, int64_t{l.panel[at]} * kCodes + v * kF + at, nearest);
    }
    emit_(index, x, nearest.code, nearest.distance);
  }

  // Scores the last open rows again, a block of them, and measures every code within their limits.
  void look_again() {
    const int count = std::min(open_, kBlock);
    open_ -= count;
    fetch(count, [&](int64_t i) { return open_index_[open_ + i]; });
    place(count, kBlocks);
    for (int64_t p = 0; p < codes_.panels; ++p) {
      VecF scores[kBlock][kPanel];
      score(blocks_[kBlocks], codes_.heads[p], codes_.integers.data() + p * codes_.pairs * kCodes, codes_.pairs,
            scores);
      for (int i = 0; i < count; ++i) {
        const VecF a = scores[i][0], b = scores[i][1];
        if (!sign_bits<float>((VecF)(larger<float>(a, b) >= open_limit_[open_ + i]))) continue;
        measure_lanes(i, p * kCodes, a);
        measure_lanes(i, p * kCodes + kF, b);
      }
    }
    for (int i = 0; i < count; ++i)
      emit_(open_index_[open_ + i], values_[i], open_nearest_[open_ + i].code, open_nearest_[open_ + i].distance);
  }
  [[gnu::noinline]] void measure_lanes(int i, int64_t first, VecF scores) {
    for (uint32_t lanes = sign_bits<float>((VecF)(scores >= open_limit_[open_ + i])); lanes; lanes &= lanes - 1)
      measure(values_[i], open_inverse_[open_ + i], first + std::countr_zero(lanes), open_nearest_[open_ + i]);
  }

  // Keeps `code` if it is nearer, or as near and of a lower index.
  void measure(const T* x, T a, int64_t code, Nearest& nearest) {
    if (codes_.heads[code / kCodes].slack[code % kCodes] == kAbsent) return;
    const T* c = codes_.rows + code * codes_.width;
    const T distance = this->distance(x, a, c, codes_.cosine ? codes_.inverse[code] : T(1));
    const T doubt = 4 * (codes_.dim + 8) * kUnit<T> * distance +
                    (codes_.cosine ? 16 * kUnit<T> * (std::sqrt(distance) + kUnit<T>) : T(0));
    bool nearer = distance < nearest.distance;
    if (nearest.code >= 0 && std::abs(distance - nearest.distance) <= doubt) {
      const double one = exact(x, c), two = exact(x, codes_.rows + nearest.code * codes_.width);
      // directions are rounded even in float64
      const double same = codes_.cosine ? 4e-16 * codes_.dim * (std::sqrt(std::max(one, two)) + 4e-16) : 0.0;
      nearer = one < two - same || (one <= two + same && code < nearest.code);
    }
    nearest.code = nearer ? code : nearest.code;
    nearest.distance = nearer ? distance : nearest.distance;
  }
  double exact(const T* x, const T* c) const {
    if (!codes_.cosine) return exact_distance(x, 1.0, c, 1.0, codes_.width);
    const double length = exact_length(c, codes_.width);
    return length <= kNoDirection ? 2.0
                                  : exact_distance(x, 1 / exact_length(x, codes_.width), c, 1 / length, codes_.width);
  }
  T distance(const T* x, T a, const T* c, T b) const {
    if (codes_.cosine && b == 0) return T(2);  // as for any two directions whose cosine is zero
    Vec<T> squares{};
    for (int64_t k = 0; k < codes_.width; k += kLanes<T>) {
      const Vec<T> d = codes_.cosine ? load(x + k) * a - load(c + k) * b : load(x + k) - load(c + k);
      squares += d * d;
    }
    return sum_of_lanes<T>(squares);
  }

  const Codes<T>& codes_;
  const E* x_;
  const int64_t x_stride_;
  Emit& emit_;
  std::vector<T> centred_, converted_;
  OwnVector<int32_t> integers_;
  const float reach_{reach(codes_.dim)}, most_error_{reach_rounded(codes_.dim) - reach_};
  Block blocks_[kBlocks + 1];  // the last: the open rows
  const T* values_[kBlocks * kBlock];
  T norm_[kBlocks * kBlock];
  Leaders leaders_[kBlocks * kBlock];
  int open_ = 0;  // rows that wait for a second look
  int64_t open_index_[(kBlocks + 1) * kBlock];
  float open_limit_[(kBlocks + 1) * kBlock];
  T open_inverse_[(kBlocks + 1) * kBlock];
  Nearest open_nearest_[(kBlocks + 1) * kBlock];
};

// The codebook, of the dtype of x or of float32.
template <class T>
Codes<T> codes_of(const Tensor& codebook, bool cosine) {
  const int64_t count = codebook.size(0), dim = codebook.size(1);
  if constexpr (sizeof(T) == 4)
    if (codebook.scalar_type() == ScalarType::BFloat16) return {data_of<BFloat16>(codebook), count, dim, cosine};
  return {data_of<T>(codebook), count, dim, cosine};
}

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
