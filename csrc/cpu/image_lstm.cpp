// image_lstm and its gradients; arguments are checked in fastgen/ops/image_lstm.py.
//
// A thread takes one image at a time and keeps it channels last, with zeros around: gates [pixel][gate][channel],
// states [pixel][channel]. The pixels of a line (a row, or a diagonal) lie a fixed step apart, so that what a line
// takes from the one before it is a product of matrices whose rows are pixels, added to the gates where they lie. A
// column of zeros or more on the left and on the right serves both kinds, as does a row of zeros above.
#include "matrix_product.h"

namespace fastgen {
namespace {

constexpr int kGates = 4;          // o, f, i, g
constexpr int64_t kChannels = 16;  // a multiple of them is stored, so that the size does not depend on the vectors'

struct LstmShape {
  int64_t batch, hidden, height, width, taps;
  bool diagonal;

  int64_t padded() const { return round_up(hidden, kChannels); }
  int64_t margin() const { return diagonal ? 1 : taps / 2; }
  int64_t row() const { return width + 2 * margin(); }
  int64_t places() const { return (height + 1) * row() + 2 * margin(); }  // of a state, with all that is read beside
  int64_t place(int64_t y, int64_t x) const { return (y + 1) * row() + margin() + x; }
  int64_t lines() const { return diagonal ? height + width - 1 : height; }
  int64_t step() const { return diagonal ? row() - 1 : 1; }  // from a pixel of a line to the next
  int64_t before() const { return diagonal ? -1 : -row(); }  // from a pixel to the one that its c comes from
  // From a pixel to the one that a tap reads.
  int64_t tap(int64_t k) const { return diagonal ? (k == 0 ? -row() : -1) : k - margin() - row(); }
  // f(first place, pixels) of a line.
  template <class F>
  void line(int64_t i, F&& f) const {
    if (!diagonal) return f(place(i, 0), width);
    const int64_t top = std::max<int64_t>(0, i - width + 1), bottom = std::min(i, height - 1);
    f(place(top, i - top), bottom - top + 1);
  }
};

template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp_any(-x));
}

// (B, channels, H, W) of E from and to places of `ld` values.
template <class T, class E>
class Planes {
 public:
  static constexpr int64_t kL = kLanes<T>;
  explicit Planes(const LstmShape& s) : s_(s) {}

  void read(const E* from, int64_t channels, T* to, int64_t ld) const {
    each_square(channels, [&](int64_t y, int64_t x, int64_t c) {
      T rows[kL * kL], pixels[kL * kL];
      for (int64_t i = 0; i < kL; ++i)
        load_row(rows + i * kL, from + at(y, x, c + i), c + i < channels ? std::min(kL, s_.width - x) : 0, kL);
      transpose_square(rows, kL, pixels, kL);
      for (int64_t i = 0; i < std::min(kL, s_.width - x); ++i)
        store(to + s_.place(y, x + i) * ld + c, load(pixels + i * kL));
    });
  }
  void write(const T* from, int64_t ld, int64_t channels, E* to) const {
    each_square(channels, [&](int64_t y, int64_t x, int64_t c) {
      T rows[kL * kL] = {}, pixels[kL * kL];
      for (int64_t i = 0; i < std::min(kL, s_.width - x); ++i)
        store(rows + i * kL, load(from + s_.place(y, x + i) * ld + c));
      transpose_square(rows, kL, pixels, kL);
      for (int64_t i = 0; i < std::min(kL, channels - c); ++i)
        store_row(to + at(y, x, c + i), pixels + i * kL, std::min(kL, s_.width - x));
    });
  }

 private:
  int64_t at(int64_t y, int64_t x, int64_t c) const { return (c * s_.height + y) * s_.width + x; }
  template <class F>
  void each_square(int64_t channels, F&& f) const {
    for (int64_t y = 0; y < s_.height; ++y)
      for (int64_t c = 0; c < channels; c += kL)
        for (int64_t x = 0; x < s_.width; x += kL) f(y, x, c);
  }

  const LstmShape& s_;
};

// Rows of A by all columns of a packed B, added to C.
template <class T>
class PackedProduct {
 public:
  static constexpr int64_t kL = kLanes<T>, kPanel = 2 * kL;
  // columns: a multiple of the lanes
  PackedProduct(const Strided<T>& b, int64_t depth, int64_t columns)
      : depth_(depth), columns_(columns), size_(round_up(depth, kL) * kPanel) {
    panels_.resize((columns + kPanel - 1) / kPanel * size_);
    for (int64_t c = 0; c < columns; c += kPanel)
      pack_panel(b, 0, depth, c, width(c), width(c), panels_.data() + c / kPanel * size_);
  }
  void add(const T* a, int64_t down, int64_t rows, T* c, int64_t ld) const {
    for (int64_t column = 0; column < columns_; column += kPanel)
      for (int64_t row = 0; row < rows; row += kTileRows) {
        const int64_t m = std::min<int64_t>(rows - row, kTileRows);
        const auto tile = width(column) == kPanel ? kProductTiles<T, 2>[m - 1] : kProductTiles<T, 1>[m - 1];
        tile(a + row * down, down, 1, panels_.data() + column / kPanel * size_, depth_, true, c + row * ld + column, ld,
             {});
      }
  }

