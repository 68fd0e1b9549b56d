// What `inspect` found, as text of at most 80 columns.
#pragma once

#include "style.h"
#include "tensor_json.h"

#include <string>

namespace turnout::cli {

/// The sections that are there, in order. @param json as inspect.cpp puts it together
std::string inspection_text(const Json& json, const Style& style);

std::string stages_text(const Json& json, const Style& style);
std::string tokens_text(const Json& json, const Style& style);
std::string policies_text(const Json& json, const Style& style);
std::string capacity_text(const Json& json, const Style& style);
std::string collapse_text(const Json& json, const Style& style);
std::string hierarchy_text(const Json& json, const Style& style);
std::string step_text(const Json& json, const Style& style);
std::string layer_text(const Json& json, const Style& style);

/// A byte of a text in brackets, amid its neighbours.
std::string marked_text(const Json& place, const Style& style);
/// "[2, 8, 16]"; "scalar" for no axes; "" for null
std::string shape_text(const Json& shape);
/// "3 0 12", over several lines where there are many, each indented to the head's length.
std::string load_text(const std::string& head, const Json& load);

}  // namespace turnout::cli
