// Checkpoints of training in a folder: one file, or a folder of shards whose index makes it whole.
#include <turnout/training.h>

#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <sstream>

namespace turnout {
namespace {

namespace fs = std::filesystem;

constexpr const char* kFile = "checkpoint.safetensors";
constexpr const char* kFolder = "checkpoint-";
constexpr const char* kIndex = "model.safetensors.index.json";

std::string shard_name(int64_t rank, int64_t ranks) {
  char text[64];
  std::snprintf(text, sizeof(text), "model-%05lld-of-%05lld.safetensors", static_cast<long long>(rank + 1),
                static_cast<long long>(ranks));
  return text;
}

// The step in a folder's name, or -1.
int64_t step_of_folder(const fs::path& path) {
  const std::string name = path.filename().string(), digits = name.substr(std::min(name.size(), std::strlen(kFolder)));
  const bool named = name.starts_with(kFolder) && !digits.empty() && digits.size() <= 12 &&
                     std::all_of(digits.begin(), digits.end(), [](char c) { return c >= '0' && c <= '9'; });
  return named ? std::stoll(digits) : -1;
}

int64_t step_of_file(const std::string& path) {
  const auto state = map_tensors(path);
  const auto found = state.metadata.find("step");
  return found == state.metadata.end() ? 0 : std::strtoll(found->second.c_str(), nullptr, 10);
}

// Does something on this rank; every rank throws when one of them failed.
template <class Do>
void together(const Group& ranks, const std::string& folder, Do&& act) {
  std::string problem;
  try {
    act();
  } catch (const FileError& error) {
    problem = error.what();
  } catch (const fs::filesystem_error& error) {
    problem = error.what();
  }
  const auto failed = sum_over(at::full({1}, problem.empty() ? 0 : 1, at::kLong), ranks).item<int64_t>();
  if (!problem.empty()) throw FileError(problem);
  if (failed > 0) throw FileError(folder + ": " + std::to_string(failed) + " other ranks cannot write");
}

// Names of the tensors that each rank writes.
std::vector<std::vector<std::string>> names_of_ranks(const TensorFile& own, const Group& ranks) {
  std::string text;
  for (const auto& item : own.tensors) text.append(item.first).append("\n");
  std::vector<int64_t> lengths;
  const auto bytes = at::from_blob(text.data(), {static_cast<int64_t>(text.size())}, at::kByte);
  const auto all = gather_over(bytes, ranks, &lengths);
  std::vector<std::vector<std::string>> names;
  const char* next = reinterpret_cast<const char*>(all.const_data_ptr<uint8_t>());
  for (const auto length : lengths) {
    std::istringstream lines(std::string(next, static_cast<size_t>(length)));
    auto& of_rank = names.emplace_back();
    for (std::string line; std::getline(lines, line);) of_rank.push_back(std::move(line));
    next += length;
  }
  return names;
}

std::string index_of(const std::vector<std::vector<std::string>>& names) {
  nlohmann::ordered_json map = nlohmann::ordered_json::object();
  const auto ranks = static_cast<int64_t>(names.size());
  for (int64_t rank = 0; rank < ranks; ++rank)
    for (const auto& name : names[rank]) map[name] = shard_name(rank, ranks);
  return nlohmann::ordered_json{{"metadata", nlohmann::ordered_json::object()}, {"weight_map", map}}.dump(1) + "\n";
}

void remove_others(const std::string& folder, const fs::path& kept) {
  std::vector<fs::path> old;
  for (const auto& entry : fs::directory_iterator(folder))
    if (const auto name = entry.path().filename();
        name != kept.filename() && (name == kFile || step_of_folder(entry.path()) >= 0))
      old.push_back(entry.path());
  for (const auto& path : old) {
    std::error_code ignored;
    fs::remove(path / kIndex, ignored);  // first: without it the rest is no checkpoint
    fs::remove_all(path, ignored);
  }
}

}  // namespace

void save_checkpoint(const std::string& folder, const Trainer& trainer,
                     const std::map<std::string, std::string>& metadata) {
  TensorFile state = trainer.state();
  for (const auto& [key, value] : metadata) state.metadata[key] = value;
  const Group& ranks = trainer.model->layout.all;
  if (ranks.size == 1) {
    const std::string path = folder + "/" + kFile;
    save_tensors(path, state);
    remove_others(folder, path);
    return;
  }
  const std::string path = folder + "/" + kFolder + std::to_string(trainer.steps_done());
  const auto names = names_of_ranks(state, ranks);
  bool whole = false;  // a state depends on its step alone
  together(ranks, folder, [&] {
    whole = ranks.rank == 0 && fs::exists(path + "/" + kIndex);
    if (ranks.rank != 0 || whole) return;
    fs::remove_all(path);
    fs::create_directories(path);
  });
  if (sum_over(at::full({1}, whole ? 1 : 0, at::kLong), ranks).item<int64_t>() > 0) return;
  together(ranks, folder, [&] {
    if (!state.tensors.empty()) save_tensors(path + "/" + shard_name(ranks.rank, ranks.size), state);
  });
  together(ranks, folder, [&] {
    if (ranks.rank != 0) return;
    write_file(path + "/" + kIndex, index_of(names));
    remove_others(folder, path);
  });
}

std::vector<std::string> find_checkpoints(const std::string& folder) {
  std::vector<std::pair<int64_t, std::string>> found;
  std::error_code problem;
  for (const auto& entry : fs::directory_iterator(folder, problem)) {
    const auto step = step_of_folder(entry.path());
    if (step >= 0 && fs::exists(entry.path() / kIndex, problem)) found.emplace_back(step, entry.path().string());
    if (entry.path().filename() == kFile) found.emplace_back(-1, entry.path().string());
  }
  if (found.size() > 1)  // a kill came between the writing of one kind and the removal of the other
    for (auto& [step, path] : found)
      if (step < 0) step = step_of_file(path);
  std::sort(found.begin(), found.end());
  std::vector<std::string> paths;
  for (auto& item : found) paths.push_back(std::move(item.second));
  return paths;
}

Checkpoint open_checkpoint(const std::string& folder) {
  const auto paths = find_checkpoints(folder);
  const std::string path = paths.empty() ? folder + "/" + kFile : paths.back();
  return {map_tensors(path), path};
}

}  // namespace turnout
