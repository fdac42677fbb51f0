// Convolutions with fewer products (Winograd; Lavin and Gray 2016), in tiles of a few results: the transforms.
//
// In one dimension a patch of the inputs and the weights are polynomials; their values at some points are multiplied,
// and the results are read off the products. With values at 0, 1, -1 and infinity two results of three weights each, or
// three of two, cost four products: F(2, 3) and F(3, 2); with those at 0, 1 and infinity two results of two weights
// three: F(2, 2). Along both sides numbers of products are multiplied: 16 stand for 36, 12 for 24, 9 for 16. All
// factors are 1 or 1/2: float32 loses about what it does in a plain sum, measured by the largest inputs and weights
// that a result sees. It depends on no others, save with F(3, 2): there its error is that of the largest of its patch.
#pragma once

#include "simd.h"

namespace fastgen {
namespace {

// What a convolution does: 3x3; 4x4 with stride 2; the transpose of that; and under masks the row above and that of the
// pixel, 2x3, as vertical stacks see them; 3x3 in raster order; and the gradients of these, which see what lies behind.
enum class Kind { kSame, kHalve, kDouble, kAbove, kBelow, kRaster, kRasterBack };

// A patch's values at the points.
template <class V>
inline void patch_at_points(const V (&d)[4], V (&at)[4]) {
  at[0] = d[0] - d[2], at[1] = d[1] + d[2], at[2] = d[2] - d[1], at[3] = d[1] - d[3];
}
template <class V>
inline void patch_at_points(const V (&d)[3], V (&at)[3]) {
  at[0] = d[0] - d[1], at[1] = d[1], at[2] = d[1] - d[2];
}
// The weights' values there, halved at 1 and -1 where both are.
template <class V>
inline void weights_at_points(const V (&w)[3], V (&at)[4]) {
  const V ends = w[0] + w[2];
  at[0] = w[0], at[1] = (ends + w[1]) * 0.5f, at[2] = (ends - w[1]) * 0.5f, at[3] = w[2];
}
template <class V>
inline void weights_at_points(const V (&w)[2], V (&at)[4]) {
  at[0] = w[0], at[1] = (w[0] + w[1]) * 0.5f, at[2] = (w[0] - w[1]) * 0.5f, at[3] = w[1];
}
template <class V>
inline void weights_at_points(const V (&w)[2], V (&at)[3]) {
  at[0] = w[0], at[1] = w[0] + w[1], at[2] = w[1];
}
// Its transpose: the weights' gradients from those at the points.
template <class V>
inline void weights_from_points(const V (&at)[4], V (&w)[3]) {
  const V sum = (at[1] + at[2]) * 0.5f;
  w[0] = at[0] + sum, w[1] = (at[1] - at[2]) * 0.5f, w[2] = sum + at[3];
}
template <class V>
inline void weights_from_points(const V (&at)[4], V (&w)[2]) {
  w[0] = at[0] + (at[1] + at[2]) * 0.5f, w[1] = (at[1] - at[2]) * 0.5f + at[3];
}
template <class V>
inline void weights_from_points(const V (&at)[3], V (&w)[2]) {
  w[0] = at[0] + at[1], w[1] = at[1] + at[2];
}
// The results from the products.
template <class V>
inline void results_from_points(const V (&at)[4], V (&y)[2]) {
  y[0] = at[0] + at[1] + at[2], y[1] = at[1] - at[2] - at[3];
}
template <class V>
inline void results_from_points(const V (&at)[4], V (&y)[3]) {
  const V sum = at[1] + at[2];
  y[0] = at[0] + sum, y[1] = at[1] - at[2], y[2] = sum - at[3];
}
template <class V>
inline void results_from_points(const V (&at)[3], V (&y)[2]) {
  y[0] = at[0] + at[1], y[1] = at[1] - at[2];
}
// Its transpose: the products' gradients.
template <class V>
inline void results_at_points(const V (&y)[2], V (&at)[4]) {
  at[0] = y[0], at[1] = y[0] + y[1], at[2] = y[0] - y[1], at[3] = -y[1];
}
template <class V>
inline void results_at_points(const V (&y)[3], V (&at)[4]) {
  const V ends = y[0] + y[2];
  at[0] = y[0], at[1] = ends + y[1], at[2] = ends - y[1], at[3] = -y[2];
}
template <class V>
inline void results_at_points(const V (&y)[2], V (&at)[3]) {
  at[0] = y[0], at[1] = y[0] + y[1], at[2] = -y[1];
}

// f transforms the columns of Rows x Columns vectors, then the rows, to ToRows x ToColumns.
template <int Rows, int Columns, int ToRows, int ToColumns, class V, class F>
inline void both_sides(const V* from, V* to, F&& f) {
  V half[Columns][ToRows];
  unroll<Columns>([&](auto c) FASTGEN_INLINE {
    V column[Rows];
    unroll<Rows>([&](auto r) FASTGEN_INLINE { column[r] = from[r * Columns + c]; });
    f(column, half[c]);
  });
  unroll<ToRows>([&](auto r) FASTGEN_INLINE {
    V row[Columns], out[ToColumns];
    unroll<Columns>([&](auto c) FASTGEN_INLINE { row[c] = half[c][r]; });
    f(row, out);
    unroll<ToColumns>([&](auto c) FASTGEN_INLINE { to[r * ToColumns + c] = out[c]; });
  });
}

// Taps of one side, and points: as many as inputs in a patch.
template <int Taps, int Points>
struct Side {
  static constexpr int kTaps = Taps, kPoints = Points, kResults = Points + 1 - Taps;
};

// A rectangle of taps: both sides' transforms.
template <class Y, class X>
struct Rectangle {
  static constexpr int kTaps = Y::kTaps * X::kTaps, kPoints = Y::kPoints * X::kPoints;
  static constexpr int kPatchY = Y::kPoints, kPatchX = X::kPoints, kResultsY = Y::kResults, kResultsX = X::kResults;

