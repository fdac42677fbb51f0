// The scheduler. A fiber runs until it waits; then the next runs that can, in the launch's order. Each shared array is
// a heap chunk of its own, so that AddressSanitizer has red zones around it, and is filled before the kernel sees it.
// ThreadSanitizer takes each fiber for a thread that only barriers, warp barriers and flags put in order: a race that
// no schedule shows is named by it. This file is compiled without sanitizers, but told of them.
#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef EMULATE_ASAN
extern "C" void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
extern "C" void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
#endif
#ifdef EMULATE_TSAN
extern "C" void* __tsan_create_fiber(unsigned flags);
extern "C" void __tsan_destroy_fiber(void* fiber);
extern "C" void __tsan_switch_to_fiber(void* fiber, unsigned flags);
extern "C" void* __tsan_get_current_fiber();
extern "C" void __tsan_acquire(void* at);
extern "C" void __tsan_release(void* at);
constexpr unsigned kNoOrder = 1;  // a switch is no synchronisation
#endif

namespace fastgen::emulator {
namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kWarp = 32;
constexpr int64_t kPatience = 200000;  // rounds in which nothing happens but pauses

std::string text(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return std::string(slash ? slash + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

// Some threads that wait for each other.
struct Barrier {
  int members = 0, arrived = 0;
  int64_t generation = 0;
  Where where;
  char order[2];  // what ThreadSanitizer orders by: two generations in turns
};

struct Block {
  Barrier barrier, halves[2];
  std::vector<Barrier> warps;
  std::vector<std::pair<char*, int64_t>> chunks;
  std::vector<float> exchanged;
  std::vector<std::array<uint32_t, 6>> factors;  // of each thread's share of a matrix product
};

using Place = void* [5];  // of __builtin_setjmp

struct Fiber {
  ucontext_t start;
  Place place;
  bool begun = false;
  std::unique_ptr<char[]> stack;
  Block* block;
  int rank, index, thread;
  Barrier* waits = nullptr;
  int64_t generation = 0;
  Where where;
  bool done = false;
#ifdef EMULATE_TSAN
  void* tsan = nullptr;
#endif
};

struct Machine {
  Launch how;
  const std::function<void()>* kernel;
  Place scheduler;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Barrier cluster;
  Fiber* now = nullptr;
  int first_block = 0;
  bool progress = false;
  std::string error;
#ifdef EMULATE_ASAN
  const void* bottom = nullptr;
  size_t size = 0;
#endif
#ifdef EMULATE_TSAN
  void* tsan = nullptr;
#endif
};

Machine* machine = nullptr;

// swapcontext would also change the mask of signals, for which it calls the system every time. In a function of its
// own: GCC takes no jump to where the same function has set one.
[[gnu::noinline]] void go(Place& to) { __builtin_longjmp(to, 1); }
[[gnu::noinline]] void change(Place& from, Place& to) {
  if (__builtin_setjmp(from) == 0) go(to);
}
[[gnu::noinline]] void start(Place& from, const ucontext_t& to) {
  if (__builtin_setjmp(from) == 0) setcontext(&to);
}

void to_scheduler(bool dies) {
  Fiber* fiber = machine->now;
#ifdef EMULATE_ASAN
  void* save = nullptr;
  __sanitizer_start_switch_fiber(dies ? nullptr : &save, machine->bottom, machine->size);
#endif
#ifdef EMULATE_TSAN
  __tsan_switch_to_fiber(machine->tsan, kNoOrder);
#endif
  (void)dies;
  change(fiber->place, machine->scheduler);
#ifdef EMULATE_ASAN
  __sanitizer_finish_switch_fiber(save, &machine->bottom, &machine->size);
#endif
}

void enter(Fiber* fiber) {
  machine->now = fiber;
#ifdef EMULATE_ASAN
  void* save = nullptr;
  __sanitizer_start_switch_fiber(&save, fiber->stack.get(), kStack);
#endif
#ifdef EMULATE_TSAN
  __tsan_switch_to_fiber(fiber->tsan, kNoOrder);
#endif
  if (fiber->begun) {
    change(machine->scheduler, fiber->place);
  } else {
    fiber->begun = true;
    start(machine->scheduler, fiber->start);
  }
#ifdef EMULATE_ASAN
  __sanitizer_finish_switch_fiber(save, nullptr, nullptr);
#endif
}

void body() {
#ifdef EMULATE_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine->bottom, &machine->size);
#endif
  try {
    (*machine->kernel)();
  } catch (const std::exception& e) {
    if (machine->error.empty()) machine->error = e.what();
  }
  machine->now->done = machine->progress = true;
#ifdef EMULATE_TSAN
  __tsan_release(machine);
#endif
  to_scheduler(true);
}

void wait(Barrier& barrier, const Where& where, bool orders = true) {
  Fiber* fiber = machine->now;
  if (barrier.arrived && barrier.where.line() != where.line())
    throw std::runtime_error("threads of a block wait at different barriers: " + text(barrier.where) + " and " +
                             text(where));
  barrier.where = fiber->where = where;
  machine->progress = true;
  [[maybe_unused]] char* order = &barrier.order[barrier.generation & 1];
#ifdef EMULATE_TSAN
  if (orders) __tsan_release(order);
#endif
  if (++barrier.arrived == barrier.members) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    fiber->waits = &barrier;
    fiber->generation = barrier.generation;
    to_scheduler(false);
  }
#ifdef EMULATE_TSAN
  if (orders) __tsan_acquire(order);
#endif
  (void)orders;
}

Barrier& warp_of(const Fiber& fiber) { return fiber.block->warps[fiber.thread / kWarp]; }

std::string waiting() {
  std::map<std::string, int> places;
  for (const auto& fiber : machine->fibers)
    if (!fiber->done) ++places[text(fiber->where)];
  std::string list;
  for (const auto& [place, count] : places) list += (list.empty() ? "" : ", ") + std::to_string(count) + " at " + place;
  return list;
}

void run_cluster() {
  const Launch& how = machine->how;
  machine->blocks.clear();
  machine->blocks.resize(how.cluster);
  machine->fibers.clear();
  machine->cluster = Barrier{};
  machine->cluster.members = how.cluster * how.threads;
  for (int rank = 0; rank < how.cluster; ++rank) {
    Block& block = machine->blocks[rank];
    block.barrier.members = how.threads;
    for (Barrier& half : block.halves) half.members = how.threads / 2;
    block.warps.resize((how.threads + kWarp - 1) / kWarp);
    block.exchanged.resize(how.threads);
    block.factors.resize(how.threads);
    for (size_t w = 0; w < block.warps.size(); ++w)
      block.warps[w].members = std::min(kWarp, how.threads - static_cast<int>(w) * kWarp);
    for (int t = 0; t < how.threads; ++t) {
      auto fiber = std::make_unique<Fiber>();
      fiber->block = &block;
      fiber->rank = rank;
      fiber->index = machine->first_block + rank;
      fiber->thread = t;
      fiber->stack = std::make_unique<char[]>(kStack);
      getcontext(&fiber->start);
      fiber->start.uc_stack.ss_sp = fiber->stack.get();
      fiber->start.uc_stack.ss_size = kStack;
      fiber->start.uc_link = nullptr;
      makecontext(&fiber->start, body, 0);
#ifdef EMULATE_TSAN
      fiber->tsan = __tsan_create_fiber(0);
#endif
      machine->fibers.push_back(std::move(fiber));
    }
  }
  std::vector<Fiber*> order;
  for (const auto& fiber : machine->fibers) order.push_back(fiber.get());
  if (how.order == Order::kReverse) std::reverse(order.begin(), order.end());
  std::mt19937 random(how.seed);
  int64_t idle = 0;
  while (machine->error.empty()) {
    if (how.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
    machine->progress = false;
    bool ran = false, left = false;
    for (Fiber* fiber : order) {
      if (fiber->done) continue;
      left = true;
      if (fiber->waits && fiber->waits->generation == fiber->generation) continue;
      fiber->waits = nullptr;
      ran = true;
      enter(fiber);
      if (!machine->error.empty()) break;
    }
    if (!left) break;
    idle = machine->progress ? 0 : idle + 1;
    if (!ran && machine->error.empty()) machine->error = "deadlock: threads wait for ever: " + waiting();
    if (idle > kPatience && machine->error.empty()) machine->error = "livelock: threads spin for ever: " + waiting();
  }
#ifdef EMULATE_TSAN
  __tsan_acquire(machine);
  for (const auto& fiber : machine->fibers) __tsan_destroy_fiber(fiber->tsan);
#endif
  for (Block& block : machine->blocks)
    for (auto& [p, bytes] : block.chunks) std::free(p);
}

}  // namespace

void launch(const Launch& how, const std::function<void()>& kernel) {
  Machine here{};
  here.how = how;
  here.kernel = &kernel;
  machine = &here;
#ifdef EMULATE_TSAN
  here.tsan = __tsan_get_current_fiber();
#endif
  for (; here.first_block < how.blocks && here.error.empty(); here.first_block += how.cluster) run_cluster();
  machine = nullptr;
  if (!here.error.empty()) throw std::runtime_error(here.error);
}

int thread() { return machine->now->thread; }
int threads() { return machine->how.threads; }
int block() { return machine->now->index; }
void sync_block(Where where) { wait(machine->now->block->barrier, where); }
void sync_warp(Where where) { wait(warp_of(*machine->now), where); }
void sync_half(Where where) {
  Fiber* fiber = machine->now;
  wait(fiber->block->halves[fiber->thread / (machine->how.threads / 2)], where);
}
void sync_cluster(Where where) { wait(machine->cluster, where); }

// A shuffle hands values over, but orders no other memory.
static float exchange(float v, int from, Where where) {
  Fiber* fiber = machine->now;
  fiber->block->exchanged[fiber->thread] = v;
  wait(warp_of(*fiber), where, false);
  const float got = fiber->block->exchanged[from];
  wait(warp_of(*fiber), where, false);
  return got;
}

float shuffle_xor(float v, int lanes, Where where) { return exchange(v, machine->now->thread ^ lanes, where); }

float shuffle_up(float v, int lanes, Where where) {
  const int t = machine->now->thread;
  return exchange(v, t % kWarp >= lanes ? t - lanes : t, where);
}

float shuffle_from(float v, int lane, Where where) {
  return exchange(v, machine->now->thread / kWarp * kWarp + lane, where);
}

int sum_in_warp(int v, Where where) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2)
    v += static_cast<int>(shuffle_xor(static_cast<float>(v), lanes, where));
  return v;
}

