// WaveNet sampling: the whole time loop in one call.
//
// Each step reads every weight of the current sample once; what bounds it is weight bytes, so:
//   - products with past samples (the "old taps") are computed for several steps ahead, as far as the dilation allows,
//     so that their weights are read once for up to kAhead samples;
//   - many streams share each weight that is read; streams are divided over threads, which never wait for each other;
//   - a single stream uses two threads with different roles. One walks the layers (current tap, gate, residual); the
//     other takes each layer's gate output, adds the skips, runs the output layers, samples, and prepares old taps. All
//     messages go one way at a time, so neither thread waits except at the turn of a step.
#include <atomic>
#include <bit>
#include <chrono>
#include <limits>
#include <memory>
#include <string>
#include <thread>

#include "sampling.h"
#include "wavenet_weights.h"

namespace fastgen {
namespace {

constexpr int kAhead = 8;           // samples for which old taps are computed together
constexpr int kFewStreams = 2;      // up to here old taps are computed ahead; above, streams share the weights anyway
constexpr int kPatience = 20000;    // polls before a waiting thread offers its core to others
constexpr double kLostShare = 0.3;  // of the time spent waiting beyond patience, above which one thread goes on alone
constexpr double kLostAtLeast = 0.02;  // seconds
constexpr double kMeetingTime = 5e-3;  // seconds to wait for a second thread
constexpr double kSlowHandOff = 1e-6;  // seconds one way, above which two threads are slower than one

// One call's arguments.
struct Job {
  Shape shape;
  std::vector<int64_t> dilations;
  Distribution distribution;
  float temperature, log_scale_min;
  int64_t streams, steps, given_steps, position, uniforms_per_step;
  const float *gate_bias, *cond, *uniforms;
  int64_t gate_bias_stride;  // 0 where all streams share it
  float *history, *parameters;
  const int64_t* given_class;
  const float* given_value;
  int64_t *classes, *last_class;
  float *values, *last_value;
};

inline float* aligned(float* p) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(p) + 127) & ~uintptr_t{127});
}

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// In place of a step: "go home" and "stay".
constexpr int64_t kParted = std::numeric_limits<int64_t>::max(), kTogether = kParted - 1;

// How far the thread that writes it has come; on cache lines of its own.
struct alignas(128) Flag {
  std::atomic<int64_t> step{-1};
  void publish(int64_t t) { step.store(t, std::memory_order_release); }
  // Returns the seconds lost once patience had run out: the other thread has probably lost its core.
  double wait(int64_t t) const {
    for (int spins = 0; spins < kPatience; ++spins)
      if (step.load(std::memory_order_acquire) >= t) return 0;
    const double start = now();
    while (step.load(std::memory_order_acquire) < t) std::this_thread::yield();
    return now() - start;
  }
};

