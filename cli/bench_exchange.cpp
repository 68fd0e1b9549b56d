// Rounds that all ranks make together; the slowest rank's time counts.
#include "bench_exchange.h"

#include "bench_limits.h"
#include "machine.h"
#include "ranks.h"
#include "terminal.h"

#include <turnout/checkpoint.h>
#include <turnout/combine.h>
#include <turnout/expert_parallel.h>

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <functional>
#include <numeric>

namespace turnout::cli {
namespace {

using Json = nlohmann::ordered_json;
using Counts = std::vector<int64_t>;

constexpr int64_t kWarm = 2, kFewest = 5, kMost = 2000;
constexpr std::array<int64_t, 3> kChunks{1, 2, 4};

// The collective as torch has it, without any of our code.
at::Tensor plain_all_to_all(const at::Tensor& x, const Counts& receive, const Counts& send, const Group& group) {
  if (group.size == 1) return x.clone();
  const auto call = [](const char* name, torch::jit::Stack stack) {
    c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(&stack);
    return stack.front().toTensor();
  };
  const auto started = call("_c10d_functional::all_to_all_single", {x, receive, send, group.name});
  return call("_c10d_functional::wait_tensor", {started});
}

class Rounds {
 public:
  Rounds(const Ranks& ranks, double seconds) : ranks_(ranks), seconds_(seconds) {}

  Spread measure(const std::function<void()>& run) const { return measure_by_turns({run})[0]; }

  // For times that are compared with each other: what disturbs one round falls on all.
  std::vector<Spread> measure_by_turns(const std::vector<std::function<void()>>& runs) const {
    double once = 0;
    for (const auto& run : runs) once += slowest({timed(run, kWarm)})[0] / kWarm;
    const double wanted = seconds_ * static_cast<double>(runs.size()) / std::max(once, 1e-6);
    const auto rounds = std::clamp(static_cast<int64_t>(ranks_.of_first(wanted)), kFewest, kMost);
    std::vector<std::vector<double>> times(runs.size());
    for (int64_t i = 0; i < rounds; ++i)
      for (size_t r = 0; r < runs.size(); ++r) times[r].push_back(timed(runs[r], 1));
    if (ranks_.interrupted_anywhere()) throw Interrupted("stopped");
    std::vector<Spread> spreads;
    for (const auto& of_run : times) spreads.push_back(spread_of(slowest(of_run)));
    return spreads;
  }

 private:
  double timed(const std::function<void()>& run, int64_t times) const {
    sum_over(at::zeros({1}), ranks_.layout().all);  // begin together
    const double start = wall_seconds();
    for (int64_t i = 0; i < times; ++i) run();
    return wall_seconds() - start;
  }

  std::vector<double> slowest(const std::vector<double>& times) const {
    const auto all = gather_over(at::tensor(times, at::kDouble).unsqueeze(0), ranks_.layout().all).amax(0);
    return {all.const_data_ptr<double>(), all.const_data_ptr<double>() + all.numel()};
  }

  const Ranks& ranks_;
  double seconds_;
};

/// One shape on the ranks: the layer's bank, tokens and a plan of even routing.
struct Case {
  BenchShape shape;
  at::ScalarType type;
  int64_t tokens;
  Group group;
  Counts bounds{};
  FeedForwardBank bank{nullptr};
  at::Tensor x{}, weights{};
  DispatchPlan plan{};
  Counts send{}, receive{};
  at::Tensor received{};  // [ranks, own experts]

  Case(const BenchShape& s, const std::string& type_name, int64_t tokens_in, const Group& group_in)
      : shape(s), type(parse_type(type_name)), tokens(tokens_in), group(group_in) {
    bounds = expert_bounds(shape.experts, group.size);
    const auto first = bounds[group.rank];
    bank = FeedForwardBank(FeedForwardOptions{shape.hidden, shape.ffn, shape.activation, false},
                           bounds[group.rank + 1] - first);
    bank->to(type);
    at::manual_seed(1 + group.rank);
    x = at::randn({tokens, shape.hidden}).to(type);
    const auto logits = at::rand({tokens, shape.experts});
    const auto routing = route(logits, shape.top_k);
    weights = routing.topk_weights;
    plan = turnout::plan(routing.topk_ids, shape.experts);
    received = exchange_counts(plan.tokens_per_expert(), bounds, x, group);
    const auto of_rank = received.sum(1);
    receive.assign(of_rank.const_data_ptr<int64_t>(), of_rank.const_data_ptr<int64_t>() + group.size);
    const auto* offset = plan.expert_offsets.const_data_ptr<int64_t>();
    for (int64_t r = 0; r < group.size; ++r) send.push_back(offset[bounds[r + 1]] - offset[bounds[r]]);
  }

  // To other ranks, one way.
  double bytes() const {
    const auto rows = std::accumulate(send.begin(), send.end(), int64_t{0}) - send[group.rank];
    return static_cast<double>(rows * shape.hidden) * static_cast<double>(x.element_size());
  }

