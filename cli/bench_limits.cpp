// Peaks by torch's threads, rounds, quartiles, free memory.
#include "bench_limits.h"

#include "../benchmarks/machine_limits.h"
#include "terminal.h"

#include <ATen/Parallel.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <new>
#include <string>

namespace turnout::cli {
namespace {

constexpr int64_t kWarmUp = 2;
constexpr int64_t kLeastRounds = 5;
constexpr int64_t kReadBytes = int64_t{256} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

const auto on_torch_threads = [](int64_t n, const auto& body) { at::parallel_for(0, n, 1, body); };

}  // namespace

Spread spread_of(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  // The value at a fraction of the way, between neighbours in proportion.
  const auto at = [&](double fraction) {
    const double place = fraction * static_cast<double>(values.size() - 1);
    const auto below = static_cast<size_t>(place);
    const size_t above = std::min(below + 1, values.size() - 1);
    return values[below] + (place - static_cast<double>(below)) * (values[above] - values[below]);
  };
  return {at(0), at(0.25), at(0.5), at(0.75), at(1)};
}

Spread work_per(const Spread& values, double work) {
  return {work / values.max, work / values.quartile3, work / values.median, work / values.quartile1, work / values.min};
}

nlohmann::ordered_json to_json(const Spread& s) {
  return {{"median", s.median}, {"min", s.min}, {"quartile1", s.quartile1}, {"quartile3", s.quartile3}, {"max", s.max}};
}

double wall_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double peak_now(bool bf16) {
  return limits::register_peak(bf16, at::get_num_threads(), on_torch_threads, wall_seconds);
}

const char* peak_instruction(bool bf16) {
  switch (limits::best_instruction(bf16)) {
    case limits::Instruction::avx512_bf16:
      return "vdpbf16ps, 512 bits";
    case limits::Instruction::avx512_fma:
      return "vfmadd231ps, 512 bits";
    case limits::Instruction::avx2_fma:
      return "vfmadd231ps, 256 bits";
    case limits::Instruction::none:
      break;
  }
  return "none";
}

double read_speed_now() {
  static const std::unique_ptr<char, void (*)(void*)> memory = [] {
    auto* p = static_cast<char*>(std::aligned_alloc(kHugePage, kReadBytes));
    if (p == nullptr) throw std::bad_alloc();
    madvise(p, kReadBytes, MADV_HUGEPAGE);  // a limit: pages of 4 KB read slower
    std::memset(p, 1, kReadBytes);          // untouched pages are all one page of zeros
    return std::unique_ptr<char, void (*)(void*)>(p, std::free);
  }();
  return limits::read_bandwidth(memory.get(), kReadBytes, at::get_num_threads(), on_torch_threads, wall_seconds);
}

Measured measure(double seconds, const std::function<double(int64_t)>& work, const std::function<double()>& limit,
                 const std::function<void(int64_t)>& run) {
  for (int64_t i = 0; i < kWarmUp; ++i) run(i);
  std::vector<double> times, rates, limits, shares;
  for (double spent = 0; spent < seconds || static_cast<int64_t>(times.size()) < kLeastRounds;) {
    if (interrupted()) throw Interrupted("stopped; nothing was written");
    const auto round = static_cast<int64_t>(times.size());
    limits.push_back(limit());
    const double start = wall_seconds();
    run(round);
    times.push_back(wall_seconds() - start);
    spent += times.back();
    rates.push_back(work(round) / times.back());
    shares.push_back(limits.back() > 0 ? rates.back() / limits.back() : 0);
  }
  return {spread_of(times), spread_of(rates), spread_of(limits), spread_of(shares), static_cast<int64_t>(times.size())};
}

double available_memory() {
  double available = static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  std::ifstream info("/proc/meminfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("MemAvailable:")) available = std::stod(line.substr(13)) * 1024;
  double limit = 0;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit) available = std::min(available, limit);  // "max": no number
  return available;
}

}  // namespace turnout::cli
