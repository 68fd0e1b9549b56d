// One step of training, evaluation, and a state that resumes to the same bits.
#include <turnout/training.h>

#include "models/hash.h"
#include "models/state_parts.h"

#include <ATen/Context.h>
#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numbers>

namespace turnout {
namespace {

constexpr const char* kAverage = "optimizer.average.";
constexpr const char* kSquareAverage = "optimizer.square_average.";
constexpr const char* kModel = "model.";

// This rank's part [begin, end) of `count` things.
std::pair<int64_t, int64_t> part_of(int64_t count, const turnout::Group& ranks) {
  return {count * ranks.rank / ranks.size, count * (ranks.rank + 1) / ranks.size};
}

// Windows of `length` bytes at `offsets`: [offsets, length] int64.
at::Tensor windows(const std::string& text, const std::vector<size_t>& offsets, int64_t length) {
  at::Tensor bytes = at::empty({static_cast<int64_t>(offsets.size()), length}, at::kByte);
  auto* out = bytes.mutable_data_ptr<uint8_t>();
  for (const size_t offset : offsets)
    out = std::copy_n(reinterpret_cast<const uint8_t*>(text.data()) + offset, length, out);
  return bytes.to(at::kLong);
}

// Loss of predicting bytes 1 … L from bytes 0 … L − 1, in nats.
at::Tensor prediction_loss(const at::Tensor& logits_BLV, const at::Tensor& tokens_BL1, at::Reduction::Reduction how) {
  const int64_t L = logits_BLV.size(1);
  return at::cross_entropy_loss(logits_BLV.flatten(0, 1), tokens_BL1.narrow(1, 1, L).flatten(), {}, how);
}

void count_load(const LanguageModelOutput& output, StepReport& report) {
  std::vector<at::Tensor> loads, dropped;
  for (const auto& layer : output.layers) {
    if (!layer) continue;
    loads.push_back(layer->plan.tokens_per_expert());
    dropped.push_back(layer->dropped);
    report.choices += layer->routing.topk_ids.numel();
  }
  if (loads.empty()) return;
  report.expert_load = at::stack(loads).to(at::kCPU);
  report.layer_dropped = at::stack(dropped).to(at::kCPU);
  report.dropped = report.layer_dropped.sum().item<int64_t>();
}

void observe_layers(const LanguageModelOutput& output, StepReport& report) {
  const at::NoGradGuard no_grad;
  const auto value_of = [](const at::Tensor& loss) {
    return loss.defined() ? std::optional<double>(loss.item<double>()) : std::nullopt;
  };
  for (size_t i = 0; i < output.layers.size(); ++i) {
    if (!output.layers[i]) continue;
    const MoEOutput& out = *output.layers[i];
    const at::Tensor logits = out.logits.to(at::kFloat);
    report.layers.push_back({static_cast<int64_t>(i), routing_statistics(out.routing, out.plan, out.dropped),
                             logits.square().mean().sqrt().item<double>(), logits.abs().max().item<double>(),
                             value_of(out.balance_loss), value_of(out.z_loss)});
  }
}

// The layer that a parameter belongs to, as DivergenceError names it.
std::string place_of(const std::string& parameter) {
  const std::string module = parameter.substr(0, parameter.find('.'));
  return module.starts_with("layer_") ? "layer " + module.substr(6) : module == "norm" ? "head" : module;
}

void check_text(const char* part, const std::string& text, int64_t context) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(text.size()) > context, "turnout: the ", part, " text has ", text.size(),
                    " bytes, expected more than the context, ", context);
}

}  // namespace

DivergenceError::DivergenceError(int64_t step_in, const std::string& where_in, const std::string& what)
    : std::runtime_error("training diverged at step " + std::to_string(step_in) + ", " + where_in + ": " + what),
      step(step_in),
      where(where_in) {}