  template <class V>
  static void patch_at(const V* d, V* at) {
    both_sides<Y::kPoints, X::kPoints, Y::kPoints, X::kPoints>(
        d, at, [](const auto& from, auto& to) FASTGEN_INLINE { patch_at_points(from, to); });
  }
  template <class V>
  static void weights_at(const V* w, V* at) {
    both_sides<Y::kTaps, X::kTaps, Y::kPoints, X::kPoints>(
        w, at, [](const auto& from, auto& to) FASTGEN_INLINE { weights_at_points(from, to); });
  }
  template <class V>
  static void weights_from(const V* at, V* w) {
    both_sides<Y::kPoints, X::kPoints, Y::kTaps, X::kTaps>(
        at, w, [](const auto& from, auto& to) FASTGEN_INLINE { weights_from_points(from, to); });
  }
  template <class V>
  static void results_from(const V* at, V* y) {
    both_sides<Y::kPoints, X::kPoints, Y::kResults, X::kResults>(
        at, y, [](const auto& from, auto& to) FASTGEN_INLINE { results_from_points(from, to); });
  }
  template <class V>
  static void results_at(const V* y, V* at) {
    both_sides<Y::kResults, X::kResults, Y::kPoints, X::kPoints>(
        y, at, [](const auto& from, auto& to) FASTGEN_INLINE { results_at_points(from, to); });
  }
};

// The five taps up to the pixel, of 3x3 in raster order: 2x2 that end with the pixel as a rectangle, and the one above
// to the right by itself, for each of four results. Back, the order is that of the pixel and what lies behind.
template <bool Back>
struct RasterTaps {
  using Block = Rectangle<Side<2, 3>, Side<2, 3>>;
  static constexpr int kTaps = 5, kBlock = Block::kPoints, kPoints = kBlock + 4;
  static constexpr int kPatchY = 3, kPatchX = 4, kResultsY = 2, kResultsX = 2;
  static constexpr int kBlockX = Back ? 1 : 0, kAloneY = Back ? 1 : 0, kAloneX = Back ? 0 : 2;  // in a patch

  template <class V>
  static void patch_at(const V* d, V* at) {
    V block[kBlock];
    unroll<kBlock>([&](auto i) FASTGEN_INLINE { block[i] = d[i / 3 * kPatchX + i % 3 + kBlockX]; });
    Block::patch_at(block, at);
    unroll<4>([&](auto i) FASTGEN_INLINE { at[kBlock + i] = d[(i / 2 + kAloneY) * kPatchX + i % 2 + kAloneX]; });
  }
  template <class V>
  static void weights_at(const V* w, V* at) {
    const V block[4] = {w[0], w[1], w[3], w[4]};
    Block::weights_at(block, at);
    unroll<4>([&](auto i) FASTGEN_INLINE { at[kBlock + i] = w[2]; });
  }
  template <class V>
  static void weights_from(const V* at, V* w) {
    V block[4];
    Block::weights_from(at, block);
    w[0] = block[0], w[1] = block[1], w[3] = block[2], w[4] = block[3];
    w[2] = (at[kBlock] + at[kBlock + 1]) + (at[kBlock + 2] + at[kBlock + 3]);
  }
  template <class V>
  static void results_from(const V* at, V* y) {
    Block::results_from(at, y);
    unroll<4>([&](auto i) FASTGEN_INLINE { y[i] += at[kBlock + i]; });
  }
  template <class V>
  static void results_at(const V* y, V* at) {
    Block::results_at(y, at);
    unroll<4>([&](auto i) FASTGEN_INLINE { at[kBlock + i] = y[i]; });
  }
};

// The taps of a kind, where its patches begin, and how kernels lie in memory. With stride 2 even and odd pixels are
// images of their own, phases, each seen by two weights of four a side; in the transpose they are the results.
template <Kind K>
struct Form;

template <class Taps, int Width, int Above, int In = 1, int Out = 1>
struct FormOf : Taps {
  static constexpr int kArea = Width * Width;  // of a kernel in memory
  static constexpr int kAbove = Above;         // lines of a patch above its tile; to the left lies one column
  static constexpr int kIn = In, kOut = Out;   // phases a side
  static constexpr int kInPhases = In * In, kOutPhases = Out * Out, kPhases = kInPhases * kOutPhases;

  // A tap's place in a kernel; those of a phase lie a pixel apart.
  static constexpr int place(int phase, int tap) {
    if constexpr (kPhases == 1) return tap;
    return (phase / 2 + tap / 2 * 2) * Width + phase % 2 + tap % 2 * 2;
  }
};

template <>
struct Form<Kind::kSame> : FormOf<Rectangle<Side<3, 4>, Side<3, 4>>, 3, 1> {};
template <>
struct Form<Kind::kHalve> : FormOf<Rectangle<Side<2, 4>, Side<2, 4>>, 4, 1, 2, 1> {};
template <>
struct Form<Kind::kDouble> : FormOf<Rectangle<Side<2, 4>, Side<2, 4>>, 4, 1, 1, 2> {};
template <>
struct Form<Kind::kAbove> : FormOf<Rectangle<Side<2, 3>, Side<3, 4>>, 3, 1> {};
template <>
struct Form<Kind::kBelow> : FormOf<Rectangle<Side<2, 3>, Side<3, 4>>, 3, 0> {};
template <>
struct Form<Kind::kRaster> : FormOf<RasterTaps<false>, 3, 1> {};
template <>
struct Form<Kind::kRasterBack> : FormOf<RasterTaps<true>, 3, 0> {};

}  // namespace
}  // namespace fastgen
