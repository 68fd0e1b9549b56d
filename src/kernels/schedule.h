// One ordered list of tasks, each waiting for named groups of earlier tasks: no barriers, one fork-join a call.
#pragma once

#include <cstdint>
#include <vector>

#include "experts.h"

namespace turnout::kernels {

/// A piece of work; `stage`, `item`, `begin`, `end` mean what the driver says.
struct Task {
  int stage;
  int64_t item, begin, end;
  int group;     ///< the group it belongs to
  int after[2];  ///< groups that must be complete first, or -1
};

/// Tasks in the order in which threads take them.
///
/// A task may wait only for groups that were closed before it was added, so the oldest task that is not done can always
/// run: any number of threads, even one, ends without a deadlock.
class Schedule {
 public:
  int new_group() {
    remaining_.push_back(0);
    return static_cast<int>(remaining_.size()) - 1;
  }

  void add(int group, int stage, int64_t item, int64_t begin, int64_t end, int after0 = -1, int after1 = -1) {
    tasks_.push_back({stage, item, begin, end, group, {after0, after1}});
    ++remaining_[static_cast<size_t>(group)];
  }

  /// Splits [0, n) into pieces of at most `span` and adds one task each.
  void add_split(int group, int stage, int64_t item, int64_t n, int64_t span, int after0 = -1, int after1 = -1) {
    for (int64_t i = 0; i < n; i += span) add(group, stage, item, i, i + span < n ? i + span : n, after0, after1);
  }

  /// Runs f(task, worker) for every task, worker in [0, parallel.threads).
  template <class F>
  void run(const ParallelFor& parallel, F&& f) {
    run_erased(parallel, &f, [](void* fn, const Task& t, int w) { (*static_cast<F*>(fn))(t, w); });
  }

 private:
  void run_erased(const ParallelFor& parallel, void* f, void (*call)(void*, const Task&, int));

  std::vector<Task> tasks_;
  std::vector<int64_t> remaining_;
};

}  // namespace turnout::kernels