Trainer::Trainer(ByteLanguageModel model_in, TrainingOptions options_in, std::shared_ptr<const ByteText> text)
    : options(options_in),
      model(std::move(model_in)),
      text_(std::move(text)),
      chunk_trial_(*model, model->layout) {
  check(options);
  check_text("training", text_->training, model->options.context);
  check_text("held-out", text_->held_out, model->options.context);
  TORCH_CHECK_VALUE(model->options.vocabulary == 256, "turnout: vocabulary is ", model->options.vocabulary,
                    ", expected 256, one token a byte");
  const auto& ranks = model->layout.all;
  TORCH_CHECK_VALUE(options.batch % ranks.size == 0, "turnout: batch is ", options.batch, ", expected a multiple of ",
                    ranks.size, " (the ranks)");
  const auto parts = parts_of_banks(*model);
  groups_.resize(2);
  groups_[0].weight_decay = options.weight_decay;
  for (const auto& item : model->named_parameters()) {
    Group& group = groups_[decays(item.key(), item.value()) ? 0 : 1];
    group.names.push_back(item.key());
    group.parameters.push_back(item.value());
    group.averages.push_back(at::zeros_like(item.value()));
    group.square_averages.push_back(at::zeros_like(item.value()));
    group.steps.push_back(at::zeros({}, item.value().options().requires_grad(false)));
    group.in_parts.push_back(parts.count(item.key()) > 0);
  }
}

at::Tensor Trainer::batch(int64_t step) const {
  const int64_t length = model->options.context + 1;
  const uint64_t starts = text_->training.size() - static_cast<size_t>(length) + 1;
  std::vector<size_t> offsets;
  const auto [begin, end] = part_of(options.batch, model->layout.all);
  for (int64_t row = begin; row < end; ++row)
    offsets.push_back(hash_numbers(options.seed, static_cast<uint64_t>(step), static_cast<uint64_t>(row)) % starts);
  return windows(text_->training, offsets, length).to(model->embedding->weight.device());
}

