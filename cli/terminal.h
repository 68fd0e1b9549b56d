// What the program shows while it works, and how it is stopped.
#pragma once

#include <chrono>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

namespace turnout::cli {

/// Ctrl-C was pressed; main() ends with status 130.
class Interrupted : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// From here on the first Ctrl-C only raises the flag that interrupted() reads; a second one ends the process.
void catch_interrupts();
bool interrupted();

/// Writes to stderr. A message that cannot be written is lost; the work that it tells of goes on.
void say(std::string_view text);
/// The text on one line: control characters, as file names may hold them, become \n and \x1b.
std::string one_line(std::string_view text);

/// "1:05", "2:03:04"
std::string clock_text(double seconds);
/// "950", "12.3k", "4.56M"
std::string short_number(double value);

/// Progress on stderr: a bar that redraws itself on a terminal (coloured unless NO_COLOR is set), elsewhere a plain
/// line every twentieth of the work.
class Progress {
 public:
  /// @param shown false: on the other ranks of a run, which show nothing
  explicit Progress(int64_t total, bool shown = true);
  /// Removes the bar from the terminal.
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Whether update(done, …) would show anything: lets the caller skip the making of the text.
  bool due(int64_t done) const;
  void update(int64_t done, const std::string& text);

 private:
  using Clock = std::chrono::steady_clock;
  int64_t total_;
  bool wanted_;
  int64_t first_ = -1;  // steps done when the first update came: a resumed run does not begin at 0
  int64_t last_part_ = 0;
  bool terminal_;
  bool color_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point shown_{};
};

}  // namespace turnout::cli
