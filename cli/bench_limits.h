// The machine's limits on torch's threads, and how measured numbers spread.
#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <functional>
#include <vector>

namespace turnout::cli {

/// Where measured values lie.
struct Spread {
  double min = 0, quartile1 = 0, median = 0, quartile3 = 0, max = 0;
};

Spread spread_of(std::vector<double> values);
/// Of work / value for each value.
Spread work_per(const Spread& values, double work);
nlohmann::ordered_json to_json(const Spread& spread);

/// Seconds of the wall clock.
double wall_seconds();

/// Flops a second of all threads' registers, measured now, over about 5 ms; 0 where there is no measure of it.
double peak_now(bool bf16);
/// The instruction that peak_now() runs.
const char* peak_instruction(bool bf16);

/// Bytes a second of plain reading, measured now on 256 MB of its own, kept to the end: more than most caches hold.
double read_speed_now();

/// What a run took, against a limit that was measured just before it each time.
struct Measured {
  Spread seconds;
  Spread rate;   ///< work a second
  Spread limit;  ///< work a second
  Spread share;  ///< rate / limit of each round; all 0 where the limit was not measured
  int64_t rounds = 0;
};

/// Alternates limit() and run(round) for about `seconds` of run(), five rounds at least, after two more to warm up.
///
/// @param work of round i, in the units of limit()
/// @throws Interrupted after Ctrl-C
Measured measure(double seconds, const std::function<double(int64_t)>& work, const std::function<double()>& limit,
                 const std::function<void(int64_t)>& run);

/// Bytes that may still be allocated: the kernel's estimate, within the control group's limit.
double available_memory();

}  // namespace turnout::cli
