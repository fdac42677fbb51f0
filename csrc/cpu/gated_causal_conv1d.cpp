// gated_causal_conv1d and its backward; arguments are checked in fastgen/ops/gated_causal_conv1d.py.
#include "gated_conv_backward.h"

namespace fastgen {
namespace {

LayerShape shape_of(const Tensor& x, const Tensor& weight, int64_t dilation) {
  return {x.size(0), x.size(1), x.size(2), weight.size(0) / 2, weight.size(2), 0, dilation};
}

Tensor gated_causal_conv1d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> cond,
                           int64_t dilation) {
  const LayerShape s = shape_of(x, weight, dilation);
  Tensor z = fresh(x, {s.batch, s.gate, s.steps});
  if (z.numel() == 0) return z;
  dispatch_float(x.scalar_type(), "gated_causal_conv1d", [&](auto zero) {
    using E = decltype(zero);
    const bool constant = cond && cond->size(2) != s.steps;
    const LayerTensors<E> in{data_of<E>(x), data_of<E>(weight), data_of<E>(bias), nullptr,
                             nullptr,       data_of<E>(cond),   constant};
    auto* out = static_cast<E*>(z.data_ptr());
    with_factors<E>([&]<class S>() { layer_forward<ComputeType<E>, S, E>(s, in, out, nullptr, nullptr); });
  });
  return z;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_causal_conv1d_backward(Tensor grad, Tensor x, Tensor weight,
                                                                        std::optional<Tensor> bias,
                                                                        std::optional<Tensor> cond, int64_t dilation) {
  const LayerShape s = shape_of(x, weight, dilation);
  Tensor grad_x = fresh(x, {s.batch, s.channels, s.steps});
  Tensor grad_weight = fresh(x, {2 * s.gate, s.channels, s.kernel});
  Tensor grad_bias = fresh(x, {2 * s.gate});
  Tensor grad_cond = cond ? fresh(x, {s.batch, 2 * s.gate, cond->size(2)}) : fresh(x, {0});
  dispatch_float(x.scalar_type(), "gated_causal_conv1d", [&](auto zero) {
    using E = decltype(zero);
    const bool constant = cond && cond->size(2) != s.steps;
    const LayerTensors<E> in{data_of<E>(x), data_of<E>(weight), data_of<E>(bias), nullptr,
                             nullptr,       data_of<E>(cond),   constant};
    Result<E> gx(grad_x), gw(grad_weight), gb(grad_bias), gc(grad_cond);
    const LayerGradients<ComputeType<E>> out{gx.data(), gw.data(), gb.data(),
                                             nullptr,   nullptr,   cond ? gc.data() : nullptr};
    with_factors<E>(
        [&]<class S>() { layer_backward<ComputeType<E>, S, E>(s, in, data_of<E>(grad), nullptr, nullptr, out); });
    for (auto* result : {&gx, &gw, &gb, &gc}) result->finish();
  });
  return {grad_x, grad_weight, grad_bias, grad_cond};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("gated_causal_conv1d", TORCH_BOX(&fastgen::gated_causal_conv1d));
  m.impl("gated_causal_conv1d_backward", TORCH_BOX(&fastgen::gated_causal_conv1d_backward));
}
