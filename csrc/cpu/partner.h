// Threads that work on one thing together: how they meet, send each other word, and part again. Two of them may have
// different roles; a team of any number goes in step, each doing its share.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <thread>
#include <vector>

#include "../fastgen.h"

namespace fastgen {
namespace {

constexpr int kPatience = 20000;          // polls before a waiting thread offers its core to others
constexpr double kLostShare = 0.3;        // of the time spent waiting beyond patience, above which the two part
constexpr double kLostByTeam = 0.7;       // the same of more than two, for whom one alone is no substitute
constexpr double kLostAtLeast = 0.02;     // seconds
constexpr double kMeetingTime = 5e-3;     // seconds to wait for a second thread
constexpr double kSlowHandOff = 1e-6;     // seconds one way, above which two threads are slower than one
constexpr double kQuickHandOff = 150e-9;  // up to here the two share a cache

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

// Whether two threads are worth it: the other one is there, and messages between the two are fast. Which cores they
// got, and what else runs there, shows only when they run. The pool may also run both, one after the other, on one
// thread.
class Meeting {
 public:
  // For the thread that leads.
  bool helper_is_near() {
    const double called = now();
    while (state_.load(std::memory_order_acquire) == kNobody) {
      int nobody = kNobody;
      if (now() - called > kMeetingTime && state_.compare_exchange_strong(nobody, kLeftAlone)) return false;
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
    quick_ = took[kRounds / 2] <= kQuickHandOff;
    there_.publish(near ? kTogether : kParted);
    return near;
  }

  // For the thread that helps.
  bool leader_stays() {
    int nobody = kNobody;
    if (!state_.compare_exchange_strong(nobody, kHelper)) return false;
    for (int64_t i = 0;; ++i) {
      there_.wait(i);
      const int64_t word = there_.step.load(std::memory_order_acquire);
      if (word >= kTogether) return word == kTogether;
      back_.publish(i);
    }
  }

  // For both, once they have met.
  bool is_quick() const { return quick_; }

  // The helper has put everything down.
  void helper_leaves() { back_.publish(kParted); }
  void wait_for_helper_to_leave() const { back_.wait(kParted); }

 private:
  enum State { kNobody, kHelper, kLeftAlone };
  std::atomic<int> state_{kNobody};
  bool quick_ = true;
  Flag there_, back_;
};

// Up to `most` threads that do everything together, a part each: nobody goes on before all have come as far. Part 0
// leads. The pool may have fewer threads to give: who has not come in time stays away.
class Team {
 public:
  explicit Team(int most) : flags_(most) {}

  // For the thread that leads.
  void gather() {
    const double called = now();
    const auto missing = [&] { return size_.load(std::memory_order_relaxed) < static_cast<int>(flags_.size()); };
    while (missing() && now() - called < kMeetingTime) std::this_thread::yield();
    parts_.store(size_.fetch_add(kClosed, std::memory_order_relaxed), std::memory_order_release);
    start_ = now();
  }
  // For the others: their part, or 0 if they come too late.
  int join() {
    const int part = size_.fetch_add(1, std::memory_order_relaxed);
    if (part >= kClosed) return 0;
    while (parts() == 0) std::this_thread::yield();
    return part;
  }
  int parts() const { return parts_.load(std::memory_order_acquire); }

  // The meeting number `time`: what each has written before, all may read after.
  void meet(int part, int64_t time) {
    flags_[part].publish(time);
    const int parts = parts_.load(std::memory_order_relaxed);
    const auto all_here = [&] {
      bool here = true;
      for (int i = 0; i < parts; ++i) here &= flags_[i].step.load(std::memory_order_acquire) >= time;
      return here;
    };
    for (int spins = 0; spins < kPatience; spins += parts)
      if (all_here()) return;
    const double waited = now();
    while (!all_here()) std::this_thread::yield();
    if (part == 0) lost_ += now() - waited;
  }

  // The leader says at times, before a meeting, whether the team is still worth it; all hear after it.
  void review() {
    const double bearable = parts() > 2 ? kLostByTeam : kLostShare;
    parted_ = lost_ > kLostAtLeast && lost_ > bearable * (now() - start_);
  }
  bool parted() const { return parted_; }

 private:
  static constexpr int kClosed = 1 << 16;
  std::atomic<int> size_{1}, parts_{0};  // who has come; and who had when the leader began
  double start_ = 0, lost_ = 0;
  bool parted_ = false;
  std::vector<Flag> flags_;
};

}  // namespace
}  // namespace fastgen
