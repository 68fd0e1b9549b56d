// Tensors of safetensors files, read or mapped, from one file or from the shards of an index.
#include <turnout/checkpoint.h>

#include "checkpoint/safetensors_header.h"
#include "checkpoint/shards.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>

namespace turnout {
namespace {

// A bool is 0 or 1: the program may do anything with another byte, so such a file is refused.
void check_bools(const InputFile& file, const TensorEntry& entry, const void* data) {
  const auto* bytes = static_cast<const uint8_t*>(data);
  if (std::any_of(bytes, bytes + (entry.end - entry.begin), [](uint8_t byte) { return byte > 1; }))
    file.fail("tensor '" + entry.name + "' is BOOL and holds bytes that are neither 0 nor 1");
}

at::Tensor read(const InputFile& file, const TensorEntry& entry) {
  at::Tensor tensor = at::empty(entry.shape, at::TensorOptions(entry.type));
  file.read_at(entry.begin, tensor.mutable_data_ptr(), entry.end - entry.begin);
  if (entry.type == at::kBool) check_bools(file, entry, tensor.const_data_ptr());
  return tensor;
}

at::Tensor view(const InputFile& file, const TensorEntry& entry, const std::shared_ptr<char>& mapping) {
  if (entry.begin % static_cast<int64_t>(c10::elementSize(entry.type)) != 0) return read(file, entry);
  char* data = mapping.get() + entry.begin;
  if (entry.type == at::kBool) check_bools(file, entry, data);
  return at::from_blob(
      data, entry.shape, [mapping](void*) {}, at::TensorOptions(entry.type));
}

void add_file(const std::string& path, const std::string& prefix, bool map, TensorFile& content) {
  const InputFile file(path);
  const SafetensorsHeader header = read_header(file);
  const auto mapping = map ? file.map() : nullptr;
  for (const TensorEntry& entry : header.entries) {
    if (!entry.name.starts_with(prefix)) continue;
    content.tensors.emplace(entry.name, map ? view(file, entry, mapping) : read(file, entry));
  }
  content.metadata.insert(header.metadata.begin(), header.metadata.end());
}

// What index and shard say of each other's tensors.
std::string compare(const std::string& path, const std::set<std::string>& promised, const TensorFile& shard) {
  std::string problems;
  const auto add = [&](const std::string& name, const char* words) {
    problems += (problems.empty() ? "" : "; ") + std::string("'") + name + "' " + words + " " + path;
  };
  for (const std::string& name : promised)
    if (!shard.tensors.count(name)) add(name, "is missing from");
  for (const auto& item : shard.tensors)
    if (!promised.count(item.first)) add(item.first, "stands, unknown to the index, in");
  return problems;
}

TensorFile open_tensors(const std::string& path, const std::string& prefix, bool map) {
  TensorFile content;
  std::string problems;
  for (const auto& [file, promised] : find_shards(path, prefix)) {
    if (promised.empty()) {  // there is no index
      add_file(file, prefix, map, content);
      return content;
    }
    TensorFile shard;
    add_file(file, prefix, map, shard);
    const std::string found = compare(file, promised, shard);
    if (!found.empty()) problems += (problems.empty() ? "" : "; ") + found;
    content.tensors.merge(shard.tensors);
    content.metadata.merge(shard.metadata);
  }
  if (!problems.empty()) throw FileError(path + ": shards do not fit their index: " + problems);
  return content;
}

}  // namespace

TensorFile load_tensors(const std::string& path, const std::string& prefix) {
  return open_tensors(path, prefix, false);
}
TensorFile map_tensors(const std::string& path, const std::string& prefix) { return open_tensors(path, prefix, true); }

}  // namespace turnout
