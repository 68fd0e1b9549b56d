// Progress bar and Ctrl-C.
#include "terminal.h"

#include <fmt/format.h>

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <csignal>
#include <cstdio>
#include <cstdlib>

namespace turnout::cli {
namespace {

constexpr int64_t kPlainLines = 20;
constexpr auto kRedraw = std::chrono::milliseconds(100);

volatile std::sig_atomic_t interrupt_flag = 0;

int terminal_width() {
  winsize size{};
  return ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 80;
}

}  // namespace

void catch_interrupts() {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupt_flag = 1; };
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
  sigaction(SIGINT, &action, nullptr);
}

bool interrupted() { return interrupt_flag != 0; }

void say(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stderr);
  std::fflush(stderr);
}

std::string one_line(std::string_view text) {
  std::string line;
  for (const char c : text) {
    if (c == '\n')
      line += "\\n";
    else if (std::iscntrl(static_cast<unsigned char>(c)) != 0)
      line += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    else
      line += c;
  }
  return line;
}

std::string clock_text(double seconds) {
  const auto s = static_cast<int64_t>(std::max(0.0, seconds) + 0.5);
  if (s >= 3600) return fmt::format("{}:{:02}:{:02}", s / 3600, s / 60 % 60, s % 60);
  return fmt::format("{}:{:02}", s / 60, s % 60);
}

std::string short_number(double value) {
  if (value >= 1e9) return fmt::format("{:.2f}G", value / 1e9);
  if (value >= 1e6) return fmt::format("{:.2f}M", value / 1e6);
  if (value >= 1e4) return fmt::format("{:.1f}k", value / 1e3);
  return fmt::format("{:.0f}", value);
}

Progress::Progress(int64_t total, bool shown)
    : total_(std::max<int64_t>(1, total)), wanted_(shown), terminal_(isatty(STDERR_FILENO) != 0) {
  const char* no_color = std::getenv("NO_COLOR");
  color_ = terminal_ && (no_color == nullptr || *no_color == '\0');
}

Progress::~Progress() {
  if (terminal_ && first_ >= 0) say("\r\033[K");
}

bool Progress::due(int64_t done) const {
  if (!wanted_) return false;
  if (first_ < 0 || done == total_) return true;
  return terminal_ ? Clock::now() - shown_ >= kRedraw : done * kPlainLines / total_ != last_part_;
}

void Progress::update(int64_t done, const std::string& text) {
  if (!due(done)) return;
  if (first_ < 0) first_ = done - 1;
  shown_ = Clock::now();
  last_part_ = done * kPlainLines / total_;
  const double elapsed = std::chrono::duration<double>(shown_ - start_).count();
  const double left = elapsed / static_cast<double>(done - first_) * static_cast<double>(total_ - done);
  const int percent = static_cast<int>(100 * done / total_);
  if (!terminal_) {
    say(fmt::format("{:3} %  {}  {} left\n", percent, text, clock_text(left)));
    return;
  }
  const std::string tail = fmt::format(" {:3} %  {}  {} left", percent, text, clock_text(left));
  const int room = std::clamp(terminal_width() - static_cast<int>(tail.size()) - 3, 0, 30);
  const int full = static_cast<int>(room * done / total_);
  const std::string bar = fmt::format("{:=<{}}{:-<{}}", "", full, "", room - full);
  const std::string line = room > 4 ? (color_ ? "\033[32m" + bar + "\033[0m" : bar) + tail : tail.substr(1);
  say("\r\033[K" + line);
}

}  // namespace turnout::cli
