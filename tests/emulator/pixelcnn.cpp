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
  job.columns = option<int>("columns");
  job.far = !option("resident");
  job.images_each = option<int>("images_each");
  job.row_cluster = option<int>("row_cluster");
  job.row_images = option<int>("row_images");
  job.images = option("images");
  job.colors = option("colors");
  job.height = option("height");
  job.width = option("width");
  job.memory_size = option("memory_size");
  job.bias_size = option("bias_size");
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
  job.kept = {option("top_k"), option<float>("top_p")};
  job.log_scale_min = option<float>("log_scale_min");
  job.weights_at = packed.data();
  job.biases = biases.data();
  job.table = table.data();
  job.uniforms = uniforms.data();
  job.context = data_or_null(context);
  job.given = data_or_null(given);
  job.known = data_or_null(known);
  job.memory = memory.data();
  const int64_t pixels = job.images * job.colors * job.height * job.width;
  std::vector<float> parameters(pixels * option("outputs"));
  std::vector<int64_t> values(pixels);
  job.parameters = parameters.data();
  job.values = values.data();
  const auto blocks = [&](int cluster, int images) {
    return static_cast<int>((job.images + images - 1) / images) * cluster;
  };
  struct Phased {
    Program program;
    Job job;
    std::vector<float> scratch = {};
    fastgen::emulator::Launch how = {};
  };
  const auto prepared = [&](Phase phase) {
    Phased of{program_of(planes, instructions, shapes, option("outputs"), phase), job};
    use(&of.program, option<int>("cluster"), &of.job);
    of.job.meets |= option("meets") != 0;
    if (!job.far) keep_weights(&of.program, 1 << 30, threads, sizeof(W), &of.job);
    of.job.planes = of.program.planes.data();
    of.job.instructions = of.program.instructions.data();
    of.job.matrices = of.program.matrices.data();
    of.how = {blocks(of.job.cluster, job.images_each), of.job.cluster, threads};
    of.how.shared_bytes = of.job.pixel_bytes(threads, sizeof(W));
    of.scratch.assign(of.how.blocks * of.job.scratch_floats(threads), NAN);
    of.job.scratch = of.scratch.data();
    set_order(of.how);
    return of;
  };
  Phased drawn = prepared(Phase::kPixel), back = prepared(Phase::kBack);
  fastgen::emulator::Launch for_rows{blocks(job.row_cluster, job.row_images), job.row_cluster, threads};
  for_rows.shared_bytes = drawn.job.row_bytes(threads);
  set_order(for_rows);
  for (int64_t y = option("first_row"); y < option("last_row"); ++y) {
    drawn.job.y = back.job.y = y;
    fastgen::emulator::launch(for_rows, [&] { Rows<W>(drawn.job).draw(); });
    if (y > 0 && back.job.begin < back.job.end)
      fastgen::emulator::launch(back.how, [&] { Pixels<W>(back.job).draw(); });
    fastgen::emulator::launch(drawn.how, [&] { Pixels<W>(drawn.job).draw(); });
  }
  write("out.values", values);
  write("out.parameters", parameters);
}

}  // namespace

int main(int count, char** words) {
  return guarded(count, words, [] { option("bf16") ? run<uint16_t>() : run<float>(); });
}
