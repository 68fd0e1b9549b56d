// The files of a checkpoint: one, or the shards that an index names.
#pragma once

#include <map>
#include <set>
#include <string>

namespace turnout {

inline constexpr const char* kWeightsName = "model.safetensors";
inline constexpr const char* kIndexName = "model.safetensors.index.json";

/// Path of each file to the names that the index puts there; one path without names where there is no index.
using Shards = std::map<std::string, std::set<std::string>>;

/// @param path a file, or a folder with one file or an index
/// @param prefix the index is read for names that start with it; other shards are left out
/// @throws FileError for a folder with neither, or an index that is no index or leads out of its folder
Shards find_shards(const std::string& path, const std::string& prefix);

}  // namespace turnout
