// A pool of freed blocks, oldest first; the smallest that fits without waste is taken again.
#include "fresh.h"

#include "kernels/table.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace turnout::ops {
namespace {

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kLarge = size_t{4} << 20;  // below, glibc reuses memory, which is then resident

size_t most_kept() {
#if defined(__linux__)
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
  if (pages > 0 && size > 0) return static_cast<size_t>(pages) / 8 * static_cast<size_t>(size);
#endif
  return size_t{256} << 20;
}

struct Block {
  char* data;
  size_t bytes;
};

class Pool {
 public:
  Block take(size_t bytes) {
    if (const Block found = find(bytes); found.data) return found;
    try {
      return {kernels::huge_alloc(bytes), bytes};
    } catch (const std::bad_alloc&) {
      release();  // what waits counts where address space or commitments are limited
      return {kernels::huge_alloc(bytes), bytes};
    }
  }

  void give(Block block) noexcept {
#if defined(__linux__)
    madvise(block.data, block.bytes, MADV_FREE);  // a hint: without it the pages wait all the same
#endif
    const std::lock_guard<std::mutex> lock(mutex_);
    try {
      free_.push_back(block);
    } catch (const std::bad_alloc&) {
      return kernels::huge_free(block.data);
    }
    kept_ += block.bytes;
    while (kept_ > limit_) drop(free_.begin());
  }

  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    while (!free_.empty()) drop(free_.begin());
  }

 private:
  /// The smallest block that fits with at most a quarter to spare, taken out; or nothing.
  Block find(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = free_.end();
    for (auto b = free_.begin(); b != free_.end(); ++b)
      if (b->bytes >= bytes && b->bytes <= bytes + bytes / 4 && (best == free_.end() || b->bytes < best->bytes))
        best = b;
    if (best == free_.end()) return {nullptr, 0};
    const Block found = *best;
    free_.erase(best);
    kept_ -= found.bytes;
    return found;
  }

  void drop(std::vector<Block>::iterator block) {
    kernels::huge_free(block->data);
    kept_ -= block->bytes;
    free_.erase(block);
  }

  std::mutex mutex_;
  std::vector<Block> free_;
  size_t kept_ = 0;
  const size_t limit_ = most_kept();
};

// never destroyed: tensors may die while the process ends
Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}

void give_back(void* context) {
  const auto* block = static_cast<Block*>(context);
  c10::profiledCPUMemoryReporter().Delete(block->data);
  pool().give(*block);
  delete block;
}

class Allocator : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    try {
      auto* block = new Block{};
      try {
        *block = pool().take((bytes + kPage - 1) / kPage * kPage);
      } catch (...) {
        delete block;
        throw;
      }
      c10::profiledCPUMemoryReporter().New(block->data, block->bytes);
      return {block->data, block, give_back, c10::Device(c10::DeviceType::CPU)};
    } catch (const std::bad_alloc&) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, "out of memory: ", bytes, " bytes for an output of the kernels");
    }
  }
  void copy_data(void* to, const void* from, size_t count) const override { default_copy_data(to, from, count); }
};

}  // namespace

at::Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const auto type = c10::typeMetaToScalarType(options.dtype());
  const auto bytes = at::detail::computeStorageNbytesContiguous(sizes, c10::elementSize(type));
  if (bytes < kLarge || !options.device().is_cpu()) return at::empty(sizes, options);
  static Allocator allocator;
  return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU), type, std::nullopt);
}

void advise_huge_pages([[maybe_unused]] const at::Tensor& tensor) {
#if defined(__linux__)
  if (!tensor.device().is_cpu() || tensor.nbytes() < kLarge) return;
  // whole pages inside the tensor alone: the advice reaches nobody else's memory
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const auto first = (begin + kPage - 1) / kPage * kPage, last = (begin + tensor.nbytes()) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a hint: may be refused
#endif
}

void release_fresh() { pool().release(); }

}  // namespace turnout::ops
