// Puts template, style, scripts, plotly's bundle and data into one file.
#include "report.h"

#include <turnout/checkpoint.h>

#include <filesystem>
#include <string_view>

namespace turnout::cli {
namespace {

constexpr int64_t kLargestPart = int64_t{64} << 20;
// In this order; report.js defines what the others use, start() runs at the end.
constexpr const char* kScripts[] = {"report.js", "compare.js", "inspect.js"};

std::string report_folder() {
  std::error_code error;
  const std::filesystem::path root = std::filesystem::read_symlink("/proc/self/exe", error).parent_path().parent_path();
  const std::filesystem::path folder = root / "share/turnout/report";
  for (const char* name : {"page.html", "style.css", "plotly.min.js", "report.js", "compare.js", "inspect.js"})
    if (!std::filesystem::exists(folder / name, error))
      throw FileError((folder / name).string() + ": is missing: the report needs it beside the program");
  return folder.string();
}

void replace_all(std::string& text, std::string_view what, std::string_view by) {
  for (size_t at = text.find(what); at != std::string::npos; at = text.find(what, at + by.size()))
    text.replace(at, what.size(), by);
}

std::string escaped_for_html(std::string text) {
  replace_all(text, "&", "&amp;");
  replace_all(text, "<", "&lt;");
  replace_all(text, ">", "&gt;");
  return text;
}

/// Within a script element only "</script" and "<!--" end or bend the script; within strings \x3c is the same sign.
std::string escaped_for_script(std::string text) {
  replace_all(text, "</script", "\\x3c/script");
  replace_all(text, "<!--", "\\x3c!--");
  return text;
}

std::string data_text(const Json& data) {
  std::string text = data.dump(-1, ' ', false, Json::error_handler_t::replace);
  replace_all(text, "<", "\\u003c");
  return text;
}

}  // namespace

void check_report_files() { report_folder(); }

std::string report_page(const std::string& title, const Json& data) {
  const std::string folder = report_folder();
  const auto part = [&](const std::string& name) { return read_file(folder + "/" + name, kLargestPart); };
  std::string script;
  for (const char* name : kScripts) script += part(name);
  script += "start();\n";
  const std::pair<const char*, std::string> fields[] = {{"{{title}}", escaped_for_html(title)},
                                                        {"{{style}}", part("style.css")},
                                                        {"{{data}}", data_text(data)},
                                                        {"{{plotly}}", escaped_for_script(part("plotly.min.js"))},
                                                        {"{{script}}", escaped_for_script(script)}};
  // One pass over the template: what is put in is not looked at again.
  const std::string page = part("page.html");
  std::string text;
  for (size_t at = 0; at < page.size();) {
    const size_t mark = page.find("{{", at);
    text.append(page, at, mark - at);
    if (mark == std::string::npos) break;
    at = mark + 2;
    for (const auto& [name, value] : fields) {
      if (page.compare(mark, std::string_view(name).size(), name) != 0) continue;
      text += value;
      at = mark + std::string_view(name).size();
    }
  }
  return text;
}

}  // namespace turnout::cli