// The streams [first, first + count) of a job, advanced by one thread or by two.
template <class W>
class Streams {
 public:
  Streams(const Job& job, const Packed<W>& net, int64_t first, int64_t count, bool two_threads)
      : job_(job), net_(net), first_(first), n_(static_cast<int>(count)), two_threads_(two_threads) {
    const Shape& s = job.shape;
    r_ = s.residual_padded();
    h_ = s.gate_padded();
    s_ = static_cast<int>(round_up(s.skip, 32));
    o_ = static_cast<int>(round_up(s.outputs, 16));
    for (int64_t d : job.dilations) rows_ += (s.kernel_size - 1) * d;
    layers_.resize(s.layers);
    int64_t at = 0, pending = 0;
    for (int l = 0; l < s.layers; ++l) {
      Layer& layer = layers_[l];
      layer.dilation = job.dilations[l];
      layer.length = (s.kernel_size - 1) * layer.dilation;
      layer.history = at;
      at += layer.length;
      layer.ahead =
          n_ > kFewStreams ? 1 : std::bit_floor(static_cast<uint32_t>(std::min<int64_t>(kAhead, layer.dilation)));
      layer.helped = two_threads && s.kernel_size > 1 && layer.dilation >= 2 * kAhead;
      layer.offset = layer.helped ? l % kAhead : 0;
      layer.pending = pending;
      if (two_threads || layer.ahead > 1)
        pending += int64_t{2} * layer.ahead * n_ * 2 * h_;
      else
        shared_pending_ = true;
    }
    if (two_threads) share_skips();
    // layers that prepare nothing ahead use their block at once, so they share one
    const int64_t shared = pending;
    if (shared_pending_) pending += int64_t{2} * n_ * 2 * h_;
    for (Layer& layer : layers_)
      if (!two_threads && layer.ahead == 1) layer.pending = shared;
    bias_rows_ = job.gate_bias_stride ? n_ : 1;
    const int64_t floats =
        pending + int64_t{n_} * (r_ + 4 * h_ + 4 * s_ + o_) + bias_rows_ * s.layers * 2 * h_ + int64_t{s.layers} * h_;
    memory_.reset(new float[floats + 64 * 16]());
    float* p = aligned(memory_.get());
    const auto take = [&](int64_t n) {
      float* q = p;
      p = aligned(p + n);
      return q;
    };
    pending_ = take(pending);
    x_ = take(int64_t{n_} * r_);
    a_ = take(int64_t{n_} * 2 * h_);
    z_ = take(int64_t{n_} * h_);
    skip_ = take(int64_t{n_} * s_);
    led_skip_ = take(s_);
    hidden_ = take(int64_t{n_} * s_);
    out_ = take(int64_t{n_} * o_);
    bias_ = take(bias_rows_ * s.layers * 2 * h_);
    mail_ = take(int64_t{s.layers} * h_);
    for (int64_t row = 0; row < bias_rows_ * s.layers; ++row) {
      const float* from = job.gate_bias + (job.gate_bias_stride ? first * s.layers : 0) * 2 * s.gate;
      for (int i = 0; i < s.gate; ++i) {
        bias_[row * 2 * h_ + i] = from[row * 2 * s.gate + i];
        bias_[row * 2 * h_ + h_ + i] = from[row * 2 * s.gate + s.gate + i];
      }
    }
    const int columns = std::max(n_ * kAhead, 1);
    old_x_.resize(columns);
    old_in_.resize(columns);
    old_out_.resize(columns);
    helper_x_.resize(columns);
    helper_in_.resize(columns);
    helper_out_.resize(columns);
    flags_ = std::vector<Flag>(two_threads ? s.layers + 1 : 0);
    for (auto* p : {&x_at_, &a_at_, &z_at_, &skip_at_, &hidden_at_, &out_at_, &bias_at_, &pre_at_}) p->resize(n_);
    for (int i = 0; i < n_; ++i) {
      x_at_[i] = x_ + int64_t{i} * r_;
      a_at_[i] = a_ + int64_t{i} * 2 * h_;
      z_at_[i] = z_ + int64_t{i} * h_;
      skip_at_[i] = skip_ + int64_t{i} * s_;
      hidden_at_[i] = hidden_ + int64_t{i} * s_;
      out_at_[i] = out_ + int64_t{i} * o_;
    }
  }

  void run() {
    if (!two_threads_) return alone(0);
    for_each_worker(2, [&](int64_t role) { role == 0 ? lead() : help(); });
  }

 private:
  struct Layer {
    int64_t dilation, length, history, pending;
    int ahead, offset;
    bool helped;    // its old taps are the helper's work
    bool led_skip;  // its skip is the leader's
  };

  // Both threads should have as much to read in a step; where the helper has more, some skips, never the last, move
  // over.
  void share_skips() {
    const Shape& s = job_.shape;
    const double conv = 2.0 * s.gate * s.residual, skip = static_cast<double>(s.skip) * s.gate;
    double leader = s.layers * (conv + static_cast<double>(s.gate) * s.residual);
    double helper = s.layers * skip + static_cast<double>(s.skip) * (s.skip + s.outputs);
    for (const Layer& layer : layers_) (layer.helped ? helper : leader) += (s.kernel_size - 1) * conv / layer.ahead;
    const double more = std::clamp((helper - leader) / (2 * skip), 0.0, s.layers / 2.0);
    const int moved = static_cast<int>(more);
    for (int i = 0; i < moved; ++i) layers_[i * s.layers / moved].led_skip = true;
  }

  void alone(int64_t begin) {
    const TileScope tiles;
    for (Layer& layer : layers_) layer.offset = 0;
    for (int64_t t = begin; t < job_.steps; ++t) {
      embed();
      start_skip();
      for (int l = 0; l < job_.shape.layers; ++l) {
        if (t == begin || t % layers_[l].ahead == 0) prepare(l, t, false);
        gated(l, t);
        add_skip(l, z_at_.data());
        if (l + 1 < job_.shape.layers) add_residual(l);
      }
      emit(t);
    }
  }

