// The small matrices of an invertible 1x1 convolution: W = P L (U + diag(sign * e^d)) with the actnorm x * e^l + t
// before it folded in, its inverse, and the gradients of all of these. Matrices are row after row.
#pragma once

#include "elements.h"

namespace fastgen {
namespace {

// Rows end in zeros up to a whole vector.
template <class T>
struct Matrix {
  int64_t n, ld;
  OwnVector<T> values;
  explicit Matrix(int64_t n) : n(n), ld(round_up(n, kLanes<T>)), values(n * ld) {}
  T* operator[](int64_t row) { return values.data() + row * ld; }
  const T* operator[](int64_t row) const { return values.data() + row * ld; }
};

// f(begin, end) for shares of the n rows; small matrices are not worth waking threads for.
template <class F>
void by_rows(int64_t n, F&& f) {
  n < 96 ? f(int64_t{0}, n) : share(n, f);
}

// On whole vectors from that on which `first` lies in; what is before it must be zero, or may be overwritten.
template <class T>
void add_multiple(T* to, T factor, const T* from, int64_t first, int64_t end) {
  for (int64_t i = first / kLanes<T> * kLanes<T>; i < end; i += kLanes<T>)
    store(to + i, load(to + i) + factor * load(from + i));
}
template <class T>
T dot(const T* a, const T* b, int64_t first, int64_t end) {
  Vec<T> sum{};
  for (int64_t i = first / kLanes<T> * kLanes<T>; i < end; i += kLanes<T>) sum += load(a + i) * load(b + i);
  return sum_of_lanes<T>(sum);
}

template <class T>
struct Factors {
  int64_t n;
  const T *lower, *log_scale, *shift;  // the last two null without an actnorm
  const int64_t* permutation;
  Matrix<T> upper;  // with its diagonal; zero below
  T log_det = 0;    // of one pixel

  Factors(const Tensor& lower, const Tensor& upper_part, const Tensor& log_diagonal, const Tensor& sign,
          const Tensor& permutation, const std::optional<Tensor>& log_scale, const std::optional<Tensor>& shift)
      : n(lower.size(0)),
        lower(data_of<T>(lower)),
        log_scale(data_of<T>(log_scale)),
        shift(data_of<T>(shift)),
        permutation(data_of<int64_t>(permutation)),
        upper(n) {
    const T *u = data_of<T>(upper_part), *d = data_of<T>(log_diagonal), *s = data_of<T>(sign);
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      FASTGEN_CHECK(0 <= this->permutation[i] && this->permutation[i] < n,
                    "invertible_conv1x1: permutation must lie in [0, ", n, "), got ", this->permutation[i]);
      upper[i][i] = s[i] * std::exp(d[i]);
      std::copy(u + i * n + i + 1, u + (i + 1) * n, upper[i] + i + 1);
      total += d[i] + (this->log_scale ? this->log_scale[i] : T(0));
    }
    log_det = static_cast<T>(total);
  }
  T scale(int64_t i) const { return log_scale ? std::exp(log_scale[i]) : T(1); }
  T shift_of(int64_t i) const { return shift ? shift[i] : T(0); }

  // weight (n, n) and bias (n,) of the product of all of it with a pixel
  void assemble(T* weight, T* bias) const {
    Matrix<T> product(n);
    by_rows(n, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::copy_n(upper[i], n, product[i]);
        for (int64_t k = 0; k < i; ++k) add_multiple(product[i], lower[i * n + k], upper[k], k, n);
      }
    });
    OwnVector<T> scales(product.ld), shifts(product.ld);
    for (int64_t j = 0; j < n; ++j) {
      scales[j] = scale(j);
      shifts[j] = shift_of(j);
    }
    for (int64_t i = 0; i < n; ++i) {
      const T* row = product[permutation[i]];
      bias[i] = dot<T>(row, shifts.data(), 0, n);
      for (int64_t j = 0; j < n; ++j) weight[i * n + j] = row[j] * scales[j];
    }
  }

  // the inverse of W, in float64: substitution into P^T, row by row
  Matrix<double> inverse() const {
    Matrix<double> rows(n);
    for (int64_t j = 0; j < n; ++j) rows[permutation[j]][j] = 1;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t k = 0; k < i; ++k) add_multiple(rows[i], -static_cast<double>(lower[i * n + k]), rows[k], 0, n);
    for (int64_t i = n; i-- > 0;) {
      for (int64_t k = i + 1; k < n; ++k) add_multiple(rows[i], -static_cast<double>(upper[i][k]), rows[k], 0, n);
      const double diagonal = upper[i][i];
      for (int64_t j = 0; j < n; ++j) rows[i][j] /= diagonal;
    }
    return rows;
  }
  void assemble_inverse(T* weight, T* bias) const {
    const Matrix<double> rows = inverse();
    for (int64_t i = 0; i < n; ++i) {
      const T back = log_scale ? std::exp(-log_scale[i]) : T(1);
      for (int64_t j = 0; j < n; ++j) weight[i * n + j] = static_cast<T>(rows[i][j] * back);
      bias[i] = -shift_of(i) * back;
    }
  }
};

