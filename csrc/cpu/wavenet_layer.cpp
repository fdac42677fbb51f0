// wavenet_layer and its backward; arguments are checked in fastgen/ops/wavenet_layer.py.
#include "gated_conv_backward.h"

namespace fastgen {
namespace {

LayerShape shape_of(const Tensor& x, const Tensor& weight, const Tensor& out_weight, int64_t dilation) {
  return {x.size(0), x.size(1), x.size(2), weight.size(0) / 2, weight.size(2), out_weight.size(0), dilation};
}

template <class E>
LayerTensors<E> tensors_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Tensor& out_weight, const std::optional<Tensor>& out_bias,
                           const std::optional<Tensor>& cond) {
  return {data_of<E>(x),
          data_of<E>(weight),
          data_of<E>(bias),
          data_of<E>(out_weight),
          data_of<E>(out_bias),
          data_of<E>(cond),
          cond && cond->size(2) != x.size(2)};
}

void wavenet_layer_out(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out_weight,
                       std::optional<Tensor> out_bias, std::optional<Tensor> cond, int64_t dilation, Tensor residual,
                       Tensor skip) {
  const LayerShape s = shape_of(x, weight, out_weight, dilation);
  if (s.batch == 0 || s.steps == 0) return;
  dispatch_float(x.scalar_type(), "wavenet_layer", [&](auto zero) {
    using E = decltype(zero);
    with_factors<E>([&]<class S>() {
      layer_forward<ComputeType<E>, S, E>(s, tensors_of<E>(x, weight, bias, out_weight, out_bias, cond), nullptr,
                                          static_cast<E*>(residual.data_ptr()), static_cast<E*>(skip.data_ptr()));
    });
  });
}

std::tuple<Tensor, Tensor> wavenet_layer(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out_weight,
                                         std::optional<Tensor> out_bias, std::optional<Tensor> cond, int64_t dilation) {
  const LayerShape s = shape_of(x, weight, out_weight, dilation);
  Tensor residual = fresh(x, {s.batch, s.channels, s.steps});
  Tensor skip = fresh(x, {s.batch, s.skips(), s.steps});
  wavenet_layer_out(x, weight, bias, out_weight, out_bias, cond, dilation, residual, skip);
  return {residual, skip};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wavenet_layer_backward(
    Tensor grad_residual, Tensor grad_skip, Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor out_weight,
    std::optional<Tensor> out_bias, std::optional<Tensor> cond, int64_t dilation) {
  const LayerShape s = shape_of(x, weight, out_weight, dilation);
  Tensor grad_x = fresh(x, {s.batch, s.channels, s.steps});
  Tensor grad_weight = fresh(x, {2 * s.gate, s.channels, s.kernel});
  Tensor grad_bias = fresh(x, {2 * s.gate});
  Tensor grad_out_weight = fresh(x, {s.outs, s.gate});
  Tensor grad_out_bias = fresh(x, {s.outs});
  Tensor grad_cond = cond ? fresh(x, {s.batch, 2 * s.gate, cond->size(2)}) : fresh(x, {0});
  dispatch_float(x.scalar_type(), "wavenet_layer", [&](auto zero) {
    using E = decltype(zero);
    Result<E> gx(grad_x), gw(grad_weight), gb(grad_bias), gow(grad_out_weight), gob(grad_out_bias), gc(grad_cond);
    with_factors<E>([&]<class S>() {
      layer_backward<ComputeType<E>, S, E>(
          s, tensors_of<E>(x, weight, bias, out_weight, out_bias, cond), nullptr, data_of<E>(grad_residual),
          data_of<E>(grad_skip), {gx.data(), gw.data(), gb.data(), gow.data(), gob.data(), cond ? gc.data() : nullptr});
    });
    for (auto* result : {&gx, &gw, &gb, &gow, &gob, &gc}) result->finish();
  });
  return {grad_x, grad_weight, grad_bias, grad_out_weight, grad_out_bias, grad_cond};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("wavenet_layer", TORCH_BOX(&fastgen::wavenet_layer));
  m.impl("wavenet_layer_out", TORCH_BOX(&fastgen::wavenet_layer_out));
  m.impl("wavenet_layer_backward", TORCH_BOX(&fastgen::wavenet_layer_backward));
}
