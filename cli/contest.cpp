// The contest itself: alternate steps, each model's own clock.
#include "contest.h"

#include "ranks.h"
#include "terminal.h"

#include <ATen/ops/amax.h>

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

namespace turnout::cli {

double Contestant::step() {
  const auto start = std::chrono::steady_clock::now();
  const StepReport report = trainer.step(telemetry.due(trainer));
  const double took = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  seconds += took;
  telemetry.add(report, took);
  choices += report.choices;
  dropped += report.dropped;
  if (report.expert_load.defined()) {
    const at::Tensor load = report.expert_load.to(at::kDouble);
    const at::Tensor ratio = load.amax(1) / load.mean(1).clamp_min(1e-9);
    load_ratio_sum += ratio.sum().item<double>();
    load_ratios += ratio.numel();
    expert_load = expert_load.defined() ? expert_load + report.expert_load : report.expert_load;
  }
  return report.bits_per_byte;
}

void Contestant::evaluate() {
  const int64_t steps = trainer.steps_done();
  curve.push_back({steps, steps * trainer.tokens_per_step(), seconds, trainer.evaluate()});
}

double bits_at(const std::vector<CurvePoint>& curve, double seconds) {
  if (seconds <= curve.front().seconds) return curve.front().bits_per_byte;
  for (size_t i = 1; i < curve.size(); ++i) {
    const CurvePoint &a = curve[i - 1], &b = curve[i];
    if (seconds > b.seconds || b.seconds <= a.seconds) continue;
    const double share = (seconds - a.seconds) / (b.seconds - a.seconds);
    return a.bits_per_byte + share * (b.bits_per_byte - a.bits_per_byte);
  }
  return curve.back().bits_per_byte;
}

void run_contest(Contestant& dense, Contestant& moe, int64_t evaluations, const Ranks& ranks) {
  const int64_t steps = dense.trainer.options.steps;
  // Running means over about 20 steps: single batches jump.
  double dense_bits = 0, moe_bits = 0;
  Progress progress(steps, ranks.first());
  for (int64_t step = 1; step <= steps; ++step) {
    Contestant& first = step % 2 ? dense : moe;
    Contestant& second = step % 2 ? moe : dense;
    const double first_bits = first.step(), second_bits = second.step();
    const double share = std::max(1.0 / static_cast<double>(step), 0.05);
    dense_bits += share * ((step % 2 ? first_bits : second_bits) - dense_bits);
    moe_bits += share * ((step % 2 ? second_bits : first_bits) - moe_bits);
    // Evaluations are spaced evenly and the last one stands at the end.
    if (step * evaluations / steps != (step - 1) * evaluations / steps) {
      dense.evaluate();
      moe.evaluate();
    }
    if (progress.due(step)) {
      const double tokens = static_cast<double>(step * dense.trainer.tokens_per_step());
      progress.update(step, fmt::format("dense {:.3f}  MoE {:.3f} bits/byte  {} tokens/s", dense_bits, moe_bits,
                                        short_number(tokens / (dense.seconds + moe.seconds))));
    }
    if (ranks.interrupted_anywhere())
      throw Interrupted(
          fmt::format("stopped at step {} of {}: a comparison is written only when complete", step, steps));
  }
}

}  // namespace turnout::cli