// Where the gradients of the parameters go, (n, n) twice and (n,) thrice.
template <class T>
struct FactorGrads {
  T *lower, *upper, *log_diagonal, *log_scale, *shift;
};

// From the gradient of W, its rows already permuted back, to those of the factors.
template <class T>
void factor_gradients(const Factors<T>& f, const Matrix<T>& grad, T grad_log_det, const FactorGrads<T>& to) {
  const int64_t n = f.n;
  by_rows(n, [&](int64_t begin, int64_t end) {
    OwnVector<T> row(grad.ld);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < n; ++k) to.lower[i * n + k] = k < i ? dot(grad[i], f.upper[k], k, n) : T(0);
      std::copy_n(grad[i], grad.ld, row.data());
      for (int64_t k = i + 1; k < n; ++k) add_multiple(row.data(), f.lower[k * n + i], grad[k], i, n);
      to.log_diagonal[i] = row[i] * f.upper[i][i] + grad_log_det;
      std::fill_n(to.upper + i * n, i + 1, T(0));
      std::copy(row.begin() + i + 1, row.begin() + n, to.upper + i * n + i + 1);
    }
  });
}

// `weight` as `assemble` gave it; `grad` (n, n) and `grad_bias` (n,) its gradients and the bias's.
template <class T>
void assemble_backward(const Factors<T>& f, const T* weight, const T* grad, const T* grad_bias, T grad_log_det,
                       const FactorGrads<T>& to) {
  const int64_t n = f.n;
  Matrix<T> of_product(n);
  std::vector<T> scales(n);
  for (int64_t j = 0; j < n; ++j) {
    scales[j] = f.scale(j);
    to.log_scale[j] = to.shift[j] = 0;
  }
  for (int64_t i = 0; i < n; ++i) {
    T* row = of_product[f.permutation[i]];
    for (int64_t j = 0; j < n; ++j) {
      row[j] = grad[i * n + j] * scales[j] + grad_bias[i] * f.shift_of(j);
      to.log_scale[j] += grad[i * n + j] * weight[i * n + j];
    }
  }
  // of the shift: the transposed factors in turn
  std::vector<T> first(n), second(n);
  for (int64_t i = 0; i < n; ++i) first[f.permutation[i]] += grad_bias[i];
  for (int64_t i = 0; i < n; ++i) {
    second[i] += first[i];
    for (int64_t k = 0; k < i; ++k) second[k] += f.lower[i * n + k] * first[i];
  }
  for (int64_t k = 0; k < n; ++k)
    for (int64_t j = k; j < n; ++j) to.shift[j] += f.upper[k][j] * second[k];
  for (int64_t j = 0; j < n; ++j) to.log_scale[j] += grad_log_det;
  factor_gradients(f, of_product, grad_log_det, to);
}

template <class T>
void assemble_inverse_backward(const Factors<T>& f, const T* grad, const T* grad_bias, T grad_log_det,
                               const FactorGrads<T>& to) {
  const int64_t n = f.n;
  const Matrix<double> rows = f.inverse();
  Matrix<double> of_rows(n), product(n);  // product: inverse^T * gradient of the inverse
  for (int64_t i = 0; i < n; ++i) {
    const double back = f.log_scale ? std::exp(-static_cast<double>(f.log_scale[i])) : 1.0;
    double of_scale = grad_bias[i] * f.shift_of(i) * back - grad_log_det;
    for (int64_t j = 0; j < n; ++j) {
      of_rows[i][j] = back * grad[i * n + j];
      of_scale -= of_rows[i][j] * rows[i][j];
    }
    to.log_scale[i] = static_cast<T>(of_scale);
    to.shift[i] = static_cast<T>(-grad_bias[i] * back);
  }
  for (int64_t j = 0; j < n; ++j)
    for (int64_t i = 0; i < n; ++i) add_multiple<double>(product[i], rows[j][i], of_rows[j], 0, n);
  Matrix<T> of_product(n);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j)
      of_product[f.permutation[i]][j] = static_cast<T>(-dot<double>(product[i], rows[j], 0, n));
  factor_gradients(f, of_product, -grad_log_det, to);
}

}  // namespace
}  // namespace fastgen
