// Finds the text to train on, and keeps whole files apart for evaluation.
#include <turnout/text.h>

#include <turnout/checkpoint.h>

#include "models/hash.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <filesystem>
#include <limits>
#include <set>
#include <string_view>

namespace turnout {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kOneInHeldOut = 20;
constexpr size_t kBytesSniffed = 8192;

struct Found {
  std::string name;  // relative to the folder it was found in
  std::string path;
  std::string content;
  uint64_t hash = 0;
};

bool is_skipped_folder(const std::string& name) {
  return name == "test" || name == "tests" || name == "__pycache__" || name == "site-packages" ||
         name == "dist-packages";
}

void find_files(const fs::path& root, const TextOptions& options, std::vector<Found>& found) {
  std::error_code error;
  fs::recursive_directory_iterator walk(root, fs::directory_options::skip_permission_denied, error);
  if (error) throw FileError(root.string() + ": cannot read: " + error.message());
  for (; walk != fs::recursive_directory_iterator(); walk.increment(error)) {
    if (error) throw FileError(root.string() + ": cannot read: " + error.message());
    const std::string name = walk->path().filename().string();
    if (walk->is_directory(error) && !walk->is_symlink(error)) {
      if (name.front() == '.' || is_skipped_folder(name)) walk.disable_recursion_pending();
      continue;
    }
    if (name.front() == '.' || walk->is_symlink(error) || !walk->is_regular_file(error)) continue;
    if (!std::string_view(name).ends_with(options.extension)) continue;
    found.push_back({walk->path().lexically_relative(root).generic_string(), walk->path().string(), {}, 0});
  }
}

// Reads up to the limit and leaves out what is no text. Files named by the user count as text.
std::vector<Found> read_texts(std::vector<Found> found, bool named, int64_t& room) {
  std::vector<Found> texts;
  for (Found& file : found) {
    file.content = read_file(file.path, std::numeric_limits<int64_t>::max());
    const auto size = static_cast<int64_t>(file.content.size());
    const bool binary = std::string_view(file.content).substr(0, kBytesSniffed).find('\0') != std::string_view::npos;
    if (size == 0 || size > room || (binary && !named)) continue;
    room -= size;
    file.hash = mix_bits(hash_bytes(file.name));
    texts.push_back(std::move(file));
  }
  return texts;
}

ByteText cut(const Found& file) {
  const size_t at = file.content.size() - file.content.size() / 10;
  return {file.content.substr(0, at), file.content.substr(at), {file.name}, {file.name + " (last tenth)"}};
}

}  // namespace

uint64_t ByteText::digest() const { return hash_bytes(held_out, hash_bytes(training)); }

ByteText load_text(const std::vector<std::string>& paths, const TextOptions& options) {
  std::vector<Found> texts;
  std::set<fs::path> seen;  // paths may overlap
  int64_t room = options.limit;
  for (const std::string& path : paths) {
    std::vector<Found> found;
    std::error_code error;
    const bool folder = fs::is_directory(path, error);
    if (folder) {
      find_files(path, options, found);
      std::sort(found.begin(), found.end(), [](const Found& a, const Found& b) { return a.name < b.name; });
    } else {
      found.push_back({fs::path(path).filename().string(), path, {}, 0});
    }
    std::erase_if(found,
                  [&](const Found& file) { return !seen.insert(fs::weakly_canonical(file.path, error)).second; });
    for (Found& file : read_texts(std::move(found), !folder, room)) texts.push_back(std::move(file));
  }
  std::string all;
  for (const std::string& path : paths) all += (all.empty() ? "" : ", ") + path;
  TORCH_CHECK_VALUE(!texts.empty(), "turnout: no text found in ", all.empty() ? "no path at all" : all);
  if (texts.size() == 1) return cut(texts.front());

  const auto smallest =
      std::min_element(texts.begin(), texts.end(), [](const Found& a, const Found& b) { return a.hash < b.hash; });
  const bool none =
      std::none_of(texts.begin(), texts.end(), [](const Found& file) { return file.hash % kOneInHeldOut == 0; });
  ByteText text;
  for (const Found& file : texts) {
    const bool held_out = none ? file.hash == smallest->hash : file.hash % kOneInHeldOut == 0;
    (held_out ? text.held_out : text.training) += file.content;
    (held_out ? text.held_out_files : text.training_files).push_back(file.name);
  }
  TORCH_CHECK_VALUE(!text.training.empty(), "turnout: nothing is left to train on in ", all,
                    ": every file is held out");
  return text;
}

}  // namespace turnout
