// Telemetry: a run of training as lines of JSON, about a hundred intervals of it whatever its length.
#pragma once

#include <turnout/training.h>

#include <cstdint>
#include <string>
#include <vector>

namespace turnout {

/// Collects what Trainer::step() reports and writes a line an interval, and one a sparse layer and interval.
///
/// The fields stand in docs/telemetry.md. Sums are taken over every step; what costs passes over the scores is looked
/// at in the last step of an interval alone; share() tells what that costs.
class Telemetry {
 public:
  /// @param model name that each line bears
  /// @param trainer read for its options alone
  Telemetry(std::string model, const Trainer& trainer);

  /// Whether the trainer's next step ends an interval: the argument of its step().
  bool due(const Trainer& trainer) const;
  /// Takes up a step. @param seconds that it took
  void add(const StepReport& report, double seconds);

  /// What telemetry took of the time of the steps taken up so far, 0 to 1: the reports and the writing of lines.
  double share() const;

  /// All lines so far: the run first, then the intervals in order.
  std::string jsonl() const;
  /// Goes on from the lines of a run that was interrupted: those up to `step` are kept, later ones will come again.
  /// @param source how to call where they came from, such as a file's path
  /// @throws FileError naming the line that is no telemetry of this run
  void load(const std::string& jsonl, int64_t step, const std::string& source);

 private:
  struct Line {
    int64_t step;
    std::string text;
  };

  void sum_up(const StepReport& report, double seconds);
  void write_interval(const StepReport& report);
  void write_layers(const StepReport& report);

  std::string model_;
  std::string run_;  // the first line
  TrainingOptions training_;
  int64_t tokens_per_step_;
  int64_t interval_;
  std::vector<Line> lines_;
  // sums since the last line
  int64_t first_step_ = 0;
  double seconds_ = 0, bits_ = 0, aux_loss_ = 0, gradient_norm_ = 0, largest_norm_ = 0;
  at::Tensor expert_load_, layer_dropped_;
  // since the beginning
  double seconds_of_steps_ = 0, seconds_here_ = 0;
};

}  // namespace turnout
