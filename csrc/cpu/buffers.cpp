// Large results: memory that a tensor has given back serves the next one. Fresh pages cost the system more time (it
// fills them with zeros, and enters them one by one) than most kernels take to write a result.
#include <unistd.h>

#include <mutex>

#include "../fastgen.h"

namespace fastgen {
namespace {

constexpr size_t kHuge = size_t{2} << 20;   // a huge page, where blocks begin
constexpr size_t kLeast = size_t{1} << 20;  // smaller tensors are PyTorch's own affair
constexpr size_t kKeep = size_t{1} << 30;   // bytes that may lie idle

class Pool {
 public:
  void* take(size_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      auto best = idle_.end();
      for (auto i = idle_.begin(); i != idle_.end(); ++i)
        if (i->bytes >= bytes && i->bytes <= bytes + bytes / 4 && (best == idle_.end() || i->bytes <= best->bytes))
          best = i;
      if (best != idle_.end()) {
        void* p = best->p;
        idle_bytes_ -= best->bytes;
        lent_.push_back(*best);
        idle_.erase(best);
        return p;
      }
    }
    void* p = map(bytes);
    const std::lock_guard lock(mutex_);
    lent_.push_back({p, bytes});
    return p;
  }

  void give_back(void* p) {
    std::vector<Block> surplus;
    {
      const std::lock_guard lock(mutex_);
      const auto block = std::find_if(lent_.begin(), lent_.end(), [&](const Block& b) { return b.p == p; });
      idle_.push_back(*block);
      idle_bytes_ += block->bytes;
      lent_.erase(block);
      surplus = beyond(keep_);
    }
    for (const Block& block : surplus) munmap(block.p, block.bytes);
  }

  // At most so many bytes may lie idle, from now on if `lasting`.
  void keep(size_t bytes, bool lasting) {
    std::vector<Block> surplus;
    {
      const std::lock_guard lock(mutex_);
      if (lasting) keep_ = bytes;
      surplus = beyond(bytes);
    }
    for (const Block& block : surplus) munmap(block.p, block.bytes);
  }

 private:
  struct Block {
    void* p;
    size_t bytes;
  };

  // The blocks that have lain idle longest, taken out until at most `bytes` do.
  std::vector<Block> beyond(size_t bytes) {
    auto end = idle_.begin();
    for (; end != idle_.end() && idle_bytes_ > bytes; ++end) idle_bytes_ -= end->bytes;
    std::vector<Block> surplus(idle_.begin(), end);
    idle_.erase(idle_.begin(), end);
    return surplus;
  }

  static void* map(size_t bytes) {
    void* all = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    FASTGEN_CHECK(all != MAP_FAILED, "out of memory: a result of ", bytes, " bytes could not be allocated");
    const auto begin = reinterpret_cast<uintptr_t>(all), first = (begin + kHuge - 1) / kHuge * kHuge;
    if (first > begin) munmap(all, first - begin);
    munmap(reinterpret_cast<void*>(first + bytes), begin + kHuge - first);
#if defined(MADV_HUGEPAGE)
    madvise(reinterpret_cast<void*>(first), bytes, MADV_HUGEPAGE);
#endif
    return reinterpret_cast<void*>(first);
  }

  std::mutex mutex_;
  std::vector<Block> idle_, lent_;  // idle: the longest first
  size_t idle_bytes_ = 0, keep_ = kKeep;
};

Pool& pool() {
  static Pool* const it = new Pool;  // never destroyed: tensors may outlive the library's static objects
  return *it;
}

void keep_buffers(int64_t bytes, bool lasting) { pool().keep(bytes, lasting); }

}  // namespace

Tensor large_buffer(const Tensor& like, const std::vector<int64_t>& size, bool of_bytes) {
  size_t count = 1;
  for (const int64_t n : size) count *= n;
  const size_t bytes = count * (of_bytes ? 1 : like.element_size());
  const ScalarType type = of_bytes ? ScalarType::Byte : like.scalar_type();
  if (bytes < kLeast) return torch::stable::new_empty(like, size, type);
  std::vector<int64_t> strides(size.size());
  for (int64_t i = std::ssize(size) - 1, step = 1; i >= 0; step *= size[i--]) strides[i] = step;
  static const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));  // blocks are whole ones
  void* p = pool().take(round_up(bytes, page));
  return torch::stable::from_blob(p, size, strides, like.device(), type, [](void* data) { pool().give_back(data); });
}

}  // namespace fastgen

STABLE_TORCH_LIBRARY_IMPL(fastgen, CompositeExplicitAutograd, m) {
  m.impl("keep_buffers", TORCH_BOX(&fastgen::keep_buffers));
}
