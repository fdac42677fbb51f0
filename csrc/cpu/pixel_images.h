// Runs a program (pixel_program.h) for some images, row by row and pixel by pixel.
#pragma once

#include <optional>

#include "pixel_attention.h"

namespace fastgen {
namespace {

// x >= 0 ? x : e^x - 1
inline VecF elu(VecF x) {
  const VecF below = expm1_bounded(at_most(at_least(x, -60.0f), 0.0f));
  return x > 0.0f ? x : below;
}
// a * sigmoid(b)
inline VecF glu(VecF a, VecF b) { return quotient(a, 1.0f + exp_bounded(-at_most(at_least(b, -60.0f), 80.0f))); }

// The number of levels whose cumulative probability is <= u, for a mixture of logistics over [-1, 1] that is cut into
// `levels` bins, the outermost reaching to infinity.
inline int64_t sample_logistic_level(const float* parameters, int64_t mixtures, int64_t levels, float temperature,
                                     float log_scale_min, float u) {
  const float *logits = parameters, *means = parameters + mixtures, *log_scales = means + mixtures;
  float top = logits[0];
  for (int64_t m = 1; m < mixtures; ++m) top = std::max(top, logits[m]);
  double total = 0;
  for (int64_t m = 0; m < mixtures; ++m) total += std::exp(double(logits[m] - top) / temperature);
  int64_t low = 0, high = levels - 1;
  while (low < high) {
    const int64_t level = (low + high) / 2;
    const double edge = (2.0 * level + 1) / (levels - 1) - 1;
    double below = 0;
    for (int64_t m = 0; m < mixtures; ++m) {
      const double scale = temperature * std::exp(double(std::max(log_scales[m], log_scale_min)));
      below += std::exp(double(logits[m] - top) / temperature) / (1 + std::exp((means[m] - edge) / scale));
    }
    if (below / total <= u)
      low = level + 1;
    else
      high = level;
  }
  return low;
}

// The images [first, first + count) of a job, drawn by one thread, or by two that share the channels.
template <class W>
class Images {
 public:
  Images(const PixelJob& job, const PackedProgram<W>& net, int64_t first, int64_t count)
      : job_(job), net_(net), first_(first), n_(count) {
    int64_t most_k = 0;
    for (const auto& matrix : net.matrices) most_k = std::max<int64_t>(most_k, matrix.part[0].k);
    const int64_t columns = n_ * job.width;
    for (Side& side : sides_) {
      side.x.emplace(static_cast<int>(columns), static_cast<int>(most_k));
      side.init.resize(columns);
      side.out.resize(columns);
      side.scratch.resize(
          std::max(sampling_scratch(static_cast<int>(job.outputs)), round_up(job.height * job.width, kChannelBlock)));
    }
  }

  void alone() { draw(0, 2); }
  void lead() { draw(0, meeting_.helper_is_near() ? 1 : 2); }
  void help() {
    if (meeting_.leader_stays()) draw(1, 2);
  }

 private:
  // What a thread works with.
  struct Side {
    std::optional<Inputs<W>> x;
    OwnVector<const float*> init;
    OwnVector<float*> out;
    OwnVector<float> scratch;
    std::array<int64_t, 6> windows{-1};  // what x holds: plane, row, first column, taps, last column, row of the image
    Flag met;
    int64_t meetings = 0;
  };

  // The parts [begin, end) of all channels, of two.
  void draw(int begin, int end) {
    for (int64_t y = job_.first_row; y < job_.last_row; ++y) {
      if (begin == 0) copy_context(y);
      meet(begin, end);
      run(Phase::kRow, begin, end, y, 0, job_.width);
      for (int64_t x = job_.width; job_.goes_back && y > 0 && x-- > 0;) {
        meet(begin, end);
        run(Phase::kBack, begin, end, y, x, x + 1);
      }
      for (int64_t x = 0; x < job_.width; ++x) {
        meet(begin, end);
        run(Phase::kPixel, begin, end, y, x, x + 1);
      }
      meet(begin, end);
    }
  }

  void run(Phase phase, int begin, int end, int64_t y, int64_t x0, int64_t x1) {
    for (const Instruction& i : job_.instructions)
      if (i.phase == phase) execute(i, begin, end, y, x0, x1);
  }

  void meet(int begin, int end) {
    if (end - begin == 2) return;
    Side &own = sides_[begin], &other = sides_[1 - begin];
    own.met.publish(++own.meetings);
    other.met.wait(own.meetings);
  }

  float* image(int64_t i) const { return job_.memory + (first_ + i) * job_.memory_size; }

  void copy_context(int64_t y) {
    if (!job_.context) return;
    const Plane& plane = job_.planes[job_.context_plane];
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t x = 0; x < job_.width; ++x) {
        const int64_t at = ((job_.own_context ? first_ + i : 0) * job_.height + y) * job_.width + x;
        std::memcpy(plane.at(image(i), y, x), job_.context + at * job_.context_channels,
                    job_.context_channels * sizeof(float));
      }
  }

