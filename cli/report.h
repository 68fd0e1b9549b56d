// The report: one HTML page that holds its data, its charts' library and its style, and loads nothing.
#pragma once

#include "tensor_json.h"

#include <string>

namespace turnout::cli {

/// @throws FileError when the page's template or plotly's bundle do not lie beside the program
void check_report_files();

/// The page that cli/report/ draws of these data: `results` with curves, telemetry, layers, models, training, text and
/// machine makes a comparison; `layer`, or `options` with the sections of an example, an inspection.
std::string report_page(const std::string& title, const Json& data);

}  // namespace turnout::cli
