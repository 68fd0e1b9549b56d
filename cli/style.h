// Text for a terminal: emphasis where colours may be shown, and columns that stay within 80.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace turnout::cli {

/// Emphasis. Pad a cell before it is coloured: the codes have length, but no width.
class Style {
 public:
  /// Plain text, unless standard output is a terminal and NO_COLOR is not set.
  static Style of_standard_output();
  explicit Style(bool color) : color_(color) {}

  std::string strong(const std::string& text) const { return wrapped("\033[1m", text); }
  std::string good(const std::string& text) const { return wrapped("\033[32m", text); }
  std::string bad(const std::string& text) const { return wrapped("\033[31m", text); }
  std::string faint(const std::string& text) const { return wrapped("\033[2m", text); }

 private:
  std::string wrapped(const char* code, const std::string& text) const {
    return color_ && !text.empty() ? code + text + "\033[0m" : text;
  }

  bool color_;
};

inline constexpr size_t kLineWidth = 80;

/// Words after `head`, as many on a line as fit; further lines are indented to the head's length.
std::string wrap(const std::string& head, const std::vector<std::string>& words, size_t width = kLineWidth);

}  // namespace turnout::cli