  // f(channel) for each vector of channels of the parts.
  template <class F>
  static void for_each_vector(const Plane& plane, int begin, int end, F&& f) {
    for (int64_t c = begin == 0 ? 0 : plane.middle(); c < (end == 1 ? plane.middle() : plane.channels); c += kF) f(c);
  }

  void execute(const Instruction& i, int begin, int end, int64_t y, int64_t x0, int64_t x1) {
    if (i.meet) meet(begin, end);
    const int64_t held = sides_[begin].windows[0];
    if (i.dst == held || (i.kind == Kind::kLstm && i.other == held)) sides_[begin].windows = {-1};
    if (i.kind == Kind::kConv) return convolve(i, begin, end, y, x0, x1);
    if (i.kind == Kind::kSample) {
      if (begin == 0) draw_values(i, y, x0);
      return meet(begin, end);
    }
    if (i.kind == Kind::kAttention || i.kind == Kind::kRemember) return attend_or_remember(i, begin, end, y, x0);
    const Plane& dst = job_.planes[i.dst];
    for (int64_t b = 0; b < n_; ++b)
      for (int64_t x = x0; x < x1; ++x) {
        float* to = dst.at(image(b), y, x);
        const float* from = source(i, image(b), y, x);
        const auto halves = [&](auto&& f) FASTGEN_INLINE {
          for_each_vector(dst, begin, end, [&](int64_t c) FASTGEN_INLINE {
            const float* pair = from + c / kChannelBlock * 2 * kChannelBlock + c % kChannelBlock;
            store(to + c, f(load(pair), load(pair + kChannelBlock)));
          });
        };
        const auto each = [&](auto&& f) FASTGEN_INLINE {
          for_each_vector(dst, begin, end, [&](int64_t c) FASTGEN_INLINE { store(to + c, f(c)); });
        };
        switch (i.kind) {
          case Kind::kGate:
            halves([](VecF a, VecF b) FASTGEN_INLINE { return gate(a, b); });
            break;
          case Kind::kGlu:
            halves([](VecF a, VecF b) FASTGEN_INLINE { return glu(a, b); });
            break;
          case Kind::kRelu:
            each([&](int64_t c) FASTGEN_INLINE { return at_least(load(from + c), 0.0f); });
            break;
          case Kind::kElu:
            each([&](int64_t c) FASTGEN_INLINE { return elu(load(from + c)); });
            break;
          case Kind::kGelu:
            each([&](int64_t c) FASTGEN_INLINE { return gelu(load(from + c)); });
            break;
          case Kind::kPrevious:
            each([&](int64_t c) FASTGEN_INLINE { return load(from + c); });
            break;
          case Kind::kNorm: {
            const Moments of = moments(from, i.extra);
            const float* both = job_.biases + (job_.own_biases ? first_ + b : 0) * job_.bias_size + i.bias;
            each([&](int64_t c) FASTGEN_INLINE {
              const float* pair = both + 2 * (c - c % kChannelBlock) + c % kChannelBlock;
              return (load(from + c) - of.mean) * of.scale * load(pair) + load(pair + kChannelBlock);
            });
            break;
          }
          case Kind::kLstm: {
            const Plane& cells = job_.planes[i.other];
            const float* before = cells.at(image(b), y + i.dy, x + i.dx);
            float* cell = cells.at(image(b), y, x);
            each([&](int64_t c) FASTGEN_INLINE {
              const float* gates = from + 4 * (c - c % kChannelBlock) + c % kChannelBlock;
              const VecF kept = glu(load(before + c), load(gates + kChannelBlock));
              const VecF now = kept + gate(load(gates + 3 * kChannelBlock), load(gates + 2 * kChannelBlock));
              store(cell + c, now);
              return gate(now, load(gates));
            });
            break;
          }
          case Kind::kAdd: {
            const float* other = job_.planes[i.other].at(image(b), y, x);
            each([&](int64_t c) FASTGEN_INLINE { return load(from + c) + load(other + c); });
            break;
          }
          default:
            break;
        }
      }
  }

  const float* source(const Instruction& i, float* image, int64_t y, int64_t x) const {
    const Plane& src = job_.planes[i.src];
    if (i.kind != Kind::kPrevious) return src.at(image, y, x);
    return x > 0 ? src.at(image, y, x - 1) : src.at(image, y - 1, job_.width - 1);
  }

  struct Moments {
    float mean, scale;  // scale is 1 / standard deviation
  };
  // Of so many channels; those that fill up a block are zeros.
  static Moments moments(const float* x, int64_t channels) {
    VecF sums = {}, squares = {};
    for (int64_t c = 0; c < channels; c += kF) sums += load(x + c);
    const float mean = sum_of_lanes<float>(sums) / static_cast<float>(channels);
    for (int64_t c = 0; c < channels; c += kF) {
      VecF d = load(x + c) - mean;
      for (int64_t lane = channels - c; lane < kF; ++lane) d[lane] = 0;
      squares += d * d;
    }
    const float variance = sum_of_lanes<float>(squares) / static_cast<float>(channels);
    return {mean, 1.0f / std::sqrt(variance + kNormEps)};
  }

