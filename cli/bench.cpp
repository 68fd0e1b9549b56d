// `turnout bench`: how near do the experts come to the limits of this machine, measured in the same run?
#include "bench_cases.h"
#include "bench_exchange.h"
#include "commands.h"
#include "machine.h"
#include "terminal.h"

#include <turnout/checkpoint.h>

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

namespace turnout::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kMostThreads = 4096;
constexpr int kLimitRounds = 9;
constexpr uint64_t kSeed = 20240229;

struct BenchOptions {
  std::string shapes_file;
  std::vector<std::string> shapes, cases, types;
  int64_t threads = 0;
  double seconds = 0.5;
  double memory = 0;  // GB
  std::string json;
  bool list = false;
  bool limits = false;
  bool exchange = false;
};

struct MachineLimits {
  Spread fp32, bf16, read;
};

/// Of both limits; all 0 where there is no measure of one.
struct Shares {
  Spread peak, read;
};

/// The limit that binds the case was measured before each run, the other one at the start.
Shares shares_of(const BenchJob& job, const BenchResult& r, const MachineLimits& limits) {
  const auto of_start = [&](double work, const Spread& limit) {
    return limit.median > 0 ? work_per(r.measured.seconds, work / limit.median) : Spread{};
  };
  if (is_decode(job.which)) return {of_start(r.flops, job.type == "bf16" ? limits.bf16 : limits.fp32), r.measured.share};
  return {r.measured.share, of_start(r.moved_bytes, limits.read)};
}

MachineLimits measure_limits() {
  std::vector<double> fp32, bf16, read;
  for (int i = 0; i < kLimitRounds; ++i) {
    fp32.push_back(peak_now(false));
    bf16.push_back(peak_now(true));
    read.push_back(read_speed_now());
  }
  return {spread_of(fp32), spread_of(bf16), spread_of(read)};
}

void check(BenchOptions& o) {
  TORCH_CHECK_VALUE(o.threads >= 0 && o.threads <= kMostThreads, "--threads is ", o.threads, ", expected 0 to ",
                    kMostThreads, "; 0 = torch's default");
  TORCH_CHECK_VALUE(std::isfinite(o.seconds) && o.seconds > 0 && o.seconds <= 3600, "--seconds is ", o.seconds,
                    ", expected more than 0, at most 3600");
  TORCH_CHECK_VALUE(std::isfinite(o.memory) && o.memory >= 0, "--memory is ", o.memory, ", expected GB, 0 or more");
  if (o.shapes_file.empty()) o.shapes_file = default_shapes_file();
  if (o.memory == 0) o.memory = 0.8 * available_memory() / 1e9;
  if (o.threads > 0) at::set_num_threads(static_cast<int>(o.threads));
}

/// Those of the file, or those asked for, in the order asked.
std::vector<BenchShape> chosen_shapes(const BenchOptions& o) {
  const std::vector<BenchShape> all = load_shapes(o.shapes_file);
  if (o.shapes.empty()) return all;
  std::vector<BenchShape> chosen;
  for (const std::string& name : o.shapes) {
    const auto found = std::find_if(all.begin(), all.end(), [&](const BenchShape& s) { return s.name == name; });
    if (found == all.end()) {
      std::vector<std::string> names;
      for (const BenchShape& s : all) names.push_back(s.name);
      TORCH_CHECK_VALUE(false, "--shape is '", name, "', expected one of ", fmt::format("{}", fmt::join(names, ", ")));
    }
    chosen.push_back(*found);
  }
  return chosen;
}

std::vector<BenchJob> jobs_of(const BenchOptions& o, const std::vector<BenchShape>& shapes) {
  std::vector<BenchCase> cases;
  for (const std::string& name : o.cases) cases.push_back(parse_bench_case(name));
  for (const std::string& type : o.types) parse_type(type);
  const auto wanted = [](const auto& list, const auto& what) {
    return list.empty() || std::find(list.begin(), list.end(), what) != list.end();
  };
  std::vector<BenchJob> jobs;
  for (const BenchShape& shape : shapes)
    for (const std::string& type : shape.types)
      for (const char* name : kBenchCases) {
        const BenchCase which = parse_bench_case(name);
        const bool any = !is_decode(which) || !shape.decode_tokens.empty();
        if (any && wanted(o.types, type) && wanted(cases, which)) jobs.push_back({shape, which, type});
      }
  TORCH_CHECK_VALUE(!jobs.empty(), "nothing to measure: the shapes have no such case and type (see --list)");
  return jobs;
}

std::string milliseconds(double seconds) {
  const double ms = 1e3 * seconds;
  return fmt::format("{:.{}f}", ms, ms >= 100 ? 0 : ms >= 10 ? 1 : ms >= 1 ? 2 : 3);
}

std::string percent(double share) { return share > 0 ? fmt::format("{:.1f} %", 100 * share) : "-"; }

constexpr const char* kRow = "{:<17} {:>6} {:<4} {:<14} {:>8} {:>15} {:>11} {:>8} {:>8}\n";

void print_row(const BenchJob& job, const BenchResult& r, const MachineLimits& limits) {
  if (!r.skipped.empty()) {
    fmt::print("{:<17} {:>6} {:<4} {:<14} skipped: {}\n", job.shape.name, r.tokens, job.type, to_string(job.which),
               r.skipped);
  } else {
    const Measured& m = r.measured;
    const std::string spread = milliseconds(m.seconds.quartile1) + " to " + milliseconds(m.seconds.quartile3);
    const std::string rate = fmt::format("{:.1f} {}", m.rate.median / 1e9, is_decode(job.which) ? "GB/s" : "GF/s");
    const Shares shares = shares_of(job, r, limits);
    fmt::print(kRow, job.shape.name, r.tokens, job.type, to_string(job.which), milliseconds(m.seconds.median), spread,
               rate, percent(shares.peak.median), percent(shares.read.median));
  }
  std::fflush(stdout);
}

