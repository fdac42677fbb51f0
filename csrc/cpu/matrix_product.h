// C = A B, or C + A B, of matrices with any strides, in registers: kTileRows rows by two vectors of columns, over
// kDepth terms at a time, for which B is packed into panels of two vectors.
#pragma once

#include <array>

#include "functions.h"

namespace fastgen {
namespace {

constexpr int kTileRows = kVectorRegisters == 32 ? 12 : 6;
constexpr int64_t kDepth = 256;      // a panel of B stays in the nearest cache
constexpr int64_t kBlockRows = 192;  // so many rows of A in the next one

// A or B: element (row, column) lies at data[row * down + column * right].
template <class T>
struct Strided {
  const T* data;
  int64_t down, right;
};

// What is done to the sums beside: biases of columns and of rows, and max(., 0) at the end.
template <class T>
struct Finish {
  const T *column_bias = nullptr, *row_bias = nullptr;
  bool relu = false;
};

// The products of M rows of A with N vectors of a panel of B, and what is added: with `more` C itself.
template <int M, int N, class T>
void product_tile(const T* a, int64_t down, int64_t right, const T* panel, int64_t depth, bool more, T* c, int64_t ld,
                  const Finish<T>& finish) {
  constexpr int64_t kL = kLanes<T>;
  // rows of C lie far apart, and are waited for at the end: asked for now
  for (int64_t m = 0; m < M; ++m) own(c + m * ld, N * kL * sizeof(T));
  Vec<T> sums[M][N] = {};
  for (int64_t k = 0; k < depth; ++k, a += right, panel += N * kL) {
    Vec<T> b[N];
    unroll<N>([&](auto v) FASTGEN_INLINE { b[v] = load(panel + v * kL); });
    unroll<M>([&](auto m) FASTGEN_INLINE {
      const auto x = shared_factor(a + m * down);
      unroll<N>([&](auto v) FASTGEN_INLINE { sums[m][v] += x * b[v]; });
    });
  }
  const auto each = [&](auto&& f) FASTGEN_INLINE {
    unroll<M>([&](auto m) FASTGEN_INLINE { unroll<N>([&](auto v) FASTGEN_INLINE { f(sums[m][v], m, v); }); });
  };
  if (more) each([&](Vec<T>& sum, auto m, auto v) FASTGEN_INLINE { sum += load(c + m * ld + v * kL); });
  if (finish.column_bias)
    each([&](Vec<T>& sum, auto, auto v) FASTGEN_INLINE { sum += load(finish.column_bias + v * kL); });
  if (finish.row_bias) each([&](Vec<T>& sum, auto m, auto) FASTGEN_INLINE { sum += finish.row_bias[m]; });
  if (finish.relu) each([&](Vec<T>& sum, auto, auto) FASTGEN_INLINE { sum = positive_part(sum); });
  each([&](Vec<T>& sum, auto m, auto v) FASTGEN_INLINE { store(c + m * ld + v * kL, sum); });
}
template <class T>
using ProductTile = void (*)(const T*, int64_t, int64_t, const T*, int64_t, bool, T*, int64_t, const Finish<T>&);
template <class T, int N, int... M>
constexpr std::array<ProductTile<T>, kTileRows> product_tiles(std::integer_sequence<int, M...>) {
  return {product_tile<M + 1, N, T>...};
}
template <class T, int N>
constexpr auto kProductTiles = product_tiles<T, N>(std::make_integer_sequence<int, kTileRows>{});

// Columns [first, first + count) of B, rows [k, k + depth), as one panel; zeros in the columns that are not there.
template <class T>
void pack_panel(const Strided<T>& b, int64_t k, int64_t depth, int64_t first, int64_t count, int64_t width, T* to) {
  constexpr int64_t kL = kLanes<T>;
  if (b.right == 1) {
    for (int64_t i = 0; i < depth; ++i) load_row(to + i * width, b.data + (k + i) * b.down + first, count, width);
    return;
  }
  T square[kL * kL];
  for (int64_t c = 0; c < width; c += kL) {
    const T* from = b.data + (first + c) * b.right + k;
    int64_t i = 0;
    for (; c + kL <= count && i + kL <= depth; i += kL) transpose_square(from + i, b.right, to + i * width + c, width);
    for (; i < depth; i += kL) {
      for (int64_t j = 0; j < kL; ++j)
        load_row(square + j * kL, from + j * b.right + i, c + j < count ? std::min(kL, depth - i) : 0, kL);
      transpose_square(square, kL, to + i * width + c, width);
    }
  }
}

// Rows of A, one tile of them after another, the rows of each term side by side.
template <class T>
void pack_rows(const Strided<T>& a, int64_t rows, int64_t terms, T* to) {
  constexpr int64_t kL = kLanes<T>;
  T square[kL * kL];
  for (int64_t row = 0; row < rows; row += kTileRows, to += kTileRows * terms) {
    const int64_t left = rows - row, count = std::min<int64_t>(kTileRows, left);
    const T* from = a.data + row * a.down;
    for (int64_t k = 0; a.right != 1 && k < terms; ++k)
      for (int64_t i = 0; i < count; ++i) to[k * kTileRows + i] = from[i * a.down + k * a.right];
    if (a.right != 1) continue;
    // lanes that are no rows of the tile are written before what belongs there
    for (int64_t k = 0; k < terms; k += kL)
      for (int64_t i = (kTileRows - 1) / kL * kL; i >= 0; i -= kL) {
        const bool whole = i + kL <= left && k + kL <= terms;
        for (int64_t j = 0; !whole && j < kL; ++j)
          load_row(square + j * kL, from + (i + j) * a.down + k, i + j < count ? std::min(kL, terms - k) : 0, kL);
        transpose_square(whole ? from + i * a.down + k : square, whole ? a.down : kL,
                         [&](auto j, Vec<T> term) FASTGEN_INLINE {
                           if (k + j < terms) store(to + (k + j) * kTileRows + i, term);
                         });
      }
  }
}

// Rows [first, last) and columns [begin, end) of C, by one thread.
template <class T>
class MatrixProduct {
 public:
  static constexpr int64_t kL = kLanes<T>, kPanel = 2 * kL;

