// causal_attention and its gradients; arguments are checked in fastgen/ops/causal_attention.py.
//
// Queries lie in the lanes: scores[key][query], so that each query's softmax is a lane's own and nothing is folded over
// lanes, and results[channel][query]. A tile is kTile keys by two vectors of queries. The gradients of keys and values
// are sums over queries: they take the tile's scalars, times rows of channels. A head is one thread's.
#include "functions.h"

namespace fastgen {
namespace {

constexpr int64_t kTile = 64;                 // keys at a time
constexpr int kGroup = kVectorRegisters / 4;  // rows of sums in registers, of two vectors each

// to[r * ld + c] = from[r * rows_apart + c * columns_apart]; zeros up to ld, which is a multiple of the lanes.
template <class T, class E>
void pack(const E* from, int64_t rows_apart, int64_t columns_apart, int64_t rows, int64_t columns, T* to, int64_t ld) {
  constexpr int64_t kL = kLanes<T>;
  if (rows_apart != 1 || columns_apart == 1) {
    for (int64_t r = 0; r < rows; ++r) {
      if (columns_apart == 1) {
        load_row(to + r * ld, from + r * rows_apart, columns, ld);
      } else {
        for (int64_t c = 0; c < columns; ++c)
          load_row(to + r * ld + c, from + r * rows_apart + c * columns_apart, 1, 1);
        std::fill(to + r * ld + columns, to + (r + 1) * ld, T(0));
      }
    }
    return;
  }
  T square[kL * kL];
  for (int64_t r = 0; r < rows; r += kL)
    for (int64_t c = 0; c < ld; c += kL) {
      for (int64_t i = 0; i < kL; ++i)
        load_row(square + i * kL, from + r + (c + i) * columns_apart, c + i < columns ? std::min(kL, rows - r) : 0, kL);
      transpose_square(square, kL, to + r * ld + c, ld);
    }
}

// The reverse: to[r * rows_apart + c * columns_apart] = from[r * ld + c].
template <class T, class E>
void unpack(const T* from, int64_t ld, int64_t rows, int64_t columns, E* to, int64_t rows_apart,
            int64_t columns_apart) {
  constexpr int64_t kL = kLanes<T>;
  if (columns_apart == 1) {
    for (int64_t r = 0; r < rows; ++r) store_row(to + r * rows_apart, from + r * ld, columns);
    return;
  }
  T square[kL * kL];
  for (int64_t r = 0; r < rows; r += kL)
    for (int64_t c = 0; c < columns; c += kL) {
      transpose_square(from + r * ld + c, ld, square, kL);
      for (int64_t i = 0; i < std::min(kL, columns - c); ++i)
        store_row(to + r * rows_apart + (c + i) * columns_apart, square + i * kL, std::min(kL, rows - r));
    }
}

// (B, heads, T, channels) with any strides.
template <class E>
struct View {
  E* data;
  int64_t apart[4], channels;

  explicit View(const Tensor& t)
      : data(static_cast<E*>(t.data_ptr())),
        apart{t.stride(0), t.stride(1), t.stride(2), t.stride(3)},
        channels(t.size(3)) {}
  E* head(int64_t batch, int64_t head) const { return data + batch * apart[0] + head * apart[1]; }
};

struct AttentionShape {
  int64_t batch, heads, time, keys, values;
  bool own;  // whether a query attends to its own place, or to a key and a value of zeros instead

  int64_t visible(int64_t queries) const { return own ? queries : queries - 1; }
};

// One head at a time, of one thread.
template <class T, class E>
class Attention {
 public:
  static constexpr int64_t kL = kLanes<T>, kQueries = 2 * kL;

  Attention(const AttentionShape& s, bool backward)
      : s_(s),
        scale_(1 / std::sqrt(static_cast<T>(s.keys))),
        padded_(round_up(s.time, std::max<int64_t>(kTile, kQueries)) + kL),  // rows on different sets of the cache
        key_ld_(round_up(s.keys, std::max<int64_t>(kL, kGroup))),
        value_ld_(round_up(s.values, std::max<int64_t>(kL, kGroup))),
        queries_t_(key_ld_ * padded_),
        keys_(padded_ * key_ld_),
        values_(padded_ * value_ld_),
        weights_(kTile * kQueries),
        sums_(std::max(key_ld_, value_ld_) * kQueries) {
    if (!backward) return;
    queries_.resize(padded_ * key_ld_);
    grads_.resize(padded_ * value_ld_);
    grads_t_.resize(value_ld_ * padded_);
    results_t_.resize(value_ld_ * padded_);
    deltas_.resize(padded_);
    of_scores_.resize(kTile * kQueries);
    of_keys_.resize(padded_ * key_ld_);
    of_values_.resize(padded_ * value_ld_);
  }

