// affine_coupling and its backward; arguments are checked in fastgen/ops/affine_coupling.py.
#include <numeric>

#include "functions.h"

namespace fastgen {
namespace {

enum class Scale : int64_t { kExp, kTanh, kSigmoid, kNone };
enum class Order : int64_t { kScaleShift, kShiftScale, kInterleaved };

// Values in a piece of work; the log-determinant is summed piece by piece, so that no thread or batch changes its bits.
constexpr int64_t kPiece = 4096;

// Where the values of a sample lie: `rows` stretches of `length` that are transformed, the others pass through.
struct Layout {
  int64_t samples, values, params;  // and those of a sample of x and of the parameters
  int64_t rows, length, active, passive, passive_values;
  int64_t scale, shift, row_stride;  // in the parameters
  int64_t mask_stride;

  Layout(const Tensor& x, const Tensor& parameters, const std::optional<Tensor>& mask, Scale kind, Order order,
         bool swap)
      : samples(x.size(0)), values(values_from(x, 1)), params(values_from(parameters, 1)) {
    const int64_t parts = kind == Scale::kNone ? 1 : 2, count = params / parts;
    const bool interleaved = order == Order::kInterleaved && parts == 2;
    const int64_t channels = parameters.size(1) / parts;
    rows = interleaved ? channels : 1;
    length = count / std::max<int64_t>(rows, 1);
    passive_values = values - count;
    active = swap ? 0 : passive_values;
    passive = swap ? count : 0;
    shift = parts == 2 && order == Order::kScaleShift ? count : 0;
    scale = order == Order::kScaleShift ? 0 : interleaved ? length : count;
    row_stride = interleaved ? 2 * length : 0;
    mask_stride = mask && mask->size(0) > 1 ? values : 0;
  }
  int64_t pieces_of_row() const { return (length + kPiece - 1) / kPiece; }
  int64_t pieces() const { return std::max<int64_t>(rows * pieces_of_row(), 1); }  // of a sample
};

struct Piece {
  int64_t sample, index, count;   // index: among all pieces
  int64_t x, scale, shift, mask;  // offsets
  int64_t passive, passive_count;
};

template <class F>
void for_each_piece(const Layout& at, F&& f) {
  const int64_t pieces = at.pieces(), of_row = std::max<int64_t>(at.pieces_of_row(), 1);
  share(at.samples * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / pieces, k = i % pieces, row = k / of_row, first = k % of_row * kPiece;
      const int64_t in_row = row * at.row_stride + first, from = at.passive_values * k / pieces;
      f(Piece{sample, i, std::min(kPiece, at.length - first), sample * at.values + at.active + row * at.length + first,
              sample * at.params + at.scale + in_row, sample * at.params + at.shift + in_row,
              sample * at.mask_stride + row * at.length + first, sample * at.values + at.passive + from,
              at.passive_values * (k + 1) / pieces - from});
    }
    fence_stores();
  });
}

template <class T>
using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
// Lanes whose values pass through: all bits set.
template <class T>
inline Vec<Bits<T>> passes(const bool* mask, int count) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  Bytes bytes{};
  std::memcpy(&bytes, mask, count);
  return __builtin_convertvector(bytes, Vec<Bits<T>>) != 0;
}
template <class T>
inline Vec<T> minus_abs(Vec<T> v) {
  return (Vec<T>)((Vec<Bits<T>>)v | std::numeric_limits<Bits<T>>::min());  // the sign's bit
}
template <class T>
inline Vec<T> first_lanes(Vec<T> v, int count) {
  for (int i = count; i < kLanes<T>; ++i) v[i] = T(0);
  return v;
}

template <class E>
void copy(const Out<E>& to, const E* from, int64_t count) {
  using T = ComputeType<E>;
  if (!to.past) {
    std::memcpy(static_cast<void*>(to.p), from, count * sizeof(E));
    return;
  }
  by_vectors<T>(count, [&](int64_t i, auto n) FASTGEN_INLINE { to.put(i, take(from + i, n), n); });
}

// Of the unconstrained scale s: the log of the scale, what x is multiplied with (the scale, or one over it), and the
// derivative of the log.
template <class T>
struct Scaling {
  Vec<T> log, factor, slope;
};
template <Scale kScale, bool kInverse, class T>
inline Scaling<T> scaling(Vec<T> s, T bound) {
  if constexpr (kScale == Scale::kExp) {
    return {s, exp_any(kInverse ? -s : s), splat(T(1))};
  } else if constexpr (kScale == Scale::kTanh) {
    const Vec<T> t = tanh_of(s / bound), log = bound * t;
    return {log, exp_any(kInverse ? -log : log), T(1) - t * t};
  } else {  // sigmoid(s + 2), from z = e^-|s + 2|, which never overflows
    const Vec<T> v = s + T(2), z = exp_any(minus_abs<T>(v)), r = T(1) / (T(1) + z);
    const Vec<T> log = (v < T(0) ? v : splat(T(0))) - log1p_unit(z);
    const Vec<T> factor = kInverse ? T(1) + exp_any(-v) : v < T(0) ? z * r : r;
    return {log, factor, v < T(0) ? r : z * r};
  }
}