float most_in_warp(float v, Where where) {
  for (int lanes = 1; lanes < kWarp; lanes *= 2) v = std::fmax(v, shuffle_xor(v, lanes, where));
  return v;
}

// Rows of a: lane / 4, and 8 more in its odd registers; columns of b: lane / 4; the inner index: 2 (lane % 4), and 8
// more in the later half of the registers; the result: row lane / 4, and 8 more in its later half, column 2 (lane % 4).
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where) {
  Fiber* fiber = machine->now;
  auto* factors = fiber->block->factors.data() + fiber->thread / kWarp * kWarp;
  const int lane = fiber->thread % kWarp;
  factors[lane] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  wait(warp_of(*fiber), where, false);
  const auto half = [](uint32_t pair, int i) {
    const uint32_t bits = i ? pair & 0xFFFF0000u : pair << 16;
    float v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  };
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) {
      const int within = k % 8 / 2, column = lane % 4 * 2 + i % 2;
      d[i] += half(factors[lane / 4 * 4 + within][i / 2 + k / 8 * 2], k % 2) *
              half(factors[column * 4 + within][4 + k / 8], k % 2);
    }
  wait(warp_of(*fiber), where, false);
}

void pause(Where where) {
  machine->now->where = where;
  to_scheduler(false);
}

