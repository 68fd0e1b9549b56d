// The ranks that a launcher such as torchrun started, for `train` and `compare`.
#pragma once

#include "run_options.h"

#include <turnout/expert_parallel.h>
#include <turnout/text.h>

#include <CLI/CLI.hpp>

#include <memory>
#include <string>

namespace turnout::cli {

/// Options that matter where there are several ranks.
struct RankOptions {
  int64_t expert_ranks = 0;  ///< that hold one set of experts; 0 = all
  int64_t chunks = 0;        ///< 0 = found in the first steps
  bool own_batch = false;    ///< capacity and losses of each rank's own tokens
};

void add_rank_options(CLI::App& app, RankOptions& options);

/// The ranks of this run: one where no launcher's variables are set.
class Ranks {
 public:
  /// Waits for all ranks. @throws DistributedError
  explicit Ranks(const RankOptions& options);

  /// The one that prints and writes what all have in common.
  bool first() const { return world_.options.rank == 0; }
  int64_t size() const { return world_.options.size; }
  const ParallelLayout& layout() const { return layout_; }

  /// Compares what the ranks were told and read. @throws DistributedError naming the difference
  /// @param command what else decides which steps a rank makes, one thing a line
  void check_same(const RunOptions& run, const ByteText& text, const std::string& command);
  /// What was measured on the first rank, for all.
  double of_first(double value) const;
  /// Whether any rank was interrupted: all stop at the same step.
  bool interrupted_anywhere() const;

 private:
  World world_;
  ParallelLayout layout_;
};

/// The rank that a launcher gave this process; 0 where there is none.
int64_t rank_of_process();

}  // namespace turnout::cli
