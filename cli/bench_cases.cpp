// Inputs, weights and the calls that are timed.
#include "bench_cases.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

namespace turnout::cli {
namespace {

constexpr double kBeyondCaches = 600e6;  // bytes of weights that decoding moves through
constexpr double kScratch = 256e6;       // what the kernels may keep between calls
constexpr int64_t kRoutings = 8;         // decoding takes them in turn, so that no expert stays in a cache

/// What a call gets: random rows, distinct random experts, weights 1 / top_k.
struct Inputs {
  at::Tensor x, topk_ids, topk_weights;
  int64_t active;  // experts with rows

  Inputs(const BenchShape& s, int64_t tokens, c10::ScalarType type)
      : x(at::randn({tokens, s.hidden}).to(type)),
        topk_ids(std::get<1>(at::rand({tokens, s.experts}).topk(s.top_k))),
        topk_weights(at::full({tokens, s.top_k}, 1.0 / static_cast<double>(s.top_k))),
        active(at::bincount(topk_ids.flatten()).count_nonzero().item<int64_t>()) {}
};

/// Small random numbers, a block of them over and over: a time depends on no value.
at::Tensor random_weights(at::IntArrayRef sizes, c10::ScalarType type) {
  const at::Tensor weights = at::empty(sizes, type);
  const at::Tensor flat = weights.view(-1);
  const int64_t length = std::min(int64_t{1} << 20, flat.numel());
  const at::Tensor block = at::randn({length}).mul_(0.02).to(type);
  for (int64_t i = 0; i < flat.numel(); i += length) {
    const int64_t n = std::min(length, flat.numel() - i);
    flat.narrow(0, i, n).copy_(block.narrow(0, 0, n));
  }
  return weights;
}

int64_t up_rows(const BenchShape& s) { return is_gated(s.activation) ? 2 * s.ffn : s.ffn; }

double element_bytes(const std::string& type) { return static_cast<double>(c10::elementSize(parse_type(type))); }

bool is_packed(BenchCase which) { return which == BenchCase::forward_packed || which == BenchCase::decode; }

}  // namespace

const char* to_string(BenchCase which) { return kBenchCases.at(static_cast<size_t>(which)); }

BenchCase parse_bench_case(const std::string& name) {
  const auto found = std::find(kBenchCases.begin(), kBenchCases.end(), name);
  TORCH_CHECK_VALUE(found != kBenchCases.end(), "case is '", name, "', expected one of ",
                    fmt::format("{}", fmt::join(kBenchCases, ", ")));
  return static_cast<BenchCase>(found - kBenchCases.begin());
}

bool is_decode(BenchCase which) { return which == BenchCase::decode || which == BenchCase::decode_plain; }

BenchBank::BenchBank(BenchJob job, double memory)
    : job_(std::move(job)),
      memory_(memory),
      bank_bytes_(static_cast<double>(job_.shape.weights()) * element_bytes(job_.type)) {}

/// Of rows, of gradients and of the one bank that packing reads from.
double BenchBank::working_bytes(int64_t tokens) const {
  const BenchShape& s = job_.shape;
  const double rows = static_cast<double>(tokens * s.top_k), element = element_bytes(job_.type);
  const double call = 2 * static_cast<double>(tokens * s.hidden) * element + rows * static_cast<double>(s.hidden) * 4 +
                      rows * static_cast<double>(s.ffn) * element;
  if (job_.which == BenchCase::step)
    return kScratch + bank_bytes_ + 2 * call + rows * static_cast<double>(up_rows(s)) * element;
  return kScratch + call + (is_packed(job_.which) ? bank_bytes_ : 0);
}

void BenchBank::make_weights(int64_t copies) {
  const BenchShape& s = job_.shape;
  const c10::ScalarType type = parse_type(job_.type);
  while (static_cast<int64_t>(plain_.size() + packed_.size()) < copies) {
    ExpertWeights weights{.up = {random_weights({s.experts, up_rows(s), s.hidden}, type)},
                          .down = {random_weights({s.experts, s.hidden, s.ffn}, type)}};
    if (is_packed(job_.which))
      packed_.push_back(prepack(weights, s.activation));
    else
      plain_.push_back(std::move(weights));
  }
}

BenchResult BenchBank::run(int64_t tokens, double seconds) {
  BenchResult result{.tokens = tokens};
  const double room = memory_ - working_bytes(tokens);
  if (room < bank_bytes_) {
    result.skipped = fmt::format("needs {:.1f} GB of memory, {:.1f} GB may be used",
                                 (working_bytes(tokens) + bank_bytes_) / 1e9, memory_ / 1e9);
    return result;
  }
  const double wanted = is_decode(job_.which) ? std::ceil(kBeyondCaches / bank_bytes_) : 1;
  const auto copies = static_cast<int64_t>(std::min(wanted, std::floor(room / bank_bytes_)));
  make_weights(copies);
  result.resident_bytes = static_cast<double>(copies) * bank_bytes_;
  result.flops = static_cast<double>(
      tokens * feed_forward_flops(job_.shape.hidden, job_.shape.ffn, job_.shape.activation, job_.shape.top_k));
  if (job_.which == BenchCase::step)
    run_step(result, seconds);
  else
    run_inference(result, seconds);
  result.moved_bytes = result.weight_bytes * (job_.which == BenchCase::step ? 3 : 1);
  return result;
}

void BenchBank::run_inference(BenchResult& result, double seconds) const {
  const at::NoGradGuard no_gradient;
  const bool decode = is_decode(job_.which);
  std::vector<Inputs> inputs;
  double active = 0;
  for (int64_t i = 0; i < (decode ? kRoutings : 1); ++i) {
    inputs.emplace_back(job_.shape, result.tokens, parse_type(job_.type));
    active += static_cast<double>(inputs.back().active);
  }
  const double expert_bytes = bank_bytes_ / static_cast<double>(job_.shape.experts);
  result.weight_bytes = active / static_cast<double>(inputs.size()) * expert_bytes;
  const auto of = [](const auto& list, int64_t round) -> const auto& {
    return list[static_cast<size_t>(round) % list.size()];
  };
  const auto work = [&](int64_t round) {
    return decode ? static_cast<double>(of(inputs, round).active) * expert_bytes : result.flops;
  };
  const auto limit = [&] { return decode ? read_speed_now() : peak_now(job_.type == "bf16"); };
  const auto run = [&](int64_t round) {
    const Inputs& in = of(inputs, round);
    if (packed_.empty())
      fused_experts(in.x, in.topk_ids, in.topk_weights, of(plain_, round), job_.shape.activation);
    else
      fused_experts(in.x, in.topk_ids, in.topk_weights, of(packed_, round));
  };
  result.measured = measure(seconds, work, limit, run);
}

void BenchBank::run_step(BenchResult& result, double seconds) {
  const Inputs in(job_.shape, result.tokens, parse_type(job_.type));
  result.flops *= 3;  // the backward has two products for each of the forward
  result.weight_bytes = static_cast<double>(in.active) / static_cast<double>(job_.shape.experts) * bank_bytes_;
  const ExpertWeights& weights = plain_.front();
  const std::vector<at::Tensor> leaves = {in.x, in.topk_weights, weights.up.front(), weights.down.front()};
  for (const at::Tensor& leaf : leaves) leaf.requires_grad_(true);
  const at::Tensor grad = at::randn_like(in.x, in.x.options().requires_grad(false));
  const auto run = [&](int64_t) {
    for (const at::Tensor& leaf : leaves) leaf.mutable_grad().reset();
    fused_experts(in.x, in.topk_ids, in.topk_weights, weights, job_.shape.activation).backward(grad);
  };
  result.measured = measure(
      seconds, [&](int64_t) { return result.flops; }, [&] { return peak_now(job_.type == "bf16"); }, run);
}

}  // namespace turnout::cli