  DispatchPlan plan_of_received() const {
    const auto held = bounds[group.rank + 1] - bounds[group.rank];
    const auto ids = at::repeat_interleave(at::arange(held).repeat({group.size}), received.flatten());
    return turnout::plan(ids.unsqueeze(1), held);
  }
};

void step(ExpertParallel& layer, const Case& c) {
  for (auto& parameter : layer->parameters()) parameter.mutable_grad() = at::Tensor();
  auto x = c.x.detach().requires_grad_();
  layer->forward(x, c.weights, c.plan).sum().backward();
}

Json run(const Case& c, const std::string& type_name, const Rounds& rounds) {
  const auto rows = dispatch(c.x, c.plan);
  const auto arrived = exchange_rows(rows, c.send, c.receive, c.group);
  const auto own_plan = c.plan_of_received();
  const auto ones = at::ones({arrived.size(0), 1});
  Json json{{"shape", to_json(c.shape)}, {"type", type_name}, {"tokens", c.tokens}, {"bytes", c.bytes()}};
  {
    const at::NoGradGuard no_grad;
    const auto plain_and_ours = rounds.measure_by_turns(
        {[&] { plain_all_to_all(plain_all_to_all(rows, c.receive, c.send, c.group), c.send, c.receive, c.group); },
         [&] { exchange_rows(exchange_rows(rows, c.send, c.receive, c.group), c.receive, c.send, c.group); }});
    json["plain"] = to_json(plain_and_ours[0]);
    json["exchange"] = to_json(plain_and_ours[1]);
    json["counts"] = to_json(rounds.measure([&] { exchange_counts(c.plan.tokens_per_expert(), c.bounds, c.x, c.group); }));
    auto bank = c.bank;
    json["experts"] = to_json(rounds.measure([&] { bank->forward(arrived, ones, own_plan); }));
  }
  std::vector<std::function<void()>> forwards, steps;
  for (const auto chunks : kChunks) {
    ExpertParallel layer(c.bank.ptr(), c.group, c.bounds, chunks);
    forwards.emplace_back([&c, layer]() mutable {
      const at::NoGradGuard no_grad;
      layer->forward(c.x, c.weights, c.plan);
    });
    steps.emplace_back([&c, layer]() mutable { step(layer, c); });
  }
  for (const auto& [name, runs] : {std::pair{"forward", forwards}, {"step", steps}}) {
    const auto spreads = rounds.measure_by_turns(runs);
    for (size_t i = 0; i < kChunks.size(); ++i) json[name][std::to_string(kChunks[i])] = to_json(spreads[i]);
  }
  return json;
}

constexpr const char* kRow = "{:<17} {:>6} {:<4} {:>8} {:>9} {:>9} {:>7} {:>9} {:>23} {:>23}\n";

void print_row(const Json& json, int64_t ranks) {
  const auto ms = [](const Json& spread) { return fmt::format("{:.2f}", 1e3 * spread.at("median").get<double>()); };
  const auto all = [&](const Json& of_chunks) {
    std::string text;
    for (const auto& item : of_chunks) text += (text.empty() ? "" : " / ") + ms(item);
    return text;
  };
  const double plain = json.at("plain").at("median"), exchange = json.at("exchange").at("median");
  fmt::print(kRow, json.at("shape").at("name").get<std::string>(), json.at("tokens").get<int64_t>(),
             json.at("type").get<std::string>(), fmt::format("{:.2f}", json.at("bytes").get<double>() / 1e6),
             ms(json.at("plain")), ms(json.at("exchange")), ranks > 1 ? fmt::format("{:.0f} %", 100 * plain / exchange) : "-",
             ms(json.at("experts")), all(json.at("forward")), all(json.at("step")));
  std::fflush(stdout);
}

}  // namespace

void bench_exchange(const std::vector<BenchShape>& shapes, const std::vector<std::string>& types, double seconds,
                    const std::string& path) {
  const Ranks ranks(RankOptions{});
  const Rounds rounds(ranks, seconds);
  catch_interrupts();
  Json json{{"machine", machine_json()}, {"ranks", ranks.size()}, {"results", Json::array()}};
  if (ranks.first()) {
    fmt::print("{}, {} ranks\nms of the slowest rank; MB: sent to other ranks, one way; plain, exchange: out and back\n\n",
               machine_line(), ranks.size());
    fmt::print(kRow, "shape", "tokens", "type", "MB", "plain", "exchange", "share", "experts", "forward, 1/2/4 chunks",
               "step, 1/2/4 chunks");
  }
  for (const auto& shape : shapes)
    for (const auto& type : shape.types) {
      if (!types.empty() && std::find(types.begin(), types.end(), type) == types.end()) continue;
      for (const auto tokens : shape.tokens) {
        json["results"].push_back(run(Case(shape, type, tokens, ranks.layout().experts), type, rounds));
        if (ranks.first()) print_row(json["results"].back(), ranks.size());
      }
    }
  if (ranks.first() && !path.empty()) write_file(path, json.dump(2) + "\n");
}

}  // namespace turnout::cli