  // stats: the largest score of each query, then 1 / the sum of its weights.
  void forward(const View<const E>& q, const View<const E>& k, const View<const E>& v, const View<E>& out, T* stats,
               int64_t batch, int64_t head) {
    read(q, k, v, batch, head);
    for (int64_t first = 0; first < s_.time; first += kQueries) {
      Vec<T> top[2], total[2];
      for (int i = 0; i < 2; ++i) {
        top[i] = splat(s_.own ? -static_cast<T>(INFINITY) : T(0));
        total[i] = splat(s_.own ? T(0) : T(1));
      }
      std::fill(sums_.begin(), sums_.end(), T(0));
      for_each_tile(first, [&](int64_t key, int64_t count) { forward_tile(first, key, count, top, total); });
      const int64_t queries = std::min(kQueries, s_.time - first);
      for (int i = 0; i < 2; ++i) {
        const Vec<T> share = T(1) / total[i];
        for (int64_t c = 0; c < s_.values; ++c) scale_by(sums_.data() + c * kQueries + i * kL, share);
        const auto lanes = static_cast<int>(std::clamp<int64_t>(queries - i * kL, 0, kL));
        store_some(stats + first + i * kL, top[i], lanes);
        store_some(stats + s_.time + first + i * kL, share, lanes);
      }
      unpack(sums_.data(), kQueries, s_.values, queries, out.head(batch, head) + first * out.apart[2], out.apart[3],
             out.apart[2]);
    }
  }

  void backward(const View<const E>& grad, const View<const E>& q, const View<const E>& k, const View<const E>& v,
                const View<const E>& out, const T* stats, const View<E>& grad_q, const View<E>& grad_k,
                const View<E>& grad_v, int64_t batch, int64_t head) {
    read(q, k, v, batch, head);
    const auto pack_head = [&](const View<const E>& x, bool by_channel, T* to, int64_t ld) {
      const E* from = x.head(batch, head);
      by_channel ? pack(from, x.apart[3], x.apart[2], x.channels, s_.time, to, ld)
                 : pack(from, x.apart[2], x.apart[3], s_.time, x.channels, to, ld);
    };
    pack_head(out, true, results_t_.data(), padded_);
    pack_head(grad, true, grads_t_.data(), padded_);
    std::fill(deltas_.begin(), deltas_.end(), T(0));
    for (int64_t c = 0; c < s_.values; ++c)
      for (int64_t t = 0; t < s_.time; ++t) deltas_[t] += grads_t_[c * padded_ + t] * results_t_[c * padded_ + t];
    pack_head(q, false, queries_.data(), key_ld_);
    for (T& x : queries_) x *= scale_;
    pack_head(grad, false, grads_.data(), value_ld_);
    std::fill(of_keys_.begin(), of_keys_.end(), T(0));
    std::fill(of_values_.begin(), of_values_.end(), T(0));
    for (int64_t first = 0; first < s_.time; first += kQueries) {
      const int64_t queries = std::min(kQueries, s_.time - first);
      std::fill_n(sums_.begin(), key_ld_ * kQueries, T(0));
      for_each_tile(first, [&](int64_t key, int64_t count) { backward_tile(first, queries, key, count, stats); });
      for (int64_t i = 0; i < s_.keys * kQueries; ++i) sums_[i] *= scale_;
      unpack(sums_.data(), kQueries, s_.keys, queries, grad_q.head(batch, head) + first * grad_q.apart[2],
             grad_q.apart[3], grad_q.apart[2]);
    }
    const auto unpack_head = [&](const T* from, int64_t ld, const View<E>& to) {
      unpack(from, ld, s_.time, to.channels, to.head(batch, head), to.apart[2], to.apart[3]);
    };
    unpack_head(of_keys_.data(), key_ld_, grad_k);
    unpack_head(of_values_.data(), value_ld_, grad_v);
  }

 private:
  void read(const View<const E>& q, const View<const E>& k, const View<const E>& v, int64_t batch, int64_t head) {
    pack(q.head(batch, head), q.apart[3], q.apart[2], s_.keys, s_.time, queries_t_.data(), padded_);
    for (int64_t i = 0; i < s_.keys * padded_; ++i) queries_t_[i] *= scale_;
    pack(k.head(batch, head), k.apart[2], k.apart[3], s_.time, s_.keys, keys_.data(), key_ld_);
    pack(v.head(batch, head), v.apart[2], v.apart[3], s_.time, s_.values, values_.data(), value_ld_);
  }

