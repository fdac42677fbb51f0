// wavenet_generate.cuh in the emulator: wavenet FOLDER KEY=NUMBER..., each array a file of the folder, results written
// there. Exits with 3 and a message where the emulator finds fault.
#include "../../csrc/cuda/wavenet_generate.cuh"
#include "../../csrc/cuda/wavenet_pack.h"
#include "files.h"

using fastgen::Group;
using fastgen::kGroup;
using namespace fastgen::wavenet;

namespace {

template <int M, bool kResident, class W>
void run() {
  const Shape s{option<int>("inputs"),  option<int>("residual"), option<int>("gate"),        option<int>("skip"),
                option<int>("outputs"), option<int>("layers"),   option<int>("kernel_size"), option<int>("local")};
  const int threads = option<int>("threads");
  const Layout layout(s);
  std::vector<std::vector<float>> w;
  for (const char* name : {"input", "input_bias", "conv", "residual", "residual_bias", "skip", "skip_bias", "hidden",
                           "hidden_bias", "output", "output_bias", "local"})
    w.push_back(read<float>(std::string("weights.") + name));
  std::vector<Group<W>> packed(layout.weights / kGroup);
  std::vector<float> floats(layout.floats);
  pack<W>({w[0].data(), w[1].data(), w[2].data(), w[3].data(), w[4].data(), w[5].data(), w[6].data(), w[7].data(),
           w[8].data(), w[9].data(), w[10].data(), w[11].data()},
          s, layout, reinterpret_cast<W*>(packed.data()), floats.data());
  const auto dilations = read<int64_t>("dilations");
  std::vector<int64_t> history_at;
  int64_t rows = 0;
  for (const int64_t d : dilations) {
    history_at.push_back(rows);
    rows += (s.kernel_size - 1) * d;
  }
  const auto gate_bias = read<float>("gate_bias"), cond = read<float>("cond"), uniforms = read<float>("uniforms");
  auto history = read<float>("history"), last_value = read<float>("last_value"),
       given_value = read<float>("given_value");
  auto last_class = read<int64_t>("last_class"), given_class = read<int64_t>("given_class");
  const Plan plan{option<int>("cluster"), option<int>("tile"), option<int>("tiles"), kResident, option("spilled") != 0};
  Job job(s, plan);
  job.distribution = static_cast<Distribution>(option<int>("distribution"));
  job.temperature = option<float>("temperature");
  job.kept = {option("top_k"), option<float>("top_p")};
  job.log_scale_min = option<float>("log_scale_min");
  job.streams = option("streams");
  job.steps = option("steps");
  job.given_steps = option("given_steps");
  job.position = option("position");
  job.history_rows = rows;
  job.history_stride = fastgen::round_up(s.residual, 32);
  job.weights = packed.data();
  job.floats = floats.data();
  job.dilations = dilations.data();
  job.history_at = history_at.data();
  job.gate_bias = gate_bias.data();
  job.gate_bias_stride = option("gate_bias_stride");
  job.cond = data_or_null(cond);
  job.uniforms = uniforms.data();
  job.history = history.data();
  std::vector<float> parameters(job.streams * job.steps * s.outputs, -1), values(job.streams * job.steps);
  std::vector<int64_t> classes(job.streams * job.steps);
  job.parameters = parameters.data();
  job.given_class = data_or_null(given_class);
  job.given_value = data_or_null(given_value);
  job.classes = classes.data();
  job.values = values.data();
  job.last_class = last_class.data();
  job.last_value = last_value.data();
  fastgen::emulator::Launch how{};
  how.blocks = static_cast<int>(job.groups()) * job.cluster;
  how.shared_bytes = job.shared_bytes(plan, kResident ? sizeof(W) : 0);
  std::vector<unsigned char> scratch(how.blocks * job.scratch_bytes + 16, 0xFF);
  job.scratch = plan.spilled ? scratch.data() : nullptr;
  how.cluster = job.cluster;
  how.threads = threads;
  set_order(how);
  fastgen::emulator::launch(how, [&] { Block<M, kResident, W>(job).run(); });
  write("out.parameters", parameters);
  write("out.values", values);
  write("out.classes", classes);
  write("out.history", history);
  write("out.last_value", last_value);
  write("out.last_class", last_class);
}

template <int M>
void with() {
  const bool resident = option("resident"), bf16 = option("bf16");
  if (bf16)
    resident ? run<M, true, uint16_t>() : run<M, false, uint16_t>();
  else
    resident ? run<M, true, float>() : run<M, false, float>();
}

}  // namespace

int main(int count, char** words) {
  return guarded(count, words, [] { option("tile") <= 4 ? with<1>() : with<2>(); });
}
