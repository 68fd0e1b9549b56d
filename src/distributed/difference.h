// What ranks differ in, in words.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace turnout::distributed {

/// "rank 2" or "ranks 0, 1".
std::string ranks_text(const std::vector<int64_t>& ranks);

/// The first line in which texts of several lines differ, and who holds which; empty when all are equal.
/// @param ranks whose texts these are
std::string difference(const std::vector<std::string>& texts, const std::vector<int64_t>& ranks);

}  // namespace turnout::distributed
