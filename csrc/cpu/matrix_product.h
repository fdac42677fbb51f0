// C = A B, or C + A B, of matrices with any strides, in registers: kTileRows rows by two vectors of columns, over
// kDepth terms at a time, for which B is packed into panels of two vectors.
#pragma once

#include <array>

#include "simd.h"

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

// The products of M rows of A with N vectors of a panel of B, added to `from`.
template <int M, int N, class T>
void product_tile(const T* a, int64_t down, int64_t right, const T* panel, int64_t depth, const T* from, T* to,
                  int64_t ld) {
  constexpr int64_t kL = kLanes<T>;
  Vec<T> sums[M][N] = {};
  for (int64_t k = 0; k < depth; ++k, a += right, panel += N * kL) {
    Vec<T> b[N];
    unroll<N>([&](auto v) FASTGEN_INLINE { b[v] = load(panel + v * kL); });
    unroll<M>([&](auto m) FASTGEN_INLINE {
      const T x = a[m * down];
      unroll<N>([&](auto v) FASTGEN_INLINE { sums[m][v] += b[v] * x; });
    });
  }
  unroll<M>([&](auto m) FASTGEN_INLINE {
    unroll<N>([&](auto v) FASTGEN_INLINE {
      store(to + m * ld + v * kL, from ? sums[m][v] + load(from + m * ld + v * kL) : sums[m][v]);
    });
  });
}
template <class T>
using ProductTile = void (*)(const T*, int64_t, int64_t, const T*, int64_t, const T*, T*, int64_t);
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
  for (int64_t c = 0; c < width; c += kL)
    for (int64_t i = 0; i < depth; i += kL) {
      for (int64_t j = 0; j < kL; ++j)
        load_row(square + j * kL, b.data + (first + c + j) * b.right + k + i,
                 c + j < count ? std::min(kL, depth - i) : 0, kL);
      transpose_square(square, kL, to + i * width + c, width);
    }
}

// Rows [first, last) and columns [begin, end) of C; bias is added to each row.
template <class T>
class MatrixProduct {
 public:
  static constexpr int64_t kL = kLanes<T>, kPanel = 2 * kL;

  MatrixProduct(int64_t depth, int64_t columns)
      : panels_(round_up(std::min(depth, kDepth), kL) * round_up(columns, kPanel)), edge_(2 * kTileRows * kPanel) {}

  void run(const Strided<T>& a, const Strided<T>& b, int64_t depth, T* c, int64_t ld, int64_t first, int64_t last,
           int64_t begin, int64_t end, const T* bias) {
    for (int64_t k = 0; k < std::max<int64_t>(depth, 1); k += kDepth) {
      const int64_t terms = std::min(kDepth, depth - k), panel_size = round_up(terms, kL) * kPanel;
      for (int64_t column = begin; column < end; column += kPanel)
        pack_panel(b, k, terms, column, std::min(kPanel, end - column), width_of(end - column),
                   panels_.data() + (column - begin) / kPanel * panel_size);
      for (int64_t block = first; block < last; block += kBlockRows)
        for (int64_t column = begin; column < end; column += kPanel)
          panel_of_rows(a, k, terms, panels_.data() + (column - begin) / kPanel * panel_size, c, ld, block,
                        std::min(block + kBlockRows, last), column, std::min(kPanel, end - column),
                        k > 0 ? nullptr : bias, k > 0);
    }
  }

 private:
  static int64_t width_of(int64_t columns) { return columns > kL ? kPanel : kL; }

  void panel_of_rows(const Strided<T>& a, int64_t k, int64_t terms, const T* panel, T* c, int64_t ld, int64_t first,
                     int64_t last, int64_t column, int64_t count, const T* bias, bool more) {
    const int64_t width = width_of(count);
    const auto& tiles = width == kPanel ? kProductTiles<T, 2> : kProductTiles<T, 1>;
    const bool whole = count == width && !bias;
    for (int64_t row = first; row < last;) {
      const int64_t left = last - row, m = std::min<int64_t>(left, kTileRows);
      T* to = c + row * ld + column;
      const T* from = a.data + row * a.down + k * a.right;
      if (whole) {
        tiles[m - 1](from, a.down, a.right, panel, terms, more ? to : nullptr, to, ld);
      } else {
        T *before = edge_.data(), *after = before + kTileRows * kPanel;
        for (int64_t i = 0; i < m; ++i)
          load_row(before + i * width, more ? to + i * ld : bias + column, bias || more ? count : 0, width);
        tiles[m - 1](from, a.down, a.right, panel, terms, before, after, width);
        for (int64_t i = 0; i < m; ++i) store_row(to + i * ld, after + i * width, count);
      }
      row += m;
    }
  }

  OwnVector<T> panels_, edge_;
};

// The same, divided among the threads by columns, and where there are few, by rows.
template <class T>
void matrix_product(const Strided<T>& a, const Strided<T>& b, int64_t rows, int64_t columns, int64_t depth, T* c,
                    const T* bias) {
  constexpr int64_t kPanel = MatrixProduct<T>::kPanel;
  const int64_t panels = (columns + kPanel - 1) / kPanel, threads = torch::stable::get_num_threads();
  const int64_t across = std::min(threads, std::max<int64_t>(panels / 2, 1)),
                down = std::max<int64_t>(threads / across, 1);
  for_each_worker(across * down, [&](int64_t i) {
    const int64_t x = i % across, y = i / across;
    const int64_t begin = x * panels / across * kPanel, end = std::min((x + 1) * panels / across * kPanel, columns);
    const int64_t first = y * rows / down, last = (y + 1) * rows / down;
    if (first == last || begin == end) return;
    MatrixProduct<T>(depth, end - begin).run(a, b, depth, c, columns, first, last, begin, end, bias);
  });
}

}  // namespace
}  // namespace fastgen
