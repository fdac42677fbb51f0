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

void count(int64_t planes, int64_t instructions, const std::vector<Matrix>& matrices, Job* job) {
  job->plane_count = planes;
  job->instruction_count = instructions;
  job->matrix_count = static_cast<int64_t>(matrices.size());
  job->most_inputs = most_inputs_of(matrices);
}

// Whether a block of the GPU on which the packed weights lie has the memory for the program and its windows.
bool pixelcnn_fits(Tensor packed, std::vector<int64_t> shapes, int64_t planes, int64_t instructions) {
  const OnDevice restored;
  Device device{};
  check(device_of(packed.get_device_index(), &device), "pixelcnn_generate", "the device");
  Job job{};
  const std::vector<Matrix> matrices = matrices_of(shapes);
  count(planes, instructions, matrices, &job);
  return job.shared_bytes(4, kThreads) <= device.shared_bytes;
}

void pixelcnn_generate(Tensor packed, std::vector<int64_t> shapes, std::vector<int64_t> planes,
                       std::vector<int64_t> instructions, bool bf16, Tensor biases, std::optional<Tensor> context,
                       int64_t context_plane, Tensor table, int64_t distribution, int64_t outputs, double log_scale_min,
                       double temperature, Tensor uniforms, std::optional<Tensor> given, std::optional<Tensor> known,
                       int64_t first_row, int64_t last_row, Tensor memory, Tensor values,
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
  const std::vector<Matrix> matrices = matrices_of(shapes);
  FASTGEN_CHECK(packed.numel() == matrices.back().at * (bf16 ? 2 : 4), op, ": packed weights of another size");
  // the program goes to the GPU in one piece: planes, instructions, matrices
  const std::vector<Instruction> kept = fused(instructions, matrices, planes);
  std::vector<int64_t> program = planes;
  const auto append = [&](const auto& items) {
    const auto* numbers = reinterpret_cast<const int64_t*>(items.data());
    program.insert(program.end(), numbers, numbers + items.size() * sizeof(items[0]) / 8);
    return static_cast<int64_t>(program.size());
  };
  const int64_t behind = append(kept);
  append(matrices);
  const auto size = static_cast<int64_t>(program.size());
  Tensor there = torch::stable::new_empty(values, std::vector<int64_t>{size}, ScalarType::Long);
  check(copy_to_device(there.data_ptr(), program.data(), size * 8, stream), op, "the program");
  const auto* numbers = static_cast<const int64_t*>(there.data_ptr());
  job.planes = reinterpret_cast<const Plane*>(numbers);
  job.instructions = reinterpret_cast<const Instruction*>(numbers + planes.size());
  job.matrices = reinterpret_cast<const Matrix*>(numbers + behind);
  count(static_cast<int64_t>(planes.size()) / kPlaneInts, static_cast<int64_t>(kept.size()), matrices, &job);
  for (size_t i = 0; i < instructions.size(); i += kInstructionInts)
    if (instructions[i] == static_cast<int64_t>(Kind::kAttention)) job.scores = job.height * job.width;
  job.first_row = first_row;
  job.last_row = last_row;
  job.memory_size = memory.size(1);
  FASTGEN_CHECK(job.memory_size % kGroup == 0, op, ": memory's rows must be multiples of ", kGroup, " floats");
  job.bias_size = biases.size(1);
  job.logistic = distribution == 1;
  job.own_biases = biases.size(0) > 1;
  job.own_context = context && context->size(0) > 1;
  job.outputs = outputs;
  job.levels = table.size(0);
  job.features = table.size(1);
  job.context_plane = context_plane;
  job.context_channels = context ? context->size(3) : 0;
  job.temperature = static_cast<float>(temperature);
  job.log_scale_min = static_cast<float>(log_scale_min);
  job.weights = packed.data_ptr();
  job.biases = static_cast<const float*>(biases.data_ptr());
  job.table = static_cast<const float*>(table.data_ptr());
  job.uniforms = static_cast<const float*>(uniforms.data_ptr());
  job.context = data_of<float>(context);
  job.given = data_of<int64_t>(given);
  job.known = data_of<uint8_t>(known);
  job.memory = static_cast<float*>(memory.data_ptr());
  job.values = static_cast<int64_t*>(values.data_ptr());
  job.parameters = parameters ? static_cast<float*>(parameters->data_ptr()) : nullptr;
  job.spilled = job.shared_bytes(4, kThreads) > device.shared_bytes;
  FASTGEN_CHECK(job.shared_bytes(4, kThreads) <= device.shared_bytes, op, ": this network needs ",
                job.shared_bytes(4, kThreads), " bytes of a block's shared memory, this GPU has ", device.shared_bytes,
                "; use backend='reference'");
  const int columns = job.shared_bytes(kMostColumns, kThreads) <= device.shared_bytes ? kMostColumns : 4;
  // as few images in a group as leave no group waiting for another
  job.images_each = 1;
  for (job.cluster = device.largest_cluster; job.cluster > 1 && active(job, columns, bf16) == 0;) job.cluster /= 2;
  const int64_t groups = std::max(1, active(job, columns, bf16));
  job.images_each = static_cast<int>((job.images + groups - 1) / groups);
  Tensor scratch;
  if (job.spilled) {
    const int64_t blocks = (job.images + job.images_each - 1) / job.images_each * job.cluster;
    scratch = torch::stable::new_empty(memory, std::vector<int64_t>{blocks * job.scores_of_block(kThreads)});
    job.scratch = static_cast<float*>(scratch.data_ptr());
  }
  check(launch(job, columns, bf16, stream), op, "the launch");
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