  // f(first key, keys) for the tiles of which some query of the block sees a part.
  template <class F>
  void for_each_tile(int64_t first, F&& f) const {
    const int64_t end = std::min(s_.visible(first + kQueries), s_.time);
    for (int64_t key = 0; key < end; key += kTile) f(key, std::min(kTile, end - key));
  }

  static void scale_by(T* p, Vec<T> factor) { store(p, load(p) * factor); }

  // sums[i][v] of kGroup rows: rows[i * row_ld + c] * columns[c * column_ld + v], over `channels`.
  static void multiply(const T* rows, int64_t row_ld, const T* columns, int64_t column_ld, int64_t channels,
                       Vec<T> (&sums)[kGroup][2]) {
    for (int64_t c = 0; c < channels; ++c) {
      const Vec<T> a = load(columns + c * column_ld), b = load(columns + c * column_ld + kL);
      unroll<kGroup>([&](auto i) FASTGEN_INLINE {
        const T x = rows[i * row_ld + c];
        sums[i][0] += a * x;
        sums[i][1] += b * x;
      });
    }
  }

  // Scores of kGroup keys, those that a query does not see at -infinity.
  [[gnu::always_inline]] void scores(int64_t first, int64_t key, Vec<T> (&s)[kGroup][2]) const {
    multiply(keys_.data() + key * key_ld_, key_ld_, queries_t_.data() + first, padded_, s_.keys, s);
    if (s_.visible(first + 1) >= key + kGroup) return;
    const Vec<T> none = splat(-static_cast<T>(INFINITY));
    Vec<T> lanes;
    for (int i = 0; i < kL; ++i) lanes[i] = static_cast<T>(i);
    unroll<kGroup>([&](auto i) FASTGEN_INLINE {
      unroll<2>([&](auto v) FASTGEN_INLINE {
        // query first + v * kL + lane sees the keys before visible(that + 1)
        const int64_t hidden = key + i - s_.visible(first + v * kL + 1) + 1;
        s[i][v] = lanes < static_cast<T>(hidden) ? none : s[i][v];
      });
    });
  }

  void forward_tile(int64_t first, int64_t key, int64_t count, Vec<T> (&top)[2], Vec<T> (&total)[2]) {
    Vec<T> before[2] = {top[0], top[1]};
    for (int64_t k = 0; k < count; k += kGroup) {
      Vec<T> s[kGroup][2] = {};
      scores(first, key + k, s);
      unroll<kGroup>([&](auto i) FASTGEN_INLINE {
        unroll<2>([&](auto v) FASTGEN_INLINE {
          store(weights_.data() + (k + i) * kQueries + v * kL, s[i][v]);
          top[v] = larger<T>(s[i][v], top[v]);
        });
      });
    }
    for (int i = 0; i < 2; ++i) {
      before[i] = exp_any(before[i] - top[i]);
      total[i] *= before[i];
    }
    for (int64_t k = 0; k < round_up(count, kGroup); ++k)
      for (int i = 0; i < 2; ++i) {
        T* at = weights_.data() + k * kQueries + i * kL;
        const Vec<T> e = exp_any(load(at) - top[i]);
        store(at, e);
        total[i] += e;
      }
    const int64_t seen = std::clamp<int64_t>(s_.visible(first + 1) - key, 0, count);  // by all queries
    const T* values = values_.data() + key * value_ld_;
    weigh(values, value_ld_, weights_.data(), seen, s_.values, before);
    if (seen == count) return;
    const Vec<T> ones[2] = {splat(T(1)), splat(T(1))};
    weigh<true>(values + seen * value_ld_, value_ld_, weights_.data() + seen * kQueries, count - seen, s_.values, ones);
  }