  // Whether two threads are worth it: the other one is there, and messages between the two are fast. Which cores they
  // got, and what else runs there, shows only now. The pool may also run both roles one after the other, on this
  // thread.
  bool helper_is_near() {
    const double called = now();
    while (meeting_.load(std::memory_order_acquire) == kNobody) {
      int nobody = kNobody;
      if (now() - called > kMeetingTime && meeting_.compare_exchange_strong(nobody, kLeftAlone)) return false;
    }
    constexpr int kRounds = 64;
    double took[kRounds];
    for (int i = 0; i < kRounds; ++i) {
      const double start = now();
      there_.publish(i);
      back_.wait(i);
      took[i] = (now() - start) / 2;
    }
    std::nth_element(took, took + kRounds / 2, took + kRounds);
    const bool near = took[kRounds / 2] < kSlowHandOff;
    there_.publish(near ? kTogether : kParted);
    return near;
  }

  bool leader_stays() {
    int nobody = kNobody;
    if (!meeting_.compare_exchange_strong(nobody, kHelper)) return false;
    for (int64_t i = 0;; ++i) {
      there_.wait(i);
      const int64_t word = there_.step.load(std::memory_order_acquire);
      if (word >= kTogether) return word == kTogether;
      back_.publish(i);
    }
  }

  // The walk through the layers.
  void lead() {
    if (!helper_is_near()) return alone(0);
    const int64_t done = lead_together();
    if (done == job_.steps) return;
    back_.wait(kParted);  // the helper has put everything down
    alone(done);
  }

  // Returns how many steps were made before the threads parted.
  int64_t lead_together() {
    const TileScope tiles;
    const int layers = job_.shape.layers;
    for (int l = 0; l < layers; ++l) prepare(l, 0, false);
    const double start = now();
    double lost = 0;
    for (int64_t t = 0; t < job_.steps; ++t) {
      const double more = t > 0 ? flags_[layers].wait(t - 1) : 0;
      lost += more;
      if (more > 0 && lost > kLostAtLeast && lost > kLostShare * (now() - start)) {
        flags_[0].publish(kParted);
        return t;
      }
      embed();
      std::fill_n(led_skip_, s_, 0.0f);
      for (int l = 0; l < layers; ++l) {
        gated(l, t);
        std::memcpy(mail_ + int64_t{l} * h_, z_, h_ * sizeof(float));
        flags_[l].publish(t);
        if (layers_[l].led_skip) {
          float* sum = led_skip_;
          product(net_.layers[l].skip, z_at_.data(), &sum, &sum, 1);
        }
        if (l + 1 < layers) add_residual(l);
      }
      for (int l = 0; l < layers; ++l)
        if (!layers_[l].helped && (t + 1) % layers_[l].ahead == 0) prepare(l, t + 1, false);
    }
    flags_[layers].wait(job_.steps - 1);
    return job_.steps;
  }

  void help() {
    if (!leader_stays()) return;
    const TileScope tiles;
    const int layers = job_.shape.layers;
    for (int64_t t = 0; t < job_.steps; ++t) {
      for (int l = 0; l < layers; ++l)
        if (layers_[l].helped && (t + 1) % kAhead == layers_[l].offset) prepare(l, t + 1, true);
      start_skip();
      for (int l = 0; l < layers; ++l) {
        flags_[l].wait(t);
        if (l == 0 && flags_[0].step.load(std::memory_order_relaxed) == kParted) return back_.publish(kParted);
        float* z = mail_ + int64_t{l} * h_;
        if (!layers_[l].led_skip) add_skip(l, &z);
      }
      // the leader's part was complete before the last layer's message
      for (int i = 0; i < s_; ++i) skip_[i] += led_skip_[i];
      emit(t);
      flags_[layers].publish(t);
    }
  }

  // Steps are counted from the start of the call; blocks of `ahead` steps begin at `offset`. Two blocks alternate.
  float* pending(int l, int64_t t, int stream) {
    const Layer& layer = layers_[l];
    const int64_t since = t - layer.offset + kAhead;
    const int64_t slot = since % layer.ahead + (since / layer.ahead % 2) * layer.ahead;
    return pending_ + layer.pending + (slot * n_ + stream) * 2 * h_;
  }

  const float* past(int l, int64_t t, int stream, int64_t back) const {
    const Layer& layer = layers_[l];
    const int64_t at = (job_.position + t - back) % layer.length;
    const int64_t row = layer.history + (at < 0 ? at + layer.length : at);
    return job_.history + ((first_ + stream) * rows_ + row) * r_;
  }

