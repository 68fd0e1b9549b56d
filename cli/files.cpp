// Where text comes from and where results go.
#include "run_options.h"

#include <turnout/checkpoint.h>

#include <c10/util/Exception.h>

#include <unistd.h>

#include <array>
#include <cstdio>
#include <filesystem>

namespace turnout::cli {
namespace {

// Asks the Python of the environment ($TURNOUT_PYTHON, else the first on the path) where its standard library is.
std::string standard_library() {
  const char* command =
      "exec \"${TURNOUT_PYTHON:-python3}\" -c "
      "'import sysconfig; print(sysconfig.get_path(\"stdlib\"), end=\"\")' 2>/dev/null";
  std::string answer;
  if (FILE* pipe = popen(command, "r")) {
    std::array<char, 4096> buffer{};
    while (const size_t got = fread(buffer.data(), 1, buffer.size(), pipe)) answer.append(buffer.data(), got);
    pclose(pipe);
  }
  TORCH_CHECK_VALUE(!answer.empty(), "no python3 found, whose standard library is the default text: give --text");
  return answer;
}

}  // namespace

std::shared_ptr<const ByteText> load_text_of(RunOptions& options) {
  TextOptions text_options;
  std::vector<std::string> paths = options.text;
  if (paths.empty()) {
    paths = {standard_library()};
    text_options.extension = ".py";
  }
  return std::make_shared<const ByteText>(load_text(paths, text_options));
}

void prepare_output(const std::string& folder) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw FileError(folder + ": cannot make the folder: " + error.message());
  AtomicFile probe(folder + "/.writable");
  probe.write("", 0);  // never committed: nothing stays behind
}

}  // namespace turnout::cli
