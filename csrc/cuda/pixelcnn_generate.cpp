// pixelcnn_generate for CUDA tensors. The arguments' meaning, and their checks: fastgen/ops/pixelcnn_generate.py.
#include <algorithm>

#include "host.h"
#include "pixelcnn_job.h"

namespace fastgen::pixelcnn {
namespace {

// -> one uint8 buffer, on the CPU as the matrices are.
Tensor pixelcnn_pack_cuda(std::vector<Tensor> matrices, std::vector<int64_t> shapes, bool bf16) {
  FASTGEN_CHECK(matrices.size() * kMatrixInts == shapes.size(), "pixelcnn_pack_cuda: shapes do not fit the matrices");
  const int64_t bytes = matrices_of(shapes).back().at * (bf16 ? 2 : 4);
  Tensor packed = torch::stable::new_empty(matrices[0], std::vector<int64_t>{bytes}, ScalarType::Byte);
  std::memset(packed.data_ptr(), 0, bytes);
  std::vector<const float*> weights;
  for (const Tensor& m : matrices) weights.push_back(static_cast<const float*>(m.data_ptr()));
  if (bf16)
    pack(weights, shapes, static_cast<uint16_t*>(packed.data_ptr()));
  else
    pack(weights, shapes, static_cast<float*>(packed.data_ptr()));
  return packed;
}

// Those that go from pixel to pixel, in the order in which they run.
std::vector<Phase> phases_of(const std::vector<int64_t>& instructions) {
  for (size_t i = 1; i < instructions.size(); i += kInstructionInts)
    if (static_cast<Phase>(instructions[i]) == Phase::kBack) return {Phase::kBack, Phase::kPixel};
  return {Phase::kPixel};
}

// The most blocks of a cluster, where the device has clusters.
int largest_of(const Device& device) { return device.largest_cluster > 1 ? kLargestCluster : 1; }

// Whether the GPU on which the packed weights lie has the memory to draw images with a program.
bool pixelcnn_fits(Tensor packed, std::vector<int64_t> shapes, std::vector<int64_t> planes,
                   std::vector<int64_t> instructions, bool bf16, int64_t outputs) {
  const OnDevice restored;
  Device device{};
  check(device_of(packed.get_device_index(), &device), "pixelcnn_generate", "the device");
  for (const Phase phase : phases_of(instructions)) {
    Program program = program_of(planes, instructions, shapes, outputs, phase);
    Job job{};
    job.images = 1;
    if (!arrange(&program, largest_of(device), device.shared_bytes, bf16, &job)) return false;
  }
  return true;
}

// A job, and what it has on the GPU.
struct Launched {
  Job job;
  Tensor program = {}, scratch = {};

