// Two-dimensional convolutions, masked or not: the forward pass.
//
// Only live taps are computed. Pixels are packed channels last, so that the live taps of one kernel row read one
// stretch of memory, (taps x channels) long; output channels lie in the lanes. A block of sums, up to kPixels pixels of
// a row by two vectors of outputs, stays in registers while all stretches go by: for each input, two vectors of weights
// are loaded and each pixel's value is broadcast. With a gate the two vectors are tanh and sigmoid of the same
// channels. Where the processor multiplies pairs of bfloat16, factors stay such, and two inputs are taken at once.
#pragma once

#include <array>

#include "conv_layout.h"

namespace fastgen {
namespace {

constexpr int kPixels = kVectorBytes == 64 ? 14 : kVectorRegisters == 32 ? 10 : 6;

// One part of a product: `count` inputs from a on, at least one, each with a row of b; of pairs an even number, whose
// rows alternate.
template <class S>
struct Stretch {
  const S *a, *b;
  int64_t count;
};

// tile[i] += sum over all stretches of a[i * stride + k] * b[k], or, if Across, a[i + k * stride] * b[k], for i < P;
// rows of tile and b are V vectors; what a fresh tile holds does not count. Not inlined: among other variables the
// compiler would keep sums in memory.
template <class T, class S, int P, int V, bool Across>
[[gnu::noinline]] void multiply_rows(T* tile, const Stretch<S>* stretch, int64_t stretches, int64_t stride,
                                     bool fresh) {
  constexpr int kL = kLanes<T>, kT = kTerms<T, S>;
  Vec<T> sum[P][V] = {};
  for (const Stretch<S>* end = stretch + stretches; stretch != end; ++stretch) {
    // three rows to a pointer, as far as addresses are free of arithmetic
    constexpr int kPointers = Across ? 1 : (P + 2) / 3;
    const S* a[kPointers];
    unroll<kPointers>([&](auto j) FASTGEN_INLINE { a[j] = stretch->a + 3 * j * stride; });
    const S* b = stretch->b;
    int64_t k = stretch->count;
    do {
      decltype(load_factors(b)) right[V];
      unroll<V>([&](auto v) FASTGEN_INLINE { right[v] = load_factors(b + v * kL * kT); });
      unroll<P>([&](auto i) FASTGEN_INLINE {
        const auto left = shared_factor(a[Across ? 0 : i / 3] + (Across ? i : i % 3 * stride));
        unroll<V>([&](auto v) FASTGEN_INLINE { sum[i][v] = add_product(sum[i][v], left, right[v]); });
      });
      unroll<kPointers>([&](auto j) FASTGEN_INLINE { a[j] += Across ? stride : kT; });
      b += V * kL * kT;
    } while ((k -= kT) > 0);
  }
  const auto each = [&](auto&& f) FASTGEN_INLINE {
    unroll<P>([&](auto i)
                  FASTGEN_INLINE { unroll<V>([&](auto v) FASTGEN_INLINE { f(tile + (i * V + v) * kL, sum[i][v]); }); });
  };
  if (!fresh) each([](T* to, Vec<T>& value) FASTGEN_INLINE { value += load(to); });
  each([](T* to, Vec<T>& value) FASTGEN_INLINE { store(to, value); });
}

template <class T, class S>
using MultiplyRows = void (*)(T*, const Stretch<S>*, int64_t, int64_t, bool);
template <class T, bool Across, class S = T>
MultiplyRows<T, S> multiply_rows_of(int64_t rows, int64_t vectors) {
  static constexpr auto table = []<int... P>(std::integer_sequence<int, P...>) {
    return std::array<std::array<MultiplyRows<T, S>, 2>, kPixels>{
        {{multiply_rows<T, S, P + 1, 1, Across>, multiply_rows<T, S, P + 1, 2, Across>}...}};
  }(std::make_integer_sequence<int, kPixels>{});
  return table[rows - 1][vectors - 1];
}

// f(first, count) for groups of at most kPixels of n, as equal as possible.
template <class F>
void for_each_group(int64_t n, F&& f) {
  const int64_t groups = (n + kPixels - 1) / kPixels;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * n / groups;
    f(first, (g + 1) * n / groups - first);
  }
}

// How many bands of rows an image is cut into: what a thread works on at once fits its cache, and threads get equal
// shares.
inline int64_t bands_of(const ConvShape& s, int64_t row_bytes) {
  constexpr int64_t kCache = 768 << 10;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t most = std::max<int64_t>(1, kCache / std::max<int64_t>(row_bytes, 1) - s.above() - s.below());
  int64_t bands = (s.height + most - 1) / most;
  while (bands < s.height && s.batch * bands < 4 * threads && s.batch * bands % threads) ++bands;
  return bands;
}

// The results; and the sums before a gate, kept for the backward pass if `kept` is not null.
template <class T, class S, class E>
void conv_forward(const ConvShape& s, const ConvTensors<E>& in, E* out, E* kept) {
  constexpr int64_t kL = kLanes<T>;
  const std::vector<TapRun> runs = s.runs();
  const Panels<T> panels{s.outs, s.gated()};
  const OwnVector<S> weights = pack_weights<T, S>(s, runs, panels, in.weight);
  const int64_t k = static_cast<int64_t>(weights.size()) / std::max<int64_t>(panels.lanes(), 1);
  const int64_t plane = s.height * s.width;
  const int64_t stored = Pixels<T, S>::stored(s.channels);
  const int64_t row = Pixels<T, S>::row_size(s.width, s.left(), s.right(), s.channels);
  const int64_t bands = bands_of(s, row * sizeof(S)), items = s.batch * bands;
  const int64_t workers = std::min<int64_t>(items, torch::stable::get_num_threads());
  for_each_worker(workers, [&](int64_t worker) {
    RowTile<T> rows(s.width);
    Pixels<T, S> x(s.width, s.left(), s.right(), s.channels, (s.height + bands - 1) / bands + s.above() + s.below());
    OwnVector<T> tile(rows.padded() * 2 * kL), gated(rows.padded() * kL);
    std::vector<Stretch<S>> stretches;
    for (int64_t item = worker * items / workers; item < (worker + 1) * items / workers; ++item) {
      const int64_t b = item / bands, first = item % bands * s.height / bands;
      const int64_t last = (item % bands + 1) * s.height / bands;
      x.pack(in.x + b * s.channels * plane, s.height, std::max<int64_t>(0, first - s.above()),
             std::min(s.height, last + s.below()), rows);
      for (int64_t panel = 0; panel < panels.count(); ++panel) {
        const int64_t vectors = panels.vectors(panel), width = vectors * kL;
        T bias[2 * kL] = {};
        for (int64_t i = 0; i < width; ++i) {
          const int64_t v = i / kL, o = panels.first(panel, v) + i % kL;
          if (i % kL >= panels.live(panel, v)) continue;
          if (in.bias) bias[i] = static_cast<T>(in.bias[o]);
          if (in.cond && in.cond_constant) bias[i] += static_cast<T>(in.cond[b * s.outs + o]);
        }
        const Vec<T> low = load(bias), high = load(bias + width - kL);
        for (int64_t y = first; y < last; ++y) {
          // both vectors by name: a loop over them would become a slow copy of strings
          for (T* to = tile.data(); to != tile.data() + s.width * width; to += width) {
            store(to, low);
            store(to + width - kL, high);
          }
          if (in.cond && !in.cond_constant)
            for (int64_t v = 0; v < vectors; ++v) {
              const int64_t o = panels.first(panel, v);
              rows.read(in.cond + (b * s.outs + o) * plane + y * s.width, plane, panels.live(panel, v));
              rows.add_to_tile(tile.data() + v * kL, width);
            }
          E* raw = s.gated() ? kept : out;  // the sums, where they are wanted
          for (int64_t v = 0; v < vectors && raw; ++v)
            rows.template expect<true>(raw + (b * s.outs + panels.first(panel, v)) * plane + y * s.width, plane,
                                       panels.live(panel, v));
          if (s.gated())
            rows.template expect<true>(out + (b * s.results() + panel * kL) * plane + y * s.width, plane,
                                       panels.live(panel, 0));
          for_each_group(s.width, [&](int64_t from, int64_t count) {
            stretches.clear();
            const S* w = weights.data() + k * panels.begin(panel);
            for (const TapRun& run : runs) {
              const int64_t n = run.count * stored;
              if (y + run.dy >= 0 && y + run.dy < s.height)
                stretches.push_back({x.at(y + run.dy, from + run.dx), w, n});
              w += n * width;
            }
            multiply_rows_of<T, false, S>(count, vectors)(tile.data() + from * width, stretches.data(),
                                                          static_cast<int64_t>(stretches.size()), stored, false);
          });
          if (s.activation == Activation::kRelu)
            for (T* at = tile.data(); at != tile.data() + s.width * width; at += kL) store(at, positive_part(load(at)));
          const auto write = [&](E* to, const T* from, int64_t ld, int64_t channels) {
            rows.from_tile(from, ld);
            rows.write(to + y * s.width, plane, channels);
          };
          for (int64_t v = 0; v < vectors && raw; ++v)
            write(raw + (b * s.outs + panels.first(panel, v)) * plane, tile.data() + v * kL, width,
                  panels.live(panel, v));
          if (!s.gated()) continue;
          for (int64_t i = 0; i < s.width; ++i)
            store(gated.data() + i * kL, gate(load(tile.data() + i * 2 * kL), load(tile.data() + (2 * i + 1) * kL)));
          write(out + (b * s.results() + panel * kL) * plane, gated.data(), kL, panels.live(panel, 0));
        }
      }
    }
  });
}

}  // namespace
}  // namespace fastgen
