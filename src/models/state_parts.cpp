// Banks of experts to single experts and back.
#include "models/state_parts.h"

#include <turnout/checkpoint.h>

#include <ATen/ops/stack.h>

#include <vector>

namespace turnout {
namespace {

constexpr char kMark = '#';

std::string name_of_expert(const std::string& bank, int64_t expert) { return bank + kMark + std::to_string(expert); }

at::Tensor put_together(const Tensors& stored, const std::string& bank, int64_t first, int64_t count,
                        const std::string& source) {
  std::vector<at::Tensor> experts;
  for (int64_t e = first; e < first + count; ++e) {
    const auto found = stored.find(name_of_expert(bank, e));
    if (found == stored.end()) throw FileError(source + ": '" + name_of_expert(bank, e) + "' is missing");
    if (!experts.empty() && found->second.sizes() != experts[0].sizes())
      throw FileError(source + ": '" + found->first + "' has another shape than the experts before it");
    experts.push_back(found->second);
  }
  return at::stack(experts);
}

}  // namespace

Tensors part_to_write(const Tensors& tensors, const Parts& parts, const ParallelLayout& layout) {
  if (layout.all.size == 1) return tensors;
  Tensors own;
  for (const auto& [name, tensor] : tensors) {
    const auto part = parts.find(name);
    if (part == parts.end()) {
      if (layout.all.rank == 0) own.emplace(name, tensor);
    } else if (layout.replicas.rank == 0) {
      for (int64_t e = 0; e < part->second.count; ++e)
        own.emplace(name_of_expert(name, part->second.first + e), tensor[e]);
    }
  }
  return own;
}

Tensors parts_to_read(const Tensors& stored, const Parts& parts, const std::string& source) {
  Tensors own;
  std::map<std::string, int64_t> of_bank;  // experts that stand one by one
  for (const auto& [name, tensor] : stored) {
    const auto mark = name.rfind(kMark);
    const auto part = parts.find(name);
    if (mark != std::string::npos)
      ++of_bank[name.substr(0, mark)];
    else if (part == parts.end())
      own.emplace(name, tensor);
    else if (tensor.dim() >= 1 && tensor.size(0) == part->second.all)
      own.emplace(name, tensor.narrow(0, part->second.first, part->second.count));
    else
      throw FileError(source + ": '" + name + "' does not hold " + std::to_string(part->second.all) + " experts");
  }
  for (const auto& [bank, count] : of_bank) {
    const auto part = parts.find(bank);
    const auto first = part == parts.end() ? 0 : part->second.first;
    own.emplace(bank, put_together(stored, bank, first, part == parts.end() ? count : part->second.count, source));
  }
  return own;
}

}  // namespace turnout