Json to_json(const BenchJob& job, const BenchResult& r, const MachineLimits& limits) {
  Json json = {{"shape", to_json(job.shape)}, {"case", to_string(job.which)}, {"type", job.type}, {"tokens", r.tokens}};
  if (!r.skipped.empty()) {
    json["skipped"] = r.skipped;
    return json;
  }
  json["flops"] = r.flops;
  json["weight_bytes_used"] = r.weight_bytes;
  json["weight_bytes_moved"] = r.moved_bytes;
  json["weight_bytes_resident"] = r.resident_bytes;
  json["rounds"] = r.measured.rounds;
  json["seconds"] = to_json(r.measured.seconds);
  json["limited_by"] = is_decode(job.which) ? "read bandwidth" : "register peak";
  json["unit"] = is_decode(job.which) ? "bytes/s" : "flops/s";
  json["rate"] = to_json(r.measured.rate);
  json["limit"] = to_json(r.measured.limit);
  const Shares shares = shares_of(job, r, limits);
  json["share_of_register_peak"] = to_json(shares.peak);
  json["share_of_read_bandwidth"] = to_json(shares.read);
  return json;
}

Json report(const BenchOptions& o, const MachineLimits& limits) {
  Json json;
  json["machine"] = machine_json();
  json["settings"] = {{"shapes_file", o.shapes_file}, {"seconds_a_case", o.seconds}, {"memory_gb", o.memory}};
  json["limits"] = {{"fp32_flops", to_json(limits.fp32)},
                    {"fp32_instruction", peak_instruction(false)},
                    {"bf16_flops", to_json(limits.bf16)},
                    {"bf16_instruction", peak_instruction(true)},
                    {"read_bytes", to_json(limits.read)}};
  json["results"] = Json::array();
  return json;
}

void print_head(const MachineLimits& limits) {
  fmt::print("{}\n", machine_line());
  fmt::print("register peak fp32 {:.0f}, bf16 {:.0f} GF/s ({}); reads {:.1f} GB/s\n", limits.fp32.median / 1e9,
             limits.bf16.median / 1e9, peak_instruction(true), limits.read.median / 1e9);
  std::fflush(stdout);
}

void bench(BenchOptions& o) {
  check(o);
  const std::vector<BenchShape> shapes = chosen_shapes(o);
  if (o.list) {
    fmt::print("{}", list_of(shapes));
    return;
  }
  if (o.exchange) {
    bench_exchange(shapes, o.types, o.seconds, o.json);
    return;
  }
  const std::vector<BenchJob> jobs = jobs_of(o, shapes);
  std::optional<AtomicFile> file;  // opened first: a long run must not end at a folder that is not there
  if (!o.json.empty()) file.emplace(o.json);
  catch_interrupts();
  at::manual_seed(kSeed);
  const MachineLimits limits = measure_limits();
  Json json = report(o, limits);
  print_head(limits);
  if (!o.limits) {
    fmt::print("\n");
    fmt::print(kRow, "shape", "tokens", "type", "case", "ms", "quartiles", "rate", "of peak", "of reads");
    for (const BenchJob& job : jobs) {
      BenchBank bank(job, 1e9 * o.memory);
      for (const int64_t tokens : is_decode(job.which) ? job.shape.decode_tokens : job.shape.tokens) {
        const BenchResult result = bank.run(tokens, o.seconds);
        print_row(job, result, limits);
        json["results"].push_back(to_json(job, result, limits));
      }
    }
    fmt::print(
        "\nMedians. Of peak: 2 flops a multiply-add of the products, against the registers' peak. Of reads:\n"
        "bytes of the weights of the experts used (thrice for a step), against plain reading. The limit of\n"
        "the rate shown was measured before each run, the other one at the start.\n");
  }
  if (file) {
    const std::string text = json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
    file->write(text.data(), text.size());
    file->commit();
  }
}

}  // namespace

void add_bench(CLI::App& program) {
  CLI::App* app = program.add_subcommand("bench", "Measure the experts against the limits of this machine");
  auto o = std::make_shared<BenchOptions>();
  app->add_option("--shape", o->shapes, "Shapes of the file, by name; all by default")->delimiter(',');
  app->add_option("--case", o->cases, "forward, forward-packed, step, decode, decode-plain; all by default")
      ->delimiter(',');
  app->add_option("--type", o->types, "bf16, fp32; both by default")->delimiter(',');
  app->add_option("--shapes", o->shapes_file, "Data file of shapes, in place of the program's own");
  app->add_option("--threads", o->threads, "Threads; 0: torch's default")->capture_default_str();
  app->add_option("--seconds", o->seconds, "Time of each measurement, after warm-up")->capture_default_str();
  app->add_option("--memory", o->memory, "GB that may be used; 0: four fifths of what is free")->capture_default_str();
  app->add_option("--json", o->json, "File for all numbers, with hardware and versions");
  app->add_flag("--list", o->list, "List the shapes and stop");
  app->add_flag("--limits", o->limits, "Measure the machine alone and stop");
  app->add_flag("--exchange", o->exchange, "Measure layers whose experts lie on the ranks that torchrun started instead");
  app->footer(
      "Examples:\n"
      "  turnout bench --shape few-rows,gelu --type fp32\n"
      "  turnout bench --case decode --threads 1 --json decode.json\n"
      "  torchrun --no-python --nproc-per-node 2 turnout bench --exchange --threads 1\n"
      "  turnout bench --list");
  app->callback([o] { bench(*o); });
}

}  // namespace turnout::cli
