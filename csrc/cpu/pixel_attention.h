// Attention of a pixel to those before it, whose keys and values are kept (pixel_images.h).
#pragma once

#include "functions.h"
#include "pixel_program.h"

namespace fastgen {
namespace {

// Keys and values of all pixels drawn, float or, in half the room, int16_t: whole numbers of a unit of the pixel and
// head. Keys lie in blocks of pixels, [head][block][channel][pixel], so that the scores of a block are computed at
// once, and values as [head][pixel][channel], padded.
template <class T>
struct AttentionCache {
  static constexpr bool kUnits = sizeof(T) == 2;
  int64_t heads, keys, values, padded, room;
  T *key, *value;
  float *key_units, *value_units;  // [head][pixel]

  AttentionCache(const Instruction& i, int64_t pixels, float* image)
      : heads(i.bias),
        keys(i.dy / heads),
        values(i.dx / heads),
        padded(round_up(values, kChannelBlock)),
        room(round_up(pixels, kChannelBlock)),
        key(reinterpret_cast<T*>(image + i.extra)),
        value(key + i.dy * room),
        key_units(reinterpret_cast<float*>(value + heads * padded * room)),
        value_units(key_units + heads * room) {}

  T* keys_of(int64_t head) const { return key + head * keys * room; }
  T* values_of(int64_t head) const { return value + head * padded * room; }

  void put(int64_t head, int64_t pixel, const float* all_keys, const float* all_values) const {
    const int64_t lane = pixel % kChannelBlock;
    put(all_keys + head * keys, keys, keys_of(head) + (pixel - lane) * keys + lane, kChannelBlock,
        key_units + head * room + pixel);
    put(all_values + head * values, values, values_of(head) + pixel * padded, 1, value_units + head * room + pixel);
  }