  // like: tensors of whole numbers and of floats there.
  void take(const Program& of, const Tensor& like, const Tensor& like_floats, void* stream) {
    std::vector<int64_t> numbers;  // they go there in one piece: planes, instructions, matrices
    const auto append = [&](const auto& items) {
      const auto* from = reinterpret_cast<const int64_t*>(items.data());
      numbers.insert(numbers.end(), from, from + items.size() * sizeof(items[0]) / 8);
      return static_cast<int64_t>(numbers.size());
    };
    const int64_t instructions_at = append(of.planes), matrices_at = append(of.instructions),
                  size = append(of.matrices);
    program = torch::stable::new_empty(like, std::vector<int64_t>{size}, ScalarType::Long);
    check(copy_to_device(program.data_ptr(), numbers.data(), size * 8, stream), "pixelcnn_generate", "the program");
    const auto* start = static_cast<const int64_t*>(program.data_ptr());
    job.planes = reinterpret_cast<const Plane*>(start);
    job.instructions = reinterpret_cast<const Instruction*>(start + instructions_at);
    job.matrices = reinterpret_cast<const Matrix*>(start + matrices_at);
    if (const int64_t each = job.scratch_floats(kPixelThreads)) {
      const int64_t blocks = (job.images + job.images_each - 1) / job.images_each * job.cluster;
      scratch = torch::stable::new_empty(like_floats, std::vector<int64_t>{blocks * each});
      job.scratch = static_cast<float*>(scratch.data_ptr());
    }
  }
};

void pixelcnn_generate(Tensor packed, std::vector<int64_t> shapes, std::vector<int64_t> planes,
                       std::vector<int64_t> instructions, bool bf16, Tensor biases, std::optional<Tensor> context,
                       int64_t context_plane, Tensor table, int64_t distribution, int64_t outputs, double log_scale_min,
                       double temperature, int64_t top_k, double top_p, Tensor uniforms, std::optional<Tensor> given,
                       std::optional<Tensor> known, int64_t first_row, int64_t last_row, Tensor memory, Tensor values,
                       std::optional<Tensor> parameters) {
  const char* op = "pixelcnn_generate";
  Job job{};
  job.images = values.size(0);
  job.colors = values.size(1);
  job.height = values.size(2);
  job.width = values.size(3);
  if (job.images == 0 || job.width == 0) return;
  const OnDevice restored;
  Device device{};
  check(device_of(packed.get_device_index(), &device), op, "the device");
  void* stream = current_stream(packed.get_device_index());
  const int64_t weights = matrices_of(shapes).back().at;
  FASTGEN_CHECK(packed.numel() == weights * (bf16 ? 2 : 4), op, ": packed weights of another size");
  job.memory_size = memory.size(1);
  FASTGEN_CHECK(job.memory_size % kGroup == 0, op, ": memory's rows must be multiples of ", kGroup, " floats");
  job.bias_size = biases.size(1);
  job.logistic = distribution == 1;
  job.own_biases = biases.size(0) > 1;
  job.own_context = context && context->size(0) > 1;
  job.levels = table.size(0);
  job.features = table.size(1);
  job.context_plane = context_plane;
  job.context_channels = context ? context->size(3) : 0;
  job.temperature = static_cast<float>(temperature);
  job.kept = {top_k, static_cast<float>(top_p)};
  job.log_scale_min = static_cast<float>(log_scale_min);
  job.weights_at = packed.data_ptr();
  job.biases = static_cast<const float*>(biases.data_ptr());
  job.table = static_cast<const float*>(table.data_ptr());
  job.uniforms = static_cast<const float*>(uniforms.data_ptr());
  job.context = data_of<float>(context);
  job.given = data_of<int64_t>(given);
  job.known = data_of<uint8_t>(known);
  job.memory = static_cast<float*>(memory.data_ptr());
  job.values = static_cast<int64_t*>(values.data_ptr());
  job.parameters = parameters ? static_cast<float*>(parameters->data_ptr()) : nullptr;
  const auto prepared = [&](Phase phase) {
    Launched of{job};
    Program program = program_of(planes, instructions, shapes, outputs, phase);
    for (const Instruction& i : program.instructions)
      if (i.in(phase) && i.is(Kind::kAttention)) of.job.scores = job.height * job.width;
    FASTGEN_CHECK(arrange(&program, largest_of(device), device.shared_bytes, bf16, &of.job), op,
                  ": this network needs more than the ", device.shared_bytes,
                  " bytes of shared memory that a block of this GPU has; use backend='reference'");
    of.take(program, values, memory, stream);
    return of;
  };
  std::vector<Launched> all;
  for (const Phase phase : phases_of(instructions)) all.push_back(prepared(phase));
  for (int64_t y = first_row; y < last_row; ++y) {
    for (Launched& each : all) each.job.y = y;
    const Job& pixels = all.back().job;
    if (pixels.row_count || job.context) check(launch(pixels, bf16, true, stream), op, "the launch");
    for (const Launched& each : all)
      if (y > 0 || !each.job.back) check(launch(each.job, bf16, false, stream), op, "the launch");
  }
}

}  // namespace
}  // namespace fastgen::pixelcnn

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("pixelcnn_pack_cuda", TORCH_BOX(&fastgen::pixelcnn::pixelcnn_pack_cuda));
}

STABLE_TORCH_LIBRARY_IMPL(fastgen, CUDA, m) {
  m.impl("pixelcnn_generate", TORCH_BOX(&fastgen::pixelcnn::pixelcnn_generate));
  m.impl("pixelcnn_fits", TORCH_BOX(&fastgen::pixelcnn::pixelcnn_fits));
}