int64_t load_acquire(const int64_t* p) {
  const int64_t v = *p;
#ifdef EMULATE_TSAN
  __tsan_acquire(const_cast<int64_t*>(p));
#endif
  return v;
}

void store_release(int64_t* p, int64_t v) {
#ifdef EMULATE_TSAN
  __tsan_release(p);
#endif
  machine->progress = true;
  *p = v;
}

// An arrival: a message is complete when the block has said what it expects and as many bytes have come.
struct Message {
  int32_t missing;  // bytes; below zero what came before it was expected
  uint16_t expected, number;
};
static_assert(sizeof(Message) == sizeof(Arrival));

static void change(Arrival* a, int32_t missing, bool expects) {
  Message m;
  std::memcpy(&m, a, sizeof m);
  if (expects && m.expected) throw std::runtime_error("a message is expected before the last one is complete");
  m.expected |= expects;
  m.missing += missing;
  if (m.expected && m.missing == 0) {
    m.expected = 0;
    ++m.number;
  }
  std::memcpy(a, &m, sizeof m);
#ifdef EMULATE_TSAN
  __tsan_release(a);
#endif
  machine->progress = true;
}

void begin_arrival(Arrival* a) { *a = 0; }
void expect(Arrival* a, int bytes) { change(a, bytes, true); }
void sent(Arrival* a, int bytes) { change(a, -bytes, false); }

bool came(const Arrival* a, int parity) {
  Message m;
  std::memcpy(&m, a, sizeof m);
  if ((m.number & 1) == parity) return false;
#ifdef EMULATE_TSAN
  __tsan_acquire(const_cast<Arrival*>(a));
#endif
  return true;
}

void* shared_chunk(int index, int64_t bytes) {
  auto& chunks = machine->now->block->chunks;
  if (index == static_cast<int>(chunks.size())) {
    int64_t taken = (bytes + 15) / 16 * 16;
    for (const auto& chunk : chunks) taken += (chunk.second + 15) / 16 * 16;
    if (taken > machine->how.shared_bytes) throw std::runtime_error("a block takes more shared memory than it has");
    char* p = static_cast<char*>(std::malloc(bytes));
    std::memset(p, machine->how.fill, bytes);
    chunks.emplace_back(p, bytes);
#ifdef EMULATE_TSAN
    __tsan_release(p);
#endif
  }
#ifdef EMULATE_TSAN
  __tsan_acquire(chunks[index].first);
#endif
  if (chunks[index].second != bytes) throw std::runtime_error("threads of a block take different shared arrays");
  return chunks[index].first;
}

void* chunk_in_block(void* p, int rank) {
  const auto& own = machine->now->block->chunks;
  if (rank < 0 || rank >= machine->how.cluster) throw std::runtime_error("no such block in the cluster");
  for (size_t i = 0; i < own.size(); ++i) {
    const int64_t offset = static_cast<char*>(p) - own[i].first;
    if (offset < 0 || offset >= own[i].second) continue;
    const auto& other = machine->blocks[rank].chunks;
    if (i >= other.size()) throw std::runtime_error("shared memory of a block that has not begun: sync_cluster first");
    return other[i].first + offset;
  }
  throw std::runtime_error("not an address in this block's shared memory");
}

}  // namespace fastgen::emulator
