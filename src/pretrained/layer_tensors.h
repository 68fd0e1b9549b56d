// One MoE layer between its published tensors and the parameters of MoE.
#pragma once

#include "pretrained/config.h"

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

namespace turnout::pretrained {

/// Names as module_tensors(MoE) has them, or as files have them.
using Tensors = std::map<std::string, at::Tensor>;

/// The parameters and buffers of MoE out of a layer's tensors, in either layout, quantised or not.
///
/// @param published under their names without the root
/// @param type of the experts, shared ones too; none: that of the file, bfloat16 for what is decoded. Gates and the
///        selection bias stay as they are
/// @param source how messages call where they came from
/// @throws FileError with one message that lists every tensor that is missing, unused, of a wrong shape or type
Tensors to_module(const Config& config, const Tensors& published, std::optional<at::ScalarType> type,
                  const std::string& source);

/// The other way: published names without the root.
/// @throws c10::ValueError when the family does not have this layout, or `module` is not a layer of this family
Tensors to_published(const Config& config, const Tensors& module, KeyLayout layout);

/// The published tensors of a layer, mapped, without the root that their names start with.
struct FoundLayer {
  std::string root;
  Tensors tensors;
};

/// @throws FileError when no tensor lies under any root that the family has
FoundLayer find_layer(const Config& config, const std::string& folder, int64_t layer);

/// load_moe_layer() and published_tensors() (pretrained.h) on the parameters and buffers of MoE alone.
Tensors load_layer(const std::string& folder, int64_t layer, std::optional<at::ScalarType> type);
Tensors publish(const std::string& folder, int64_t layer, KeyLayout layout, const Tensors& module);

}  // namespace turnout::pretrained
