// WaveNet sampling: the whole time loop in one call. See wavenet_streams.h and wavenet_roles.h.
#include "wavenet_roles.h"

namespace fastgen {
namespace {

constexpr int64_t kMostStreams = 64;    // streams at once; of more, what passes between layers leaves the cache
constexpr int64_t kEnoughStreams = 32;  // streams for which a thread can read all weights by itself
constexpr int64_t kFew = 3;             // streams for which reading weights takes longer than multiplying them
constexpr int64_t kLargestTeam = 16;    // members of a team: with more of them meetings take longer
constexpr int64_t kMemberBytes =
    128 << 10;  // bytes of a layer to read, for which a member of a team is worth its meetings

// How many threads are to share each layer, for so many streams at once; two that share it have less of each other than
// two with roles, unless nothing but memory is what they wait for.
template <class W>
int64_t team_size(const Packed<W>& net, int64_t streams, int64_t threads) {
  int64_t most = 0;
  for (const auto& layer : net.layers) {
    int64_t bytes = layer.current.bytes() + layer.residual.bytes() + layer.skip.bytes();
    for (const auto& old : layer.old) bytes += old.bytes() / (streams > kFewStreams ? 1 : kAhead);
    most = std::max(most, std::min<int64_t>(bytes / kMemberBytes, layer.current.rows / row_unit(net)));
  }
  const int64_t size = std::thread::hardware_concurrency() > 1 ? std::min({threads, most, kLargestTeam}) : 1;
  return size > 2 || (size == 2 && net.far) ? size : 1;
}

template <class W>
void run_team(const Job& job, const Packed<W>& net, int64_t first, int64_t count, int64_t size) {
  Streams<W> leader(job, net, first, count, false);
  Team team(static_cast<int>(size));
  for_each_worker(size, [&](int64_t i) {
    if (i == 0) {
      team.gather();
      leader.run_with(team, 0);
    } else {
      std::unique_ptr<Streams<W>> member;
      try {
        member = std::make_unique<Streams<W>>(job, net, first, count, false, &leader);
      } catch (const std::bad_alloc&) {
        return;  // the others do without
      }
      if (const int part = team.join()) member->run_with(team, part);
    }
  });
}

// Whether a team draws all streams: weights then come from memory once for all of them.
template <class W>
bool together(const Packed<W>& net, int64_t streams, int64_t threads) {
  const int64_t size = team_size(net, streams, threads);
  return size > 1 && (streams == 1 || (net.far && streams < kEnoughStreams * size));
}

template <class W>
void generate(const Job& job, const Packed<W>& net) {
  const int64_t threads = torch::stable::get_num_threads(), n = job.streams;
  if (together(net, n, threads)) {
    const int64_t rounds = (n + kMostStreams - 1) / kMostStreams;
    for (int64_t i = 0; i < rounds; ++i)
      run_team(job, net, i * n / rounds, (i + 1) * n / rounds - i * n / rounds, team_size(net, n, threads));
    return;
  }
  if (2 * n <= threads && std::thread::hardware_concurrency() > 1 && job.shape.layers > 0) {
    std::vector<std::unique_ptr<Streams<W>>> pairs;
    for (int64_t i = 0; i < n; ++i) pairs.push_back(std::make_unique<Streams<W>>(job, net, i, 1, true));
    return for_each_worker(2 * n, [&](int64_t i) { i % 2 == 0 ? pairs[i / 2]->lead() : pairs[i / 2]->help(); });
  }
  const int64_t workers = std::min(threads, n), share = (n + workers - 1) / workers;
  const int64_t rounds = (share + kMostStreams - 1) / kMostStreams, parts = workers * rounds;
  for_each_worker(workers, [&](int64_t i) {
    for (int64_t part = i * rounds; part < (i + 1) * rounds; ++part) {
      const int64_t first = part * n / parts, last = (part + 1) * n / parts;
      Streams<W>(job, net, first, last - first, false).run();
    }
  });
}

template <class F>
void with_format(bool bf16, bool few, F&& f) {
  if (bf16) return few ? f(BFloat16Weight{}) : f(int16_t{});
  few ? f(Float32Weight{}) : f(float{});
}

Shape shape_from(const std::vector<int64_t>& sizes) {
  FASTGEN_CHECK(sizes.size() == 7, "wavenet_generate: shape needs 7 numbers");
  const auto n = [&](int i) { return static_cast<int>(sizes[i]); };
  return {n(0), n(1), n(2), n(3), n(4), n(5), n(6)};
}

// wavenet_few(int[] shape, bool bf16, int streams) -> bool: whether so many are few for the threads that there are.
bool wavenet_few(std::vector<int64_t> shape, bool bf16, int64_t streams) {
  bool few = false;
  with_format(bf16, true, [&](auto format) {
    const int64_t threads = torch::stable::get_num_threads();
    const bool at_once = together(Packed<decltype(format)>(shape_from(shape), nullptr), streams, threads);
    few = streams <= kFew * (at_once ? 1 : threads);
  });
  return few;
}

// wavenet_pack(Tensor[] weights, bool bf16, bool few) -> Tensor: one uint8 buffer, laid out for this instruction set
// and for few streams or many, which its last byte tells, and whether a cache holds it: all can have the same size.
Tensor wavenet_pack(std::vector<Tensor> weights, bool bf16, bool few) {
  const Shape s = shape_of(weights);
  std::optional<Tensor> packed;
  with_format(bf16, few, [&](auto format) {
    using W = decltype(format);
    const int64_t bytes = Packed<W>(s, nullptr).bytes;
    packed = packed_buffer(weights[0], bytes + 1);
    auto* data = static_cast<uint8_t*>(packed->data_ptr());
    pack<W>(weights, s, data);
    data[bytes] = static_cast<uint8_t>(few | Packed<W>(s, nullptr).far << 1);
  });
  return *packed;
}

// See fastgen/ops/wavenet_generate.py for the meaning of the arguments; they are checked there.
void wavenet_generate(Tensor packed, std::vector<int64_t> shape, std::vector<int64_t> dilations, bool bf16,
                      int64_t distribution, double log_scale_min, double temperature, int64_t top_k, double top_p,
                      Tensor gate_bias, std::optional<Tensor> cond, Tensor uniforms, std::optional<Tensor> given,
                      int64_t position, Tensor history, Tensor last, Tensor samples, std::optional<Tensor> parameters) {
  Job job{};
  job.shape = shape_from(shape);
  job.dilations = std::move(dilations);
  job.distribution = static_cast<Distribution>(distribution);
  job.temperature = static_cast<float>(temperature);
  job.kept = {top_k, static_cast<float>(top_p)};
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
  const int layout = bytes > 0 ? data[bytes - 1] : 0;
  with_format(bf16, layout & 1, [&](auto format) {
    using W = decltype(format);
    const Packed<W> net(job.shape, data);
    FASTGEN_CHECK(bytes == net.bytes + 1 && layout >> 1 == net.far, "wavenet_generate: packed weights of ",
                  net.bytes + 1, " bytes are expected, got ", bytes,
                  " (packed for another shape, instruction set or cache?)");
    if (job.streams > 0 && job.steps > 0) generate(job, net);
  });
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("wavenet_pack", TORCH_BOX(&fastgen::wavenet_pack));
  m.impl("wavenet_generate", TORCH_BOX(&fastgen::wavenet_generate));
}
STABLE_TORCH_LIBRARY_IMPL(fastgen, CompositeExplicitAutograd, m) {
  m.impl("wavenet_few", TORCH_BOX(&fastgen::wavenet_few));
}
