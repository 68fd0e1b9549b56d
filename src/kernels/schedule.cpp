// Workers take tasks by ticket and spin, briefly, on the groups a task waits for.
#include "schedule.h"

#include <atomic>
#include <memory>
#include <thread>

namespace turnout::kernels {
namespace {

void wait_for(const std::atomic<int64_t>& remaining) {
  for (int spins = 0; remaining.load(std::memory_order_acquire) > 0; ++spins) {
    if (spins < 256) {
#if defined(__x86_64__) || defined(__i386__)
      __builtin_ia32_pause();
#endif
    } else {
      std::this_thread::yield();  // more threads than cores: let the one that works run
    }
  }
}

}  // namespace

void Schedule::run_erased(const ParallelFor& parallel, void* f, void (*call)(void*, const Task&, int)) {
  const size_t groups = remaining_.size();
  std::unique_ptr<std::atomic<int64_t>[]> remaining(new std::atomic<int64_t>[groups]);
  for (size_t g = 0; g < groups; ++g) remaining[g].store(remaining_[g], std::memory_order_relaxed);
  std::atomic<size_t> next{0};

  const auto work = [&](int worker) {
    for (;;) {
      const size_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= tasks_.size()) return;
      const Task& task = tasks_[i];
      for (int g : task.after)
        if (g >= 0) wait_for(remaining[static_cast<size_t>(g)]);
      call(f, task, worker);
#if defined(__x86_64__)
      // stores past the caches are not ordered by `release` alone
      __builtin_ia32_sfence();
#endif
      remaining[static_cast<size_t>(task.group)].fetch_sub(1, std::memory_order_release);
    }
  };

  const int threads = parallel.threads > 1 ? parallel.threads : 1;
  if (threads == 1 || tasks_.size() < 2) {
    work(0);
    return;
  }
  parallel(threads, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) work(static_cast<int>(w));
  });
}

}  // namespace turnout::kernels
