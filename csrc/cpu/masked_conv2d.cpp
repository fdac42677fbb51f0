// masked_conv2d, gated_masked_conv2d, conv2d and their gradients; arguments are checked in fastgen/ops/.
#include "pointwise_conv.h"
#include "winograd_conv.h"

namespace fastgen {
namespace {

ConvShape shape_of(const Tensor& x, const Tensor& weight, Mask mask, int64_t colors, Activation activation) {
  ConvShape s{x.size(0),      x.size(1),      x.size(2), x.size(3), weight.size(0),
              weight.size(2), weight.size(3), mask,      colors,    activation};
  // a 1x1 convolution sees no edges: short rows are joined, so that vectors are full
  constexpr int64_t kLongRow = 128;
  for (int64_t rows = s.height; s.area() == 1 && rows > 1; --rows)
    if (s.height % rows == 0 && rows * s.width <= kLongRow) {
      s.height /= rows;
      s.width *= rows;
      break;
    }
  return s;
}

template <class E>
ConvTensors<E> tensors_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          const std::optional<Tensor>& cond) {
  const bool constant = cond && (cond->size(2) != x.size(2) || cond->size(3) != x.size(3));
  return {data_of<E>(x), data_of<E>(weight), data_of<E>(bias), data_of<E>(cond), constant};
}

Tensor image_like(const Tensor& x, int64_t channels) { return fresh(x, {x.size(0), channels, x.size(2), x.size(3)}); }

// The results; and the sums before a gate, if `kept` is not null.
template <class E>
void forward(const ConvShape& s, const ConvTensors<E>& in, E* out, E* kept) {
  using T = ComputeType<E>;
  if constexpr (std::is_same_v<E, T>)
    if (is_pointwise(s)) return pointwise_forward(s, in, out);
  with_factors<E>([&]<class S>() {
    if constexpr (std::is_same_v<S, T>)  // pairs save about as much
      if (winograd_forward<T>(s, in, out, kept)) return;
    conv_forward<T, S>(s, in, out, kept);
  });
}

template <class E>
void backward(const ConvShape& s, const ConvTensors<E>& in, const E* grad, const E* kept,
              const ConvGradients<ComputeType<E>, E>& out) {
  if constexpr (std::is_same_v<E, ComputeType<E>>) {
    if (is_pointwise(s)) return pointwise_backward(s, in, grad, kept, out);
    if (winograd_backward(s, in, grad, kept, out)) return;
  }
  with_factors<E>([&]<class S>() { conv_backward<ComputeType<E>, S>(s, in, grad, kept, out); });
}

Tensor ungated(const ConvShape& s, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  Tensor out = image_like(x, s.outs);
  if (out.numel() == 0) return out;
  dispatch_float(x.scalar_type(), "conv2d", [&](auto zero) {
    using E = decltype(zero);
    forward<E>(s, tensors_of<E>(x, weight, bias, std::nullopt), static_cast<E*>(out.data_ptr()), nullptr);
  });
  return out;
}

Tensor masked_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t mask, int64_t colors, bool relu) {
  const Activation activation = relu ? Activation::kRelu : Activation::kNone;
  return ungated(shape_of(x, weight, static_cast<Mask>(mask), colors, activation), x, weight, bias);
}

Tensor conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu) {
  return ungated(shape_of(x, weight, Mask::kNone, 1, relu ? Activation::kRelu : Activation::kNone), x, weight, bias);
}

// -> result, and the sums before the gate where they are to be kept.
std::tuple<Tensor, Tensor> gated_masked_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                               std::optional<Tensor> cond, int64_t mask, int64_t colors, bool keep) {
  const ConvShape s = shape_of(x, weight, static_cast<Mask>(mask), colors, Activation::kGate);
  Tensor out = image_like(x, s.results());
  Tensor kept = keep ? image_like(x, s.outs) : fresh(x, {0});
  if (out.numel() == 0) return {out, kept};
  dispatch_float(x.scalar_type(), "gated_masked_conv2d", [&](auto zero) {
    using E = decltype(zero);
    forward<E>(s, tensors_of<E>(x, weight, bias, cond), static_cast<E*>(out.data_ptr()),
               keep ? static_cast<E*>(kept.data_ptr()) : nullptr);
  });
  return {out, kept};
}

