// wavenet_generate for CUDA tensors: packing, the choice of a plan, the op. The arguments' meaning, and their checks:
// fastgen/ops/wavenet_generate.py.
#include "host.h"
#include "wavenet_launch.h"
#include "wavenet_pack.h"

namespace fastgen::wavenet {
namespace {

// A packed buffer: weights, then floats, then for each layer its dilation and its first row of the history.
struct Parts {
  int64_t floats, dilations, bytes;
  Parts(const Layout& layout, const Shape& s, bool bf16)
      : floats(round_up(layout.weights * (bf16 ? 2 : 4), 64)),
        dilations(round_up(floats + layout.floats * 4, 64)),
        bytes(dilations + std::max(s.layers, 1) * int64_t{16}) {}
};

Shape shape_from(const std::vector<int64_t>& n) {
  FASTGEN_CHECK(n.size() == 8, "wavenet_generate: shape needs 8 numbers");
  const auto at = [&](int i) { return static_cast<int>(n[i]); };
  return {at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
}

// -> one uint8 buffer, on the CPU as the weights are.
Tensor wavenet_pack_cuda(std::vector<Tensor> weights, std::vector<int64_t> shape, std::vector<int64_t> dilations,
                         bool bf16) {
  const Shape s = shape_from(shape);
  FASTGEN_CHECK(weights.size() == (s.local ? 12 : 11),
                "wavenet_generate: 11 weight tensors are expected, 12 with conditioning, got ", weights.size());
  const Layout layout(s);
  const Parts parts(layout, s, bf16);
  Tensor packed = torch::stable::new_empty(weights[0], std::vector<int64_t>{parts.bytes}, ScalarType::Byte);
  auto* data = static_cast<uint8_t*>(packed.data_ptr());
  std::memset(data, 0, parts.bytes);
  const auto at = [&](int i) { return static_cast<const float*>(weights[i].data_ptr()); };
  const Weights w{at(0), at(1), at(2), at(3), at(4),  at(5),
                  at(6), at(7), at(8), at(9), at(10), s.local ? at(11) : nullptr};
  auto* floats = reinterpret_cast<float*>(data + parts.floats);
  if (bf16)
    pack(w, s, layout, reinterpret_cast<uint16_t*>(data), floats);
  else
    pack(w, s, layout, reinterpret_cast<float*>(data), floats);
  auto* lengths = reinterpret_cast<int64_t*>(data + parts.dilations);
  int64_t row = 0;
  for (int l = 0; l < s.layers; ++l) {
    lengths[l] = dilations[l];
    lengths[s.layers + l] = row;
    row += (s.kernel_size - 1) * dilations[l];
  }
  return packed;
}

// For tests: what `choose` takes for a device with `device` = (shared bytes, multiprocessors, largest cluster), each of
// whose multiprocessors holds one block -> (cluster, tile, tiles, resident, spilled).
std::vector<int64_t> wavenet_plan(std::vector<int64_t> shape, int64_t streams, bool bf16, std::vector<int64_t> device) {
  const Device d{device[0], static_cast<int>(device[1]), static_cast<int>(device[2])};
  const Plan p = choose(shape_from(shape), streams, bf16 ? 2 : 4, d,
                        [&](const Plan& plan) { return d.multiprocessors / plan.cluster; });
  return {p.cluster, p.tile, p.tiles, p.resident, p.spilled};
}

// The plan for the GPU on which the packed weights lie, which becomes the current one.
Plan plan_for(const Tensor& packed, const Shape& s, int64_t streams, bool bf16, Device* device) {
  check(device_of(packed.get_device_index(), device), "wavenet_generate", "the device");
  return choose(s, streams, bf16 ? 2 : 4, *device, [&](const Plan& candidate) { return active(candidate, s, bf16); });
}

// Whether that GPU's blocks have the memory for one stream.
bool wavenet_fits(Tensor packed, std::vector<int64_t> shape, bool bf16) {
  const OnDevice restored;
  Device device{};
  return plan_for(packed, shape_from(shape), 1, bf16, &device).cluster > 0;
}

void wavenet_generate(Tensor packed, std::vector<int64_t> shape, std::vector<int64_t> /*dilations*/, bool bf16,
                      int64_t distribution, double log_scale_min, double temperature, int64_t top_k, double top_p,
                      Tensor gate_bias, std::optional<Tensor> cond, Tensor uniforms, std::optional<Tensor> given,
                      int64_t position, Tensor history, Tensor last, Tensor samples, std::optional<Tensor> parameters) {
  const int64_t streams = samples.size(0), steps = samples.size(1);
  if (streams == 0 || steps == 0) return;
  const Shape s = shape_from(shape);
  const OnDevice restored;
  Device device{};
  const Plan plan = plan_for(packed, s, streams, bf16, &device);
  FASTGEN_CHECK(plan.cluster > 0, "wavenet_generate: a block of this GPU has ", device.shared_bytes,
                " bytes of shared memory, too few for one stream of this network; use backend='reference'");
  Job job(s, plan);
  const Parts parts(job.layout, s, bf16);
  FASTGEN_CHECK(packed.numel() == parts.bytes, "wavenet_generate: packed weights of ", parts.bytes,
                " bytes are expected, got ", packed.numel());
  const auto* data = static_cast<const uint8_t*>(packed.data_ptr());
  job.streams = streams;
  Tensor scratch;
  if (plan.spilled) {
    const std::vector<int64_t> bytes{job.groups() * plan.cluster * job.scratch_bytes};
    scratch = torch::stable::new_empty(history, bytes, ScalarType::Byte);
    job.scratch = static_cast<unsigned char*>(scratch.data_ptr());
  }
  job.weights = data;
  job.floats = reinterpret_cast<const float*>(data + parts.floats);
  job.dilations = reinterpret_cast<const int64_t*>(data + parts.dilations);
  job.history_at = job.dilations + s.layers;
  job.distribution = static_cast<Distribution>(distribution);
  job.temperature = static_cast<float>(temperature);
  job.kept = {top_k, static_cast<float>(top_p)};
  job.log_scale_min = static_cast<float>(log_scale_min);
  job.steps = steps;
  job.position = position;
  job.history_rows = history.size(1);
  job.history_stride = history.size(2);
  job.history = static_cast<float*>(history.data_ptr());
  job.gate_bias = static_cast<const float*>(gate_bias.data_ptr());
  job.gate_bias_stride = gate_bias.size(0) > 1 ? 1 : 0;
  job.cond = cond ? static_cast<const float*>(cond->data_ptr()) : nullptr;
  job.uniforms = static_cast<const float*>(uniforms.data_ptr());
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
  check(launch(plan, job, bf16, current_stream(packed.get_device_index())), "wavenet_generate", "the launch");
}

}  // namespace
}  // namespace fastgen::wavenet

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("wavenet_pack_cuda", TORCH_BOX(&fastgen::wavenet::wavenet_pack_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastgen, CompositeExplicitAutograd, m) {
  m.impl("wavenet_plan", TORCH_BOX(&fastgen::wavenet::wavenet_plan));
}

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) {
  m.impl("wavenet_generate", TORCH_BOX(&fastgen::wavenet::wavenet_generate));
  m.impl("wavenet_fits", TORCH_BOX(&fastgen::wavenet::wavenet_fits));
}
