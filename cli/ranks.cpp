// Ranks of a run: the meeting, comparisons, and what only the first does.
#include "ranks.h"

#include "terminal.h"

#include <turnout/exchange.h>

#include <ATen/ops/full.h>

#include <fmt/format.h>

#include <cstdlib>

namespace turnout::cli {

void add_rank_options(CLI::App& app, RankOptions& options) {
  const char* group = "Ranks (under torchrun)";
  app.add_option("--expert-ranks", options.expert_ranks,
                 "Ranks that hold one set of experts; more ranks make replicas; 0 = all ranks")
      ->group(group)
      ->capture_default_str();
  app.add_option("--chunks", options.chunks, "Pieces of an exchange, so that it overlaps with the experts; 0 = 1, 2 or 4, by the time of the first steps")
      ->group(group)
      ->capture_default_str();
  app.add_flag("--own-batch", options.own_batch,
               "Capacity and losses of each rank's own tokens, not of those of all ranks together")
      ->group(group);
}

Ranks::Ranks(const RankOptions& options)
    : world_(world_options_from_environment()), layout_(make_layout(world_, options.expert_ranks, options.chunks)) {
  layout_.joined_batch = !options.own_batch;
  world_.check_same("the parallel layout", options.own_batch ? "--own-batch" : "no --own-batch");
}

void Ranks::check_same(const RunOptions& run, const ByteText& text, const std::string& command) {
  world_.check_same("what they were told to do", fmt::format("--minutes {}\n{}", run.minutes, command));
  world_.check_same("the options of the model", to_json(run.model));
  world_.check_same("the options of training", to_json(run.training));
  world_.check_same("the text", fmt::format("digest {:016x}", text.digest()));
}

double Ranks::of_first(double value) const {
  return sum_over(at::full({1}, first() ? value : 0.0, at::kDouble), layout_.all).item<double>();
}

bool Ranks::interrupted_anywhere() const {
  return sum_over(at::full({1}, interrupted() ? 1 : 0, at::kLong), layout_.all).item<int64_t>() > 0;
}

int64_t rank_of_process() {
  const char* rank = std::getenv("RANK");
  return rank == nullptr ? 0 : std::strtoll(rank, nullptr, 10);
}

}  // namespace turnout::cli