template <class E, Scale kScale, bool kInverse>
void couple(const Layout& at, const Tensor& x, const Tensor& params, const bool* mask, ComputeType<E> bound,
            const Tensor& y, ComputeType<E>* log_det) {
  using T = ComputeType<E>;
  std::vector<double> partial(at.samples * at.pieces());
  for_each_piece(at, [&](const Piece& piece) {
    copy(Out<E>(y, piece.passive), data_of<E>(x) + piece.passive, piece.passive_count);
    const E *from = data_of<E>(x) + piece.x, *s = data_of<E>(params) + piece.scale,
            *t = data_of<E>(params) + piece.shift;
    const Out<E> to(y, piece.x);
    Vec<T> sum{};
    by_vectors<T>(piece.count, [&](int64_t i, auto n) FASTGEN_INLINE {
      const Vec<T> value = take(from + i, n), shift = take(t + i, n);
      Vec<T> result;
      if constexpr (kScale == Scale::kNone) {
        result = kInverse ? value - shift : value + shift;
        if (mask) result = passes<T>(mask + piece.mask + i, n) ? value : result;
      } else {
        const Scaling<T> scale = scaling<kScale, kInverse, T>(take(s + i, n), bound);
        result = kInverse ? (value - shift) * scale.factor : value * scale.factor + shift;
        Vec<T> log = scale.log;
        if (mask) {
          const auto through = passes<T>(mask + piece.mask + i, n);
          result = through ? value : result;
          log = through ? splat(T(0)) : log;
        }
        if constexpr (std::is_same_v<decltype(n), int>) log = first_lanes<T>(log, n);
        sum += log;
      }
      to.put(i, result, n);
    });
    double total = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) total += sum[lane];
    partial[piece.index] = total;
  });
  for (int64_t b = 0; b < at.samples; ++b) {
    const auto* first = partial.data() + b * at.pieces();
    const double total = std::accumulate(first, first + at.pieces(), 0.0);
    log_det[b] = static_cast<T>(kInverse ? 0.0 - total : total);
  }
}

// `kept` is x, in the inverse the result; `grad` the gradient of the result, `grad_log_det` (B,).
template <class E, Scale kScale, bool kInverse>
void uncouple(const Layout& at, const Tensor& grad, const ComputeType<E>* grad_log_det, const Tensor& kept,
              const Tensor& params, const bool* mask, ComputeType<E> bound, const Tensor& grad_x,
              const Tensor& grad_params) {
  using T = ComputeType<E>;
  for_each_piece(at, [&](const Piece& piece) {
    copy(Out<E>(grad_x, piece.passive), data_of<E>(grad) + piece.passive, piece.passive_count);
    const E *g = data_of<E>(grad) + piece.x, *v = data_of<E>(kept) + piece.x, *s = data_of<E>(params) + piece.scale;
    const Out<E> to_x(grad_x, piece.x), to_scale(grad_params, piece.scale), to_shift(grad_params, piece.shift);
    const T g_log_det = grad_log_det[piece.sample];
    by_vectors<T>(piece.count, [&](int64_t i, auto n) FASTGEN_INLINE {
      const Vec<T> gradient = take(g + i, n);
      Vec<T> of_x = gradient, of_scale{};
      if constexpr (kScale != Scale::kNone) {
        const Scaling<T> scale = scaling<kScale, kInverse, T>(take(s + i, n), bound);
        of_x = gradient * scale.factor;
        const Vec<T> value = take(v + i, n);
        of_scale = kInverse ? -(gradient * value + g_log_det) * scale.slope : (of_x * value + g_log_det) * scale.slope;
      }
      Vec<T> of_shift = kInverse ? -of_x : gradient;
      if (mask) {
        const auto through = passes<T>(mask + piece.mask + i, n);
        of_x = through ? gradient : of_x;
        of_scale = through ? splat(T(0)) : of_scale;
        of_shift = through ? splat(T(0)) : of_shift;
      }
      to_x.put(i, of_x, n);
      if constexpr (kScale != Scale::kNone) to_scale.put(i, of_scale, n);
      to_shift.put(i, of_shift, n);
    });
  });
}

// f with the kind of scale and the direction as constants.
template <class F>
void dispatch_scale(int64_t scale, bool inverse, F&& f) {
  unroll<4>([&](auto kind) {
    if (kind != scale) return;
    constexpr auto kScale = static_cast<Scale>(kind.value);
    inverse ? f(std::integral_constant<Scale, kScale>{}, std::true_type{})
            : f(std::integral_constant<Scale, kScale>{}, std::false_type{});
  });
}

std::tuple<Tensor, Tensor> affine_coupling(Tensor x, Tensor params, std::optional<Tensor> mask, int64_t scale,
                                           double bound, int64_t order, bool swap, bool inverse) {
  const Layout at(x, params, mask, static_cast<Scale>(scale), static_cast<Order>(order), swap);
  Tensor y = fresh_like(x), log_det;
  dispatch_float(x.scalar_type(), "affine_coupling", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    log_det = torch::stable::new_empty(x, {at.samples}, kTypeOf<T>);
    dispatch_scale(scale, inverse, [&](auto kind, auto back) {
      couple<E, kind.value, back.value>(at, x, params, data_of<bool>(mask), static_cast<T>(bound), y,
                                        static_cast<T*>(log_det.data_ptr()));
    });
  });
  return {y, log_det};
}

std::tuple<Tensor, Tensor> affine_coupling_backward(Tensor grad, Tensor grad_log_det, Tensor kept, Tensor params,
                                                    std::optional<Tensor> mask, int64_t scale, double bound,
                                                    int64_t order, bool swap, bool inverse) {
  const Layout at(kept, params, mask, static_cast<Scale>(scale), static_cast<Order>(order), swap);
  Tensor grad_x = fresh_like(kept), grad_params = fresh_like(params);
  dispatch_float(kept.scalar_type(), "affine_coupling", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    dispatch_scale(scale, inverse, [&](auto kind, auto back) {
      uncouple<E, kind.value, back.value>(at, grad, data_of<T>(grad_log_det), kept, params, data_of<bool>(mask),
                                          static_cast<T>(bound), grad_x, grad_params);
    });
  });
  return {grad_x, grad_params};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&fastgen::affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&fastgen::affine_coupling_backward));
}
