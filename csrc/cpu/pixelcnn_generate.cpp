// Sampling of PixelCNN and its kin: all pixels of some rows in one call. See pixel_program.h.
#include <memory>

#include "pixel_images.h"

namespace fastgen {
namespace {

// How many images a thread draws at once: what attention remembers of them is read again for every pixel, and comes
// from memory once it outgrows the cache, while weights are read once for all of them. Half of the cache is best
// filled, or three quarters for the sake of a few images more.
int64_t images_at_once(const PixelJob& job, int64_t weight_bytes, int64_t threads) {
  constexpr int64_t kOne = 1, kFew = 4;
  const auto each = std::max<int64_t>(job.memory_size * sizeof(float), 1);
  const int64_t quarter = shared_cache_bytes() / 4 / threads;
  return std::max({kOne, 2 * quarter / each, std::min(3 * quarter / each, kFew), weight_bytes / each});
}

template <class W>
void generate(const PixelJob& job, const PackedProgram<W>& net) {
  const int64_t threads = torch::stable::get_num_threads();
  // a pair pays for what its two caches hold with what passes between them, which grows with the images
  const bool pairs = threads > 1 && std::thread::hardware_concurrency() > 1 && job.images <= threads;
  const int64_t groups = std::min(pairs ? threads / 2 : threads, job.images);
  const int64_t share = (job.images + groups - 1) / groups, most = images_at_once(job, net.bytes, groups);
  const int64_t rounds = pairs ? 1 : (share + most - 1) / most, count = groups * rounds;
  std::vector<std::unique_ptr<Images<W>>> images;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = i * job.images / count, last = (i + 1) * job.images / count;
    images.push_back(std::make_unique<Images<W>>(job, net, first, last - first));
  }
  if (!pairs)
    return for_each_worker(groups, [&](int64_t i) {
      for (int64_t round = 0; round < rounds; ++round) images[i * rounds + round]->alone();
    });
  for_each_worker(2 * groups, [&](int64_t i) { i % 2 == 0 ? images[i / 2]->lead() : images[i / 2]->help(); });
}

// pixelcnn_pack(Tensor[] matrices, int[] shapes, bool bf16) -> Tensor: one uint8 buffer, laid out for this instruction
// set.
Tensor pixelcnn_pack(std::vector<Tensor> matrices, std::vector<int64_t> shapes, bool bf16) {
  FASTGEN_CHECK(matrices.size() * kMatrixInts == shapes.size(), "pixelcnn_pack: shapes do not fit the matrices");
  const int64_t bytes =
      bf16 ? PackedProgram<int16_t>(shapes, nullptr).bytes : PackedProgram<float>(shapes, nullptr).bytes;
  Tensor packed = packed_buffer(matrices[0], bytes);
  auto* data = static_cast<uint8_t*>(packed.data_ptr());
  bf16 ? pack_program<int16_t>(matrices, shapes, data) : pack_program<float>(matrices, shapes, data);
  return packed;
}

// See fastgen/ops/pixelcnn_generate.py for the meaning of the arguments; they are checked there.
void pixelcnn_generate(Tensor packed, std::vector<int64_t> shapes, std::vector<int64_t> planes,
                       std::vector<int64_t> instructions, bool bf16, Tensor biases, std::optional<Tensor> context,
                       int64_t context_plane, Tensor table, int64_t distribution, int64_t outputs, double log_scale_min,
                       double temperature, int64_t top_k, double top_p, Tensor uniforms, std::optional<Tensor> given,
                       std::optional<Tensor> known, int64_t first_row, int64_t last_row, Tensor memory, Tensor values,
                       std::optional<Tensor> parameters) {
  PixelJob job{};
  std::atomic<bool> not_finite = false;
  job.not_finite = &not_finite;
  for (size_t i = 0; i < planes.size(); i += kPlaneInts) {
    const int64_t* p = planes.data() + i;
    job.planes.push_back({p[0], p[1], p[2], p[3], p[4], p[5], p[6]});
  }
  for (size_t i = 0; i < instructions.size(); i += kInstructionInts) {
    const int64_t* p = instructions.data() + i;
    job.instructions.push_back({static_cast<Kind>(p[0]), static_cast<Phase>(p[1]), p[2], p[3], p[4], p[5], p[6], p[7],
                                p[8], p[9], false, false});
  }
  job.last = run_late(job.instructions, job.planes);
  mark_meetings(job.instructions, job.planes);
  mark_meetings(job.last, job.planes);
  job.goes_back = std::ranges::any_of(job.instructions, [](const Instruction& i) { return i.phase == Phase::kBack; });
  job.ahead = takes_guesses(job.instructions, job.planes) ? kAhead : 1;
  job.input = std::ranges::find(job.instructions, Kind::kSample, &Instruction::kind)->dst;
  job.images = values.size(0);
  job.colors = values.size(1);
  job.height = values.size(2);
  job.width = values.size(3);
  job.first_row = first_row;
  job.last_row = last_row;
  job.memory_size = memory.size(1);
  job.bias_size = biases.size(1);
  job.distribution = static_cast<Distribution>(distribution);
  job.outputs = outputs;
  job.levels = table.size(0);
  job.features = table.size(1);
  job.temperature = static_cast<float>(temperature);
  job.kept = {top_k, static_cast<float>(top_p)};
  job.log_scale_min = static_cast<float>(log_scale_min);
  job.biases = data_of<float>(biases);
  job.own_biases = biases.size(0) > 1;
  job.table = data_of<float>(table);
  job.uniforms = data_of<float>(uniforms);
  job.context = data_of<float>(context);
  job.own_context = context && context->size(0) > 1;
  job.context_plane = context_plane;
  job.context_channels = context ? context->size(3) : 0;
  job.given = data_of<int64_t>(given);
  job.known = data_of<uint8_t>(known);
  job.memory = static_cast<float*>(memory.data_ptr());
  job.values = static_cast<int64_t*>(values.data_ptr());
  job.parameters = parameters ? static_cast<float*>(parameters->data_ptr()) : nullptr;
  const auto* data = static_cast<const uint8_t*>(packed.data_ptr());
  const auto run = [&](auto&& net) {
    FASTGEN_CHECK(packed.numel() == net.bytes, "pixelcnn_generate: packed weights of ", net.bytes,
                  " bytes are expected, got ", packed.numel(), " (packed for another instruction set?)");
    if (job.images > 0) generate(job, net);
    FASTGEN_CHECK(!not_finite, "pixelcnn_generate: the network's outputs are not finite (its weights or its context ",
                  "are too large)");
  };
  bf16 ? run(PackedProgram<int16_t>(shapes, data)) : run(PackedProgram<float>(shapes, data));
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("pixelcnn_pack", TORCH_BOX(&fastgen::pixelcnn_pack));
  m.impl("pixelcnn_generate", TORCH_BOX(&fastgen::pixelcnn_generate));
}