 private:
  int64_t width(int64_t column) const { return std::min(columns_ - column, kPanel); }
  int64_t depth_, columns_, size_;
  OwnVector<T> panels_;
};

// The weight (4 H, H, taps) as [tap][gate][channel][state], padded: W, and what it is packed into.
template <class T>
struct LstmWeight {
  int64_t hidden, padded;
  OwnVector<T> data;

  template <class E>
  LstmWeight(const LstmShape& s, const E* weight)
      : hidden(s.hidden), padded(s.padded()), data(s.taps * kGates * padded * padded) {
    for (int64_t o = 0; o < kGates * hidden; ++o)
      for (int64_t c = 0; c < hidden; ++c)
        for (int64_t k = 0; k < s.taps; ++k)
          load_row(data.data() + (k * kGates * padded + o / hidden * padded + o % hidden) * padded + c,
                   weight + (o * hidden + c) * s.taps + k, 1, 1);
  }
  const T* tap(int64_t k) const { return data.data() + k * kGates * padded * padded; }
};

// What the forward pass keeps of an image: the gates, h and c.
template <class T>
struct Kept {
  int64_t padded, places;
  T *gates, *h, *c;
  static int64_t size(const LstmShape& s) { return s.places() * (kGates + 2) * s.padded(); }
  Kept(const LstmShape& s, T* memory)
      : padded(s.padded()),
        places(s.places()),
        gates(memory),
        h(gates + places * kGates * padded),
        c(h + places * padded) {}
};

template <class T, class E>
void lstm_forward(const LstmShape& s, const E* gates, const E* weight, E* out, T* kept) {
  constexpr int64_t kL = kLanes<T>;
  const LstmWeight<T> w(s, weight);
  const int64_t hp = w.padded, ld = kGates * hp, pixels = s.height * s.width;
  std::vector<PackedProduct<T>> taps;
  for (int64_t k = 0; k < s.taps; ++k) taps.emplace_back(Strided<T>{w.tap(k), 1, hp}, hp, ld);
  share(s.batch, [&](int64_t begin, int64_t end) {
    const Planes<T, E> planes(s);
    OwnVector<T> own(kept ? 0 : Kept<T>::size(s));
    for (int64_t b = begin; b < end; ++b) {
      const Kept<T> of(s, kept ? kept + b * Kept<T>::size(s) : own.data());
      std::fill_n(of.gates, Kept<T>::size(s), T(0));
      for (int64_t q = 0; q < kGates; ++q)
        planes.read(gates + (b * kGates + q) * s.hidden * pixels, s.hidden, of.gates + q * hp, ld);
      for (int64_t i = 0; i < s.lines(); ++i)
        s.line(i, [&](int64_t first, int64_t count) {
          for (int64_t k = 0; k < s.taps; ++k)
            taps[k].add(of.h + (first + s.tap(k)) * hp, s.step() * hp, count, of.gates + first * ld, s.step() * ld);
          for (int64_t n = 0, p = first; n < count; ++n, p += s.step())
            for (int64_t c = 0; c < hp; c += kL) {
              T* z = of.gates + p * ld + c;
              const Vec<T> o = sigmoid<T>(load(z)), f = sigmoid<T>(load(z + hp)), g = tanh_of(load(z + 3 * hp));
              const Vec<T> in = sigmoid<T>(load(z + 2 * hp)), now = f * load(of.c + (p + s.before()) * hp + c) + in * g;
              store(z, o), store(z + hp, f), store(z + 2 * hp, in), store(z + 3 * hp, g);
              store(of.c + p * hp + c, now);
              store(of.h + p * hp + c, o * tanh_of(now));
            }
        });
      planes.write(of.h, hp, s.hidden, out + b * s.hidden * pixels);
    }
  });
}