  MatrixProduct(int64_t depth, int64_t columns)
      : panels_(round_up(std::min(depth, kDepth), kL) * round_up(columns, kPanel)), edge_((kTileRows + 1) * kPanel) {}

  // add: to what C holds.
  void run(const Strided<T>& a, const Strided<T>& b, int64_t depth, T* c, int64_t ld, int64_t first, int64_t last,
           int64_t begin, int64_t end, const Finish<T>& finish = {}, bool add = false) {
    const bool packs = end - begin >= kOften && std::max(a.down, a.right) * int64_t{sizeof(T)} >= kFar;
    const int64_t parts = std::max<int64_t>((depth + kDepth - 1) / kDepth, 1);
    const int64_t part = round_up((depth + parts - 1) / parts, kL);  // alike: each costs a pass over C
    for (int64_t k = 0; k < std::max<int64_t>(depth, 1); k += std::max<int64_t>(part, 1)) {
      const int64_t terms = std::min(part, depth - k), panel_size = round_up(terms, kL) * kPanel;
      for (int64_t column = begin; column < end; column += kPanel)
        pack_panel(b, k, terms, column, std::min(kPanel, end - column), width_of(end - column),
                   panels_.data() + (column - begin) / kPanel * panel_size);
      const bool more = add || k > 0;
      const Finish<T> now{more ? nullptr : finish.column_bias, more ? nullptr : finish.row_bias,
                          finish.relu && k + part >= depth};
      for (int64_t block = first; block < last; block += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, last - block);
        Finish<T> of_rows = now;
        if (now.row_bias) of_rows.row_bias += block;
        Rows of_block{{a.data + block * a.down + k * a.right, a.down, a.right}, a.down};
        if (packs) {
          rows_.resize(round_up(rows, kTileRows) * terms + kL);
          pack_rows(of_block.a, rows, terms, rows_.data());
          of_block = {{rows_.data(), 1, kTileRows}, terms};
        }
        for (int64_t column = begin; column < end; column += kPanel)
          rows_of_panel(of_block, rows, terms, panels_.data() + (column - begin) / kPanel * panel_size,
                        c + block * ld + column, ld, column, std::min(kPanel, end - column), of_rows, more);
      }
    }
  }

 private:
  // A is packed where it is read for so many columns that it pays, and its rows, or terms, lie a page apart: they take
  // each other's places in the caches.
  static constexpr int64_t kOften = 16 * kPanel, kFar = 4096;

  // Some rows of A: a tile's are `step` times their number from the first one's.
  struct Rows {
    Strided<T> a;
    int64_t step;
  };

  static int64_t width_of(int64_t columns) { return columns > kL ? kPanel : kL; }

  void rows_of_panel(const Rows& of, int64_t count_rows, int64_t terms, const T* panel, T* c, int64_t ld,
                     int64_t column, int64_t count, Finish<T> finish, bool more) {
    const int64_t width = width_of(count);
    const auto& tiles = width == kPanel ? kProductTiles<T, 2> : kProductTiles<T, 1>;
    T *edge = edge_.data(), *bias = edge + kTileRows * kPanel;
    if (finish.column_bias) {
      load_row(bias, finish.column_bias + column, count, width);
      finish.column_bias = bias;
    }
    for (int64_t row = 0; row < count_rows; row += kTileRows) {
      const int64_t rows = std::min<int64_t>(count_rows - row, kTileRows);
      const bool whole = count == width;
      Finish<T> of_tile = finish;
      if (finish.row_bias) of_tile.row_bias += row;
      T* to = c + row * ld;
      for (int64_t i = 0; !whole && more && i < rows; ++i) load_row(edge + i * width, to + i * ld, count, width);
      tiles[rows - 1](of.a.data + row * of.step, of.a.down, of.a.right, panel, terms, more, whole ? to : edge,
                      whole ? ld : width, of_tile);
      for (int64_t i = 0; !whole && i < rows; ++i) store_row(to + i * ld, edge + i * width, count);
    }
  }

  RawVector<T> panels_, rows_, edge_;
};

// f(first row, last row, first column, last column) for a part of the product for each thread: of its columns, and
// where there are few, of its rows.
template <class T, class F>
void share_product(int64_t rows, int64_t columns, F&& f) {
  constexpr int64_t kPanel = MatrixProduct<T>::kPanel;
  const int64_t panels = (columns + kPanel - 1) / kPanel, threads = torch::stable::get_num_threads();
  const int64_t across = std::min(threads, std::max<int64_t>(panels / 2, 1));
  const int64_t down = std::min(std::max<int64_t>(threads / across, 1), std::max<int64_t>(rows, 1));
  for_each_worker(across * down, [&](int64_t i) {
    const int64_t x = i % across, y = i / across;
    const int64_t begin = x * panels / across * kPanel, end = std::min((x + 1) * panels / across * kPanel, columns);
    if (begin < end) f(y * rows / down, (y + 1) * rows / down, begin, end);
  });
}

}  // namespace
}  // namespace fastgen
