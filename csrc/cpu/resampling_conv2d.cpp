// downsample_conv2d, upsample_conv2d and their gradients; arguments are checked in fastgen/ops/resampling_conv2d.py.
#include "winograd_conv.h"

namespace fastgen {
namespace {

template <class E>
Planes<E> planes_of(const Tensor& images, const std::optional<Tensor>& relu = std::nullopt) {
  return {data_of<E>(images), data_of<E>(relu), images.size(0), images.size(1), images.size(2), images.size(3)};
}

// `weight` (first, second, 4, 4) makes `first` channels of `second` ones where it halves, and back where it doubles.
template <Kind K>
void resample(const Tensor& from, const Tensor& weight, const std::optional<Tensor>& bias, bool relu, const Tensor& to,
              const std::optional<Tensor>& kept = std::nullopt) {
  if (to.numel() == 0) return;
  dispatch_float(from.scalar_type(), "resampling_conv2d", [&](auto zero) {
    using E = decltype(zero);
    const Weights<K, ComputeType<E>> weights{weight.size(0), weight.size(1), K == Kind::kDouble};
    const Activation activation = relu ? Activation::kRelu : Activation::kNone;
    winograd_product(
        planes_of<E>(from, kept), weights, data_of<E>(weight),
        Results<E>{static_cast<E*>(to.data_ptr()), nullptr, to.size(2), to.size(3), data_of<E>(bias), activation});
  });
}

Tensor downsample_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu) {
  Tensor out = fresh(x, {x.size(0), weight.size(0), x.size(2) / 2, x.size(3) / 2});
  resample<Kind::kHalve>(x, weight, bias, relu, out);
  return out;
}

Tensor upsample_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, bool relu) {
  Tensor out = fresh(x, {x.size(0), weight.size(1), x.size(2) * 2, x.size(3) * 2});
  resample<Kind::kDouble>(x, weight, bias, relu, out);
  return out;
}

// -> gradients of x (nothing unless needed), weight and bias; result: the forward's, if a ReLU made it.
std::tuple<Tensor, Tensor, Tensor> downsample_conv2d_backward(Tensor grad, std::optional<Tensor> result, Tensor x,
                                                              Tensor weight, bool need_x) {
  Tensor of_x = need_x ? fresh_like(x) : fresh(x, {0});
  Tensor of_weight = fresh_like(weight), of_bias = fresh(x, {weight.size(0)});
  if (need_x) resample<Kind::kDouble>(grad, weight, std::nullopt, false, of_x, result);
  dispatch_float(x.scalar_type(), "resampling_conv2d", [&](auto zero) {
    using E = decltype(zero);
    Result<E> gw(of_weight), gb(of_bias);
    winograd_gradient<Kind::kHalve>(planes_of<E>(x), planes_of<E>(grad, result),
                                    ConvGradients<ComputeType<E>, E>{nullptr, nullptr, gw.data(), gb.data(), nullptr});
    gw.finish();
    gb.finish();
  });
  return {of_x, of_weight, of_bias};
}

// The sums of each channel.
template <class T, class E>
void sum_channels(const Planes<E>& planes, T* sums) {
  share(planes.channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      T sum = 0;
      for (int64_t b = 0; b < planes.batch; ++b) {
        const int64_t at = (b * planes.channels + c) * planes.size();
        Vec<T> of_image = {};
        by_vectors<T>(planes.size(), [&](int64_t i, auto n) {
          const Vec<T> g = take(planes.values + at + i, n), zero = {};
          of_image += planes.relu ? (take(planes.relu + at + i, n) <= zero ? zero : g) : g;
        });
        sum += sum_of_lanes<T>(of_image);
      }
      sums[c] = sum;
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> upsample_conv2d_backward(Tensor grad, std::optional<Tensor> result, Tensor x,
                                                            Tensor weight, bool need_x) {
  Tensor of_x = need_x ? fresh_like(x) : fresh(x, {0});
  Tensor of_weight = fresh_like(weight), of_bias = fresh(x, {weight.size(1)});
  if (need_x) resample<Kind::kHalve>(grad, weight, std::nullopt, false, of_x, result);
  dispatch_float(x.scalar_type(), "resampling_conv2d", [&](auto zero) {
    using E = decltype(zero);
    const Planes<E> gradients = planes_of<E>(grad, result);
    Result<E> gw(of_weight), gb(of_bias);
    winograd_gradient<Kind::kHalve>(gradients, planes_of<E>(x),
                                    ConvGradients<ComputeType<E>, E>{nullptr, nullptr, gw.data(), nullptr, nullptr});
    sum_channels(gradients, gb.data());
    gw.finish();
    gb.finish();
  });
  return {of_x, of_weight, of_bias};
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("downsample_conv2d", TORCH_BOX(&fastgen::downsample_conv2d));
  m.impl("downsample_conv2d_backward", TORCH_BOX(&fastgen::downsample_conv2d_backward));
  m.impl("upsample_conv2d", TORCH_BOX(&fastgen::upsample_conv2d));
  m.impl("upsample_conv2d_backward", TORCH_BOX(&fastgen::upsample_conv2d_backward));
}
