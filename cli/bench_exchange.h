// `turnout bench --exchange`: what it costs that experts lie on several ranks.
#pragma once

#include "bench_shapes.h"

#include <string>
#include <vector>

namespace turnout::cli {

/// Measures, on the ranks that a launcher started (or the only one): rows out and back, against a plain all-to-all of the
/// same bytes; the experts alone; the whole layer, forward and step, by the number of chunks. Tokens are those of a rank.
///
/// Times are medians over rounds of the slowest rank's. Every rank calls; the first prints.
/// @param types empty = all of a shape @param json path, or empty
/// @throws Interrupted, DistributedError
void bench_exchange(const std::vector<BenchShape>& shapes, const std::vector<std::string>& types, double seconds,
                    const std::string& json);

}  // namespace turnout::cli
