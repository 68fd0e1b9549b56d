// Sums of an interval, and the lines that come of them.
#include <turnout/telemetry.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <sstream>

namespace turnout {
namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kSchema = "turnout-telemetry-1";
constexpr int64_t kIntervals = 100;

std::vector<int64_t> row_of(const at::Tensor& matrix, int64_t row) {
  const at::Tensor values = matrix[row].contiguous();
  return {values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + values.numel()};
}

void add_to(at::Tensor& sum, const at::Tensor& more) { sum = sum.defined() ? sum + more : more; }

}  // namespace

Telemetry::Telemetry(std::string model, const Trainer& trainer)
    : model_(std::move(model)),
      training_(trainer.options),
      tokens_per_step_(trainer.tokens_per_step()),
      interval_(std::max<int64_t>(1, (trainer.options.steps + kIntervals / 2) / kIntervals)) {
  run_ = Json{{"kind", "run"},
              {"schema", kSchema},
              {"model", model_},
              {"options", Json::parse(to_json(trainer.model->options))},
              {"training", Json::parse(to_json(trainer.options))}}
             .dump();
}

bool Telemetry::due(const Trainer& trainer) const {
  const int64_t step = trainer.steps_done() + 1;
  return step % interval_ == 0 || step == training_.steps;
}

void Telemetry::add(const StepReport& report, double seconds) {
  const auto before = std::chrono::steady_clock::now();
  sum_up(report, seconds);
  const double here = std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
  seconds_of_steps_ += seconds + here;
  seconds_here_ += report.report_seconds + here;
}

double Telemetry::share() const { return seconds_of_steps_ > 0 ? seconds_here_ / seconds_of_steps_ : 0.0; }

void Telemetry::sum_up(const StepReport& report, double seconds) {
  if (first_step_ == 0) first_step_ = report.step;
  seconds_ += seconds;
  bits_ += report.bits_per_byte;
  aux_loss_ += report.aux_loss;
  gradient_norm_ += report.gradient_norm;
  largest_norm_ = std::max(largest_norm_, report.gradient_norm);
  if (report.expert_load.defined()) {
    add_to(expert_load_, report.expert_load);
    add_to(layer_dropped_, report.layer_dropped);
  }
  if (report.step % interval_ != 0 && report.step != training_.steps) return;
  write_interval(report);
  write_layers(report);
  first_step_ = 0;
  seconds_ = bits_ = aux_loss_ = gradient_norm_ = largest_norm_ = 0;
  expert_load_ = layer_dropped_ = at::Tensor();
}

void Telemetry::write_interval(const StepReport& report) {
  const auto steps = static_cast<double>(report.step - first_step_ + 1);
  const double tokens = steps * static_cast<double>(tokens_per_step_);
  const Json line = {{"kind", "interval"},
                     {"model", model_},
                     {"first_step", first_step_},
                     {"step", report.step},
                     {"tokens", report.step * tokens_per_step_},
                     {"seconds", seconds_},
                     {"tokens_per_second", seconds_ > 0 ? tokens / seconds_ : 0.0},
                     {"bits_per_byte", bits_ / steps},
                     {"aux_loss", aux_loss_ / steps},
                     {"gradient_norm", gradient_norm_ / steps},
                     {"gradient_norm_max", largest_norm_},
                     {"learning_rate", learning_rate(training_, report.step - 1)}};
  lines_.push_back({report.step, line.dump()});
}

void Telemetry::write_layers(const StepReport& report) {
  const auto optional = [](const std::optional<double>& loss) { return loss ? Json(*loss) : Json(nullptr); };
  for (size_t i = 0; i < report.layers.size(); ++i) {
    const LayerReport& layer = report.layers[i];
    const auto row = static_cast<int64_t>(i);
    const std::vector<int64_t> load = row_of(expert_load_, row);
    const auto rows = std::accumulate(load.begin(), load.end(), int64_t{0});
    const auto dropped = layer_dropped_[row].item<int64_t>();
    const auto fullest = static_cast<double>(*std::max_element(load.begin(), load.end()));
    const double mean = static_cast<double>(rows) / static_cast<double>(load.size());
    const Json line = {{"kind", "layer"},
                       {"model", model_},
                       {"layer", layer.layer},
                       {"first_step", first_step_},
                       {"step", report.step},
                       {"load", load},
                       {"max_over_mean", rows > 0 ? fullest / mean : 0.0},
                       {"dead_experts", std::count(load.begin(), load.end(), 0)},
                       {"choices", rows + dropped},
                       {"dropped", dropped},
                       {"entropy", layer.statistics.entropy.item<double>()},
                       {"logit_rms", layer.logit_rms},
                       {"logit_max", layer.logit_max},
                       {"balance_loss", optional(layer.balance_loss)},
                       {"z_loss", optional(layer.z_loss)}};
    lines_.push_back({report.step, line.dump()});
  }
}

std::string Telemetry::jsonl() const {
  std::string text = run_ + "\n";
  for (const Line& line : lines_) text += line.text + "\n";
  return text;
}

void Telemetry::load(const std::string& jsonl, int64_t step, const std::string& source) {
  std::vector<Line> kept;
  std::istringstream stream(jsonl);
  int64_t number = 0;
  for (std::string text; std::getline(stream, text);) {
    if (++number == 1 && text == run_) continue;
    const Json line = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    const auto found = line.is_object() ? line.find("step") : line.end();
    if (number == 1 || found == line.end() || !found->is_number_integer())
      throw FileError(source + ": line " + std::to_string(number) + " is no telemetry of this run: move the file away");
    if (found->get<int64_t>() <= step) kept.push_back({found->get<int64_t>(), text});
  }
  lines_ = std::move(kept);
}

}  // namespace turnout
