// Two models, one machine, the same batches: what `compare` measures.
#pragma once

#include "run_options.h"

#include <turnout/telemetry.h>
#include <turnout/training.h>

#include <nlohmann/json.hpp>

#include <memory>
#include <string>
#include <vector>

namespace turnout::cli {

/// One evaluation on held-out text.
struct CurvePoint {
  int64_t step = 0;
  int64_t tokens = 0;
  double seconds = 0;        ///< spent in training steps of this model so far, evaluations not counted
  double bits_per_byte = 0;  ///< of the held-out text
};

/// One of the two models, with what was measured of it.
struct Contestant {
  std::string name;
  Trainer trainer;
  Telemetry telemetry;
  double seconds = 0;
  std::vector<CurvePoint> curve{};
  double load_ratio_sum = 0;  ///< over steps and sparse layers: rows of the fullest expert / mean rows
  int64_t load_ratios = 0;
  at::Tensor expert_load{};  ///< [sparse layers, experts] rows over the whole training; undefined when dense
  int64_t choices = 0;
  int64_t dropped = 0;

  /// Trains one step and accounts for it. @return bits a byte of the batch
  double step();
  void evaluate();
  double load_spread() const { return load_ratios > 0 ? load_ratio_sum / static_cast<double>(load_ratios) : 0; }
  double tokens_per_second() const { return static_cast<double>(curve.back().tokens) / seconds; }
};

/// Held-out bits a byte after this many training seconds, interpolated between evaluations; the ends hold outside.
double bits_at(const std::vector<CurvePoint>& curve, double seconds);

/// Trains both to the end, a step of each in turn, the order of the two changing with every step.
/// @throws Interrupted, DivergenceError
void run_contest(Contestant& dense, Contestant& moe, int64_t evaluations, const Ranks& ranks);

/// The table, with the notes that it must not be read without.
std::string table(const Contestant& dense, const Contestant& moe);

/// Results of both, for compare.json.
nlohmann::ordered_json results_json(const Contestant& dense, const Contestant& moe);

/// One line of JSON an evaluation, for curves.jsonl.
std::string curves_jsonl(const Contestant& dense, const Contestant& moe);

}  // namespace turnout::cli
