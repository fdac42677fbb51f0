// Both kernels of pixelcnn_images.cuh in the emulator; see files.h.
#include "../../csrc/cuda/pixelcnn_pixels.cuh"
#include "../../csrc/cuda/pixelcnn_rows.cuh"
#include "files.h"

using namespace fastgen::pixelcnn;

namespace {

template <class W>
void run() {
  const int threads = option<int>("threads");
  const auto shapes = read<int64_t>("shapes");
  const std::vector<Matrix> matrices = matrices_of(shapes);
  std::vector<std::vector<float>> weights;
  std::vector<const float*> starts;
  for (size_t i = 0; i + 1 < matrices.size(); ++i) weights.push_back(read<float>("matrix." + std::to_string(i)));
  for (const auto& w : weights) starts.push_back(w.data());
  std::vector<fastgen::Group<W>> packed(matrices.back().at / fastgen::kGroup);
  pack(starts, shapes, reinterpret_cast<W*>(packed.data()));
  const auto biases = read<float>("biases"), table = read<float>("table"), uniforms = read<float>("uniforms"),
             context = read<float>("context");
  const auto given = read<int64_t>("given");
  const auto known = read<uint8_t>("known");
  auto memory = read<float>("memory");
  Job job{};
  const auto planes = read<int64_t>("planes"), instructions = read<int64_t>("instructions");
  Program program = program_of(planes, instructions, shapes, option("outputs"));
  use(&program, option<int>("cluster"), &job);
  job.columns = option<int>("columns");
  job.far = !option("resident");
  job.meets |= option("meets") != 0;
  job.images_each = option<int>("images_each");
  job.row_cluster = option<int>("row_cluster");
  job.row_images = option<int>("row_images");
  job.images = option("images");
  job.colors = option("colors");
  job.height = option("height");
  job.width = option("width");
  job.memory_size = option("memory_size");
  job.bias_size = option("bias_size");
  if (!job.far) keep_weights(&program, 1 << 30, threads, sizeof(W), &job);
  job.scores = job.height * job.width;
  job.spilled = option("spilled");
  job.logistic = option("logistic");
  job.own_biases = option("own_biases");
  job.own_context = option("own_context");
  job.levels = option("levels");
  job.features = option("features");
  job.context_plane = option("context_plane");
  job.context_channels = option("context_channels");
  job.temperature = option<float>("temperature");
  job.log_scale_min = option<float>("log_scale_min");
  job.planes = program.planes.data();
  job.instructions = program.instructions.data();
  job.matrices = program.matrices.data();
  job.weights_at = packed.data();
  job.biases = biases.data();
  job.table = table.data();
  job.uniforms = uniforms.data();
  job.context = data_or_null(context);
  job.given = data_or_null(given);
  job.known = data_or_null(known);
  job.memory = memory.data();
  const int64_t pixels = job.images * job.colors * job.height * job.width;
  std::vector<float> parameters(pixels * job.outputs);
  std::vector<int64_t> values(pixels);
  job.parameters = parameters.data();
  job.values = values.data();
  const auto blocks = [&](int cluster, int images) {
    return static_cast<int>((job.images + images - 1) / images) * cluster;
  };
  std::vector<float> scratch(blocks(job.cluster, job.images_each) * job.scratch_floats(threads), NAN);
  job.scratch = scratch.data();
  fastgen::emulator::Launch for_rows{}, for_pixels{};
  for_rows = {blocks(job.row_cluster, job.row_images), job.row_cluster, threads};
  for_rows.shared_bytes = job.row_bytes(threads);
  for_pixels = {blocks(job.cluster, job.images_each), job.cluster, threads};
  for_pixels.shared_bytes = job.pixel_bytes(threads, sizeof(W));
  set_order(for_rows);
  set_order(for_pixels);
  for (job.y = option("first_row"); job.y < option("last_row"); ++job.y) {
    fastgen::emulator::launch(for_rows, [&] { Rows<W>(job).draw(); });
    fastgen::emulator::launch(for_pixels, [&] { Pixels<W>(job).draw(); });
  }
  write("out.values", values);
  write("out.parameters", parameters);
}

}  // namespace

int main(int count, char** words) {
  return guarded(count, words, [] { option("bf16") ? run<uint16_t>() : run<float>(); });
}