  // bias + old taps for the whole block that holds step t, so that the same steps are always computed together and the
  // same bits come out of one thread and of two.
  void prepare(int l, int64_t t, bool by_helper) {
    const Layer& layer = layers_[l];
    auto& x = by_helper ? helper_x_ : old_x_;
    auto& in = by_helper ? helper_in_ : old_in_;
    auto& out = by_helper ? helper_out_ : old_out_;
    const int64_t steps = layer.ahead;
    t -= (t - layer.offset + kAhead) % layer.ahead;
    int columns = 0;
    for (int64_t i = 0; i < steps; ++i)
      for (int s = 0; s < n_; ++s, ++columns) {
        out[columns] = pending(l, t + i, s);
        in[columns] = bias_ + ((bias_rows_ > 1 ? s : 0) * int64_t{job_.shape.layers} + l) * 2 * h_;
      }
    if (job_.shape.kernel_size == 1)
      for (int c = 0; c < columns; ++c) std::memcpy(out[c], in[c], 2 * h_ * sizeof(float));
    for (int j = 1; j < job_.shape.kernel_size; ++j) {
      columns = 0;
      for (int64_t i = 0; i < steps; ++i)
        for (int s = 0; s < n_; ++s) x[columns++] = past(l, t + i, s, j * layer.dilation);
      product(net_.layers[l].old[j - 1], x.data(), j == 1 ? in.data() : out.data(), out.data(), columns);
    }
  }

  // x = the input layer's column of the last sample.
  void embed() {
    for (int s = 0; s < n_; ++s) {
      float* x = x_ + int64_t{s} * r_;
      const int64_t b = first_ + s;
      const float* w = net_.input;
      if (job_.distribution == Distribution::kCategorical) {
        w += job_.last_class[b] * r_;
        for (int i = 0; i < r_; ++i) x[i] = w[i] + net_.input_bias[i];
      } else {
        for (int i = 0; i < r_; ++i) x[i] = w[i] * job_.last_value[b] + net_.input_bias[i];
      }
    }
  }

  // z = tanh(a) * sigmoid(b), and x into the ring buffer.
  void gated(int l, int64_t t) {
    const Shape& s = job_.shape;
    for (int i = 0; i < n_; ++i) {
      float* a = pending(l, t, i);
      pre_at_[i] = a;
      if (!job_.cond) continue;
      const float* c = job_.cond + (((first_ + i) * job_.steps + t) * s.layers + l) * 2 * s.gate;
      for (int j = 0; j < s.gate; ++j) a[j] += c[j];
      for (int j = 0; j < s.gate; ++j) a[h_ + j] += c[s.gate + j];
    }
    product(net_.layers[l].current, x_at_.data(), pre_at_.data(), a_at_.data(), n_);
    for (int i = 0; i < n_; ++i) {
      const float* a = a_ + int64_t{i} * 2 * h_;
      float* z = z_ + int64_t{i} * h_;
      for (int j = 0; j < h_; j += kF) store(z + j, gate(load(a + j), load(a + h_ + j)));
      if (s.kernel_size > 1)
        std::memcpy(const_cast<float*>(past(l, t, i, 0)), x_ + int64_t{i} * r_, r_ * sizeof(float));
    }
  }

  void add_residual(int l) {
    const float* bias = net_.layers[l].residual_bias;
    for (int i = 0; i < n_; ++i)
      for (int j = 0; j < r_; ++j) x_[int64_t{i} * r_ + j] += bias[j];
    product(net_.layers[l].residual, z_at_.data(), x_at_.data(), x_at_.data(), n_);
  }

  void start_skip() {
    for (int i = 0; i < n_; ++i) std::memcpy(skip_at_[i], net_.skip_bias, s_ * sizeof(float));
  }
  void add_skip(int l, float* const* z) { product(net_.layers[l].skip, z, skip_at_.data(), skip_at_.data(), n_); }

  static void relu(float* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = p[i] > 0 || p[i] != p[i] ? p[i] : 0.0f;
  }

