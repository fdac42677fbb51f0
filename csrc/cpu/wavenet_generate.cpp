// WaveNet sampling: the whole time loop in one call. See wavenet_streams.h.
#include "wavenet_streams.h"

namespace fastgen {
namespace {

template <class W>
void generate(const Job& job, const uint8_t* packed) {
  const Packed<W> net(job.shape, packed);
  const int64_t threads = torch::stable::get_num_threads();
  if (job.streams == 1) {
    const bool two = threads > 1 && std::thread::hardware_concurrency() > 1 && job.shape.layers > 0;
    Streams<W>(job, net, 0, 1, two).run();
    return;
  }
  // of more at once what passes between layers leaves the cache
  constexpr int64_t kMost = 64;
  const int64_t workers = std::min(threads, job.streams), share = (job.streams + workers - 1) / workers;
  const int64_t rounds = (share + kMost - 1) / kMost, parts = workers * rounds;
  for_each_worker(workers, [&](int64_t i) {
    for (int64_t part = i * rounds; part < (i + 1) * rounds; ++part) {
      const int64_t first = part * job.streams / parts, last = (part + 1) * job.streams / parts;
      Streams<W>(job, net, first, last - first, false).run();
    }
  });
}

template <class F>
void with_format(bool bf16, bool few, F&& f) {
  if (bf16) return few ? f(BFloat16Weight{}) : f(int16_t{});
  few ? f(Float32Weight{}) : f(float{});
}

// wavenet_pack(Tensor[] weights, bool bf16, bool few) -> Tensor: one uint8 buffer, laid out for this instruction set
// and for few streams or many, which its last byte tells: both can have the same size.
Tensor wavenet_pack(std::vector<Tensor> weights, bool bf16, bool few) {
  const Shape s = shape_of(weights);
  std::optional<Tensor> packed;
  with_format(bf16, few, [&](auto format) {
    using W = decltype(format);
    const int64_t bytes = Packed<W>(s, nullptr).bytes;
    packed = packed_buffer(weights[0], bytes + 1);
    auto* data = static_cast<uint8_t*>(packed->data_ptr());
    pack<W>(weights, s, data);
    data[bytes] = few;
  });
  return *packed;
}

// See fastgen/ops/wavenet_generate.py for the meaning of the arguments; they are checked there.
void wavenet_generate(Tensor packed, std::vector<int64_t> shape, std::vector<int64_t> dilations, bool bf16,
                      int64_t distribution, double log_scale_min, double temperature, Tensor gate_bias,
                      std::optional<Tensor> cond, Tensor uniforms, std::optional<Tensor> given, int64_t position,
                      Tensor history, Tensor last, Tensor samples, std::optional<Tensor> parameters) {
  FASTGEN_CHECK(shape.size() == 7, "wavenet_generate: shape needs 7 numbers");
  Job job{};
  const auto n = [&](int i) { return static_cast<int>(shape[i]); };
  job.shape = {n(0), n(1), n(2), n(3), n(4), n(5), n(6)};
  job.dilations = std::move(dilations);
  job.distribution = static_cast<Distribution>(distribution);
  job.temperature = static_cast<float>(temperature);
  job.log_scale_min = static_cast<float>(log_scale_min);
  job.streams = samples.size(0);
  job.steps = samples.size(1);
  job.position = position;
  job.uniforms_per_step = uniforms.dim() == 3 ? uniforms.size(2) : 1;
  job.uniforms = static_cast<const float*>(uniforms.data_ptr());
  job.gate_bias = static_cast<const float*>(gate_bias.data_ptr());
  job.gate_bias_stride = gate_bias.size(0) > 1 ? 1 : 0;
  job.cond = cond ? static_cast<const float*>(cond->data_ptr()) : nullptr;
  job.history = static_cast<float*>(history.data_ptr());
  job.parameters = parameters ? static_cast<float*>(parameters->data_ptr()) : nullptr;
  job.given_steps = given ? given->size(1) : 0;
  if (job.distribution == Distribution::kCategorical) {
    job.classes = static_cast<int64_t*>(samples.data_ptr());
    job.last_class = static_cast<int64_t*>(last.data_ptr());
    job.given_class = given ? static_cast<const int64_t*>(given->data_ptr()) : nullptr;
  } else {
    job.values = static_cast<float*>(samples.data_ptr());
    job.last_value = static_cast<float*>(last.data_ptr());
    job.given_value = given ? static_cast<const float*>(given->data_ptr()) : nullptr;
  }
  const auto* data = static_cast<const uint8_t*>(packed.data_ptr());
  const int64_t bytes = packed.numel();
  with_format(bf16, bytes > 0 && data[bytes - 1], [&](auto format) {
    using W = decltype(format);
    const int64_t expected = Packed<W>(job.shape, nullptr).bytes + 1;
    FASTGEN_CHECK(bytes == expected, "wavenet_generate: packed weights of ", expected, " bytes are expected, got ",
                  bytes, " (packed for another shape or instruction set?)");
    if (job.streams > 0 && job.steps > 0) generate<W>(job, data);
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("wavenet_pack", TORCH_BOX(&fastgen::wavenet_pack));
  m.impl("wavenet_generate", TORCH_BOX(&fastgen::wavenet_generate));
}
