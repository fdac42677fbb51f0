// Convolutions with fewer products (Winograd; Lavin and Gray 2016), in tiles: the transforms and where they lie.
//
// In one dimension a patch of the inputs and the weights are polynomials; their values at some points are multiplied,
// and the outputs are read off the products. With values at 0, 1, -1 and infinity two outputs of three weights each, or
// three of two, cost four products: F(2, 3) and F(3, 2); with those at 0, 1 and infinity two outputs of two weights
// three: F(2, 2). Along both sides 16 products stand for 36, or 12 for 24. float32 loses no more than in a plain sum:
// all factors are 1 or 1/2. An output depends on no input that it does not see, save with F(3, 2): in the last bits, or
// if that is not finite.
//
// With stride 2 even and odd pixels are images of their own, phases, each seen by two weights of four a side; in the
// transpose they are the results. Channels lie in the lanes.
#pragma once

#include "simd.h"

namespace fastgen {
namespace {

// What a convolution does: 3x3; 4x4 with stride 2; the transpose of that; 2x3, the row above and that of the pixel, as
// vertical stacks do; and the transpose of that.
enum class Kind { kSame, kHalve, kDouble, kAbove, kBelow };

// One side of a tile.
template <int Taps, int Points>
struct Side {
  static constexpr int kTaps = Taps, kPoints = Points, kOutputs = Points + 1 - Taps;
};

template <Kind K>
struct Form {
  static constexpr bool kResamples = K == Kind::kHalve || K == Kind::kDouble;
  static constexpr bool kRows = K == Kind::kAbove || K == Kind::kBelow;
  using X = Side<kResamples ? 2 : 3, 4>;
  using Y = std::conditional_t<kRows, Side<2, 3>, X>;
  static constexpr int kTaps = Y::kTaps * X::kTaps, kPoints = Y::kPoints * X::kPoints;
  static constexpr int kIn = K == Kind::kHalve ? 2 : 1, kOut = K == Kind::kDouble ? 2 : 1;  // phases a side
  static constexpr int kInPhases = kIn * kIn, kOutPhases = kOut * kOut, kPhases = kInPhases * kOutPhases;
  static constexpr int kWidth = kResamples ? 4 : 3, kArea = kWidth * kWidth;  // of a kernel in memory
  static constexpr int kAbove = K == Kind::kBelow ? 0 : 1;                    // lines of a patch above its tile
};

// A patch's values at the points.
template <class V>
inline void at_points(V (&d)[4]) {
  const V first = d[0] - d[2], last = d[1] - d[3];
  const V sum = d[1] + d[2], difference = d[2] - d[1];
  d[0] = first, d[1] = sum, d[2] = difference, d[3] = last;
}
template <class V>
inline void at_points(V (&d)[3]) {
  d[0] = d[0] - d[1], d[2] = d[1] - d[2];
}
// The weights' values there, halved at 1 and -1.
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
// The outputs from the products, and its transpose, whose value at 1 is the sum of all.
template <class V>
inline void outputs_from_points(const V (&at)[4], V (&y)[2]) {
  y[0] = at[0] + at[1] + at[2], y[1] = at[1] - at[2] - at[3];
}
template <class V>
inline void outputs_from_points(const V (&at)[4], V (&y)[3]) {
  const V sum = at[1] + at[2];
  y[0] = at[0] + sum, y[1] = at[1] - at[2], y[2] = sum - at[3];
}
template <class V>
inline void outputs_from_points(const V (&at)[3], V (&y)[2]) {
  y[0] = at[0] + at[1], y[1] = at[1] - at[2];
}
template <class V>
inline void outputs_at_points(const V (&y)[2], V (&at)[4]) {
  at[0] = y[0], at[1] = y[0] + y[1], at[2] = y[0] - y[1], at[3] = -y[1];
}
template <class V>
inline void outputs_at_points(const V (&y)[3], V (&at)[4]) {
  const V ends = y[0] + y[2];
  at[0] = y[0], at[1] = ends + y[1], at[2] = ends - y[1], at[3] = -y[2];
}
template <class V>
inline void outputs_at_points(const V (&y)[2], V (&at)[3]) {
  at[0] = y[0], at[1] = y[0] + y[1], at[2] = -y[1];
}
// f transforms the columns of an array of vectors, then its rows.
template <class V, int Rows, int Columns, int ToRows, int ToColumns, class F>
inline void both_sides(const V (&from)[Rows][Columns], V (&to)[ToRows][ToColumns], F&& f) {
  V half[Columns][ToRows];
  unroll<Columns>([&](auto c) FASTGEN_INLINE {
    V column[Rows];
    unroll<Rows>([&](auto r) FASTGEN_INLINE { column[r] = from[r][c]; });
    f(column, half[c]);
  });
  unroll<ToRows>([&](auto r) FASTGEN_INLINE {
    V row[Columns];
    unroll<Columns>([&](auto c) FASTGEN_INLINE { row[c] = half[c][r]; });
    f(row, to[r]);
  });
}

}  // namespace
}  // namespace fastgen