  // sums_[c] = sums_[c] * factor + rows[k * ld + c] * weights[k], over k < count. Chosen: what has no weight is left
  // out, NaN too.
  template <bool Chosen = false>
  void weigh(const T* rows, int64_t ld, const T* weights, int64_t count, int64_t channels, const Vec<T> (&factor)[2]) {
    for (int64_t c = 0; c < channels; c += kGroup) {
      Vec<T> sums[kGroup][2];
      T* at = sums_.data() + c * kQueries;
      unroll<kGroup>([&](auto i) FASTGEN_INLINE {
        unroll<2>([&](auto v) FASTGEN_INLINE { sums[i][v] = load(at + i * kQueries + v * kL) * factor[v]; });
      });
      for (int64_t k = 0; k < count; ++k) {
        const Vec<T> a = load(weights + k * kQueries), b = load(weights + k * kQueries + kL);
        unroll<kGroup>([&](auto i) FASTGEN_INLINE {
          const T x = rows[k * ld + c + i];
          if constexpr (Chosen) {
            const Vec<T> zero = {};
            sums[i][0] = a > zero ? sums[i][0] + a * x : sums[i][0];
            sums[i][1] = b > zero ? sums[i][1] + b * x : sums[i][1];
          } else {
            sums[i][0] += a * x;
            sums[i][1] += b * x;
          }
        });
      }
      unroll<kGroup>([&](auto i) FASTGEN_INLINE {
        unroll<2>([&](auto v) FASTGEN_INLINE { store(at + i * kQueries + v * kL, sums[i][v]); });
      });
    }
  }

  void backward_tile(int64_t first, int64_t queries, int64_t key, int64_t count, const T* stats) {
    const int64_t rows = round_up(count, kGroup);
    Vec<T> top[2], share[2], delta[2];
    for (int i = 0; i < 2; ++i) {
      const auto lanes = static_cast<int>(std::clamp<int64_t>(queries - i * kL, 0, kL));
      top[i] = load_some(stats + first + i * kL, lanes);
      share[i] = load_some(stats + s_.time + first + i * kL, lanes);  // zero beyond the last query
      delta[i] = load(deltas_.data() + first + i * kL);
    }
    for (int64_t k = 0; k < count; k += kGroup) {
      Vec<T> s[kGroup][2] = {}, d[kGroup][2] = {};
      scores(first, key + k, s);
      unroll<kGroup>([&](auto i) FASTGEN_INLINE {
        unroll<2>([&](auto v) FASTGEN_INLINE {
          s[i][v] = exp_any(s[i][v] - top[v]) * share[v];
          store(weights_.data() + (k + i) * kQueries + v * kL, s[i][v]);
        });
      });
      multiply(values_.data() + (key + k) * value_ld_, value_ld_, grads_t_.data() + first, padded_, s_.values, d);
      unroll<kGroup>([&](auto i) FASTGEN_INLINE {
        unroll<2>([&](auto v) FASTGEN_INLINE {
          const T* weight = weights_.data() + (k + i) * kQueries + v * kL;
          store(of_scores_.data() + (k + i) * kQueries + v * kL, (d[i][v] - delta[v]) * load(weight));
        });
      });
    }
    const Vec<T> ones[2] = {splat(T(1)), splat(T(1))};
    weigh(keys_.data() + key * key_ld_, key_ld_, of_scores_.data(), rows, s_.keys, ones);
    accumulate(of_scores_.data(), rows, queries_.data() + first * key_ld_, key_ld_, queries,
               of_keys_.data() + key * key_ld_);
    accumulate(weights_.data(), rows, grads_.data() + first * value_ld_, value_ld_, queries,
               of_values_.data() + key * value_ld_);
  }

  // to[k][c] += tile[k][query] * rows[query][c], over the queries.
  static void accumulate(const T* tile, int64_t count, const T* rows, int64_t ld, int64_t queries, T* to) {
    int64_t c = 0;
    for (; c + kQueries <= ld; c += kQueries) accumulate<2>(tile, count, rows + c, ld, queries, to + c);
    if (c < ld) accumulate<1>(tile, count, rows + c, ld, queries, to + c);
  }
  template <int N>
  static void accumulate(const T* tile, int64_t count, const T* rows, int64_t ld, int64_t queries, T* to) {
    for (int64_t k = 0; k < count; k += kGroup) {
      Vec<T> sums[kGroup][N];
      unroll<kGroup>([&](auto i) FASTGEN_INLINE {
        unroll<N>([&](auto v) FASTGEN_INLINE { sums[i][v] = load(to + (k + i) * ld + v * kL); });
      });
      for (int64_t query = 0; query < queries; ++query) {
        Vec<T> row[N];
        unroll<N>([&](auto v) FASTGEN_INLINE { row[v] = load(rows + query * ld + v * kL); });
        unroll<kGroup>([&](auto i) FASTGEN_INLINE {
          const T x = tile[(k + i) * kQueries + query];
          unroll<N>([&](auto v) FASTGEN_INLINE { sums[i][v] += row[v] * x; });
        });
      }
      unroll<kGroup>([&](auto i) FASTGEN_INLINE {
        unroll<N>([&](auto v) FASTGEN_INLINE { store(to + (k + i) * ld + v * kL, sums[i][v]); });
      });
    }
  }

