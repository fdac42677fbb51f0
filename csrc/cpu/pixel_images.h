// Runs a program (pixel_program.h) for some images, row by row and pixel by pixel.
#pragma once

#include <optional>

#include "pixel_attention.h"
#include "pixel_guesses.h"

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
    right_.resize(n_), guessed_.resize(n_);
    latest_.resize(n_ * job.width * job.colors * job.outputs);
    for (Side& side : sides_) {
      side.pixels.resize(n_), side.late.resize(n_);
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
  struct Pixels {
    int64_t begin, end;
  };

  // What a thread works with.
  struct Side {
    std::vector<Pixels> pixels, late;  // of each image, those that are computed at once, and those before each of them
    const std::vector<Pixels>* now;    // one of the two
    int64_t round = 0;                 // counts how often they have been others
    GuessRate rate;
    std::optional<Inputs<W>> x;
    OwnVector<const float*> init;
    OwnVector<float*> out;
    OwnVector<float> scratch;
    std::array<int64_t, 6> windows{-1};  // what x holds: plane, row and column beside the pixels, taps, late, round
    Flag met;
    int64_t meetings = 0;
  };

  // The parts [begin, end) of all channels, of two.
  void draw(int begin, int end) {
    Side& side = sides_[begin];
    const auto run_for = [&](Phase phase, int64_t y, Pixels pixels) {
      std::ranges::fill(side.pixels, pixels);
      run(job_.instructions, phase, begin, end, y);
    };
    for (int64_t y = job_.first_row; y < job_.last_row; ++y) {
      if (begin == 0) copy_context(y);
      meet(begin, end);
      run_for(Phase::kRow, y, {0, job_.width});
      for (int64_t x = job_.width; job_.goes_back && y > 0 && x-- > 0;) {
        meet(begin, end);
        run_for(Phase::kBack, y, {x, x + 1});
      }
      draw_row(begin, end, y);
      meet(begin, end);
    }
  }

  // As many pixels at once as guesses of their values are worth: those up to the first wrong guess, whose values are
  // drawn from what is now known to be so, are done. Those behind it keep what was drawn as the next guess.
  void draw_row(int begin, int end, int64_t y) {
    Side& side = sides_[begin];
    std::ranges::fill(side.pixels, Pixels{0, 0});
    if (begin == 0) std::ranges::fill(guessed_, 0);
    for (int64_t left = n_; left > 0;) {
      const int64_t count = job_.ahead > 1 ? side.rate.pixels_at_once(left, job_.ahead) : 1;
      for (Pixels& at : side.pixels) at.end = std::min(at.begin + count, job_.width);
      if (begin == 0 && job_.ahead > 1) guess(y);
      meet(begin, end);
      for (int64_t b = 0; b < n_; ++b)
        side.late[b] = {std::max<int64_t>(side.pixels[b].begin - 1, 0), std::max<int64_t>(side.pixels[b].end - 1, 0)};
      run(job_.instructions, Phase::kPixel, begin, end, y);
      left = 0;
      for (int64_t b = 0; b < n_; ++b) {
        Pixels& at = side.pixels[b];
        if (at.begin == at.end) continue;
        const int64_t known = std::min(right_[b] + 1, at.end - at.begin);
        side.rate.saw(right_[b], known);
        at.begin += known;
        left += at.begin < job_.width;
      }
    }
    if (job_.last.empty()) return;
    meet(begin, end);
    std::ranges::fill(side.late, Pixels{job_.width - 1, job_.width});
    run(job_.last, Phase::kPixel, begin, end, y);
  }

  // Guesses for pixels that have none yet: what their uniforms draw from the distribution of the pixel above, in the
  // first row from that of the last one drawn.
  void guess(int64_t y) {
    for (int64_t b = 0; b < n_; ++b)
      for (int64_t& x = guessed_[b]; x < sides_[0].pixels[b].end; ++x)
        for (int64_t color = 0; color < job_.colors; ++color) {
          const int64_t n = place(b, y, x, color);
          const int64_t of = y > job_.first_row ? x : std::max<int64_t>(sides_[0].pixels[b].begin - 1, 0);
          const float* out = latest(b, of, color);
          see(b, y, x, color, job_.known && job_.known[n] ? job_.given[n] : draw_value(out, job_.uniforms[n]));
        }
  }

  void run(const std::vector<Instruction>& instructions, Phase phase, int begin, int end, int64_t y) {
    ++sides_[begin].round;
    for (const Instruction& i : instructions)
      if (i.phase == phase) execute(i, begin, end, y);
  }

  float* at(const Side& side, int64_t plane, int64_t b, int64_t y, int64_t x) const {
    const Plane& p = job_.planes[plane];
    return p.at(image(b), y, p.row_size > 0 ? x : x - (*side.now)[b].begin);
  }

  // f(image, x) for all pixels that are computed at once.
  template <class F>
  void for_each_pixel(const Side& side, F&& f) const {
    for (int64_t b = 0; b < n_; ++b)
      for (int64_t x = (*side.now)[b].begin; x < (*side.now)[b].end; ++x) f(b, x);
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

  void execute(const Instruction& i, int begin, int end, int64_t y) {
    if (i.meet) meet(begin, end);
    Side& side = sides_[begin];
    side.now = i.late ? &side.late : &side.pixels;
    const int64_t held = side.windows[0];
    if (i.dst == held || (i.kind == Kind::kLstm && i.other == held)) side.windows = {-1};
    if (i.kind == Kind::kConv) return convolve(i, begin, end, y);
    if (i.kind == Kind::kSample) {
      if (begin == 0) draw_values(i, y);
      return meet(begin, end);
    }
    if (i.kind == Kind::kAttention || i.kind == Kind::kRemember) return attend_or_remember(i, begin, end, y);
    const Plane& dst = job_.planes[i.dst];
    for_each_pixel(side, [&](int64_t b, int64_t x) FASTGEN_INLINE {
      float* to = at(side, i.dst, b, y, x);
      const float* from = source(side, i, b, y, x);
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
          const float* before = at(side, i.other, b, y + i.dy, x + i.dx);
          float* cell = at(side, i.other, b, y, x);
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
          const float* other = at(side, i.other, b, y, x);
          each([&](int64_t c) FASTGEN_INLINE { return load(from + c) + load(other + c); });
          break;
        }
        default:
          break;
      }
    });
  }

  const float* source(const Side& side, const Instruction& i, int64_t b, int64_t y, int64_t x) const {
    if (i.kind != Kind::kPrevious) return at(side, i.src, b, y, x);
    return x > 0 ? at(side, i.src, b, y, x - 1) : at(side, i.src, b, y - 1, job_.width - 1);
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

  // dst = bias + other + matrix * window of src.
  void convolve(const Instruction& i, int begin, int end, int64_t y) {
    const SplitMatrix<W>& matrix = net_.matrices[i.matrix];
    Side& side = sides_[begin];
    read_windows(i, side, y);
    for (int p = begin; p < end; ++p) {
      const PackedMatrix<W>& part = matrix.part[p];
      if (part.rows == 0) continue;
      const int64_t first = matrix.first[p];
      int columns = 0;
      for_each_pixel(side, [&](int64_t b, int64_t x) {
        const float* bias = nullptr;
        if (i.bias >= 0) bias = job_.biases + (job_.own_biases ? first_ + b : 0) * job_.bias_size + i.bias + first;
        float* to = side.out[columns] = at(side, i.dst, b, y, x) + first;
        const float* other = i.other < 0 ? nullptr : at(side, i.other, b, y, x) + first;
        side.init[columns] = other ? other : bias;
        if (other && bias) {
          for (int64_t c = 0; c < part.padded_rows(); c += kF) store(to + c, load(other + c) + load(bias + c));
          side.init[columns] = to;
        }
        ++columns;
      });
      product(part, *side.x, side.init.data(), side.out.data(), columns);
    }
  }

  // The windows that a convolution multiplies, unless they are there already.
  void read_windows(const Instruction& i, Side& side, int64_t y) {
    const std::array<int64_t, 6> windows{i.src, i.dy, i.dx, i.extra, i.late, side.round};
    if (windows == side.windows) return;
    side.windows = windows;
    int column = 0;
    for (int64_t b = 0; b < n_; ++b) {
      const auto [begin, end] = (*side.now)[b];
      const int count = static_cast<int>(end - begin), channels = static_cast<int>(job_.planes[i.src].channels);
      if (count > 0)
        side.x->set_windows(column, at(side, i.src, b, y + i.dy, begin + i.dx), count, static_cast<int>(i.extra),
                            channels);
      column += count;
    }
  }

  // f(cache, head, image) for the heads of all images, of which two threads take turns.
  template <class F>
  void for_each_head(const Instruction& i, int begin, int end, F&& f) {
    for (int64_t b = 0; b < n_; ++b) {
      const AttentionCache<W> cache(i, job_.height * job_.width, image(b));
      for (int64_t head = begin; head < cache.heads; head += end - begin == 2 ? 1 : 2) f(cache, head, b);
    }
  }

  void attend_or_remember(const Instruction& i, int begin, int end, int64_t y) {
    Side& side = sides_[begin];
    const bool own = i.matrix > 0;
    for_each_head(i, begin, end, [&](const AttentionCache<W>& cache, int64_t head, int64_t b) {
      for (int64_t x = (*side.now)[b].begin; x < (*side.now)[b].end; ++x) {
        const int64_t pixel = y * job_.width + x;
        const auto of = [&](int64_t plane) { return at(side, plane, b, y, x); };
        if (i.kind == Kind::kRemember)
          cache.put(head, pixel, of(i.src), of(i.other));
        else
          attend(cache, head, pixel + own, own, of(i.src), of(i.dst), side.scratch.data());
      }
    });
  }

  // The values of one color, and what the network sees of them; how many pixels were guessed right, from the first on.
  void draw_values(const Instruction& i, int64_t y) {
    const int64_t color = i.extra;
    for (int64_t b = 0; b < n_; ++b) {
      const auto [begin, end] = sides_[0].pixels[b];
      if (color == 0) right_[b] = end - begin;
      for (int64_t x = begin; x < end; ++x) {
        const int64_t n = place(b, y, x, color);
        const float* out = at(sides_[0], i.src, b, y, x);
        const int64_t value = job_.known && job_.known[n] ? job_.given[n] : draw_value(out, job_.uniforms[n]);
        if (x - begin <= right_[b]) {  // it is drawn from what is so
          float zero = 0;
          for (int64_t o = 0; o < job_.outputs; ++o) zero += 0.0f * out[o];
          if (zero != 0) job_.not_finite->store(true, std::memory_order_relaxed);
          if (job_.parameters) std::memcpy(job_.parameters + n * job_.outputs, out, job_.outputs * sizeof(float));
          std::memcpy(latest(b, x, color), out, job_.outputs * sizeof(float));
        }
        if (value != job_.values[n]) right_[b] = std::min(right_[b], x - begin);
        see(b, y, x, color, value);
      }
    }
  }

  // Where a value lies.
  int64_t place(int64_t b, int64_t y, int64_t x, int64_t color) const {
    return (((first_ + b) * job_.colors + color) * job_.height + y) * job_.width + x;
  }

  float* latest(int64_t b, int64_t x, int64_t color) {
    return latest_.data() + ((b * job_.width + x) * job_.colors + color) * job_.outputs;
  }

  void see(int64_t b, int64_t y, int64_t x, int64_t color, int64_t value) {
    job_.values[place(b, y, x, color)] = value;
    float* features = job_.planes[job_.input].at(image(b), y, x) + color * job_.features;
    std::memcpy(features, job_.table + value * job_.features, job_.features * sizeof(float));
  }

  int64_t draw_value(const float* out, float u) {
    if (job_.distribution == Distribution::kLogisticMixture)
      return sample_logistic_level(out, job_.outputs / 3, job_.levels, job_.temperature, job_.log_scale_min, u);
    if (job_.outputs == 1) {  // one logit: of level 1 against level 0
      const float pair[2] = {0.0f, out[0]};
      return sample_categorical(pair, 2, job_.temperature, u, sides_[0].scratch.data());
    }
    return sample_categorical(out, static_cast<int>(job_.outputs), job_.temperature, u, sides_[0].scratch.data(),
                              job_.kept);
  }

  const PixelJob& job_;
  const PackedProgram<W>& net_;
  const int64_t first_, n_;
  Side sides_[2];
  std::vector<int64_t> right_, guessed_;  // of each image: guesses that were right, and the pixel up to which there are
  OwnVector<float> latest_;               // of each column, the distributions of the last pixel that was drawn
  Meeting meeting_;
};

}  // namespace
}  // namespace fastgen
