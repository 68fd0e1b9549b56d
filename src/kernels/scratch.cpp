// A small pool of big blocks, first fit; everything above the bound is freed at once.
#include "scratch.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "experts.h"

namespace turnout::kernels {
namespace {

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kKeep = size_t{256} << 20;

struct Block {
  char* data;
  size_t bytes;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> free;
  size_t kept = 0;
};

// never destroyed: a worker thread may return scratch while the process ends
Pool& pool() {
  static Pool* p = new Pool;
  return *p;
}

}  // namespace

char* huge_alloc(size_t bytes) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  void* p = std::aligned_alloc(kPage, bytes == 0 ? kPage : bytes);
  if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__)
  madvise(p, bytes, MADV_HUGEPAGE);  // a hint: a refusal costs speed alone
#endif
  return static_cast<char*>(p);
}

void huge_free(char* p) { std::free(p); }

Scratch::Scratch(size_t bytes) : data_(nullptr), bytes_((bytes + kPage - 1) / kPage * kPage) {
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    size_t best = p.free.size();
    for (size_t i = 0; i < p.free.size(); ++i)
      if (p.free[i].bytes >= bytes_ && (best == p.free.size() || p.free[i].bytes < p.free[best].bytes)) best = i;
    if (best < p.free.size()) {
      data_ = p.free[best].data;
      bytes_ = p.free[best].bytes;
      p.kept -= bytes_;
      p.free.erase(p.free.begin() + static_cast<std::ptrdiff_t>(best));
      return;
    }
    // nothing is big enough: what is kept is too small for this caller and is replaced
    for (Block& b : p.free) huge_free(b.data);
    p.free.clear();
    p.kept = 0;
  }
  data_ = huge_alloc(bytes_);
}

Scratch::~Scratch() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  if (p.kept + bytes_ > kKeep) {
    huge_free(data_);
    return;
  }
  p.free.push_back({data_, bytes_});
  p.kept += bytes_;
}

void release_scratch() {
  Pool& p = pool();
  std::lock_guard<std::mutex> lock(p.mutex);
  for (Block& b : p.free) huge_free(b.data);
  p.free.clear();
  p.kept = 0;
}

}  // namespace turnout::kernels