  // Output layers, the next sample, and what the caller asked to keep.
  void emit(int64_t t) {
    const Shape& s = job_.shape;
    relu(skip_, int64_t{n_} * s_);
    for (int i = 0; i < n_; ++i) bias_at_[i] = const_cast<float*>(net_.hidden_bias);
    product(net_.hidden, skip_at_.data(), bias_at_.data(), hidden_at_.data(), n_);
    relu(hidden_, int64_t{n_} * s_);
    for (int i = 0; i < n_; ++i) bias_at_[i] = const_cast<float*>(net_.output_bias);
    product(net_.output, hidden_at_.data(), bias_at_.data(), out_at_.data(), n_);
    for (int i = 0; i < n_; ++i) {
      const int64_t b = first_ + i, at = b * job_.steps + t;
      float* out = out_ + int64_t{i} * o_;
      if (job_.parameters) std::memcpy(job_.parameters + at * s.outputs, out, s.outputs * sizeof(float));
      const float* u = job_.uniforms + at * job_.uniforms_per_step;
      const bool given = t < job_.given_steps;
      if (job_.distribution == Distribution::kCategorical) {
        const int64_t c = given ? job_.given_class[b * job_.given_steps + t]
                                : sample_categorical(out, s.outputs, job_.temperature, u[0]);
        job_.classes[at] = job_.last_class[b] = c;
      } else {
        const float v =
            given ? job_.given_value[b * job_.given_steps + t]
                  : sample_mixture(job_.distribution, out, s.outputs, job_.temperature, job_.log_scale_min, u[0], u[1]);
        job_.values[at] = job_.last_value[b] = v;
      }
    }
  }

  const Job& job_;
  const Packed<W>& net_;
  const int64_t first_;
  const int n_;
  const bool two_threads_;
  bool shared_pending_ = false;
  int r_, h_, s_, o_;
  int64_t rows_ = 0, bias_rows_ = 1;
  std::vector<Layer> layers_;
  std::unique_ptr<float[]> memory_;
  float *pending_, *x_, *a_, *z_, *skip_, *led_skip_, *hidden_, *out_, *bias_, *mail_;
  std::vector<float*> x_at_, a_at_, z_at_, skip_at_, hidden_at_, out_at_, bias_at_, pre_at_;
  std::vector<const float*> old_x_, old_in_, helper_x_, helper_in_;
  std::vector<float*> old_out_, helper_out_;
  std::vector<Flag> flags_;
  enum Meeting { kNobody, kHelper, kLeftAlone };
  std::atomic<int> meeting_{kNobody};
  Flag there_, back_;
};

template <class W>
void generate(const Job& job, const uint8_t* packed) {
  const Packed<W> net(job.shape, packed);
  const int64_t threads = torch::stable::get_num_threads();
  if (job.streams == 1) {
    const bool two = threads > 1 && std::thread::hardware_concurrency() > 1;
    Streams<W>(job, net, 0, 1, two).run();
    return;
  }
  const int64_t workers = std::min(threads, job.streams);
  for_each_worker(workers, [&](int64_t i) {
    const int64_t first = i * job.streams / workers, last = (i + 1) * job.streams / workers;
    Streams<W>(job, net, first, last - first, false).run();
  });
}

// wavenet_pack(Tensor[] weights, bool bf16) -> Tensor: one uint8 buffer, laid out for this instruction set.
Tensor wavenet_pack(std::vector<Tensor> weights, bool bf16) {
  const Shape s = shape_of(weights);
  const int64_t bytes = bf16 ? Packed<uint16_t>(s, nullptr).bytes : Packed<float>(s, nullptr).bytes;
  constexpr int64_t kHuge = int64_t{2} << 20;
  Tensor buffer =
      torch::stable::new_empty(weights[0], std::vector<int64_t>{round_up(bytes, kHuge) + kHuge}, ScalarType::Byte);
  prefer_huge_pages(buffer);
  std::memset(buffer.data_ptr(), 0, buffer.numel());
  const auto address = reinterpret_cast<uintptr_t>(buffer.data_ptr());
  Tensor packed = torch::stable::narrow(buffer, 0, round_up(address, kHuge) - address, bytes);
  if (bf16)
    pack<uint16_t>(weights, s, static_cast<uint8_t*>(packed.data_ptr()));
  else
    pack<float>(weights, s, static_cast<uint8_t*>(packed.data_ptr()));
  return packed;
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
  const int64_t bytes = bf16 ? Packed<uint16_t>(job.shape, nullptr).bytes : Packed<float>(job.shape, nullptr).bytes;
  FASTGEN_CHECK(packed.numel() == bytes, "wavenet_generate: packed weights of ", bytes, " bytes are expected, got ",
                packed.numel(), " (packed for another shape or instruction set?)");
  if (job.streams == 0 || job.steps == 0) return;
  if (bf16)
    generate<uint16_t>(job, data);
  else
    generate<float>(job, data);
}

}  // namespace
}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("wavenet_pack", TORCH_BOX(&fastgen::wavenet_pack));
  m.impl("wavenet_generate", TORCH_BOX(&fastgen::wavenet_generate));
}