// -> gradients of x (nothing unless needed), weight, bias and cond; kept: see conv_backward.
std::tuple<Tensor, Tensor, Tensor, Tensor> gradients(const ConvShape& s, const Tensor& grad,
                                                     const std::optional<Tensor>& kept, const Tensor& x,
                                                     const Tensor& weight, const std::optional<Tensor>& cond,
                                                     bool need_x) {
  Tensor grad_x = need_x ? image_like(x, s.channels) : fresh(x, {0});
  Tensor grad_weight = fresh(x, {s.outs, s.channels, s.kernel_h, s.kernel_w});
  Tensor grad_bias = fresh(x, {s.outs});
  Tensor grad_cond = cond ? fresh(x, {s.batch, s.outs, cond->size(2), cond->size(3)}) : fresh(x, {0});
  if (grad.numel() == 0) {
    for (Tensor* of : {&grad_x, &grad_weight, &grad_bias, &grad_cond}) torch::stable::zero_(*of);
    return {grad_x, grad_weight, grad_bias, grad_cond};
  }
  dispatch_float(x.scalar_type(), "conv2d", [&](auto zero) {
    using E = decltype(zero);
    const ConvTensors<E> in = tensors_of<E>(x, weight, std::nullopt, cond);
    Result<E> gw(grad_weight), gb(grad_bias), gc(in.cond_constant ? grad_cond : grad_bias);
    ConvGradients<ComputeType<E>, E> out{};
    out.x = need_x ? static_cast<E*>(grad_x.data_ptr()) : nullptr;
    out.weight = gw.data();
    out.bias = gb.data();
    if (cond && in.cond_constant) out.image_cond = gc.data();
    if (cond && !in.cond_constant) out.cond = static_cast<E*>(grad_cond.data_ptr());
    backward<E>(s, in, data_of<E>(grad), data_of<E>(kept), out);
    gw.finish();
    gb.finish();
    if (in.cond_constant) gc.finish();
  });
  return {grad_x, grad_weight, grad_bias, grad_cond};
}

// kept: the results, if a ReLU made them, or the sums before a gate, if there is one.
std::tuple<Tensor, Tensor, Tensor, Tensor> masked_conv2d_backward(Tensor grad, std::optional<Tensor> kept, Tensor x,
                                                                  Tensor weight, std::optional<Tensor> cond,
                                                                  int64_t mask, int64_t colors, bool relu,
                                                                  bool need_x) {
  const Activation activation = relu ? Activation::kRelu : kept ? Activation::kGate : Activation::kNone;
  return gradients(shape_of(x, weight, static_cast<Mask>(mask), colors, activation), grad, kept, x, weight, cond,
                   need_x);
}

// result: the forward's, if a ReLU made it.
std::tuple<Tensor, Tensor, Tensor> conv2d_backward(Tensor grad, std::optional<Tensor> result, Tensor x, Tensor weight,
                                                   bool need_x) {
  const ConvShape s = shape_of(x, weight, Mask::kNone, 1, result ? Activation::kRelu : Activation::kNone);
  auto [of_x, of_weight, of_bias, none] = gradients(s, grad, result, x, weight, std::nullopt, need_x);
  return {of_x, of_weight, of_bias};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&fastgen::masked_conv2d));
  m.impl("gated_masked_conv2d", TORCH_BOX(&fastgen::gated_masked_conv2d));
  m.impl("conv2d", TORCH_BOX(&fastgen::conv2d));
  m.impl("conv2d_backward", TORCH_BOX(&fastgen::conv2d_backward));
  m.impl("masked_conv2d_backward", TORCH_BOX(&fastgen::masked_conv2d_backward));
}
