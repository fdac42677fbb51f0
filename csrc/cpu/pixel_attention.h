// Attention of a pixel to those before it, whose keys and values are kept (pixel_images.h).
#pragma once

#include "functions.h"
#include "pixel_program.h"

namespace fastgen {
namespace {

// Keys and values of all pixels drawn. Keys lie in blocks of pixels, [head][block][channel][pixel], so that the scores
// of a block are computed at once, and values as [head][pixel][channel], padded.
struct AttentionCache {
  int64_t heads, keys, values, padded, room;
  float *key, *value;

  AttentionCache(const Instruction& i, int64_t pixels, float* image)
      : heads(i.bias),
        keys(i.dy / heads),
        values(i.dx / heads),
        padded(round_up(values, kChannelBlock)),
        room(round_up(pixels, kChannelBlock)),
        key(image + i.extra),
        value(key + i.dy * room) {}

  float* keys_of(int64_t head) const { return key + head * keys * room; }
  float* values_of(int64_t head) const { return value + head * padded * room; }

  void put(int64_t head, int64_t pixel, const float* all_keys, const float* all_values) const {
    const int64_t lane = pixel % kChannelBlock;
    float* to = keys_of(head) + (pixel - lane) * keys + lane;
    for (int64_t k = 0; k < keys; ++k) to[k * kChannelBlock] = all_keys[head * keys + k];
    std::memcpy(values_of(head) + pixel * padded, all_values + head * values, values * sizeof(float));
  }
};

// score[pixel] = scale * query . key of the pixel, -infinity from `pixels` up to the end of a block -> the largest.
inline float attention_scores(const float* key, int64_t keys, const float* query, float scale, int64_t pixels,
                              float* score) {
  constexpr int kVectors = kChannelBlock / kF, kBlocks = kVectors >= 4 ? 1 : 4 / kVectors;
  VecF tops = splat(-INFINITY);
  const auto blocks = [&]<int N>(std::integral_constant<int, N>, int64_t pixel) FASTGEN_INLINE {
    VecF sums[N][kVectors] = {};
    const float* from = key + pixel * keys;
    for (int64_t k = 0; k < keys; ++k)
      unroll<N>([&](auto n) FASTGEN_INLINE {
        unroll<kVectors>([&](auto v) FASTGEN_INLINE {
          sums[n][v] += load(from + (n * keys + k) * kChannelBlock + v * kF) * query[k];
        });
      });
    unroll<N>([&](auto n) FASTGEN_INLINE {
      unroll<kVectors>([&](auto v) FASTGEN_INLINE {
        const int64_t at = pixel + n * kChannelBlock + v * kF;
        VecF scaled = sums[n][v] * scale;
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
template <int N>
void attention_values(const float* value, int64_t step, const float* weight, float scale, int64_t pixels, float* to,
                      int64_t count) {
  constexpr int kChains = 8 / N;
  VecF sums[kChains][N] = {};
  const auto add = [&](int64_t pixel, auto chain) FASTGEN_INLINE {
    unroll<N>([&](auto v) FASTGEN_INLINE { sums[chain][v] += load(value + pixel * step + v * kF) * weight[pixel]; });
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
inline void attend(const AttentionCache& cache, int64_t head, int64_t pixels, bool own, const float* queries,
                   float* results, float* score) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(cache.keys));
  float top = attention_scores(cache.keys_of(head), cache.keys, queries + head * cache.keys, scale, pixels, score);
  if (!own) top = std::max(top, 0.0f);
  VecF totals = {};
  for (int64_t pixel = 0; pixel < pixels; pixel += kF) {
    const VecF e = exp_any(load(score + pixel) - top);
    store(score + pixel, e);
    totals += e;
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
