// Compares texts line by line.
#include "distributed/difference.h"

#include <algorithm>
#include <map>
#include <sstream>
#include <utility>

namespace turnout::distributed {
namespace {

// Without indent, and without the comma that JSON puts behind a field.
std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    if (line.ends_with(',')) line.pop_back();
    line.erase(0, std::min(line.find_first_not_of(' '), line.size()));
    lines.push_back(std::move(line));
  }
  return lines;
}

}  // namespace

std::string ranks_text(const std::vector<int64_t>& ranks) {
  std::string text;
  for (const auto rank : ranks) text.append(text.empty() ? "" : ", ").append(std::to_string(rank));
  return (ranks.size() == 1 ? "rank " : "ranks ") + text;
}

std::string difference(const std::vector<std::string>& texts, const std::vector<int64_t>& ranks) {
  std::vector<std::vector<std::string>> of_rank;
  size_t most = 0;
  for (const auto& text : texts) {
    of_rank.push_back(lines_of(text));
    most = std::max(most, of_rank.back().size());
  }
  for (size_t line = 0; line < most; ++line) {
    std::map<std::string, std::vector<int64_t>> holders;
    for (size_t i = 0; i < of_rank.size(); ++i)
      holders[line < of_rank[i].size() ? of_rank[i][line] : "no such line"].push_back(ranks[i]);
    if (holders.size() == 1) continue;
    std::string found;
    for (const auto& [text, of_text] : holders)
      found.append(found.empty() ? "" : ", ").append(ranks_text(of_text)).append(of_text.size() == 1 ? " has " : " have ")
          .append(text);
    return found;
  }
  return "";
}

}  // namespace turnout::distributed