StepReport Trainer::step(bool observe) {
  TORCH_CHECK_VALUE(!done(), "turnout: Trainer::step: all ", options.steps, " steps are done");
  const auto start = std::chrono::steady_clock::now();
  auto report = make_step(observe);
  chunk_trial_.add_step(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  return report;
}

StepReport Trainer::make_step(bool observe) {
  const MoEOptions& moe = model->options.moe;
  if (model->options.kind != BlockKind::dense && !moe.capacity.dropless() && moe.capacity.order == DropOrder::random)
    at::manual_seed(hash_numbers(~options.seed, static_cast<uint64_t>(steps_done_)));

  model->train();
  for (Group& group : groups_)
    for (at::Tensor& parameter : group.parameters) parameter.mutable_grad() = at::Tensor();
  const at::Tensor tokens_BL1 = batch(steps_done_);
  const at::Tensor inputs_BL = tokens_BL1.narrow(1, 0, model->options.context);
  const LanguageModelOutput output = model(inputs_BL);
  const at::Tensor loss = prediction_loss(output.logits, tokens_BL1, at::Reduction::Mean);
  const at::Tensor objective = loss + output.aux_loss;

  StepReport report;
  report.step = steps_done_ + 1;
  report.bits_per_byte = loss.item<double>() / std::numbers::ln2;
  report.aux_loss = output.aux_loss.item<double>();
  const auto before = std::chrono::steady_clock::now();
  count_load(output, report);
  if (observe) observe_layers(output, report);
  report.report_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
  join(report);
  refuse_divergence(inputs_BL, report.bits_per_byte + report.aux_loss);
  objective.backward();
  average_gradients(*model, model->layout);
  report.gradient_norm = clip_and_update();
  ++steps_done_;
  return report;
}

// Means of losses and sums of counts over the ranks.
void Trainer::join(StepReport& report) const {
  const auto& ranks = model->layout.all;
  if (ranks.size == 1) return;
  const auto sums = sum_over(at::tensor({report.bits_per_byte, report.aux_loss, static_cast<double>(report.choices),
                                         static_cast<double>(report.dropped)}, at::kDouble), ranks);
  report.bits_per_byte = sums[0].item<double>() / static_cast<double>(ranks.size);
  report.aux_loss = sums[1].item<double>() / static_cast<double>(ranks.size);
  report.choices = sums[2].item<int64_t>();
  report.dropped = sums[3].item<int64_t>();
  if (!report.expert_load.defined()) return;
  report.expert_load = sum_over(report.expert_load, ranks);
  report.layer_dropped = sum_over(report.layer_dropped, ranks);
}

void Trainer::refuse_divergence(const at::Tensor& tokens, double loss) {
  if (std::isfinite(loss)) return;
  const std::string where = model->first_non_finite(tokens);
  throw DivergenceError(steps_done_ + 1, where.empty() ? "loss" : where,
                        "the loss is " + std::to_string(loss) + "; a lower learning rate may help");
}

void Trainer::refuse_gradient(double norm) const {
  // The backward runs from the head down: the last parameter that it spoiled is the nearest to the cause.
  std::string nearest;
  for (const auto& item : model->named_parameters())
    if (item.value().grad().defined() && !item.value().grad().isfinite().all().item<bool>()) nearest = item.key();
  if (nearest.empty())
    throw DivergenceError(steps_done_ + 1, "loss", "the norm of the gradient is " + std::to_string(norm));
  throw DivergenceError(steps_done_ + 1, place_of(nearest), "the gradient of " + nearest + " is not finite");
}

// Of the whole model: gradients of experts that other ranks hold are counted there.
double Trainer::gradient_norm(const std::vector<std::vector<at::Tensor>>& gradients) const {
  std::vector<at::Tensor> norms, of_parts;
  for (size_t g = 0; g < groups_.size(); ++g) {
    if (gradients[g].empty()) continue;
    const auto of_group = at::_foreach_norm(gradients[g]);
    for (size_t i = 0; i < of_group.size(); ++i) (groups_[g].in_parts[i] ? of_parts : norms).push_back(of_group[i]);
  }
  if (!of_parts.empty())
    norms.push_back(sum_over(at::linalg_vector_norm(at::stack(of_parts)).square(), model->layout.experts).sqrt());
  return at::linalg_vector_norm(at::stack(norms)).item<double>();
}

double Trainer::clip_and_update() {
  const at::NoGradGuard no_grad;
  std::vector<std::vector<at::Tensor>> gradients;
  for (const Group& group : groups_) {
    auto& of_group = gradients.emplace_back();
    for (const at::Tensor& parameter : group.parameters)
      of_group.push_back(parameter.grad().defined() ? parameter.grad() : at::zeros_like(parameter));
  }
  const double value = gradient_norm(gradients);
  if (!std::isfinite(value)) refuse_gradient(value);
  const at::Tensor divisor = (at::full({}, value, gradients[0][0].options()) / options.clip).clamp_min(1.0);
  const double rate = learning_rate(options, steps_done_);
  for (size_t g = 0; g < groups_.size(); ++g) {
    Group& group = groups_[g];
    if (group.parameters.empty()) continue;
    for (at::Tensor& step : group.steps) step.add_(1);
    at::_fused_adamw_(group.parameters, gradients[g], group.averages, group.square_averages, {}, group.steps, rate,
                      options.beta1, options.beta2, group.weight_decay, options.epsilon, /*amsgrad=*/false,
                      /*maximize=*/false, divisor, /*found_inf=*/{});
  }
  return value;
}

double Trainer::evaluate() {
  const at::NoGradGuard no_grad;
  const bool was_training = model->is_training();
  at::Generator generator = at::globalContext().defaultGenerator(model->embedding->weight.device());
  const at::Tensor random_state = generator.get_state();  // routing may draw
  model->eval();
  const int64_t context = model->options.context;
  const auto room = static_cast<int64_t>(text_->held_out.size()) - context;  // window starts
  const int64_t count = std::max<int64_t>(1, std::min(options.eval_bytes, room) / context);
  double nats = 0.0;
  for (int64_t first = 0; first < count; first += options.batch) {
    std::vector<size_t> offsets;
    const auto [begin, end] = part_of(std::min(count - first, options.batch), model->layout.all);
    for (int64_t w = first + begin; w < first + end; ++w)
      offsets.push_back(static_cast<size_t>(static_cast<__int128>(w) * (room - 1) / std::max<int64_t>(1, count - 1)));
    const at::Tensor tokens = windows(text_->held_out, offsets, context + 1).to(model->embedding->weight.device());
    const LanguageModelOutput output = model(tokens.narrow(1, 0, context));
    nats += prediction_loss(output.logits, tokens, at::Reduction::None).to(at::kDouble).sum().item<double>();
  }
  nats = sum_over(at::tensor({nats}, at::kDouble), model->layout.all).item<double>();
  model->train(was_training);
  generator.set_state(random_state);
  return nats / static_cast<double>(count * context) / std::numbers::ln2;
}

std::map<std::string, at::Tensor> Trainer::optimizer_tensors() const {
  std::map<std::string, at::Tensor> tensors;
  for (const Group& group : groups_) {
    for (size_t i = 0; i < group.names.size(); ++i) {
      tensors.emplace(kAverage + group.names[i], group.averages[i]);
      tensors.emplace(kSquareAverage + group.names[i], group.square_averages[i]);
    }
  }
  return tensors;
}

TensorFile Trainer::state() const {
  TensorFile state;
  for (const auto& [name, tensor] : module_tensors(*model)) state.tensors.emplace(kModel + name, tensor);
  state.tensors.merge(optimizer_tensors());
  state.tensors = part_to_write(state.tensors, parts_in_state(), model->layout);
  state.metadata = {{"kind", "turnout training state"},
                    {"model", to_json(model->options)},
                    {"training", to_json(options)},
                    {"text", std::to_string(text_->digest())},
                    {"step", std::to_string(steps_done_)}};
  return state;
}

// Parts of banks under the names that they have in a state.
std::map<std::string, ExpertRange> Trainer::parts_in_state() const {
  std::map<std::string, ExpertRange> parts;
  for (const auto& [name, range] : parts_of_banks(*model))
    for (const char* prefix : {kModel, kAverage, kSquareAverage}) parts.emplace(prefix + name, range);
  return parts;
}

StateOptions state_options(const TensorFile& state, const std::string& source) {
  for (const char* key : {"kind", "model", "training", "text", "step"})
    if (!state.metadata.count(key)) throw FileError(source + ": is no training state: it lacks '" + key + "'");
  try {
    return {language_model_options_from_json(state.metadata.at("model")),
            training_options_from_json(state.metadata.at("training"))};
  } catch (const c10::Error& error) {
    throw FileError(source + ": " + error.what_without_backtrace());
  }
}

void Trainer::load_state(const TensorFile& state, const std::string& source) {
  const StateOptions stored = state_options(state, source);
  if (to_json(stored.model) != to_json(model->options)) throw FileError(source + ": holds another model");
  if (to_json(stored.training) != to_json(options)) throw FileError(source + ": was trained with other options");
  if (state.metadata.at("text") != std::to_string(text_->digest()))
    throw FileError(source + ": was trained on another text");
  const std::string& step_text = state.metadata.at("step");
  const bool digits = !step_text.empty() && step_text.size() <= 12 &&
                      std::all_of(step_text.begin(), step_text.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (!digits || std::stoll(step_text) > options.steps)
    throw FileError(source + ": its step is '" + step_text + "', expected 0 to " + std::to_string(options.steps));

  const auto tensors = parts_to_read(state.tensors, parts_in_state(), source);
  for (const auto& [name, tensor] : tensors)
    if (!tensor.isfinite().all().item<bool>())
      throw FileError(source + ": '" + name + "' holds numbers that are not finite");
  std::map<std::string, at::Tensor> of_model, of_optimizer = optimizer_tensors(), others;
  std::string problems;
  for (const auto& [name, tensor] : tensors) {
    const auto slot = of_optimizer.find(name);
    if (name.starts_with(kModel))
      of_model.emplace(name.substr(std::string_view(kModel).size()), tensor);
    else if (slot == of_optimizer.end())
      problems += " '" + name + "' is unused;";
    else if (slot->second.sizes() != tensor.sizes() || slot->second.scalar_type() != tensor.scalar_type())
      problems += " '" + name + "' has another shape or type;";
  }
  for (const auto& item : of_optimizer)
    if (!tensors.count(item.first)) problems += " '" + item.first + "' is missing;";
  if (!problems.empty()) throw FileError(source + ": does not fit the optimizer:" + problems);
  load_into_module(*model, of_model, source);
  const at::NoGradGuard no_grad;
  for (const auto& [name, slot] : of_optimizer) slot.copy_(tensors.at(name));
  steps_done_ = std::stoll(step_text);
  for (Group& group : groups_)
    for (at::Tensor& step : group.steps) step.fill_(static_cast<double>(steps_done_));
}

}  // namespace turnout