 private:
  static void put(const float* from, int64_t count, T* to, int64_t step, float* unit) {
    float inverse = 1;
    if constexpr (kUnits) {
      float most = 0, zero = 0;
      for (int64_t c = 0; c < count; ++c) most = std::max(most, std::abs(from[c])), zero += 0 * from[c];
      *unit = most / 32767 + zero;  // not a number where one is not finite
      inverse = *unit > 1e-35f ? 1 / *unit : 0;
    }
    for (int64_t c = 0; c < count; ++c) {
      if constexpr (kUnits)
        to[c * step] = static_cast<T>(std::lrint(inverse > 0 ? from[c] * inverse : 0));
      else
        to[c * step] = from[c];
    }
  }
};

inline VecF remembered(const float* p) { return load(p); }
inline VecF remembered(const int16_t* p) {
  using Narrow = VectorOf<int16_t, kVectorBytes / 2>::type;
  Narrow v;
  std::memcpy(&v, p, sizeof v);
#if defined(__AVX512F__)
  return (VecF)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32((__m256i)v));  // what the compiler does in halves
#else
  return __builtin_convertvector(__builtin_convertvector(v, VecI), VecF);
#endif
}

// score[pixel] = scale * query . key of the pixel, -infinity from `pixels` up to the end of a block -> the largest.
template <class T>
float attention_scores(const T* key, const float* units, int64_t keys, const float* query, float scale, int64_t pixels,
                       float* score) {
  constexpr int kVectors = kChannelBlock / kF, kBlocks = kVectors >= 4 ? 1 : 4 / kVectors;
  VecF tops = splat(-INFINITY);
  const auto blocks = [&]<int N>(std::integral_constant<int, N>, int64_t pixel) FASTGEN_INLINE {
    VecF sums[N][kVectors] = {};
    const T* from = key + pixel * keys;
    for (int64_t k = 0; k < keys; ++k)
      unroll<N>([&](auto n) FASTGEN_INLINE {
        unroll<kVectors>([&](auto v) FASTGEN_INLINE {
          sums[n][v] += remembered(from + (n * keys + k) * kChannelBlock + v * kF) * query[k];
        });
      });
    unroll<N>([&](auto n) FASTGEN_INLINE {
      unroll<kVectors>([&](auto v) FASTGEN_INLINE {
        const int64_t at = pixel + n * kChannelBlock + v * kF;
        VecF scaled = sums[n][v] * scale;
        if constexpr (AttentionCache<T>::kUnits) scaled *= load(units + at);
        for (int64_t lane = std::max<int64_t>(pixels - at, 0); lane < kF; ++lane) scaled[lane] = -INFINITY;
        store(score + at, scaled);
        tops = larger<float>(scaled, tops);
      });
    });
  };
  int64_t pixel = 0;
  for (; pixel + kBlocks * kChannelBlock <= pixels; pixel += kBlocks * kChannelBlock)
    blocks(std::integral_constant<int, kBlocks>{}, pixel);
  for (; pixel < pixels; pixel += kChannelBlock) blocks(std::integral_constant<int, 1>{}, pixel);
  return largest_lane<float>(tops);
}

// to = the sum of the pixels' values, each times its weight, times scale, for `count` channels in N vectors.
template <int N, class T>
void attention_values(const T* value, int64_t step, const float* weight, float scale, int64_t pixels, float* to,
                      int64_t count) {
  constexpr int kChains = 8 / N;
  VecF sums[kChains][N] = {};
  const auto add = [&](int64_t pixel, auto chain) FASTGEN_INLINE {
    unroll<N>([&](auto v)
                  FASTGEN_INLINE { sums[chain][v] += remembered(value + pixel * step + v * kF) * weight[pixel]; });
  };
  int64_t pixel = 0;
  for (; pixel + kChains <= pixels; pixel += kChains)
    unroll<kChains>([&](auto chain) FASTGEN_INLINE { add(pixel + chain, chain); });
  for (; pixel < pixels; ++pixel) add(pixel, std::integral_constant<int, 0>{});
  unroll<N>([&](auto v) FASTGEN_INLINE {
    unroll<kChains - 1>([&](auto chain) FASTGEN_INLINE { sums[0][v] += sums[chain + 1][v]; });
    const VecF mean = sums[0][v] * scale;
    std::memcpy(to + v * kF, &mean, std::min<int64_t>(count - v * kF, kF) * sizeof(float));
  });
}

// One head: the softmax of the products with the keys of so many pixels, over their values. Without `own`, where the
// pixel itself is not among them, also with a key of zeros, whose value is zero. score holds a float for each pixel, in
// whole blocks.
template <class T>
void attend(const AttentionCache<T>& cache, int64_t head, int64_t pixels, bool own, const float* queries,
            float* results, float* score) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(cache.keys));
  const float *key_units = cache.key_units + head * cache.room, *value_units = cache.value_units + head * cache.room;
  float top =
      attention_scores(cache.keys_of(head), key_units, cache.keys, queries + head * cache.keys, scale, pixels, score);
  if (!own) top = std::max(top, 0.0f);
  VecF totals = {};
  for (int64_t pixel = 0; pixel < pixels; pixel += kF) {
    const VecF e = exp_any(load(score + pixel) - top);
    totals += e;
    if constexpr (AttentionCache<T>::kUnits)
      store(score + pixel, e * load(value_units + pixel));
    else
      store(score + pixel, e);
  }
  const float share = 1.0f / (sum_of_lanes<float>(totals) + (own ? 0.0f : exp_any(splat(-top))[0]));
  for (int64_t c = 0; c < cache.values; c += 4 * kF) {
    const int64_t count = std::min<int64_t>(cache.values - c, 4 * kF);
    const auto sum = [&](auto vectors) {
      attention_values<vectors>(cache.values_of(head) + c, cache.padded, score, share, pixels,
                                results + head * cache.values + c, count);
    };
    switch ((count + kF - 1) / kF) {
      case 1:
        sum(std::integral_constant<int, 1>{});
        break;
      case 2:
        sum(std::integral_constant<int, 2>{});
        break;
      case 3:
        sum(std::integral_constant<int, 3>{});
        break;
      default:
        sum(std::integral_constant<int, 4>{});
    }
  }
}

}  // namespace
}  // namespace fastgen