  const AttentionShape s_;
  const T scale_;
  const int64_t padded_, key_ld_, value_ld_;
  OwnVector<T> queries_t_, keys_, values_;  // [channel][query], [key][channel]; queries are scaled
  OwnVector<T> weights_, sums_;             // of a tile, [key][query]; of a block of queries, [channel][query]
  OwnVector<T> queries_, grads_, grads_t_, results_t_, deltas_, of_scores_, of_keys_, of_values_;
};

// f(attention, batch, head) for all heads, divided among the threads.
template <class T, class E, class F>
void for_each_head(const AttentionShape& s, bool backward, F&& f) {
  share(s.batch * s.heads, [&](int64_t begin, int64_t end) {
    Attention<T, E> attention(s, backward);
    for (int64_t i = begin; i < end; ++i) f(attention, i / s.heads, i % s.heads);
  });
}

AttentionShape shape_of(const Tensor& q, const Tensor& v, bool own) {
  return {q.size(0), q.size(1), q.size(2), q.size(3), v.size(3), own};
}

// Memory for (B, heads, T, channels), with time innermost or as (B, T, heads, channels), and the view of it.
struct Made {
  Tensor memory, view;
  Made(const Tensor& like, int64_t channels, bool time_innermost)
      : memory(fresh(like, time_innermost ? std::vector<int64_t>{like.size(0), like.size(1), channels, like.size(2)}
                                          : std::vector<int64_t>{like.size(0), like.size(2), like.size(1), channels})),
        view(time_innermost ? torch::stable::transpose(memory, 2, 3) : torch::stable::transpose(memory, 1, 2)) {}
};

// -> results, and the statistics of the softmax (B, heads, 2, T).
std::tuple<Tensor, Tensor> causal_attention(Tensor q, Tensor k, Tensor v, bool own, bool time_innermost) {
  const AttentionShape s = shape_of(q, v, own);
  const Made out(q, s.values, time_innermost);
  const ScalarType kind = q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor stats = torch::stable::new_empty(q, std::vector<int64_t>{s.batch, s.heads, 2, s.time}, kind);
  if (out.memory.numel() == 0) return {out.memory, stats};
  dispatch_float(q.scalar_type(), "causal_attention", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    const View<const E> of_q(q), of_k(k), of_v(v);
    const View<E> to(out.view);
    for_each_head<T, E>(s, false, [&](Attention<T, E>& attention, int64_t batch, int64_t head) {
      T* at = static_cast<T*>(stats.data_ptr()) + (batch * s.heads + head) * 2 * s.time;
      attention.forward(of_q, of_k, of_v, to, at, batch, head);
    });
  });
  return {out.memory, stats};
}

std::tuple<Tensor, Tensor, Tensor> causal_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out,
                                                             Tensor stats, bool own, bool time_innermost) {
  const AttentionShape s = shape_of(q, v, own);
  const Made grad_q(q, s.keys, time_innermost), grad_k(q, s.keys, time_innermost), grad_v(q, s.values, time_innermost);
  if (out.numel() == 0) {
    for (const Made* made : {&grad_q, &grad_k, &grad_v})
      std::memset(made->memory.data_ptr(), 0, made->memory.numel() * made->memory.element_size());
    return {grad_q.memory, grad_k.memory, grad_v.memory};
  }
  dispatch_float(q.scalar_type(), "causal_attention", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    const View<const E> of_grad(grad), of_q(q), of_k(k), of_v(v), of_out(out);
    const View<E> to_q(grad_q.view), to_k(grad_k.view), to_v(grad_v.view);
    for_each_head<T, E>(s, true, [&](Attention<T, E>& attention, int64_t batch, int64_t head) {
      const T* at = data_of<T>(stats) + (batch * s.heads + head) * 2 * s.time;
      attention.backward(of_grad, of_q, of_k, of_v, of_out, at, to_q, to_k, to_v, batch, head);
    });
  });
  return {grad_q.memory, grad_k.memory, grad_v.memory};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("causal_attention", TORCH_BOX(&fastgen::causal_attention));
  m.impl("causal_attention_backward", TORCH_BOX(&fastgen::causal_attention_backward));
}