  // dst = bias + other + matrix * window of src, for pixels [x0, x1) of all images.
  void convolve(const Instruction& i, int begin, int end, int64_t y, int64_t x0, int64_t x1) {
    const Plane& dst = job_.planes[i.dst];
    const SplitMatrix<W>& matrix = net_.matrices[i.matrix];
    Side& side = sides_[begin];
    read_windows(i, side, y, x0, x1);
    for (int p = begin; p < end; ++p) {
      const PackedMatrix<W>& part = matrix.part[p];
      if (part.rows == 0) continue;
      const int64_t first = matrix.first[p];
      int columns = 0;
      for (int64_t b = 0; b < n_; ++b) {
        const float* bias = nullptr;
        if (i.bias >= 0) bias = job_.biases + (job_.own_biases ? first_ + b : 0) * job_.bias_size + i.bias + first;
        for (int64_t x = x0; x < x1; ++x, ++columns) {
          float* to = side.out[columns] = dst.at(image(b), y, x) + first;
          const float* other = i.other < 0 ? nullptr : job_.planes[i.other].at(image(b), y, x) + first;
          side.init[columns] = other ? other : bias;
          if (other && bias) {
            for (int64_t c = 0; c < part.padded_rows(); c += kF) store(to + c, load(other + c) + load(bias + c));
            side.init[columns] = to;
          }
        }
      }
      product(part, *side.x, side.init.data(), side.out.data(), columns);
    }
  }

  // The windows that a convolution multiplies, for pixels [x0, x1) of all images, unless they are there already.
  void read_windows(const Instruction& i, Side& side, int64_t y, int64_t x0, int64_t x1) {
    const std::array<int64_t, 6> windows{i.src, y + i.dy, x0 + i.dx, i.extra, x1, y};
    if (windows == side.windows) return;
    side.windows = windows;
    const Plane& src = job_.planes[i.src];
    int column = 0;
    for (int64_t b = 0; b < n_; ++b, column += static_cast<int>(x1 - x0))
      side.x->set_windows(column, src.at(image(b), y + i.dy, x0 + i.dx), static_cast<int>(x1 - x0),
                          static_cast<int>(i.extra), static_cast<int>(src.channels));
  }

  // f(cache, head, image) for the heads of all images, of which two threads take turns.
  template <class F>
  void for_each_head(const Instruction& i, int begin, int end, F&& f) {
    for (int64_t b = 0; b < n_; ++b) {
      const AttentionCache cache(i, job_.height * job_.width, image(b));
      for (int64_t head = begin; head < cache.heads; head += end - begin == 2 ? 1 : 2) f(cache, head, image(b));
    }
  }

  void attend_or_remember(const Instruction& i, int begin, int end, int64_t y, int64_t x) {
    const int64_t pixel = y * job_.width + x;
    const bool own = i.matrix > 0;
    for_each_head(i, begin, end, [&](const AttentionCache& cache, int64_t head, float* image) {
      const auto at = [&](int64_t plane) { return job_.planes[plane].at(image, y, x); };
      if (i.kind == Kind::kRemember)
        cache.put(head, pixel, at(i.src), at(i.other));
      else
        attend(cache, head, pixel + own, own, at(i.src), at(i.dst), sides_[begin].scratch.data());
    });
  }

  // The values of one color of one pixel, and what the network sees of them.
  void draw_values(const Instruction& i, int64_t y, int64_t x) {
    const int64_t color = i.extra, plane = job_.height * job_.width;
    for (int64_t b = 0; b < n_; ++b) {
      const int64_t at = ((first_ + b) * job_.colors + color) * plane + y * job_.width + x;
      const float* out = job_.planes[i.src].at(image(b), y, x);
      float zero = 0;
      for (int64_t o = 0; o < job_.outputs; ++o) zero += 0.0f * out[o];
      if (zero != 0) job_.not_finite->store(true, std::memory_order_relaxed);
      if (job_.parameters) std::memcpy(job_.parameters + at * job_.outputs, out, job_.outputs * sizeof(float));
      const int64_t value = job_.known && job_.known[at] ? job_.given[at] : draw_value(out, job_.uniforms[at]);
      job_.values[at] = value;
      float* features = job_.planes[i.dst].at(image(b), y, x) + color * job_.features;
      std::memcpy(features, job_.table + value * job_.features, job_.features * sizeof(float));
    }
  }

  int64_t draw_value(const float* out, float u) {
    if (job_.distribution == Distribution::kLogisticMixture)
      return sample_logistic_level(out, job_.outputs / 3, job_.levels, job_.temperature, job_.log_scale_min, u);
    if (job_.outputs == 1) {  // one logit: of level 1 against level 0
      const float pair[2] = {0.0f, out[0]};
      return sample_categorical(pair, 2, job_.temperature, u, sides_[0].scratch.data());
    }
    return sample_categorical(out, static_cast<int>(job_.outputs), job_.temperature, u, sides_[0].scratch.data());
  }

  const PixelJob& job_;
  const PackedProgram<W>& net_;
  const int64_t first_, n_;
  Side sides_[2];
  Meeting meeting_;
};

}  // namespace
}  // namespace fastgen
