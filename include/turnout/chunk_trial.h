// ChunkTrial: finds by measurement into how many chunks an exchange is best cut.
#pragma once

#include <turnout/expert_parallel.h>

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace turnout {

/// Cuts exchanges into 1, 2 and 4 chunks by turns, in the steps of a training, and keeps the number by which a step is
/// fastest; a larger one only where it saves 3 % at least. What a step computes does not depend on chunks.
///
/// Every rank has one and makes the same calls; the time of the slowest rank counts.
class ChunkTrial {
 public:
  /// Without work where layout.chunks is not 0, or no experts of the module lie on several ranks.
  ChunkTrial(const torch::nn::Module& module, const ParallelLayout& layout);

  /// Call after each step. @param seconds that the step took @throws DistributedError
  void add_step(double seconds);

  bool done() const { return layers_.empty(); }
  /// Median seconds of a step by number of chunks; empty until done, and where there was nothing to try.
  const std::map<int64_t, double>& medians() const { return medians_; }
  int64_t chunks() const { return chunks_; }  ///< in use now

 private:
  void use(int64_t chunks);
  void choose();

  Group ranks_;
  std::vector<std::shared_ptr<ExpertParallelImpl>> layers_;  // none: done
  int64_t chunks_ = 1;
  int64_t steps_ = 0;
  std::map<int64_t, std::vector<double>> seconds_;
  std::map<int64_t, double> medians_;
};

}  // namespace turnout
