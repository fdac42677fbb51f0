// A WaveNet's weights in one buffer, in the order in which a step of generation reads them.
#pragma once

#include "../processor.h"
#include "packed_matrix.h"

namespace fastgen {
namespace {

// Where the two sums of a gate's channel are among the rows of a layer's convolution: 32 channels' for tanh, then
// theirs for the sigmoid, and so on, so that one thread has both.
constexpr int tanh_row(int channel) { return channel + (channel & ~31); }
constexpr int sigmoid_row(int channel) { return tanh_row(channel) + 32; }
constexpr int gate_channel(int row) { return row / 64 * 32 + row % 32; }
constexpr bool is_sigmoid(int row) { return row & 32; }

// Channels and layers, from the shapes of the unpacked weights.
struct Shape {
  int inputs, residual, gate, skip, outputs, layers, kernel_size;

  int residual_padded() const { return static_cast<int>(round_up(residual, 32)); }
  int gate_padded() const { return static_cast<int>(round_up(gate, 32)); }
};

// Where everything lies in the packed buffer. With data == nullptr it only measures.
template <class W>
struct Packed {
  struct Layer {
    PackedMatrix<W> current, residual, skip;
    std::vector<PackedMatrix<W>> old;  // old[j - 1] multiplies the input of j * dilation samples ago
    const float* residual_bias;
  };
  std::vector<Layer> layers;
  PackedMatrix<W> hidden, output;
  const float *input, *input_bias, *skip_bias, *hidden_bias, *output_bias;
  int64_t bytes = 0;
  bool far;  // no cache holds them until the next step

  Packed(const Shape& s, const uint8_t* data) : layers(s.layers) {
    const auto take = [&](int64_t n) {
      const int64_t at = bytes;
      bytes = round_up(bytes + n, 64);
      return data ? data + at : nullptr;
    };
    const auto matrix = [&](int rows, int k) {
      PackedMatrix<W> m{rows, k};
      m.data = reinterpret_cast<const W*>(take(m.bytes()));
      return m;
    };
    const auto vector = [&](int64_t n) { return reinterpret_cast<const float*>(take(n * sizeof(float))); };
    for (int l = 0; l < s.layers; ++l) {  // in the order in which a step reads them
      layers[l].current = matrix(2 * s.gate_padded(), s.residual);
      layers[l].residual = matrix(s.residual, s.gate);
    }
    for (auto& layer : layers) layer.skip = matrix(s.skip, s.gate);
    hidden = matrix(s.skip, s.skip);
    output = matrix(s.outputs, s.skip);
    for (auto& layer : layers)
      for (int j = 1; j < s.kernel_size; ++j) layer.old.push_back(matrix(2 * s.gate_padded(), s.residual));
    for (auto& layer : layers) layer.residual_bias = vector(s.residual_padded());
    skip_bias = vector(round_up(s.skip, 32));
    hidden_bias = vector(round_up(s.skip, 32));
    output_bias = vector(round_up(s.outputs, 16));
    input_bias = vector(s.residual_padded());
    input = vector(static_cast<int64_t>(s.inputs) * s.residual_padded());
    far = bytes > shared_cache_bytes() / 2;
    each_matrix([&](PackedMatrix<W>& m) { m.far = far; });
  }

 private:
  template <class F>
  void each_matrix(F&& f) {
    for (Layer& layer : layers) {
      for (PackedMatrix<W>* m : {&layer.current, &layer.residual, &layer.skip}) f(*m);
      for (PackedMatrix<W>& m : layer.old) f(m);
    }
    f(hidden), f(output);
  }
};

Shape shape_of(const std::vector<Tensor>& w) {
  // input, input_bias, conv, residual, residual_bias, skip, skip_bias, hidden, hidden_bias, output, output_bias
  FASTGEN_CHECK(w.size() == 11, "wavenet_generate: 11 weight tensors are expected, got ", w.size());
  const Tensor& conv = w[2];  // (layers, 2 * gate, residual, kernel_size)
  return {static_cast<int>(w[0].size(0)), static_cast<int>(conv.size(2)), static_cast<int>(conv.size(1) / 2),
          static_cast<int>(w[5].size(1)), static_cast<int>(w[9].size(0)), static_cast<int>(conv.size(0)),
          static_cast<int>(conv.size(3))};
}

template <class W>
void pack(const std::vector<Tensor>& w, const Shape& s, uint8_t* out) {
  const Packed<W> net(s, out);
  const auto data = [&](int i) { return static_cast<const float*>(w[i].data_ptr()); };
  const auto matrix = [](const PackedMatrix<W>& m, auto&& weight) { pack_matrix(m, const_cast<W*>(m.data), weight); };
  const auto vector = [](const float* to, const float* from, int64_t n) {
    std::memcpy(const_cast<float*>(to), from, n * sizeof(float));
  };
  for (int l = 0; l < s.layers; ++l) {
    const auto& layer = net.layers[l];
    const float* conv = data(2) + int64_t{l} * 2 * s.gate * s.residual * s.kernel_size;
    const auto tap = [&, conv](int j) {
      return [&, conv, j](int row, int k) {
        const int r = gate_channel(row);
        if (r >= s.gate) return 0.0f;
        return conv[((is_sigmoid(row) ? s.gate + r : r) * int64_t{s.residual} + k) * s.kernel_size + s.kernel_size - 1 -
                    j];
      };
    };
    matrix(layer.current, tap(0));
    for (int j = 1; j < s.kernel_size; ++j) matrix(layer.old[j - 1], tap(j));
    const float* residual = data(3) + int64_t{l} * s.residual * s.gate;
    const float* skip = data(5) + int64_t{l} * s.skip * s.gate;
    matrix(layer.residual, [&](int row, int k) { return residual[row * int64_t{s.gate} + k]; });
    matrix(layer.skip, [&](int row, int k) { return skip[row * int64_t{s.gate} + k]; });
    vector(layer.residual_bias, data(4) + int64_t{l} * s.residual, s.residual);
  }
  matrix(net.hidden, [&](int row, int k) { return data(7)[row * int64_t{s.skip} + k]; });
  matrix(net.output, [&](int row, int k) { return data(9)[row * int64_t{s.skip} + k]; });
  vector(net.skip_bias, data(6), s.skip);
  vector(net.hidden_bias, data(8), s.skip);
  vector(net.output_bias, data(10), s.outputs);
  vector(net.input_bias, data(1), s.residual);
  for (int64_t i = 0; i < s.inputs; ++i)
    vector(net.input + i * s.residual_padded(), data(0) + i * s.residual, s.residual);
}

}  // namespace
}  // namespace fastgen