// kept: what the forward pass kept. of_weight: (4 H, H, taps).
template <class T, class E>
void lstm_backward(const LstmShape& s, const E* grad, const E* weight, const T* kept, E* of_gates, T* of_weight) {
  constexpr int64_t kL = kLanes<T>;
  const LstmWeight<T> w(s, weight);
  const int64_t hp = w.padded, ld = kGates * hp, pixels = s.height * s.width, tap_size = ld * hp;
  std::vector<PackedProduct<T>> taps;
  for (int64_t k = 0; k < s.taps; ++k) taps.emplace_back(Strided<T>{w.tap(k), hp, 1}, ld, hp);
  const int64_t workers = std::min<int64_t>(s.batch, torch::stable::get_num_threads());
  OwnVector<T> sums(workers * s.taps * tap_size);
  for_each_worker(workers, [&](int64_t worker) {
    const Planes<T, E> planes(s);
    OwnVector<T> d(s.places() * ld), of_h(s.places() * hp), of_c(s.places() * hp);
    MatrixProduct<T> product(s.height * s.row(), hp);
    for (int64_t b = worker * s.batch / workers, start = b; b < (worker + 1) * s.batch / workers; ++b) {
      const Kept<T> of(s, const_cast<T*>(kept) + b * Kept<T>::size(s));
      std::fill(of_h.begin(), of_h.end(), T(0));
      std::fill(of_c.begin(), of_c.end(), T(0));
      planes.read(grad + b * s.hidden * pixels, s.hidden, of_h.data(), hp);
      for (int64_t i = s.lines(); i-- > 0;)
        s.line(i, [&](int64_t first, int64_t count) {
          for (int64_t n = 0, p = first; n < count; ++n, p += s.step())
            for (int64_t c = 0; c < hp; c += kL) {
              const T* z = of.gates + p * ld + c;
              const Vec<T> o = load(z), f = load(z + hp), in = load(z + 2 * hp), g = load(z + 3 * hp);
              const Vec<T> t = tanh_of(load(of.c + p * hp + c)), dh = load(of_h.data() + p * hp + c);
              const Vec<T> dc = load(of_c.data() + p * hp + c) + dh * o * (T(1) - t * t);
              T *to = d.data() + p * ld + c, *earlier = of_c.data() + (p + s.before()) * hp + c;
              store(to, dh * t * o * (T(1) - o));
              store(to + hp, dc * load(of.c + (p + s.before()) * hp + c) * f * (T(1) - f));
              store(to + 2 * hp, dc * g * in * (T(1) - in));
              store(to + 3 * hp, dc * in * (T(1) - g * g));
              store(earlier, dc * f);
            }
          for (int64_t k = 0; k < s.taps; ++k)
            taps[k].add(d.data() + first * ld, s.step() * ld, count, of_h.data() + (first + s.tap(k)) * hp,
                        s.step() * hp);
        });
      const int64_t first = s.place(0, 0), depth = s.places() - s.margin() - first;
      for (int64_t k = 0; k < s.taps; ++k)
        product.run({d.data() + first * ld, 1, ld}, {of.h + (first + s.tap(k)) * hp, hp, 1}, depth,
                    sums.data() + (worker * s.taps + k) * tap_size, hp, 0, ld, 0, hp, {}, b > start);
      for (int64_t q = 0; q < kGates; ++q)
        planes.write(d.data() + q * hp, ld, s.hidden, of_gates + (b * kGates + q) * s.hidden * pixels);
    }
  });
  for (int64_t o = 0; o < kGates * s.hidden; ++o)
    for (int64_t c = 0; c < s.hidden; ++c)
      for (int64_t k = 0; k < s.taps; ++k) {
        T sum = 0;
        for (int64_t worker = 0; worker < workers; ++worker)
          sum += sums[(worker * s.taps + k) * tap_size + (o / s.hidden * hp + o % s.hidden) * hp + c];
        of_weight[(o * s.hidden + c) * s.taps + k] = sum;
      }
}

LstmShape shape_of(const Tensor& x, const Tensor& weight, bool diagonal) {
  return {x.size(0), weight.size(1), x.size(2), x.size(3), weight.size(2), diagonal};
}

// -> h (B, H, height, width), and where it is wanted what the backward pass needs, (B, values).
std::tuple<Tensor, Tensor> image_lstm(Tensor gates, Tensor weight, bool diagonal, bool keep) {
  const LstmShape s = shape_of(gates, weight, diagonal);
  Tensor out = fresh(gates, {s.batch, s.hidden, s.height, s.width}), kept;
  dispatch_float(gates.scalar_type(), "image_lstm", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    kept = torch::stable::new_empty(gates, std::vector<int64_t>{s.batch, keep ? Kept<T>::size(s) : 0}, kTypeOf<T>);
    if (out.numel())
      lstm_forward<T, E>(s, data_of<E>(gates), data_of<E>(weight), static_cast<E*>(out.data_ptr()),
                         keep ? static_cast<T*>(kept.data_ptr()) : nullptr);
  });
  return {out, kept};
}

// -> gradients of gates and weight.
std::tuple<Tensor, Tensor> image_lstm_backward(Tensor grad, Tensor weight, Tensor kept, bool diagonal) {
  const LstmShape s = shape_of(grad, weight, diagonal);
  Tensor of_gates = fresh(grad, {s.batch, kGates * s.hidden, s.height, s.width}), of_weight = fresh_like(weight);
  dispatch_float(grad.scalar_type(), "image_lstm", [&](auto zero) {
    using E = decltype(zero);
    using T = ComputeType<E>;
    Result<E> to(of_weight);
    lstm_backward<T, E>(s, data_of<E>(grad), data_of<E>(weight), data_of<T>(kept), static_cast<E*>(of_gates.data_ptr()),
                        to.data());
    to.finish();
  });
  return {of_gates, of_weight};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("image_lstm", TORCH_BOX(&fastgen::image_lstm));
  m.impl("image_lstm_backward", TORCH_BOX(&fastgen::image_lstm_backward));
}
