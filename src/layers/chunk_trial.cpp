// The trial of numbers of chunks: steps to warm up, then rounds in which each number has its turn.
#include <turnout/chunk_trial.h>

#include <ATen/ATen.h>

#include <algorithm>
#include <array>

namespace turnout {
namespace {

constexpr std::array<int64_t, 3> kTried{1, 2, 4};
constexpr int64_t kTurns = kTried.size();
constexpr int64_t kWarm = 2, kRounds = 3;
constexpr double kGain = 0.97;  // a share of the time that noise alone does not reach

double slowest(double seconds, const Group& ranks) {
  return gather_over(at::full({1}, seconds, at::kDouble), ranks).max().item<double>();
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<int64_t>(values.size()) / 2;
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

ChunkTrial::ChunkTrial(const torch::nn::Module& module, const ParallelLayout& layout) : ranks_(layout.all) {
  if (layout.chunks != 0) {
    chunks_ = layout.chunks;
    return;
  }
  for (const auto& part : module.modules())
    if (auto layer = std::dynamic_pointer_cast<ExpertParallelImpl>(part)) layers_.push_back(std::move(layer));
  use(kTried.front());
}

void ChunkTrial::add_step(double seconds) {
  if (done()) return;
  const double of_all = slowest(seconds, ranks_);
  if (++steps_ > kWarm) seconds_[chunks_].push_back(of_all);
  const int64_t next = std::max<int64_t>(steps_ - kWarm, 0);
  if (next == kRounds * kTurns)
    choose();
  else
    use(kTried[next % kTurns]);
}

void ChunkTrial::choose() {
  int64_t best = kTried.front();
  for (const auto chunks : kTried) {
    medians_[chunks] = median(seconds_[chunks]);
    if (medians_[chunks] < kGain * medians_[best]) best = chunks;
  }
  use(best);
  layers_.clear();
}

void ChunkTrial::use(int64_t chunks) {
  chunks_ = chunks;
  for (auto& layer : layers_) layer->chunks = chunks;
}

}  // namespace turnout
