// Options of training: their checks, their JSON, and the schedule that they describe.
#include <turnout/training.h>

#include "layers/json_fields.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace turnout {
namespace {

template <class Fields>
void visit_training(Fields& f, TrainingOptions& o) {
  f.number("batch", o.batch);
  f.number("steps", o.steps);
  f.number("learning_rate", o.learning_rate);
  f.number("final_fraction", o.final_fraction);
  f.number("warmup_steps", o.warmup_steps);
  f.number("weight_decay", o.weight_decay);
  f.number("beta1", o.beta1);
  f.number("beta2", o.beta2);
  f.number("epsilon", o.epsilon);
  f.number("clip", o.clip);
  f.number("seed", o.seed);
  f.number("eval_bytes", o.eval_bytes);
}

void check_range(const char* name, double value, double least, double most) {
  TORCH_CHECK_VALUE(value >= least && value <= most, "turnout: ", name, " is ", value, ", expected ", least, " to ",
                    most);
}

}  // namespace

void check(const TrainingOptions& o) {
  check_range("batch", static_cast<double>(o.batch), 1, 1 << 20);
  check_range("steps", static_cast<double>(o.steps), 1, 1e12);
  check_range("learning_rate", o.learning_rate, 0, 1e3);
  check_range("final_fraction", o.final_fraction, 0, 1);
  check_range("warmup_steps", static_cast<double>(o.warmup_steps), 0, 1e12);
  check_range("weight_decay", o.weight_decay, 0, 1e3);
  check_range("beta1", o.beta1, 0, 1 - 1e-9);
  check_range("beta2", o.beta2, 0, 1 - 1e-9);
  check_range("epsilon", o.epsilon, 1e-30, 1);
  check_range("eval_bytes", static_cast<double>(o.eval_bytes), 1, 1e12);
  TORCH_CHECK_VALUE(o.clip > 0 && std::isfinite(o.clip), "turnout: clip is ", o.clip, ", expected above 0");
}

std::string to_json(const TrainingOptions& options) {
  TrainingOptions copy = options;
  JsonWriter writer;
  visit_training(writer, copy);
  return writer.json.dump(2);
}

TrainingOptions training_options_from_json(const std::string& text) {
  TrainingOptions options;
  const nlohmann::ordered_json json = parse_json("training options", text);
  JsonReader reader(json, "training");
  visit_training(reader, options);
  reader.finish();
  check(options);
  return options;
}

double learning_rate(const TrainingOptions& o, int64_t step) {
  if (step < o.warmup_steps)
    return o.learning_rate * static_cast<double>(step + 1) / static_cast<double>(o.warmup_steps);
  const double past = static_cast<double>(step - o.warmup_steps);
  const double all = static_cast<double>(std::max<int64_t>(1, o.steps - o.warmup_steps));
  const double cosine = 0.5 * (1.0 + std::cos(std::numbers::pi * std::min(1.0, past / all)));
  return o.learning_rate * (o.final_fraction + (1.0 - o.final_fraction) * cosine);
}

bool decays(const std::string& name, const at::Tensor& parameter) {
  return parameter.dim() >= 2 && !name.ends_with("bias") && !name.starts_with("embedding.");
}

}  // namespace turnout
